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
import eval_cifar
import export_codes
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
    seen = []
    network.codes.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    for head in network.heads:
        head.register_forward_hook(lambda _, __, logits: seen.append(logits))
    sequence = indices.flatten(1)[:, places]
    its = network(sequence).gather(2, sequence[..., None]).squeeze(2)
    before, logits = seen[0], seen[1:]
    assert torch.equal(before[:, 1:], numbers[:, :-1]) and set(before[:, 0].tolist()) == {network.start}
    codes = network.start // len(network.halves)
    for half, (n, i) in enumerate(zip(numbers.split(network.halves, 1), its.split(network.halves, 1))):
        assert torch.equal(logits[half].gather(2, n[..., None] - half * codes).squeeze(2), i)


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
    steps = torch.randint(1, 3, (1280, 8))
    steps[:, 0] = torch.randint(32, (1280,))
    indices = steps.cumsum(1) % 32
    network = generator.Generator(32, [8], 1)
    generator.fit(network, indices[:1024], epochs=8, seed=0, dtype=torch.float32)
    least = (7 + 5) / 8
    assert least - 0.02 < generator.bits_per_index(network, indices[1024:]) < least + 0.1
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
    for quantizer in (model.quantizer.first, model.quantizer.second):
        quantizer.codebook.normal_()  # before training all codes are 0
    grid = torch.randint(64, (3, 8, 8))
    monkeypatch.setattr(network, "sample", lambda count, random: grid.flatten(1)[:, places][:count])
    images = generator.generate(network, model, places, 3, 0)
    with torch.no_grad():
        expected = vqvae.to_bytes(model.decode(grid)).permute(0, 2, 3, 1)
    assert torch.equal(images, expected) and len(expected.unique()) > 10


def run_folder(settings):
    return vqvae.Path(settings["out_dir"], settings["name"])


def call(*words):
    return vqvae.run_command(lambda: generator.main([str(word) for word in words]))


def test_runs_are_measured_once(tiny, stand_in, tmp_path, capsys):
    for name, changes in (("plain", dict(quantizer="vq_ema", prediction="none", val_size=0)), ("both", dict(seed=1))):
        vqvae.train(vqvae.Config(**tiny(name=name, epochs=1, **changes)))
    folder = vqvae.Path(tiny()["out_dir"])
    words = ["--inception", stand_in, "--device", "cpu", "--epochs"]
    assert not call("--checkpoint", folder, *words, 20)
    out = capsys.readouterr().out
    for name, seed in (("plain", 0), ("both", 1)):
        record = json.loads((folder / name / "generator_metrics.json").read_text())
        assert record["seed"] == seed and record["epochs"] == 20 and record["num_images"] == 40
        assert 0 < record["test_bits_per_index"] < math.log2(16) + 0.5 and record["gfid"] > 0 and 1 <= record["gis"] < 10
        assert ("val_bits_per_index" in record) == (name == "both") and record["inception_path"] == str(stand_in)
        assert f"{record['test_bits_per_index']:.3f} bits per index, gFID {record['gfid']:.2f}" in out
        assert Image.open(folder / name / "generated.png").size == (16 * (64 + 8) + 8, 3 * (64 + 8) + 8)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/generat*")}
    assert not call("--checkpoint", folder, *words, 20) and len(before) == 4
    assert capsys.readouterr().out.count("kept: ") == 2
    other = tmp_path / "other.pt"
    torch.jit.save(torch.jit.script(classifier.Classifier().eval()), other)
    for given, message in (((folder, *words, 3), "epochs is 20, not 3"),
                           ((folder, *words, 20, "--inception", other), "inception_sha256"),
                           ((folder / "both" / "checkpoint_epoch_0001.pt", *words, 20), "checkpoint is final_model.pt")):
        assert call("--checkpoint", *given) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/generat*")}


def test_what_is_measured_is_what_it_says(tiny, stand_in, monkeypatch):
    """Indices of each split in coding order; distance and score of the generated images to and as the test images."""
    vqvae.train(vqvae.Config(**tiny(epochs=1)))
    run = run_folder(tiny())
    model, config = vqvae.load_model(run)
    test_set = vqvae.test_images(config)
    places, _ = generator.coding_order(model, 4)
    train_indices, val_indices, test_indices = (export_codes.encode(model, images).flatten(1)[:, places]
                                                for images in (*vqvae.training_images(config), test_set))
    fitted, asked = [], []
    monkeypatch.setattr(generator, "fit", lambda network, indices, *rest: fitted.append(indices))
    monkeypatch.setattr(generator, "bits_per_index", lambda network, indices: indices.double().square().sum().item())
    monkeypatch.setattr(generator, "generate", lambda network, model, places, count, seed: asked.append(count) or test_set)
    assert not call("--checkpoint", run, "--inception", stand_in, "--device", "cpu")
    record = json.loads((run / "generator_metrics.json").read_text())
    assert torch.equal(fitted[0], train_indices) and asked == [len(test_set)]
    assert record["val_bits_per_index"] == val_indices.double().square().sum()
    assert record["test_bits_per_index"] == test_indices.double().square().sum()
    _, probabilities = eval_cifar.Inception(stand_in, "clean", "cpu")(test_set)
    assert record["gfid"] == pytest.approx(0, abs=1e-6)
    assert record["gis"] == pytest.approx(eval_cifar.inception_score(probabilities)[0], rel=1e-6)


@pytest.mark.parametrize("changes, message", [(dict(train_subset=40), "40 training and 40 test images"),
                                              (dict(test_subset=9), "96 training and 9 test images")])
def test_too_few_images_are_noticed_before_any_work(tiny, stand_in, changes, message, capsys):
    vqvae.train(vqvae.Config(**tiny(epochs=1, name="first")))
    vqvae.train(vqvae.Config(**tiny(epochs=1, **changes)))
    capsys.readouterr()
    assert call("--checkpoint", tiny()["out_dir"], "--inception", stand_in, "--epochs", 1) == 2
    err = capsys.readouterr().err
    assert f"{run_folder(tiny())}/final_model.pt: of {message}" in err and err.count("\n") == 1
    assert not list(vqvae.Path(tiny()["out_dir"]).glob("*/generat*"))


def test_images_that_have_moved(tiny, stand_in, tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    for part, count in (("train", 64), ("test", 10)):
        (old / part).mkdir(parents=True)
        for number, image in enumerate(vqvae.dead_leaves(range(count), 16, 0)):
            Image.fromarray(image.numpy()).save(old / part / f"{number}.png")
    settings = tiny(epochs=1, dataset="folder", data_dir=str(old), train_subset=None, test_subset=None, val_size=0)
    vqvae.train(vqvae.Config(**settings))
    old.rename(new)
    words = ["--checkpoint", run_folder(settings), "--inception", stand_in, "--epochs", 1]
    assert call(*words) == 2
    err = capsys.readouterr().err
    assert f"{run_folder(settings)}/final_model.pt: " in err and str(old) in err and err.count("\n") == 1
    assert not call(*words, "--data_dir", new) and (run_folder(settings) / "generator_metrics.json").exists()


@pytest.mark.parametrize("words, message", [(["--inception", "."], "no file"), (["--epochs", "0"], "whole number"),
                                            (["--checkpoint", "x" * 300 + "/a.pt"], "x/a.pt"),
                                            (["--checkpoint", "."], "no final_model.pt")])
def test_bad_words_give_one_line(words, message, stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("--checkpoint", "x.pt", "--inception", stand_in, *words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == [stand_in]
