"""Tables and pictures of finished runs; what analyze.ipynb and the sweep show.

    python analysis.py experiments/quick_vq_ema experiments/quick_ba_vq     # a table and summary.png
    python analysis.py experiments/*
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

import vqvae

# Okabe & Ito: told apart by colour-blind eyes and, with the markers, in grey print.
STYLE = {"vq_ema": ("#D55E00", "o", "VQ-EMA"), "ba_vq": ("#0072B2", "s", "BA-VQ")}
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
            config = vqvae.Config.from_dict(record["config"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise vqvae.UserError(f"{path}: no finished run here ({error})") from error
        records.append({"name": folder.name, "method": method(config), **record})
    return records


def find_runs(out_dir):
    """The folders of all finished runs below out_dir, sorted by name."""
    return sorted(path.parent for path in Path(out_dir).glob("*/final_metrics.json"))


def method(config):
    """Short label of a quantizer and its recipe."""
    if config.quantizer == "vq_ema":
        return f"VQ-EMA {config.vq_recipe}"
    return f"BA-VQ λ={config.entropy_weight:g}"


def _setting(record):
    """What two runs must share to be compared: everything but the quantizer's own settings."""
    own = {"name", "quantizer", "vq_recipe", "restart_threshold", "entropy_weight", "temperature_start",
           "temperature_end", "anneal_fraction", "ba_iters", "ema_decay", *vqvae.NOT_IDENTITY}
    return tuple((key, value) for key, value in sorted(record["config"].items()) if key not in own)


def differences(records):
    """BA-VQ minus VQ-EMA for each pair of runs that share all other settings, as a list of dicts."""
    pairs = []
    for ba in (record for record in records if record["config"]["quantizer"] == "ba_vq"):
        for ema in (record for record in records if record["config"]["quantizer"] == "vq_ema"):
            if _setting(ba) == _setting(ema):
                pairs.append({"ba_vq": ba["name"], "vq_ema": ema["name"],
                              **{key: ba[key] - ema[key] for key in DIFFERENCES}})
    return pairs


def table(records):
    """Text table of runs and of the BA-over-EMA differences."""
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


def summary_picture(records, path):
    """PNG: PSNR and share of the codebook in use, one point per run against K."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("psnr", "perplexity_share"),
                                ("PSNR in dB (test set)", "perplexity / K (test set)")):
        for quantizer, (color, marker, name) in STYLE.items():
            for metric, fill in (("euclid", color), ("cosine", "white")):
                chosen = [r for r in records if (r["config"]["quantizer"], r["config"]["metric"]) == (quantizer, metric)]
                if chosen:
                    axes.plot([r["config"]["codebook_size"] for r in chosen], [r[key] for r in chosen], marker,
                              color=color, markerfacecolor=fill, markersize=8, label=f"{name}, {metric}")
        sizes = sorted({r["config"]["codebook_size"] for r in records})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel="codebook size K", ylabel=label)
        axes.margins(0.15)
        axes.grid(alpha=0.3)
        axes.legend()
    vqvae.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def main(argv=None):
    folders = [Path(word) for word in (sys.argv[1:] if argv is None else argv)]
    if not folders or any(str(word).startswith("-") for word in folders):
        raise vqvae.UserError("usage: python analysis.py RUN_FOLDER...")
    records = load_runs(folder for folder in folders if folder.is_dir())
    if not records:
        raise vqvae.UserError("none of these is a run folder")
    print(table(records))
    picture = folders[0].parent / "summary.png"
    summary_picture(records, picture)
    print(f"pictures: {picture}, and reconstructions.png and codebook_usage.png in each run folder")


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
