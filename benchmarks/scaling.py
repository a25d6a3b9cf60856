"""How time and memory of a quantizer step grow with K, N, D and the number of processes; writes results/scaling.md.

    python benchmarks/scaling.py                       # one quantity varied at a time around K=4096, D=64, N=16384
    python benchmarks/scaling.py --summary             # only write results/scaling.md again from results/speed/scaling_*.json
    python benchmarks/scaling.py --max_processes 4 --device cuda --methods vq_ema,ba_vq_chunked,ba_vq_fused

Every point has fresh processes, but for a single one on CUDA: extra peak memory of the first step, then the median time of
further steps.
Exponents are least-squares slopes of log y against log x. Several processes share the same N latents (gloo, or nccl with a
GPU each) and have the same number of threads each. Raw values go to results/speed/scaling_DEVICE.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before PyTorch: says how its threads wait

# isort: split
import numpy as np
import torch

import quantizer_step
import vqvae
from quantizer_step import NAMES, RESULTS, table

SWEEPS = {"K": [512, 1024, 4096, 16384, 65536, 262144], "D": [8, 16, 32, 64, 128, 256], "N": [1024, 4096, 16384, 65536]}
BASE = {"K": 4096, "D": 64, "N": 16384}
TINY_SWEEPS = {"K": [64, 128, 256], "D": [4, 8], "N": [512, 1024]}
TINY_BASE = {"K": 64, "D": 8, "N": 1024}


def measure_point(point, device):
    """Extra bytes and seconds of one step; in this process, or in each of those torchrun started."""
    torch.set_num_threads(point["threads"])
    vqvae.start_processes(device.type)
    n = point["N"] // vqvae.world_size()
    extra = quantizer_step.measure_memory(point["method"], point["K"], point["D"], n, device)["extra_bytes"]
    z = torch.randn(n // 64, point["D"], 8, 8, device=device)
    step = quantizer_step.make_step(point["method"], point["K"], point["D"], z)
    step()  # initialisation
    raw = [quantizer_step.seconds(step, device) for _ in range(point["rounds"])]
    return {**point, "extra_bytes": extra, "raw": raw, "seconds": statistics.median(raw)}


def run_point(point, device):
    """measure_point, but for a single process on CUDA, whose allocator counts exactly, in fresh ones; the record of the first."""
    if point["processes"] == 1 and device.type == "cuda":
        return measure_point(point, device)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(point["processes"])]
    several = point["processes"] > 1  # each process then takes a GPU of its own
    command = [sys.executable, *(launcher if several else []), __file__, "--device", device.type if several else str(device),
               "--point", json.dumps(point)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise vqvae.UserError(f"failed, for the reason above: {point}")
    return json.loads(done.stdout.splitlines()[-1])


def points(options):
    """The points to measure: {what varies: [point, ...]}."""
    sweeps, base = (TINY_SWEEPS, TINY_BASE) if options.tiny else (SWEEPS, BASE)
    cores = os.cpu_count()
    common = {**base, "rounds": options.rounds, "processes": 1, "threads": cores}
    plan = {what: [{**common, "method": method, what: value} for value in values for method in options.methods]
            for what, values in sweeps.items()}
    counts = [2**i for i in range(options.max_processes.bit_length())]
    plan["processes"] = [{**common, "method": method, "processes": count, "threads": max(1, cores // counts[-1])}
                         for count in counts for method in options.methods]
    return plan


def exponent(records, what, key):
    """Slope of log `key` against log `what`, or None where fewer than two values are positive."""
    pairs = [(r[what], r[key]) for r in records if r[key] > 0]
    return np.polyfit(*np.log(pairs).T, 1)[0] if len(pairs) > 1 else None


def exponents_line(records, what, methods):
    cells = []
    for method in methods:
        own = [r for r in records if r["method"] == method]
        slopes = [exponent(own, what, "seconds"), exponent(own, what, "extra_bytes"), exponent(own[-2:], what, "seconds")]
        whole, memory, last = ("–" if slope is None else f"{slope:.1f}" for slope in slopes)
        cells.append(f"{NAMES[method]}: time {whole} (last two points {last}), memory {memory}")
    return f"Exponents in {what}. {'; '.join(cells)}."


def columns(methods, unit):
    return [f"{NAMES[method]} {unit}" for method in methods]


def sweep_table(records, what, methods, rates):
    rows = []
    for value in sorted({r[what] for r in records}):
        at = {r["method"]: r for r in records if r[what] == value}
        k, d, n = (at[methods[0]][name] for name in ("K", "D", "N"))
        rows.append([value, f"{quantizer_step.floor_seconds(n, k, d, rates) * 1e3:.3g}",
                     *(f"{at[m]['seconds'] * 1e3:.3g}" for m in methods),
                     *(f"{at[m]['extra_bytes'] / 2**20:.0f}" for m in methods), f"{4 * d * (n + k) / 2**20:.0f}"])
    return table([what, "floor ms", *columns(methods, "ms"), *columns(methods, "extra MiB"), "latents and codes MiB"], rows)


def processes_table(records, methods):
    alone = {r["method"]: r["seconds"] for r in records if r["processes"] == 1}
    rows = []
    for count in sorted({r["processes"] for r in records}):
        at = {r["method"]: r for r in records if r["processes"] == count}
        rows.append([count, at[methods[0]]["threads"], *(f"{at[m]['seconds'] * 1e3:.3g}" for m in methods),
                     *(f"{alone[m] / at[m]['seconds']:.2f}" for m in methods),
                     *(f"{at[m]['extra_bytes'] / 2**20:.0f}" for m in methods)])
    return table(["processes", "threads each", *columns(methods, "ms"), *columns(methods, "speed-up"),
                  *columns(methods, "extra MiB each")], rows)


def crossover():
    """Where the fused E-step overtakes the chunked one, by quantizer_step.py --fused."""
    path = RESULTS / "quantizer_step_fused_cuda.json"
    if not path.exists():
        return "Not measured: needs a GPU (`python benchmarks/quantizer_step.py --fused`)."
    stored = vqvae.read_json(path)
    gains = {}  # {(D, N): {K: how many times faster}}
    for r in stored["records"]:
        gains.setdefault((r["D"], r["N"]), {})[r["K"]] = r["seconds"]["ba_vq_chunked"] / r["seconds"]["ba_vq_fused"]
    lines = [f"On {stored['machine']['device']}, `quantizer_step.py --fused`:", ""]
    for (d, n), gain in sorted(gains.items()):
        ahead = [k for k in gain if all(gain[larger] > 1 for larger in gain if larger >= k)]  # and it stays ahead
        where = f"ahead from K={min(ahead)}" if ahead else "behind at the largest K"
        lines.append(f"- D={d}, N={n}: {where} ({', '.join(f'K={k}: {ratio:.2f}×' for k, ratio in sorted(gain.items()))})")
    return "\n".join(lines)


def summary():
    """Markdown of all results/speed/scaling_*.json."""
    lines = ["# Cost as work grows", "",
             "One training step of a quantizer (forward with codebook update). Made by `python benchmarks/scaling.py` from",
             "`results/speed/scaling_*.json`. A straight line on log-log axes has the exponent as its slope; small sizes are",
             "dominated by fixed costs, so the slope of the last two points is given as well. Extra memory is the growth of the",
             "peak in the first step. The floor is that of a BA-VQ step (`quantizer_step.py`). One run: a single point may",
             "differ by up to two times in the next, so the exponents, above all those of two points, are rough.", ""]
    for path in sorted(RESULTS.glob("scaling_*.json")):
        stored = vqvae.read_json(path)
        machine, methods, base = stored["machine"], stored["methods"], stored["base"]
        lines += [f"## {machine['device']}", "", f"torch {machine['torch']}, {machine['threads']} threads; "
                  f"{quantizer_step.rates_line(stored['rates'])}.", ""]
        for what, records in stored["records"].items():
            fixed = ", ".join(f"{name}={value}" for name, value in base.items() if name != what)
            lines += [f"### {what}, at {fixed}", ""]
            lines += ([processes_table(records, methods)] if what == "processes" else
                      [sweep_table(records, what, methods, stored["rates"]), "", exponents_line(records, what, methods)])
            lines.append("")
    return "\n".join([*lines, "## Crossover to the fused kernel", "", crossover(), ""])


def parse(argv):
    parser = train.Parser(__doc__)
    parser.add_argument("--methods", default="vq_ema,ba_vq", metavar="A,B",
                        help="of vq_ema, ba_vq (as in training), ba_vq_chunked, ba_vq_fused (CUDA)")
    parser.add_argument("--max_processes", type=train.whole(1), default=2, metavar="P", help="1, 2, 4, ... up to P (default 2)")
    parser.add_argument("--rounds", type=train.whole(1), default=5, metavar="N", help="timed steps per point (default 5)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="rehearsal with tiny sizes, of which nothing is stored")
    parser.add_argument("--summary", action="store_true", help="only write results/scaling.md")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # in the fresh process
    options = parser.parse_args(argv)
    options.methods = options.methods.split(",")
    known = ("ba_vq", *quantizer_step.WITH_FUSED)
    if not set(options.methods) <= set(known):
        raise vqvae.UserError(f"methods: expected some of {', '.join(known)}, with commas between")
    return options


def main(argv=None):
    options = parse(argv)
    device, _ = vqvae.pick_device(options.device)
    if options.point:
        vqvae.say(json.dumps(measure_point(options.point, device)))
        return
    if not options.summary:
        gpus = torch.cuda.device_count()
        if device.type == "cuda" and options.max_processes > gpus:
            raise vqvae.UserError(f"max_processes: {options.max_processes} is more than the {gpus} GPUs; lower it")
        if "ba_vq_fused" in options.methods:
            quantizer_step.check_fused(device)
        torch.set_num_threads(os.cpu_count())
        plan = points(options)
        total, began, records = sum(map(len, plan.values())), time.time(), {}
        for what, planned in plan.items():
            records[what] = []
            for point in planned:
                records[what].append(run_point(point, device))
                done = sum(map(len, records.values()))
                shown = " ".join(f"{name}={point[name]}" for name in ("K", "D", "N", "processes"))
                print(f"[{done}/{total}] {shown} {point['method']}: {records[what][-1]['seconds'] * 1e3:.3g} ms "
                      f"({time.time() - began:.0f} s)", file=sys.stderr, flush=True)
        if options.tiny:
            return
        RESULTS.mkdir(parents=True, exist_ok=True)
        vqvae.write_json(RESULTS / f"scaling_{device.type}.json", {
            "machine": vqvae.machine(device), "rates": quantizer_step.machine_rates(device), "methods": options.methods,
            "base": BASE, "argv": argv or sys.argv[1:], "records": records})
    vqvae.write_text(RESULTS.parent / "scaling.md", summary())
    print("wrote results/scaling.md")


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
