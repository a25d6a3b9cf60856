"""Train a small generator of images on the code indices of each run, and measure how well it knows and makes them.

    python benchmarks/generator.py --checkpoint experiments/compare --inception experiments/classifier.pt

For each run below the folders, a transformer learns to predict every index of the training images from those before it, in the
order in which they are coded. generator_metrics.json, in the folder of the run, then holds what the indices of test images
cost by its predictions, and how far images that it makes are from the test images: the Fréchet distance of features of
--inception, a file of benchmarks/classifier.py or clean-fid's Inception. generated.png shows some of them. Runs that have
the file are skipped.
"""

import math
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before PyTorch: says how its threads wait

# isort: split
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from tqdm import tqdm

import eval_cifar
import export_codes
import vqvae

BATCH_SIZE, INCEPTION_BATCH = 64, 100
DIM, HEADS, LAYERS = 128, 4, 4
LR = 3e-3  # peak


class Block(nn.Module):
    """A layer of a transformer (Vaswani et al. 2017), normalised first: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, past=None):
        """past: keys and values (2, B, heads, t, C / heads) of the t places before; also returned, with those of x."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, C / heads)
        seen = torch.stack([k, v])
        if past is not None:
            seen = torch.cat([past, seen], 3)
        scores = (q @ seen[0].mT).float() * q.shape[-1] ** -0.5  # (B, heads, T, t + T); by hand, as PyTorch's is slow on CPUs
        ahead = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1 + scores.shape[3] - scores.shape[2])
        y = scores.masked_fill(ahead, -math.inf).softmax(3).to(v.dtype) @ seen[1]
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x), seen


class Generator(nn.Module):
    """Logits of each index given those before it: indices (B, T), in coding order, -> (B, T, K).

    halves: how many places each half of the checkerboard has, or (T,) without prediction; base: of the trellis, 1 without. It
    sees the indices before as the codes that they stand for; with a trellis these say which codes the next may stand for.
    """

    def __init__(self, codebook_size, halves, base):
        super().__init__()
        self.halves, self.base, self.size = halves, base, codebook_size // base  # size: of a subset
        codes = base * codebook_size
        self.start = len(halves) * codes  # stands for nothing before
        self.codes = nn.Embedding(self.start + 1, DIM)
        self.places = nn.Parameter(torch.empty(sum(halves), DIM))
        self.blocks = nn.ModuleList(Block(DIM, HEADS) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)
        self.heads = nn.ModuleList(nn.Linear(DIM, codes) for _ in halves)
        for table in (self.codes.weight, self.places):
            nn.init.normal_(table, std=0.02)

    def _numbers(self, half, subsets, indices):
        """Numbers (B, n) of the codes that indices (B, n) of a half stand for, which may be of subsets (B, n, base)."""
        its = subsets.gather(2, (indices // self.size)[..., None]).squeeze(2)
        return (half * self.base ** 2 + its) * self.size + indices % self.size

    def _logits(self, half, subsets, x):
        """(B, n, K), of the codes that places of a half may choose, in the order of their indices; x (B, n, C)."""
        rows = self.heads[half](self.norm(x)).view(-1, self.size)  # (B n base^2, codes of a subset)
        first = torch.arange(0, len(rows), self.base**2, device=x.device).view(*x.shape[:2], 1)
        return F.embedding(first + subsets, rows).flatten(2)

    def forward(self, indices):
        branches, subsets, numbers = vqvae.branches(self.base, indices.device), [], []
        for half, its in enumerate(indices.split(self.halves, 1)):
            digits = F.pad(its // self.size, (2, 0))  # (B, n + 2)
            subsets.append(branches[digits[:, :-2], digits[:, 1:-1]])  # (B, n, base)
            numbers.append(self._numbers(half, subsets[half], its))
        before = F.pad(torch.cat(numbers, 1)[:, :-1], (1, 0), value=self.start)
        x = self.codes(before) + self.places  # (B, T, C)
        for block in self.blocks:
            x, _ = block(x)
        return torch.cat([self._logits(half, subsets[half], part) for half, part in enumerate(x.split(self.halves, 1))], 1)

    @torch.no_grad()
    def sample(self, count, random):
        """Indices (count, T), in coding order, drawn one after the other; random: a torch.Generator on the CPU."""
        device = self.places.device
        branches, pasts, drawn = vqvae.branches(self.base, device), [None] * len(self.blocks), []
        number = torch.full((count, 1), self.start, device=device)
        for half, places in enumerate(self.places.split(self.halves)):
            digits = torch.zeros(count, 2, dtype=torch.int64, device=device)  # the last two
            for place in places:
                x = self.codes(number) + place  # (B, 1, C)
                for layer, block in enumerate(self.blocks):
                    x, pasts[layer] = block(x, pasts[layer])
                subsets = branches[digits[:, :1], digits[:, 1:]]  # (B, 1, base)
                probabilities = self._logits(half, subsets, x).float().softmax(2).squeeze(1)  # (B, K)
                index = torch.multinomial(probabilities.cpu(), 1, generator=random).to(device)
                number = self._numbers(half, subsets, index)
                digits = torch.cat([digits[:, 1:], index // self.size], 1)
                drawn.append(index)
        return torch.cat(drawn, 1)


def coding_order(model, side):
    """(places (T,) of a grid of side x side in the order in which they are coded, how many each half has)."""
    quantizer = model.quantizer
    grid = torch.arange(side**2).view(1, side, side)
    if isinstance(quantizer, vqvae.PredictiveQuantizer):
        halves = [half[0] for half in vqvae.split_halves(grid)]
    else:
        halves = [grid.flatten()]
    if quantizer.trellis:
        halves = [half[vqvae.path_order(len(half))[0]] for half in halves]
    return torch.cat(halves), [len(half) for half in halves]


def fit(network, indices, epochs, seed, dtype):
    """Train a Generator on indices (N, T), N >= BATCH_SIZE."""
    steps = len(indices) // BATCH_SIZE
    optimizer = vqvae.make_optimizer(network, LR, "adamw")
    for epoch in range(epochs):
        started, losses = time.perf_counter(), []
        order = vqvae.epoch_order(len(indices), seed, epoch).to(indices.device)
        batches = tqdm(order.split(BATCH_SIZE)[:steps], desc=f"epoch {epoch + 1}/{epochs}", disable=None, leave=False)
        for step, batch in enumerate(batches, epoch * steps):
            vqvae.set_learning_rate(optimizer, vqvae.learning_rate(step, epochs * steps, LR))
            with torch.autocast(indices.device.type, dtype, enabled=dtype == torch.bfloat16):
                logits = network(indices[batch])
            loss = F.cross_entropy(logits.float().flatten(0, 1), indices[batch].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        bits = torch.stack(losses).mean().item() / math.log(2)
        print(f"epoch {epoch + 1}/{epochs}  {bits:.3f} bits per index  {time.perf_counter() - started:.0f} s", flush=True)


@torch.no_grad()
def bits_per_index(network, indices):
    """Mean of -log2 p(index | those before it) over indices (N, T)."""
    nats = [F.cross_entropy(network(batch).flatten(0, 1), batch.flatten(), reduction="sum")
            for batch in indices.split(BATCH_SIZE)]
    return torch.stack(nats).cpu().double().sum().item() / indices.numel() / math.log(2)


@torch.no_grad()
def generate(network, model, places, count, seed):
    """`count` images uint8 (count, S, S, 3) on the CPU, of drawn indices; places: of `coding_order`."""
    random = torch.Generator().manual_seed(seed)
    side = math.isqrt(len(places))
    sizes = [len(part) for part in torch.arange(count).split(500)]
    indices = torch.cat([network.sample(n, random).cpu() for n in tqdm(sizes, desc="sampling", disable=None)])
    return export_codes.decode(model, indices[:, places.argsort()].view(-1, side, side))


def write_picture(path, images):
    """PNG: images uint8 (N, S, S, 3), sixteen in a row."""
    grid = torchvision.utils.make_grid(images.permute(0, 3, 1, 2), nrow=16, padding=2, pad_value=255)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    scale = max(1, 64 // images.shape[1])
    picture = picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)
    vqvae.atomic_write(path, lambda file: picture.save(file, "PNG"))


def figures_of(checkpoint):
    return checkpoint.with_name("generator_metrics.json")


def wanted(path, options, inception):
    """Whether a checkpoint has no figures yet. Raises UserError where they are of something else or cannot be had."""
    figures = figures_of(path)
    if os.path.exists(figures):
        record = vqvae.read_json(figures)
        record["checkpoint"] = Path(str(record.get("checkpoint"))).name
        given = {"checkpoint": path.name, "epochs": options.epochs, "inception_sha256": inception.source["inception_sha256"]}
        for name, value in given.items():
            if record.get(name) != value:
                raise vqvae.UserError(f"{figures}: its {name} is {record.get(name)}, not {value}; move it away")
        print(f"kept: {figures}")
        return False
    config = eval_cifar.with_images(vqvae.load_model(path)[1], options)
    vqvae.check_writable(figures)
    try:
        trained, tested = len(vqvae.training_items(config)[0]), len(vqvae.test_items(config))
    except vqvae.UserError as error:
        raise vqvae.UserError(f"{path}: {error}") from error
    if trained < BATCH_SIZE or tested < 10:
        raise vqvae.UserError(f"{path}: of {trained} training and {tested} test images; needs {BATCH_SIZE} and 10")
    return True


def measure(path, options, device, inception, originals):
    """Train a generator on the indices of a run; write its figures, and a picture of its images, beside the checkpoint.

    originals: `known` of eval_cifar.shared_features.
    """
    model, config = vqvae.load_model(path, device)
    config = eval_cifar.with_images(config, options)
    train_set, val_set = vqvae.training_images(config)
    test_set = vqvae.test_images(config)
    print(f"{path}: {len(train_set)} training images, K = {config.codebook_size}", flush=True)
    places, halves = coding_order(model, config.image_size // config.downsample)
    splits = {"train": train_set, "test": test_set, **({"val": val_set} if len(val_set) else {})}
    indices = {name: export_codes.encode(model, images).flatten(1)[:, places].to(device) for name, images in splits.items()}
    torch.manual_seed(config.seed)
    network = Generator(config.codebook_size, halves, vqvae.trellis_base(model.quantizer.trellis)).to(device)
    fit(network, indices.pop("train"), options.epochs, config.seed, vqvae.pick_precision("auto", device)[0])
    made = generate(network, model, places, len(test_set), config.seed)
    features, probabilities = eval_cifar.seen(made, inception, INCEPTION_BATCH, "made")
    known = eval_cifar.shared_features(config, test_set, inception, INCEPTION_BATCH, originals)
    mean, deviation = eval_cifar.inception_score(probabilities)
    metrics = {"checkpoint": str(path), "epochs": options.epochs, "seed": config.seed, "num_images": len(test_set),
               **{f"{name}_bits_per_index": bits_per_index(network, its) for name, its in indices.items()},
               "gfid": eval_cifar.frechet_distance(known, features), "gis": mean, "gis_std": deviation,
               **inception.source, **vqvae.machine(device)}
    write_picture(path.with_name("generated.png"), made[:64])
    vqvae.write_json(figures_of(path), metrics)
    print(f"{path}: {metrics['test_bits_per_index']:.3f} bits per index, gFID {metrics['gfid']:.2f}, gIS {mean:.2f}", flush=True)


def parse(argv):
    parser = train.Parser(__doc__)
    parser.add_argument("--checkpoint", nargs="+", required=True, metavar="PATH",
                        help="checkpoints, or folders: every final_model.pt below, but for peers")
    parser.add_argument("--inception", metavar="FILE", help="network of the features (default: as eval_cifar.py)")
    parser.add_argument("--epochs", type=train.whole(1), default=4, metavar="N", help="over the training set (default 4)")
    parser.add_argument("--data_dir", metavar="DIR", help="where the data set is (default: as in training)")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, mps, cuda or cuda:N (default auto)")
    parser.set_defaults(test_subset=None)  # for with_images: as in training
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    device, reason = vqvae.pick_device(options.device)
    print(f"device: {device} ({reason})")
    if device.type == "cpu":
        vqvae.keep_freed_memory()
    paths = eval_cifar.find_checkpoints(options.checkpoint)
    inception, originals = eval_cifar.Inception(eval_cifar.find_inception(options.inception), "clean", device), {}
    paths = [path for path in paths if wanted(path, options, inception)]  # everything is checked before any work
    for path in paths:
        measure(path, options, device, inception, originals)


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
