"""benchmarks/classifier.py: it learns what can be learned, and eval_cifar.py takes it for Inception."""

import sys

import pytest
import torch
from conftest import ROOT

import eval_cifar
import vqvae

sys.path.insert(0, str(ROOT / "benchmarks"))
import classifier


def stripes(count, size=32):
    """Images uint8 (count, S, S, 3) of noise, in half of them across, in half along brighter stripes; their labels (count,)."""
    labels = torch.arange(count) % 2
    wave = 40 * torch.sin(torch.arange(size) * 0.8)
    across = wave[:, None].expand(size, size)
    images = torch.where(labels.view(-1, 1, 1) == 0, across, across.T) + 128 + 30 * torch.randn(count, size, size)
    return images.clamp(0, 255).byte().unsqueeze(3).expand(-1, -1, -1, 3), labels


def test_it_learns():
    images, labels = stripes(640)
    network = classifier.fit(images[:512], labels[:512], epochs=2, seed=0, dtype=torch.float32)
    assert classifier.accuracy(network, images[512:], labels[512:]) > 0.95 and not network.training
    again = classifier.fit(images[:512], labels[:512], epochs=2, seed=0, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values()))


def test_images_are_shifted_by_a_few_pixels_and_mirrored_one_by_one():
    x = torch.arange(1, 16 * 16 + 1).float().view(1, 1, 16, 16).expand(64, 3, 16, 16)
    shifted = classifier.augmented(x)
    assert shifted.shape == x.shape
    rising = shifted[:, 0, 8, 7] < shifted[:, 0, 8, 8]
    assert 10 < rising.sum() < 54  # mirrored or not
    assert len(shifted[rising].unique(dim=0)) == len(shifted[~rising].unique(dim=0)) == 1  # the same shift for all


def test_it_takes_the_place_of_inception(tmp_path, capsys):
    """Written by the script, read by eval_cifar.py, at the size that clean-fid resizes to."""
    images, labels = stripes(256)
    labels[:3] = labels[-3:] = 1  # of neither end a copy
    data = tmp_path / "data"
    data.mkdir()
    path = tmp_path / "classifier.pt"
    real, seen = (classifier.fit, classifier.accuracy), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqvae, "training_images", lambda config: (images[:160], images[192:]))  # a subset, and the last
        patch.setattr(classifier, "labels_of", lambda config: labels)
        patch.setattr(classifier, "fit", lambda *given: seen.append(given[:2]) or real[0](*given))
        patch.setattr(classifier, "accuracy", lambda *given: seen.append(given[1:]) or real[1](*given))
        assert not vqvae.run_command(lambda: classifier.main(["--output", str(path), "--epochs", "2", "--data_dir", str(data)]))
    out = capsys.readouterr().out
    for (some, its), part in zip(seen, (slice(160), slice(192, None))):
        assert torch.equal(some, images[part]) and torch.equal(its, labels[part])
    assert len(seen) == 2 and "accuracy on 64 validation images: " in out and out.endswith(f"written: {path}\n")
    inception = eval_cifar.Inception(path, "clean", torch.device("cpu"))
    leaves = vqvae.dead_leaves(range(8), 32, 0)
    features, probabilities = inception(leaves)
    assert features.shape == (8, 512) and probabilities.shape == (8, 2)
    with torch.no_grad():  # enlarged and reduced again they are nearly the images, nearer than to any other
        its_features = inception.layers(classifier.to_input(leaves))
        its_probabilities = torch.softmax(inception.network(classifier.to_input(leaves)), 1)
    assert torch.allclose(probabilities, its_probabilities, atol=0.2)
    assert torch.cdist(features, its_features).argmin(1).tolist() == list(range(8))


def test_on_cifar10(cifar10_dir):
    """Labels belong to their images, of training and validation: ships are bluer than frogs."""
    config = vqvae.Config(data_dir=str(cifar10_dir))
    train_set, val_set = vqvae.training_images(config)
    labels = classifier.labels_of(config)
    assert len(labels) == len(train_set) + len(val_set) == 50000
    for images, its in ((train_set, labels[:45000]), (val_set, labels[45000:])):
        red, _, blue = images.float().mean((1, 2)).T
        ships, frogs = ((blue - red)[its == label].mean() for label in (8, 6))
        assert ships > frogs + 10


@pytest.mark.parametrize("words, message", [(["--epochs", "0"], "whole number"), (["--train_subset", "5"], "128 or more"),
                                            (["--output", "nowhere/c.pt"], "no such folder"), (["--device", "gpu"], "device")])
def test_bad_input(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vqvae.run_command(lambda: classifier.main(words)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
