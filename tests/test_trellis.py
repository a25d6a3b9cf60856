"""Codes along a path through a trellis: every path tried by hand, and what a quantizer, a run and its files make of it."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import analysis
import export_codes
import vqvae
from vqvae import BAQuantizer, PredictiveQuantizer, VQEMAQuantizer

UNGERBOECK = ((0, 2), (1, 3), (2, 0), (3, 1))  # 1982: subset for a bit (column) in a state (row), 2 b'' + b'
PLACES = {1: [0], 2: [0, 1], 3: [0, 1, 2], 5: [0, 2, 4, 1, 3], 6: [0, 1, 2, 3, 4, 5]}  # of an image, as the path passes them
LENGTHS = [(1, 2), (3, 2), (6, 2), (2, 4), (5, 4), (1, 8), (3, 8)]  # of paths, and the bases of their digits: 4, 16, 64 states


def all_paths(length, base):
    """{subsets of the path: its digits} of every path from state 0; each of a digit's three bits has a trellis of its own."""
    paths = {}
    for digits in itertools.product(range(base), repeat=length):
        states, subsets = [0, 0, 0], []
        for digit in digits:
            bits = [digit >> i & 1 for i in range(3)]
            pairs = [UNGERBOECK[state][bit] for state, bit in zip(states, bits)]  # each 2 (b xor b'') + b'
            high, low = (sum((pair >> shift & 1) << i for i, pair in enumerate(pairs)) for shift in (1, 0))
            subsets.append(base * high + low)
            states = [2 * (state % 2) + bit for state, bit in zip(states, bits)]
        paths[tuple(subsets)] = digits
    return paths


@pytest.mark.parametrize(("length", "base"), LENGTHS)
def test_the_cheapest_of_all_paths(length, base):
    costs = torch.rand(5, length, base**2)
    for found, cost in zip(vqvae.cheapest_path(costs), costs):
        cheapest = min(all_paths(length, base), key=lambda path: sum(cost[t, s] for t, s in enumerate(path)))
        assert tuple(found.tolist()) == cheapest


@pytest.mark.parametrize(("length", "base"), LENGTHS)
def test_the_posterior_over_all_paths(length, base):
    log_weights = 3 * torch.randn(5, length, base**2)
    paths = list(all_paths(length, base))
    for found, log_weight in zip(vqvae.path_posterior(log_weights), log_weights):
        chances = torch.stack([sum(log_weight[t, s] for t, s in enumerate(path)) for path in paths]).mul(math.log(2)).softmax(0)
        expected = torch.zeros(length, base**2)
        for path, chance in zip(paths, chances):
            for t, subset in enumerate(path):
                expected[t, subset] += chance
        assert torch.allclose(found.exp2(), expected, atol=1e-5)


@pytest.mark.parametrize(("length", "base"), LENGTHS)
def test_an_index_is_a_digit_and_a_place_in_its_subset(length, base):
    paths, size = all_paths(length, base), 3
    numbers = torch.randint(0, size, (len(paths), length))
    numbers[:, PLACES[length]] += torch.tensor(list(paths)) * size
    indices = vqvae.path_indices(numbers, base * size, base)
    assert (indices // size)[:, PLACES[length]].tolist() == [list(digits) for digits in paths.values()]
    assert torch.equal(indices % size, numbers % size) and torch.equal(vqvae.path_numbers(indices, base * size, base), numbers)


@pytest.mark.parametrize("length", [12, 20, 32, 36, 64, 256])  # short ones, and 16 and 24, have no such stride
def test_a_path_passes_all_latents_of_an_image_far_from_where_it_was(length):
    place = torch.arange(length)
    on_path = []
    assert torch.equal(vqvae._on_path(lambda some: on_path.append(some[0]) or some, place.expand(2, -1)), place.expand(2, -1))
    assert sorted(on_path[0].tolist()) == place.tolist()
    for lag in (1, 2):
        step = (on_path[0][lag:] - on_path[0][:-lag]).abs() % length
        assert torch.minimum(step, length - step).min() > 0.14 * length  # round and round; 0.24 and 0.38 at best


@pytest.mark.parametrize(("base", "size", "length"), [(2, 2, 5), (4, 1, 3), (8, 1, 2)])
@pytest.mark.parametrize("prior", [1, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 1e-3])
def test_soft_assignments_by_hand(temperature, prior, base, size, length):
    dim, codes = 2, base**2 * size
    z, codebook, log_w = (torch.randn(shape, dtype=torch.float64) for shape in ((2 * length, dim), (codes, dim), (codes,)))
    log_w *= prior
    weights = 2 * torch.rand(2 * length, dtype=torch.float64)
    distances = torch.cdist(z, codebook).square()
    least = distances.view(2 * length, base**2, size).amin(2).repeat_interleave(size, 1)  # of the subset of each code
    exponents = (weights[:, None] * least + distances - least) / temperature  # weights count between subsets only
    distances *= weights[:, None]
    P, nearest = torch.zeros(2 * length, codes, dtype=torch.float64), []
    for start in (0, length):
        places = [start + place for place in PLACES[length]]
        choices = [tuple(subset * size + code for subset, code in zip(path, those))
                   for path in all_paths(length, base) for those in itertools.product(range(size), repeat=length)]
        log_weights = [sum(log_w[k] - exponents[place, k] for place, k in zip(places, some)) for some in choices]
        for some, chance in zip(choices, torch.stack(log_weights).softmax(0)):
            for place, k in zip(places, some):
                P[place, k] += chance
        best = min(choices, key=lambda some: sum(distances[place, k] for place, k in zip(places, some)))
        nearest += [best[PLACES[length].index(place)] for place in range(length)]
    temperature = torch.tensor(temperature, dtype=torch.float64)
    got = vqvae.soft_assign_paths(z, codebook, log_w, temperature, length, base**2, weights)
    assert got.numbers.tolist() == nearest == vqvae.nearest_path(z, codebook, length, base**2, weights).tolist()
    assert torch.allclose(got.stats, torch.cat([P.T @ z, P.sum(0)[:, None]], 1))
    assert torch.allclose(got.overlap, len(z) - P.square().sum())
    distortion = distances[torch.arange(len(z)), torch.tensor(nearest)].sum()
    assert torch.allclose((weights * z.square().sum(1)).sum() - 2 * got.score, distortion)


@pytest.mark.parametrize("subsets", [4, 16, 64])
@pytest.mark.parametrize("log_w", [torch.zeros(64), torch.arange(64) * 25.0])
@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1.0, 1e30])
def test_soft_assignments_are_finite_at_any_temperature(temperature, log_w, subsets):
    z = torch.randn(24, 3)
    got = vqvae.soft_assign_paths(z, torch.randn(64, 3), log_w, torch.tensor(temperature), 8, subsets, torch.rand(24))
    assert got.stats.isfinite().all() and got.stats[:, -1].sum().item() == pytest.approx(24, rel=1e-4)
    if temperature == 1e-30 and not log_w.any():
        assert torch.equal(got.stats[:, -1].round(), torch.bincount(got.numbers, minlength=64).float())


@pytest.mark.parametrize("subsets", [4, 16, 64])
def test_chunks_change_nothing(subsets):
    z, codebook, log_w, weights = torch.randn(4096, 4), torch.randn(4096, 4), torch.randn(4096), torch.rand(4096)
    whole = vqvae.soft_assign_paths(z, codebook, log_w, torch.tensor(0.5), 32, subsets, weights)
    parts = [vqvae.soft_assign_paths(part, codebook, log_w, torch.tensor(0.5), 32, subsets, some)
             for part, some in zip(z.split(320), weights.split(320))]
    assert torch.equal(whole.numbers, torch.cat([part.numbers for part in parts]))
    assert torch.equal(whole.numbers, vqvae.nearest_path(z, codebook, 32, subsets, weights))
    assert torch.allclose(whole.stats, sum(part.stats for part in parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("subsets", [4, 16, 64])
@pytest.mark.parametrize("temperature", [0.5, 0.01, 0.001])
def test_subsets_all_at_once_or_one_by_one(monkeypatch, temperature, subsets):
    z, codebook, log_w, weights = torch.randn(640, 4), torch.randn(1024, 4), 5 * torch.randn(1024), torch.rand(640)
    monkeypatch.setitem(vqvae.CHUNK_ELEMENTS, "cpu", 100_000)  # several chunks, also of the rows of one subset
    results = []
    for few in (False, True):
        monkeypatch.setattr(vqvae, "_surely_few", lambda mask, few=few: few)
        results.append((vqvae.soft_assign_paths(z, codebook, log_w, torch.tensor(temperature), 32, subsets, weights),
                        vqvae.nearest_path(z, codebook, 32, subsets, weights)))
    (whole, whole_nearest), (parted, nearest) = results
    assert torch.equal(whole.numbers, parted.numbers) and torch.equal(whole_nearest, nearest)
    assert torch.equal(nearest, whole.numbers)
    assert torch.allclose(whole.stats, parted.stats, rtol=1e-4, atol=1e-5)
    assert torch.allclose(whole.overlap, parted.overlap, rtol=1e-4, atol=1e-3)


def test_few_subsets_are_told_on_the_cpu_alone():
    mask = torch.arange(12) < 8
    assert not vqvae._surely_few(mask) and vqvae._surely_few(mask & (torch.arange(12) > 0))
    assert not vqvae._surely_few(mask.to("meta"))


def gaussian(count):
    """Latents (count, 4, 4, 4)."""
    return torch.randn(count, 4, 4, 4)


def mixed(count):
    """Latents (count, 4, 4, 4), each small with a chance of a half, as where images are smooth."""
    return torch.randn(count, 4, 4, 4) * torch.where(torch.rand(count, 1, 4, 4) < 0.5, 0.2, 1.0)


def trained(kind, trellis, latents=gaussian, steps=80, **options):
    """A quantizer of 16 codes an index on latents, and fresh ones."""
    quantizer = kind(16, 4, trellis=trellis, **options).train()
    for step in range(steps):
        quantizer.set_progress(step / steps)
        quantizer(latents(32))
    return quantizer.eval(), latents(256)


@pytest.mark.parametrize("kind", [VQEMAQuantizer, BAQuantizer])
def test_a_trellis_has_less_error_at_the_same_rate(kind):
    errors = []
    for trellis, codes in ((0, 16), (4, 32), (16, 64)):
        quantizer, z = trained(kind, trellis, mixed)
        z_q, indices, _ = quantizer(z)
        assert indices.min() >= 0 and indices.max() < 16 and len(quantizer.codebook) == codes
        assert torch.equal(quantizer.codes(indices).permute(0, 3, 1, 2), z_q)
        errors.append((z - z_q).square().mean())
    assert errors[1] < 0.95 * errors[0] and errors[2] < 0.95 * errors[1]  # 0.2 dB each


@pytest.mark.parametrize(("trellis", "codes"), [(4, 32), (16, 64)])
def test_balance_reaches_every_code_of_the_trellis(trellis, codes):
    quantizer, z = trained(BAQuantizer, trellis, steps=300, entropy_weight=math.inf)
    share = torch.bincount(quantizer.code_numbers(quantizer(z).indices).flatten(), minlength=codes) / z[:, 0].numel()
    assert share.min() > 0.48 / codes and share.max() < 1.92 / codes


@pytest.mark.parametrize("kind", [VQEMAQuantizer, BAQuantizer])
def test_a_path_serves_the_latents_whose_errors_count_more(kind):
    quantizer, z = trained(kind, 16)
    weights = 4.0 ** torch.randint(-1, 2, (256, 4, 4))
    errors = [(z - quantizer(z, weights=some).z_q).square().sum(1) for some in (None, weights)]  # each (256, 4, 4)
    alike, weighed = [error.sum((1, 2)) for error in errors], [(weights * error).sum((1, 2)) for error in errors]
    assert (weighed[1] < weighed[0] + 1e-4).all() and weighed[1].sum() < 0.97 * weighed[0].sum()
    assert (alike[0] < alike[1] + 1e-4).all()
    indices = quantizer(z, weights=weights).indices
    assert torch.equal(quantizer.train()(z, weights=weights.double()).indices, indices)  # training looks up before it learns
    with pytest.raises(ValueError, match="weights"):
        quantizer(z, weights=weights[:1])


@pytest.mark.parametrize("kind", [VQEMAQuantizer, BAQuantizer])
def test_without_a_trellis_all_errors_count_alike(kind):
    z, quantizers = torch.randn(32, 4, 4, 4), []
    for weights in (None, torch.rand(32, 4, 4)):
        torch.manual_seed(0)
        quantizers.append(kind(16, 4).train())
        for _ in range(3):
            quantizers[-1](z, weights=weights)
    for value, other in zip(*(list(quantizer.buffers()) for quantizer in quantizers)):
        assert torch.equal(value, other)


def test_the_temperature_is_in_units_of_the_weighed_distortion():
    quantizer, z = trained(BAQuantizer, 4, ema_decay=0)
    weights = 4.0 ** torch.randint(-1, 2, (256, 4, 4))
    z_q = quantizer.train()(z, weights=weights).z_q
    errors = weights / weights.mean((1, 2), keepdim=True) * (z - z_q).square().sum(1)
    assert quantizer.distortion.item() == pytest.approx(errors.mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", [VQEMAQuantizer, BAQuantizer])
def test_weights_count_against_the_others_of_a_path(kind):
    z, weights, learned = torch.randn(64, 4, 4, 4), torch.rand(64, 4, 4), []
    for factors in (torch.ones(64), 2.0 ** torch.arange(-32, 32)):
        torch.manual_seed(0)
        quantizer = kind(16, 4, trellis=4).train()
        indices = [quantizer(z, weights=factors[:, None, None] * weights).indices for _ in range(3)]
        learned.append([*indices, *quantizer.buffers()])
    for value, other in zip(*learned):
        assert torch.equal(value, other)


def test_paths_do_not_leave_their_image():
    quantizer, z = trained(VQEMAQuantizer, 4)
    whole, last = quantizer(z), quantizer(z[-1:])
    assert torch.equal(whole.indices[-1:], last.indices) and torch.equal(whole.z_q[-1:], last.z_q)


@pytest.mark.parametrize(("trellis", "codes"), [(4, 16), (16, 32), (64, 64)])
@pytest.mark.parametrize("kind", [VQEMAQuantizer, BAQuantizer])
def test_with_prediction_each_half_has_a_path(kind, trellis, codes):
    quantizer = PredictiveQuantizer(kind(8, 3, trellis=trellis), kind(8, 3, trellis=trellis)).train()
    z = torch.randn(6, 3, 5, 4)
    for _ in range(3):
        quantizer(z)
    z_q, indices, _ = quantizer.eval()(z)
    assert torch.allclose(quantizer.codes(indices).permute(0, 3, 1, 2), z_q, atol=1e-6)
    first, _ = vqvae.split_halves(z.permute(0, 2, 3, 1))  # (B, n, D)
    assert torch.equal(vqvae.split_halves(indices)[0], quantizer.first(first.mT).indices)
    first, second = vqvae.split_halves(quantizer.code_numbers(indices))
    assert first.max() < codes <= second.min() and second.max() < 2 * codes
    with pytest.raises(ValueError, match="trellis"):
        PredictiveQuantizer(kind(8, 3, trellis=trellis), kind(8, 3, trellis=0))


@pytest.mark.parametrize("scaled", [False, True])
def test_on_the_path_of_scaled_differences_those_of_latents_count(scaled):
    quantizer = PredictiveQuantizer(VQEMAQuantizer(8, 3, trellis=16), VQEMAQuantizer(8, 3, trellis=16), scaled=scaled).train()
    torch.nn.init.normal_(quantizer.predictor[2].weight)
    z = torch.randn(6, 3, 8, 8)
    quantizer(z)
    z_q, indices, _ = quantizer.eval()(z)
    latents = vqvae.split_halves(z.permute(0, 2, 3, 1))[1]  # (B, m, D)
    mean, log_size = quantizer.predict(vqvae.split_halves(z_q.permute(0, 2, 3, 1))[0], z.shape[2:])
    scale = (vqvae.SCALE_POWER * log_size).exp()  # (B, m, 1)
    codes = quantizer.second.codebook[:, None, None]  # (32, 1, 1, D)
    errors = (scale * codes + mean - latents).square().sum(-1)  # (32, B, m): what the latents want, whatever the scale
    numbers = vqvae.split_halves(quantizer.code_numbers(indices))[1] - len(codes)
    subsets = vqvae._by_paths(vqvae.cheapest_path, errors.view(16, 2, 6, -1).amin(1).movedim(0, -1))
    assert torch.equal(numbers // 2, subsets)


def test_perplexity_is_that_of_an_index_whose_state_is_known():
    assert vqvae.codebook_metrics(torch.full((2, 32), 5), 16) == pytest.approx(
        {"perplexity": 16, "usage_rate": 1, "bits_per_index": 4})
    odd_subsets = torch.tensor([0, 0, 5, 5, 0, 0, 5, 5])  # all bits 1: the bit before says so
    assert vqvae.codebook_metrics(odd_subsets, 4)["perplexity"] == pytest.approx(4)
    assert vqvae.codebook_metrics(torch.tensor([[6, 0, 3, 3, 0, 0, 0, 0]]), 4)["perplexity"] == pytest.approx(math.sqrt(2))
    assert vqvae.codebook_metrics(torch.full((2, 64), 5), 16)["perplexity"] == pytest.approx(16)
    one_digit = torch.tensor([0, 0, 0, 3] * 4)  # 16 states: the digit before was 3, all four subsets it allows are even
    assert vqvae.codebook_metrics(one_digit, 4)["perplexity"] == pytest.approx(4)
    assert vqvae.codebook_metrics(torch.tensor([1, 2, 4, 8] * 4), 4)["perplexity"] == pytest.approx(4)


@pytest.mark.parametrize("settings", [dict(codebook_size=15), dict(trellis="8"), dict(trellis="16", codebook_size=510),
                                      dict(dataset="dead_leaves", downsample=16, image_size=16)])
def test_bad_settings(settings):
    with pytest.raises(vqvae.UserError, match="trellis"):
        vqvae.Config(**{"trellis": "4", **settings})


@pytest.mark.parametrize(("settings", "trellis"), [
    (dict(), "16"), (dict(quantizer="vq_ema"), "16"), (dict(codebook_size=4096, prediction="checkerboard"), "16"),
    (dict(codebook_size=16384), "4"), (dict(codebook_size=510), "none"), (dict(prediction="none"), "none"),
    (dict(prediction="none", trellis="4"), "4"), (dict(trellis="none"), "none"), (dict(trellis=64), "64"),
    (dict(metric="cosine"), "none"),
    (dict(quantizer="vq_ema", vq_recipe="classical"), "none"), (dict(dataset="dead_leaves", image_size=64), "16"),
    (dict(dataset="dead_leaves", image_size=68), "none"), (dict(dataset="dead_leaves", image_size=4), "none")])
def test_where_codes_are_chosen_jointly_by_default(settings, trellis):
    assert vqvae.Config(**settings).trellis == trellis


def test_odd_codebooks_and_latents_without_a_path_are_refused():
    with pytest.raises(ValueError, match="divisible by 2"):
        VQEMAQuantizer(15, 4, trellis=4)
    for trellis in (8, True, 4.0):
        with pytest.raises(ValueError, match="number of its states"):
            VQEMAQuantizer(16, 4, trellis=trellis)
    with pytest.raises(ValueError, match="path"):
        VQEMAQuantizer(16, 4, trellis=4)(torch.randn(8, 4))
    with pytest.raises(ValueError, match="two latents or more"):  # half of the codes would be out of reach
        VQEMAQuantizer(16, 4, trellis=4)(torch.randn(8, 4, 1, 1))
    halves = PredictiveQuantizer(VQEMAQuantizer(16, 4, trellis=4), VQEMAQuantizer(16, 4, trellis=4))
    with pytest.raises(ValueError, match="4 latents or more"):  # before either half has learned
        halves(torch.randn(8, 4, 1, 3))
    assert not halves.first.initialized


@pytest.mark.parametrize(("quantizer", "prediction", "trellis", "codes"), [
    ("vq_ema", "none", "4", 32), ("ba_vq", "checkerboard", "4", 32), ("ba_vq", "scaled", "16", 64),
    ("vq_ema", "none", "64", 128)])
def test_a_run_its_metrics_and_its_codes(tiny_config, tmp_path, quantizer, prediction, trellis, codes, capsys):
    config = tiny_config(trellis=trellis, quantizer=quantizer, prediction=prediction, epochs=3, test_subset=39)
    halves = 1 if prediction == "none" else 2
    metrics = vqvae.train(config)
    few = f"{metrics['num_indices']} test indices are few for {halves * codes} codes"  # not for 32
    assert (few in capsys.readouterr().out) == (halves * codes > 32)
    folder = Path(config.out_dir) / config.name
    model, loaded = vqvae.load_model(folder / "final_model.pt")
    earlier = {**torch.load(folder / "final_model.pt", weights_only=True), "format_version": 3}
    torch.save(earlier, tmp_path / "earlier.pt")
    with pytest.raises(vqvae.UserError, match="earlier.pt: the paths of its trellis went row by row"):
        vqvae.load_model(tmp_path / "earlier.pt")
    images = vqvae.test_images(loaded)
    again = vqvae.evaluate(model, images, 16)
    assert again == {key: metrics[key] for key in again}
    histogram = vqvae.code_histogram(model, images, 16)
    assert histogram.shape == (halves, codes) and histogram.sum() == metrics["num_indices"]
    assert metrics["perplexity"] <= 16 and metrics["usage_rate"] == (histogram > 0).double().mean()
    record, = analysis.load_runs([folder])
    assert record["method"].endswith("trellis" if trellis == "4" else f"trellis {trellis}")
    analysis.main([str(folder)])
    export_codes.main(["encode", "--checkpoint", str(folder / "final_model.pt"), "--output", str(tmp_path / "codes.npz")])
    indices = np.load(tmp_path / "codes.npz")["indices"]
    assert indices.max() < 16
    with torch.no_grad():
        x = vqvae.to_float(images)
        assert torch.allclose(model.decode(torch.from_numpy(indices.astype(np.int64))), model(x).images.clamp(0, 1), atol=1e-5)
