"""What does equal use of all codes cost in PSNR, and could other codes do better? Latents that do not move, theory beside.

    python benchmarks/price_of_balance.py experiments/RUN [--passes 4]       # of --prediction none, or their final_model.pt

The encoder and decoder of a run stay as they are; only codebooks are fitted to the latents of 10,000 training images, by
tuned VQ-EMA and by BA-VQ at several lambda, and measured on its validation images: whatever differs is the price of how the
codes are used. Lloyd's algorithm (1982, IEEE Trans. IT 28(2)) from VQ-EMA's codebook finds the nearest local optimum. Reverse
water-filling asks that all directions with codes have the same error, and that no other has more: the squared error of a tile
is printed by direction of the latents, and by principal component of all that is left.

The same is done for Gaussian numbers with the mean and the covariance of the latents: what differs between the two is due to
their other shape, as of a mixture of smooth and rough places.

Theory: at high resolution the squared error of codes with density g(x) is E[g^(-2/d)] up to a constant (Zador 1982, IEEE
Trans. IT 28(2)). It is least for g ~ p^(d/(d+2)), p the density of the latents; cells of equal mass have g = p. For a Gaussian
p the ratio of the two depends only on d, the number of live directions: vqvae.live_directions at log2 K bits. What it costs in
the image is estimated from how much the image's squared error grows where that of the codes does, everywhere alike.
Writes results/price_of_balance.json. The runs need validation images and the euclid metric, and neither prediction nor a trellis.
"""

import dataclasses
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before PyTorch: says how its threads wait

# isort: split
import torch
import torch.nn.functional as F
from tqdm import tqdm

import analysis
import vqvae
from quantizer_step import table

RESULTS = ROOT / "results" / "price_of_balance.json"
BATCH = 8192  # latents per step of a fit, as in training with 128 images of 64 latents


def balanced_to_best(d):
    """Distortion of balanced cells over the least one, for a Gaussian of d live dimensions; None up to d = 2 (infinite)."""
    return ((d - 2) / d) ** (-d / 2) / (d / (d + 2)) ** (-(d + 2) / 2) if d > 2 else None


def fit(config, z, passes, seed):
    """The quantizer of `config`, fitted to latents z (N, D) in `passes` passes."""
    quantizer = vqvae.make_quantizer(config).to(z.device).train()
    steps = passes * max(1, len(z) // BATCH)
    for step in tqdm(range(steps), desc=f"fitting K={config.codebook_size}", leave=False, disable=None):
        torch.manual_seed(seed + step)
        quantizer.set_progress(step / steps)
        quantizer(z[torch.randint(len(z), (BATCH,), device=z.device)])
    return quantizer.eval()


@torch.no_grad()
def lloyd(quantizer, z, iterations=100):
    """`quantizer`, a VQEMAQuantizer, with its codes moved by Lloyd's algorithm on all latents z (N, D) at once."""
    for _ in tqdm(range(iterations), desc="Lloyd", leave=False, disable=None):
        _, stats = quantizer.assign(z, 1, None)  # (K, D + 1)
        counts = stats[:, -1:]
        quantizer.codebook.copy_(torch.where(counts > 0, stats[:, :-1] / counts.clamp_min(1), quantizer.codebook))
    return quantizer


def error_by_direction(model, images, probes=8):
    """The squared error of one tile (f x f pixels, f = downsample) of images uint8 (N, S, S, 3), in two bases.

    Returns ((D,) the quantizer's error, in the image to first order, along the directions of the latents by falling variance
    in the image, (3 f^2,) the whole error along the principal axes of what is left of a tile, falling). The directions are
    eigenvectors of S^(1/2) C S^(1/2), C the covariance of the latents, S = E[J^T J] of the decoder's J, by random probes.
    """
    x = vqvae.to_float(images)
    with torch.no_grad():
        z = model.latents(x)
        codes = model.quantizer(z).z_q.requires_grad_()  # (N, D, H, W)
    with torch.enable_grad():
        y = model.reconstruct(codes)
        gradients = [torch.autograd.grad(y, codes, torch.randn_like(y), retain_graph=True)[0] for _ in range(probes)]

    def second_moment(x):  # (B, D, H, W) -> (D, D)
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        return rows.T @ rows / len(rows)

    values, vectors = torch.linalg.eigh(second_moment(torch.cat(gradients)))
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T  # S^(1/2)
    centred = z - z.mean((0, 2, 3), keepdim=True)
    _, directions = torch.linalg.eigh(root @ second_moment(centred) @ root)
    errors = (directions.T @ root @ second_moment(z - codes.detach()) @ root @ directions).diagonal().flip(0)
    left = torch.linalg.eigvalsh(second_moment(F.pixel_unshuffle(x - y.detach(), model.downsample))).flip(0)
    return errors, left


@torch.no_grad()
def measure(model, quantizer, images):
    """Distortion, PSNR and perplexity of a quantizer between a model's encoder and decoder."""
    whole, model.quantizer = model.quantizer, quantizer
    try:
        metrics = vqvae.evaluate(model, images, quantizer.codebook_size)
    finally:
        model.quantizer = whole
    return {key: metrics[key] for key in ("quantization_error", "psnr", "perplexity", "usage_rate")}


@torch.no_grad()
def unquantized_psnr(model, images):
    errors = [(vqvae.to_bytes(model(x, quantize=False).images).float() / 255 - x).square().flatten(1).mean(1)
              for x in map(vqvae.to_float, images.split(500))]
    return vqvae.psnr(torch.cat(errors).double().mean()).item()


@torch.no_grad()
def measure_alone(quantizer, z):
    """Distortion and perplexity of a quantizer on rows z (N, D)."""
    numbers = quantizer.nearest(z, 1, None)
    histogram = torch.bincount(numbers, minlength=quantizer.codebook_size)
    return {"quantization_error": (z - quantizer.codebook[numbers]).square().sum(1).mean().item(),
            "perplexity": vqvae.codebook_metrics(histogram, quantizer.codebook_size)["perplexity"]}


def gaussian_like(z, count):
    """(count, D): Gaussian numbers with the mean and the covariance of z (N, D)."""
    values, vectors = torch.linalg.eigh(torch.cov(z.T).view(z.shape[1], -1))
    return z.mean(0) + torch.randn(count, z.shape[1], device=z.device) @ (vectors * values.clamp_min(0).sqrt()).T


@torch.no_grad()
def error_growth(model, images, shift=0.05):
    """By how many percent the image's squared error grows where the codes' grows by one; 1 if it were the image's only source.

    From codes moved by `shift` of their distance to the latents, towards them and away. images uint8 (N, S, S, 3).
    """
    errors = torch.zeros(2, dtype=torch.float64)
    for x in map(vqvae.to_float, images.split(500)):
        z = model.latents(x)
        gap = model.quantizer(z).z_q - z
        for i, factor in enumerate((1 - shift, 1 + shift)):
            errors[i] += (model.reconstruct(z + factor * gap) - x).square().sum().cpu().double()
    return (errors.log().diff() / (2 * math.log((1 + shift) / (1 - shift)))).item()


def open_run(run):
    """(model, Config) of a run that has what `price` needs. Raises UserError."""
    model, config = vqvae.load_model(run)
    if config.val_size == 0 or (config.metric, config.prediction, config.trellis) != ("euclid", "none", "none"):
        raise vqvae.UserError(f"{run}: needs a run with validation images (--val_size 5000), metric euclid, prediction none "
                              "and trellis none")
    return model, config


def price(run, weights, passes, seed):
    """The record of one run: theory, and VQ-EMA and BA-VQ fitted to its latents and to Gaussian ones of their covariance."""
    model, config = open_run(run)
    train_images, val_images = vqvae.training_images(config)
    with vqvae.eval_mode(model):
        z = analysis.latents_of(model, train_images[:10000])  # (N, D)
        plain = unquantized_psnr(model, val_images)
        d = vqvae.live_directions(torch.cov(z.T).view(z.shape[1], -1), math.log2(config.codebook_size)).shape[1]
        record = {"run": config.name, "config": config.to_dict(), "unquantized_psnr": plain, "live_directions": d,
                  "theory_distortion": balanced_to_best(d), "error_growth": error_growth(model, val_images), "fits": {},
                  "gaussian": {}}
        fresh = dict(ema_decay=None, batch_size=max(1, BATCH // config.latents))  # the decay for steps of BATCH latents
        settings = {"VQ-EMA": dict(quantizer="vq_ema", vq_recipe="tuned"),
                    **{f"BA-VQ λ={w:g}".replace("inf", "∞"): dict(quantizer="ba_vq", entropy_weight=w) for w in weights}}
        torch.manual_seed(seed)
        gaussian, unseen = gaussian_like(z, 2 * len(z)).chunk(2)
        for source, rows, measured in (("fits", z, lambda quantizer: measure(model, quantizer, val_images)),
                                       ("gaussian", gaussian, lambda quantizer: measure_alone(quantizer, unseen))):
            for name, values in settings.items():
                fitted = fit(dataclasses.replace(config, **fresh, **values), rows, passes, seed)
                record[source][name] = measured(fitted)
                if name == "VQ-EMA":
                    record[source]["the same, then Lloyd"] = measured(lloyd(fitted, rows))
        torch.manual_seed(seed)
        errors, left = error_by_direction(model, val_images[:500])
        record.update({"error_by_direction": errors.tolist(), "error_left": left.tolist()})
    if d > 2:
        record["theory_psnr"] = -10 * math.log10(1 + record["error_growth"] * (record["theory_distortion"] - 1))
    return record


def report(record):
    """Markdown of one record."""
    base, gaussian_base = record["fits"]["VQ-EMA"], record["gaussian"]["VQ-EMA"]
    size = record["config"]["codebook_size"]

    def use_and_error(fit, base):
        return [f"{fit['perplexity'] / size:.1%}", f"{fit['quantization_error'] / base['quantization_error']:.3f}"]

    rows = [[name, *use_and_error(fit, base), f"{fit['psnr']:.3f}", f"{fit['psnr'] - base['psnr']:+.3f}",
             *use_and_error(record["gaussian"][name], gaussian_base)] for name, fit in record["fits"].items()]
    return "\n".join([
        f"{record['run']}: K={size}, {record['live_directions']} live directions, without quantizer "
        f"{record['unquantized_psnr']:.2f} dB. One percent more error of the codes is "
        f"{record['error_growth']:.2f}% more in the image.",
        f"Theory, balanced against best: distortion × {record['theory_distortion']:.3f}, PSNR {record['theory_psnr']:+.3f} dB."
        if "theory_psnr" in record else "Theory, balanced against best: no finite factor up to two live directions.",
        *(f"{what}: {', '.join(f'{e:.4f}' for e in record[key][:12])}" for what, key in (
            ("Squared error of a tile by direction of the latents", "error_by_direction"),
            ("Largest components of all that is left", "error_left"))),
        "", table(["quantizer", "perplexity/K", "distortion / VQ-EMA", "PSNR dB", "Δ PSNR dB", "Gaussian: perplexity/K",
                   "Gaussian: distortion / VQ-EMA"], rows), ""])


def parse(argv):
    parser = train.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or their final_model.pt")
    parser.add_argument("--entropy_weights", type=train.several(float), default="10,100,inf", metavar="L,L",
                        help="lambdas of BA-VQ (default 10,100,inf)")
    parser.add_argument("--passes", type=train.whole(1), default=4, metavar="N",
                        help="over the latents of 10,000 images (default 4)")
    parser.add_argument("--seed", type=train.whole(0), default=0, metavar="N", help="of the starts of the codes (default 0)")
    options = parser.parse_args(argv)
    for weight in options.entropy_weights:
        vqvae.Config(entropy_weight=weight, seed=options.seed)  # in range, or UserError
    return options


def main(argv=None):
    options = parse(argv)
    records = []
    for run in options.runs:
        open_run(run)  # a bad one is found before any work is done
    for run in options.runs:
        records.append(price(run, options.entropy_weights, options.passes, options.seed))
        print(report(records[-1]), flush=True)
        vqvae.write_json(RESULTS, records)


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
