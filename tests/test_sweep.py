"""The sweep, the extended runs and the comparison, through their command lines."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import analysis
import run_gpu_experiments
import train
import vqvae

SMALL = ["--dataset", "dead_leaves", "--image_size", "16", "--train_subset", "64", "--test_subset", "32", "--val_size",
         "14000", "--hidden_dim", "8", "--latent_dim", "4", "--batch_size", "32", "--device", "cpu", "--precision", "float32"]


@pytest.fixture
def script(tmp_path):
    """Run one of the scripts in an empty folder; (exit code, stdout, stderr)."""

    def start(name, *words, **environment):
        command = ["bash"] if name.endswith(".sh") else [sys.executable]
        done = subprocess.run([*command, str(ROOT / name), *words], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment})
        return done.returncode, done.stdout, done.stderr

    return start


def test_the_table_is_the_documented_one():
    runs = {(q, k, m): e for _, q, k, m, e in run_gpu_experiments.RUNS}
    expected = {("vq_ema", 256, "euclid"): 25, ("vq_ema", 512, "euclid"): 25, ("vq_ema", 1024, "euclid"): 20,
                ("vq_ema", 256, "cosine"): 20}
    expected |= {("ba_vq", k, m): e for (_, k, m), e in expected.items()}
    assert runs == expected and len(run_gpu_experiments.RUNS) == 8


def test_the_sweep_and_the_documented_lines_have_names_of_their_own():
    from test_cli import USERS_LINES
    swept = {run[0] for run in run_gpu_experiments.RUNS}
    assert not swept & {line.split()[9] for line in USERS_LINES}


def test_dry_run_and_print_commands_write_nothing(script, tmp_path):
    code, out, _ = script("run_gpu_experiments.py", "--dry_run")
    assert code == 0 and len(out.splitlines()) == 8 and "K=1024" in out
    code, out, _ = script("run_gpu_experiments.py", "--print_commands", "--epochs", "3", "--seed", "4")
    assert code == 0 and len(out.splitlines()) == 8
    configs = []
    for line in out.splitlines():  # each is a whole command, for a line of a job array
        python, train_py, *flags = shlex.split(line)
        assert (python, train_py) == ("python", str(ROOT / "train.py"))  # from any folder
        configs.append(train.config_from(flags)[0])
    assert [c.name for c in configs] == [run[0] for run in run_gpu_experiments.RUNS]
    assert all((c.seed, c.epochs, c.batch_size) == (4, 3, 256) for c in configs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--jobs", "x"], ["--gpus", "a"], ["--only", "k999"], ["--timeout", "-1"],
                                   ["--timeout", "nan"], ["--gpus", ""],
                                   ["--epochs", "0"], ["--lr", "fast"], ["--name", "x"], ["--quantizer=vq_ema"],
                                   ["--codebook_size", "64"], ["--metric", "cosine"], ["--unknown"]])
def test_bad_words_give_one_line(capsys, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert vqvae.run_command(lambda: run_gpu_experiments.main(words)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_sweep_runs_skips_what_is_done_and_summarises(script, tmp_path):
    words = ["--only", "k256_cosine", "--epochs", "1", "--jobs", "2", *SMALL]
    code, out, err = script("run_gpu_experiments.py", *words)
    assert code == 0, (out, err)
    folder = tmp_path / "experiments"
    summary = json.loads((folder / "gpu_run_summary.json").read_text())
    assert set(summary["runs"]) == {"gpu_vq_ema_k256_cosine", "gpu_ba_vq_k256_cosine"}
    pair, = summary["differences"]
    assert pair["psnr"] == pytest.approx(summary["runs"]["gpu_ba_vq_k256_cosine"]["psnr"]
                                         - summary["runs"]["gpu_vq_ema_k256_cosine"]["psnr"])
    assert "BA-VQ over VQ-EMA" in out and (folder / "summary.png").stat().st_size > 5000
    before = (folder / "gpu_ba_vq_k256_cosine" / "final_model.pt").stat().st_mtime_ns
    assert script("run_gpu_experiments.py", *words)[0] == 0
    assert (folder / "gpu_ba_vq_k256_cosine" / "final_model.pt").stat().st_mtime_ns == before
    # Where none finishes, what stands there is kept, also where others have finished before.
    code, _, _ = script("run_gpu_experiments.py", "--only", "ba_vq_k256_cosine", *words[2:], "--lr", "0.001")
    assert code == 1 and len(json.loads((folder / "gpu_run_summary.json").read_text())["runs"]) == 2
    # Another config under the same names is not taken for done.
    code, _, err = script("run_gpu_experiments.py", *words, "--lr", "0.001")
    assert code == 1 and "failed: gpu_vq_ema_k256_cosine, gpu_ba_vq_k256_cosine" in err
    assert "another config (lr 0.003 -> 0.001)" in (folder / "gpu_ba_vq_k256_cosine.log").read_text()
    kept = (folder / "gpu_run_summary.json").read_text()
    # A part of the runs does not drop the others.
    assert script("run_gpu_experiments.py", "--only", "ba_vq_k256_cosine", *words[2:])[0] == 0
    part = json.loads((folder / "gpu_run_summary.json").read_text())
    assert part == {**summary, "seconds": part["seconds"], "status": {"gpu_ba_vq_k256_cosine": "finished"}}
    assert json.loads(kept) == {**summary, "seconds": json.loads(kept)["seconds"]}  # not emptied
    # The user's own loop over the results.
    loop = ('for exp in experiments/*/final_metrics.json; do\n  echo "$(dirname $exp):"\n  python -c "import json; '
            "m=json.load(open('$exp')); print(f\\\"  PSNR: {m['psnr']:.2f} dB, Perplexity: {m['perplexity']:.1f}, "
            "Usage: {m['usage_rate']*100:.1f}%\\\")\"\ndone\n")
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    shown = subprocess.run(["bash", "-c", loop], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert shown.returncode == 0 and shown.stdout.count("PSNR: ") == 2 and "Usage: " in shown.stdout


def test_a_sweep_without_a_place_to_write(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    words = ["--only", "k256_cosine", "--out_dir", str(tmp_path / "file")]
    assert vqvae.run_command(lambda: run_gpu_experiments.main(words)) == 2
    err = capsys.readouterr().err
    assert "choose another --out_dir" in err and err.count("\n") == 1


def test_the_reason_of_a_failure_is_its_error_line(tmp_path, monkeypatch):
    """Not the last line: an earlier process that still trains this run may write to the same log."""
    (tmp_path / "train.py").write_text("import sys\nprint('error: another process is training this run')\n"
                                       "print('epoch 7/9  recon 0.1')\nsys.exit(2)\n")
    monkeypatch.setattr(run_gpu_experiments, "SCRIPTS", tmp_path)
    sweep = run_gpu_experiments.Sweep([None], None)
    assert sweep.run([], tmp_path / "run.log") == "error: another process is training this run"


def test_a_failing_run_does_not_stop_the_others_and_only_it_is_repeated(script, tmp_path):
    words = ["--only", "k256_cosine", "--epochs", "1", *SMALL]
    folder = tmp_path / "experiments"
    taken = folder / "gpu_vq_ema_k256_cosine"
    taken.mkdir(parents=True)
    (taken / "foreign.txt").write_text("in the way")
    code, out, err = script("run_gpu_experiments.py", *words)
    summary = json.loads((folder / "gpu_run_summary.json").read_text())
    assert code == 1 and "failed: gpu_vq_ema_k256_cosine" in err
    assert summary["status"]["gpu_ba_vq_k256_cosine"] == "finished"
    assert "gpu_vq_ema_k256_cosine: exists and is not a run of this project" in summary["status"]["gpu_vq_ema_k256_cosine"]
    (taken / "foreign.txt").unlink()
    before = (folder / "gpu_ba_vq_k256_cosine" / "final_model.pt").stat().st_mtime_ns
    assert script("run_gpu_experiments.py", *words)[0] == 0
    assert (folder / "gpu_ba_vq_k256_cosine" / "final_model.pt").stat().st_mtime_ns == before
    assert set(json.loads((folder / "gpu_run_summary.json").read_text())["runs"]) == set(summary["status"])


def test_jobs_are_packed_onto_the_gpus(tmp_path, monkeypatch):
    """Two jobs at once on each of two GPUs, never more; all four share the cores."""
    (tmp_path / "train.py").write_text("import os, time\nprint(os.environ['CUDA_VISIBLE_DEVICES'], time.time(), flush=True)\n"
                                       "time.sleep(0.5)\nprint(time.time(), os.environ['OMP_NUM_THREADS'])\n")
    monkeypatch.setattr(run_gpu_experiments, "SCRIPTS", tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)  # fewer than the machine has, where some are not this process's
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sweep = run_gpu_experiments.Sweep(["0", "1"] * 2, None)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda i: sweep.run([], tmp_path / f"{i}.log"), range(8))) == {"finished"}
    runs = [(tmp_path / f"{i}.log").read_text().split() for i in range(8)]
    for gpu in "01":
        spans = [(float(began), float(ended)) for g, began, ended, _ in runs if g == gpu]
        together = [sum(began <= moment < ended for began, ended in spans) for moment, _ in spans]
        assert len(spans) >= 2 and max(together) == 2
    assert {threads for *_, threads in runs} == {"3"}


def test_the_gpu_suite_repeats_only_what_failed(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_suite.sh").write_text((ROOT / "benchmarks" / "gpu_suite.sh").read_text())
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" | tee -a {tmp_path}/calls\n'
                      f'case "$*" in *--memory*) test ! -e {tmp_path}/broken ;; esac\n')
    python.chmod(0o755)
    (tmp_path / "broken").touch()
    command = ["bash", str(tmp_path / "benchmarks" / "gpu_suite.sh")]
    environment = {**os.environ, "PYTHON": str(python), "SMALL": ""}
    first = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert first.returncode == 1 and "memory failed" in first.stderr
    steps = ["fused", "large", "memory", "scaling", "seeds", "speed", "sweep", "tests"]
    assert sorted(path.stem for path in (tmp_path / "results" / "gpu").glob("*.md")) == [s for s in steps if s != "memory"]
    (tmp_path / "broken").unlink()
    (tmp_path / "calls").unlink()
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all("--memory" in line or line.startswith("-c ") for line in calls)  # -c: the name of the GPU
    table = (tmp_path / "results" / "gpu_suite.md").read_text()
    assert all(f"## {step}, " in table for step in steps)


def test_a_hanging_run_is_killed(script, tmp_path):
    code, _, err = script("run_gpu_experiments.py", "--only", "ba_vq_k256_cosine", "--timeout", "1", "--epochs", "5000", *SMALL)
    summary = json.loads((tmp_path / "experiments" / "gpu_run_summary.json").read_text())
    assert code == 1 and summary["status"]["gpu_ba_vq_k256_cosine"] == "timeout after 1 s"


# Stands in for train.py where only the sweep's own handling of its processes matters: it behaves as the run's name says.
ACTOR = """
import os, pathlib, subprocess, sys, time
name = sys.argv[sys.argv.index("--name") + 1]
if "vq_ema_k256_cosine" in name:  # hangs, with a process of its own
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pathlib.Path("child").write_text(str(child.pid))
    time.sleep(60)
if "ba_vq_k256_cosine" in name:
    os.kill(os.getpid(), 9)
if "k1024" in name:
    raise RuntimeError("a bug")
folder = pathlib.Path("experiments") / name
folder.mkdir()
(folder / "final_metrics.json").write_text(pathlib.Path("metrics").read_text())
"""


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_hanging_killed_and_broken_runs_do_not_stop_the_others(tmp_path, monkeypatch, capsys, jobs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(ACTOR)
    (tmp_path / "config_gpu.yaml").write_text("batch_size: 256\n")
    (tmp_path / "metrics").write_text((ROOT / "results" / "sample" / "ba_vq_k128_s0" / "final_metrics.json").read_text())
    monkeypatch.setattr(run_gpu_experiments, "SCRIPTS", tmp_path)
    (tmp_path / "experiments" / "gpu_vq_ema_k512.log").mkdir(parents=True)  # its log cannot be opened
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        overwrite = ["--overwrite"] if jobs == "3" else []  # said again it would begin anew
        assert run_gpu_experiments.main(["--timeout", "2", "--jobs", jobs, *overwrite]) == 1
        assert ("run the same command without --overwrite again" in capsys.readouterr().err) == bool(overwrite)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    summary = json.loads((tmp_path / "experiments" / "gpu_run_summary.json").read_text())
    status = summary["status"]
    assert status.pop("gpu_vq_ema_k512").startswith("could not start: ")
    assert status == {
        "gpu_vq_ema_k256": "finished", "gpu_ba_vq_k256": "finished", "gpu_ba_vq_k512": "finished",
        "gpu_vq_ema_k1024": "exit code 1", "gpu_ba_vq_k1024": "exit code 1",
        "gpu_vq_ema_k256_cosine": "timeout after 2 s", "gpu_ba_vq_k256_cosine": "exit code -9"}
    assert set(summary["runs"]) == {"gpu_vq_ema_k256", "gpu_ba_vq_k256", "gpu_ba_vq_k512"}
    child = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"  # killed with its parent


def test_gpus_that_are_not_there_are_no_run_on_the_cpu():
    _, runs = run_gpu_experiments.parse(["--gpus", "7", "--only", "ba_vq_k512"])
    assert train.config_from(runs["gpu_ba_vq_k512"])[0].device == "cuda"


def test_the_sweep_stops_cleanly(tmp_path):
    command = [sys.executable, str(ROOT / "run_gpu_experiments.py"), "--only", "ba_vq_k256_cosine", "--epochs", "5000", *SMALL]
    log = tmp_path / "experiments" / "gpu_ba_vq_k256_cosine.log"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        deadline = time.time() + 120
        while time.time() < deadline and not (log.exists() and "epoch 1/" in log.read_text()):
            time.sleep(0.1)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "same command continues" in err
    assert "the same command resumes" in log.read_text()


@pytest.mark.parametrize("cause", ["no reader", "a closed terminal"])
def test_the_sweep_ends_its_runs_where_nobody_reads_or_the_terminal_closes(tmp_path, cause):
    (tmp_path / "train.py").write_text("import sys, time\nprint('started', flush=True)\ntime.sleep(float(sys.argv[-1]))\n")
    (tmp_path / "config_gpu.yaml").write_text("batch_size: 256\n")
    seconds = "1" if cause == "no reader" else "60"
    start = (f"import signal, sys; sys.path.insert(0, {str(ROOT)!r}); import run_gpu_experiments as r, train, vqvae; "
             f"signal.signal(signal.SIGHUP, signal.SIG_DFL); r.SCRIPTS = r.Path({str(tmp_path)!r}); "
             f"r.run_flags = lambda run, extra: [{seconds!r}]; train.config_from = lambda flags: (vqvae.Config(), False); "
             "sys.exit(vqvae.run_command(r.main))")
    with subprocess.Popen([sys.executable, "-c", start], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        logs = tmp_path / "experiments"
        deadline = time.time() + 60
        while time.time() < deadline and not any("started" in log.read_text() for log in logs.glob("*.log")):
            time.sleep(0.05)
        began = time.time()
        if cause == "no reader":
            process.stdout.close()
        else:
            process.send_signal(signal.SIGHUP)
        err = process.stderr.read()
        process.wait(30)
    assert time.time() - began < 30 and err.count("\n") == 1, err
    assert process.returncode == (141 if cause == "no reader" else 130)
    assert sum("started" in log.read_text() for log in logs.glob("*.log")) <= 2  # of eight


def test_extended_runs(script, tmp_path):
    (tmp_path / "run_experiments.sh").write_text((ROOT / "run_experiments.sh").read_text())
    for name in ("train.py", "vqvae.py", "config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(["bash", "run_experiments.sh", *SMALL, "--epochs", "1"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    names = ["ba_vq_k256", "ba_vq_k512", "vq_ema_k256", "vq_ema_k512"]
    assert sorted(path.stem for path in (tmp_path / "logs").iterdir()) == names
    assert "epoch 1/1" in (tmp_path / "logs" / "ba_vq_k256.log").read_text()
    for flags, code, line in ((["--dataset", "folder", "--data_dir", "nowhere"], 1, "failed: vq_ema_k256 ba_vq_k256 vq_ema_k512"),
                              (["--lr", "fast"], 2, "lr")):  # the second is seen before any run
        failing = subprocess.run(["bash", "run_experiments.sh", *flags], cwd=tmp_path, capture_output=True, text=True,
                                 env={**os.environ, "PYTHON": sys.executable})
        assert failing.returncode == code and line in failing.stderr.splitlines()[-1]
    assert failing.stderr.count("\n") == 1


def test_ctrl_c_ends_the_gpu_suite_and_what_it_has_started(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_suite.sh").write_text((ROOT / "benchmarks" / "gpu_suite.sh").read_text())
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ntrap "sleep 1; echo saved >&2; exit" TERM\necho $$ >> {tmp_path}/started\nsleep 60 & wait\n')
    python.chmod(0o755)
    command = ["bash", str(tmp_path / "benchmarks" / "gpu_suite.sh")]
    with subprocess.Popen(command, env={**os.environ, "PYTHON": str(python), "SMALL": ""}, stderr=subprocess.PIPE, text=True,
                          stdout=subprocess.DEVNULL, start_new_session=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        try:
            deadline = time.time() + 60
            while time.time() < deadline and not ((tmp_path / "started").exists() and (tmp_path / "started").read_text()):
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            _, err = process.communicate(timeout=30)  # returns when all who could write there have ended
        finally:
            process.kill()
    assert process.returncode == 130 and "the same command continues" in err
    assert err.index("saved") < err.index("stopped")  # it waits for what it ends
    assert len((tmp_path / "started").read_text().split()) == 1  # no other step began


@pytest.mark.parametrize("word", ["--name=x", "--quantizer", "--codebook_size", "--overwrite"])
def test_extended_runs_refuse_what_their_names_say(word, tmp_path):
    (tmp_path / "run_experiments.sh").write_text((ROOT / "run_experiments.sh").read_text())
    done = subprocess.run(["bash", "run_experiments.sh", "--seed", "1", word, "64"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and word.split("=")[0] in done.stderr
    assert not (tmp_path / "logs").exists()


def test_the_gpu_suite_refuses_an_unknown_step(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_suite.sh").write_text((ROOT / "benchmarks" / "gpu_suite.sh").read_text())
    done = subprocess.run(["bash", tmp_path / "benchmarks" / "gpu_suite.sh", "speed", "spede"], capture_output=True, text=True)
    assert done.returncode == 2 and "no step spede" in done.stderr and not (tmp_path / "results").exists()


@pytest.mark.parametrize("content", ['{"gpu_ba_vq_k256": {}}', '{"gpu_ba_vq_k256": 3}'])
def test_a_damaged_note_of_what_to_overwrite_is_named(content, tmp_path):
    (tmp_path / ".overwrite").write_text(content)
    with pytest.raises(vqvae.UserError, match=r"\.overwrite: damaged.*delete it"):
        run_gpu_experiments.main(["--only", "_k256", "--prediction", "none", *SMALL, "--out_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [".overwrite"]


def test_a_stopped_overwrite_is_continued_with_the_runs_it_had_not_reached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, real = [], run_gpu_experiments.Sweep.run

    def run(self, flags, log):
        name = flags[flags.index("--name") + 1]
        given.append((name, flags.count("--overwrite")))
        if name == "gpu_ba_vq_k256" and self.timeout:  # stopped: not reached
            return "not started"
        return real(self, flags, log)

    monkeypatch.setattr(run_gpu_experiments.Sweep, "run", run)
    words = ["--only", "_k256", "--epochs", "1", "--prediction", "none", *SMALL]
    names = ["gpu_vq_ema_k256", "gpu_ba_vq_k256", "gpu_vq_ema_k256_cosine", "gpu_ba_vq_k256_cosine"]
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        assert run_gpu_experiments.main([*words, "--jobs", "2"]) == 0
        written = {name: (tmp_path / "experiments" / name / "final_metrics.json").stat().st_mtime_ns for name in names}
        assert run_gpu_experiments.main([*words, "--lr", "0.001", "--overwrite", "--timeout", "0.001"]) == 1  # none begins
        assert run_gpu_experiments.main(words) == 0 and all(times == 0 for _, times in given[8:])  # nobody asked with these
        assert {name: (tmp_path / "experiments" / name / "final_metrics.json").stat().st_mtime_ns for name in names} == written
        del given[4:]
        assert run_gpu_experiments.main([*words, "--overwrite", "--timeout", "100"]) == 1
        assert sorted(given[4:]) == sorted((name, 1) for name in names)
        with pytest.raises(vqvae.UserError, match="gpu_ba_vq_k256 is still to be trained again"):
            run_gpu_experiments.main([*words, "--resume"])
        assert run_gpu_experiments.main(words) == 0
        assert sorted(given[8:]) == sorted((name, name == "gpu_ba_vq_k256") for name in names)  # the others are done
        assert run_gpu_experiments.main(words) == 0 and all(times == 0 for _, times in given[12:])
        assert not (tmp_path / "experiments" / ".overwrite").exists()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert all((tmp_path / "experiments" / name / "final_metrics.json").stat().st_mtime_ns > written[name] for name in names)


def test_a_run_that_cannot_be_shown_leaves_no_picture(tiny_config):
    vqvae.train(tiny_config(name="good", epochs=1))
    vqvae.train(tiny_config(name="bad", epochs=1, quantizer="vq_ema"))
    folder = vqvae.Path(tiny_config().out_dir)
    metrics = folder / "bad" / "metrics.jsonl"
    kept = metrics.read_text()
    metrics.write_text(kept.replace('"epoch"', '"epohc"'))
    with pytest.raises(vqvae.UserError, match="bad: its metrics.jsonl is missing or damaged"):
        analysis.main([str(folder / "good"), str(folder / "bad")])
    metrics.write_text(kept)
    (folder / "bad" / "final_model.pt").write_bytes(b"damaged")
    with pytest.raises(vqvae.UserError, match="bad/final_model.pt"):
        analysis.main([str(folder / "good"), str(folder / "bad")])
    record = json.loads((folder / "bad" / "final_metrics.json").read_text())
    (folder / "bad" / "final_metrics.json").write_text(json.dumps({**record, "perplexity": "x"}))
    with pytest.raises(vqvae.UserError, match="no finished run of this version"):
        analysis.main([str(folder / "good"), str(folder / "bad")])
    values = {**record, "config": {**record["config"], "of_another_version": 1}}
    (folder / "bad" / "final_metrics.json").write_text(json.dumps(values))
    with pytest.raises(vqvae.UserError, match="bad/final_metrics.json: .*unknown setting 'of_another_version'"):
        analysis.main([str(folder / "good"), str(folder / "bad")])
    assert not list(folder.glob("*.png"))


def test_comparison_table(tiny_config, capsys):
    for quantizer in ("vq_ema", "ba_vq"):
        vqvae.train(tiny_config(quantizer=quantizer, name=quantizer, epochs=1))
    folder = vqvae.Path(tiny_config().out_dir)
    analysis.main([str(folder / "vq_ema"), str(folder / "ba_vq")])
    out = capsys.readouterr().out
    assert "VQ-EMA tuned" in out and "BA-VQ λ=" in out and "ba_vq - vq_ema" in out
    records = analysis.load_runs(analysis.find_runs(folder))
    assert [r["name"] for r in records] == ["ba_vq", "vq_ema"]
    assert all((folder / f"{name}.png").stat().st_size > 5000 for name in ("summary", "training", "usage"))
    shutil.copytree(folder / "ba_vq", folder / "again" / "ba_vq")  # two of one name are two lines in a picture
    same = [folder / "ba_vq", folder / "again" / "ba_vq"]
    doubled = analysis.load_runs([*same, folder / "vq_ema"])
    assert [r["name"] for r in doubled] == [*map(str, same), "vq_ema"]
    assert [text.get_text() for text in analysis.training_curves(doubled[:2]).legends[0].get_texts()] == list(map(str, same))
    with pytest.raises(vqvae.UserError, match="no such folder: nowhere"):
        analysis.main([str(folder / "vq_ema"), "nowhere"])
    with pytest.raises(vqvae.UserError, match="sort_by"):
        analysis.main([str(folder / "vq_ema"), "--sort_by", "config"])
    with_ssim, without = {"config": {}, "name": "inf", "ssim": 0.5}, {"config": {"entropy_weight": "inf"}, "name": "small"}
    assert analysis._sort_value(with_ssim, "ssim") < analysis._sort_value(without, "ssim")
    assert analysis._sort_value(with_ssim, "name") < analysis._sort_value(without, "name")
    assert analysis._sort_value(without, "entropy_weight") == (False, math.inf)
    assert analysis._sort_value(with_ssim, "ssim", True) > analysis._sort_value(without, "ssim", True)  # last there, too
    for damage in ("", "3\n", None):
        log = folder / "vq_ema" / "metrics.jsonl"
        log.unlink() if damage is None else log.write_text(damage)
        with pytest.raises(vqvae.UserError, match="metrics.jsonl is missing or damaged"):
            analysis.main([str(folder / "vq_ema")])


def test_a_run_given_twice_is_one_and_a_peer_is_no_vq_ema(tiny_config, monkeypatch, capsys):
    class Peer(vqvae.VQEMAQuantizer):
        pass

    vqvae.train(tiny_config(name="own", quantizer="vq_ema", epochs=1))
    vqvae.train(tiny_config(name="other", quantizer="vq_ema", epochs=1), Peer(16, 4))
    folder = vqvae.Path(tiny_config().out_dir)
    analysis.main([str(folder / "own"), str(folder / "other" / ".." / "own"), str(folder / "other")])
    out = capsys.readouterr().out
    both = analysis.load_runs([folder / "own", folder / "other"])
    assert [record["method"] for record in both] == ["VQ-EMA tuned scaled trellis 16", "Peer"]
    assert "Peer" in analysis.over_seeds(both) and "±" not in analysis.over_seeds(both)
    assert out.count("VQ-EMA tuned") == 1 and "left out, quantizers of benchmarks/peers.py: other" in out
    (folder / "own" / "wandb").mkdir()
    (folder / "summary.png").unlink()
    monkeypatch.chdir(folder / "own" / "wandb")
    analysis.main([".."])
    assert "own" in capsys.readouterr().out and (folder / "summary.png").exists()


@pytest.mark.parametrize("words", [[], ["nowhere"], ["--sort_by"]])
def test_comparison_of_nothing(words, capsys):
    assert vqvae.run_command(lambda: analysis.main(words)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_line_over_K_joins_default_decays_and_seeds_but_averages_nothing_else(tiny_config):
    def record(size, seed=0, **changes):
        return {"config": tiny_config(codebook_size=size, seed=seed, **changes).to_dict()}

    decays = [record(size)["config"]["ema_decay"] for size in (16, 256)]
    assert decays[0] < decays[1]
    records = [record(16), record(16, seed=1), record(16, ema_decay=0.99), record(256)]
    assert analysis._curves(records, "codebook_size") == [[records[:2], records[3:]]]


def test_runs_are_compared_only_under_equal_settings(tiny_config):
    def record(name, **changes):
        return {"name": name, "config": tiny_config(name=name, **changes).to_dict(), "psnr": 1.0, "ssim": 0.5,
                "perplexity": 3.0, "usage_rate": 1.0, "bits_per_index": 2.0}

    records = [record("a", quantizer="vq_ema"), record("b"), record("c", seed=1), record("d", codebook_size=8)]
    assert [(p["ba_vq"], p["vq_ema"]) for p in analysis.differences(records)] == [("b", "a")]


def test_runs_of_earlier_versions_are_compared_too(tiny_config):
    metrics = {"psnr": 1.0, "ssim": 0.5, "perplexity": 2.0, "usage_rate": 1.0, "bits_per_index": 1.0}
    for name in ("vq_ema", "ba_vq"):
        config = tiny_config(name=name, quantizer=name, prediction="none")
        folder = vqvae.Path(config.out_dir) / name
        folder.mkdir(parents=True)
        vqvae.write_json(folder / "final_metrics.json", {**metrics, "config": config.to_dict()})
    old = tiny_config(name="old", entropy_weight="inf").to_dict()
    del old["prediction"], old["trellis"]
    (folder.parent / "old").mkdir()
    vqvae.write_json(folder.parent / "old" / "final_metrics.json", {**metrics, "config": old})
    records = analysis.load_runs(analysis.find_runs(folder.parent))
    assert [r["method"] for r in records] == ["BA-VQ λ=10", "BA-VQ λ=inf", "VQ-EMA tuned"]
    assert len(analysis.differences(records)) == 2
