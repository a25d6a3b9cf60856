"""benchmarks/gaussian_source.py: its theory against numbers worked out otherwise, and a run of it."""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT

import vqvae

sys.path.insert(0, str(ROOT / "benchmarks"))
import gaussian_source


def test_spectrum_is_that_of_the_covariance():
    rows = torch.randn(300, 5, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4, 5]) + 10
    expected = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0)).flip(0)
    assert torch.allclose(gaussian_source.spectrum(rows.split(70)), expected, rtol=1e-9)


@pytest.mark.parametrize("bits, level, live", [(0, 16.0, 0), (0.5, 8.0, 1), (2, 2.0, 2), (4, (64 / 2**8) ** (1 / 3), 3)])
def test_shannon_is_reverse_water_filling(bits, level, live):
    error, components = gaussian_source.least_error(torch.tensor([16.0, 4.0, 1.0]).double(), bits, 1, gaussian_source.shannon)
    assert error == pytest.approx(sum(min(v, level) for v in (16, 4, 1))) and components == pytest.approx(live, abs=bits == 0)


def test_best_codes_of_one_dimension():
    # Panter & Dite 1951: the best scalar quantizer of a Gaussian, pi sqrt(3) / 2 times sigma^2 / K^2; Shannon has 1 time.
    assert gaussian_source.best_codes(1) == pytest.approx(math.pi * math.sqrt(3) / 2)
    assert 1 < gaussian_source.best_codes(400) < 1.03 < gaussian_source.best_codes(8) < gaussian_source.best_codes(2)
    assert gaussian_source.balanced_codes(2) == math.inf


def test_components_share_the_bits_where_coding_another_does_not_pay():
    # Two latents: balanced cells need d > 2, so at least five components, where Shannon would code two; the seventh is too small.
    variances = torch.tensor([10.0, 9.0, 5.0, 5.0, 5.0, 5.0, 1e-6]).double()
    assert gaussian_source.least_error(variances, 0.1, 2, gaussian_source.shannon)[1] == 1.0
    error, components = gaussian_source.least_error(variances, 12, 2, gaussian_source.balanced_codes)
    level = variances[:6].prod() ** (1 / 6) * 2 ** (-24 / 6)
    assert components == 3 and error == pytest.approx(6 * gaussian_source.balanced_codes(3) * level.item() + 1e-6)


@pytest.mark.parametrize("factor", [gaussian_source.best_codes, gaussian_source.balanced_codes])
def test_where_no_code_pays_the_error_is_the_variance(factor):
    variances = torch.tensor([16.0, 4.0, 1.0]).double()
    assert gaussian_source.least_error(variances, 0.5, 1, factor) == (21.0, 0.0)  # one component at 2.7 times 8 would be 26.8
    assert gaussian_source.best_codes(0.5) == math.inf


def test_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gaussian_source, "RESULTS", tmp_path / "out.json")
    words = ["--dataset", "dead_leaves", "--image_size", "8", "--train_subset", "600", "--val_size", "100"]
    assert not vqvae.run_command(lambda: gaussian_source.main(["--codebook_sizes", "256,4096", *words]))  # exit code 0
    record = json.loads((tmp_path / "out.json").read_text())
    small, large = record["sizes"]
    assert small["one_tile"]["psnr"] < small["shannon"]["psnr"] < large["shannon"]["psnr"]
    for size in record["sizes"]:
        assert size["balanced_codes"]["psnr"] < size["best_codes"]["psnr"] < size["shannon"]["psnr"]
    assert record["images"] == 600 and f"| 4096 | {large['shannon']['psnr']:.2f} (" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--codebook_sizes", "x"], ["--codebook_sizes", "1"], ["--lr", "fast"], ["--dry_run"],
                                   ["--dataset", "dead_leaves", "--image_size", "128"]])
def test_bad_words(words, capsys):
    assert vqvae.run_command(lambda: gaussian_source.main(words)) == 2
    assert capsys.readouterr().err.count("\n") == 1
