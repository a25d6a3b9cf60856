"""Tables and pictures of finished runs; what analyze.ipynb and the sweep show.

    python analysis.py experiments/quick_vq_ema experiments/quick_ba_vq     # a table, summary.png and usage.png
    python analysis.py experiments/*
"""

import dataclasses
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import vqvae

# Okabe & Ito: told apart by colour-blind eyes and, with the markers, in grey print.
STYLE = {"vq_ema": ("#D55E00", "o", "VQ-EMA"), "ba_vq": ("#0072B2", "s", "BA-VQ")}
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLUMNS = [("psnr", "PSNR dB", "{:.2f}"), ("ssim", "SSIM", "{:.4f}"), ("perplexity", "perplexity", "{:.1f}"),
           ("perplexity_share", "perp./K", "{:.1%}"), ("usage_rate", "usage", "{:.1%}"),
           ("bits_per_index", "bits/index", "{:.3f}")]
DIFFERENCES = ("psnr", "ssim", "perplexity", "usage_rate", "bits_per_index")


def load_runs(folders):
    """The final_metrics.json of each run folder, with the run's name and recipe. Raises UserError."""
    records = []
    for folder in map(Path, folders):
        path = folder / "final_metrics.json"
        try:
            record = json.loads(path.read_text())
            record["config"].setdefault("whitening", 0.0)  # runs from before it existed
            config = vqvae.Config.from_dict(record["config"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise vqvae.UserError(f"{path}: no finished run here ({error})") from error
        records.append({"name": folder.name, "method": method(config), **record})
    return records


def find_runs(out_dir):
    """The folders of all finished runs below out_dir, sorted by name."""
    return sorted(path.parent for path in Path(out_dir).glob("*/final_metrics.json"))


def method(config):
    """Short label of a quantizer and its recipe."""
    name = f"VQ-EMA {config.vq_recipe}" if config.quantizer == "vq_ema" else f"BA-VQ λ={config.entropy_weight:g}"
    return name + (" whitened" if config.whitening else "")


def _setting(record):
    """What two runs must share to be compared: everything but the quantizer's own settings."""
    own = {"quantizer", "vq_recipe", "restart_threshold", "warmup_fraction", "entropy_weight", "temperature_start",
           "temperature_end", "anneal_fraction", "ba_iters", "ema_decay", "whitening"}
    return {key: value for key, value in identity(record).items() if key not in own}


def identity(record):
    """vqvae.identity of a record's config."""
    return vqvae.identity(vqvae.Config.from_dict(record["config"]))


def differences(records):
    """BA-VQ minus VQ-EMA for each pair of runs that share all settings but the quantizer's, as a list of dicts."""
    pairs = []
    for ba in (record for record in records if record["config"]["quantizer"] == "ba_vq"):
        for ema in (record for record in records if record["config"]["quantizer"] == "vq_ema"):
            if _setting(ba) == _setting(ema):
                pairs.append({"ba_vq": ba["name"], "vq_ema": ema["name"],
                              **{key: ba[key] - ema[key] for key in DIFFERENCES}})
    return pairs


def table(records, sort_by="name"):
    """Text table of runs, sorted by any key of the records, and of the BA-over-EMA differences."""
    records = sorted(records, key=lambda record: record[sort_by])
    header = ["run", "method", "K", *(title for _, title, _ in COLUMNS)]
    rows = [[record["name"], record["method"], str(record["config"]["codebook_size"]),
             *(form.format(record[key]) for key, _, form in COLUMNS)] for record in records]
    lines = _aligned([header, *rows])
    pairs = differences(records)
    if pairs:
        lines += ["", "BA-VQ over VQ-EMA:"]
        lines += _aligned([["runs", "PSNR dB", "perplexity", "usage"]] + [
            [f"{pair['ba_vq']} - {pair['vq_ema']}", f"{pair['psnr']:+.2f}", f"{pair['perplexity']:+.1f}",
             f"{pair['usage_rate']:+.1%}"] for pair in pairs])
    return "\n".join(lines)


def _aligned(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) if i < 1 else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]


def over_seeds(records):
    """Text table of mean and standard deviation over the runs that differ only in seed."""
    groups = {}
    for record in records:
        groups.setdefault(json.dumps({**identity(record), "seed": None}, sort_keys=True), []).append(record)
    rows = [["method", "K", "D", "seeds", "PSNR dB", "perplexity", "usage"]]
    for group in groups.values():
        config = group[0]["config"]
        rows.append([group[0]["method"], str(config["codebook_size"]), str(config["latent_dim"]), str(len(group)),
                     _mean_and_spread(group, "psnr", "{:.2f}"), _mean_and_spread(group, "perplexity", "{:.1f}"),
                     _mean_and_spread(group, "usage_rate", "{:.3f}")])
    return "\n".join(_aligned(rows))


def _mean_and_spread(group, key, form):
    values = [record[key] for record in group]
    mean = statistics.mean(values)
    return form.format(mean) + (f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else "")


def look(record, number):
    """(color, marker, line style) of a run: color and marker by quantizer, line by position."""
    color, marker, _ = STYLE[record["config"]["quantizer"]]
    return color, marker, ("-", "--", ":", "-.")[number % 4]


def training_curves(folders):
    """Figure: validation PSNR and share of the codebook in use, by epoch."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (folder, record) in enumerate(zip(folders, load_runs(folders))):
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "train_perplexity" in line]  # without epochs of warm-up
        split = "val" if "val_psnr" in lines[-1] else "train"
        color, marker, style = look(record, number // 2)
        options = dict(color=color, marker=marker, linestyle=style, markersize=4, label=record["name"])
        epochs = [line["epoch"] for line in lines]
        if split == "val":
            left.plot(epochs, [line["val_psnr"] for line in lines], **options)
        size = record["config"]["codebook_size"]
        right.plot(epochs, [line[f"{split}_perplexity"] / size for line in lines], **options)
    left.set(xlabel="epoch", ylabel="PSNR in dB (validation)")
    right.set(xlabel="epoch", ylabel="perplexity / K (validation)", ylim=(0, 1.02))
    _finish(left, right)
    return figure


def _finish(*all_axes):
    for axes in all_axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)


def open_run(folder, data_dir=None, device="cpu"):
    """(model in eval mode, Config, test images) of a run folder; data_dir overrides the stored one."""
    model, config = vqvae.load_model(Path(folder) / "final_model.pt", device)
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=str(data_dir))
    return model, config, vqvae.test_images(config)


def usage_histograms(runs):
    """Figure: sorted share of each code on the test set; runs is {label: histogram (K,)}."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, histogram) in enumerate(runs.items()):
        share = np.sort(histogram.double().numpy())[::-1] * len(histogram) / histogram.sum().item()
        perplexity = vqvae.codebook_metrics(histogram)["perplexity"]
        color, style = PALETTE[number % len(PALETTE)], ("-", "--", ":", "-.")[number % 4]
        axes.plot(np.linspace(0, 1, len(share)), np.where(share > 0, share, np.nan), color=color, linestyle=style,
                  label=f"{name}: perplexity/K = {perplexity / len(histogram):.2f}")
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set(yscale="log", xlabel="codes, sorted by use (fraction of K)", ylabel="use, relative to uniform (1/K)")
    _finish(axes)
    return figure


def reconstruction_grid(runs, images):
    """Figure: originals uint8 (N, S, S, 3) in the first row, each run's reconstructions below; runs is {label: model}."""
    rows = {"original": images.numpy()}
    for name, model in runs.items():
        with torch.no_grad():
            rows[name] = vqvae.to_bytes(model(vqvae.to_float(images)).images).permute(0, 2, 3, 1).numpy()
    figure = Figure(figsize=(1.1 * len(images), 1.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for line, (name, pictures) in zip(grid, rows.items()):
        for axes, picture in zip(line, pictures):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        line[0].set_title(name, fontsize=8, loc="left")
    return figure


def rate_distortion(records):
    """Figure: rate (entropy of the code histogram) against distortion, one point per run; BA-VQ joined over lambda."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    labelled = set()
    groups = {}
    for record in records:
        others = json.dumps({**identity(record), "entropy_weight": None}, sort_keys=True)
        groups.setdefault(others, []).append(record)
    for group in groups.values():
        quantizer, size = group[0]["config"]["quantizer"], group[0]["config"]["codebook_size"]
        color, marker, name = STYLE[quantizer]
        group = sorted(group, key=lambda record: record["bits_per_index"])
        axes.plot([r["bits_per_index"] for r in group], [r["psnr"] for r in group], marker, color=color,
                  linestyle="-" if quantizer == "ba_vq" else "none", label=None if name in labelled else name)
        axes.annotate(f"K={size}", (group[-1]["bits_per_index"], group[-1]["psnr"]), textcoords="offset points",
                      xytext=(5, -10), fontsize=8)
        labelled.add(name)
    axes.margins(0.15)
    axes.set(xlabel="rate in bits per index (entropy, test set)", ylabel="PSNR in dB (test set)")
    _finish(axes)
    return figure


def latents_of(model, images):
    """Encoder outputs (N, D) of images, on the unit sphere where the quantizer is."""
    with torch.no_grad():
        z = model.latents(vqvae.to_float(images)).permute(0, 2, 3, 1).flatten(0, 2)
    return torch.nn.functional.normalize(z, dim=1) if model.quantizer.metric == "cosine" else z


def codes_and_latents(model, images, title):
    """Figure: 2-D PCA of latents (dots) and codes (crosses), axes of the latents."""
    z, codes = latents_of(model, images), model.quantizer.codebook
    if z.shape[1] == 1:  # a second axis, empty
        z, codes = (torch.nn.functional.pad(x, (0, 1)) for x in (z, codes))
    mean = z.mean(0)
    _, singular, axes_2d = torch.linalg.svd(z - mean, full_matrices=False)
    share = singular.square() / singular.square().sum()
    points, centres = ((x - mean) @ axes_2d[:2].T for x in (z, codes))
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(*points[:4000].T.numpy(), s=2, color="0.6", label="latents")
    axes.scatter(*centres.T.numpy(), s=14, marker="x", color="#D55E00", label="codes")
    names = [f"principal component {i + 1} ({share[i]:.0%} of the variance)" for i in range(len(points[0]))]
    axes.set(xlabel=names[0], ylabel=names[1], title=title)
    _finish(axes)
    return figure


def cell_sizes(runs, images):
    """Figure: distribution over codes of the root mean squared distance inside a cell, relative to its mean."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, model) in enumerate(runs.items()):
        z, codebook = latents_of(model, images), model.quantizer.codebook
        indices = vqvae.nearest_code(z, codebook)
        squared = (z - codebook[indices]).square().sum(1)
        sums = torch.zeros(len(codebook)).index_add_(0, indices, squared)
        counts = torch.bincount(indices, minlength=len(codebook))
        radius = (sums[counts > 0] / counts[counts > 0]).sqrt()
        axes.hist((radius / radius.mean()).numpy(), bins=np.linspace(0, 3, 40), histtype="step", linewidth=1.5,
                  weights=np.full(len(radius), 1 / len(radius)), color=PALETTE[number % len(PALETTE)],
                  label=f"{name} ({len(radius)} cells in use)", linestyle=("-", "--", ":", "-.")[number % 4])
    axes.set(xlabel="cell radius, relative to the mean", ylabel="share of the cells in use")
    _finish(axes)
    return figure


def size_picture(records):
    """Figure: PSNR and share of the codebook in use against K, one point per run."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    all_axes = figure.subplots(1, 2)
    sizes = sorted({record["config"]["codebook_size"] for record in records})
    for axes, key, text in zip(all_axes, ("psnr", "perplexity_share"), ("PSNR in dB (test set)", "perplexity / K (test set)")):
        for quantizer, (color, marker, name) in STYLE.items():
            for metric, fill in (("euclid", color), ("cosine", "white")):
                chosen = [r for r in records if (r["config"]["quantizer"], r["config"]["metric"]) == (quantizer, metric)]
                if chosen:
                    axes.plot([r["config"]["codebook_size"] for r in chosen], [r[key] for r in chosen], marker,
                              color=color, markerfacecolor=fill, markersize=8, label=f"{name}, {metric}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel="codebook size K", ylabel=text)
        axes.margins(0.15)
    low, high = all_axes[0].get_ylim()
    slack = max(0, 1 - (high - low)) / 2  # at least 1 dB, or noise looks like a result
    all_axes[0].set_ylim(low - slack, high + slack)
    all_axes[1].set_ylim(0, 1.05)
    _finish(*all_axes)
    return figure


def save_figure(figure, path):
    """Write a figure as PNG."""
    vqvae.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def main(argv=None):
    folders = [Path(word) for word in (sys.argv[1:] if argv is None else argv)]
    if not folders or any(str(word).startswith("-") for word in folders):
        raise vqvae.UserError("usage: python analysis.py RUN_FOLDER...")
    unfinished = [folder.name for folder in folders if folder.is_dir() and not (folder / "final_metrics.json").exists()]
    folders = [folder for folder in folders if (folder / "final_metrics.json").exists()]
    if unfinished:
        print(f"left out, no finished run: {', '.join(unfinished)}")
    records = load_runs(folders)
    if not records:
        raise vqvae.UserError("none of these is a run folder")
    print(table(records))
    out_dir = folders[0].parent
    save_figure(size_picture(records), out_dir / "summary.png")
    histograms = {}
    for folder, record in zip(folders, records):
        model, config, images = open_run(folder)
        histograms[record["name"]] = vqvae.code_histogram(model, images, config.codebook_size)
    save_figure(usage_histograms(histograms), out_dir / "usage.png")
    print(f"pictures: {out_dir / 'summary.png'}, {out_dir / 'usage.png'}; "
          "reconstructions.png and codebook_usage.png in each run folder")


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
