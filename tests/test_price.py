"""benchmarks/price_of_balance.py: its theory against numbers worked out otherwise, and a run of it."""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT
from scipy.integrate import quad

import vqvae

sys.path.insert(0, str(ROOT / "benchmarks"))
import price_of_balance


@pytest.mark.parametrize("d", [3, 5, 8])
def test_balanced_over_best_distortion_of_a_gaussian_by_integration(d):
    def moment(power):  # integral of p^power over space, p the standard Gaussian of d dimensions
        sphere = 2 * math.pi ** (d / 2) / math.gamma(d / 2)
        value, _ = quad(lambda r: sphere * r ** (d - 1) * (math.exp(-r * r / 2) / (2 * math.pi) ** (d / 2)) ** power, 0, math.inf)
        return value

    expected = moment(1 - 2 / d) / moment(d / (d + 2)) ** ((d + 2) / d)
    assert price_of_balance.balanced_to_best(d) == pytest.approx(expected, rel=1e-6)
    assert price_of_balance.balanced_to_best(d) > price_of_balance.balanced_to_best(d + 1) > 1


def test_lloyd_ends_where_each_code_is_the_mean_of_its_cell():
    torch.manual_seed(0)
    z = torch.randn(600, 2)
    quantizer = vqvae.VQEMAQuantizer(8, 2)
    quantizer.codebook.copy_(z[:8])
    quantizer.codebook[7] = 100.0  # a code that gets nothing
    before = (z - quantizer.codebook[vqvae.nearest_code(z, quantizer.codebook)]).square().sum()
    price_of_balance.lloyd(quantizer, z, iterations=200)
    indices = vqvae.nearest_code(z, quantizer.codebook)
    assert (z - quantizer.codebook[indices]).square().sum() < 0.9 * before
    for k in range(7):
        assert torch.allclose(quantizer.codebook[k], z[indices == k].mean(0), atol=1e-5)
    assert (quantizer.codebook[7] == 100).all()


class LinearAutoencoder:
    """Tiles of 2x2 pixels from two latents by orthogonal directions of gain 1 and 3; whole numbers are the codes."""

    downsample = 2

    def __init__(self):
        basis, _ = torch.linalg.qr(torch.randn(12, 2, generator=torch.Generator().manual_seed(0)))
        self.weight = (basis * torch.tensor([1.0, 3.0]))[:, :, None, None]  # (12, 2, 1, 1)
        self.quantizer = self

    def __call__(self, z):
        return vqvae.Quantized(z.round(), None, None)

    def reconstruct(self, codes):
        return torch.nn.functional.pixel_shuffle(torch.nn.functional.conv2d(codes, self.weight), 2)

    def latents(self, x):
        return self.z


def test_error_by_direction_of_a_linear_decoder(monkeypatch):
    model = LinearAutoencoder()
    model.z = torch.randn(50, 2, 4, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([10.0, 1.0]).view(2, 1, 1)
    monkeypatch.setattr(vqvae, "to_float", lambda images: model.reconstruct(model.z))  # what it leaves is its quantizer's error
    torch.manual_seed(2)
    errors, left = price_of_balance.error_by_direction(model, None, probes=200)
    small, large = (model.z - model.z.round()).square().mean((0, 2, 3)).tolist()  # both about 1/12
    assert errors.tolist() == pytest.approx([small, 9 * large], rel=0.1)  # variance in the image: 100 and 9
    assert left[:2].tolist() == pytest.approx([9 * large, small], rel=0.05)
    assert left[2:].abs().max() < 1e-5


def test_gaussian_numbers_have_the_mean_and_the_covariance():
    z = torch.rand(500, 3) @ torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]) + 5  # of two directions
    drawn = price_of_balance.gaussian_like(z, 200_000)
    assert torch.allclose(drawn.mean(0), z.mean(0), atol=0.02)
    assert torch.allclose(torch.cov(drawn.T), torch.cov(z.T), atol=0.02)


def test_gaussian_codebooks_are_measured_on_other_numbers(tiny, tmp_path, monkeypatch):
    vqvae.train(vqvae.Config(**tiny(epochs=1, prediction="none")))
    monkeypatch.setattr(price_of_balance, "gaussian_like", lambda z, count: torch.arange(count)[:, None] * torch.ones(z.shape[1]))
    fitted, measured, fit, alone = [], [], price_of_balance.fit, price_of_balance.measure_alone
    monkeypatch.setattr(price_of_balance, "fit", lambda config, z, *args: fitted.append(z) or fit(config, z, *args))
    monkeypatch.setattr(price_of_balance, "measure_alone", lambda quantizer, z: measured.append(z) or alone(quantizer, z))
    price_of_balance.price(tmp_path / "experiments" / "tiny" / "final_model.pt", [1.0], 1, 0)
    latents, _, gaussian, _ = fitted  # VQ-EMA and BA-VQ of each
    assert len(gaussian) == len(latents) == len(measured[0]) and gaussian.max() < measured[0].min()


def test_growth_of_the_images_error(monkeypatch):
    model = LinearAutoencoder()
    model.z = torch.randn(50, 2, 4, 4)
    monkeypatch.setattr(vqvae, "to_float", lambda images: model.reconstruct(model.z) + rest)
    images = torch.zeros(50, 8, 8, 3, dtype=torch.uint8)
    rest = torch.zeros(50, 3, 8, 8)
    assert price_of_balance.error_growth(model, images) == pytest.approx(1, rel=1e-3)  # the codes' error is all there is
    due = (model.reconstruct(model.z.round() - model.z)).square().mean()
    rest = torch.randn(50, 3, 8, 8) * due.sqrt()  # as much again of another kind
    assert price_of_balance.error_growth(model, images) == pytest.approx(0.5, rel=0.1)


def test_prices_of_a_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(price_of_balance, "RESULTS", tmp_path / "price.json")
    config = vqvae.Config(**tiny(prediction="none"))
    vqvae.train(config)
    folder = tmp_path / "experiments" / "tiny"
    before = (folder / "final_model.pt").read_bytes()
    price_of_balance.main([str(folder), "--entropy_weights", "1,inf", "--passes", "30"])
    record, = json.loads((tmp_path / "price.json").read_text())
    fits = record["fits"]
    assert set(fits) == {"VQ-EMA", "the same, then Lloyd", "BA-VQ λ=1", "BA-VQ λ=∞"}
    assert fits["the same, then Lloyd"]["quantization_error"] < fits["VQ-EMA"]["quantization_error"]
    assert len(record["error_by_direction"]) == config.latent_dim and len(record["error_left"]) == 3 * config.downsample**2
    assert sum(record["error_left"]) == pytest.approx(3 * config.downsample**2 * 10 ** (-fits["VQ-EMA"]["psnr"] / 10), rel=0.2)
    assert fits["BA-VQ λ=∞"]["perplexity"] > fits["BA-VQ λ=1"]["perplexity"]
    assert all(fit["psnr"] < record["unquantized_psnr"] + 0.5 and fit["quantization_error"] > 0 for fit in fits.values())
    model, val_images = vqvae.load_model(folder)[0], vqvae.training_images(config)[1]
    assert record["error_growth"] == pytest.approx(price_of_balance.error_growth(model, val_images))
    assert set(record["gaussian"]) == set(fits)
    assert record["gaussian"]["BA-VQ λ=∞"]["perplexity"] > record["gaussian"]["BA-VQ λ=1"]["perplexity"]
    dearer = 1 + record["error_growth"] * (record["theory_distortion"] - 1)
    assert record["theory_psnr"] == pytest.approx(-10 * math.log10(dearer))
    assert "Theory, balanced" in capsys.readouterr().out
    assert (folder / "final_model.pt").read_bytes() == before


def test_a_run_of_two_directions_has_no_price_in_theory(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(price_of_balance, "RESULTS", tmp_path / "price.json")
    vqvae.train(vqvae.Config(**tiny(epochs=1, latent_dim=2, prediction="none")))
    price_of_balance.main([str(tmp_path / "experiments" / "tiny"), "--entropy_weights", "1", "--passes", "1"])
    record, = json.loads((tmp_path / "price.json").read_text())
    assert record["theory_distortion"] is None and "no finite factor" in capsys.readouterr().out


def test_codebooks_are_fitted_with_the_tuned_decay_whatever_the_run_had(tiny, tmp_path, monkeypatch):
    vqvae.train(vqvae.Config(**tiny(epochs=1, quantizer="vq_ema", vq_recipe="classical")))
    decays, fit = [], price_of_balance.fit
    monkeypatch.setattr(price_of_balance, "fit", lambda config, *args: decays.append(config.ema_decay) or fit(config, *args))
    price_of_balance.price(tmp_path / "experiments" / "tiny" / "final_model.pt", [1.0], 1, 0)
    assert decays == [0.9] * 4  # VQ-EMA, BA-VQ, on latents and on Gaussian numbers; the run's own is 0.8


@pytest.mark.parametrize(("flags", "message"), [
    (["--entropy_weights", "a"], "commas"), (["--entropy_weights", "-1"], "out of range"), (["--passes", "0"], "1 or more"),
    (["--seed", "99999999999999999999"], "seed"), (["--seed", "-1"], "seed")])
def test_bad_input(flags, message):
    with pytest.raises(vqvae.UserError, match=message):
        price_of_balance.parse(["run", *flags])


def test_runs_that_cannot_be_priced(tiny, tmp_path):
    for name, changes in {"whole": dict(val_size=0, train_subset=None, prediction="none"), "sphere": dict(metric="cosine"),
                          "predictive": dict(prediction="checkerboard")}.items():
        train_config = vqvae.Config(**tiny(name=name, epochs=1, **changes))
        vqvae.train(train_config)
        with pytest.raises(vqvae.UserError, match="validation images"):
            price_of_balance.main([str(tmp_path / "experiments" / name)])


def test_a_bad_second_run_is_found_before_the_first_is_priced(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(price_of_balance, "RESULTS", tmp_path / "price.json")
    vqvae.train(vqvae.Config(**tiny(epochs=1, prediction="none")))
    with pytest.raises(vqvae.UserError, match="no such file"):
        price_of_balance.main([str(tmp_path / "experiments" / "tiny"), "nowhere"])
    assert not (tmp_path / "price.json").exists()
