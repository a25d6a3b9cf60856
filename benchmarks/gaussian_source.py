"""What could K codes per latent buy? Theory for a Gaussian source with the covariance of the images, as a yardstick.

    python benchmarks/gaussian_source.py --codebook_sizes 512,1024,4096,16384       # flags of the data set go to train.py

An encoder turns an image of S x S pixels linearly into (S/f)^2 latents of log2 K bits each, which together hold its first n
principal components. Columns:

- Shannon: reverse water-filling (Cover & Thomas, theorem 10.3.3), reached only by coding vectors of many images together;
- best codes: a codebook of K vectors for each latent, by high-resolution theory (Zador 1982, IEEE Trans. IT 28(2)) with cells
  that have the second moment of a ball, and with n chosen for the least error;
- balanced codes: the same with cells of equal probability, which is what lambda = inf asks for;
- one tile: Shannon for f x f pixels by themselves, so without what neighbours tell.

Of all sources with this covariance the Gaussian has the largest Shannon error, so images may beat that column. The two for
codebooks are estimates, neither bounds nor asymptotes reached: they hold for large K, while 512 codes in five dimensions are
three and a half levels in each. n per latent is what the latent dimension D has to hold. Covariances are those of the training
images. Writes results/gaussian_source.json.
"""

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before PyTorch: says how its threads wait

# isort: split
import torch
import torch.nn.functional as F

import vqvae
from price_of_balance import balanced_to_best
from quantizer_step import table

RESULTS = ROOT / "results" / "gaussian_source.json"


def spectrum(batches):
    """Eigenvalues (D,) float64, falling, of the covariance of rows, float64 batches (n, D)."""
    count, total, products = 0, 0, 0
    for rows in batches:
        count, total, products = count + len(rows), total + rows.sum(0), products + rows.T @ rows
    mean = total / count
    return torch.linalg.eigvalsh(products / count - mean[:, None] * mean).clamp_min(1e-15).flip(0)


def shannon(d):
    return 1.0


def best_codes(d):
    """Squared error of K codes for a Gaussian of d dimensions over the error by Shannon, K large (Zador); inf for d < 1."""
    if d < 1:  # a component cannot be shared by codebooks
        return math.inf
    sphere = math.exp(2 / d * math.lgamma(d / 2 + 1)) / (math.pi * (d + 2))  # second moment of a ball of volume 1, per dimension
    return 2 * math.pi * sphere * ((d + 2) / d) ** ((d + 2) / 2)


def balanced_codes(d):
    return best_codes(d) * (balanced_to_best(d) or math.inf)


def least_error(variances, bits, latents, factor):
    """(squared error, components per latent) of a Gaussian with these variances (D,), falling, coded with `bits` bits in all.

    The first n components share the bits: each ends with the error factor(n / latents) * level, `level` that of
    water-filling, and the others are left out. The best n of those whose level is below all n variances; 0 if none pays.
    """
    levels = ((variances.log().cumsum(0) - 2 * math.log(2) * bits) / torch.arange(1, len(variances) + 1)).exp()  # (D,)
    left = variances.sum() - variances.cumsum(0)
    errors = [(n * factor(n / latents) * level + rest, n / latents) for n, (level, rest, variance) in
              enumerate(zip(levels.tolist(), left.tolist(), variances.tolist()), 1)
              if level <= variance and factor(n / latents) < math.inf]
    return min([(variances.sum().item(), 0.0), *errors])


def parse(argv):
    parser = train.Parser(__doc__)
    parser.add_argument("--codebook_sizes", type=train.several(int), default="512,1024,4096,16384", metavar="K,K",
                        help="default 512,1024,4096,16384")
    options, words = parser.parse_known_args(argv)
    if min(options.codebook_sizes) < 2:
        raise vqvae.UserError(f"codebook_sizes: {min(options.codebook_sizes)} must be at least 2")
    config = train.config_to_run([*words, "--no_wandb"])
    if config.image_size > 64:  # the covariance has (3 S^2)^2 entries
        raise vqvae.UserError(f"image_size: {config.image_size} must be at most 64 here")
    return options.codebook_sizes, config


def main(argv=None):
    sizes, config = parse(argv)
    images, _ = vqvae.training_images(config)

    def batches():  # (n, 3, S, S)
        return (vqvae.to_float(part).double() for part in images.split(5000))

    whole = spectrum(x.flatten(1) for x in batches())
    tile = spectrum(F.pixel_unshuffle(x, config.downsample).movedim(1, -1).flatten(0, -2) for x in batches())
    records = []
    for size in sizes:
        bits = math.log2(size)
        record = {"codebook_size": size}
        for name, variances, count, factor in (
                ("shannon", whole, config.latents, shannon), ("best_codes", whole, config.latents, best_codes),
                ("balanced_codes", whole, config.latents, balanced_codes), ("one_tile", tile, 1, shannon)):
            error, components = least_error(variances, count * bits, count, factor)
            record[name] = {"psnr": -10 * math.log10(error / len(variances)), "components_per_latent": components}
        records.append(record)
    vqvae.write_json(RESULTS, {"dataset": config.dataset, "images": len(images), "downsample": config.downsample,
                               "sizes": records})
    cases = list(records[0])[1:]
    print("PSNR in dB (components per latent)\n")
    print(table(["K", *(name.replace("_", " ") for name in cases)],
                [[r["codebook_size"], *(f"{r[name]['psnr']:.2f} ({r[name]['components_per_latent']:.1f})"
                                        if r[name]["components_per_latent"] else "nothing pays" for name in cases)]
                 for r in records]))


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
