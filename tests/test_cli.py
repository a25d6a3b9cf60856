"""train.py as users type it: precedence, the documented lines, and one clear line for every bad input."""

import contextlib
import dataclasses
import io
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
from functools import partial

import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import train
import vqvae

USERS_LINES = [
    "--quantizer vq_ema --codebook_size 128 --epochs 2 --batch_size 256 --name test --no_wandb",
    "--quantizer vq_ema --codebook_size 128 --epochs 2 --batch_size 64 --name test --no_wandb",
    "--quantizer vq_ema --codebook_size 256 --epochs 30 --batch_size 256 --name vq_ema_k256 --no_wandb",
    "--quantizer ba_vq --codebook_size 256 --epochs 30 --batch_size 256 --name ba_vq_k256 --no_wandb",
    "--quantizer vq_ema --codebook_size 512 --epochs 30 --batch_size 256 --name vq_ema_k512 --no_wandb",
    "--quantizer ba_vq --codebook_size 512 --epochs 30 --batch_size 256 --name ba_vq_k512 --no_wandb",
]


def run(capsys, *words):
    """(exit code, standard output, standard error) of train.py with these words."""
    try:
        code = vqvae.run_command(lambda: train.main(list(words)))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code or 0, captured.out, captured.err


@pytest.mark.parametrize("line", USERS_LINES)
def test_the_lines_users_type(capsys, line):
    code, out, _ = run(capsys, *line.split(), "--dry_run")
    settings = yaml.safe_load(out)
    words = line.split()
    assert code == 0
    assert settings["quantizer"] == words[1] and settings["codebook_size"] == int(words[3])
    assert settings["epochs"] == int(words[5]) and settings["name"] == words[9] and settings["wandb"] is False


def test_dry_run_prints_the_resolved_config_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "--dry_run", "--codebook_size", "16384")
    settings = yaml.safe_load(out)
    assert code == 0 and settings["ema_decay"] == pytest.approx(1 - 0.125 ** 0.5 / 28, abs=1e-5)
    assert vqvae.Config.from_dict(settings) == vqvae.Config(codebook_size=16384)
    assert list(tmp_path.iterdir()) == []


def test_precedence_default_yaml_flag(capsys, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lr: 0.01\nepochs: 7\nentropy_weight: .inf\nwandb: true\n")
    code, out, _ = run(capsys, "--config", str(file), "--epochs", "9", "--entropy_weight", "3", "--no_wandb", "--dry_run")
    settings = yaml.safe_load(out)
    assert code == 0 and (settings["lr"], settings["epochs"], settings["entropy_weight"]) == (0.01, 9, 3.0)
    assert settings["wandb"] is False and settings["batch_size"] == vqvae.Config().batch_size


def test_the_yaml_files_are_read_and_valid(capsys):
    default = vqvae.read_yaml(ROOT / "config.yaml")
    code, out, _ = run(capsys, "--dry_run")
    assert code == 0 and default and default.items() <= yaml.safe_load(out).items()
    assert vqvae.Config.from_dict(vqvae.read_yaml(ROOT / "config_gpu.yaml")).batch_size == 256


def test_entropy_weight_takes_inf(capsys):
    for word in ("inf", "0", "10"):
        code, out, _ = run(capsys, "--entropy_weight", word, "--dry_run")
        assert code == 0 and float(yaml.safe_load(out)["entropy_weight"]) == float(word)


def test_help_names_every_setting(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for field in vqvae.dataclasses.fields(vqvae.Config):
        assert f"--{field.name}" in out and field.metadata["help"]


BAD_FLAGS = [
    "--codebook_size 0", "--codebook_size -5", "--codebook_size 1.5", "--codebook_size many", "--codebook_size",
    "--codebook_size 99999999", "--epochs 0", "--epochs -1", "--epochs x", "--batch_size 0", "--batch_size 2.5",
    "--lr 0", "--lr -1", "--lr nan", "--lr inf", "--lr fast", "--lr 2", "--quantizer vq", "--quantizer BA_VQ",
    "--metric l1", "--metric Euclid", "--metric cosine --latent_dim 1", "--dataset mnist", "--latent_dim 0",
    "--latent_dim 1e3", "--hidden_dim 1",
    "--downsample 3", "--downsample 0", "--image_size 64", "--image_size 0 --dataset dead_leaves",
    "--image_size 30 --dataset dead_leaves", "--image_size 99999 --dataset dead_leaves", "--entropy_weight -1",
    "--entropy_weight nan", "--entropy_weight -inf", "--ema_decay 1", "--ema_decay -0.1", "--ema_decay nan",
    "--ema_decay 1.5", "--commitment_weight -1", "--commitment_weight inf", "--commitment_weight nan",
    "--temperature_start 0", "--temperature_start -1", "--temperature_end 0", "--temperature_end nan",
    "--temperature_start 1e9", "--anneal_fraction 2", "--anneal_fraction -1", "--anneal_fraction nan", "--ba_iters 0",
    "--ba_iters 1000", "--ba_iters x", "--vq_recipe best", "--restart_threshold -1", "--restart_threshold 3",
    "--seed -1", "--seed 99999999999", "--seed x", "--device tpu", "--device cuda:99", "--device cuda:x", "--device meta",
    "--device ''", "--precision float16", "--precision double", "--val_size -1", "--val_size 15000 --dataset dead_leaves",
    "--train_subset 0", "--train_subset -3", "--train_subset 10001 --dataset dead_leaves --val_size 9",
    "--test_subset 0", "--test_subset 2001 --dataset dead_leaves --val_size 9", "--name ../escape", "--name a/b",
    "--name .hidden", "--name ''", "--name /etc/passwd", "--name ..", "--config nowhere.yaml", "--config .", "--confg x",
    "--quantiser ba_vq", "--whitening 1", "--name _legend", "--epochs 1" + "0" * 400, "--batch_size 1" + "0" * 400,
    "--resume", "--resume --overwrite", "--dataset folder --data_dir nowhere", "--epochs 3 4", "extra", "--wandb=yes",
    "--out_dir ''", "--data_dir ''", "--deterministic=1", "--extra\nline", "--dataset folder --data_dir a\nb",
    "--dataset folder --data_dir " + "d" * 300, "--out_dir " + "o" * 300, "--config " + "c" * 300, "--name " + "n" * 200,
]


@pytest.mark.parametrize("line", BAD_FLAGS)
def test_a_bad_flag_gives_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vqvae, "DEAD_LEAVES_SIZES", {True: 300, False: 100})
    words = [word.strip("'") for word in line.split(" ")]
    named = [word.split("=")[0].strip("-").replace("\n", " ") for word in words]
    if "dataset" not in line:  # nothing may reach the network
        words += ["--dataset", "dead_leaves"] if "image_size" not in line else []
    code, out, err = run(capsys, *words)
    assert code == 2, (out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 700, err
    assert any(word and word in err for word in named), err
    assert list(tmp_path.iterdir()) == []


BAD_YAML = {
    "unknown key": "codebok_size: 3", "text for number": "lr: 3e-4", "text": "epochs: many", "float for int": "epochs: 2.5",
    "number for text": "name: 4", "number for a choice": "trellis: 8",
    "bool for int": "epochs: true", "int for bool": "wandb: 1", "text for bool": "wandb: 'yes'", "null": "lr: null",
    "list": "epochs: [1, 2]", "mapping": "epochs: {a: 1}", "duplicate": "lr: 0.1\nlr: 0.2", "a list": "- lr",
    "a word": "hello", "a number": "3", "broken": "lr: [1", "tabs": "lr:\t- 0.1\n\t- 2", "number key": "3: 4",
    "alias bomb in a value": "lr: &a [x,x,x,x,x,x,x,x]\nseed: &b [*a,*a,*a,*a,*a,*a,*a]\nname: &c [*b,*b,*b,*b,*b]\ndataset: *c",
    "alias bomb": "a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]", "anchor": "lr: &x 0.1\nepochs: *x",
    "object": "lr: !!python/object/apply:os.system ['true']", "binary": "lr: !!binary aGk=", "date": "name: 2020-01-01",
    "nan": "lr: .nan", "infinite": "lr: .inf", "out of range": "codebook_size: -1", "path in name": "name: ../x",
    "two documents": "lr: 0.1\n---\nlr: 0.2", "complex key": "? [a, b]\n: 1",
    "null byte": "lr: \x00", "null byte in a path": 'out_dir: "a\\0b"', "null byte in a name": 'name: "a\\0b"',
    "no such boolean": "wandb: !!bool maybe", "empty integer": 'seed: !!int ""', "no timestamp": "name: !!timestamp x",
    "no mapping": "!!map x", "a list as a mapping": "lr: !!map [1]", "a list as a set": "lr: !!set [1]",
    "impossible date": "name: 2001-99-99", "digits without a number": "seed: 0x_", "merge": "<<: 3",
    "deep": "[" * 3000, "huge integer": "seed: " + "9" * 400, "huge number": "lr: 1" + "0" * 400,
    "huge negative": "entropy_weight: -1" + "0" * 400, "huge hexadecimal": "epochs: 0x" + "f" * 5000,
    "number to base 60": "lr: !!float " + ":".join("1" * 300), "long list": "epochs: [" + "1," * 1000 + "]",
    "huge in a list": "epochs: [0x" + "f" * 5000 + "]", "huge in a mapping": "lr: {a: 0x" + "f" * 5000 + "}",
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_gives_one_line_and_exit_code_2(capsys, tmp_path, name):
    file = tmp_path / "bad.yaml"
    file.write_text(BAD_YAML[name])
    code, _, err = run(capsys, "--config", str(file), "--dry_run")
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 800, err
    remedy = {"text for number": "write 3.0e-4", "number for text": 'write "4"'}
    assert remedy.get(name, "") in err


def test_yaml_that_is_not_text(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00\x81")
    code, _, err = run(capsys, "--config", str(tmp_path / "bad.yaml"), "--dry_run")
    assert code == 2 and err.count("\n") == 1


FLAGS = [field.name for field in vqvae.dataclasses.fields(vqvae.Config)] + ["no_wandb", "config", "surprise"]
WORDS = st.one_of(st.integers().map(str), st.floats().map(str), st.sampled_from(["ba_vq", "cosine", "inf", "", "-1", "1e-7"]),
                  st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8))


def assert_accepted_or_one_line(words, folder):
    """A dry run of these words prints a config, or one line with exit code 2; it writes nothing into `folder`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = vqvae.run_command(lambda: train.main([*words, "--dry_run"])) or 0
    if code == 0:
        vqvae.Config.from_dict(yaml.safe_load(out.getvalue()))
    else:
        assert code == 2 and re.fullmatch(r"error: [^\n]+\n", err.getvalue()) and not out.getvalue(), err.getvalue()
    assert not list(vqvae.Path(folder).iterdir())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FLAGS), WORDS), min_size=1, max_size=3))
def test_any_flags_are_accepted_or_give_one_line(pairs):
    with tempfile.TemporaryDirectory() as folder:
        assert_accepted_or_one_line([word for name, value in pairs for word in (f"--{name}", value)], folder)


YAML_TEXT = st.one_of(st.text(max_size=60), st.text("abl01.: -[]{}&*!?|>'\"#%@,\n\t<=", max_size=60),
                      st.dictionaries(st.sampled_from(FLAGS), st.one_of(
                          st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.dates(),
                          st.lists(st.integers(), max_size=2)), max_size=3).map(yaml.safe_dump))


@settings(max_examples=300, deadline=None)
@given(YAML_TEXT)
def test_any_yaml_is_accepted_or_gives_one_line(text):
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.flush()
        assert_accepted_or_one_line(["--config", file.name], folder)


def load_and_fit(path):
    """The weights of a checkpoint, read and put into its model."""
    model, _ = vqvae.load_model(path)
    return model.state_dict()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_truncated_or_altered_checkpoint_is_refused_or_still_right(data):
    """Cut anywhere, or one bit flipped anywhere: never a traceback, never other weights."""
    good = (ROOT / "results" / "sample" / "ba_vq_k128_s0" / "final_model.pt").read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    altered = bytearray(good)
    altered[place] ^= 1 << data.draw(st.integers(0, 7))
    reference = load_and_fit(ROOT / "results" / "sample" / "ba_vq_k128_s0" / "final_model.pt")
    for content in (good[:place], bytes(altered)):
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            file.write(content)
            file.flush()
            try:
                got = load_and_fit(file.name)
            except vqvae.UserError as error:
                assert file.name in str(error)
                continue
            assert all(torch.equal(got[key], value) for key, value in reference.items() if torch.is_tensor(value))


class Malice:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def damaged_checkpoints(good, folder):
    """Files that are no usable checkpoint, by name."""
    data = good.read_bytes()
    state = torch.load(good, weights_only=True)
    smaller = {**state, "config": {**state["config"], "codebook_size": 8}}
    nan = {key: value * math.nan if "decoder" in key else value for key, value in state["model"].items()}
    files = {"truncated": data[:len(data) // 2], "empty": b"", "garbage": bytes(range(256)) * 10, "text": b"hello",
             "flipped": data[:300] + bytes(200) + data[500:]}
    objects = {"not a number": {**state, "model": nan},
               "foreign": {"state_dict": {}}, "list": [1, 2], "tensor": torch.zeros(3), "pickled object": Malice(),
               "wrong shapes": smaller, "future": {**state, "format_version": 99}, "no config": {"model": {}},
               "bad config": {**state, "config": {**state["config"], "lr": "fast"}},
               "unknown setting": {**state, "config": {**state["config"], "surprise": 1}},
               "missing weights": {**state, "model": {}}, "model is a list": {**state, "model": [1]},
               "model is text": {**state, "model": "ab"}, "config is a list": {**state, "config": [1]}}
    for name, content in files.items():
        (folder / f"{name}.pt").write_bytes(content)
    for name, content in objects.items():
        torch.save(content, folder / f"{name}.pt")
    torch.save(Malice(), folder / "old pickled object.pt", _use_new_zipfile_serialization=False)
    (folder / "bare pickled object.pt").write_bytes(pickle.dumps(Malice()))
    return [*files, *objects, "old pickled object", "bare pickled object"]


def test_bad_checkpoints_give_one_line_and_run_nothing(tiny_config, tmp_path, monkeypatch, capsys):
    import eval_cifar
    monkeypatch.chdir(tmp_path)
    vqvae.train(tiny_config(epochs=1))
    good = tmp_path / "experiments" / "tiny" / "final_model.pt"
    broken = tmp_path / "broken"
    broken.mkdir()
    names = damaged_checkpoints(good, broken)
    for name in [*names, "missing"]:
        capsys.readouterr()
        words = ["--checkpoint", str(broken / f"{name}.pt"), "--no_fid"]
        code = vqvae.run_command(partial(eval_cifar.main, words))
        err = capsys.readouterr().err
        assert code == 2 and err.count("\n") == 1 and f"{name}.pt" in err, (name, err)
    run = tmp_path / "experiments" / "tiny"
    (run / "final_metrics.json").unlink()
    torch.save({"format_version": 2, "config": {}, "model": Malice()}, vqvae.checkpoints(run)[-1])
    with pytest.raises(vqvae.UserError, match="checkpoint_epoch_0001.pt"):
        vqvae.train(tiny_config(epochs=1))
    assert not (tmp_path / "pwned").exists() and not (broken / "eval_metrics.json").exists()


def test_a_damaged_resume_checkpoint_is_named(tiny_config, tmp_path):
    config = tiny_config()
    vqvae.train(config)
    folder = tmp_path / "experiments" / "tiny"
    (folder / "final_metrics.json").unlink()
    for content in (b"broken", (folder / "final_model.pt").read_bytes()):
        (folder / "checkpoint_epoch_0002.pt").write_bytes(content)
        with pytest.raises(vqvae.UserError, match="checkpoint_epoch_0002.pt"):
            vqvae.train(config)


def test_read_only_and_occupied_output(tiny, capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    flags = [w for k, v in tiny(out_dir=str(tmp_path / "file")).items() for w in (f"--{k}", str(v))]
    code, _, err = run(capsys, *flags)
    assert code == 2 and err.count("\n") == 1 and "out_dir" in err


def test_out_of_memory_says_what_to_lower(capsys):
    def hungry():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    assert vqvae.run_command(hungry) == 2
    assert "--batch_size" in capsys.readouterr().err


def test_memory_that_is_not_there():
    """A codebook of 17 GB under a limit of 8 GB of address space."""
    line = f"""ulimit -v 8000000
        {sys.executable} {ROOT}/train.py --dataset dead_leaves --image_size 4 --device cpu \\
            --codebook_size 1048576 --latent_dim 4096"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--codebook_size" in done.stderr, done.stderr
        assert not list(vqvae.Path(folder).iterdir())


def test_a_failure_of_another_kind_is_not_hidden():
    def broken():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        vqvae.run_command(broken)


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]), ids=lambda path: path.name)
def test_nothing_is_loaded_unsafely(path):
    text = path.read_text()
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", text))
    assert all("_ConfigLoader" in call for call in re.findall(r"yaml\.load\([^\n]*", text))
    assert all("allow_pickle=False" in call for call in re.findall(r"np\.load\([^\n]*", text))
    assert all('filter="data"' in call for call in re.findall(r"\.extract(?:all)?\([^\n]*", text))
    assert not re.search(r"pickle\.loads?\(|yaml\.(?:full|unsafe)_load|_create_unverified|(?<![.\w])(?:eval|exec)\(", text)


def test_ctrl_c_and_a_second_run_of_that_name(tiny, tiny_config, tmp_path):
    """While a run trains, a second one of its name is refused. Ctrl-C: exit code 130, one line, state saved."""
    import signal
    import time
    config = tiny_config(epochs=10_000)
    flags = [w for k, v in tiny(epochs=config.epochs).items() for w in (f"--{k}", str(v))]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            next(line for line in process.stdout if line.startswith("epoch 2/"))
            for second in (config, dataclasses.replace(config, overwrite=True)):
                with pytest.raises(vqvae.UserError, match="another process is training this run"):
                    vqvae.train(second)
            process.send_signal(signal.SIGINT)
            began = time.time()
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130 and err.count("\n") == 1 and "resumes" in err
    assert time.time() - began < 30
    assert any("step" in path.name or "epoch" in path.name
               for path in vqvae.checkpoints(tmp_path / "experiments" / "tiny"))


def test_a_reader_that_leaves_ends_a_run_without_a_traceback(tiny, tmp_path):
    flags = [w for k, v in tiny(epochs=10_000).items() for w in (f"--{k}", str(v))]
    with subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            next(line for line in process.stdout if line.startswith("epoch 2/"))
            process.stdout.close()  # as `| head` does
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 128 + 13 and err.count("\n") == 1 and "nobody reads" in err
    assert vqvae.checkpoints(tmp_path / "experiments" / "tiny")


def test_output_that_cannot_be_written_gives_one_line(tiny, tiny_config, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = [w for k, v in tiny(epochs=1).items() for w in (f"--{k}", str(v))]
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], stdout=full, stderr=subprocess.PIPE, text=True,
                              env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "standard output: cannot write" in done.stderr
    terminal, end = os.openpty()
    os.close(terminal)  # as where its window was closed
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--dry_run"], stdout=end, stderr=subprocess.PIPE, text=True,
                          env=environment)
    os.close(end)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "standard output: cannot write" in done.stderr
    closed = ["sh", "-c", '"$0" train.py --dry_run >&-', sys.executable]  # nothing to write to is no error
    done = subprocess.run(closed, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    vqvae.train(tiny_config(epochs=1))
    folder = tmp_path / "experiments" / "tiny"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(ROOT / "analysis.py"), str(folder)], stdout=full, stderr=subprocess.PIPE,
                              text=True, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "standard output: cannot write" in done.stderr
    with subprocess.Popen([sys.executable, str(ROOT / "analysis.py"), str(folder)], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # before it has printed anything
        err = process.stderr.read()
    assert process.returncode == 128 + 13 and err.count("\n") == 1 and "nobody reads the output" in err


def test_a_run_whose_errors_nobody_can_see_trains(tiny, tmp_path):
    flags = [w for k, v in tiny(epochs=1).items() for w in (f"--{k}", str(v))]
    closed = ["sh", "-c", '"$@" 2>&-', "sh", sys.executable, str(ROOT / "train.py"), *flags]
    done = subprocess.run(closed, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "PSNR" in done.stdout


def test_a_terminal_without_greek_letters(tiny_config, tmp_path):
    vqvae.train(tiny_config(epochs=1))
    done = subprocess.run([sys.executable, str(ROOT / "analysis.py"), str(tmp_path / "experiments" / "tiny")], text=True,
                          capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "BA-VQ ?=10" in done.stdout


def test_a_home_folder_in_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("out_dir: ~/runs\ndata_dir: ~/data\n")
    assert run(capsys, "--config", str(tmp_path / "c.yaml"), "--dry_run")[0] == 0
    config, _ = train.config_from(["--config", str(tmp_path / "c.yaml")])
    assert (config.out_dir, config.data_dir) == (f"{tmp_path}/runs", f"{tmp_path}/data")


def test_the_exit_code_stands_where_nobody_reads_the_error():
    with subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--epochs", "0"], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE) as process:
        process.stderr.close()  # before it has printed anything
    assert process.returncode == 2


@pytest.mark.parametrize(("script", "policy", "spins"), [
    *((script, {}, "3000") for script in ("train", "eval_cifar", "export_codes", "analysis", "run_gpu_experiments")),
    ("train", {"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000"), ("train", {"GOMP_SPINCOUNT": "7"}, "7"),
])
def test_threads_spin_a_little_while_they_wait_unless_the_user_says_otherwise(script, policy, spins):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", f"import {script}"], cwd=ROOT, capture_output=True, text=True,
                          env={**environment, **policy, "OMP_DISPLAY_ENV": "VERBOSE"})
    shown = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not shown:
        pytest.skip("this PyTorch has another OpenMP library than GNU's")
    assert set(shown) == {spins}


def test_help_does_not_wait_for_packages_that_only_training_needs():
    slow = "{'torchvision', 'matplotlib', 'wandb', 'scipy', 'cleanfid'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"import sys, train; print(sorted({slow}))"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.stdout == "[]\n", done.stderr


def test_ctrl_c_outside_training_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert vqvae.run_command(interrupted) == 130 and capsys.readouterr().err == "stopped\n"


def test_an_apple_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(vqvae.UserError, match="mps.*--device cpu"):
        vqvae.pick_device("mps")


def test_a_record_of_an_apple_gpu_does_not_pass_for_one_of_its_processor():
    names = [vqvae.machine(torch.device(kind))["device"] for kind in ("cpu", "mps")]
    assert names[1] == f"{names[0]} (GPU)"


def test_a_batch_that_cannot_be_is_refused(tiny_config, monkeypatch):
    with pytest.raises(vqvae.UserError, match="batch_size: 16 is more than the 2 training images; lower it"):
        vqvae.train(tiny_config(train_subset=2))
    monkeypatch.setattr(vqvae, "world_size", lambda: 3)
    with pytest.raises(vqvae.UserError, match="batch_size.*3 processes"):
        vqvae.train(tiny_config())


def test_the_last_word_on_wandb_counts():
    assert [train.config_from(words.split())[0].wandb for words in ("--no_wandb --wandb", "--wandb --no_wandb")] == [True, False]


def test_wandb_that_is_not_installed(tiny_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    with pytest.raises(vqvae.UserError, match="pip install wandb"):
        vqvae.train(tiny_config(wandb=True))
    folder = vqvae.Path(tiny_config().out_dir)
    assert not folder.exists()
    vqvae.train(tiny_config(epochs=1))
    with pytest.raises(vqvae.UserError, match="pip install wandb"):
        vqvae.train(tiny_config(epochs=1, wandb=True, overwrite=True))
    assert (folder / "tiny" / "final_model.pt").exists()


def test_where_nothing_can_be_compiled_one_line_says_so(capsys):
    class InductorError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def main():
        raise InductorError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    assert vqvae.run_command(main) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "drop --compile" in message and "No working C++ compiler" in message


def test_one_gpu_for_every_process_is_refused(monkeypatch):
    monkeypatch.setattr(vqvae, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(vqvae.UserError, match="use --device cuda"):
        vqvae.pick_device("cuda:0")
    assert vqvae.pick_device("cuda")[0] == torch.device("cuda")


def test_wandb_sees_the_exit_code():
    """It replaces sys.exit when it is imported, in the middle of a run, to hear of it."""
    script = ("import os, runpy, sys, vqvae\n"
              "def run_command(main):\n"
              "    sys.exit = lambda code: (print('seen', code, flush=True), os._exit(0))\n"
              "    return 7\n"
              "vqvae.run_command = run_command\n"
              "runpy.run_path('train.py', run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "seen 7\n", done.stderr
