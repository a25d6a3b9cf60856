"""Train quantizers in the same autoencoder, loop, schedule, batch order and seeds; compare them.

    python benchmarks/compare.py --methods vq_ema,ba_vq_lambda10 --codebook_sizes 512 --latent_dims 8,64 --seeds 0,1,2 --jobs 2 \
        --epochs 2 --hidden_dim 64                      # further flags go to train.py
    python benchmarks/compare.py --summary              # results/compare/*.json -> summary.md, rate_distortion.png

One JSON per run goes to results/compare/; runs that have one are skipped, so the command can be repeated
after an interruption. The methods are the rows of METHODS.
"""

import collections
import concurrent.futures
import dataclasses
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before PyTorch: says how its threads wait

# isort: split
import scipy.stats
import torch
from matplotlib.figure import Figure

import analysis
import peers
import vqvae

CLASSICAL = ["--quantizer", "vq_ema", "--vq_recipe", "classical"]
NO_WARMUP, NO_RESTARTS = ["--warmup_fraction", "0"], ["--restart_threshold", "0"]
SCALED_TRELLISES = {"": "4", "16": "16", "64": "64"}  # suffix of the method's name: states


def vq_ema(prediction="none", trellis="none"):
    return ["--quantizer", "vq_ema", "--prediction", prediction, "--trellis", trellis]


def ba_vq(entropy_weight=10, prediction="none", trellis="none"):
    return ["--quantizer", "ba_vq", "--entropy_weight", str(entropy_weight), "--prediction", prediction, "--trellis", trellis]


METHODS = {
    "vq_ema_classical": CLASSICAL,
    "vq_ema": vq_ema(),
    **{f"ba_vq_lambda{w:g}": ba_vq(w) for w in (0, 1, 3, 10, 30, 100, math.inf)},
    "vq_ema_predictive": vq_ema("checkerboard"),
    **{f"ba_vq_lambda{w:g}_predictive": ba_vq(w, "checkerboard") for w in (10, 100, math.inf)},
    "vq_ema_predictive_trellis": vq_ema("checkerboard", "4"),
    **{f"ba_vq_lambda{w:g}_predictive_trellis": ba_vq(w, "checkerboard", "4") for w in (10, 50, 100, math.inf)},
    "vq_ema_scaled": vq_ema("scaled"),
    **{f"ba_vq_lambda{w:g}_scaled": ba_vq(w, "scaled") for w in (10, 100)},
    **{f"vq_ema_scaled_trellis{suffix}": vq_ema("scaled", states) for suffix, states in SCALED_TRELLISES.items()},
    **{f"ba_vq_lambda{w:g}_scaled_trellis{suffix}": ba_vq(w, "scaled", states)
       for suffix, states in SCALED_TRELLISES.items() for w in (10, 100, 300, 1000)},
    "vq_ema_trellis16": vq_ema("none", "16"),
    "ba_vq_lambda100_trellis16": ba_vq(100, "none", "16"),
    # One factor at a time between the two recipes: what keeps the codes of a large codebook alive (FINDINGS.md).
    "vq_ema_classical_decay": [*CLASSICAL, "--ema_decay", "0.97475"],  # that of the tuned recipe at K = 16,384
    "vq_ema_classical_decay99": [*CLASSICAL, "--ema_decay", "0.99"],  # van den Oord 2017, appendix A.1
    "vq_ema_classical_warmup": [*CLASSICAL, "--warmup_fraction", "0.1"],
    **{f"{name}{suffix}": [*flags, *more] for name, flags in (("vq_ema", vq_ema()), ("ba_vq", ba_vq())) for suffix, more in (
        ("_no_warmup", NO_WARMUP), ("_no_restarts", NO_RESTARTS), ("_no_warmup_no_restarts", [*NO_WARMUP, *NO_RESTARTS]))},
    "ba_vq_lambda1_no_warmup": [*ba_vq(1), *NO_WARMUP],  # no prior; it has no restarts
    # peers.py builds these; the flags are their settings of the loop (LOG.md).
    **{name: vq_ema() for name in peers.PEERS},
    **{name: [*vq_ema(), *NO_WARMUP] for name in ("lib_simvq", "lib_fsq", "lib_lfq", "sq_vae")},
    "lib_cosine": [*vq_ema(), "--commitment_weight", "2"],
}
# At large K more latent directions are worth codes, and a longer warm-up lets them grow before there are any (FINDINGS.md).
METHODS.update({f"{name}_warmup20": [*METHODS[name], "--warmup_fraction", "0.2"] for name in (
    "vq_ema", "vq_ema_predictive_trellis", "ba_vq_lambda10_predictive_trellis", "ba_vq_lambdainf_predictive_trellis",
    "vq_ema_scaled_trellis")})
RESULTS = ROOT / "results" / "compare"
GAUSSIAN = ROOT / "results" / "gaussian_source.json"  # gaussian_source.py writes it
REFINE = 2  # passes of VQVAE.refined for the refined_ figures (quantizers of this project only)
# In the figure: by (prediction, trellis), and the other quantizers.
KINDS = {("none", "none"): ("#0072B2", "no additions"), ("scaled", "4"): ("#C2185B", "+PT4"),
         ("scaled", "16"): ("#00695C", "+PT16"), ("scaled", "64"): ("#F9A825", "+PT64")}
POINTS = {"vq_ema_classical": "VQ-EMA classical", "cvq": "CVQ-VAE", "lib_ema": "VQ-EMA, k-means start, expiry",
          "wasserstein": "Wasserstein VQ", "lib_low_dim": "VQ-EMA, codes of 4 dimensions", "lib_cosine": "VQ-EMA, cosine",
          "lib_simvq": "SimVQ", "sq_vae": "SQ-VAE", "sinkhorn": "Sinkhorn (OptVQ)", "lib_fsq": "FSQ",
          "lib_rotation": "VQ-EMA, rotation trick", "lib_lfq": "LFQ"}
LOOKS = {name: dict(marker=marker, color=color) for name, (color, marker) in zip(
    POINTS, itertools.product(("0.3", "#D55E00"), "X^Dv<>"))}
REFERENCE = "vq_ema"  # differences are taken to this method, seed by seed
OF_METHODS = {*analysis.QUANTIZER, "prediction", "trellis", "commitment_weight", "seed"}  # may differ within a table


def run_name(method, size, dim, seed, config):
    dataset = "" if config.dataset == "cifar10" else f"_{config.dataset}"
    depth = "" if config.res_blocks == 2 else f"x{config.res_blocks}"
    batch = "" if config.batch_size == 128 else f"b{config.batch_size}"
    optimizer = "" if config.optimizer == "adamw" else f"_{config.optimizer}"
    return f"{method}{dataset}_k{size}_d{dim}_h{config.hidden_dim}{depth}{batch}_e{config.epochs}{optimizer}_s{seed}"


def cell(method, size, dim, seed, extra):
    """(Config, peer quantizer or None) of one cell of the grid. Raises UserError."""
    own = set(METHODS[method]) & {word.split("=")[0] for word in extra if word.startswith("--")}
    if own:
        raise vqvae.UserError(f"{min(own)}: set by the method {method}; drop the flag")
    flags = [*METHODS[method], "--codebook_size", str(size), "--latent_dim", str(dim), "--seed", str(seed), *extra]
    config = train.config_to_run(flags)
    if method in peers.PEERS and config.metric != "euclid":
        raise vqvae.UserError(f"metric: {method} has its own; drop the flag")
    torch.manual_seed(seed)
    quantizer = peers.PEERS[method](config) if method in peers.PEERS else None
    return dataclasses.replace(config, name=run_name(method, size, dim, seed, config)), quantizer


def run(method, size, dim, seed, extra, threads):
    """Train one cell of the grid and write its JSON; returns a line about it."""
    torch.set_num_threads(threads)
    config, quantizer = cell(method, size, dim, seed, extra)
    name = config.name
    target = RESULTS / f"{name}.json"
    if target.exists():
        return f"{name}: done before"
    metrics = vqvae.train(config, quantizer)
    if quantizer is None:
        model, _ = vqvae.load_model(Path(config.out_dir) / name, vqvae.pick_device(config.device)[0])
        refined = vqvae.evaluate(model, vqvae.test_images(config), size, refine=REFINE)
        metrics.update({f"refined_{key}": refined[key] for key in ("psnr", "perplexity", "usage_rate")})
    timing = [json.loads(line) for line in (Path(config.out_dir) / name / "timing.jsonl").read_text().splitlines()]
    command = f"python benchmarks/compare.py --methods {method} --codebook_sizes {size} --latent_dims {dim} --seeds {seed}"
    if method.startswith("lib_"):
        metrics["vector_quantize_pytorch"] = importlib.metadata.version("vector-quantize-pytorch")
    vqvae.write_json(target, {"method": method, "command": " ".join([command, *extra]),
                              "seconds": sum(line["seconds"] for line in timing), **metrics})
    return f"{name}: PSNR {metrics['psnr']:.3f} dB, perplexity {metrics['perplexity']:.1f}"


def end_with_parent():
    """In a worker: SIGTERM to itself when the first process ends, however it does, so that none trains on by itself."""
    def wait():
        multiprocessing.parent_process().join()
        while True:  # the first saves where the training is, the next ends the process
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    threading.Thread(target=wait, daemon=True).start()


def table_of(config):
    """What names a table, of a config as a dict: (data set, K, D, hidden, blocks, batch, epochs, optimizer)."""
    names = ("dataset", "codebook_size", "latent_dim", "hidden_dim", "res_blocks", "batch_size", "epochs", "optimizer")
    return tuple(config[name] for name in names)


def check_tables(runs):
    """Raise UserError where runs of a table differ in more than OF_METHODS, or those of a method in more than the seed.

    runs: (name, method, config as a dict) of each.
    """
    first, first_of_method = {}, {}
    for run, method, config in runs:
        table = first.setdefault(table_of(config), config)
        row = first_of_method.setdefault((*table_of(config), method), config)
        for name in vqvae.identity(vqvae.Config.from_dict(config)):
            expected = (config if name == "seed" else row if name in OF_METHODS else table)[name]
            if config[name] != expected:
                raise vqvae.UserError(f"{run}: {name} {config[name]}, but {expected} in other runs of its table; "
                                      "move those of one of the two out of results/compare/")


def stored_results():
    """{path: record} of results/compare, with the settings that a record does not have as they were then. Raises UserError."""
    records = {path: vqvae.read_json(path) for path in sorted(RESULTS.glob("*.json"))}
    for path, record in records.items():
        try:
            record["config"] = vqvae.stored_config(record["config"]).to_dict()
        except (KeyError, TypeError, vqvae.UserError) as error:
            raise vqvae.UserError(f"{path}: its config is not valid here ({error}); move it away") from error
    return records


def load_results():
    """All result records, by the keys of table_of: {key: {method: {seed: record}}}."""
    records, groups = stored_results(), {}
    check_tables((path, record["method"], record["config"]) for path, record in records.items())
    for record in records.values():
        groups.setdefault(table_of(record["config"]), {}).setdefault(record["method"], {})[record["seed"]] = record
    return groups


def spread_of(values, seeds, form):
    """Mean and spread of values as text, with how many of the `seeds` seeds have one where not all do; of none nothing."""
    if not values:
        return ""
    return analysis.spread(values, form) + (f" ({len(values)} of {seeds})" if len(values) < seeds else "")


def difference(runs, reference, key, form="{:+.3f}"):
    """(mean and spread of a metric's difference over the seeds that both have, p of a paired t-test from three on), as text."""
    deltas = [runs[seed][key] - reference[seed][key] for seed in sorted(set(runs) & set(reference))
              if key in runs[seed] and key in reference[seed]]  # no SSIM below 11 pixels
    text = spread_of(deltas, len(runs), form)
    if len(deltas) < 3 or len(set(deltas)) == 1:  # runs that are the same have no spread to test against
        return text, ""
    p = scipy.stats.ttest_1samp(deltas, 0).pvalue
    return text, "<0.001" if p < 0.001 else f"{p:.3f}"


def summary():
    """Markdown of results/compare: per setting and method the mean and spread over seeds, differences and a test."""
    lines = ["# Comparison of quantizers", "",
             "Test set, hard indices, eval mode; mean ± standard deviation over seeds. ΔPSNR is the mean difference to",
             f"`{REFERENCE}` (tuned) over paired seeds, p the two-sided paired t-test of it, from three seeds on; per image and",
             "SSIM: the same for the mean of the images' PSNR, where quiet images count for more, and for SSIM. Refined: the",
             f"same models, their codes improved by {REFINE} passes through the decoder (VQVAE.refined). (1 of 3): one of the",
             "three seeds has it. Made by `python benchmarks/compare.py --summary` from `results/compare/*.json`; each holds its",
             "command.", ""]
    for (dataset, size, dim, hidden, blocks, batch, epochs, optimizer), methods in sorted(load_results().items()):
        depth = "" if blocks == 2 else f", {blocks} residual blocks"
        lines += [f"## {dataset}, K={size}, D={dim}, hidden {hidden}{depth}, batch {batch}, {epochs} epochs, {optimizer}", "",
                  "| method | seeds | PSNR dB | perplexity | of K | usage | ΔPSNR dB | p | per image | p | ΔSSIM | p | refined |",
                  "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
        for method, runs in sorted(methods.items(), key=lambda item: -statistics.mean(r["psnr"] for r in item[1].values())):
            records = list(runs.values())
            refined = [r["refined_psnr"] for r in records if "refined_psnr" in r]
            reference = {} if method == REFERENCE else methods.get(REFERENCE, {})
            lines.append(" | ".join([
                f"| {method}", str(len(records)), analysis.spread([r["psnr"] for r in records], "{:.2f}"),
                analysis.spread([r["perplexity"] for r in records], "{:.1f}"),
                f"{sum(r['perplexity'] for r in records) / len(records) / size:.1%}",
                f"{sum(r['usage_rate'] for r in records) / len(records):.2%}",
                *difference(runs, reference, "psnr"), *difference(runs, reference, "psnr_per_image"),
                *difference(runs, reference, "ssim", "{:+.4f}"),
                spread_of(refined, len(records), "{:.2f}") + " |"]))
        lines.append("")
    return "\n".join(lines)


def rate_distortion_figure(path):
    """PNG: PSNR against the entropy of the indices, at each K for the seed that most methods have, without those that lack it.

    BA-VQ is a curve over lambda for each K and each of KINDS, tuned VQ-EMA a square of the same colour, and the methods of
    POINTS are points. Left everything, with Shannon's curve of a Gaussian source from GAUSSIAN; right the K of the longest curve.
    """
    dim, hidden, epochs = 8, 64, 10
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    both = figure.subplots(1, 2)
    curves = []  # (K, [(lambda, rate, quality)])
    for (dataset, size, *rest), methods in sorted(load_results().items()):
        if (dataset, *rest) != ("cifar10", dim, hidden, 2, 128, epochs, "adamw"):
            continue
        counts = collections.Counter(itertools.chain.from_iterable(methods.values()))
        seed = min(counts, key=lambda seed: (-counts[seed], seed))  # the lowest of the most frequent
        runs = {name: runs[seed] for name, runs in sorted(methods.items()) if seed in runs}
        for axes in both:
            for name, run in runs.items():
                point, kind = (run["bits_per_index"], run["psnr"]), (run["config"]["prediction"], run["config"]["trellis"])
                if name in POINTS:
                    axes.plot(*point, linestyle="none", markersize=6, label=POINTS[name], **LOOKS[name])
                    if point[0] < math.log2(size) - 1:  # closer to the line of another K
                        axes.annotate(f"K={size}", point, fontsize=8, textcoords="offset points", xytext=(-5, -10), ha="right",
                                      annotation_clip=True)
                if re.fullmatch(r"vq_ema(_scaled_trellis(16|64)?)?", name):
                    color, additions = KINDS[kind]
                    axes.plot(*point, "s", markersize=7, color=color, fillstyle="none", label=f"VQ-EMA tuned, {additions}")
            axes.axvline(math.log2(size), color="0.6", linestyle=":", linewidth=1)
            axes.annotate(f"K={size}", (math.log2(size), 0.02), xycoords=("data", "axes fraction"), fontsize=8, rotation=90,
                          ha="right", annotation_clip=True)
        ours = [run for name, run in runs.items() if re.fullmatch(r"ba_vq_lambda(\d+|inf)(_scaled_trellis(16|64)?)?", name)]
        for kind, (color, additions) in KINDS.items():
            curve = sorted((float(run["config"]["entropy_weight"]), run["bits_per_index"], run["psnr"]) for run in ours
                           if (run["config"]["prediction"], run["config"]["trellis"]) == kind)
            if not curve:
                continue
            curves.append((size, curve))
            _, rates, qualities = zip(*curve)
            for axes in both:
                axes.plot(rates, qualities, "o-", markersize=5, color=color, label=f"BA-VQ over λ, {additions}")
    gaussian = vqvae.read_json(GAUSSIAN) if curves and GAUSSIAN.exists() else {}
    if (gaussian.get("dataset"), gaussian.get("downsample")) == ("cifar10", 4):
        both[0].plot([math.log2(point["codebook_size"]) for point in gaussian["sizes"]],
                     [point["shannon"]["psnr"] for point in gaussian["sizes"]], "--", color="0.4", label="Gaussian source, R(D)")
    if curves:
        enlarge(both[1], curves)
    both[0].set(title=f"CIFAR-10, D = {dim}, hidden width {hidden}, {epochs} epochs")
    for axes in both:
        axes.set(xlabel="entropy of an index in bits (dotted: its length, log2 K)", ylabel="PSNR on the test set in dB")
        axes.grid(alpha=0.3)
    handles = dict(zip(*reversed(both[0].get_legend_handles_labels())))  # one entry a name
    names = sorted(handles, key=lambda name: (not name.startswith("BA-VQ"), not name.startswith("VQ-EMA tuned")))
    figure.legend([handles[name] for name in names], names, loc="outside right upper", fontsize=8)
    vqvae.write_figure(path, figure, dpi=110)


def enlarge(axes, curves):
    """Show the K of the longest of some curves (K, [(lambda, rate, quality)]), each point with its lambda."""
    size, _ = max(curves, key=lambda curve: len(curve[1]))
    shown = [point for its_size, curve in curves if its_size == size for point in curve]
    for weight, rate, quality in shown:  # all to the right, where the curves fall away, but for the first
        axes.annotate(f"λ={weight:g}".replace("inf", "∞"), (rate, quality), fontsize=8, textcoords="offset points",
                      **dict(xytext=(5, 5)) if weight else dict(xytext=(-5, 5), ha="right"))
    _, rates, qualities = zip(*shown)
    axes.set(xlim=(min(rates) - 0.15, max(rates) + 0.12), ylim=(min(qualities) - 0.2, max(qualities) + 0.1),
             title=f"K = {size}, enlarged")


def parse(argv):
    parser = train.Parser(__doc__)
    names = ", ".join(METHODS)
    parser.add_argument("--methods", default="vq_ema,ba_vq_lambda10", metavar="A,B", help=f"of {names}")
    parser.add_argument("--codebook_sizes", type=train.several(int), default="512", metavar="K,K", help="default 512")
    parser.add_argument("--latent_dims", type=train.several(int), default="8", metavar="D,D", help="default 8")
    parser.add_argument("--seeds", type=train.several(int), default="0,1,2", metavar="S,S", help="default 0,1,2")
    parser.add_argument("--jobs", type=train.whole(1), default=1, metavar="N", help="runs at once (default 1)")
    parser.add_argument("--summary", action="store_true", help="only write results/summary.md and results/rate_distortion.png")
    options, extra = parser.parse_known_args(argv)
    fixed = {"--quantizer", "--prediction", "--trellis", "--codebook_size", "--latent_dim", "--seed", "--name",
             "--vq_recipe", "--entropy_weight"}
    fixed &= {word.split("=")[0] for word in extra}
    if fixed:
        raise vqvae.UserError(f"{min(fixed)}: set by the grid; use --methods, --codebook_sizes, --latent_dims, --seeds")
    if options.summary and extra:
        raise vqvae.UserError(f"{extra[0]}: a setting of runs, which --summary does not make; drop one of the two")
    methods = options.methods.split(",")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise vqvae.UserError(f"methods: {unknown[0]!r} is none of {names}")
    cells = itertools.product(options.codebook_sizes, options.latent_dims, options.seeds, methods)
    return options, list(dict.fromkeys(cells)), extra  # (K, D, seed, method), each once


def main(argv=None):
    options, cells, extra = parse(argv)
    if not options.summary:
        extra = ["--out_dir", "experiments/compare", "--no_wandb", *extra]
        if "--overwrite" in extra:
            raise vqvae.UserError("overwrite: remove the JSON of results/compare/ and the run of experiments/compare/ instead")
        planned = [(m, cell(m, s, d, seed, extra)[0]) for s, d, seed, m in cells]  # everything is checked before any run
        check_tables([*((path, record["method"], record["config"]) for path, record in stored_results().items()),
                      *((config.name, method, config.to_dict()) for method, config in planned)])
        RESULTS.mkdir(parents=True, exist_ok=True)
        vqvae.check_writable(RESULTS / "run.json")
        threads = max(1, torch.get_num_threads() // options.jobs)
        with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), end_with_parent) as pool:
            waiting, running, done = list(reversed(cells)), set(), 0
            while waiting or running:  # no more are submitted than run, so that after Ctrl-C or a failure no other begins
                while waiting and len(running) < options.jobs:
                    s, d, seed, m = waiting.pop()
                    running.add(pool.submit(run, m, s, d, seed, extra, threads))
                ended, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in ended:
                    try:
                        line = future.result()
                    except concurrent.futures.BrokenExecutor as error:
                        raise vqvae.UserError("a run was killed, perhaps for lack of memory; lower --jobs, then give the same "
                                              "command again") from error
                    done += 1
                    print(f"[{done}/{len(cells)}] {line}", flush=True)
    vqvae.write_text(ROOT / "results" / "summary.md", summary())
    rate_distortion_figure(ROOT / "results" / "rate_distortion.png")
    print("wrote results/summary.md, results/rate_distortion.png")


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
