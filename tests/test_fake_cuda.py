"""What a CUDA graph would refuse of a forward pass, seen without a GPU: tensors of a fake one have no values.

The backward pass needs a driver; test_training.py watches a whole step on the CPU.
"""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vqvae

pytestmark = pytest.mark.skipif(torch.__version__ < "2.9", reason="PyTorch 2.6 aborts in a convolution of fake CUDA tensors, for "
                                                                  "want of a driver; those up to 2.9 were not tried")


class Waits(TorchDispatchMode):
    """Notes what waits for the device: copies between host and device, and masks as indices, whose places are counted."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        masked = "aten.index" in str(function) and any(tensor.dtype == torch.bool for tensor in tensors)
        if masked or len({tensor.device.type for tensor in tensors}) > 1:
            self.found.add(str(function))
        return result


def on_fake_cuda(module):
    """`module` with all of its tensors replaced by those of a device that does not exist; inside FakeTensorMode."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                tensors[name] = torch.nn.Parameter(fake) if isinstance(tensor, torch.nn.Parameter) else fake
    return module


def forward(model, quantize=True):
    """What waits in one training step's forward pass, after one that lets the codes start."""
    x = torch.empty(16, 3, 32, 32, device="cuda")
    with mock.patch.object(vqvae.Quantizer, "initialized", False):  # asked of the device before the first step only
        model(x, quantize)
    model.quantizer.set_progress(0.5)
    with Waits() as waits:
        model(x, quantize)
    return waits.found


@pytest.mark.parametrize("trellis", ["none", "4", "16", "64"])
@pytest.mark.parametrize("prediction", ["none", "checkerboard", "scaled"])
@pytest.mark.parametrize("quantizer", ["vq_ema", "ba_vq"])
def test_a_forward_pass_neither_waits_for_the_device_nor_depends_on_values(monkeypatch, quantizer, prediction, trellis):
    monkeypatch.setattr(vqvae, "fastest_e_step", lambda device, dim: vqvae.soft_assign)  # the fused one needs a driver
    config = vqvae.Config(hidden_dim=8, latent_dim=4, codebook_size=64, quantizer=quantizer, prediction=prediction,
                          trellis=trellis)
    model = vqvae.make_model(config).train()
    with FakeTensorMode():
        assert forward(on_fake_cuda(model)) == set()


@pytest.mark.parametrize("metric", ["euclid", "cosine"])
def test_cosine_and_the_warm_up_neither(monkeypatch, metric):
    monkeypatch.setattr(vqvae, "fastest_e_step", lambda device, dim: vqvae.soft_assign)
    model = vqvae.make_model(vqvae.Config(hidden_dim=8, latent_dim=4, codebook_size=64, metric=metric, trellis="none")).train()
    with FakeTensorMode():
        model = on_fake_cuda(model)
        assert forward(model, quantize=False) == set()
        assert forward(model) == set()


def test_a_step_of_muon_neither():
    model = vqvae.make_model(vqvae.Config(hidden_dim=8, latent_dim=4, codebook_size=64))
    with FakeTensorMode():
        optimizer = vqvae.make_optimizer(on_fake_cuda(model), 1e-3, "muon")
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        vqvae.set_learning_rate(optimizer, 1e-4)
        with Waits() as waits:
            optimizer.step()
        assert waits.found == set() and len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize(("wrong", "caught"), [
    (lambda z: z.sum().item(), DataDependentOutputException),
    (lambda z: z[z > 0], DynamicOutputShapeException),
    (lambda z: z + torch.ones(z.shape), RuntimeError),  # of another device
])
def test_what_waits_is_found(monkeypatch, wrong, caught):
    monkeypatch.setattr(vqvae.VQEMAQuantizer, "update", lambda self, z, stats: wrong(z))
    model = vqvae.make_model(vqvae.Config(quantizer="vq_ema", hidden_dim=8, latent_dim=4, codebook_size=64)).train()
    with FakeTensorMode(), pytest.raises(caught):
        forward(on_fake_cuda(model))


@pytest.mark.parametrize(("wrong", "name"), [
    (lambda z: torch.arange(4).to(z.device), "aten._to_copy.default"),
    (lambda z: z.clone().index_put_((z > 0,), z.sum()), "aten.index_put_.default"),  # the places of a mask are counted
])
def test_copies_and_masks_are_found(monkeypatch, wrong, name):
    monkeypatch.setattr(vqvae.VQEMAQuantizer, "update", lambda self, z, stats: wrong(z))
    model = vqvae.make_model(vqvae.Config(quantizer="vq_ema", hidden_dim=8, latent_dim=4, codebook_size=64)).train()
    with FakeTensorMode():
        assert name in forward(on_fake_cuda(model))
