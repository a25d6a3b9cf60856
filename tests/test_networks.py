"""Shapes, signs and the public interface of the autoencoder."""

import pytest
import torch
import torch.nn.functional as F

import vqvae
from vqvae import VQVAE, BAQuantizer, Config, VQEMAQuantizer


@pytest.mark.parametrize("size, downsample", [(32, 4), (128, 8), (16, 2), (64, 16), (20, 4)])
def test_latent_and_image_shapes(size, downsample):
    model = VQVAE(BAQuantizer(16, 5), hidden_dim=8, latent_dim=5, downsample=downsample)
    x = torch.rand(2, 3, size, size)
    out = model(x)
    side = size // downsample
    assert out.images.shape == x.shape and out.indices.shape == (2, side, side) and out.loss.shape == ()


def test_default_network_is_the_documented_one():
    config = Config()
    model = vqvae.make_model(config)
    assert (config.hidden_dim, config.latent_dim, config.codebook_size) == (128, 16, 512)
    assert model.latents(torch.rand(1, 3, 32, 32)).shape == (1, 16, 8, 8)


def test_deep_stacks_of_residual_blocks_start_with_small_branches():
    x = torch.randn(4, 64, 8, 8)
    changes = []
    for count in (2, 1, 32):
        torch.manual_seed(0)
        stack = torch.nn.Sequential(*vqvae.residual_blocks(64, count))
        changes.append((stack(x) - x).std())
    assert changes[1] < changes[0] and changes[2] < 2 * changes[0]


@pytest.mark.parametrize("count", [0, 2, 5])
def test_as_many_residual_blocks_as_asked_for_in_both_networks(count):
    model = vqvae.make_model(Config(res_blocks=count, hidden_dim=8, latent_dim=4))
    for network in (model.encoder, model.decoder):
        assert sum(isinstance(layer, vqvae.ResidualBlock) for layer in network) == count
    assert model.latents(torch.rand(1, 3, 32, 32)).shape == (1, 4, 8, 8)


def test_latents_have_both_signs():
    z = VQVAE(BAQuantizer(16, 32), 16, 32).latents(torch.rand(4, 3, 32, 32))
    assert 0.2 < (z > 0).float().mean() < 0.8
    assert z.min() < 0 < z.max()


def test_encode_decode_equals_forward_in_eval_mode():
    model = VQVAE(BAQuantizer(16, 4), 8, 4)
    x = torch.rand(2, 3, 32, 32)
    model.train()(x)
    model.eval()
    out = model(x)
    indices = model.encode(x)
    assert torch.equal(indices, out.indices)
    assert torch.allclose(model.decode(indices), out.images.clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("downsample", [1, 3, 6])
def test_only_powers_of_two_are_halvings(downsample):
    with pytest.raises(ValueError, match="downsample"):
        VQVAE(BAQuantizer(16, 4), 8, 4, downsample)


def test_what_is_frozen_stays_frozen_after_an_evaluation():
    model = VQVAE(BAQuantizer(16, 4), 8, 4).train()
    model(torch.rand(2, 3, 16, 16))
    model.quantizer.eval()
    vqvae.evaluate(model, torch.zeros(2, 16, 16, 3, dtype=torch.uint8), 16)
    assert model.training and model.encoder.training and not model.quantizer.training


@pytest.mark.parametrize("shape", [(2, 3, 30, 32), (2, 1, 32, 32), (3, 32, 32)])
def test_wrong_images_are_refused(shape):
    with pytest.raises(ValueError, match="expected images"):
        VQVAE(BAQuantizer(16, 4), 8, 4)(torch.rand(shape))


def test_gradients_reach_the_encoder_through_the_quantizer():
    model = VQVAE(BAQuantizer(16, 4, commitment_weight=0.0), 8, 4).train()
    model(torch.rand(2, 3, 32, 32)).images.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())


def test_any_module_with_the_triple_is_a_quantizer():
    class Rounding(torch.nn.Module):
        def forward(self, z):
            return z + (z.round() - z).detach(), z[:, 0].round().long(), z.sum() * 0

    out = VQVAE(Rounding(), 8, 4)(torch.rand(2, 3, 32, 32))
    assert out.images.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("bits, axes", [(4, [1, 2, 0]), (2, [1, 2]), (0.5, [1]), (0, [])])
def test_live_directions_by_reverse_water_filling(bits, axes):
    # 4 bits on variances 16, 4, 1: water (64 / 2^8)^(1/2) = 0.5 on the first two, below 1, so the third joins: 0.63.
    directions = vqvae.live_directions(torch.diag(torch.tensor([1.0, 16.0, 4.0])), bits)
    assert torch.equal(directions.abs(), torch.eye(3, dtype=torch.float64)[:, axes])


def refined_by_hand(model, x, passes):
    """VQVAE.refined latent by latent, for a codebook of numbers (D = 1)."""
    z = model.latents(x).detach()
    moved, met = z.clone(), []  # met: (errors, latents) of each pass
    for i in range(passes + 1):
        e = model.quantizer(moved).z_q.requires_grad_()
        met.append(((model.reconstruct(e) - x).square().sum((1, 2, 3)).detach(), moved.clone()))
        if i == passes:
            break
        g, = torch.autograd.grad((model.reconstruct(e) - x).square().sum(), e)
        for b in range(len(x)):
            step = (e[b] - z[b]).norm() / g[b].norm()
            for row in range(z.shape[2]):
                for column in range(z.shape[3]):
                    if (row + column) % 2 == i % 2:
                        gap = e[b, 0, row, column] - z[b, 0, row, column]
                        moved[b, 0, row, column] = z[b, 0, row, column] + 0.7 * (gap - step * g[b, 0, row, column])
    return torch.stack([min(((errors[b], latents[b]) for errors, latents in met), key=lambda pair: pair[0])[1]
                        for b in range(len(x))])


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_refinement_by_hand(passes):
    model = VQVAE(VQEMAQuantizer(5, 1), 8, 1).train()
    x = torch.rand(3, 3, 16, 16)
    model(x)
    model.eval()
    assert torch.allclose(model.latents(x, passes), refined_by_hand(model, x, passes), atol=1e-5)
    assert torch.equal(model.encode(x, refine=passes), model.quantizer(model.latents(x, passes))[1])


def test_refinement_ignores_directions_without_codes():
    model = VQVAE(VQEMAQuantizer(5, 2), 8, 2).train()
    x = torch.rand(3, 3, 16, 16)
    model(x)
    model.eval()
    model.quantizer.codebook[:, 1] = 0
    refined = model.encode(x, refine=2)
    assert not torch.equal(refined, model.encode(x))
    with torch.no_grad():
        model.encoder[-1].weight[1] *= 1000
        model.decoder[0].weight[:, 1] *= 1000
    assert torch.equal(refined, model.encode(x, refine=2))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.latents(x, 2).dtype == torch.float32
    with torch.no_grad():
        model.decoder[0].weight.zero_()  # no gradient at all: nothing to move codes by
    assert torch.equal(model.encode(x), model.encode(x, refine=2))


def test_live_directions_of_refined_codes_are_float32_under_autocast(monkeypatch):
    model = VQVAE(VQEMAQuantizer(5, 2), 8, 2).train()
    x = torch.rand(3, 3, 16, 16)
    model(x)
    seen, real = [], vqvae.live_directions
    monkeypatch.setattr(vqvae, "live_directions", lambda covariance, bits: (seen.append(covariance), real(covariance, bits))[1])
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model.eval().latents(x, 1)
    assert torch.equal(*seen)


def test_refinement_lowers_the_error_of_a_trained_model(tiny_config):
    config = tiny_config(epochs=6)
    vqvae.train(config)
    model, _ = vqvae.load_model(vqvae.Path(config.out_dir) / "tiny" / "final_model.pt")
    images = vqvae.test_images(config)
    plain, one, four = (vqvae.evaluate(model, images, config.codebook_size, refine=n)["mse"] for n in (0, 1, 4))
    assert four < one < plain


@pytest.mark.parametrize("step", [0.7, -3.0])  # the latter away from where the decoder wants them
def test_refinement_makes_no_image_worse(step, monkeypatch):
    monkeypatch.setattr(vqvae, "REFINE_STEP", step)
    model = VQVAE(BAQuantizer(16, 4), 8, 4).train()
    x = torch.rand(20, 3, 16, 16)
    model(x)
    model.eval()
    with torch.no_grad():
        plain, refined = ((model(x, refine=passes).images - x).square().sum((1, 2, 3)) for passes in (0, 3))
    assert (refined <= plain).all() and ((refined < plain).any() or step < 0)


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
@pytest.mark.parametrize("metric", ["euclid", "cosine"])
def test_a_cast_model_encodes_refines_and_decodes(metric, cast):
    torch.manual_seed(0)
    model = VQVAE(BAQuantizer(16, 4, metric), 8, 4).train()
    model(torch.rand(4, 3, 32, 32))
    cast(model.eval())
    kind = model.encoder[1].weight.dtype
    x = torch.rand(2, 3, 32, 32).to(kind)
    images, indices, _ = model(x)
    assert images.dtype == kind and torch.equal(model.decode(indices), images.clamp(0, 1))
    assert model(x, quantize=False).images.dtype == kind
    assert model.encode(x, refine=2).shape == indices.shape


@pytest.mark.parametrize("prediction", ["none", "scaled"])
def test_a_model_can_be_exported(prediction):
    config = Config(image_size=16, dataset="dead_leaves", codebook_size=16, hidden_dim=8, latent_dim=4, prediction=prediction,
                    trellis="4")
    model = vqvae.make_model(config).train()
    model(torch.rand(4, 3, 16, 16))
    x = torch.rand(2, 3, 16, 16)
    exported = torch.export.export(model.eval(), (x,), strict=False).module()
    assert torch.equal(exported(x)[1], model(x).indices)


@pytest.mark.parametrize("metric", ["euclid", "cosine"])
def test_refinement_changes_no_state_and_works_in_inference_mode(metric):
    model = VQVAE(BAQuantizer(16, 4, metric=metric), 8, 4).train()
    x = torch.rand(4, 3, 32, 32)
    model(x)
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    together = model.latents(x, 1)
    assert not together.requires_grad and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], model.state_dict()[key]) for key in before)
    with torch.inference_mode():
        again = model.latents(x, 1)
    for same, other in ((together, again), (together[1:2], model.latents(x[1:2], 1))):  # whatever the batch
        assert ((same - other).abs() < 1e-4).float().mean() > 0.98  # a code may flip on a tie


def test_decoder_sees_unit_vectors_before_and_after_the_codes_come():
    model = VQVAE(BAQuantizer(16, 4, metric="cosine"), 8, 4).train()
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.rand(2, 3, 32, 32)
    for quantize in (False, True):
        model(x, quantize)
    model.eval()(x, refine=1)
    for z in (*seen, model.latents(x), model.latents(x, 1)):
        assert torch.allclose(z.norm(dim=1), torch.ones(()), atol=1e-5)


def test_weights_start_with_variance_one_over_fan_in():
    """All but those of the output layer, which keeps PyTorch's third."""
    model = VQVAE(BAQuantizer(16, 64), hidden_dim=64, latent_dim=64)
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    gains = {layer: layer.weight.var().item() * layer.weight[0].numel() for layer in layers}
    output = gains.pop(model.decoder[-2])
    assert output == pytest.approx(1 / 3, rel=0.1) and list(gains.values()) == pytest.approx([1.0] * len(gains), rel=0.1)


def test_weights_come_from_the_seed():
    one, two, other = (vqvae.make_model(Config(hidden_dim=8, latent_dim=4, seed=s)) for s in (1, 1, 2))
    assert torch.equal(one.encoder[1].weight, two.encoder[1].weight)
    assert not torch.equal(one.encoder[1].weight, other.encoder[1].weight)


@pytest.mark.parametrize("size", [(8, 8), (1, 3)])
def test_doubling_is_the_transposed_convolution(size):
    layer = vqvae.Doubling(6)
    x = torch.randn(3, 6, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)
    got = layer(x)
    assert torch.allclose(got, expected, atol=1e-6) and got.is_contiguous(memory_format=torch.channels_last)
    inputs, g = [x, layer.weight, layer.bias], torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(expected, inputs, g)):
        assert torch.allclose(a, b, atol=1e-4)
