"""Tables and pictures of finished runs; what analyze.ipynb and the sweep show.

    python analysis.py experiments/quick_vq_ema experiments/quick_ba_vq     # tables and pictures
    python analysis.py experiments/* --sort_by psnr                         # or codebook_size, perplexity, seed, ...

The pictures go beside the first run folder: summary.png (PSNR and use over K), training.png (over epochs), usage.png (each code).
"""

import collections
import itertools
import json
import math
import os
import statistics
import sys
from pathlib import Path

import train  # before PyTorch: says how its threads wait

# isort: split
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import vqvae

# Okabe & Ito: told apart by colour-blind eyes and, with markers and lines, in grey print. One family per quantizer.
COLORS = {"vq_ema": ("#D55E00", "#E69F00", "#CC79A7"), "ba_vq": ("#0072B2", "#56B4E9", "#009E73")}
MARKERS = {"vq_ema": "o^v<", "ba_vq": "sDPX"}
LINES = {"vq_ema": ("--", ":", "-.", "-"), "ba_vq": ("-", "--", ":", "-.")}
COLUMNS = [("psnr", "PSNR dB", "{:.2f}"), ("ssim", "SSIM", "{:.4f}"), ("perplexity", "perplexity", "{:.1f}"),
           ("perplexity_share", "perp./K", "{:.1%}"), ("usage_rate", "usage", "{:.1%}"),
           ("bits_per_index", "bits/index", "{:.3f}")]
QUANTIZER = ("quantizer", "vq_recipe", "restart_threshold", "warmup_fraction", "entropy_weight", "temperature_start",
             "temperature_end", "anneal_fraction", "ba_iters", "ema_decay")  # settings in which runs that are compared may differ
DIFFERENCES = [("psnr", "PSNR dB", "{:+.3f}"), ("ssim", "SSIM", "{:+.4f}"), ("perplexity", "perplexity", "{:+.1f}"),
               ("usage_rate", "usage", "{:+.1%}"), ("bits_per_index", "bits/index", "{:+.3f}")]


def load_runs(folders):
    """The final_metrics.json of each run folder, with folder, method and name: the path where two have one. Raises UserError."""
    records, folders = [], list(map(Path, folders))
    names = collections.Counter(folder.name for folder in folders)
    for folder in folders:
        path = folder / "final_metrics.json"
        record = vqvae.read_json(path)
        try:
            config = vqvae.stored_config(record["config"])
            record["config"] = config.to_dict()  # every setting, also for runs from before one existed
            name = folder.name if names[folder.name] == 1 else str(folder)
            figures = {key: float(record[key]) for key in ("psnr", "perplexity", "usage_rate", "bits_per_index")}
            figures["perplexity_share"] = figures["perplexity"] / config.codebook_size
            record = {"name": name, "folder": str(folder), "method": record.get("peer") or method(config), **record, **figures}
        except (KeyError, TypeError, ValueError, vqvae.UserError) as error:
            raise vqvae.UserError(f"{path}: no finished run of this version ({error}); move it away") from error
        records.append(record)
    return records


def find_runs(out_dir):
    """The folders of all finished runs in out_dir, sorted by name."""
    return sorted(path.parent for path in Path(out_dir).glob("*/final_metrics.json"))


def without_peers(records):
    """Records less those of quantizers of benchmarks/peers.py, whose models are not loaded again; says which."""
    peers = [record["name"] for record in records if "peer" in record]
    if peers:
        print(f"left out, quantizers of benchmarks/peers.py: {', '.join(peers)}")
    return [record for record in records if "peer" not in record]


def one_seed(records):
    """Of the runs that differ in nothing but the seed, the first; quantizers in turn, so that a few show each."""
    first = [same[0] for same in _groups(records, lambda record: _key(record, "seed"))]
    turns = itertools.zip_longest(*_groups(first, lambda record: record["config"]["quantizer"]))
    return [record for turn in turns for record in turn if record]


def method(config):
    """Short label of a quantizer and its recipe."""
    name = f"VQ-EMA {config.vq_recipe}" if config.quantizer == "vq_ema" else f"BA-VQ λ={config.entropy_weight:g}"
    prediction = {"none": "", "checkerboard": " predictive", "scaled": " scaled"}[config.prediction]
    return (name + (" cosine" if config.metric == "cosine" else "") + prediction
            + {"none": "", "4": " trellis"}.get(config.trellis, f" trellis {config.trellis}"))


def identity(record):
    """vqvae.identity of a record's config."""
    return vqvae.identity(vqvae.Config.from_dict(record["config"]))


def _key(record, *without):
    """A record's settings as text to group by, less some."""
    values = {**identity(record), "peer": record.get("peer")}
    return json.dumps({key: value for key, value in values.items() if key not in without}, sort_keys=True)


def _setting(record, *without):
    """What two runs must share to be compared: everything but the quantizer's own settings."""
    return _key(record, *QUANTIZER, *without)


def _groups(records, key):
    """Lists of records with the same key(record), in order of appearance."""
    groups = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())


def _pairs(records):
    """(BA-VQ record, VQ-EMA record) wherever both share all settings but the quantizer's."""
    return [(ba, ema) for group in _groups(records, _setting)
            for ba in group if ba["config"]["quantizer"] == "ba_vq"
            for ema in group if ema["config"]["quantizer"] == "vq_ema"]


def _change(ba, ema):
    return {key: ba[key] - ema[key] for key, _, _ in DIFFERENCES if key in ba and key in ema}


def differences(records):
    """BA-VQ minus VQ-EMA for each pair of runs that share all settings but the quantizer's, as a list of dicts."""
    return [{"ba_vq": ba["name"], "vq_ema": ema["name"], **_change(ba, ema)} for ba, ema in _pairs(records)]


def _cells(values, columns):
    return [form.format(values[key]) if key in values else "-" for key, _, form in columns]  # no SSIM below 11 pixels


def _sort_value(record, key, descending=False):
    """A record's metric or setting as something that sorts, up or down: None last, "inf" as a number."""
    values = {**record["config"], **record}
    value = values.get(key)  # no SSIM below 11 pixels
    return (value is None) != descending, math.inf if key == "entropy_weight" and value == "inf" else value


def table(records, sort_by="name", descending=False):
    """Text table of runs, sorted by any metric or setting, and of the BA-over-EMA differences. Raises UserError."""
    if sort_by == "config" or not any(sort_by in record or sort_by in record["config"] for record in records):
        raise vqvae.UserError(f"sort_by: no metric or setting is called {sort_by!r}; final_metrics.json has their names")
    records = sorted(records, key=lambda record: _sort_value(record, sort_by, descending), reverse=descending)
    lines = aligned([["run", "method", "K", "D", "seed", *(title for _, title, _ in COLUMNS)]] + [
        [record["name"], record["method"], *(str(record["config"][key]) for key in ("codebook_size", "latent_dim", "seed")),
         *_cells(record, COLUMNS)] for record in records])
    pairs = _pairs(records)
    if pairs:
        lines += ["", "BA-VQ over VQ-EMA:"]
        lines += aligned([["runs", *(title for _, title, _ in DIFFERENCES)]] + [
            [f"{ba['name']} - {ema['name']}", *_cells(_change(ba, ema), DIFFERENCES)] for ba, ema in pairs])
    return "\n".join(lines)


def aligned(rows):
    """Lines of text of rows of cells: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) if i < 1 else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]


def over_seeds(records):
    """Text table of mean ± standard deviation over seeds: of runs, and of BA-over-EMA differences paired by seed."""
    records = [same[0] for same in _groups(records, _key)]  # a copy is no further seed
    groups = _groups(records, lambda record: _key(record, "seed"))
    settings = [identity(group[0]) for group in groups]
    told = {"seed", "codebook_size", "latent_dim",  # in columns of their own, the others by method()
            "quantizer", "vq_recipe", "entropy_weight", "metric", "prediction", "trellis"}
    keys = dict.fromkeys(key for setting in settings for key in setting)
    varied = [key for key in keys if key not in told and len({str(setting.get(key)) for setting in settings}) > 1]
    rows = [["method", "K", "D", *varied, "seeds", *(title for _, title, _ in COLUMNS)]]
    for group, setting in zip(groups, settings):
        rows.append([group[0]["method"], *(str(setting.get(key)) for key in ("codebook_size", "latent_dim", *varied)),
                     str(len(group)), *_spreads(group, COLUMNS)])
    lines = aligned(rows)
    pairs = _groups(_pairs(records), lambda pair: (_key(pair[0], "seed"), _key(pair[1], "seed")))
    if pairs:
        rows = [["BA-VQ over VQ-EMA", "K", "D", *varied, "seeds", *(title for _, title, _ in DIFFERENCES)]]
        for group in pairs:
            ba, ema = group[0]
            values = [[str(identity(run).get(key)) for run in (ba, ema)] for key in ("codebook_size", "latent_dim", *varied)]
            rows.append([f"{ba['method']} - {ema['method']}", *(" - ".join(dict.fromkeys(both)) for both in values),
                         str(len(group)), *_spreads([_change(*pair) for pair in group], DIFFERENCES)])
        lines += ["", *aligned(rows)]
    return "\n".join(lines)


def spread(values, form):
    """mean ± standard deviation of a few values, as text."""
    mean = form.format(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.replace('+', '').format(statistics.stdev(values))}"


def _spreads(group, columns):
    """`spread` of each column over the members of a group that have it."""
    values = ([member[key] for member in group if key in member] for key, _, _ in columns)
    return [spread(some, form) if some else "-" for some, (_, _, form) in zip(values, columns)]


def looks(records, label):
    """{label(record): color, marker, line style and label}: a family of colours for each quantizer."""
    styles, counts = {}, collections.Counter()
    for record in records:
        text, quantizer = label(record), record["config"]["quantizer"]
        if text not in styles:
            n = counts[quantizer]
            counts[quantizer] += 1
            styles[text] = {"color": COLORS[quantizer][n % 3], "marker": MARKERS[quantizer][n % 4],
                            "linestyle": LINES[quantizer][n % 4], "label": text}
    return styles


def _name(record):
    return record["name"]


def _finish(figure, columns=2):
    """Grids, and one legend below all axes, where it hides nothing."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    column = 0.6 + 0.065 * max(map(len, labels), default=0)  # inches: line, longest name
    columns = max(1, min(columns, int(figure.get_figwidth() / column)))
    rows = math.ceil(len(labels) / columns)
    figure.get_layout_engine().set(w_pad=0.1)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def _at_least_a_decibel(axes):
    """Widen a narrow PSNR axis, or noise looks like a result."""
    low, high = axes.get_ylim()
    slack = max(0, 1 - (high - low)) / 2
    axes.set_ylim(low - slack, high + slack)


def training_curves(records):
    """Figure: PSNR and share of the codebook in use, by epoch; of the validation images, or without them of training."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = looks(records, _name)
    for record in records:
        folder = Path(record["folder"])
        try:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            lines = [line for line in lines if "train_perplexity" in line]  # without epochs of warm-up
            split = "val" if "val_psnr" in lines[-1] else "train"
            epochs = [line["epoch"] for line in lines]
            quality = [line.get("val_psnr", vqvae.psnr(line["recon_loss"]).item()) for line in lines]
            use = [line[f"{split}_perplexity"] / record["config"]["codebook_size"] for line in lines]
        except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
            raise vqvae.UserError(f"{folder}: its metrics.jsonl is missing or damaged ({error}); leave the run out") from error
        options = {**styles[record["name"]], "markersize": 4}
        if split == "train":
            options["label"] += " (training images)"
        left.plot(epochs, quality, **options)
        right.plot(epochs, use, **options)
    left.set(xlabel="epoch", ylabel="PSNR in dB (validation unless noted)")
    right.set(xlabel="epoch", ylabel="perplexity / K (validation unless noted)", ylim=(0, 1.02))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _at_least_a_decibel(left)
    return _finish(figure)


def open_runs(records):
    """(records, models, code histograms, test images) of runs, but for peers, with the test images of the first that are there.

    Raises UserError where none are.
    """
    def test_set(record):
        return tuple(identity(record).get(key) for key in ("dataset", "data_dir", "image_size", "test_subset"))

    opened, images = [], None
    for group in _groups(without_peers(records), test_set):
        names = ", ".join(record["name"] for record in group)
        if opened:
            print(f"left out, other test images: {names}")
            continue
        try:
            images = vqvae.test_images(vqvae.Config.from_dict(group[0]["config"]))
            opened = group
        except vqvae.UserError as error:
            print(f"no test images: {error}\nleft out, no test images: {names}")
    if not opened:
        raise vqvae.UserError("the test images of none of these runs are there; bring them back to where they were trained with")
    models = [vqvae.load_model(record["folder"])[0] for record in opened]
    histograms = [vqvae.code_histogram(model, images, record["config"]["codebook_size"]) for model, record in zip(models, opened)]
    return opened, models, histograms, images


def usage_histograms(records, histograms):
    """Figure: sorted share of each code on the test set, relative to uniform use; histograms of `vqvae.code_histogram`."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.add_subplot()
    styles = looks(records, _name)
    lowest, highest = 0.1, 10  # two decades at least, or even use looks uneven
    for record, histogram in zip(records, histograms):
        share = np.sort(histogram.double().flatten().numpy())[::-1] * histogram.numel() / histogram.sum().item()
        size = record["config"]["codebook_size"]
        perplexity = vqvae.codebook_metrics(histogram, size)["perplexity"]
        lowest, highest = min(lowest, share[share > 0].min() / 1.2), max(highest, share.max() * 1.2)
        options = {**styles[record["name"]], "marker": "", "label": f"{record['name']}: perplexity/K = "
                   f"{perplexity / size:.2f}"}
        axes.plot((np.arange(len(share)) + 0.5) / len(share), np.where(share > 0, share, np.nan), **options)
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set(yscale="log", xlim=(0, 1), ylim=(lowest, highest), xlabel="codes, sorted by use (fraction of all)",
             ylabel="use on the test set, relative to even use")
    axes.yaxis.set_major_formatter("{x:g}")
    return _finish(figure)


def reconstruction_grid(records, models, images, indices=range(10)):
    """Figure: test images uint8 (N, S, S, 3) at fixed indices in the first row, each run's reconstructions below."""
    indices = [i for i in indices if i < len(images)]
    originals = images[indices]
    rows = {"original": originals.numpy()}
    for record, model in zip(records, models):
        rows[f"{record['name']}: PSNR {record['psnr']:.2f} dB on the test set"] = vqvae.reconstructed(model, originals).numpy()
    figure = Figure(figsize=(1.1 * len(indices), 1.25 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(indices), squeeze=False)
    for line, (name, pictures) in zip(grid, rows.items()):
        for axes, picture in zip(line, pictures):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(" ", fontsize=8)  # room for the name, which may be wider than the first column
        line[0].annotate(name, (0, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points",
                         fontsize=8).set_in_layout(False)
    for axes, i in zip(grid[-1], indices):
        axes.set_xlabel(f"image {i}", fontsize=8)
    return figure


def _curves(records, varied):
    """Curves over one setting: lists of points, each the records that differ in seed only, two points at least."""
    def key(record):
        config = vqvae.Config.from_dict(record["config"])
        follows = config.ema_decay == vqvae.default_ema_decay(config)  # the default decay follows K
        return _key(record, "seed", varied, *(["ema_decay"] if follows else []))

    curves = []
    for group in _groups(records, key):
        group.sort(key=lambda record: _sort_value(record, varied))
        points = _groups(group, lambda record: record["config"][varied])
        if len(points) > 1:
            curves.append(points)
    return curves


def _means(groups, *keys):
    """For each group of records the means of some metrics, as one list per metric."""
    return [[statistics.mean(record[key] for record in group) for group in groups] for key in keys]


def rate_distortion(records):
    """Figure: rate (entropy of the code histogram) against distortion, one point per run, lines through means over seeds.

    Left all runs, dotted from K to K; then, for each setting where lambda varies, its runs, BA-VQ joined from lambda to
    lambda. Vertical: log2 K, the highest rate.
    """
    curves = _curves([record for record in records if record["config"]["quantizer"] == "ba_vq"], "entropy_weight")
    grouped = _groups(curves, lambda curve: _setting(curve[0][0], "seed"))
    over_lambda = {_setting(group[0][0][0], "seed"): group for group in grouped}

    def kind(record):  # method without lambda
        return record["method"].replace(f" λ={float(record['config']['entropy_weight']):g}", "")

    styles = looks(records, kind)
    figure = Figure(figsize=(5.5 + 4 * len(over_lambda), 4), layout="constrained")
    all_axes = figure.subplots(1, 1 + len(over_lambda), squeeze=False)[0]
    for axes, only in zip(all_axes, (None, *over_lambda)):
        chosen = [record for record in records if only in (None, _setting(record, "seed"))]
        for group in _groups(chosen, kind):
            axes.plot([r["bits_per_index"] for r in group], [r["psnr"] for r in group],
                      **{**styles[kind(group[0])], "linestyle": "none", "markersize": 5})
        for curve in _curves(chosen, "codebook_size"):
            axes.plot(*_means(curve, "bits_per_index", "psnr"), ":", color=styles[kind(curve[0][0])]["color"])
        if only:
            axes.set_title(f"λ varied, D={chosen[0]['config']['latent_dim']}", fontsize=9, loc="left")
        for curve in over_lambda.get(only, []):
            rates, psnrs = _means(curve, "bits_per_index", "psnr")
            axes.plot(rates, psnrs, "-", color=styles[kind(curve[0][0])]["color"], linewidth=1)
            for number, point in enumerate(curve):  # by turns above and below
                axes.annotate(f"λ={float(point[0]['config']['entropy_weight']):g}", (rates[number], psnrs[number]), fontsize=8,
                              xytext=(0, -20 if number % 2 else 14), textcoords="offset points", ha="center")
        axes.margins(0.15)
        axes.set(xlabel="rate in bits per index (entropy, test set)", ylabel="PSNR in dB (test set)")
        _at_least_a_decibel(axes)
        for size in sorted({record["config"]["codebook_size"] for record in chosen}):
            axes.axvline(math.log2(size), color="0.6", linewidth=0.8)
            axes.annotate(f"K={size}", (math.log2(size), 1), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                          xytext=(0, 3), ha="center", fontsize=8)
    return _finish(figure, columns=3)


def latents_of(model, images):
    """Latents (N, D) of images, on the unit sphere where the quantizer is; with prediction those of the half coded without it."""
    batches = images.split(vqvae.evaluation_batch(images.shape[1], images.device))
    with torch.no_grad():
        z = torch.cat([model.latents(vqvae.to_float(some)) for some in batches]).permute(0, 2, 3, 1)  # (B, H, W, D)
    if isinstance(model.quantizer, vqvae.PredictiveQuantizer):
        z, _ = vqvae.split_halves(z)  # (B, n, D)
    return z.flatten(0, -2)


def codes_and_latents(records, models, images):
    """Figure: for each run a 2-D PCA of latents (dots) and codes (crosses), axes of the latents."""
    columns = min(3, len(models))
    rows = math.ceil(len(models) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, record, model in zip(grid, records, models):
        z, codes = latents_of(model, images), model.quantizer.codebook
        if z.shape[1] == 1:  # a second axis, empty
            z, codes = (torch.nn.functional.pad(x, (0, 1)) for x in (z, codes))
        mean = z.mean(0)
        _, singular, axes_2d = torch.linalg.svd(z - mean, full_matrices=False)
        share = singular.square() / singular.square().sum()
        points, centres = ((x - mean) @ axes_2d[:2].T for x in (z, codes))
        axes.scatter(*points[:4000].T.numpy(), s=2, color="0.6", label="latents", rasterized=True)
        axes.scatter(*centres.T.numpy(), s=14, marker="x", linewidth=1, color=COLORS["vq_ema"][0], label="codes")
        axes.set(xlabel=f"component 1 ({share[0]:.0%} of variance)", ylabel=f"component 2 ({share[1]:.0%})")
        axes.set_title(record["name"], fontsize=9)
    for axes in grid[len(models):]:
        axes.remove()
    return _finish(figure)


def cell_radii(model, images):
    """Root mean squared distance from each code in use to its latents, (codes in use,)."""
    z, codebook = latents_of(model, images), model.quantizer.codebook
    indices = vqvae.nearest_code(z, codebook)  # of all codes, also where a trellis would allow only some of them
    squared = (z - codebook[indices]).square().sum(1)
    sums = torch.zeros(len(codebook)).index_add_(0, indices, squared)
    counts = torch.bincount(indices, minlength=len(codebook))
    return (sums[counts > 0] / counts[counts > 0]).sqrt()


def cell_sizes(records, models, images):
    """Figure: for each run the sorted radii of the nearest-code cells, relative to their mean."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.add_subplot()
    styles = looks(records, _name)
    for record, model in zip(records, models):
        radii = cell_radii(model, images)
        radii = (radii / radii.mean()).sort(descending=True).values.numpy()
        axes.plot((np.arange(len(radii)) + 0.5) / len(radii), radii,
                  **{**styles[record["name"]], "marker": "", "label": f"{record['name']} ({len(radii)} cells in use)"})
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set(xlim=(0, 1), xlabel="cells in use, sorted by radius (fraction)", ylabel="cell radius, relative to the mean")
    axes.set_ylim(bottom=0)
    return _finish(figure)


def _series(records):
    """A function of a record that labels it by its method and, where records differ in them, its images."""
    def images(record):
        config = record["config"]
        folder = f" {config['data_dir']}" if config["dataset"] == "folder" else ""
        return f"{config['dataset']}{folder} {config['image_size']}px"

    several = len(set(map(images, records))) > 1
    return lambda record: record["method"] + (f", {images(record)}" if several else "")


def size_picture(records):
    """Figure: PSNR, share of the codebook in use and share used at all against K: one point per run, lines join means."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    all_axes = figure.subplots(1, 3)
    sizes = sorted({record["config"]["codebook_size"] for record in records})
    series = _series(records)
    styles = looks(records, series)
    for axes, key, text in zip(all_axes, ("psnr", "perplexity_share", "usage_rate"),
                               ("PSNR in dB (test set)", "perplexity / K (test set)", "share of codes used at all (test set)")):
        for number, group in enumerate(_groups(records, series)):
            shift = 1.2 ** ((number + 0.5) / len(styles) - 0.5)  # equal values stay visible side by side
            style = styles[series(group[0])]
            axes.plot([r["config"]["codebook_size"] * shift for r in group], [r[key] for r in group],
                      **{**style, "linestyle": "none"}, markersize=6, clip_on=False)
            for curve in _curves(group, "codebook_size"):
                axes.plot([point[0]["config"]["codebook_size"] * shift for point in curve], *_means(curve, key),
                          color=style["color"], linestyle=style["linestyle"], linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel="codebook size K", ylabel=text)
        axes.margins(0.15)
        if len(sizes) == 1:
            axes.set_xlim(sizes[0] / 2, sizes[0] * 2)
    _at_least_a_decibel(all_axes[0])
    for axes in all_axes[1:]:
        axes.set_ylim(0, 1.05)
    return _finish(figure, columns=3)


def main(argv=None):
    parser = train.Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="finished runs; others and peers are skipped")
    parser.add_argument("--sort_by", default="name", metavar="KEY", help="metric or setting that orders the table (default name)")
    options = parser.parse_args(argv)
    missing = [str(path) for path in options.folders if not os.path.exists(path)]
    if missing:
        raise vqvae.UserError(f"no such folder: {', '.join(missing)}")
    whole = (path.resolve() if path.name in ("", "..") else path for path in options.folders)  # with the run's name at the end
    given = [same[0] for same in _groups(whole, Path.resolve)]  # each once, by its first name
    finished = [path for path in given if os.path.exists(path / "final_metrics.json")]
    unfinished = [path.name for path in given if path.is_dir() and path not in finished]
    if unfinished:
        print(f"left out, no finished run: {', '.join(unfinished)}")
    records = without_peers(load_runs(finished))
    if not records:
        raise vqvae.UserError("none of these is a finished run; give folders with a final_metrics.json, as experiments/NAME")
    print(table(records, options.sort_by))
    if len({record["config"]["seed"] for record in records}) > 1:
        print(f"\n{over_seeds(records)}")
    out_dir, few = Path(records[0]["folder"]).parent, one_seed(records)[:8]
    vqvae.check_writable(out_dir / "summary.png")  # before the models are measured
    shown, _, histograms, _ = open_runs(few)
    figures = {"summary": size_picture(records), "training": training_curves(few), "usage": usage_histograms(shown, histograms)}
    for name, figure in figures.items():
        vqvae.write_figure(out_dir / f"{name}.png", figure)
    print(f"pictures in {out_dir}: summary.png, training.png and usage.png (one seed, eight runs at most); "
          "reconstructions.png and codebook_usage.png in each run folder")


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
