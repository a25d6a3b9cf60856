"""Training throughput: this project's loop against the classical way, same network, codebook size and batch.

    python benchmarks/throughput.py                                  # hidden 128, D 256, K 512, batch 256
    python benchmarks/throughput.py --hidden_dim 64 --latent_dim 8 --batch_size 128 --prediction scaled     # with 16 states
    python benchmarks/throughput.py --compile                        # and the same with compiled networks

The classical way: float32, NCHW, a DataLoader with worker processes that converts and normalises image by image, one-hot EMA
statistics, `.item()` of every loss at every step (on the CPU it profits from the memory that vqvae.train keeps). All run in
turn, `--rounds` times; the ratio is that of the medians. Also measured: the network alone (no quantizer), and what the input
pipeline, the code histogram and the evaluation of the validation split add to an epoch. The floor is operations and bytes of
a step over the matrix and copy rates measured in the same run; of the quantizer, those without additions. The classical way
has no prediction and no trellis, nor has this project here unless asked. `ba_vq` has the first temperature, another model the
last, which almost half of training has. Images are dead leaves. Writes results/speed/throughput_DEVICE_SIZE.json, SIZE its hidden
width, residual blocks, D, K and batch, then prediction and trellis unless none, the optimizer unless adamw, and, where they are
not the default, pixels per side and per latent, and the precision.
"""

import dataclasses
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # before PyTorch: says how its threads wait

# isort: split
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from torch.utils.flop_counter import FlopCounterMode

import vqvae
from quantizer_step import RESULTS, floor_seconds, machine_rates, rates_line, seconds


class OneHotEMA(torch.nn.Module):
    """VQ-VAE's EMA quantizer as it is usually written (van den Oord 2017, appendix A.1)."""

    decay, commitment_weight = 0.99, 0.25

    def __init__(self, codebook_size, dim):
        super().__init__()
        self.register_buffer("codebook", torch.randn(codebook_size, dim))
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("sums", self.codebook.clone())

    def forward(self, z):
        rows = z.permute(0, 2, 3, 1).contiguous()  # (B, H, W, D)
        flat = rows.view(-1, rows.shape[-1])  # (N, D)
        distances = flat.square().sum(1, keepdim=True) + self.codebook.square().sum(1) - 2 * flat @ self.codebook.T
        one_hot = F.one_hot(distances.argmin(1), len(self.codebook)).float()  # (N, K)
        quantized = (one_hot @ self.codebook).view(rows.shape)
        if self.training:
            with torch.no_grad():
                self.counts.lerp_(one_hot.sum(0), 1 - self.decay)
                self.sums.lerp_(one_hot.T @ flat, 1 - self.decay)
                self.codebook.copy_(self.sums / (self.counts[:, None] + 1e-5))
        loss = self.commitment_weight * F.mse_loss(rows, quantized.detach())
        quantized = rows + (quantized - rows).detach()
        return quantized.permute(0, 3, 1, 2), one_hot.argmax(1).view(rows.shape[:-1]), loss


class Images(torch.utils.data.Dataset):
    """One PIL image at a time, as torchvision's CIFAR-10 gives them."""

    def __init__(self, images):
        self.images, self.transform = images, T.Compose([T.ToPILImage(), T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index].permute(2, 0, 1))


def classical_epoch(config, images, device):
    """A function that trains one epoch the classical way."""
    torch.manual_seed(0)
    model = vqvae.VQVAE(OneHotEMA(config.codebook_size, config.latent_dim), config.hidden_dim, config.latent_dim,
                        config.downsample, config.res_blocks).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    loader = torch.utils.data.DataLoader(Images(images), config.batch_size, shuffle=True, drop_last=True,
                                         num_workers=min(4, os.cpu_count()), persistent_workers=True)
    losses = []

    def epoch():
        model.train()
        for x in loader:
            x = (x.to(device) + 1) / 2
            y, _, quantizer_loss = model(x)
            loss = F.mse_loss(y, x) + quantizer_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return epoch


def project_epoch(config, images, device, quantize=True, pipeline=True, progress=0.0):
    """(A function that trains one epoch in the steps of vqvae.train, its model); without `pipeline` every step sees one batch.

    The learning rate stays as at the start, the temperature as at this share of training.
    """
    model = vqvae.make_model(config).to(device, memory_format=vqvae.memory_format(device)).train()
    model.quantizer.set_progress(progress)
    if config.compile:
        model.encoder.compile()
        model.decoder.compile()
    optimizer, take_step = vqvae.make_optimizer(model, config.lr, config.optimizer), vqvae.fastest_step(model)
    dtype, _ = vqvae.pick_precision(config.precision, device)
    images = images.to(device)
    histogram = vqvae.empty_histogram(model, config.codebook_size)
    fixed = vqvae.to_float(images[:config.batch_size])

    def epoch():
        order = vqvae.epoch_order(len(images), 0, 0).to(device)
        for i in range(len(images) // config.batch_size):
            x = vqvae.to_float(images[order[i * config.batch_size:(i + 1) * config.batch_size]]) if pipeline else fixed
            _, indices = take_step(model, optimizer, x, dtype, quantize=quantize)
            if pipeline and indices is not None:
                vqvae.count_codes(histogram, model, indices)
    return epoch, model


def step_floor(config, device):
    """Least seconds of one training step: network plus BA-VQ quantizer, each bound by operations or bytes. A dict.

    Operations are counted, without the optimizer's; bytes are those kept for the backward pass, written and read once, and
    AdamW's parameters, gradients and two moments, read and written.
    """
    model = vqvae.make_model(config).to(device, memory_format=vqvae.memory_format(device)).train()
    dtype, _ = vqvae.pick_precision(config.precision, device)
    side = config.image_size
    x = torch.rand(config.batch_size, 3, side, side, device=device).contiguous(memory_format=vqvae.memory_format(device))
    kept = {}  # address: bytes

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with vqvae._autocast(device, dtype):
            y = model(x, quantize=False).images
        F.mse_loss(y.float(), x).backward()
    parameters = 4 * sum(p.numel() for p in model.parameters())
    moved = 2 * sum(kept.values()) + 8 * parameters
    network, exact = machine_rates(device, dtype), machine_rates(device)
    flops = counter.get_total_flops()
    n = config.batch_size * config.latents
    least = {"network": max(flops / network["flops_per_second"], moved / network["copy_bytes_per_second"]),
             "quantizer": floor_seconds(n, config.codebook_size, config.latent_dim, exact)}
    return {"network_flops": flops, "network_bytes": moved, "precision": str(dtype)[6:], "network_rates": network,
            "quantizer_rates": exact, "seconds": least}


def parse(argv):
    parser = train.Parser(__doc__)
    parser.add_argument("--steps", type=train.whole(1), default=12, metavar="N", help="steps per round (default 12)")
    parser.add_argument("--rounds", type=train.whole(1), default=5, metavar="N", help="rounds, alternating (default 5)")
    options, words = parser.parse_known_args(argv)
    full_size = ["--latent_dim", "256", "--batch_size", "256", "--prediction", "none"]
    config = train.config_to_run([*full_size, *words, "--no_wandb"])
    if "--quantizer" in {word.split("=")[0] for word in words}:
        raise vqvae.UserError("quantizer: all are measured here; drop it")
    if config.metric != "euclid":
        raise vqvae.UserError("metric: the classical way is euclid; drop it here")
    return options, config


def size_name(config):
    """What of a config decides its speed, for the name of the JSON."""
    name = f"h{config.hidden_dim}x{config.res_blocks}_d{config.latent_dim}_k{config.codebook_size}_b{config.batch_size}"
    if config.prediction != "none" or config.states:
        name += f"_{config.prediction}{config.states}"
    if (config.image_size, config.downsample) != (32, 4):
        name += f"_{config.image_size}by{config.downsample}"
    if config.optimizer != "adamw":
        name += f"_{config.optimizer}"
    return name if config.precision == "auto" else f"{name}_{config.precision}"


def main(argv=None):
    options, config = parse(argv)
    device, _ = vqvae.pick_device(config.device)
    if device.type == "cpu":
        vqvae.keep_freed_memory()
    images = vqvae.dead_leaves(range(options.steps * config.batch_size), config.image_size, seed=0)
    own = {name: dataclasses.replace(config, quantizer=name, compile=False) for name in ("vq_ema", "ba_vq")}
    project, model = project_epoch(own["ba_vq"], images, device)
    epochs = {
        "classical": classical_epoch(config, images, device),
        "ba_vq": project,
        "ba_vq, last temperature": project_epoch(own["ba_vq"], images, device, progress=1.0)[0],
        "vq_ema": project_epoch(own["vq_ema"], images, device)[0],
        "ba_vq, same batch": project_epoch(own["ba_vq"], images, device, pipeline=False)[0],
        "no quantizer": project_epoch(own["ba_vq"], images, device, quantize=False, pipeline=False)[0],
    }
    if config.compile:
        compiled = dataclasses.replace(own["ba_vq"], compile=True)
        epochs["ba_vq, compiled"] = project_epoch(compiled, images, device)[0]
    RESULTS.mkdir(parents=True, exist_ok=True)
    vqvae.check_writable(RESULTS / "throughput.json")
    for epoch in epochs.values():
        epoch()  # warm-up, worker processes
    times = {name: [] for name in epochs}
    for _ in range(options.rounds):
        for name, epoch in epochs.items():
            times[name].append(seconds(epoch, device))
    rate = {name: len(images) / statistics.median(t) for name, t in times.items()}
    some, dtype = images[:5000], vqvae.pick_precision(config.precision, device)[0]
    evaluation = min(seconds(lambda: vqvae.evaluate(model, some, config.codebook_size, dtype=dtype), device)
                     for _ in range(2)) / len(some)  # the first warms up
    ratios = {f"{name} / classical": rate[name] / rate["classical"] for name in ("ba_vq", "vq_ema")}
    for name in ("ba_vq", "ba_vq, last temperature"):
        ratios[f"vq_ema / {name}"] = rate["vq_ema"] / rate[name]
    if config.compile:
        ratios["ba_vq, compiled / ba_vq"] = rate["ba_vq, compiled"] / rate["ba_vq"]
    ratios["input pipeline and histogram, share of an epoch"] = 1 - rate["ba_vq"] / rate["ba_vq, same batch"]
    # 5,000 validation images per 45,000 training images
    ratios["evaluation of the validation split, share of an epoch"] = evaluation * 5000 / (45000 / rate["ba_vq"])
    floor = step_floor(own["ba_vq"], device)
    least = sum(floor["seconds"].values())
    ratios["ba_vq step / floor"] = config.batch_size / rate["ba_vq"] / least
    ratios["network step / floor"] = config.batch_size / rate["no quantizer"] / floor["seconds"]["network"]
    vqvae.write_json(RESULTS / f"throughput_{device.type}_{size_name(config)}.json", {
        "machine": vqvae.machine(device), "config": config.to_dict(), "images_per_second": rate, "ratios": ratios, "floor": floor,
        "raw": times})
    for part in ("network", "quantizer"):
        print(f"floor of the {part}: {floor['seconds'][part] * 1e3:.3g} ms a step; {rates_line(floor[f'{part}_rates'])}")
    print(f"{'floor':24s} {config.batch_size / least:8.0f} img/s")
    for name, value in rate.items():
        print(f"{name:24s} {value:8.0f} img/s")
    for name, value in ratios.items():
        print(f"{name}: {value:.3g}")


if __name__ == "__main__":
    sys.exit(vqvae.run_command(main))
