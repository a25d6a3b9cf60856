"""Metrics against values worked out by hand or by a plain loop."""

import math

import numpy as np
import pytest
import torch

import vqvae
from vqvae import codebook_metrics, psnr, ssim, to_bytes, to_float


class Constant(torch.nn.Module):
    """A 'model' that reconstructs every image as the same grey, with code 0 or 1 by brightness."""

    def __init__(self, grey):
        super().__init__()
        self.grey = torch.nn.Parameter(torch.tensor(float(grey)))
        self.quantizer = lambda z: (z, (z[:, 0] > 0.5).long(), torch.tensor(0.5))

    def latents(self, x, refine=0):
        return x[:, :, ::16, ::16]

    def reconstruct(self, z):
        return self.grey * torch.ones(len(z), 3, 16, 16)

    def encode(self, x):
        return self.quantizer(self.latents(x))[1]


def test_psnr_by_hand():
    assert psnr(1.0).item() == pytest.approx(0.0)
    assert psnr(0.01).item() == pytest.approx(20.0)
    assert psnr(0.0).item() == pytest.approx(100.0)  # the cap for an exact copy


def test_evaluate_by_hand():
    images = torch.zeros(4, 16, 16, 3, dtype=torch.uint8)
    images[3] = 255
    got = vqvae.evaluate(Constant(51 / 255), images, codebook_size=4, batch_size=3)
    low, high = 0.2 ** 2, 0.8 ** 2
    assert got["mse"] == pytest.approx((3 * low + high) / 4)
    assert got["psnr"] == pytest.approx(-10 * math.log10((3 * low + high) / 4), abs=1e-5)  # pooled
    per_image = (3 * -10 * math.log10(low) - 10 * math.log10(high)) / 4
    assert got["psnr_per_image"] == pytest.approx(per_image, abs=1e-4)
    assert got["psnr_y"] == pytest.approx(per_image, abs=1e-4)  # grey errors: luma equals RGB
    assert got["bits_per_index"] == pytest.approx(-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25))
    assert got["perplexity"] == pytest.approx(2 ** got["bits_per_index"])
    assert got["usage_rate"] == 0.5
    assert got["commitment_loss"] == pytest.approx(0.5)
    assert got["num_images"] == 4 and got["num_indices"] == 4


def test_metrics_are_of_rounded_clamped_images():
    images = torch.full((2, 16, 16, 3), 255, dtype=torch.uint8)
    got = vqvae.evaluate(Constant(1.7), images, codebook_size=2)
    assert got["mse"] == 0 and got["recon_loss"] == pytest.approx(0.49, rel=1e-5)
    got = vqvae.evaluate(Constant(254.6 / 255), images, codebook_size=2)
    assert got["mse"] == 0 and got["recon_loss"] > 0


def test_luma_weighs_green_most():
    images = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    images[..., 1] = 255
    got = vqvae.evaluate(Constant(0.0), images, codebook_size=2)
    assert got["psnr_y"] == pytest.approx(-20 * math.log10(0.587), abs=1e-4)
    assert got["psnr"] == pytest.approx(-10 * math.log10(1 / 3), abs=1e-4)


def test_batch_size_does_not_matter():
    images = torch.randint(0, 256, (10, 16, 16, 3), dtype=torch.uint8)
    one, two = (vqvae.evaluate(Constant(0.3), images, 2, batch_size=b) for b in (1, 7))
    assert one == pytest.approx(two, rel=1e-6)


def test_codebook_metrics_by_hand():
    assert codebook_metrics(torch.tensor([5, 5, 5, 5]), 4) == pytest.approx(
        {"perplexity": 4.0, "usage_rate": 1.0, "bits_per_index": 2.0})
    assert codebook_metrics(torch.tensor([7, 0, 0, 0]), 4) == pytest.approx(
        {"perplexity": 1.0, "usage_rate": 0.25, "bits_per_index": 0.0})
    assert f"{codebook_metrics(torch.tensor([7]), 1)['bits_per_index']}" == "0.0"  # not -0.0


def test_ssim_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 14, 13))
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5 ** 2))
    window /= window.sum()
    values = []
    for channel in range(3):
        for i in range(4):
            for j in range(3):
                x, y = a[channel, i:i + 11, j:j + 11], b[channel, i:i + 11, j:j + 11]
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx ** 2 + my ** 2 + 1e-4) * (vx + vy + 9e-4)))
    got = ssim(torch.from_numpy(a)[None], torch.from_numpy(b)[None])
    assert got.item() == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(torch.from_numpy(a)[None], torch.from_numpy(a)[None]).item() == pytest.approx(1.0)


def test_bytes_round_trip():
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3).contiguous()
    assert torch.equal(to_bytes(to_float(images)), images.permute(0, 3, 1, 2))
    assert to_bytes(torch.tensor([-0.1, 0.5, 1.2])).tolist() == [0, 128, 255]
