"""Evaluate checkpoints on the test set: PSNR, SSIM, codebook use, r-FID and r-IS.

    python eval_cifar.py --checkpoint experiments/RUN/final_model.pt
    python eval_cifar.py --checkpoint experiments                     # every final_model.pt below, but for peers
    python eval_cifar.py --checkpoint experiments --refine 2          # codes improved by two passes through the decoder
    python eval_cifar.py --checkpoint experiments/RUN/final_model.pt --inception ~/inception-2015-12-05.pt

r-FID is the Frechet distance (Heusel et al. 2017) between Inception features of the test images and of
their reconstructions, both 8-bit, with clean-fid's network and resizing (Parmar et al. 2022). r-IS is the
Inception score (Salimans et al. 2016) of the reconstructions from the same network's class probabilities,
output bias included: compare it with other r-IS of this script only.
Writes eval_metrics.json, reconstructions.png and codebook_usage.png beside each checkpoint.
Exit codes: 0 done, 2 bad input, 3 r-FID and r-IS are missing because the network was not to be had.
"""

import dataclasses
import hashlib
import math
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path

import train  # before PyTorch: says how its threads wait

# isort: split
import numpy as np
import torch
from cleanfid.resize import build_resizer
from tqdm import tqdm

import analysis
import vqvae

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_NAME = "inception-2015-12-05.pt"


def frechet_distance(features_a, features_b):
    """Frechet distance of Gaussians fitted to two feature sets (N, F), (M, F), in float64.

    |m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with Tr (C_a C_b)^(1/2) as the sum of the singular
    values of A B^T, A and B being centred features over sqrt(N - 1): C_a = A^T A needs no square root, so
    nothing is lost where N is near F or the covariances are singular. Raises ValueError for N or M < 2.
    """
    if min(len(features_a), len(features_b)) < 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"need two sets of at least 2 feature rows, got {features_a.shape}, {features_b.shape}")
    a, b = features_a.cpu().double(), features_b.cpu().double()
    difference = (a.mean(0) - b.mean(0)).square().sum()
    roots = []
    trace = 0.0
    for features in (a, b):
        centred = (features - features.mean(0)) / math.sqrt(len(features) - 1)  # (N, F)
        trace += centred.square().sum()
        roots.append(torch.linalg.qr(centred, mode="r").R)  # (min(N, F), F), R^T R = C
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return (difference + trace - 2 * cross).item()


def inception_score(probabilities, splits=10):
    """(mean, standard deviation over `splits` consecutive parts) of exp(E KL(p(y|x) || p(y))); p is (N, classes).

    Raises ValueError where N < splits.
    """
    if len(probabilities) < splits:
        raise ValueError(f"need at least {splits} images, got {len(probabilities)}")
    scores = []
    for p in probabilities.cpu().double().tensor_split(splits):  # (n, classes)
        kl = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))
        scores.append(kl.sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


class Inception:
    """clean-fid's TorchScript Inception and resizing: uint8 images (B, S, S, 3) -> features and class probabilities.

    source: what eval_metrics.json says of it. Raises UserError on another file.
    """

    def __init__(self, path, mode, device):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is called deprecated, but the network comes as TorchScript
            try:
                self.network = torch.jit.load(path, map_location=device).eval()
                self.layers = self.network.layers
                self.weight, self.bias = self.network.output.weight, self.network.output.bias
            except (RuntimeError, AttributeError, ValueError) as error:
                raise vqvae.UserError(f"{path}: not clean-fid's TorchScript Inception ({INCEPTION_NAME}), or damaged; "
                                      "give another as --inception, or delete the one in the cache") from error
            self.resize = build_resizer(mode)
        self.device = device
        self.source = {"fid_mode": mode, "inception_path": str(path),
                       "inception_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                       "clean_fid_version": metadata.version("clean-fid")}

    @torch.no_grad()
    def __call__(self, images):
        resized = np.stack([self.resize(image) for image in images.cpu().numpy()])  # (B, 299, 299, 3), 0..255
        x = torch.from_numpy(resized).to(self.device).permute(0, 3, 1, 2).float()
        with vqvae.float32_convolutions():
            features = self.layers((x - 128) / 128).flatten(1)  # (B, 2048)
        probabilities = torch.softmax(features @ self.weight.T + self.bias, 1)  # (B, 1008)
        return features.cpu(), probabilities.cpu()


def is_readable(path):
    return os.path.isfile(path) and os.access(path, os.R_OK)  # Path.is_file raises OSError where the name is too long


def find_inception(path=None):
    """Path of the Inception file: `path`, or the cache, or downloaded there once. Raises UserError."""
    if path is not None:
        if not is_readable(Path(path)):
            raise vqvae.UserError(f"inception: {path} is no file that can be read; give the path of {INCEPTION_NAME}")
        return Path(path)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = Path("/tmp") if caches.startswith("~") else Path(caches, "vqvae")  # nobody's home is known: containers
    for folder in (cache, Path("/tmp")):  # clean-fid itself keeps it in /tmp
        if is_readable(folder / INCEPTION_NAME):
            return folder / INCEPTION_NAME
    vqvae.download([INCEPTION_URL], cache / INCEPTION_NAME)
    return cache / INCEPTION_NAME


def seen(images, inception, batch_size, name, through=lambda batch: batch):
    """Features (N, F), class probabilities (N, classes) of images uint8 (N, S, S, 3), each batch put `through` a model before."""
    batches = tqdm(images.split(batch_size), desc=f"inception, {name}", disable=None)
    features, probabilities = zip(*(inception(through(batch)) for batch in batches))
    return torch.cat(features), torch.cat(probabilities)


def original_features(images, inception, batch_size):
    """Features (N, F) of images uint8 (N, S, S, 3)."""
    return seen(images, inception, batch_size, "originals")[0]


def shared_features(config, images, inception, batch_size, known):
    """Features (N, F) of a Config's test images, from or into `known`, {data set: features}, which all checkpoints share."""
    data = (config.dataset, config.data_dir, config.image_size, config.test_subset)
    if data not in known:
        known[data] = original_features(images, inception, batch_size)
    return known[data]


def inception_metrics(model, images, originals, inception, batch_size, refine=0):
    """r-FID and r-IS of a model's reconstructions of images uint8 (N, S, S, 3), with features `originals`, as a dict."""
    features, probabilities = seen(images, inception, batch_size, "reconstructions",
                                   lambda batch: vqvae.reconstructed(model, batch, refine))
    mean, deviation = inception_score(probabilities)
    return {"rfid": frechet_distance(originals, features), "ris": mean, "ris_std": deviation}


def loads_again(path):
    """Whether a final_model.pt can be loaded again: its run's metrics name no peer. Prints a line about one that is left out."""
    metrics = path.with_name("final_metrics.json")
    peer = vqvae.read_json(metrics).get("peer") if metrics.exists() else None
    if peer:
        print(f"left out, {peer} of benchmarks/peers.py: {path}")
    return not peer


def final_models_below(base):
    """Every final_model.pt below a folder, also behind links; a folder that they lead to again, as wandb's do, counts once."""
    seen = set()
    for folder, below, names in os.walk(base, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            below.clear()  # or a circle of links would go on for long
        elif "final_model.pt" in names:
            yield Path(folder, "final_model.pt")
        seen.add(place)
        below.sort(key=lambda name: os.path.islink(os.path.join(folder, name)))  # a run goes by its own name


def find_checkpoints(words):
    """The checkpoint files named, and every final_model.pt below the folders named, but for peers. Raises UserError."""
    found = []
    for path in map(Path, words):
        files = sorted(filter(loads_again, final_models_below(path))) if os.path.isdir(path) else [path]
        if not files:
            raise vqvae.UserError(f"checkpoint: no final_model.pt to evaluate below {path}; give the folder of a finished run "
                                  "or a checkpoint")
        found += files
    folders = [os.path.realpath(path.parent) for path in found]
    if len(set(folders)) < len(folders):
        raise vqvae.UserError("checkpoint: two of these share a folder, and so the file of their metrics; evaluate one at a time")
    return found


def parse(argv):
    parser = train.Parser(__doc__)
    parser.add_argument("--checkpoint", nargs="+", required=True, metavar="PATH",
                        help="checkpoints, or folders: every final_model.pt below, but for peers")
    parser.add_argument("--data_dir", metavar="DIR", help="where the data set is (default: as in training)")
    parser.add_argument("--test_subset", type=train.whole(1), metavar="N",
                        help="only the first N test images (default: as in training)")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, mps, cuda or cuda:N (default auto)")
    parser.add_argument("--batch_size", type=train.whole(1), default=100, metavar="N",
                        help="images at once, at most (default 100; fewer of large ones)")
    parser.add_argument("--inception", metavar="FILE", help=f"{INCEPTION_NAME} (default: cache, else downloaded)")
    parser.add_argument("--mode", default="clean", choices=("clean", "legacy_pytorch"),
                        help="resizing to 299 pixels: clean (Pillow, antialiased bicubic) or legacy_pytorch (PyTorch, "
                             "bilinear); the network is the same")
    parser.add_argument("--refine", type=train.whole(0), default=0, metavar="N",
                        help="passes through the decoder that improve the codes (default 0)")
    parser.add_argument("--no_fid", action="store_true", help="leave out r-FID and r-IS")
    return parser.parse_args(argv)


def with_images(config, options):
    """A Config with the test images that the options name."""
    changes = {key: getattr(options, key) for key in ("data_dir", "test_subset") if getattr(options, key) is not None}
    return dataclasses.replace(config, **changes)


def check(path, options):
    """Raise UserError where a checkpoint cannot be evaluated, before any work is done."""
    config = with_images(vqvae.load_model(path)[1], options)
    vqvae.check_writable(path.parent / "eval_metrics.json")
    try:
        count = len(vqvae.test_items(config))
    except vqvae.UserError as error:
        raise vqvae.UserError(f"{path}: {error}") from error
    if count < 10 and not options.no_fid:
        raise vqvae.UserError(f"test_subset: r-IS needs at least 10 images, not {count}; raise it or add --no_fid")


def evaluate_checkpoint(path, options, device, inception, originals):
    """All metrics of one checkpoint; `inception` is None to leave out r-FID and r-IS.

    originals: `known` of shared_features.
    """
    model, config = vqvae.load_model(path, device)
    config = with_images(config, options)
    images = vqvae.test_images(config)
    print(f"{path}: {len(images)} test images of {config.dataset}", flush=True)
    size, refine = config.codebook_size, options.refine
    batch_size = min(options.batch_size, vqvae.evaluation_batch(images.shape[1], device))
    histogram = vqvae.empty_histogram(model, size)
    metrics = {"checkpoint": str(path), "dataset": config.dataset, "codebook_size": size, "refine": refine,
               **vqvae.evaluate(model, images, size, batch_size, refine=refine, histogram=histogram)}
    if inception is not None:
        features = shared_features(config, images, inception, batch_size, originals)
        metrics.update(inception_metrics(model, images, features, inception, batch_size, refine), **inception.source)
    vqvae.write_json(path.parent / "eval_metrics.json", metrics)
    vqvae.write_pictures(path.parent, model, images, config, metrics, histogram, refine, path.stem)
    return metrics


def print_table(rows):
    columns = {"psnr": ".3f", "psnr_per_image": ".3f", "psnr_y": ".3f", "ssim": ".4f", "codebook_size": "d", "perplexity": ".1f",
               "usage_rate": ".2%", "bits_per_index": ".3f", "num_images": "d", "rfid": ".3f", "ris": ".3f", "ris_std": ".3f"}
    columns = {key: form for key, form in columns.items() if any(key in row for row in rows)}
    lines = [["checkpoint", *columns]]
    lines += [[row["checkpoint"], *(format(row[key], form) if key in row else "-" for key, form in columns.items())]
              for row in rows]
    print("\n".join(analysis.aligned(lines)))


def main(argv=None):
    options = parse(argv)
    paths = find_checkpoints(options.checkpoint)
    device, reason = vqvae.pick_device(options.device)
    print(f"device: {device} ({reason})")
    for path in paths:
        check(path, options)
    inception, missing = None, None
    if not options.no_fid:
        try:
            inception = Inception(find_inception(options.inception), options.mode, device)
        except vqvae.UserError as error:
            if options.inception is not None:
                raise
            missing = error
    originals = {}
    rows = [evaluate_checkpoint(path, options, device, inception, originals) for path in paths]
    print_table(rows)
    if missing is not None:
        vqvae.complain(f"error: r-FID and r-IS are missing: {missing}; or give it as --inception FILE")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
