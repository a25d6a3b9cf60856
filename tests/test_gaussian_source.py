"""benchmarks/gaussian_source.py: water-filling against numbers worked out otherwise, and a run of it."""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT

import vqvae

sys.path.insert(0, str(ROOT / "benchmarks"))
import gaussian_source  # noqa: E402


def test_spectrum_is_that_of_the_covariance():
    rows = torch.randn(300, 5, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4, 5]) + 10
    expected = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0))
    assert torch.allclose(gaussian_source.spectrum(rows.split(70)), expected, rtol=1e-9)


@pytest.mark.parametrize("bits, level, live", [(0, 16.0, 0), (0.5, 8.0, 1), (2, 2.0, 2), (4, (64 / 2**8) ** (1 / 3), 3)])
def test_best_psnr_by_hand(bits, level, live):
    variances = torch.tensor([1.0, 16.0, 4.0])
    assert vqvae.water_level(variances, bits).item() == pytest.approx(level)
    psnr, count = gaussian_source.best_psnr(variances / 100, bits)
    error = sum(min(v, level) for v in (1, 16, 4)) / 3 / 100
    assert psnr == pytest.approx(-10 * math.log10(error), abs=1e-5) and count == live


def test_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gaussian_source, "RESULTS", tmp_path / "out.json")
    words = ["--dataset", "dead_leaves", "--image_size", "8", "--train_subset", "600", "--val_size", "100"]
    assert not vqvae.run_command(lambda: gaussian_source.main(["--codebook_sizes", "16,256", *words]))  # exit code 0
    record = json.loads((tmp_path / "out.json").read_text())
    small, large = record["sizes"]
    assert small["tile_psnr"] < small["psnr"] < large["psnr"] and small["live_per_latent"] < large["live_per_latent"]
    assert record["images"] == 600 and f"| 256 | {large['psnr']:.2f} |" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--codebook_sizes", "x"], ["--codebook_sizes", "1"], ["--lr", "fast"]])
def test_bad_words(words, capsys):
    assert vqvae.run_command(lambda: gaussian_source.main(words)) == 2
    assert capsys.readouterr().err.count("\n") == 1
