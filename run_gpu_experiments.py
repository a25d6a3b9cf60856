"""Run the 8-run sweep of VQ-EMA against BA-VQ, compare, summarise.

    python run_gpu_experiments.py                        # all 8 runs, one after the other
    python run_gpu_experiments.py --jobs 4               # four at once on one GPU
    python run_gpu_experiments.py --gpus 0,1,2,3 --jobs 2
    python run_gpu_experiments.py --only k256 --epochs 2 --dataset dead_leaves   # other flags go to train.py
    python run_gpu_experiments.py --print_commands       # one line per run, for a scheduler

Runs finished with the same config are skipped; a failing one does not stop the others. Logs are in
OUT_DIR/NAME.log, the summary of all runs of the table that are finished there, also by earlier calls, in
OUT_DIR/gpu_run_summary.json and OUT_DIR/summary.png; OUT_DIR/.overwrite says which runs --overwrite has not reached,
for the next call.
Exit codes: 0 all runs finished, 1 some failed, 2 bad input, 130 Ctrl-C, SIGTERM or a closed terminal, 141 nobody
reads the output (runs save where they are; the same command continues).
"""

import concurrent.futures
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import analysis  # before PyTorch: train.py, which it imports first, says how its threads wait

# isort: split
import torch

import train
import vqvae

# Names start with gpu_: the individual 30-epoch runs of the README have the plain ones.
#       name                        quantizer  K     metric    epochs
RUNS = [("gpu_vq_ema_k256",         "vq_ema",  256,  "euclid", 25),
        ("gpu_ba_vq_k256",          "ba_vq",   256,  "euclid", 25),
        ("gpu_vq_ema_k512",         "vq_ema",  512,  "euclid", 25),
        ("gpu_ba_vq_k512",          "ba_vq",   512,  "euclid", 25),
        ("gpu_vq_ema_k1024",        "vq_ema",  1024, "euclid", 20),
        ("gpu_ba_vq_k1024",         "ba_vq",   1024, "euclid", 20),
        ("gpu_vq_ema_k256_cosine",  "vq_ema",  256,  "cosine", 20),
        ("gpu_ba_vq_k256_cosine",   "ba_vq",   256,  "cosine", 20)]
SCRIPTS = Path(__file__).resolve().parent


def run_flags(run, extra):
    """The train.py flags of one row of RUNS; `extra` flags come last and win."""
    name, quantizer, size, metric, epochs = run
    return ["--config", str(SCRIPTS / "config_gpu.yaml"), "--name", name, "--quantizer", quantizer,
            "--codebook_size", str(size), "--metric", metric, "--epochs", str(epochs), *extra]


class Sweep:
    """Starts runs as processes, at most one per slot, and can stop them all."""

    def __init__(self, slots, timeout):
        self.slots, self.timeout = queue.Queue(), timeout
        self.threads = str(max(1, torch.get_num_threads() // len(slots)))  # more at once slow each other down
        for slot in slots:
            self.slots.put(slot)
        self.processes, self.stopped, self.lock = set(), threading.Event(), threading.Lock()

    def run(self, flags, log):
        """Run train.py with these flags, output to `log`; returns 'finished' or why it did not."""
        gpu = self.slots.get()
        try:
            environment = {"OMP_NUM_THREADS": self.threads, **os.environ}
            if gpu is not None:
                environment["CUDA_VISIBLE_DEVICES"] = gpu
            with open(log, "a") as file:
                with self.lock:
                    if self.stopped.is_set():
                        return "not started"
                    process = subprocess.Popen([sys.executable, str(SCRIPTS / "train.py"), *flags], stdout=file,
                                               stderr=subprocess.STDOUT, env=environment, start_new_session=True)
                    self.processes.add(process)
                try:
                    code = process.wait(self.timeout)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    return f"timeout after {self.timeout:g} s"
                finally:
                    self.processes.discard(process)
            if code == 2:  # one line says why: bad input, say, or another process is training this run
                errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
                if errors:
                    return errors[-1]
            return "finished" if code == 0 else f"exit code {code}"
        except OSError as error:
            return f"could not start: {error}"
        finally:
            self.slots.put(gpu)

    def stop(self):
        """Ask every running process to save and end."""
        with self.lock:
            self.stopped.set()
            for process in list(self.processes):
                process.send_signal(signal.SIGTERM)


def parse(argv):
    parser = train.Parser(__doc__)
    parser.add_argument("--dry_run", action="store_true", help="print the table of runs and stop")
    parser.add_argument("--print_commands", action="store_true", help="print one command per run and stop")
    parser.add_argument("--only", metavar="TEXT", default="", help="only runs whose name contains TEXT")
    parser.add_argument("--jobs", type=train.whole(1), default=1, metavar="N", help="runs at once on each GPU (default 1)")
    parser.add_argument("--gpus", metavar="0,1,...", help="GPUs to spread the runs over (default: the first)")
    parser.add_argument("--timeout", type=float, metavar="S", help="kill a run after this many seconds")
    options, extra = parser.parse_known_args(argv)
    if options.timeout is not None and not options.timeout > 0:
        raise vqvae.UserError(f"timeout: {options.timeout} must be more than 0 seconds")
    if options.gpus is not None:
        if not all(gpu.isdigit() for gpu in options.gpus.split(",")):
            raise vqvae.UserError(f"gpus: expected numbers with commas between, got {options.gpus!r}")
        extra = ["--device", "cuda", *extra]  # a GPU that is not there is an error, not a run on the CPU
    fixed = {"--name", "--quantizer", "--codebook_size", "--metric"} & {word.split("=")[0] for word in extra}
    if fixed:
        raise vqvae.UserError(f"{min(fixed)[2:]}: set by the table of runs; use --only, and --out_dir to keep sweeps apart")
    runs = [run for run in RUNS if options.only in run[0]]
    if not runs:
        raise vqvae.UserError(f"only: no run has {options.only!r} in its name")
    return options, {run[0]: run_flags(run, extra) for run in runs}


def still_to_overwrite(out_dir, configs):
    """Names of runs to train again: as --overwrite asks now, or asked with these settings in a call that was stopped before.

    OUT_DIR/.overwrite keeps the settings for each that has not begun, and when the config.yaml in its place was written.
    """
    def written(name):
        stored = out_dir / name / "config.yaml"
        return stored.stat().st_mtime_ns if stored.exists() else None

    path = out_dir / ".overwrite"
    before = vqvae.read_json(path) if path.exists() else {}
    try:
        asked = {name: values for name, values in before.items() if values["written"] == written(name)}
    except (KeyError, TypeError) as error:
        raise vqvae.UserError(f"{path}: damaged, or of an earlier version; delete it, and give --overwrite again") from error
    asked.update({name: {"config": vqvae.identity(config), "written": written(name)} for name, config in configs.items()
                  if config.overwrite and written(name)})
    if asked:
        vqvae.write_json(path, asked)
    else:
        path.unlink(missing_ok=True)
    return [name for name, config in configs.items() if name in asked and asked[name]["config"] == vqvae.identity(config)]


def main(argv=None):
    options, runs = parse(argv)
    configs = {name: train.config_from(flags)[0] for name, flags in runs.items()}  # all flags checked before any run
    if options.print_commands:
        for flags in runs.values():
            print(shlex.join(["python", str(SCRIPTS / "train.py"), *flags]))
        return 0
    for name, config in configs.items():
        print(f"{name:23s} {config.quantizer:7s} K={config.codebook_size:<5d} {config.metric:7s} {config.epochs} epochs")
    if options.dry_run:
        return 0

    out_dir = Path(next(iter(configs.values())).out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise vqvae.UserError(f"{out_dir}: cannot write here ({error.strerror}); choose another --out_dir") from error
    for name in still_to_overwrite(out_dir, configs):
        if configs[name].resume:
            raise vqvae.UserError(f"resume: {name} is still to be trained again, as --overwrite asked before; drop --resume")
        if not configs[name].overwrite:
            print(f"{name}: trained again, as --overwrite asked before")
            runs[name].append("--overwrite")
    sweep = Sweep((options.gpus.split(",") if options.gpus else [None]) * options.jobs, options.timeout)
    began, status = time.time(), {}
    same = "the same command" + (" without --overwrite" if any(config.overwrite for config in configs.values()) else "")
    hang_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]  # ignored under nohup
    for signum in (signal.SIGTERM, *hang_up):
        signal.signal(signum, signal.default_int_handler)
    with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
        try:
            futures = {pool.submit(sweep.run, flags, out_dir / f"{name}.log"): name for name, flags in runs.items()}
            for future in concurrent.futures.as_completed(futures):
                name = futures[future]
                status[name] = future.result()
                print(f"[{len(status)}/{len(runs)}] {name}: {status[name]} ({time.time() - began:.0f} s)", flush=True)
        except KeyboardInterrupt:
            sweep.stop()
            vqvae.complain(f"stopping: runs save where they are; {same} continues")
            return 130
        except BaseException:  # nobody reads the output, say: else all runs would go on, and their summary be lost
            sweep.stop()
            raise

    finished = [out_dir / run[0] for run in RUNS if status.get(run[0], "finished") == "finished"]
    records = analysis.load_runs([folder for folder in finished if (folder / "final_metrics.json").exists()])
    summary = out_dir / "gpu_run_summary.json"
    anew = "finished" in status.values()  # else an earlier summary has more to say
    if anew or not summary.exists():
        vqvae.write_json(summary, {
            "seconds": round(time.time() - began, 1), "status": {name: status[name] for name in runs},
            "runs": {record["name"]: record for record in records}, "differences": analysis.differences(records)})
    if anew:
        print(analysis.table(records))
        vqvae.write_figure(out_dir / "summary.png", analysis.size_picture(records))
    failed = [name for name in runs if status[name] != "finished"]
    if failed:
        vqvae.complain(f"failed: {', '.join(failed)}; see {out_dir}/NAME.log, then run {same} again")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
