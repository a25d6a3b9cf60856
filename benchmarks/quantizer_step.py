"""Time and memory of one quantizer step (forward with codebook update) against K, D and N.

    python benchmarks/quantizer_step.py                           # ratios in time, alternating, median of the rounds
    python benchmarks/quantizer_step.py --memory                  # extra peak memory of a BA-VQ step
    python benchmarks/quantizer_step.py --fused                   # the E-step of vqvae_kernels.py beside the chunked one; CUDA
    python benchmarks/quantizer_step.py --memory --fused          # and its memory
    python benchmarks/quantizer_step.py --codebook_sizes 512,65536 --latent_dims 8 --rounds 3 --device cuda

Peers are VectorQuantize (EMA) and SimVQ of vector-quantize-pytorch, behind the same adapter. The floor of a BA-VQ step is
the larger of its operations over the measured matrix rate and its bytes over the measured copy rate, both of the same run.
Results go to results/speed/quantizer_{step,memory}[_fused]_DEVICE.json, and a table is printed.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before PyTorch: says how its threads wait

# isort: split
import torch

import peers
import vqvae

RESULTS = ROOT / "results" / "speed"
METHODS = ("vq_ema", "ba_vq", "lib_ema", "lib_simvq")
WITH_FUSED = ("vq_ema", "ba_vq_chunked", "ba_vq_fused")  # both E-steps by name; ba_vq has that of training
PEER_MATRICES = 6  # N x K float32 matrices that the peers hold at once: skipped where these do not fit


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device):
    """Wall time of one call, the device's queue included."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def machine_rates(device, dtype=torch.float32):
    """Measured rates: FLOP/s of matrix products of this accuracy and bytes/s of a copy (read and written)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.empty(n, n, device=device, dtype=dtype)
    flops = 2 * n**3 / min(seconds(lambda: torch.mm(a, a, out=b), device) for _ in range(5))
    if device.type == "cuda" and dtype == torch.float32:  # three TF32 products give float32 accuracy
        torch.backends.cuda.matmul.allow_tf32 = True
        flops = max(flops, 2 * n**3 / min(seconds(lambda: torch.mm(a, a, out=b), device) for _ in range(5)) / 3)
        torch.backends.cuda.matmul.allow_tf32 = False
    big = torch.empty(1 << 26, device=device)
    copy = min(seconds(lambda: big[:1 << 25].copy_(big[1 << 25:]), device) for _ in range(5))
    return {"flops_per_second": flops, "copy_bytes_per_second": 2 * 4 * (1 << 25) / copy}


def rates_line(rates):
    return f"measured rates: {rates['flops_per_second'] / 1e9:.0f} GFLOP/s, copy {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s"


def floor_seconds(n, k, d, rates):
    """Least time of a BA step: two N x K x D products; latents and codes read once, statistics written once."""
    return max(2 * 2 * n * k * d / rates["flops_per_second"],
               4 * (2 * n * d + 3 * k * (d + 1)) / rates["copy_bytes_per_second"])


def available_bytes(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def make_step(method, k, d, z):
    """A function that does one training step of a quantizer on z (B, D, 8, 8): forward, update, no backward.

    From then on memory is kept as in training.
    """
    if z.device.type == "cpu":
        vqvae.keep_freed_memory()
    config = vqvae.Config(quantizer="ba_vq" if method.startswith("ba_vq") else "vq_ema", codebook_size=k, latent_dim=d,
                          batch_size=len(z), prediction="none")
    torch.manual_seed(0)
    make = peers.PEERS.get(method, vqvae.make_quantizer)
    quantizer = (peers.ema(config, kmeans_init=False) if method == "lib_ema" else make(config)).to(z.device).train()
    e_step = vqvae.fastest_e_step(z.device, d)
    if method == "ba_vq_chunked":
        e_step = vqvae.soft_assign
    if method == "ba_vq_fused":
        import vqvae_kernels  # here, since triton comes with CUDA builds of torch only
        e_step = vqvae_kernels.soft_assign

    def step():
        with torch.no_grad(), mock.patch.object(vqvae, "fastest_e_step", lambda device, dim: e_step):
            quantizer(z)
    return step


def measure_time(methods, k, d, n, rounds, device, rates):
    """Record of one size: seconds per step of each method, rounds alternating between the methods."""
    z = torch.randn(n // 64, d, 8, 8, device=device)
    fits = 4 * PEER_MATRICES * n * k < available_bytes(device)
    skipped = [m for m in methods if m.startswith("lib") and not fits]
    steps = {m: make_step(m, k, d, z) for m in methods if m not in skipped}
    for step in steps.values():
        step()  # initialisation and warm-up
    times = {m: [] for m in steps}
    for _ in range(rounds):
        for method, step in steps.items():
            times[method].append(seconds(step, device))
    return {"K": k, "D": d, "N": n, "floor": floor_seconds(n, k, d, rates), "raw": times,
            "seconds": {m: statistics.median(t) for m, t in times.items()},
            "skipped": dict.fromkeys(skipped, "N x K matrices do not fit in memory")}


def measure_memory(method, k, d, n, device):
    """Record of one size: bytes of peak memory that a step adds. On the CPU it is this process's, so use a fresh one per size."""
    z = torch.randn(n // 64, d, 8, 8, device=device)
    make_step(method, 64, d, z)()  # libraries and thread pools
    step = make_step(method, k, d, z)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        extra = torch.cuda.max_memory_allocated(device) - before
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"K": k, "D": d, "N": n, "extra_bytes": extra, "inputs_bytes": 4 * (n * d + k * d)}


NAMES = {"vq_ema": "VQ-EMA", "ba_vq": "BA-VQ", "ba_vq_chunked": "BA-VQ chunked", "ba_vq_fused": "BA-VQ fused",
         "lib_ema": "lib EMA", "lib_simvq": "SimVQ", "floor": "floor"}


def table(heads, rows):
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def time_table(records, methods):
    """Milliseconds; ratios to the floor, of the peer's EMA to own, of the two E-steps."""
    ratios = [("ba_vq", "floor"), ("ba_vq", "vq_ema"), ("lib_ema", "vq_ema"), ("lib_ema", "ba_vq")]
    if "ba_vq_fused" in methods:
        ratios = [("ba_vq_fused", "floor"), ("ba_vq_fused", "vq_ema"), ("ba_vq_chunked", "ba_vq_fused")]
    rows = []
    for r in records:
        t = {**r["seconds"], "floor": r["floor"]}
        rows.append([r["K"], r["D"], r["N"], *(f"{t[m] * 1e3:.3g}" if m in t else "–" for m in ("floor", *methods)),
                     *(f"{t[a] / t[b]:.2f}" if a in t else "–" for a, b in ratios)])
    return table(["K", "D", "N", *(f"{NAMES[m]} ms" for m in ("floor", *methods)),
                  *(f"{NAMES[a]} / {NAMES[b]}" for a, b in ratios)], rows)


def memory_table(records, method):
    rows = [[r["K"], r["D"], r["N"], *(f"{r[key] / 2**20:.0f}" for key in ("extra_bytes", "inputs_bytes"))] for r in records]
    return table(["K", "D", "N", f"{NAMES[method]} extra MiB", "N·D + K·D MiB"], rows)


def check_fused(device):
    """Raises UserError where the fused E-step cannot run."""
    if importlib.util.find_spec("triton") is None:
        raise vqvae.UserError("fused: needs triton, which comes with CUDA builds of torch")
    if device.type != "cuda" and "TRITON_INTERPRET" not in os.environ:
        raise vqvae.UserError("fused: needs a CUDA device; TRITON_INTERPRET=1 rehearses it elsewhere, very slowly")


def parse(argv):
    parser = train.Parser(__doc__)
    parser.add_argument("--codebook_sizes", type=train.several(int), default="512,1024,4096,16384,65536", metavar="K,K")
    parser.add_argument("--latent_dims", type=train.several(int), default="8,64,256", metavar="D,D")
    parser.add_argument("--vectors", type=train.several(int), default="16384", metavar="N,N",
                        help="latents per step, multiples of 64")
    parser.add_argument("--rounds", type=train.whole(1), default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--fused", action="store_true", help="the fused E-step beside the chunked one, no peers; CUDA")
    parser.add_argument("--one_size", action="store_true", help=argparse.SUPPRESS)  # a fresh process for --memory
    options = parser.parse_args(argv)
    if any(n < 64 or n % 64 for n in options.vectors):
        raise vqvae.UserError("vectors: must be multiples of 64")
    sizes = [(k, d, n) for n in options.vectors for d in options.latent_dims for k in options.codebook_sizes]
    for k, d, _ in sizes:
        vqvae.Config(codebook_size=k, latent_dim=d)  # in range, or UserError
    return options, sizes


def main(argv=None):
    options, sizes = parse(argv)
    device, _ = vqvae.pick_device(options.device)
    if options.fused:
        check_fused(device)
    e_step = "ba_vq_fused" if options.fused else "ba_vq_chunked"
    if options.one_size:
        print(json.dumps(measure_memory(e_step, *sizes[0], device)))
        return
    methods = WITH_FUSED if options.fused else METHODS
    records = []
    rates = None if options.memory else machine_rates(device)
    for k, d, n in sizes:
        if options.memory and device.type == "cuda":
            records.append(measure_memory(e_step, k, d, n, device))
        elif options.memory:
            words = ["--memory", "--one_size", "--codebook_sizes", str(k), "--latent_dims", str(d), "--vectors", str(n),
                     "--device", str(device), *(["--fused"] if options.fused else [])]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
            if done.returncode:  # it has said why
                return done.returncode
            records.append(json.loads(done.stdout))
        else:
            records.append(measure_time(methods, k, d, n, options.rounds, device, rates))
        print(f"K={k} D={d} N={n} done", file=sys.stderr, flush=True)
    what = ("memory" if options.memory else "step") + ("_fused" if options.fused else "")
    RESULTS.mkdir(parents=True, exist_ok=True)
    vqvae.write_json(RESULTS / f"quantizer_{what}_{device.type}.json",
                     {"machine": vqvae.machine(device), "rates": rates, "argv": argv or sys.argv[1:], "records": records})
    print(memory_table(records, e_step) if options.memory else f"{rates_line(rates)}\n\n{time_table(records, methods)}")


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
