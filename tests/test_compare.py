"""benchmarks/compare.py: one JSON per run, repeatable, and a summary worked out by hand."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure

import vqvae

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results" / "compare")
    compare.RESULTS.mkdir(parents=True)
    return compare.RESULTS


def test_one_json_per_run_and_no_repetition(results, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [w for k, v in tiny(epochs=1).items() if k not in ("name", "codebook_size", "latent_dim", "out_dir")
             for w in (f"--{k}", str(v))]
    line = compare.run("ba_vq_lambda10", 16, 4, 1, flags, threads=1)
    record = json.loads((results / "ba_vq_lambda10_dead_leaves_k16_d4_h8b16_e1_muon_s1.json").read_text())
    assert "PSNR" in line and record["seed"] == 1 and record["method"] == "ba_vq_lambda10" and record["seconds"] > 0
    assert record["precision"] == "float32" and record["threads"] == 1 and record["device"] and record["torch"]
    assert record["refined_psnr"] != record["psnr"] and 0 < record["refined_usage_rate"] <= 1
    assert "--methods ba_vq_lambda10 --codebook_sizes 16 --latent_dims 4 --seeds 1" in record["command"]
    assert "done before" in compare.run("ba_vq_lambda10", 16, 4, 1, flags, threads=1)
    target = results / "ba_vq_lambda10_dead_leaves_k16_d4_h8b16_e1_muon_s1.json"
    words = ["--methods", "ba_vq_lambda10", "--codebook_sizes", "16", "--latent_dims", "4", *flags]
    for values, message in (({"lr": 0.5}, "lr 0.003, but 0.5 in other runs"), ({"whitening": 0.0}, "whitening"),
                            ({"temperature_end": 0.1}, "temperature_end 0.02, but 0.1 in other runs")):
        target.write_text(json.dumps({**record, "config": {**record["config"], **values}}))
        for seeds in ("1", "2"):  # the same run, and one of its row
            with pytest.raises(vqvae.UserError, match=message):
                compare.main([*words, "--seeds", seeds])


def test_no_run_begins_after_a_failure(results, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [w for k, v in tiny(epochs=1).items() if k not in ("name", "codebook_size", "latent_dim", "out_dir")
             for w in (f"--{k}", str(v))]
    begun = []

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, method, size, *others):
            begun.append(size)
            assert others[-1] == 12  # threads: all that this process may use, for one run at a time
            future = compare.concurrent.futures.Future()
            if size == 8:
                future.set_exception(vqvae.Interrupted("stopped", 2))
            else:
                future.set_result("done")
            return future

    monkeypatch.setattr(compare.concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    words = ["--methods", "vq_ema", "--codebook_sizes", "4,8,16,32", "--latent_dims", "4", "--seeds", "0", *flags]
    assert vqvae.run_command(lambda: compare.main(words)) == 130
    assert begun == [4, 8]


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_is_killed_is_named_in_one_line(results, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "run", killed)
    words = ["--methods", "vq_ema", "--codebook_sizes", "16", "--latent_dims", "4", "--seeds", "0", "--dataset", "dead_leaves"]
    assert vqvae.run_command(lambda: compare.main(words)) == 2
    assert capsys.readouterr().err == ("error: a run was killed, perhaps for lack of memory; lower --jobs, then give the same "
                                       "command again\n")


def test_a_killed_comparison_leaves_no_run_behind(tiny, tmp_path):
    flags = [w for k, v in tiny(epochs=10_000, out_dir="runs").items() if k not in ("name", "codebook_size", "latent_dim")
             for w in (f"--{k}", str(v))]
    words = ["--methods", "vq_ema", "--codebook_sizes", "16", "--latent_dims", "4", "--seeds", "0", *flags]
    folder = tmp_path / "runs" / "vq_ema_dead_leaves_k16_d4_h8b16_e10000_muon_s0"
    with subprocess.Popen([sys.executable, ROOT / "benchmarks" / "compare.py", *words], cwd=tmp_path) as process:
        try:
            wait_until(lambda: list(folder.glob("checkpoint_epoch_*")))
        finally:
            process.kill()
    with open(folder / ".lock") as lock:  # the run holds it
        wait_until(lambda: not is_locked(lock))


def is_locked(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def wait_until(condition, seconds=600):  # a busy machine takes minutes to start
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_tables_of_unequal_settings_are_refused(results, tiny_config):
    for method, lr in (("vq_ema", 0.001), ("ba_vq_lambda10", 0.002)):
        record = {"method": method, "seed": 0, "config": tiny_config(lr=lr).to_dict()}
        (results / f"{method}.json").write_text(json.dumps(record))
    with pytest.raises(vqvae.UserError, match="vq_ema.json: lr 0.001, but 0.002 in other runs"):
        compare.summary()
    (results / "vq_ema.json").unlink()
    for name, folder in (("a", "/one"), ("b", "/two")):  # any setting that is not of the methods, as here where the images are
        config = tiny_config(dataset="folder", data_dir=folder, entropy_weight=1.0 if name == "a" else 10.0).to_dict()
        (results / f"{name}.json").write_text(json.dumps({"method": name, "seed": 0, "config": config}))
    with pytest.raises(vqvae.UserError, match="b.json: data_dir /two, but /one in other runs"):
        compare.summary()
    for name in "ab":
        (results / f"{name}.json").unlink()
    words = ["--methods", "vq_ema", "--codebook_sizes", "16", "--latent_dims", "4", "--dataset", "dead_leaves",
             "--image_size", "16", "--hidden_dim", "8", "--batch_size", "16", "--epochs", "2"]
    with pytest.raises(vqvae.UserError, match="vq_ema_dead_leaves_k16.*: train_subset None, but 96 in other runs"):
        compare.main(words)  # before it trains


def test_runs_of_another_depth_batch_or_optimizer_have_their_own_name_and_table(results, tiny_config):
    for changes, rest in (({}, "h8b16_e2_muon"), ({"batch_size": 128}, "h8_e2_muon"), ({"res_blocks": 6}, "h8x6b16_e2_muon"),
                          ({"optimizer": "adamw"}, "h8b16_e2")):
        assert compare.run_name("vq_ema", 16, 4, 0, tiny_config(**changes)) == f"vq_ema_dead_leaves_k16_d4_{rest}_s0"
    other = tiny_config(dataset="cifar10", image_size=32)  # else a run of one data set would stand for the other's
    assert compare.run_name("vq_ema", 16, 4, 0, other) == "vq_ema_k16_d4_h8b16_e2_muon_s0"
    shallow, deep = (tiny_config(res_blocks=blocks).to_dict() for blocks in (2, 6))
    del shallow["res_blocks"], shallow["optimizer"]  # a record made before there were the settings
    for name, config in (("shallow", shallow), ("deep", deep), ("large", {**shallow, "batch_size": 32})):
        record = {"method": "vq_ema", "seed": 0, "psnr": 20.0, "psnr_per_image": 1.0, "perplexity": 8.0, "usage_rate": 1.0,
                  "config": config}
        (results / f"{name}.json").write_text(json.dumps(record))
    headings = [line for line in compare.summary().splitlines() if line.startswith("## ")]
    settings = [", batch 16, 2 epochs, adamw", ", batch 32, 2 epochs, adamw", ", 6 residual blocks, batch 16, 2 epochs, muon"]
    assert headings == [f"## dead_leaves, K=16, D=4, hidden 8{its}" for its in settings]


def test_a_cell_given_twice_is_run_once():
    assert len(compare.parse(["--seeds", "0,1,0", "--methods", "vq_ema,vq_ema"])[1]) == 2


def test_settings_of_runs_that_the_summary_does_not_make_are_refused():
    with pytest.raises(vqvae.UserError, match="--lr"):
        compare.parse(["--summary", "--lr", "1e-3"])


def test_a_record_without_a_valid_config_is_named(results, tiny_config):
    for config in (None, {**tiny_config().to_dict(), "new_setting": 1}):
        (results / "odd.json").write_text(json.dumps({"method": "vq_ema", "seed": 0, "config": config}))
        with pytest.raises(vqvae.UserError, match="odd.json: its config is not valid here"):
            compare.summary()


def test_summary_by_hand(results, tiny_config):
    for method, values in (("vq_ema", [20.0, 21.0, 22.0]), ("ba_vq_lambda10", [20.5, 21.6, 22.4])):
        for seed, psnr in enumerate(values):
            record = {"method": method, "seed": seed, "psnr": psnr, "psnr_per_image": 1 - psnr, "ssim": psnr / 100,
                      "perplexity": 8.0, "usage_rate": 1.0, "config": tiny_config(seed=seed).to_dict()}
            (results / f"{method}_{seed}.json").write_text(json.dumps(record))
    text = compare.summary()
    # differences 0.5, 0.6, 0.4: mean 0.5, deviation 0.1, t = 0.5 / (0.1 / sqrt 3) = 8.66, p = 0.013
    differences = "+0.500 ± 0.100 | 0.013 | -0.500 ± 0.100 | 0.013 | +0.0050 ± 0.0010 | 0.013"
    assert f"| ba_vq_lambda10 | 3 | 21.50 ± 0.95 | 8.0 ± 0.0 | 50.0% | 100.00% | {differences} |" in text
    assert text.index("ba_vq_lambda10") < text.index("| vq_ema |")
    for method, seeds in (("two_seeds", (0, 1)), ("steady", (0, 1, 2))):
        for seed in seeds:
            record = {"method": method, "seed": seed, "psnr": (20.0, 21.0, 22.0)[seed] + 0.2 + 1e-6 * seed, "psnr_per_image": 1.0,
                      "perplexity": 8.0, "usage_rate": 1.0, "config": tiny_config(seed=seed).to_dict()}  # no SSIM
            (results / f"{method}_{seed}.json").write_text(json.dumps(record))
    text = compare.summary()
    assert "| two_seeds | 2 | 20.70 ± 0.71 | 8.0 ± 0.0 | 50.0% | 100.00% | +0.200 ± 0.000 |  |" in text
    steady, = [line.split(" | ") for line in text.splitlines() if "steady" in line]
    assert steady[6:8] == ["+0.200 ± 0.000", "<0.001"] and steady[10:12] == ["", ""]
    runs = {seed: {"psnr": 20.0 + seed} for seed in range(4)}
    assert compare.difference(runs, runs, "psnr") == ("+0.000 ± 0.000", "")  # no spread to test against
    assert compare.difference(runs, {1: {"psnr": 20.5}, 7: {"psnr": 1.0}}, "psnr") == ("+0.500 (1 of 4)", "")


@pytest.mark.parametrize("words", [["--methods", "magic"], ["--seeds", "x"], ["--codebook_sizes", "512,"], ["--lr", "fast"],
                                   ["--jobs", "0"], ["--seed", "1"], ["--codebook_size=64"], ["--seeds", "0,-1"],
                                   ["--codebook_sizes", "0"], ["--dry_run"],
                                   ["--methods", "cvq", "--metric", "cosine"], ["--prediction", "checkerboard"],
                                   ["--trellis", "4"], ["--entropy_weight", "3"], ["--vq_recipe=classical"],
                                   ["--methods", "vq_ema,vq_ema_warmup20", "--warmup_fraction", "0.1"],
                                   ["--methods", "vq_ema,lib_fsq", "--codebook_sizes", "500"]])
def test_bad_words(words, results, capsys):
    assert vqvae.run_command(lambda: compare.main(words)) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(results.iterdir())


def test_rate_distortion_curves_with_and_without_prediction_and_trellis(results, tiny_config, tmp_path, monkeypatch):
    config = tiny_config(dataset="cifar10", image_size=32, hidden_dim=64, latent_dim=8, batch_size=128, epochs=10,
                         optimizer="adamw").to_dict()
    cells = [("ba_vq_lambda10", 10.0, "none", "none"), ("ba_vq_lambda1", 1.0, None, None),
             ("ba_vq_lambda3_scaled_trellis", 3.0, "scaled", "4"), ("ba_vq_lambda3_scaled_trellis16", 3.0, "scaled", "16"),
             ("ba_vq_lambda100_scaled_trellis16", 100.0, "scaled", "16"), ("ba_vq_lambda3_scaled_trellis64", 3.0, "scaled", "64"),
             ("vq_ema_scaled_trellis16", 10.0, "scaled", "16"), ("cvq", 10.0, "none", "none"),
             ("ba_vq_lambda3_predictive", 3.0, "checkerboard", "none"),  # of another kind than is shown
             ("ba_vq_lambda3_scaled_trellis_warmup20", 3.0, "scaled", "4"), ("vq_ema_no_warmup", 10.0, "none", "none")]
    for number, (method, weight, prediction, trellis) in enumerate(cells):
        changed = {**config, "entropy_weight": weight, "prediction": prediction, "trellis": trellis}
        if prediction is None:  # from before there were any
            del changed["prediction"], changed["trellis"]
        record = {"method": method, "seed": 0, "psnr": 20 + number, "bits_per_index": 3 + number / 10, "config": changed}
        (results / f"{number}.json").write_text(json.dumps(record))
    figures = []
    monkeypatch.setattr(compare, "GAUSSIAN", tmp_path / "gaussian.json")
    monkeypatch.setattr(compare, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    compare.rate_distortion_figure(tmp_path / "figure.png")
    lines = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[0].lines if line.get_label()[0] != "_"}
    assert lines == {"BA-VQ over λ, no additions": [21, 20], "BA-VQ over λ, +PT4": [22], "BA-VQ over λ, +PT16": [23, 24],
                     "BA-VQ over λ, +PT64": [25], "VQ-EMA tuned, +PT16": [26], "CVQ-VAE": [27]}
    assert len({tuple(look.values()) for look in compare.LOOKS.values()}) == len(compare.POINTS) == len(compare.LOOKS)


def test_rate_distortion_figure(results, tiny_config, tmp_path, monkeypatch):
    config = tiny_config(dataset="cifar10", image_size=32, hidden_dim=64, latent_dim=8, batch_size=128, epochs=10,
                         optimizer="adamw").to_dict()
    for method, bits in (("vq_ema", 3.5), ("ba_vq_lambdainf", 3.9), ("ba_vq_lambda10", 3.7)):
        record = {"method": method, "seed": 0, "psnr": 20 + bits, "bits_per_index": bits, "config": config}
        (results / f"{method}.json").write_text(json.dumps(record))
    monkeypatch.setattr(compare, "GAUSSIAN", tmp_path / "gaussian.json")
    compare.rate_distortion_figure(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    for dataset in ("dead_leaves", "cifar10"):  # theory is drawn for the data set of the figure only
        points = [{"codebook_size": size, "shannon": {"psnr": psnr}} for size, psnr in ((8, 24.0), (16, 25.0))]
        compare.GAUSSIAN.write_text(json.dumps({"dataset": dataset, "downsample": 4, "sizes": points}))
        compare.rate_distortion_figure(tmp_path / "theory.png")
        same = (tmp_path / "theory.png").read_bytes() == (tmp_path / "figure.png").read_bytes()
        assert same == (dataset == "dead_leaves")
    compare.GAUSSIAN.unlink()
    for name, method, seed in (("one method's own seed", "vq_ema", 1), ("a method without the seed of the others", "cvq", 1),
                               ("a seed of all", "vq_ema", 0)):
        (results / "vq_ema_again.json").write_text(json.dumps({**record, "method": method, "seed": seed, "psnr": 50.0}))
        compare.rate_distortion_figure(tmp_path / "again.png")
        assert ((tmp_path / "again.png").read_bytes() == (tmp_path / "figure.png").read_bytes()) == (seed == 1), name
