"""What do the live directions of a trained encoder's latents carry? Where D is large, some only repeat the brightness.

    python benchmarks/latent_directions.py experiments/ba_vq_k512 ...          # any trained runs, or their final_model.pt

For each of the first eight principal directions of the latents of the run's test images: its variance, as a share of all, and how
much of that is a function of the first direction (mean within each of 60 quantiles of it). A linear encoder has none of it; a
direction that has much is a bend of the first one, so codes along it say again what others have said. Of runs with prediction
it takes the half of the latents that is coded without. Writes results/latent_directions.json.
"""

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before PyTorch: says how its threads wait

# isort: split
import torch

import analysis
import vqvae
from quantizer_step import table

RESULTS = ROOT / "results" / "latent_directions.json"
COUNT = 8  # principal directions that are shown


def directions(z, quantiles=60):
    """(shares of the variance, shares of each that are a function of the first direction), lists, of latents z (N, D)."""
    variances, basis = torch.linalg.eigh(torch.cov(z.T).view(z.shape[1], -1))  # rising
    y = (z - z.mean(0)) @ basis.flip(1)[:, :COUNT]  # (N, COUNT)
    bins = y[:, 0].argsort().argsort() * quantiles // len(y)  # (N,)
    means = torch.zeros(quantiles, y.shape[1]).index_add_(0, bins, y) / torch.bincount(bins, minlength=quantiles)[:, None]
    told = means[bins].square().mean(0) / y.square().mean(0)
    return (variances.flip(0)[:COUNT] / variances.sum()).tolist(), told.tolist()


def describe(path):
    """The record of one run."""
    model, config = vqvae.load_model(path)
    with vqvae.eval_mode(model):
        z = analysis.latents_of(model, vqvae.test_images(config))  # (N, D)
    variance, told = directions(z)
    live = vqvae.live_directions(torch.cov(z.T).view(z.shape[1], -1), math.log2(config.codebook_size)).shape[1]
    return {"run": config.name, "config": config.to_dict(), "live_directions": live, "variance": variance, "of_the_first": told}


def main(argv=None):
    parser = train.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or their final_model.pt")
    records = [describe(run) for run in parser.parse_args(argv).runs]
    vqvae.write_json(RESULTS, records)
    print("share of the variance, of that a function of direction 1\n")
    print(table(["run", "live", *(f"direction {i}" for i in range(1, COUNT + 1))],
                [[r["run"], r["live_directions"], *(f"{v:.2%}, {t:.0%}" for v, t in zip(r["variance"], r["of_the_first"]))]
                 for r in records]))


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
