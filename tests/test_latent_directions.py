"""benchmarks/latent_directions.py: on latents made so that the answer is known, and a run of it."""

import json
import sys

import pytest
import torch
from conftest import ROOT

import vqvae

sys.path.insert(0, str(ROOT / "benchmarks"))
import latent_directions


def test_a_bend_is_told_from_a_direction_of_its_own():
    first, own, noise = torch.randn(3, 20000, generator=torch.Generator().manual_seed(0))
    z = torch.stack([10 * first, 4 * own, (first.square() - 1) * 1.5 + noise], 1)  # variances 100, 16, 4.5 + 1
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    variance, told = latent_directions.directions(z @ rotation + 7)
    assert variance == pytest.approx([100 / 121.5, 16 / 121.5, 5.5 / 121.5], rel=0.05)
    assert told == pytest.approx([1, 0, 4.5 / 5.5], abs=0.06)  # less, by what quantiles of the tails blur


def test_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latent_directions, "RESULTS", tmp_path / "out.json")
    config = vqvae.Config(**tiny(epochs=1))
    vqvae.train(config)
    folder = tmp_path / "experiments" / "tiny"
    assert not vqvae.run_command(lambda: latent_directions.main([str(folder), str(folder / "final_model.pt")]))  # exit code 0
    one, same = json.loads((tmp_path / "out.json").read_text())
    assert one == same and one["run"] == "tiny" and sum(one["variance"]) == pytest.approx(1)
    assert len(one["of_the_first"]) == config.latent_dim and f"| tiny | {one['live_directions']} |" in capsys.readouterr().out


def test_no_run(tmp_path, capsys):
    assert vqvae.run_command(lambda: latent_directions.main([str(tmp_path / "none")])) == 2
    assert capsys.readouterr().err.count("\n") == 1
