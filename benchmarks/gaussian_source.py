"""What could K codes per latent buy at best? A Gaussian source with the covariance of the images, as a yardstick.

    python benchmarks/gaussian_source.py --codebook_sizes 512,1024,4096,16384       # flags of the data set go to train.py

Shannon's rate-distortion function of a Gaussian source of known covariance is reverse water-filling over its principal
components (Cover & Thomas, theorem 10.3.3), here with (S/f)^2 log2 K bits for an image of S x S pixels. Only vectors of many
images coded together reach it. Of all sources with this covariance the Gaussian is the hardest, so images may beat it: it is a
yardstick, no bound. Beside it the same for f x f tiles by themselves (log2 K bits each, what neighbours tell is not used), and
how many components per latent are worth coding, which the latent dimension D has to hold. The covariances are those of the
training images. Writes results/gaussian_source.json.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import train  # noqa: E402
import vqvae  # noqa: E402
from quantizer_step import table  # noqa: E402

RESULTS = ROOT / "results" / "gaussian_source.json"


def spectrum(batches):
    """Eigenvalues (D,) float64 of the covariance of rows, float64 batches (n, D)."""
    count, total, products = 0, 0, 0
    for rows in batches:
        count, total, products = count + len(rows), total + rows.sum(0), products + rows.T @ rows
    mean = total / count
    return torch.linalg.eigvalsh(products / count - mean[:, None] * mean).clamp_min(0)


def best_psnr(variances, bits):
    """(PSNR in dB, live components) of a Gaussian with these variances (D,), of values in [0, 1], coded with `bits` bits."""
    level = vqvae.water_level(variances, bits)
    return vqvae.psnr(variances.clamp_max(level).mean()).item(), int((variances > level).sum())


def parse(argv):
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--codebook_sizes", default="512,1024,4096,16384", metavar="K,K", help="default 512,1024,4096,16384")
    options, words = parser.parse_known_args(argv)
    try:
        sizes = [int(word) for word in options.codebook_sizes.split(",")]
    except ValueError as error:
        raise vqvae.UserError(f"codebook_sizes: expected numbers with commas between ({error})") from error
    if min(sizes) < 2:
        raise vqvae.UserError(f"codebook_sizes: {min(sizes)} must be at least 2")
    return sizes, train.config_from([*words, "--no_wandb"])[0]


def main(argv=None):
    sizes, config = parse(argv)
    images, _ = vqvae.training_images(config)
    latents = (config.image_size // config.downsample) ** 2
    batches = [vqvae.to_float(part).double() for part in images.split(5000)]  # (n, 3, S, S)
    whole = spectrum(x.flatten(1) for x in batches)
    tiles = spectrum(F.pixel_unshuffle(x, config.downsample).movedim(1, -1).flatten(0, -2) for x in batches)
    records = []
    for size in sizes:
        psnr, live = best_psnr(whole, latents * math.log2(size))
        records.append({"codebook_size": size, "psnr": psnr, "live_per_latent": live / latents,
                        "tile_psnr": best_psnr(tiles, math.log2(size))[0]})
    vqvae.write_json(RESULTS, {"dataset": config.dataset, "images": len(images), "downsample": config.downsample,
                               "sizes": records})
    print(table(["K", "Gaussian images: PSNR dB", "components per latent", "Gaussian tiles: PSNR dB"],
                [[r["codebook_size"], *(f"{r[key]:.{digits}f}" for key, digits in
                                        (("psnr", 2), ("live_per_latent", 1), ("tile_psnr", 2)))] for r in records]))


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
