"""Published quantizers, as modules that train in vqvae.VQVAE: z (B, D, H, W) -> (z_q, indices, loss).

Those of vector-quantize-pytorch are taken from it (pip install vector-quantize-pytorch); the others are a few lines
from their formulas. Each builder takes the run's Config; PEERS names them. Settings stand here as tuned on the
validation split (results/LOG.md); METHODS in compare.py adds the settings of the loop.

    Sinkhorn    Zhang et al. 2024, Preventing Local Pitfalls in Vector Quantization via Optimal Transport (OptVQ),
                arXiv 2412.15195
    SQ-VAE      Takida et al. 2022, SQ-VAE: Variational Bayes on Discrete Representation with Self-annealed Stochastic
                Quantization, arXiv 2205.07547
    CVQ         Zheng & Vedaldi 2023, Online Clustered Codebook, ICCV
    Wasserstein Fang et al. 2025, Enhancing Vector Quantization with Distributional Matching, arXiv 2506.15078
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vqvae


class FromLibrary(nn.Module):
    """A module of vector-quantize-pytorch behind the triple, in float32 whatever autocast says."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, z):
        with torch.autocast(z.device.type, enabled=False):
            z_q, indices, *loss = self.module(z.float())
        loss = loss[0].sum() if loss else z_q.new_zeros(())  # FSQ has none
        return vqvae.Quantized(z_q.to(z.dtype), indices.long(), loss)


def library():
    """The vector_quantize_pytorch package. Raises UserError where it is missing."""
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise vqvae.UserError("this peer needs vector-quantize-pytorch: pip install vector-quantize-pytorch") from error
    return vector_quantize_pytorch


def ema(config, **options):
    """VectorQuantize: EMA codebook, k-means start, dead-code expiry; more options override."""
    vectors_per_code = config.batch_size * config.latents / config.codebook_size
    options = {"decay": config.ema_decay, "kmeans_init": True, "commitment_weight": config.commitment_weight,
               "threshold_ema_dead_code": 0.1 * vectors_per_code, "rotation_trick": False, **options}
    return FromLibrary(library().VectorQuantize(config.latent_dim, config.codebook_size, accept_image_fmap=True, **options))


def simvq(config):
    return FromLibrary(library().SimVQ(config.latent_dim, config.codebook_size, channel_first=True, rotation_trick=False))


FSQ_LEVELS = {512: [8, 8, 8], 1024: [8, 8, 4, 4], 4096: [8, 8, 8, 8], 16384: [8, 8, 8, 8, 4]}


def fsq(config):
    if config.codebook_size not in FSQ_LEVELS:
        raise vqvae.UserError(f"codebook_size: FSQ levels are given for {sorted(FSQ_LEVELS)}, not {config.codebook_size}")
    levels = FSQ_LEVELS[config.codebook_size]
    return FromLibrary(library().FSQ(levels, dim=config.latent_dim, channel_first=True))


def lfq(config):
    if config.codebook_size & (config.codebook_size - 1):
        raise vqvae.UserError(f"codebook_size: LFQ needs a power of two, not {config.codebook_size}")
    return FromLibrary(library().LFQ(dim=config.latent_dim, codebook_size=config.codebook_size, entropy_loss_weight=0.01,
                                     commitment_loss_weight=0.1))


class Sinkhorn(vqvae.VQEMAQuantizer):
    """OptVQ-style: in training each batch is assigned by a balanced transport plan, in evaluation to the nearest code."""

    epsilon, iterations = 0.02, 5  # temperature relative to the mean distance of the batch

    def assign(self, z, length, weights):
        cost = torch.cdist(z, self.codebook).square_()  # (N, K)
        log_plan = cost.div_(-self.epsilon * cost.mean())
        for _ in range(self.iterations):
            log_plan -= torch.logsumexp(log_plan, 0)  # every code the same mass
            log_plan -= torch.logsumexp(log_plan, 1, keepdim=True)  # every latent one
        indices = log_plan.argmax(1)  # (N,)
        stats = torch.zeros_like(self.ema).index_add_(0, indices, F.pad(z, (0, 1), value=1.0))
        return indices, vqvae.all_reduce(stats)


class CVQ(vqvae.VQEMAQuantizer):
    """CVQ: codes move to their closest latent of the batch, the more the less they are used (equations 5 to 7)."""

    def update(self, z, stats):
        self.average(stats)
        share = self.ema[:, -1:] / self.ema[:, -1].sum()  # (K, 1) running average of use
        alpha = torch.exp(-share * self.codebook_size * 10 / (1 - self.ema_decay) - 1e-3)
        codes = torch.where(self.ema[:, -1:] > 1e-6, self.ema[:, :-1] / self.ema[:, -1:].clamp_min(1e-6), self.codebook)
        anchors = z[vqvae.nearest_code(codes, z)]  # (K, D)
        codes = torch.lerp(codes, anchors, alpha)
        self.codebook.copy_(codes)
        self.ema[:, :-1] = codes * self.ema[:, -1:]


class Wasserstein(nn.Module):
    """Wasserstein VQ: codes learned by gradient, with codebook and commitment loss (van den Oord 2017, equation 3), plus the
    2-Wasserstein distance between Gaussian fits of latents and codes (its equation 6)."""

    weight = 0.02  # of that distance

    def __init__(self, config):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.latent_dim))
        self.commitment_weight = config.commitment_weight
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, z):
        with torch.autocast(z.device.type, enabled=False):
            rows = z.permute(0, 2, 3, 1).float()  # (B, H, W, D)
            flat = rows.reshape(-1, rows.shape[-1])  # (N, D)
            if self.training and not self.started:  # start at the data, as the others do
                with torch.no_grad():
                    self.codebook.copy_(vqvae.sample_rows(flat, len(self.codebook)))
                    self.codebook.add_(torch.randn_like(self.codebook), alpha=0.1 * flat.std().item())
                    self.started.fill_(True)
            indices = vqvae.nearest_code(flat.detach(), self.codebook.detach())
            quantized = self.codebook[indices]
            loss = F.mse_loss(quantized, flat.detach()) + self.commitment_weight * F.mse_loss(flat, quantized.detach())
            if self.training:
                loss = loss + self.weight * self.distance(flat)
            quantized = flat + (quantized - flat).detach()
        z_q = quantized.view(rows.shape).permute(0, 3, 1, 2).to(z.dtype)
        return vqvae.Quantized(z_q, indices.view(rows.shape[:-1]), loss)

    def distance(self, rows):
        """Of the Gaussian with the moments of latents rows (N, D), which get no gradient, to that of the codes, ()."""
        def moments(x):
            mean = x.mean(0)
            return mean, (x - mean).T @ (x - mean) / len(x) + 1e-5 * torch.eye(x.shape[1], device=x.device)

        (m1, c1), (m2, c2) = moments(rows), moments(self.codebook)
        values, vectors = torch.linalg.eigh(c1.detach())
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T  # c1^(1/2)
        # tr (c1^1/2 c2 c1^1/2)^1/2: gradients to the codes through eigenvalues alone, which is stable
        cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(1e-12).sqrt().sum()
        squared = (m1.detach() - m2).square().sum() + c1.detach().trace() + c2.trace() - 2 * cross
        return squared.clamp_min(1e-12).sqrt()


class SQVAE(nn.Module):
    """SQ-VAE, Gaussian type I: a code drawn from P ~ exp(-d / 2 s^2) with learned s, by Gumbel softmax in training.

    Loss per image: sum of P log P plus |z - z_q|^2 / 2 s^2 (its equation 12), weighted as against the likelihood
    3 S^2 / 2 log MSE with learned variance, linearised at an MSE of 0.005. The Gumbel temperature falls from 1 to 0.05.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = vqvae.RECON_WEIGHT * 2 * 0.005 / (3 * config.image_size**2)
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.latent_dim))
        self.log_variance = nn.Parameter(torch.tensor(math.log(0.1)))
        self.gumbel_temperature = 1.0

    def set_progress(self, progress):
        self.gumbel_temperature = 0.05 ** progress

    def forward(self, z):
        with torch.autocast(z.device.type, enabled=False):
            rows = z.permute(0, 2, 3, 1).float()  # (B, H, W, D)
            flat = rows.reshape(-1, rows.shape[-1])  # (N, D)
            precision = 0.5 * torch.exp(-self.log_variance)
            indices = vqvae.nearest_code(flat.detach(), self.codebook.detach())
            if self.training:
                distances = flat.square().sum(1, keepdim=True) - 2 * flat @ self.codebook.T + self.codebook.square().sum(1)
                log_p = torch.log_softmax(-precision * distances, 1)  # (N, K)
                quantized = F.gumbel_softmax(log_p, self.gumbel_temperature) @ self.codebook
                energy = (log_p.exp() * log_p).sum() + precision * (flat - quantized).square().sum()
            else:
                quantized = self.codebook[indices]
                energy = precision * (flat - quantized).square().sum()
        z_q = quantized.view(rows.shape).permute(0, 3, 1, 2).to(z.dtype)
        return vqvae.Quantized(z_q, indices.view(rows.shape[:-1]), self.weight * energy / len(z))


def own(kind):
    """Builder of a subclass of vqvae.VQEMAQuantizer."""
    return lambda config: kind(config.codebook_size, config.latent_dim, ema_decay=config.ema_decay,
                               commitment_weight=config.commitment_weight, restart_threshold=config.restart_threshold)


PEERS = {
    "lib_ema": ema,
    "lib_rotation": lambda config: ema(config, rotation_trick=True),
    "lib_cosine": lambda config: ema(config, use_cosine_sim=True),
    "lib_low_dim": lambda config: ema(config, codebook_dim=4),
    "lib_simvq": simvq,
    "lib_fsq": fsq,
    "lib_lfq": lfq,
    "sinkhorn": own(Sinkhorn),
    "cvq": own(CVQ),
    "wasserstein": Wasserstein,
    "sq_vae": SQVAE,
}
