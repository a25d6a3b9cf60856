"""export_codes.py: a round trip through files, and bits per pixel by hand."""

import os

import numpy as np
import pytest
import torch
from conftest import rounds_to_tf32

import eval_cifar
import export_codes
import vqvae


@pytest.fixture
def checkpoint(tiny_config):
    config = tiny_config(epochs=1)
    vqvae.train(config)
    return vqvae.Path(config.out_dir) / config.name / "final_model.pt"


def run(*words):
    return vqvae.run_command(lambda: export_codes.main([str(word) for word in words]))


def test_round_trip_through_files(checkpoint, tmp_path, capsys):
    assert not run("encode", "--checkpoint", checkpoint, "--output", tmp_path / "codes.npz")
    assert not run("decode", "--checkpoint", checkpoint, "--input", tmp_path / "codes.npz", "--output", tmp_path / "images.npz")
    stored, images = np.load(tmp_path / "codes.npz"), np.load(tmp_path / "images.npz")["images"]
    assert stored["indices"].shape == (40, 4, 4) and stored["indices"].dtype == np.uint8
    model, config = vqvae.load_model(checkpoint)
    x = vqvae.test_images(config)
    expected = vqvae.to_bytes(model(vqvae.to_float(x)).images).permute(0, 2, 3, 1).numpy()
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1 and (images == expected).mean() > 0.999
    out = capsys.readouterr().out
    assert "bits per pixel: 0.2500 at fixed length" in out  # 4 bits for each of 16 indices over 256 pixels


def test_what_is_read_is_not_written_over(checkpoint, tmp_path, capsys):
    codes = tmp_path / "codes.npz"
    assert not run("encode", "--checkpoint", checkpoint, "--output", codes)
    before = checkpoint.read_bytes(), codes.read_bytes()
    (tmp_path / "link").symlink_to(checkpoint.parent)
    (tmp_path / "circle").symlink_to("circle")
    assert run("encode", "--checkpoint", checkpoint, "--output", tmp_path / "circle" / "x.npz") == 2
    for words in (("encode", "--output", checkpoint), ("encode", "--output", tmp_path / "link" / checkpoint.name),
                  ("decode", "--input", codes, "--output", codes)):
        for given in (checkpoint, checkpoint.parent):
            capsys.readouterr()
            assert run(*words, "--checkpoint", given) == 2
            assert "choose another file" in capsys.readouterr().err
    assert (checkpoint.read_bytes(), codes.read_bytes()) == before


def test_a_place_that_cannot_be_written_is_named_before_the_work(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_codes, "encode", None)
    os.mkfifo(tmp_path / "pipe")
    for output, message in ((tmp_path / "nowhere" / "c.npz", "no such folder"), (tmp_path, "is a folder"),
                            (tmp_path / "pipe", "is a device or a pipe"),
                            (tmp_path / "closed" / "c.npz", "cannot write here")):
        monkeypatch.setattr(vqvae.os, "access", lambda path, mode: not path.endswith("closed"))
        (tmp_path / "closed").mkdir(exist_ok=True)
        assert run("encode", "--checkpoint", checkpoint, "--output", output) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("split, count", [("train", 96), ("val", 100)])
def test_other_splits(checkpoint, tmp_path, split, count):
    assert not run("encode", "--checkpoint", checkpoint, "--output", tmp_path / "c.npz", "--split", split)
    assert len(np.load(tmp_path / "c.npz")["indices"]) == count


@pytest.mark.parametrize("work", ["encode", "decode", "inception"])
def test_images_and_codes_are_made_as_in_the_evaluation(checkpoint, work):
    """In eval mode and without TF32, which would move indices on a GPU."""
    model, config = vqvae.load_model(checkpoint)
    images, seen = vqvae.test_images(config), []
    for network in (model.encoder, model.decoder):
        network.register_forward_hook(lambda *_: seen.append((model.training, rounds_to_tf32())))
    model.train()
    if work == "encode":
        export_codes.encode(model, images)
    elif work == "decode":
        export_codes.decode(model, torch.zeros(2, 4, 4, dtype=torch.int64))
    else:
        features = torch.rand(len(images), 4, dtype=torch.float64)
        eval_cifar.inception_metrics(model, images, features, lambda batch: (torch.rand(len(batch), 4, dtype=torch.float64),
                                                                            torch.full((len(batch), 2), 0.5)), batch_size=20)
    assert set(seen) == {(False, False)} and model.training


def test_an_empty_split_is_named(tiny_config, tmp_path, capsys):
    config = tiny_config(epochs=1, val_size=0)
    vqvae.train(config)
    model = vqvae.Path(config.out_dir) / config.name / "final_model.pt"
    assert run("encode", "--checkpoint", model, "--output", tmp_path / "c.npz", "--split", "val") == 2
    assert "the val split of this run is empty" in capsys.readouterr().err and not (tmp_path / "c.npz").exists()


def test_refined_codes_reconstruct_better(checkpoint, tmp_path, capsys):
    model, config = vqvae.load_model(checkpoint)
    x, errors = vqvae.test_images(config), []
    for refine in (0, 3):
        assert not run("encode", "--checkpoint", checkpoint, "--output", tmp_path / "codes.npz", "--refine", refine)
        indices = torch.from_numpy(np.load(tmp_path / "codes.npz")["indices"].astype(np.int64))
        errors.append((export_codes.decode(model, indices).float() - x.float()).square().mean())
    assert errors[1] < errors[0]
    assert run("encode", "--checkpoint", checkpoint, "--output", tmp_path / "codes.npz", "--refine", -1) == 2
    assert "refine" in capsys.readouterr().err


def test_bits_per_pixel_by_hand():
    indices = torch.tensor([[[0, 1], [2, 3]]])
    for prediction, bits in (("none", 2), ("checkerboard", 1)):  # four codes; two in each half
        model = vqvae.make_model(vqvae.Config(codebook_size=5, hidden_dim=4, latent_dim=2, prediction=prediction))
        expected = {"fixed_length": 3 * 4 / 16, "entropy": bits * 4 / 16}
        assert export_codes.bits_per_pixel(model, indices, 5, 16) == pytest.approx(expected)


def test_codes_of_another_model_are_refused(checkpoint, tiny_config, tmp_path, capsys):
    codes, images = tmp_path / "codes.npz", tmp_path / "images.npz"
    assert not run("encode", "--checkpoint", checkpoint, "--output", codes)
    other = tiny_config(epochs=1, seed=1, name="other")
    vqvae.train(other)
    capsys.readouterr()
    assert run("decode", "--checkpoint", vqvae.Path(other.out_dir) / "other", "--input", codes, "--output", images) == 2
    assert "codes of another model" in capsys.readouterr().err and not images.exists()
    with np.load(codes) as stored:  # as in earlier versions
        np.savez(codes, indices=stored["indices"], codebook_size=stored["codebook_size"])
    assert not run("decode", "--checkpoint", checkpoint, "--input", codes, "--output", images)


def test_bad_files_give_one_line(checkpoint, tmp_path, capsys):
    good = np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / "size.npz", indices=good, codebook_size=99)
    np.savez(tmp_path / "range.npz", indices=good + 200, codebook_size=16)
    np.savez(tmp_path / "shape.npz", indices=good[0], codebook_size=16)
    np.savez(tmp_path / "grid.npz", indices=good[:, :1, :1], codebook_size=16)
    np.savez(tmp_path / "keys.npz", other=good)
    np.savez(tmp_path / "pickle.npz", indices=np.array([{}], dtype=object), codebook_size=16)
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "infinite.npz", indices=good, codebook_size=np.inf)
    np.savez_compressed(tmp_path / "flipped.npz", indices=np.arange(32, dtype=np.uint8).reshape(2, 4, 4), codebook_size=16)
    data = bytearray((tmp_path / "flipped.npz").read_bytes())
    data[60:70] = bytes(10)  # of the compressed indices: zlib.error
    (tmp_path / "flipped.npz").write_bytes(data)
    for name in ("size", "range", "shape", "grid", "keys", "pickle", "text", "infinite", "flipped", "missing"):
        code = run("decode", "--checkpoint", checkpoint, "--input", tmp_path / f"{name}.npz", "--output", tmp_path / "out.npz")
        err = capsys.readouterr().err
        assert code == 2 and err.count("\n") == 1 and f"{name}.npz" in err, (name, err)
    assert not (tmp_path / "out.npz").exists()
    assert run("encode", "--checkpoint", checkpoint, "--output", ".") == 2 and capsys.readouterr().err.count("\n") == 1
    assert run("recode") == 2 and run() == 2
