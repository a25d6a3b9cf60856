"""benchmarks/peers.py: every peer trains in the loop, and those written from formulas obey them."""

import math
import sys

import pytest
import torch
from conftest import ROOT

import vqvae

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers

SIZES = {"lib_fsq": 512, "lib_lfq": 512}  # those two allow certain K only


@pytest.mark.parametrize("name", peers.PEERS)
def test_trains_in_the_loop(name, tiny_config):
    config = tiny_config(name=name, codebook_size=SIZES.get(name, 16), quantizer="vq_ema")
    torch.manual_seed(0)
    metrics = vqvae.train(config, peers.PEERS[name](config))
    assert 0 < metrics["usage_rate"] <= 1 and 8 < metrics["psnr"] < 40
    assert metrics["perplexity"] <= config.codebook_size


@pytest.mark.parametrize("name", peers.PEERS)
def test_triple_and_eval(name, tiny_config):
    config = tiny_config(codebook_size=SIZES.get(name, 16), latent_dim=8, quantizer="vq_ema")
    torch.manual_seed(0)
    quantizer = peers.PEERS[name](config)
    z = torch.randn(4, 8, 5, 5, requires_grad=True)
    z_q, indices, loss = quantizer(z)
    (z_q.square().mean() + loss).backward()
    assert z_q.shape == z.shape and indices.shape == (4, 5, 5) and indices.dtype == torch.int64 and loss.dim() == 0
    assert z.grad.abs().sum() > 0 and torch.isfinite(z.grad).all()
    before = {key: value.clone() for key, value in quantizer.state_dict().items() if torch.is_tensor(value)}
    quantizer.eval()
    again = [quantizer(z.bfloat16()) for _ in range(2)]
    assert torch.equal(again[0][1], again[1][1]) and again[0][0].dtype == torch.bfloat16
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items() if key in before)


def test_sinkhorn_balances_a_batch():
    torch.manual_seed(0)
    quantizer = peers.Sinkhorn(8, 2)
    quantizer.codebook.copy_(torch.randn(8, 2) * 0.1)  # all codes in one corner of the data
    z = torch.randn(4000, 2) + 1
    quantizer.epsilon, quantizer.iterations = 0.01, 500  # nearly hard, converged
    balanced = quantizer.assign(z, 1, None)[1][:, -1]
    nearest = torch.bincount(vqvae.nearest_code(z, quantizer.codebook), minlength=8)
    assert balanced.min() > 300 and nearest.min() < 200


def test_cvq_moves_only_unused_codes_to_their_closest_latent():
    quantizer = peers.CVQ(2, 1, ema_decay=0.9)
    quantizer.codebook.copy_(torch.tensor([[0.0], [9.0]]))
    quantizer.ema.copy_(torch.tensor([[0.0, 100.0], [0.0, 0.0]]))
    z = torch.tensor([[-1.0], [0.0], [1.0], [4.0]])
    quantizer.update(z, torch.tensor([[0.0, 100.0], [0.0, 0.0]]))
    assert quantizer.codebook[0].item() == pytest.approx(0, abs=1e-6)
    assert quantizer.codebook[1].item() == pytest.approx(4, abs=0.01)


def test_wasserstein_distance_of_gaussians(tiny_config):
    """Against scipy's matrix square root, on two known covariances."""
    import scipy.linalg
    torch.manual_seed(0)
    peer = peers.Wasserstein(tiny_config(codebook_size=64, latent_dim=3))
    rows = torch.randn(500, 3) @ torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.5, 0.2], [0.0, 0.0, 2.0]]) + 1
    codes = peer.codebook.detach().double().numpy()

    def moments(x):
        return x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)

    (m1, c1), (m2, c2) = moments(rows.double().numpy()), moments(codes)
    root = scipy.linalg.sqrtm(c1)
    squared = ((m1 - m2) ** 2).sum() + (c1 + c2 - 2 * scipy.linalg.sqrtm(root @ c2 @ root)).trace().real
    assert peer.distance(rows).item() == pytest.approx(math.sqrt(squared), rel=1e-3)


def test_wasserstein_loss_by_hand(tiny_config):
    peer = peers.Wasserstein(tiny_config(codebook_size=8, latent_dim=3, commitment_weight=0.5))
    peer.started.fill_(True)
    z = torch.randn(4, 3, 2, 2)
    rows, codes = z.permute(0, 2, 3, 1).reshape(-1, 3), peer.codebook.detach()
    error = torch.cdist(rows, codes).amin(1).square().mean() / 3
    assert peer.eval()(z).loss.item() == pytest.approx(1.5 * error.item(), rel=1e-5)
    assert peer.train()(z).loss.item() == pytest.approx(1.5 * error.item() + 0.02 * peer.distance(rows).item(), rel=1e-5)


def test_sq_vae_loss_by_hand(tiny_config):
    peer = peers.SQVAE(tiny_config(codebook_size=2, latent_dim=1))
    with torch.no_grad():
        peer.codebook.copy_(torch.tensor([[0.0], [1.0]]))
        peer.log_variance.fill_(math.log(0.5))  # precision 1
    peer.eval()
    assert peer(torch.tensor([[[[0.25]]]])).loss.item() == pytest.approx(peer.weight * 0.25**2)
    peer.train()
    peer.set_progress(1.0)
    losses = torch.stack([peer(torch.tensor([[[[0.0]]]])).loss for _ in range(4000)]).detach() / peer.weight
    p = 1 / (1 + math.exp(-1))  # of code 0, at distance 0 against 1
    expected = p * math.log(p) + (1 - p) * math.log(1 - p) + (1 - p) * 1.0
    assert losses.mean().item() == pytest.approx(expected, abs=0.03)


def test_fsq_names_its_sizes(tiny_config):
    with pytest.raises(vqvae.UserError, match="512, 1024, 4096, 16384"):
        peers.PEERS["lib_fsq"](tiny_config(codebook_size=100))


def test_lfq_names_its_sizes(tiny_config):
    with pytest.raises(vqvae.UserError, match="power of two, not 500"):
        peers.PEERS["lib_lfq"](tiny_config(codebook_size=500))


def test_missing_library_is_named(monkeypatch, tiny_config):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(vqvae.UserError, match="pip install vector-quantize-pytorch"):
        peers.PEERS["lib_simvq"](tiny_config())
