"""The training loop: artefacts, learning, resuming bit for bit, refusing what would lose work."""

import errno
import importlib.machinery
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import types

import pytest
import torch
import yaml
from conftest import ROOT

import vqvae


def final_state(folder):
    return torch.load(folder / "final_model.pt", weights_only=True)["model"]


def same_weights(one, two):
    return all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_leaves_every_artefact(tiny_config, capsys):
    config = tiny_config()
    metrics = vqvae.train(config)
    folder = vqvae.Path(config.out_dir) / "tiny"
    names = {path.name for path in folder.iterdir()}
    assert {"final_model.pt", "final_metrics.json", "metrics.jsonl", "timing.jsonl", "config.yaml",
            "reconstructions.png", "codebook_usage.png", "checkpoint_epoch_0002.pt"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    assert json.loads((folder / "final_metrics.json").read_text()) == metrics
    assert {"psnr", "psnr_per_image", "psnr_y", "ssim", "perplexity", "usage_rate", "usage_rate_train",
            "bits_per_index", "recon_loss", "mse", "commitment_loss", "quantization_error"} <= set(metrics)
    assert 1 <= metrics["perplexity"] <= 16 and metrics["num_indices"] == 40 * 16
    assert metrics["config"]["quantizer"] == "ba_vq" and metrics["seed"] == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert vqvae.Config.from_dict(yaml.safe_load((folder / "config.yaml").read_text())) == config
    for picture in ("reconstructions.png", "codebook_usage.png"):
        with vqvae.Image.open(folder / picture) as image:
            assert min(image.size) > 60
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed and "img/s" in printed and "device: cpu" in printed


@pytest.mark.parametrize(("name", "kind"), [("muon", vqvae.Muon), ("adamw", torch.optim.AdamW)])
def test_each_step_has_its_images_optimizer_learning_rate_and_temperature(tiny_config, monkeypatch, name, kind):
    config, seen, real = tiny_config(epochs=3, warmup_fraction=0.5, optimizer=name), [], vqvae.train_step

    def watched(model, optimizer, x, dtype, quantize=True):
        assert type(optimizer) is kind
        seen.append((x.clone(), optimizer.param_groups[0]["lr"], model.quantizer.first.temperature.item(), quantize))
        return real(model, optimizer, x, dtype, quantize)

    monkeypatch.setattr(vqvae, "train_step", watched)
    vqvae.train(config)
    images, steps, quantizer = vqvae.training_images(config)[0], 18, vqvae.BAQuantizer(16, 4)
    assert len(seen) == steps and len(images) == 96
    for step, (x, rate, temperature, quantize) in enumerate(seen):
        epoch, first = step // 6, step % 6 * 16
        assert torch.equal(x, vqvae.to_float(images[vqvae.epoch_order(96, config.seed, epoch)[first:first + 16]]))
        quantizer.set_progress(max(0, step - 9) / 9)
        assert temperature == quantizer.temperature.item() and rate == vqvae.learning_rate(step, steps, config.lr)
        assert quantize == (step >= 9)


def test_the_reconstruction_loss_has_its_weight(tiny_config):
    model = vqvae.make_model(tiny_config()).train()
    bias, x = model.decoder[-2].bias, torch.rand(4, 3, 16, 16)
    gradient, = torch.autograd.grad(torch.nn.functional.mse_loss(model(x, False).images, x), bias)
    before = bias.detach().clone()
    vqvae.train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), x, torch.float32, quantize=False)
    assert torch.allclose(before - bias, vqvae.RECON_WEIGHT * gradient, rtol=1e-3, atol=1e-7)


def test_metrics_of_a_run_are_of_the_images_that_they_name(tiny_config):
    config = tiny_config()
    metrics = vqvae.train(config)
    model, _ = vqvae.load_model(vqvae.Path(config.out_dir) / "tiny")
    on_train = vqvae.codebook_metrics(vqvae.code_histogram(model, vqvae.training_images(config)[0], 16), 16)
    assert metrics["perplexity_train"] == on_train["perplexity"] != metrics["perplexity"]
    assert metrics["usage_rate_train"] == on_train["usage_rate"]
    with torch.no_grad():
        z = model.latents(vqvae.to_float(vqvae.test_images(config)))  # (40, 4, 4, 4)
        squared = (z - model.quantizer(z).z_q).square().sum(1)
    assert metrics["quantization_error"] == pytest.approx(squared.mean().item(), rel=1e-5)


def test_final_model_loads_alone(tiny_config):
    config = tiny_config()
    metrics = vqvae.train(config)
    folder = vqvae.Path(config.out_dir) / "tiny"
    model, loaded = vqvae.load_model(folder)
    assert loaded == config == vqvae.load_model(folder / "final_model.pt")[1]
    histogram = vqvae.empty_histogram(model, 16)
    again = vqvae.evaluate(model, vqvae.test_images(loaded), 16, histogram=histogram)
    assert torch.equal(histogram, vqvae.code_histogram(model, vqvae.test_images(loaded), 16))
    assert again == {key: metrics[key] for key in again}


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 3e-3), ("muon", 1e-2)])  # in so few steps
def test_training_learns(tiny_config, optimizer, lr):
    for quantizer in ("vq_ema", "ba_vq"):
        config = tiny_config(quantizer=quantizer, name=quantizer, epochs=20, train_subset=100, hidden_dim=16, warmup_fraction=0.0,
                             optimizer=optimizer, lr=lr)
        vqvae.train(config)
        lines = [json.loads(line) for line in
                 (vqvae.Path(config.out_dir) / quantizer / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["val_psnr"] > lines[0]["val_psnr"] + 1


@pytest.mark.parametrize("shape", [(2, 5, 30), (2, 30, 5), (1, 8, 8), (3, 4, 1)])
def test_orthogonal_leaves_directions_and_evens_their_sizes(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    sizes = U.mT @ vqvae.orthogonal(1e3 * matrices) @ Vh.mT  # (P, m, m) in their own directions
    diagonal = sizes.diagonal(dim1=1, dim2=2)
    assert (sizes - torch.diag_embed(diagonal)).abs().max() < 1e-4
    assert ((diagonal > 0.65) & (diagonal < 1.25)).all()
    assert not vqvae.orthogonal(torch.zeros(shape)).any()


def test_muon_steps_along_orthogonal_momentum():
    generator = torch.Generator().manual_seed(0)
    weight, twin, bias, scale, unused = parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator))
                                                      for shape in ((3, 2, 2, 2), (3, 2, 2, 2), (5,), (), (4,))]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer, rates = vqvae.Muon(parameters, 0.1), (0.1, 0.05)
    gradients = [[torch.randn(parameter.shape, generator=generator) for parameter in before[:4]] for _ in rates]
    for rate, now in zip(rates, gradients):
        vqvae.set_learning_rate(optimizer, rate)
        for parameter, gradient in zip(parameters, now):
            parameter.grad = gradient
        optimizer.step()
    for i, (parameter, rows, columns) in enumerate(((weight, 3, 8), (twin, 3, 8), (bias, 1, 5), (scale, 1, 1))):
        expected, momentum = before[i], 0
        for rate, now in zip(rates, gradients):
            momentum = 0.95 * momentum + 0.05 * now[i]
            direction = vqvae.orthogonal((0.05 * now[i] + 0.95 * momentum).reshape(1, rows, columns)).view(parameter.shape)
            expected = (1 - 0.3 * rate) * expected - 0.2 * math.sqrt(columns) * rate * direction
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(unused.detach(), before[4]) and unused not in optimizer.state


def stopped_in_its_first_step(config, monkeypatch):
    """The one checkpoint of a run that Ctrl-C stops in its first step."""
    real_step = vqvae.train_step

    def interrupted_step(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return real_step(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(vqvae.Interrupted):
        patch.setattr(vqvae, "train_step", interrupted_step)
        vqvae.train(config)
    path, = vqvae.checkpoints(vqvae.Path(config.out_dir) / config.name)
    return path


def test_seconds_before_an_interruption_count_for_its_epoch_only(tiny_config, monkeypatch):
    config = tiny_config(epochs=2)
    path = stopped_in_its_first_step(config, monkeypatch)
    folder = path.parent
    torch.save({**vqvae.read_checkpoint(path), "seconds": 1e6}, path)
    vqvae.train(config)
    first, second = (json.loads(line)["seconds"] for line in (folder / "timing.jsonl").read_text().splitlines())
    assert first > 1e6 > second


@pytest.mark.parametrize("quantizer", ["vq_ema", "ba_vq"])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(tiny_config, quantizer, monkeypatch):
    whole, parts = (tiny_config(quantizer=quantizer, name=name, epochs=3, restart_threshold=0.9)  # random restarts in every step
                    for name in ("whole", "parts"))
    vqvae.train(whole)
    real_step, calls = vqvae.train_step, [0]

    def interrupted_step(*arguments, **options):
        calls[0] += 1
        if calls[0] in (3, 8, 12):  # in the middle of epochs 1, 2 and 2 again
            os.kill(os.getpid(), signal.SIGTERM if calls[0] == 8 else signal.SIGINT)
        return real_step(*arguments, **options)

    monkeypatch.setattr(vqvae, "train_step", interrupted_step)
    one, two = (vqvae.Path(whole.out_dir) / name for name in ("whole", "parts"))
    spent = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        with pytest.raises(vqvae.Interrupted) as stop:
            vqvae.train(parts)
        assert stop.value.signum == signum
        spent.append(vqvae.read_checkpoint(vqvae.checkpoints(two)[-1])["seconds"])
    vqvae.train(parts)
    assert spent[2] == 0  # between two epochs
    for line, before in zip((two / "timing.jsonl").read_text().splitlines(), spent):
        line = json.loads(line)
        assert 0 <= before < line["seconds"] and line["seconds"] * line["images_per_second"] == pytest.approx(96)
    assert same_weights(final_state(one), final_state(two))
    assert (one / "metrics.jsonl").read_text() == (two / "metrics.jsonl").read_text()
    first, second = (json.loads((f / "final_metrics.json").read_text()) for f in (one, two))
    first["config"].pop("name"), second["config"].pop("name")
    assert first == second


def test_a_checkpoint_of_another_device_keeps_the_settings_of_this_one(tiny_config, monkeypatch):
    """One from CUDA holds a learning rate that is a tensor there, and a step fit for its graphs."""
    whole, parts = (tiny_config(name=name, epochs=2) for name in ("whole", "parts"))
    vqvae.train(whole)
    path = stopped_in_its_first_step(parts, monkeypatch)
    one, two = (vqvae.Path(whole.out_dir) / name for name in ("whole", "parts"))
    state = vqvae.read_checkpoint(path)
    state["optimizer"]["param_groups"][0].update(lr=torch.tensor(1e-3), capturable=True)
    torch.save(state, path)
    vqvae.train(parts)
    assert same_weights(final_state(one), final_state(two))


def test_a_finished_run_is_not_repeated(tiny_config, capsys):
    first = vqvae.train(tiny_config())
    before = (vqvae.Path(tiny_config().out_dir) / "tiny" / "final_model.pt").stat().st_mtime_ns
    assert vqvae.train(tiny_config()) == first
    assert "already finished" in capsys.readouterr().out
    assert (vqvae.Path(tiny_config().out_dir) / "tiny" / "final_model.pt").stat().st_mtime_ns == before


def test_the_config_of_a_stored_run_does_not_overwrite_it(tiny_config, capsys):
    folder = vqvae.Path(tiny_config().out_dir) / "tiny"
    assert not vqvae.train(tiny_config(overwrite=True))["config"]["overwrite"]
    config = vqvae.load_model(folder)[1]
    assert not config.overwrite and vqvae.train(config) and "already finished" in capsys.readouterr().out
    state = torch.load(folder / "final_model.pt", weights_only=True)
    state["config"]["overwrite"] = True  # as earlier versions stored it
    torch.save(state, folder / "final_model.pt")
    assert not vqvae.load_model(folder)[1].overwrite


def test_another_config_is_refused_with_the_difference(tiny_config):
    vqvae.train(tiny_config())
    with pytest.raises(vqvae.UserError, match=r"lr 0\.003 -> 0\.01.*--overwrite"):
        vqvae.train(tiny_config(lr=0.01))
    assert vqvae.train(tiny_config(lr=0.01, overwrite=True))["config"]["lr"] == 0.01


def test_overwrite_never_clears_a_foreign_folder(tiny_config, tmp_path):
    precious = tmp_path / "experiments" / "tiny" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(vqvae.UserError, match="not a run"):
        vqvae.train(tiny_config(overwrite=True))
    precious.with_name("config.yaml").write_text("model: resnet")
    with pytest.raises(vqvae.UserError, match="config.yaml is of no run of this project"):
        vqvae.train(tiny_config(overwrite=True))
    assert precious.read_text() == "years of work"


def test_an_overwrite_that_was_stopped_can_be_repeated(tiny_config, monkeypatch):
    vqvae.train(tiny_config(epochs=1))
    folder = vqvae.Path(tiny_config().out_dir) / "tiny"
    (folder / "codes.npz").write_bytes(b"mine")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vqvae, "config_yaml", stopped)  # all is deleted, nothing written yet
        with pytest.raises(KeyboardInterrupt):
            vqvae.train(tiny_config(epochs=1, overwrite=True))
    assert not (folder / "final_model.pt").exists()
    assert vqvae.train(tiny_config(epochs=1, overwrite=True))["num_images"] == 40
    (folder / "timing.jsonl").unlink()
    (folder / "timing.jsonl").mkdir()
    with pytest.raises(vqvae.UserError, match="timing.jsonl: cannot write"):
        vqvae.train(tiny_config(epochs=1, overwrite=True))


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("CUDA out of memory"), vqvae.UserError("not finite")])
@pytest.mark.parametrize("where", ["train_step", "evaluate"])
def test_an_overwrite_whose_first_epoch_fails_keeps_the_old_run(tiny_config, monkeypatch, where, failure):
    before_metrics = vqvae.train(tiny_config(epochs=1))
    folder = vqvae.Path(tiny_config().out_dir) / "tiny"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(*_, **__):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(vqvae, where, fails)
        with pytest.raises(type(failure)):
            vqvae.train(tiny_config(epochs=1, lr=0.01, overwrite=True))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert vqvae.train(tiny_config(epochs=1)) == before_metrics
    again = vqvae.train(tiny_config(epochs=1, lr=0.01, overwrite=True))
    assert again["config"]["lr"] == 0.01 and len((folder / "metrics.jsonl").read_text().splitlines()) == 1


def test_an_overwrite_keeps_the_old_run_where_there_is_no_room_for_a_checkpoint(tiny_config, monkeypatch):
    vqvae.train(tiny_config(epochs=1))
    folder = vqvae.Path(tiny_config().out_dir) / "tiny"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(vqvae.UserError, match="cannot write.*No space left"):
        patch.setattr(torch, "save", full)
        vqvae.train(tiny_config(epochs=1, lr=0.01, overwrite=True))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    vqvae.train(tiny_config(epochs=1, lr=0.01, overwrite=True))
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)  # no trial is left


@pytest.mark.parametrize("change", ["more", "more, but no more steps", "other training images", "other validation images"])
def test_a_run_whose_images_have_changed_is_not_resumed(tiny_config, monkeypatch, change):
    vqvae.train(tiny_config(train_subset=None))
    folder = vqvae.Path(tiny_config().out_dir) / "tiny"
    (folder / "final_metrics.json").unlink()
    size = {"more": 260, "more, but no more steps": 203}.get(change, 200)
    monkeypatch.setattr(vqvae, "DEAD_LEAVES_SIZES", {True: size, False: 60})
    train_set, val_set = vqvae.training_images(tiny_config(train_subset=None))
    if change.startswith("other"):
        sets = (train_set.flip(0), val_set) if "training" in change else (train_set, val_set.flip(0))
        monkeypatch.setattr(vqvae, "training_images", lambda config: sets)
    with pytest.raises(vqvae.UserError, match="the images have changed since it began; bring the old ones back"):
        vqvae.train(tiny_config(train_subset=None))


def test_a_checkpoint_from_before_the_images_were_kept_is_resumed(tiny_config):
    metrics = vqvae.train(tiny_config())
    folder = vqvae.Path(tiny_config().out_dir) / "tiny"
    (folder / "final_metrics.json").unlink()
    newest = vqvae.checkpoints(folder)[-1]
    state = torch.load(newest, weights_only=True)
    del state["images"]
    torch.save(state, newest)
    (folder / ".checkpoint_epoch_0001.pt.17.tmp").write_bytes(b"half of one")  # of a process that was killed
    assert vqvae.train(tiny_config()) == metrics and not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_damaged_final_metrics_are_named(tiny_config, content):
    vqvae.train(tiny_config(epochs=1))
    (vqvae.Path(tiny_config().out_dir) / "tiny" / "final_metrics.json").write_text(content)
    with pytest.raises(vqvae.UserError, match="final_metrics.json"):
        vqvae.train(tiny_config(epochs=1))


def test_a_run_with_a_setting_that_is_unknown_here_is_left_alone(tiny_config):
    config = tiny_config()
    vqvae.train(config)
    folder = vqvae.Path(config.out_dir) / config.name
    stored = (folder / "config.yaml").read_text() + "whitening: 1.0\n"  # of an earlier version
    (folder / "config.yaml").write_text(stored)
    with pytest.raises(vqvae.UserError, match="tiny.*'whitening'.*another --name"):
        vqvae.train(config)
    assert (folder / "config.yaml").read_text() == stored


def test_two_runs_of_one_name_at_once(tiny_config):
    config = tiny_config()
    with vqvae.locked(vqvae.Path(config.out_dir) / config.name):
        with pytest.raises(vqvae.UserError, match="another process"):
            vqvae.train(config)
    vqvae.train(config)
    with pytest.raises(vqvae.UserError, match="another config .*dataset dead_leaves -> folder.*data_dir None -> "):
        vqvae.train(tiny_config(dataset="folder"))


def test_resume_flag_needs_a_run(tiny_config):
    with pytest.raises(vqvae.UserError, match="no run to resume"):
        vqvae.train(tiny_config(resume=True))
    vqvae.train(tiny_config())
    folder = vqvae.Path(tiny_config().out_dir) / "tiny"
    for path in (folder / "final_metrics.json", *vqvae.checkpoints(folder)):
        path.unlink()
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(vqvae.UserError, match="no checkpoint to resume"):
        vqvae.train(tiny_config(resume=True))
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_run_that_began_while_this_one_read_its_images_is_seen(tiny_config, monkeypatch):
    """The folder is looked at again under the lock: its checkpoints may be of another config by now."""
    real_images = vqvae.training_images

    def slow_images(config):
        monkeypatch.setattr(vqvae, "training_images", real_images)
        vqvae.train(tiny_config(lr=0.01))
        return real_images(config)

    monkeypatch.setattr(vqvae, "training_images", slow_images)
    with pytest.raises(vqvae.UserError, match=r"another config \(lr 0.01 -> 0.003\)"):
        vqvae.train(tiny_config())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where, cause", [("latents", "quantizer loss"), ("decoder", "reconstruction loss"),
                                          ("weights", "state of the model"), ("codes", "state of the model")])
def test_not_a_number_stops_with_the_step(tiny_config, monkeypatch, where, cause, value):
    """In step 8, the third of the second epoch (or after the last of the second): named, and the checkpoint before is good."""
    real_step, calls, step = vqvae.train_step, [0], 11 if where in ("weights", "codes") else 8

    def poisoned(model, optimizer, x, dtype, quantize):
        network = model.encoder if where == "latents" else model.decoder
        calls[0] += 1
        if calls[0] == step + 1 and where in ("latents", "decoder"):
            network[-1 if where == "latents" else -2].bias.data[0] = value
        result = real_step(model, optimizer, x, dtype, quantize)
        if calls[0] == step + 1 and where == "weights":
            network[0].weight.data[0] = value
        if calls[0] == step + 1 and where == "codes":
            model.quantizer.second.log_w[0] = value
        return result

    monkeypatch.setattr(vqvae, "train_step", poisoned)
    message = f"step {step + 1}: the {cause}.*is not finite; try a lower --lr.*checkpoint is kept"
    with pytest.raises(vqvae.UserError, match=message):
        vqvae.train(tiny_config(epochs=3))
    folder = vqvae.Path(tiny_config().out_dir) / "tiny"
    assert [path.name for path in vqvae.checkpoints(folder)] == ["checkpoint_epoch_0001.pt"]
    model, _ = vqvae.load_model(folder / "checkpoint_epoch_0001.pt")
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    monkeypatch.setattr(vqvae, "train_step", real_step)
    assert vqvae.train(tiny_config(epochs=3))["num_images"] == 40


def test_ctrl_c_during_the_final_test_loses_nothing(tiny_config, monkeypatch):
    whole = vqvae.train(tiny_config(name="whole"))
    real_evaluate = vqvae.evaluate

    def interrupted(*arguments, **options):
        if "dtype" not in options:  # the final test, not the validation
            os.kill(os.getpid(), signal.SIGINT)
        return real_evaluate(*arguments, **options)

    monkeypatch.setattr(vqvae, "evaluate", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    with pytest.raises(KeyboardInterrupt):
        vqvae.train(tiny_config())
    monkeypatch.setattr(vqvae, "evaluate", real_evaluate)
    metrics = vqvae.train(tiny_config())
    assert {**metrics, "config": None} == {**whole, "config": None}


def test_a_signal_in_the_last_step_is_heard(tiny_config, monkeypatch):
    real_step, calls = vqvae.train_step, [0]

    def interrupted_step(*arguments, **options):
        calls[0] += 1
        if calls[0] == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(*arguments, **options)

    monkeypatch.setattr(vqvae, "train_step", interrupted_step)
    with pytest.raises(vqvae.Interrupted, match="step 12 of 12"):
        vqvae.train(tiny_config())
    assert vqvae.train(tiny_config())["num_images"] == 40 and calls[0] == 12


def test_a_signal_where_no_step_is_left_is_heard(tiny_config, monkeypatch):
    vqvae.train(tiny_config())
    done = vqvae.Path(tiny_config().out_dir) / "tiny" / "final_metrics.json"
    done.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(vqvae, "start_wandb", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(vqvae.Interrupted, match="step 12 of 12"):
            vqvae.train(tiny_config())
    assert not done.exists() and vqvae.train(tiny_config())["num_images"] == 40


def test_a_hang_up_stops_a_run_but_not_under_nohup(tiny_config, monkeypatch):
    real_step = vqvae.train_step

    def interrupted_step(*arguments, **options):
        os.kill(os.getpid(), signal.SIGHUP)
        return real_step(*arguments, **options)

    monkeypatch.setattr(vqvae, "train_step", interrupted_step)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(vqvae.Interrupted, match="step 1 of") as stop:
            vqvae.train(tiny_config())
        assert stop.value.signum == signal.SIGHUP and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert vqvae.train(tiny_config())["num_images"] == 40
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_hang_up_during_validation_prints_nothing_more(tiny_config, monkeypatch, capsys):
    real_record = vqvae.epoch_record

    def interrupted_record(*arguments):
        os.kill(os.getpid(), signal.SIGHUP)
        return real_record(*arguments)

    monkeypatch.setattr(vqvae, "epoch_record", interrupted_record)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(vqvae.Interrupted) as stop:
            vqvae.train(tiny_config())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stop.value.signum == signal.SIGHUP and "epoch 1/" not in capsys.readouterr().out
    folder = vqvae.Path(tiny_config().out_dir) / "tiny"
    assert [path.name for path in vqvae.checkpoints(folder)] == ["checkpoint_epoch_0001.pt"]


def test_an_epoch_is_kept_where_its_line_cannot_be_printed(tiny_config, monkeypatch):
    def say(message):
        if message.startswith("epoch 1/"):
            raise vqvae.Interrupted("nobody reads", signal.SIGPIPE)

    with monkeypatch.context() as patch, pytest.raises(vqvae.Interrupted):
        patch.setattr(vqvae, "say", say)
        vqvae.train(tiny_config(epochs=2))
    folder = vqvae.Path(tiny_config().out_dir) / "tiny"
    assert [path.name for path in vqvae.checkpoints(folder)] == ["checkpoint_epoch_0001.pt"]
    vqvae.train(tiny_config(epochs=2))
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_file_system_without_locks_is_named(tiny_config, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(vqvae.fcntl, "flock", flock)
    with pytest.raises(vqvae.UserError, match="no locks .No locks available.; choose another --out_dir"):
        vqvae.train(tiny_config())
    with pytest.raises(vqvae.UserError, match="no locks .No locks available.; choose another --data_dir"):
        vqvae.test_images(vqvae.Config(data_dir=tiny_config().out_dir))


def test_the_metrics_say_what_they_were_measured_on(tiny_config):
    for precision in ("float32", "bfloat16"):
        metrics = vqvae.train(tiny_config(name=precision, precision=precision))
        assert metrics["torch"] == torch.__version__ and metrics["threads"] == torch.get_num_threads()
        assert metrics["device"] and metrics["precision"] == precision


def test_the_seed_is_in_every_artefact(tiny_config, monkeypatch, capsys):
    titles, real_picture = [], vqvae.usage_picture
    monkeypatch.setattr(vqvae, "usage_picture", lambda h, title, path: (titles.append(title), real_picture(h, title, path)))
    config = tiny_config(seed=77)
    vqvae.train(config)
    folder = vqvae.Path(config.out_dir) / "tiny"
    assert "seed 77" in capsys.readouterr().out and "seed 77" in titles[0]
    for name in ("config.yaml", "final_metrics.json"):
        assert yaml.safe_load((folder / name).read_text())["seed"] == 77
    for name in ("metrics.jsonl", "timing.jsonl"):
        assert all(json.loads(line)["seed"] == 77 for line in (folder / name).read_text().splitlines())
    for path in folder.glob("*.pt"):
        assert vqvae.read_checkpoint(path)["config"]["seed"] == 77


def test_deterministic_kernels_are_asked_for_during_the_run_only(tiny_config, monkeypatch):
    """What needs no CUDA device: the switches are set, every operation of a run has such a kernel, nothing stays set."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    real_step, seen = vqvae.train_step, []

    def watched(*arguments, **options):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return real_step(*arguments, **options)

    monkeypatch.setattr(vqvae, "train_step", watched)
    plain = vqvae.train(tiny_config(name="plain"))
    assert set(seen) == {(False, None)}
    seen.clear()
    asked = vqvae.train(tiny_config(name="asked", deterministic=True))
    assert set(seen) == {(True, ":4096:8")} and not torch.are_deterministic_algorithms_enabled()
    assert {**plain, "config": None} == {**asked, "config": None}


def test_determinism_that_the_caller_asked_for_stays(tiny_config):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        vqvae.train(tiny_config(epochs=1))
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("quantizer", ["vq_ema", "ba_vq"])
def test_same_seed_same_bits_and_any_chunk_size_to_rounding(tiny_config, monkeypatch, quantizer):
    states = []
    for name, chunk in (("one", 1 << 18), ("two", 1 << 18), ("small", 16 * 7)):
        monkeypatch.setitem(vqvae.CHUNK_ELEMENTS, "cpu", chunk)
        config = tiny_config(name=name, quantizer=quantizer, epochs=1)
        vqvae.train(config)
        states.append(final_state(vqvae.Path(config.out_dir) / name))
    assert same_weights(states[0], states[1])
    for key, value in states[0].items():
        assert torch.allclose(value, states[2][key], atol=1e-3), key


def test_a_failed_write_keeps_the_old_file(tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"good")

    def write(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(vqvae.UserError, match="No space left"):
        vqvae.atomic_write(target, write)
    assert target.read_bytes() == b"good" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(vqvae.UserError, match="cannot write"):
        vqvae.atomic_write(target / "below a file", lambda file: file.write(b"x"))
    with pytest.raises(ValueError, match="not JSON"):
        vqvae.write_json(target, {"psnr": float("nan")})
    assert target.read_bytes() == b"good" and list(tmp_path.iterdir()) == [target]


def test_two_processes_that_write_one_file_each_write_a_whole_one(tmp_path, monkeypatch):
    target = tmp_path / "file.bin"

    def write(file):
        file.write(b"first")
        with monkeypatch.context() as other:
            other.setattr(vqvae.os, "getpid", lambda: 0)
            vqvae.atomic_write(target, lambda file: file.write(b"the other's"))
        assert target.read_bytes() == b"the other's"

    vqvae.atomic_write(target, write)
    assert target.read_bytes() == b"first" and list(tmp_path.iterdir()) == [target]


def test_only_two_checkpoints_are_kept(tiny_config):
    config = tiny_config(epochs=4)
    vqvae.train(config)
    names = [path.name for path in vqvae.checkpoints(vqvae.Path(config.out_dir) / "tiny")]
    assert names == ["checkpoint_epoch_0003.pt", "checkpoint_epoch_0004.pt"]


def test_training_from_a_thread_works(tiny_config):
    result = []
    thread = threading.Thread(target=lambda: result.append(vqvae.train(tiny_config())))
    thread.start()
    thread.join()
    assert result[0]["num_images"] == 40


def test_a_rank_alone_is_no_process_group(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    vqvae.start_processes()
    assert not vqvae.dist.is_initialized()


def test_half_of_what_torchrun_sets_is_named(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(vqvae.UserError, match="MASTER_PORT.*use torchrun or unset it"):
        vqvae.start_processes("cpu")
    assert not vqvae.dist.is_initialized()


def test_a_port_in_use_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(vqvae.UserError, match="in use.*use torchrun or unset it"):
            vqvae.start_processes("cpu")
    assert not vqvae.dist.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(vqvae.UserError, match="lower --nproc_per_node"):
        vqvae.start_processes()
    assert not vqvae.dist.is_initialized()


@pytest.mark.parametrize("local", ["1", "-1", "two"])
def test_a_local_rank_without_its_gpu_is_named(local, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    with pytest.raises(vqvae.UserError, match="LOCAL_RANK is .*0 to 0; unset it"):
        vqvae.pick_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert vqvae.pick_device("auto") == (torch.device("cuda", 0), "a GPU found")


def test_learning_rate_warms_up_and_decays_to_zero():
    rates = [vqvae.learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 2.0 and rates[20] == 2.0
    assert rates[-1] < 1e-4 and sorted(rates[20:], reverse=True) == rates[20:]


def test_epoch_order_depends_on_seed_and_epoch_only():
    assert torch.equal(vqvae.epoch_order(50, 1, 2), vqvae.epoch_order(50, 1, 2))
    assert not torch.equal(vqvae.epoch_order(50, 1, 2), vqvae.epoch_order(50, 1, 3))
    assert sorted(vqvae.epoch_order(50, 1, 2).tolist()) == list(range(50))


TWO_PROCESSES = """
import json, sys, torch, vqvae
torch.set_num_threads(1)
metrics = vqvae.train(vqvae.Config(**json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("quantizer", ["vq_ema", "ba_vq"])
def test_two_processes_equal_one(tiny, tmp_path, quantizer):
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])):
        settings = json.dumps(tiny(quantizer=quantizer, name=name, epochs=1))
        subprocess.run([sys.executable, *launcher, str(script), settings], env=environment, check=True, timeout=300)
    one, two = (final_state(tmp_path / "experiments" / name) for name in ("one", "two"))
    for key in one:
        assert torch.allclose(one[key], two[key], atol=2e-3), key
    first, second = (json.loads((tmp_path / "experiments" / name / "metrics.jsonl").read_text().splitlines()[0])
                     for name in ("one", "two"))
    assert first["recon_loss"] == pytest.approx(second["recon_loss"], rel=1e-3)
    assert first["train_perplexity"] == pytest.approx(second["train_perplexity"], rel=0.02)


STOPPED = """
import json, sys, vqvae
if len(sys.argv) > 2:
    vqvae._Signals.agreed = lambda self, step, now=False: 15 if step == int(sys.argv[2]) else None
sys.exit(vqvae.run_command(lambda: print(vqvae.train(vqvae.Config(**json.loads(sys.argv[1]))))))
"""


def test_two_processes_resume_bit_for_bit(tiny, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(STOPPED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    for name, stop in (("whole", []), ("parts", ["8"]), ("parts", [])):  # the second of six steps in epoch 2
        done = subprocess.run([*launcher, json.dumps(tiny(name=name)), *stop], timeout=300, capture_output=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        assert (done.returncode == 0) == (not stop), done.stderr
        assert not stop or b"stopped at step 8 of 12" in done.stderr
    whole, parts = (tmp_path / "experiments" / name for name in ("whole", "parts"))
    assert same_weights(final_state(whole), final_state(parts))
    one, two = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (whole, parts))
    assert len(one) == len(two) == 2
    for first, second in zip(one, two):  # the codes and losses of both processes, each counted once
        assert first == pytest.approx(second, rel=1e-5)


ONE_STEP = """
import sys, torch, vqvae

def step_of(settings, x, share):
    model = vqvae.make_model(vqvae.Config(**settings)).train()
    for layer in getattr(model.quantizer, "predictor", []):
        torch.manual_seed(0)
        for parameter in layer.parameters():  # or the last one's zeros leave the others without gradient
            torch.nn.init.normal_(parameter, std=0.1)
    for _ in range(2):  # the first step starts the codebook
        model.zero_grad()
        torch.manual_seed(0)
        y, _, loss = model(x[share])
        (vqvae.RECON_WEIGHT * (y - x[share]).square().mean() + loss).backward()
    if vqvae.dist.is_initialized():
        vqvae.average_gradients(model)
    return {name: p.grad for name, p in model.named_parameters()}, dict(model.quantizer.named_buffers())

if __name__ == "__main__":
    vqvae.start_processes()
    half = slice(8 * vqvae.rank(), 8 * vqvae.rank() + 8)
    cases, x = torch.load(sys.argv[1])
    torch.save([step_of(settings, x, half) for settings in cases], f"{sys.argv[1]}.{vqvae.rank()}")
    vqvae.dist.destroy_process_group()  # as run_command does; without, the exit now and then aborts
"""


def test_gradients_and_codebook_of_two_machines_equal_those_of_one(tiny, tmp_path):
    """Two torchrun commands, as on two machines, with half of the batch each; the ranks agree bit for bit."""
    script, data = tmp_path / "one_step.py", tmp_path / "data.pt"
    script.write_text(ONE_STEP)
    cases = [tiny(quantizer="vq_ema", prediction="none"), tiny(prediction="none"), tiny(prediction="checkerboard"),
             tiny(prediction="scaled")]
    x = torch.rand(16, 3, 16, 16)
    torch.save((cases, x), data)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr",
                "127.0.0.1", "--master_port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    machines = [subprocess.Popen([*launcher, "--node_rank", str(rank), str(script), str(data)], env=environment)
                for rank in (0, 1)]
    assert [machine.wait(120) for machine in machines] == [0, 0]
    ranks = [torch.load(f"{data}.{rank}") for rank in (0, 1)]
    namespace = {"__name__": "one_step"}
    exec(ONE_STEP, namespace)
    for settings, first, second in zip(cases, *ranks):
        alone = namespace["step_of"](settings, x, slice(None))
        for one, two, whole in zip(first, second, alone):
            for name in whole:
                assert torch.equal(one[name], two[name]), name
                error = (one[name] - whole[name]).abs().max()  # of sums in another order, so relative to the largest entry
                assert error <= 1e-5 * max(1, whole[name].abs().max()), name


def test_warm_up_trains_without_codes(tiny_config, capsys):
    config = tiny_config(epochs=4, warmup_fraction=0.5)
    vqvae.train(config)
    folder = vqvae.Path(config.out_dir) / "tiny"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert ["train_perplexity" in line for line in lines] == [False, False, True, True]
    assert [line["commitment_loss"] > 0 for line in lines] == [False, False, True, True]
    assert capsys.readouterr().out.count("no codes yet") == 2


def test_a_model_of_the_warm_up_is_refused(tiny_config):
    config = tiny_config(epochs=2, warmup_fraction=0.8)
    vqvae.train(config)
    with pytest.raises(vqvae.UserError, match="warm-up.*later checkpoint"):
        vqvae.load_model(vqvae.checkpoints(vqvae.Path(config.out_dir) / "tiny")[0])


def test_the_classical_recipe_has_no_warm_up():
    assert vqvae.Config(quantizer="vq_ema", vq_recipe="classical").warmup_fraction == 0
    assert vqvae.Config(quantizer="vq_ema").warmup_fraction == vqvae.Config().warmup_fraction > 0


@pytest.mark.parametrize("login", [False, True])
def test_wandb_never_blocks_without_login_or_network(tiny, tmp_path, login):
    pytest.importorskip("wandb")
    flags = [w for k, v in tiny(epochs=1).items() for w in (f"--{k}", str(v))]
    environment = {**os.environ, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "OMP_NUM_THREADS": "1"}
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        environment.pop(name, None)
    if login:
        environment.update(WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    folder = tmp_path / "experiments" / "tiny"
    ids = []
    for extra in ([], [], ["--overwrite"])[:1 if login else 3]:
        (folder / "final_metrics.json").unlink(missing_ok=True)  # so that the second call resumes
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags, "--wandb", *extra], env=environment,
                              capture_output=True, text=True, timeout=150, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        assert list((folder / "wandb").glob("offline-run-*"))
        ids.append((folder / "wandb_id").read_text())
    if not login:
        assert ids[0] == ids[1] != ids[2]


def test_an_overwrite_logs_to_a_new_wandb_run_once_it_has_worked(tiny_config, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logged = []
    stub = types.ModuleType("wandb")  # the service itself is tested above
    stub.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    stub.api, stub.Settings = types.SimpleNamespace(api_key=None), dict
    stub.errors = types.SimpleNamespace(CommError=OSError, UsageError=OSError)
    monkeypatch.setitem(sys.modules, "wandb", stub)

    def init(id, dir, **_):
        (vqvae.Path(dir) / "wandb").mkdir(exist_ok=True)
        return types.SimpleNamespace(id=id, summary={}, log=lambda *_, **options: logged.append(options), finish=lambda: None)

    stub.init = init

    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fail_once(**changes):
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(vqvae, "train_step", fails)
            vqvae.train(tiny_config(epochs=1, wandb=True, overwrite=True, **changes))

    with monkeypatch.context() as patch, pytest.raises(vqvae.UserError, match="WANDB_MODE: 'offlien'"):
        patch.setenv("WANDB_MODE", "offlien")
        vqvae.train(tiny_config(epochs=1, wandb=True))
    fail_once()  # a new name is not blocked by it
    vqvae.train(tiny_config(epochs=1, wandb=True))
    assert [options["commit"] for options in logged] == [True]  # before the test's metrics, which it would replace
    id_file = vqvae.Path(tiny_config().out_dir) / "tiny" / "wandb_id"
    old = id_file.read_text()
    fail_once(lr=0.01)
    assert id_file.read_text() == old
    vqvae.train(tiny_config(epochs=1, wandb=True, overwrite=True, lr=0.01))
    assert len(id_file.read_text()) == len(old) and id_file.read_text() != old


def test_overwrite_deletes_only_what_a_run_writes(tiny_config, tmp_path):
    folder = tmp_path / "experiments" / "tiny"
    vqvae.train(tiny_config(epochs=1))
    old = [folder / name for name in ("wandb_id", "eval_metrics.json", "generator_metrics.json", "generated.png")]
    for path in old:
        path.write_text("of the old run")
    (folder / "notes.txt").write_text("mine")
    (folder / "src").mkdir()
    (folder / "src" / "code.py").write_text("mine too")
    vqvae.train(tiny_config(epochs=1, lr=0.01, overwrite=True))
    assert (folder / "notes.txt").exists() and (folder / "src" / "code.py").exists()
    assert not any(path.exists() for path in old)
    assert "overwrite: false" in (folder / "config.yaml").read_text()  # the stored config can be used again


def test_another_image_folder_is_another_run(tmp_path, tiny_config, monkeypatch):
    one, two = (tiny_config(dataset="folder", data_dir=str(tmp_path / name)) for name in "ab")
    assert vqvae.identity(one) != vqvae.identity(two)
    for name in "ab":  # the same words, said in another folder
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    stored = tiny_config(dataset="folder", data_dir="images").to_dict()
    monkeypatch.chdir(tmp_path / "b")
    assert stored["data_dir"] == str(tmp_path / "a" / "images")
    assert vqvae.identity(vqvae.Config.from_dict(stored)) != vqvae.identity(tiny_config(dataset="folder", data_dir="images"))
    assert vqvae.identity(tiny_config(data_dir="a")) == vqvae.identity(tiny_config(data_dir="b"))


def test_artefacts_are_strict_json(tiny_config):
    config = tiny_config(epochs=1, entropy_weight=float("inf"))
    vqvae.train(config)

    def refuse(constant):
        raise AssertionError(constant)

    stored = json.loads((vqvae.Path(config.out_dir) / "tiny" / "final_metrics.json").read_text(), parse_constant=refuse)
    assert vqvae.Config.from_dict(stored["config"]).entropy_weight == float("inf")


def test_compile_trains_and_its_model_loads(tiny_config):
    config = tiny_config(epochs=1, compile=True)
    vqvae.train(config)
    model, _ = vqvae.load_model(vqvae.Path(config.out_dir) / "tiny" / "final_model.pt")
    assert not [name for name in model.state_dict() if "_orig_mod" in name]


def test_no_host_sync_in_a_training_step(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "lift_fresh")), name
            if "aten.index" in name and isinstance(args[1], (list, tuple)):  # a mask's places are counted on the host
                assert not any(torch.is_tensor(places) and places.dtype == torch.bool for places in args[1]), name
            return function(*args, **(kwargs or {}))

    with Watch(), pytest.raises(AssertionError, match="aten.index"):
        torch.ones(2)[torch.ones(2).bool()]
    monkeypatch.setattr(vqvae, "_can_look", lambda tensor: False)  # as on a GPU
    for quantizer, prediction, trellis in itertools.product(
            ("vq_ema", "ba_vq"), ("none", "checkerboard", "scaled"), ("none", "16")):
        config = vqvae.Config(hidden_dim=8, latent_dim=4, codebook_size=8, quantizer=quantizer, prediction=prediction,
                              trellis=trellis)
        model = vqvae.make_model(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        x = torch.rand(2, 3, 32, 32)
        vqvae.train_step(model, optimizer, x, torch.float32)
        with Watch():
            vqvae.train_step(model, optimizer, x, torch.float32)


@pytest.mark.parametrize("name", ["vq_ema_k128_s0", "ba_vq_k128_s0"])
def test_a_checkpoint_of_format_version_1_stays_loadable(name):
    """Small runs of the first version."""
    folder = ROOT / "tests" / "format_1" / name
    assert torch.load(folder / "final_model.pt", weights_only=True)["format_version"] == 1
    model, config = vqvae.load_model(folder / "final_model.pt")
    stored = json.loads((folder / "final_metrics.json").read_text())
    metrics = vqvae.evaluate(model, vqvae.test_images(config), config.codebook_size)
    assert metrics["psnr"] == pytest.approx(stored["psnr"], abs=1e-3)
    assert metrics["perplexity"] == pytest.approx(stored["perplexity"], rel=1e-3)
