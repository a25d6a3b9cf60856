"""Shared fixtures: a tiny run configuration, and real CIFAR-10 where it is at hand."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vqvae


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Settings of a run that takes about a second; keyword arguments override them."""
    monkeypatch.setattr(vqvae, "DEAD_LEAVES_SIZES", {True: 200, False: 60})

    def settings(**changes):
        values = dict(dataset="dead_leaves", image_size=16, train_subset=96, test_subset=40, val_size=100,
                      hidden_dim=8, latent_dim=4, codebook_size=16, epochs=2, batch_size=16, device="cpu",
                      precision="float32", out_dir=str(tmp_path / "experiments"), name="tiny")
        return {**values, **changes}

    return settings


@pytest.fixture
def tiny_config(tiny):
    return lambda **changes: vqvae.Config(**tiny(**changes))


def rounds_to_tf32():
    """Whether convolutions would, now, on a GPU."""
    conv = getattr(torch.backends.cudnn, "conv", None)  # from PyTorch 2.9 on
    return conv.fp32_precision != "ieee" if conv else torch.backends.cudnn.allow_tf32


@pytest.fixture
def cifar10_dir():
    folder = ROOT / "data"
    if not (folder / "cifar-10-batches-py").is_dir():
        pytest.skip(f"CIFAR-10 is not in {folder}")
    return folder
