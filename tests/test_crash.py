"""A run killed again and again, at random moments and on a full disk, ends as an uninterrupted one, bit for bit.

CRASHES=60 python -m pytest tests/test_crash.py repeats it more often than the suite's 8 times.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

CRASHES = int(os.environ.get("CRASHES", 8))

# Everything is imported once, also what a run imports late; every attempt is a fork of that process. Every second one is
# killed by its parent at any moment, the others kill themselves just before or just after a write reaches the disk or gets
# its final name.
SUPERVISOR = """
import json, os, random, signal, sys, time
sys.path.insert(0, {root!r})
import matplotlib.figure, torch._dynamo, torchvision, train, vqvae
vqvae.torch.set_num_threads(1)
vqvae.DEAD_LEAVES_SIZES = {{True: 200, False: 60}}
flags, crashes, longest = sys.argv[3:], int(sys.argv[1]), float(sys.argv[2])
seed = random.Random(0)
config, _ = train.config_from(flags)
readers = {{".pt": vqvae.read_checkpoint, ".json": lambda path: json.loads(path.read_text()), ".yaml": vqvae.read_yaml,
           ".png": lambda path: vqvae.Image.open(path).load()}}

def deadly(function, countdown, after):
    def call(*arguments):
        countdown[0] -= 1
        if countdown[0] == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        function(*arguments)
        if countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return call

began = time.monotonic()  # not before: the imports take longer than the run
for attempt in range(crashes + 1):
    countdown, after, pause = [seed.randint(1, 18)], seed.random() < 0.5, seed.uniform(0, longest)
    child = os.fork()
    if child == 0:
        if attempt % 2 and attempt < crashes:
            os.fsync, os.replace = (deadly(f, countdown, after) for f in (os.fsync, os.replace))
        os._exit(vqvae.run_command(lambda: train.main(flags)) or 0)
    if attempt % 2 == 0 and attempt < crashes:
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    for path in vqvae.Path(config.out_dir, config.name).glob("*.*"):  # every final name holds a whole file
        if path.suffix in readers and not path.name.startswith("."):
            readers[path.suffix](path)
print("killed", crashes, "times, seconds:", time.monotonic() - began)
"""


def flags_of(settings):
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def assert_same_run(one, other):
    """Weights, metrics and logs of two run folders agree bit for bit, the name apart."""
    a, b = (json.loads((folder / "final_metrics.json").read_text()) for folder in (one, other))
    for metrics in (a, b):
        metrics.pop("config")
    assert a == b
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    a, b = (torch.load(folder / "final_model.pt", weights_only=True)["model"] for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_killed_at_random_moments(tiny, tmp_path):
    def run(name, crashes, longest):
        words = flags_of(tiny(name=name, epochs=4 * CRASHES, restart_threshold=0.9))  # random restarts in every step
        done = subprocess.run([sys.executable, "-c", SUPERVISOR.format(root=str(ROOT)), str(crashes), str(longest), *words],
                              capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
        return tmp_path / "experiments" / name, done.stdout

    whole, output = run("whole", 0, 0)
    seconds = float(output.split()[-1])
    killed, output = run("killed", CRASHES, 2 * seconds / CRASHES)  # a slow machine is given longer to get on
    assert output.count("resuming") > CRASHES / 2
    assert_same_run(whole, killed)


def test_a_full_disk_loses_nothing(tiny, tmp_path):
    """A tmpfs that grows from nothing: every attempt says so in one line and exits with 2, until the run fits and ends."""
    settings = tiny(name="full", epochs=3)
    disk = tmp_path / "disk"
    disk.mkdir()
    script = """
        mount -t tmpfs -o size=4k none "$DISK"
        for size in 8 12 32 64 112 160 4096; do
            mount -o remount,size=${size}k "$DISK"
            "$@"
            code=$?
            echo "exit $code"
            [ $code = 0 ] && break
        done
        cp -r "$DISK/full" "$COPY"
    """
    command = [sys.executable, str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DISK": str(disk), "COPY": str(tmp_path / "copy"), "PYTHONWARNINGS": ""}
    in_namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*in_namespace, "mount", "-t", "tmpfs", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no user namespaces here to mount a small tmpfs in")
    full = subprocess.run([*in_namespace, "sh", "-c", script, "sh", *command, *flags_of({**settings, "out_dir": str(disk)})],
                          env=environment, capture_output=True, text=True, timeout=1800)
    codes = [int(line.split()[1]) for line in full.stdout.splitlines() if line.startswith("exit")]
    assert codes[-1] == 0 and set(codes[:-1]) == {2} and len(codes) > 3, full.stdout + full.stderr
    errors = full.stderr.splitlines()
    assert len(errors) == len(codes) - 1 and all("No space left" in line or "cannot write" in line for line in errors), errors
    assert subprocess.run([*command, *flags_of({**settings, "name": "whole"})], env=environment,
                          stdout=subprocess.DEVNULL).returncode == 0
    assert_same_run(tmp_path / "experiments" / "whole", tmp_path / "copy")
