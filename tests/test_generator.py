"""benchmarks/generator.py: it draws what it says, learns what can be learned, and measures whole runs."""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

import vqvae

sys.path.insert(0, str(ROOT / "benchmarks"))
import classifier
import generator

ADDITIONS = [("none", "none"), ("none", "4"), ("checkerboard", "none"), ("scaled", "16")]


@pytest.fixture
def stand_in(tmp_path):
    """A TorchScript network with Inception's interface."""
    path = tmp_path / "network.pt"
    torch.jit.save(torch.jit.script(classifier.Classifier().eval()), path)
    return path


def made_for(prediction, trellis, size=64):
    """(model without training, places, a Generator for it with weights far from zero)."""
    config = vqvae.Config(codebook_size=size, hidden_dim=8, latent_dim=4, prediction=prediction, trellis=trellis)
    model = vqvae.make_model(config)
    places, halves = generator.coding_order(model, 8)
    network = generator.Generator(size, halves, vqvae.trellis_base(model.quantizer.trellis))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, places, network


@pytest.mark.parametrize("prediction, trellis", ADDITIONS)
def test_it_draws_from_the_probabilities_that_it_gives(prediction, trellis, monkeypatch):
    """What `sample` draws from, one place after the other, is what `forward` says of all places at once."""
    _, places, network = made_for(prediction, trellis)
    indices = torch.randint(64, (3, len(places)))
    drawn_from, rest = [], iter(indices.T)
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: drawn_from.append(p) or next(rest)[:, None])
    assert torch.equal(network.sample(3, None), indices)
    probabilities = torch.stack(drawn_from, 1)
    assert torch.allclose(probabilities, network(indices).softmax(2), atol=1e-5)
    assert probabilities.std(0)[1:].amin() > 0  # each depends on what was drawn before


@pytest.mark.parametrize("prediction, trellis", ADDITIONS)
def test_it_sees_the_codes_that_indices_stand_for(prediction, trellis):
    """And the logit of an index is that of its code."""
    model, places, network = made_for(prediction, trellis)
    indices = torch.randint(64, (3, 8, 8))
    numbers = model.quantizer.code_numbers(indices).flatten(1)[:, places]
    seen, shown = [], network.codes.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    every = [head.register_forward_hook(lambda _, __, logits: seen.append(logits)) for head in network.heads]
    sequence = indices.flatten(1)[:, places]
    its = network(sequence).gather(2, sequence[..., None]).squeeze(2)
    before, logits = seen[0], seen[1:]
    assert torch.equal(before[:, 1:], numbers[:, :-1]) and set(before[:, 0].tolist()) == {network.start}
    codes = network.start // len(network.halves)
    for half, (n, i) in enumerate(zip(numbers.split(network.halves, 1), its.split(network.halves, 1))):
        assert torch.equal(logits[half].gather(2, n[..., None] - half * codes).squeeze(2), i)
    for hook in (shown, *every):
        hook.remove()


@pytest.mark.parametrize("prediction, trellis", ADDITIONS)
def test_the_order_is_that_of_the_quantizer(prediction, trellis):
    model, places, network = made_for(prediction, trellis)
    assert sorted(places.tolist()) == list(range(64)) and sum(network.halves) == 64
    if prediction != "none":
        assert network.halves == [32, 32]
        second = vqvae.checkerboard((8, 8), "cpu").flatten()[places]
        assert not second[:32].any() and second[32:].all()
    if trellis == "none":
        assert all(torch.equal(half, half.sort().values) for half in places.split(network.halves))
    else:  # a path's start has all its choice: digits 0, 0 before it
        first = places[0]
        indices = torch.zeros(2, 8, 8, dtype=torch.int64)
        indices[1].view(-1)[first] = 63  # another digit there
        changed = (model.quantizer.code_numbers(indices)[0] != model.quantizer.code_numbers(indices)[1]).flatten()[places]
        assert changed[:3].all() and not changed[3:].any()


def test_it_learns():
    """A chain in which an index is one or two more than the one before: a bit each, and log2 K for the first."""
    steps = torch.randint(1, 3, (1280, 16))
    steps[:, 0] = torch.randint(32, (1280,))
    indices = steps.cumsum(1) % 32
    network = generator.Generator(32, [16], 1)
    generator.fit(network, indices[:1024], epochs=8, seed=0, dtype=torch.float32)
    least = (15 + 5) / 16
    assert least - 0.02 < generator.bits_per_index(network, indices[1024:]) < least + 0.1 and not network.training
    drawn = network.sample(200, torch.Generator().manual_seed(0))
    differences = drawn.diff(dim=1) % 32
    assert ((differences == 1) | (differences == 2)).float().mean() > 0.95 and len(drawn[:, 0].unique()) > 20
    assert torch.equal(drawn, network.sample(200, torch.Generator().manual_seed(0)))


def test_it_cannot_guess_what_is_random():
    indices = torch.randint(32, (320, 16))
    network = generator.Generator(32, [16], 1)
    generator.fit(network, indices[:256], epochs=1, seed=0, dtype=torch.float32)
    assert 5 <= generator.bits_per_index(network, indices[256:]) < 5.3


def test_images_are_those_of_the_indices(monkeypatch):
    """Drawn in coding order, decoded as the grid that they make."""
    model, places, network = made_for("scaled", "16")
    model.eval()
    grid = torch.randint(64, (3, 8, 8))
    monkeypatch.setattr(network, "sample", lambda count, random: grid.flatten(1)[:, places][:count])
    images = generator.generate(network, model, places, 3, 0)
    with torch.no_grad():
        expected = vqvae.to_bytes(model.decode(grid)).permute(0, 2, 3, 1)
    assert torch.equal(images, expected)


def test_runs_are_measured_once(tiny, stand_in, capsys):
    for name, changes in (("plain", dict(quantizer="vq_ema", prediction="none", val_size=0)), ("both", dict(seed=1))):
        vqvae.train(vqvae.Config(**tiny(name=name, epochs=1, **changes)))
    folder = vqvae.Path(tiny()["out_dir"])
    words = ["--checkpoint", str(folder), "--inception", str(stand_in), "--epochs", "20", "--device", "cpu"]
    assert not vqvae.run_command(lambda: generator.main(words))
    out = capsys.readouterr().out
    for name, seed in (("plain", 0), ("both", 1)):
        record = json.loads((folder / name / "generator_metrics.json").read_text())
        assert record["seed"] == seed and record["epochs"] == 20 and record["num_images"] == 40
        assert 0 < record["test_bits_per_index"] < math.log2(16) + 0.5 and record["gfid"] > 0 and 1 <= record["gis"] < 10
        assert ("val_bits_per_index" in record) == (name == "both") and record["inception_path"] == str(stand_in)
        assert f"{record['test_bits_per_index']:.3f} bits per index, gFID {record['gfid']:.2f}" in out
        assert Image.open(folder / name / "generated.png").size == (16 * (64 + 8) + 8, 3 * (64 + 8) + 8)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/generat*")}
    assert not vqvae.run_command(lambda: generator.main(words)) and len(before) == 4
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/generat*")}
    assert capsys.readouterr().out.count("kept: ") == 2
    words[words.index("--epochs") + 1] = "3"
    assert vqvae.run_command(lambda: generator.main(words)) == 2
    err = capsys.readouterr().err
    assert "of 20 epochs, not 3" in err and err.count("\n") == 1


def test_what_a_run_lacks_is_named(tiny, stand_in, tmp_path, capsys):
    vqvae.train(vqvae.Config(**tiny(epochs=1, train_subset=40)))
    run = vqvae.Path(tiny()["out_dir"]) / "tiny"
    for words, message in ((["--inception", str(stand_in)], "fewer than a batch of 64"), (["--inception", str(run)], "no file"),
                           (["--epochs", "0"], "whole number")):
        given = ["--checkpoint", str(run), *words]
        assert vqvae.run_command(lambda given=given: generator.main(given)) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("error") == 1 and not list(run.glob("generat*"))
