"""PredictiveQuantizer: the second half of a checkerboard coded as differences from what the first half tells."""

import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import analysis
import vqvae
from vqvae import BAQuantizer, Config, PredictiveQuantizer, VQEMAQuantizer


def trained(kind=BAQuantizer, size=(5, 4), steps=3, scaled=False):
    """A quantizer of 8 codes in 3 dimensions whose predictor is not zero, and latents (6, 3, H, W)."""
    z = torch.randn(6, 3, *size)
    quantizer = PredictiveQuantizer(kind(8, 3), kind(8, 3), hidden_dim=7, scaled=scaled).train()
    for parameter in quantizer.predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for _ in range(steps):
        quantizer(z)
    return quantizer, z


def by_hand(quantizer, z):
    """Codes (B, D, H, W) and indices (B, H, W), latent by latent."""
    batch, dim, height, width = z.shape
    codes, indices = torch.zeros_like(z), torch.zeros(batch, height, width, dtype=torch.int64)
    places = [(i, j) for i in range(height) for j in range(width)]
    conv, _, last = quantizer.predictor
    for half in (0, 1):
        known = codes.clone()
        for b in range(batch):
            for i, j in places:
                if (i + j) % 2 != half:
                    continue
                predicted, scale = torch.zeros(dim), 1.0
                if half == 1:
                    hidden = conv.bias.clone()
                    for u, v in places:
                        if abs(u - i) <= 2 and abs(v - j) <= 2:
                            mark = torch.tensor([float((u + v) % 2 == 0)])
                            hidden += conv.weight[:, :, u - i + 2, v - j + 2] @ torch.cat([known[b, :, u, v], mark])
                    told = last.weight[:, :, 0, 0] @ hidden.relu() + last.bias
                    predicted = told[:dim]
                    scale = told[dim:].exp() ** 0.75 if quantizer.scaled else scale
                codebook = scale * (quantizer.second if half else quantizer.first).codebook
                k = (z[b, :, i, j] - predicted - codebook).square().sum(1).argmin()
                codes[b, :, i, j], indices[b, i, j] = predicted + codebook[k], k
    return codes.detach(), indices


@pytest.mark.parametrize("size", [(5, 4), (1, 2), (2, 1), (1, 7)])
@pytest.mark.parametrize("kind, scaled", [(VQEMAQuantizer, False), (BAQuantizer, False), (BAQuantizer, True)])
def test_codes_by_hand(kind, scaled, size):
    quantizer, z = trained(kind, size, scaled=scaled)
    codes, indices = by_hand(quantizer, z)
    z_q, found, loss = quantizer.eval()(z)
    assert torch.equal(found, indices) and torch.allclose(z_q, codes, atol=1e-5)
    assert loss.item() == pytest.approx(0.25 * (z - codes).square().mean().item(), rel=1e-5)
    assert torch.allclose(quantizer.codes(indices).permute(0, 3, 1, 2), codes, atol=1e-5)
    assert (quantizer.first.codebook - quantizer.second.codebook).abs().max() > 0.1


def test_training_step_sees_the_codes_from_before_it():
    quantizer, z = trained()
    expected = by_hand(quantizer, z)
    z_q, indices, _ = quantizer.train()(z)
    assert torch.equal(indices, expected[1]) and torch.allclose(z_q, expected[0], atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients(scaled):
    """Straight-through to every latent; the loss is the commitment's, and its gradient also the predictor's errors."""
    quantizer, z = trained(scaled=scaled)
    z.requires_grad_()
    codes, _ = by_hand(quantizer, z.detach())
    before = copy.deepcopy(quantizer)
    z_q, _, loss = quantizer(z)
    weights = torch.randn_like(z)
    through, = torch.autograd.grad((z_q * weights).sum(), z, retain_graph=True)
    assert torch.allclose(through, weights)
    assert loss.item() == pytest.approx(0.25 * F.mse_loss(z, codes).item(), rel=1e-4)
    gradients = torch.autograd.grad(loss, [z, *quantizer.predictor.parameters()])
    assert torch.allclose(gradients[0], 0.25 * 2 * (z - codes) / z.numel(), atol=1e-6)
    known, _ = vqvae.split_halves(codes.permute(0, 2, 3, 1))
    _, wanted = vqvae.split_halves(z.detach().permute(0, 2, 3, 1))
    mean, log_size = before.predict(known, z.shape[2:])
    error = F.mse_loss(mean, wanted)
    if scaled:
        likelihood = torch.distributions.Normal(mean.detach(), log_size.exp()).log_prob(wanted)
        error = error - likelihood.mean()
    for got, expected in zip(gradients[1:], torch.autograd.grad(error, list(before.predictor.parameters()))):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-6)


def test_it_learns_what_neighbours_tell():
    """The second half lies between its neighbours; once the predictor knows, its codes are much finer than the first half's."""
    torch.manual_seed(1)
    quantizer = PredictiveQuantizer(BAQuantizer(16, 2), BAQuantizer(16, 2)).train()
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=3e-3)
    second = vqvae.checkerboard((8, 8), "cpu")
    cross = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]).expand(2, 1, 3, 3)
    neighbours = F.conv2d((~second).expand(1, 2, 8, 8).float(), cross, padding=1, groups=2)
    for step in range(400):
        z = torch.where(second, 0, torch.randn(32, 2, 8, 8))
        around = F.conv2d(z, cross, padding=1, groups=2) / neighbours
        z = torch.where(second, around, z) + 0.02 * torch.randn_like(z)
        quantizer.set_progress(step / 400)
        z_q, _, loss = quantizer(z)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    error = (z - z_q).square().mean((0, 1))
    spread = z[:, :, second].square().mean()
    assert error[second].mean() < 0.2 * error[~second].mean()
    assert error[second].mean() < 0.4 * spread / 16  # the least that 16 codes leave of Gaussian latents in two dimensions


@pytest.mark.parametrize("kind", [vqvae.BAQuantizer, vqvae.VQEMAQuantizer])
@pytest.mark.parametrize(("scale", "mean"), [(1.0, 0.0), (1000.0, 0.0), (100.0, 100.0), (0.0, 0.0)])
def test_sizes_stay_bounded_whatever_the_scale_of_the_latents(kind, scale, mean):
    torch.manual_seed(0)
    quantizer = vqvae.PredictiveQuantizer(kind(16, 4), kind(16, 4), hidden_dim=16)
    optimizer = torch.optim.Adam(quantizer.parameters(), 3e-2)
    smooth = torch.nn.functional.interpolate(torch.randn(64, 4, 3, 3), size=(8, 8), mode="bilinear")
    for _ in range(60):
        z = scale * smooth[torch.randperm(64)[:8]] + mean
        z_q, _, loss = quantizer(z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(tensor.isfinite().all() for tensor in (z_q, *quantizer.state_dict().values()))
    assert (z_q - z).square().mean() <= 0.9 * z.square().mean() + 1e-6


def test_the_bounds_of_a_size_are_exact():
    quantizer, z = trained(scaled=True)
    unit = quantizer.first.codebook.square().mean().sqrt().log()
    codes = quantizer.first.codebook[:6].expand(2, 6, -1)
    for bias, bound in ((1e9, unit + 2), (-1e9, unit - 12)):
        with torch.no_grad():
            quantizer.predictor[2].bias[-1] = bias
        log_size = quantizer.predict(codes, torch.Size((3, 4)))[1]
        assert torch.equal(log_size, bound.expand_as(log_size))
        gradient, = torch.autograd.grad(log_size.sum(), quantizer.predictor[2].bias)
        assert gradient[-1] == log_size.numel()


def test_it_learns_how_large_differences_will_be():
    """Of every second image the latents are a tenth as large; scaled, they have twice the codes, and half the error."""
    errors, used = {}, {}
    size = torch.where(torch.arange(64) % 2 == 0, 1.0, 0.1)[:, None, None, None]
    second = vqvae.checkerboard((4, 4), "cpu")
    for scaled in (False, True):
        torch.manual_seed(1)
        quantizer = PredictiveQuantizer(BAQuantizer(64, 2), BAQuantizer(64, 2), scaled=scaled).train()
        optimizer = torch.optim.AdamW(quantizer.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=600)
        for step in range(600):
            z = size * torch.randn(64, 2, 4, 4)
            quantizer.set_progress(step / 600)
            z_q, indices, loss = quantizer(z)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        errors[scaled] = (z - z_q)[1::2, :, second].square().mean().item()
        used[scaled] = len(indices[1::2, second].unique())
    assert errors[True] < 0.6 * errors[False] and used[True] > 1.5 * used[False]


def test_eval_changes_no_state_and_state_comes_back():
    quantizer, z = trained()
    before = copy.deepcopy(quantizer.eval().state_dict())
    expected = quantizer(z)
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())
    other = PredictiveQuantizer(BAQuantizer(8, 3), BAQuantizer(8, 3), hidden_dim=7, scaled=False).eval()
    assert not other.initialized
    other.load_state_dict({key: value for key, value in before.items() if key.startswith("first.")}, strict=False)
    assert not other.initialized  # the second half has no codes yet
    other.load_state_dict(before)
    assert other.initialized and torch.equal(other(z).z_q, expected.z_q)


def test_progress_reaches_both():
    quantizer, _ = trained()
    quantizer.set_progress(1.0)
    assert quantizer.first.temperature.item() == quantizer.second.temperature.item() == pytest.approx(0.02)


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 5, 5), (2, 3, 1, 1), (0, 3, 4, 4), (2, 3, 4)])
def test_wrong_shapes(shape):
    with pytest.raises(ValueError, match="expected"):
        trained()[0](torch.randn(shape))


@pytest.mark.parametrize("second", [BAQuantizer(9, 3), BAQuantizer(8, 4), BAQuantizer(8, 3, metric="cosine")])
def test_quantizers_that_do_not_fit(second):
    with pytest.raises(ValueError, match="same codebook_size"):
        PredictiveQuantizer(BAQuantizer(8, 3), second)


def test_float32_inside_under_autocast():
    quantizer, z = trained()
    expected = quantizer.eval()(z)
    looked_up = quantizer.codes(expected.indices)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, indices, loss = quantizer(z)
        assert torch.equal(z_q, expected.z_q) and torch.equal(indices, expected.indices) and torch.equal(loss, expected.loss)
        assert torch.equal(quantizer.codes(indices), looked_up) and not looked_up.requires_grad
        assert quantizer(z.bfloat16()).z_q.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(1, 2), (2, 1), (3, 3), (5, 4)])
def test_halves_of_a_grid(size):
    grid = torch.arange(2 * size[0] * size[1] * 3).view(2, *size, 3)
    first, second = vqvae.split_halves(grid)
    mask = vqvae.checkerboard(size, "cpu")
    assert not mask[0, 0] and torch.equal(first, grid[:, ~mask]) and torch.equal(second, grid[:, mask])
    assert torch.equal(vqvae.join_halves(first, second, size), grid)


def test_counts_and_metrics_of_two_codebooks():
    model = vqvae.make_model(Config(codebook_size=4, hidden_dim=4, latent_dim=2, trellis="none"))
    histogram = vqvae.empty_histogram(model, 4)
    vqvae.count_codes(histogram, model, torch.tensor([[[0, 3], [3, 1]], [[2, 3], [3, 3]]]))
    assert histogram.tolist() == [[1, 1, 1, 1], [0, 0, 0, 4]]
    # the first half's codes tell 2 bits, the second half's none; pooled over halves it would be 5 bits in 8 codes
    metrics = vqvae.codebook_metrics(histogram, 4)
    assert metrics == pytest.approx({"perplexity": 2.0, "usage_rate": 5 / 8, "bits_per_index": 1.0})


def test_the_networks_start_the_same_with_and_without():
    config = Config(codebook_size=8, hidden_dim=8, latent_dim=2)
    plain, *others = (vqvae.make_model(dataclasses.replace(config, prediction=p)) for p in ("none", "checkerboard", "scaled"))
    for predictive, name in itertools.product(others, ("encoder", "decoder")):
        pairs = zip(getattr(plain, name).parameters(), getattr(predictive, name).parameters())
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("settings, prediction", [
    (dict(), "scaled"), (dict(quantizer="vq_ema"), "scaled"), (dict(metric="cosine"), "none"),
    (dict(quantizer="vq_ema", vq_recipe="classical"), "none"), (dict(vq_recipe="classical"), "scaled"),
    (dict(dataset="dead_leaves", image_size=4), "none"), (dict(prediction="none"), "none"),
    (dict(quantizer="vq_ema", vq_recipe="classical", prediction="checkerboard"), "checkerboard")])
def test_who_predicts(settings, prediction):
    assert Config(**settings).prediction == prediction


@pytest.mark.parametrize("prediction", ["checkerboard", "scaled"])
@pytest.mark.parametrize("settings", [dict(metric="cosine"), dict(dataset="dead_leaves", image_size=4)])
def test_where_there_is_nothing_to_predict(settings, prediction):
    with pytest.raises(vqvae.UserError, match="^prediction: "):
        Config(prediction=prediction, **settings)


def test_only_runs_alike_in_prediction_are_compared(tiny_config):
    records = [{"name": f"{quantizer} {prediction}", "psnr": 1.0, "config":
                tiny_config(quantizer=quantizer, prediction=prediction).to_dict()}
               for quantizer in ("ba_vq", "vq_ema") for prediction in ("none", "checkerboard", "scaled")]
    pairs = [(pair["ba_vq"], pair["vq_ema"]) for pair in analysis.differences(records)]
    assert pairs == [("ba_vq none", "vq_ema none"), ("ba_vq checkerboard", "vq_ema checkerboard"),
                     ("ba_vq scaled", "vq_ema scaled")]


def test_a_codebook_sees_half_of_the_vectors():
    assert Config(codebook_size=4096, prediction="none", trellis="4").ema_decay == pytest.approx(1 - 1 / 28, abs=1e-5)
    assert Config(codebook_size=2048, prediction="none", trellis="16").ema_decay == pytest.approx(1 - 1 / 28, abs=1e-5)
    decays = {p: Config(codebook_size=4096, prediction=p, trellis="none").ema_decay for p in ("none", "checkerboard")}
    assert decays["none"] == pytest.approx(1 - math.sqrt(2) / 28, abs=1e-4)
    assert decays["checkerboard"] == pytest.approx(1 - 1 / 28, abs=1e-4)


@pytest.mark.parametrize("quantizer, prediction", [("vq_ema", "checkerboard"), ("ba_vq", "checkerboard"), ("ba_vq", "scaled")])
def test_a_run_from_training_to_pictures(tiny_config, quantizer, prediction):
    config = tiny_config(quantizer=quantizer, prediction=prediction, trellis="none")
    metrics = vqvae.train(config)
    folder = Path(config.out_dir) / "tiny"
    assert "peer" not in metrics and metrics["usage_rate"] <= 1 and metrics["perplexity"] <= 16
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["train_usage_rate"] <= 1 and 1 < lines[-1]["val_perplexity"] <= 16
    model, loaded = vqvae.load_model(folder / "final_model.pt")
    images = vqvae.test_images(loaded)
    again = vqvae.evaluate(model, images, 16)
    assert model.quantizer.scaled == (prediction == "scaled")
    assert loaded == config and again == {key: metrics[key] for key in again}
    with torch.no_grad():
        x = vqvae.to_float(images)
        assert torch.allclose(model.decode(model.encode(x)), model(x).images.clamp(0, 1), atol=1e-5)
        assert vqvae.evaluate(model, images, 16, refine=1)["psnr"] != metrics["psnr"]
    records, models, histograms, images = analysis.open_runs(analysis.load_runs([folder]))
    assert histograms[0].shape == (2, 16) and records[0]["method"].endswith("scaled" if prediction == "scaled" else "predictive")
    for figure in (analysis.usage_histograms(records, histograms), analysis.codes_and_latents(records, models, images),
                   analysis.cell_sizes(records, models, images)):
        vqvae.write_figure(folder / "figure.png", figure)
    assert len(analysis.latents_of(models[0], images)) == len(images) * 4 * 4 / 2


@pytest.fixture
def precision_settings():
    """The places of PyTorch's fp32_precision for convolutions, from the general one to theirs; as before afterwards."""
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("before PyTorch 2.9 there is no fp32_precision")
    places = torch.backends, torch.backends.cudnn, torch.backends.cudnn.conv
    before = [place.fp32_precision for place in places]
    yield places
    for place, precision in zip(places, before):
        place.fp32_precision = precision


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_callers_precision_of_convolutions_is_kept_and_not_used(precision_settings, monkeypatch, place, precision):
    """Where it is set by fp32_precision PyTorch refuses to read or write the older allow_tf32."""
    quantizer, z = trained(scaled=True)
    precision_settings[place].fp32_precision = precision
    seen = []
    quantizer.predictor.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision))
    for flag in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", flag)
        before = torch.backends.cudnn.conv.fp32_precision
        quantizer(z)
        with vqvae.eval_mode(quantizer):
            quantizer(z)
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert set(seen) == {"ieee"}
        assert torch.backends.cudnn.benchmark == flag and torch.backends.cudnn.conv.fp32_precision == before


def test_a_checkpoint_from_before_it_existed(tiny_config):
    config = tiny_config(prediction="none")
    vqvae.train(config)
    path = Path(config.out_dir) / "tiny" / "final_model.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["prediction"]
    torch.save(state, path)
    assert vqvae.load_model(path)[1] == dataclasses.replace(config, prediction="none")
