"""The quantizers against dense and independent references, and their promises to users who lift them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import vqvae
from vqvae import BAQuantizer, PredictiveQuantizer, VQEMAQuantizer, blahut_arimoto, nearest_code, prior_step, soft_assign


def dense_assignment(z, codebook, log_w, temperature):
    """The E-step written out with the N x K matrix."""
    distances = (z[:, None] - codebook[None]).square().sum(2)
    P = torch.softmax(log_w - distances / temperature, 1)
    stats = torch.cat([P.T @ z, P.sum(0)[:, None]], 1)
    return distances.argmin(1), stats, distances.min(1).values.sum()


def both(dim=4, **settings):
    return [VQEMAQuantizer(8, dim, **settings), VQEMAQuantizer(8, dim, recipe="classical", **settings),
            BAQuantizer(8, dim, **settings), BAQuantizer(8, dim, entropy_weight=math.inf, **settings)]


@pytest.mark.parametrize("chunk, prior", [(1, 1), (7 * 9, 1), (1 << 20, 1), (1 << 20, 100)])
def test_chunked_e_step_equals_the_dense_one(monkeypatch, chunk, prior):
    monkeypatch.setitem(vqvae.CHUNK_ELEMENTS, "cpu", chunk)
    z, codebook, log_w = torch.randn(50, 3), torch.randn(7, 3), prior * torch.randn(7)
    got = soft_assign(z, codebook, log_w, torch.tensor(0.5))
    indices, stats, distortion = dense_assignment(z.double(), codebook.double(), log_w.double(), 0.5)
    assert torch.equal(got.numbers, indices)
    assert torch.allclose(got.stats.double(), stats, atol=1e-4)
    assert torch.allclose(z.double().square().sum() - 2 * got.score.double(), distortion, rtol=1e-5)
    assert torch.equal(nearest_code(z, codebook), indices)


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    device = torch.device("cuda")


def test_the_e_step_of_a_gpu_is_the_same():
    """There the weights come from PyTorch's softmax."""
    z, codebook, log_w = torch.randn(50, 3), torch.randn(64, 3), torch.randn(64)
    temperature = torch.tensor(0.5)
    here = soft_assign(z, codebook, log_w, temperature)
    there = soft_assign(*(tensor.as_subclass(Elsewhere) for tensor in (z, codebook, log_w)), temperature)
    assert isinstance(there.stats, Elsewhere) and torch.equal(here.numbers, there.numbers)
    for name in ("stats", "score", "overlap"):
        assert torch.allclose(getattr(here, name), getattr(there, name), rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """Context that records the size of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("threads", "elements"), [(1, 6000), (3, 18_000), (64, 48_000)])
@pytest.mark.parametrize("quantizer", [VQEMAQuantizer, BAQuantizer])
def test_no_matrix_larger_than_a_chunk(monkeypatch, quantizer, threads, elements):
    """N x K is 1,000,000; nothing beyond a chunk, the latents or the codebook is ever made."""
    monkeypatch.setitem(vqvae.CHUNK_ELEMENTS, "cpu", 6000)  # per thread, up to eight: 12 rows of 500 scores
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    quantizer = quantizer(500, 2)
    with Largest() as largest:
        quantizer.train()(torch.randn(2000, 2))
        quantizer.eval()(torch.randn(2000, 2))
    assert largest.elements == elements  # the latents are 2000 x 3 with their ones


def test_lambda_zero_is_blahut_arimoto():
    z, codebook, temperature = torch.randn(200, 3), torch.randn(6, 3), 2.0
    distances = (z[:, None] - codebook[None]).square().sum(2)
    reference = blahut_arimoto(distances.double(), 1 / temperature, tolerance=1e-7)
    log_w = torch.zeros(6)
    for _ in range(5000):
        counts = soft_assign(z, codebook, log_w, torch.tensor(temperature)).stats[:, -1]
        log_w = prior_step(log_w, counts / 200, 0.0, 1.0)
    assert torch.allclose((counts / 200).double(), reference.q, atol=2e-3)
    assert reference.q.min() < 0.01 < reference.q.max()  # the support shrinks: this is not the uniform start


def test_lambda_infinity_makes_the_marginal_uniform():
    z, codebook = torch.randn(500, 2), torch.randn(9, 2) + 1
    log_w = torch.zeros(9)
    start = soft_assign(z, codebook, log_w, torch.tensor(0.5)).stats[:, -1] / 500
    for _ in range(500):
        q = soft_assign(z, codebook, log_w, torch.tensor(0.5)).stats[:, -1] / 500
        log_w = prior_step(log_w, q, math.inf, 0.5)
    assert (start - 1 / 9).abs().max() > 0.05
    assert torch.allclose(q, torch.full((9,), 1 / 9), atol=1e-5)


def test_newton_scaling_balances_cold_assignments():
    # At a low temperature the marginal hardly answers to the prior; the plain step barely moves it.
    z, codebook, tau = torch.randn(2000, 2), torch.randn(9, 2), torch.tensor(0.01)
    worst = {}
    for newton in (False, True):
        log_w = torch.zeros(9)
        for _ in range(150):
            batch = soft_assign(z, codebook, log_w, tau)
            q = batch.stats[:, -1] / 2000
            log_w = prior_step(log_w, q, math.inf, 0.1, batch.overlap / 2000 if newton else 1.0)
        worst[newton] = (9 * q - 1).abs().max()
    assert worst[True] < 0.1 < 0.5 < worst[False]


def test_overlap_is_the_mean_sensitivity_of_the_marginal():
    # d q_k / d log w_k = E[P_k (1 - P_k)], summed over k: 1 - E[sum_k P_k^2].
    z, codebook, log_w = torch.randn(60, 3).double(), torch.randn(7, 3).double(), torch.randn(7).double()
    P = torch.softmax(log_w - torch.cdist(z, codebook).square() / 0.5, 1)
    got = soft_assign(z, codebook, log_w, torch.tensor(0.5)).overlap
    assert torch.allclose(got, (P * (1 - P)).sum())


@pytest.mark.parametrize("entropy_weight", [0.5, 1.0, 3.0, 30.0])
def test_finite_lambda_settles_where_the_theory_says(entropy_weight):
    z, codebook = torch.randn(500, 2), torch.randn(9, 2)
    log_w = torch.zeros(9)
    for _ in range(3000):
        q = soft_assign(z, codebook, log_w, torch.tensor(1.0)).stats[:, -1] / 500
        log_w = prior_step(log_w, q, entropy_weight, 0.5)
    assert torch.allclose(log_w, (1 - entropy_weight) * (9 * q).log(), atol=1e-2)


@pytest.mark.parametrize("entropy_weight", [1e20, 1e30, 1e39, 1e300])
def test_a_huge_lambda_is_infinite(entropy_weight):
    log_w, q = torch.randn(9), torch.rand(9).softmax(0)
    sensitivity = torch.tensor(0.3)
    expected = prior_step(log_w, q, math.inf, 0.5, sensitivity)
    got = prior_step(log_w, q, entropy_weight, 0.5, sensitivity)
    assert torch.allclose(got - got.mean(), expected, atol=1e-6)  # weights are proportions


def test_the_prior_of_a_starved_code_does_not_wind_up():
    # Its marginal tells only after the window of the EMA that it has risen enough.
    q, log_w = torch.tensor([0.0, 0.5, 0.5]), torch.zeros(3)
    for _ in range(20):
        log_w = prior_step(log_w, q, math.inf, 0.1)
    assert torch.allclose(log_w[0] - log_w[1], torch.tensor(20 * 0.1 * (1 + math.log(1.5))))


@pytest.mark.parametrize("entropy_weight", [1.5, 10.0, 300.0])
def test_the_prior_of_a_code_with_nothing_at_all_stays_finite(entropy_weight):
    q, log_w = torch.tensor([0.0, 0.5, 0.5]), torch.zeros(3)
    for _ in range(30_000):
        log_w = prior_step(log_w, q, entropy_weight, 0.5, 0.01)
    settled = (entropy_weight - 1) * math.log(1e12)  # where the share that the bound leaves is the whole
    assert log_w.isfinite().all() and log_w[0] == pytest.approx(settled, rel=0.01)


def test_the_prior_of_lambda_infinity_does_not_drift():
    log_w, q = torch.randn(9), torch.rand(9).softmax(0)
    for _ in range(1000):
        log_w = prior_step(log_w, q, math.inf, 0.01)
    assert abs(log_w.mean()) < 1e-4 and log_w.std() > 1


def test_vq_ema_update_equals_an_independent_reference():
    decay, epsilon = 0.7, 1e-5
    quantizer = VQEMAQuantizer(5, 3, ema_decay=decay, restart_threshold=0.0).train()
    quantizer(torch.randn(40, 3))
    codes, sums, counts = (t.clone().double() for t in
                           (quantizer.codebook, quantizer.ema[:, :-1], quantizer.ema[:, -1]))
    for _ in range(4):
        z = torch.randn(40, 3)
        quantizer(z)
        z = z.double()
        nearest = torch.cdist(z, codes).argmin(1)
        for k in range(5):
            counts[k] = decay * counts[k] + (1 - decay) * (nearest == k).sum()
            sums[k] = decay * sums[k] + (1 - decay) * z[nearest == k].sum(0)
        smoothed = (counts + epsilon) / (counts.sum() + 5 * epsilon) * counts.sum()
        codes = sums / smoothed[:, None]
    assert torch.allclose(quantizer.codebook.double(), codes, atol=1e-5)


def test_ba_update_equals_an_independent_reference():
    decay = 0.7
    quantizer = BAQuantizer(5, 3, ema_decay=decay, entropy_weight=4.0, temperature_start=0.3, restart_threshold=0.0).train()
    quantizer(torch.randn(40, 3))
    codes, ema, log_w = (t.clone().double() for t in (quantizer.codebook, quantizer.ema, quantizer.log_w))
    distortion = quantizer.distortion.double()
    for _ in range(4):
        z = torch.randn(40, 3)
        quantizer(z)
        _, stats, nearest = dense_assignment(z.double(), codes, log_w, 0.3 * distortion)
        P = torch.softmax(log_w - torch.cdist(z.double(), codes).square() / (0.3 * distortion), 1)
        sensitivity = 1 - P.square().sum(1).mean()
        ema = decay * ema + (1 - decay) * stats
        q = ema[:, -1] / ema[:, -1].sum()
        residual = (5 * q).log() + log_w / 3  # 0 where log w = (1 - 4) log(5 q)
        log_w = log_w - 2 * (1 - decay) * 3 / (1 + 3 * sensitivity) * torch.where(residual > 0, residual, residual.expm1())
        distortion = decay * distortion + (1 - decay) * nearest / 40
        codes = ema[:, :-1] / ema[:, -1:]
    assert torch.allclose(quantizer.codebook.double(), codes, atol=1e-4)
    assert torch.allclose(quantizer.log_w.double(), log_w, atol=1e-4)


@pytest.mark.parametrize("metric", ["euclid", "cosine"])
def test_straight_through_gradients(metric):
    for quantizer in both(metric=metric):
        z = torch.randn(2, 4, 3, 3, requires_grad=True)
        z_q, indices, loss = quantizer.train()(z)
        weight = torch.randn_like(z)
        straight, = torch.autograd.grad((z_q * weight).sum(), z, retain_graph=True)
        unit = F.normalize(z, dim=1) if metric == "cosine" else z
        expected, = torch.autograd.grad((unit * weight).sum(), z, retain_graph=True)
        assert torch.allclose(straight, expected, atol=1e-6)  # as if the quantizer were the identity
        commitment, = torch.autograd.grad(loss, z)
        assert commitment.abs().sum() > 0
        assert not any(buffer.requires_grad for buffer in quantizer.buffers())
        assert not list(quantizer.parameters())


@pytest.mark.parametrize("make", [vqvae.BAQuantizer, vqvae.VQEMAQuantizer])
@pytest.mark.parametrize("trellis", [0, 4])
def test_what_comes_back_are_the_codes_and_eval_mode_freezes_nothing_but_the_codebook(make, trellis):
    quantizer = make(16, 4, trellis=trellis)
    z = torch.randn(3, 4, 4, 4, requires_grad=True)
    quantizer(z)
    for training in (True, False):
        before = copy.deepcopy(quantizer)
        z_q, indices, _ = quantizer.train(training)(z)
        assert torch.equal(z_q.permute(0, 2, 3, 1), before.codes(indices))
        gradient, = torch.autograd.grad((z_q * torch.arange(4.0)).sum(), z)  # the last of four columns counts three times
        assert torch.equal(gradient, torch.arange(4.0).expand_as(z))


def test_commitment_loss_value():
    for quantizer in both(commitment_weight=0.5):
        z = torch.randn(20, 4)
        quantizer.train()(z)
        z_q, _, loss = quantizer.eval()(z)
        assert torch.allclose(loss, 0.5 * (z - z_q).square().mean())


def test_commitment_loss_of_unit_vectors_does_not_shrink_with_their_dimension():
    for quantizer in both(64, commitment_weight=0.5, metric="cosine"):
        z = torch.randn(200, 64)
        quantizer.train()(z)
        z_q, _, loss = quantizer.eval()(z)
        assert torch.allclose(loss, 0.5 * 2 * (1 - F.cosine_similarity(z, z_q)).mean())


def test_shapes_and_lookup():
    for quantizer in both():
        quantizer.train()(torch.randn(10, 4))
        quantizer.eval()
        out = quantizer(torch.randn(2, 4, 3, 5))
        assert out.z_q.shape == (2, 4, 3, 5) and out.indices.shape == (2, 3, 5) and out.loss.shape == ()
        assert torch.equal(quantizer.codes(out.indices).permute(0, 3, 1, 2), out.z_q)
        rows, lines = quantizer(torch.randn(6, 4)), quantizer(torch.randn(3, 4, 2))
        assert rows.z_q.shape == (6, 4) and rows.indices.shape == (6,)
        assert lines.z_q.shape == (3, 4, 2) and lines.indices.shape == (3, 2)


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (0, 4, 2, 2), (2, 4, 0, 2), (4,), (2, 3, 4, 4), (2, 3, 4), (2, 4, 1, 1, 1)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="expected"):
        BAQuantizer(8, 4).train()(torch.randn(shape))


def test_a_dead_code_stays_on_the_sphere():
    quantizer = VQEMAQuantizer(16, 4, metric="cosine", recipe="classical", ema_decay=0.5).train()
    z = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0]]).repeat(20, 1)
    for _ in range(200):
        quantizer(z)
    assert (quantizer.ema[:, -1] < 1e-12).any()
    assert torch.allclose(quantizer.codebook.norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("kind, values", [(VQEMAQuantizer, {"codebook_size": 0}), (VQEMAQuantizer, {"metric": "cosin"}),
                                          (BAQuantizer, {"metric": "cosine", "dim": 1}),
                                          (VQEMAQuantizer, {"ema_decay": 1.0}), (VQEMAQuantizer, {"recipe": "new"}),
                                          (BAQuantizer, {"entropy_weight": -1.0}), (BAQuantizer, {"entropy_weight": math.nan}),
                                          (BAQuantizer, {"temperature_end": 0.0}), (BAQuantizer, {"restart_threshold": 2.0}),
                                          (BAQuantizer, {"ba_iters": 0})])
def test_constructors_refuse_values_out_of_range(kind, values):
    with pytest.raises(ValueError, match=next(iter(values)).split("_")[0]):
        kind(**{"codebook_size": 8, "dim": 4, **values})


def trained_once(kind=BAQuantizer):
    torch.manual_seed(0)
    quantizer = kind(16, 4).train()
    quantizer(torch.randn(200, 4))
    return quantizer


def copied_by_tensors(quantizer):
    other = type(quantizer)(16, 4)
    other.load_state_dict(dict(quantizer.state_dict()))
    return other


def copied_in_place(quantizer):
    """As averages of models are kept."""
    other = copy.deepcopy(type(quantizer)(16, 4))
    for mine, theirs in zip(other.state_dict().values(), quantizer.state_dict().values()):
        mine.copy_(theirs)
    return other


def copied_for_data_parallel(quantizer):
    other = quantizer._replicate_for_data_parallel()
    other._buffers = dict(quantizer._buffers)  # of the first device
    other._has_started = False  # a replica's flags are not the module's
    return other


@pytest.mark.parametrize("copied", [copied_by_tensors, copied_in_place, copied_for_data_parallel, copy.deepcopy])
@pytest.mark.parametrize("kind", [VQEMAQuantizer, BAQuantizer])
def test_codes_that_were_copied_in_any_way_stay(kind, copied):
    quantizer, z = trained_once(kind), torch.randn(200, 4)
    other, expected = copied(quantizer).train(), copy.deepcopy(quantizer)
    assert other.initialized and torch.equal(other.codebook, expected.codebook)
    for some in (other, expected):  # were it started again, the codes would be rows of z
        torch.manual_seed(1)
        some(z)
    assert torch.equal(other.codebook, expected.codebook)


@pytest.mark.parametrize("kind", [VQEMAQuantizer, BAQuantizer])
def test_codes_of_another_size_are_refused_and_start_afresh(kind):
    """A state of which only the shapes that fit are loaded must not leave a codebook of zeros that counts as started."""
    quantizer, state = kind(8, 4).train(), trained_once(kind).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        quantizer.load_state_dict(state)
    shapes = {key: value.shape for key, value in quantizer.state_dict().items()}
    quantizer.load_state_dict({key: value for key, value in state.items() if value.shape == shapes[key]}, strict=False)
    assert not quantizer.initialized
    for step in range(50):
        quantizer.set_progress(step / 50)
        _, indices, _ = quantizer(torch.randn(256, 4))
    assert len(indices.unique()) == 8


def test_the_state_is_tensors_and_that_of_earlier_versions_loads():
    state = trained_once().state_dict()
    assert all(torch.is_tensor(value) for value in state.values())
    other = BAQuantizer(16, 4)
    other.load_state_dict({**state, "_extra_state": {"initialized": True}})
    assert other.initialized and torch.equal(other.codebook, state["codebook"])


def test_a_state_without_codes_starts_again():
    quantizer = trained_once()
    quantizer.load_state_dict(BAQuantizer(16, 4).state_dict())
    assert not quantizer.initialized
    quantizer(torch.randn(200, 4))
    assert quantizer.initialized and quantizer.codebook.any()


def test_eval_changes_no_state():
    for quantizer in both():
        quantizer.train()(torch.randn(30, 4))
        before = copy.deepcopy(quantizer.state_dict())
        quantizer.eval()(torch.randn(30, 4))
        after = quantizer.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_state_dict_round_trip_continues_the_same():
    for make in (lambda: VQEMAQuantizer(8, 4), lambda: BAQuantizer(8, 4, entropy_weight=math.inf)):
        one, two = make().train(), make().train()
        one(torch.randn(30, 4))
        two.load_state_dict(one.state_dict())
        z = torch.randn(30, 4)
        for quantizer in (one, two):
            torch.manual_seed(5)
            quantizer(z)
        assert torch.equal(one.codebook, two.codebook)


@pytest.mark.parametrize("quantizer", [VQEMAQuantizer(64, 4, ema_decay=0.8, recipe="classical"),
                                       VQEMAQuantizer(64, 4, ema_decay=0.8, restart_threshold=0)])
def test_codes_that_nothing_chooses_become_no_denormal_numbers(quantizer):
    """On some CPUs these are many times as slow; 0.8^n of them would stay for ever, rounded to themselves."""
    z = torch.randn(4, 4)
    quantizer.train()(torch.randn(64, 4))
    for _ in range(600):
        quantizer(z)
    assert (quantizer.ema[:, -1] == 0).sum() >= 60
    for values in (quantizer.ema, quantizer.codebook):
        assert values[values != 0].abs().min() > 1e-30


def test_classical_recipe_starts_small_and_tuned_at_the_data():
    z = torch.randn(500, 4) + 10
    classical, tuned = VQEMAQuantizer(8, 4, recipe="classical"), VQEMAQuantizer(8, 4)
    classical.initialize(z)
    tuned.initialize(z)
    assert classical.codebook.abs().max() <= 1 / 8
    assert torch.cdist(tuned.codebook, z).min(1).values.max() < 0.5


def test_tuned_recipe_restarts_dead_codes_with_their_ema_state():
    quantizer = VQEMAQuantizer(4, 2, ema_decay=0.5, restart_threshold=0.1).train()
    z = torch.randn(100, 2)
    quantizer(z)
    quantizer.codebook[0] = 1e4  # far from everything
    quantizer.ema[0] = torch.tensor([0.0, 0.0, 1e-3])
    quantizer(z)
    assert torch.cdist(quantizer.codebook[:1], z).min() < 0.3
    assert quantizer.ema[0, -1] == pytest.approx(quantizer.ema[:, -1].mean().item(), rel=0.5)


def test_ba_restarts_codes_that_a_moving_encoder_left_behind_unless_lambda_is_small():
    for entropy_weight, recovers in ((math.inf, True), (10.0, True), (1.0, False), (0.0, False)):
        quantizer = BAQuantizer(16, 3, entropy_weight=entropy_weight, temperature_start=0.02).train()
        for _ in range(50):
            quantizer(torch.randn(64, 3))
        for _ in range(150):
            quantizer(torch.randn(64, 3) * 0.01 + 5)  # the latents have jumped far away
        used = len(quantizer.eval()(torch.randn(5000, 3) * 0.01 + 5).indices.unique())
        assert (used == 16) == recovers, (entropy_weight, used)


@pytest.mark.parametrize("k", [10, 300])
def test_initial_codes_are_all_different(k):
    # Duplicated data rows, and more codes than rows.
    z = torch.randn(50, 4).repeat(2, 1)
    for quantizer in (VQEMAQuantizer(k, 4), BAQuantizer(k, 4)):
        quantizer.initialize(z)
        assert len(quantizer.codebook.unique(dim=0)) == k


def test_a_restarted_code_has_the_average_prior():
    quantizer = BAQuantizer(8, 2).train()
    z = torch.randn(200, 2)
    quantizer(z)
    quantizer.log_w.copy_(torch.arange(8.0))
    quantizer.ema[0] = 0
    quantizer.update(z, quantizer.ema.clone())
    assert quantizer.log_w.tolist() == [3.5, *range(1, 8)]


def test_the_size_of_a_cell_before_there_are_codes():
    z = torch.randn(200_000, 2)  # variance 2 in 2 dimensions: 2 * 64^(-2/2)
    assert BAQuantizer(64, 2)._expected_distortion(z).item() == pytest.approx(2 / 64, rel=0.01)


def test_codes_that_restart_together_are_all_different():
    for quantizer in (VQEMAQuantizer(60, 2), BAQuantizer(60, 2, entropy_weight=math.inf)):
        quantizer.train()(torch.randn(20, 2))
        quantizer.ema[10:] = 0
        dead = quantizer.restart_dead_codes(torch.randn(20, 2))  # 50 dead codes, 20 rows to restart at
        assert dead.flatten().tolist() == [False] * 10 + [True] * 50
        assert len((quantizer.ema[:, :-1] / quantizer.ema[:, -1:]).unique(dim=0)) == 60


@pytest.mark.parametrize("kind", [VQEMAQuantizer, BAQuantizer])
def test_passing_over_a_restart_of_nothing_changes_no_bit(kind, monkeypatch):
    states, draws, drawn = [], [], []
    monkeypatch.setattr(kind, "distinct_rows", lambda *args: drawn.append(1) or vqvae.Quantizer.distinct_rows(*args))
    for skips in (True, False):
        if not skips:
            monkeypatch.setattr(vqvae, "_can_look", lambda tensor: False)  # as on a GPU
        quantizer = kind(16, 3).train()
        for step in range(30):
            torch.manual_seed(step)  # as vqvae.train does
            quantizer(torch.randn(200, 3) + (8 if step >= 15 else 0))  # codes left behind die
        states.append(quantizer.state_dict())
        draws.append(len(drawn))
    assert all(torch.equal(states[0][key], states[1][key]) for key in ("codebook", "ema"))
    assert 1 < draws[0] < 31 == draws[1] - draws[0]  # the start, and every step or some


def test_copies_of_a_row_split_into_used_codes():
    # 256 codes from a first batch of 64 vectors: at most 64 distinct rows, yet 95% of the codes end in use.
    quantizer = BAQuantizer(256, 2, entropy_weight=math.inf, temperature_start=0.2, temperature_end=0.2).train()
    for _ in range(300):
        quantizer(torch.randn(64, 2))
    used = quantizer.eval()(torch.randn(20_000, 2)).indices.unique()
    assert len(used) >= 0.95 * 256


def test_temperature_schedule_is_geometric_then_held():
    quantizer = BAQuantizer(8, 4, temperature_start=0.2, temperature_end=0.002, anneal_fraction=0.5)
    seen = []
    for progress in (0.0, 0.25, 0.5, 0.9):
        quantizer.set_progress(progress)
        seen.append(quantizer.temperature.item())
    assert seen == pytest.approx([0.2, 0.02, 0.002, 0.002])


def test_ba_iters_moves_the_prior_further():
    z = torch.randn(200, 4)
    moved = []
    for iters in (1, 5):
        torch.manual_seed(0)
        quantizer = BAQuantizer(8, 4, entropy_weight=math.inf, ba_iters=iters).train()
        quantizer(z)
        moved.append(quantizer.log_w.abs().max())
    assert moved[1] > 2 * moved[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_keeps_float32_state(dtype):
    for quantizer in both():
        z = torch.randn(30, 4)
        with torch.autocast("cpu", torch.bfloat16):
            out = quantizer.train()(z.to(dtype))
        assert out.z_q.dtype == dtype and out.loss.dtype == torch.float32
        assert all(b.dtype == torch.float32 for b in quantizer.buffers())


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_a_cast_model_has_a_quantizer_in_float32(cast):
    quantizer = PredictiveQuantizer(BAQuantizer(8, 4), VQEMAQuantizer(8, 4)).train()
    quantizer(torch.randn(5, 4, 4, 4))
    before = dict(quantizer.state_dict())
    model = cast(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), quantizer))
    assert model[0].weight.dtype != torch.float32
    for key, value in before.items():
        assert torch.equal(quantizer.state_dict()[key], value) and value.dtype == torch.float32
    x = torch.randn(5, 3, 4, 4, dtype=model[0].weight.dtype)
    z_q, _, loss = model(x)
    assert z_q.dtype == x.dtype and loss.isfinite()


def test_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        quantizer = PredictiveQuantizer(BAQuantizer(8, 4), BAQuantizer(8, 4)).train()
        z_q, _, loss = quantizer(torch.randn(5, 4, 4, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert z_q.dtype == torch.float64 and loss.dtype == torch.float32 and quantizer.codebook.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [VQEMAQuantizer, BAQuantizer])
def test_a_batch_that_is_not_finite_shows_in_the_codes(kind, bad):
    """A codebook that stops moving, without a word, would be worse."""
    quantizer = kind(8, 4).train()
    z = torch.randn(50, 4)
    quantizer(z)
    z[0, 0] = bad
    quantizer(z)
    assert not quantizer.codebook.isfinite().all()


def test_nearest_is_float32_under_autocast():
    quantizer = VQEMAQuantizer(256, 4).train()
    quantizer(100 + torch.randn(2000, 4))
    z = 100 + torch.randn(4, 4, 8, 8)
    expected = quantizer.eval()(z).z_q
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(z).z_q, expected)


@pytest.mark.parametrize("metric", ["euclid", "cosine"])
@pytest.mark.parametrize("name, z", [
    ("constant", torch.ones(40, 4)), ("zero", torch.zeros(40, 4)), ("tiny", 1e-6 * torch.randn(40, 4)),
    ("huge", 1e6 * torch.randn(40, 4)), ("one row", torch.randn(1, 4)), ("far", 1e3 + torch.randn(40, 4))])
def test_quantizers_survive(metric, name, z):
    for k in (1, 8, 100):
        for quantizer in (VQEMAQuantizer(k, 4, metric), VQEMAQuantizer(k, 4, metric, recipe="classical"),
                          *(BAQuantizer(k, 4, metric, entropy_weight=w, temperature_start=t)
                            for w in (0.0, 1.0, 10.0, math.inf) for t in (1e-6, 0.1, 1e6))):
            for _ in range(5):
                out = quantizer.train()(z)
            assert all(torch.isfinite(b).all() for b in quantizer.buffers()), quantizer
            assert torch.isfinite(out.z_q).all() and torch.isfinite(out.loss)


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1e6), (torch.bfloat16, 1e-6), (torch.float16, 1e4),
                                          (torch.float16, 1e-6)])
def test_quantizers_survive_half_precision_of_any_scale(dtype, scale):
    for quantizer in both():
        for _ in range(5):
            out = quantizer.train()((scale * torch.randn(40, 4)).to(dtype))
        assert all(torch.isfinite(b).all() for b in quantizer.buffers()), quantizer
        assert torch.isfinite(out.z_q).all() and torch.isfinite(out.loss) and out.z_q.dtype == dtype


@pytest.mark.parametrize("metric", ["euclid", "cosine"])
def test_quantizers_survive_duplicate_codes(metric):
    for quantizer in both(metric=metric):
        quantizer.train()(torch.randn(40, 4))
        quantizer.codebook[1:] = quantizer.codebook[0]
        quantizer.ema[1:] = quantizer.ema[0]
        for _ in range(5):
            out = quantizer(torch.randn(40, 4))
        assert all(torch.isfinite(b).all() for b in quantizer.buffers()) and out.indices.max() < 8


def test_quantizers_survive_codes_without_mass():
    for quantizer in [*both(), BAQuantizer(8, 4, entropy_weight=0.0), BAQuantizer(8, 4, entropy_weight=1.0)]:
        quantizer.train()(torch.randn(40, 4))
        quantizer.codebook[3:] = 1e6
        quantizer.ema[3:] = 0
        for _ in range(5):
            out = quantizer(torch.randn(40, 4))
        assert all(torch.isfinite(b).all() for b in quantizer.buffers()) and torch.isfinite(out.loss)


def test_codes_recover_after_a_constant_first_batch():
    quantizer = BAQuantizer(16, 3, entropy_weight=math.inf).train()
    quantizer(torch.ones(64, 3))
    for _ in range(400):
        quantizer(torch.randn(64, 3))
    assert len(quantizer.eval()(torch.randn(5000, 3)).indices.unique()) == 16


SEED = st.integers(0, 10_000)


@settings(max_examples=60, deadline=None)
@given(seed=SEED, n=st.integers(1, 40), k=st.integers(1, 130), d=st.integers(1, 5), chunk=st.integers(1, 3000),
       log_temperature=st.floats(-6, 6), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_streaming_equals_dense_and_marginals_sum_to_one(seed, n, k, d, chunk, log_temperature, scale):
    """Any shapes, chunks, temperatures and scales: with each code's mass P(k|z) against float64, and nothing lost."""
    torch.manual_seed(seed)
    z, codebook, log_w = scale * torch.randn(n, d), scale * torch.randn(k, d), torch.randn(k)
    temperature = torch.tensor(10.0 ** log_temperature * scale ** 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vqvae.CHUNK_ELEMENTS, "cpu", chunk)
        got = soft_assign(z, codebook, log_w, temperature)
    assert got.stats[:, -1].sum().item() == pytest.approx(n, rel=1e-4)
    assert torch.allclose(got.stats[:, :-1].sum(0), z.sum(0), atol=1e-4 * scale * n)
    indices, stats, distortion = dense_assignment(z.double(), codebook.double(), log_w.double(), temperature.double())
    distances = torch.cdist(z.double(), codebook.double()).square() / scale ** 2
    rows = torch.arange(n)
    assert torch.allclose(distances[rows, got.numbers], distances[rows, indices], atol=1e-4)  # ties within rounding
    assert (z.square().sum() - 2 * got.score).item() == pytest.approx(distortion.item(), rel=1e-4, abs=1e-4 * n * scale ** 2)
    if log_temperature > -2:  # below, rounding decides between nearly equal codes
        assert torch.allclose(got.stats[:, -1].double(), stats[:, -1], atol=2e-2, rtol=1e-3)


@settings(max_examples=20, deadline=None)
@given(seed=SEED, entropy_weight=st.sampled_from([0.0, 1.0, 10.0, math.inf]))
def test_permuting_the_codes_permutes_a_whole_training_step(seed, entropy_weight):
    torch.manual_seed(seed)
    one = BAQuantizer(6, 3, entropy_weight=entropy_weight, restart_threshold=0.0).train()
    one(torch.randn(40, 3))
    other, order = copy.deepcopy(one), torch.randperm(6)
    for name in ("codebook", "ema", "log_w"):
        getattr(other, name).copy_(getattr(one, name)[order])
    z = torch.randn(40, 3)
    first, second = one(z), other(z)
    assert torch.equal(order[second.indices], first.indices) and torch.allclose(second.z_q, first.z_q, atol=1e-6)
    for name in ("codebook", "ema", "log_w"):
        assert torch.allclose(getattr(other, name), getattr(one, name)[order], atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([2.0 ** -10, 0.5, 2.0 ** 10]))
def test_relative_temperature_is_scale_equivariant(seed, scale):
    codebooks = []
    for factor in (1.0, scale):
        torch.manual_seed(seed)
        quantizer = BAQuantizer(6, 3, entropy_weight=math.inf).train()
        for _ in range(4):
            quantizer(factor * torch.randn(30, 3))
        codebooks.append(quantizer.codebook / factor)
    assert torch.allclose(*codebooks, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_permuting_the_codes_permutes_everything(seed):
    torch.manual_seed(seed)
    z, codebook, log_w = torch.randn(30, 3), torch.randn(6, 3), torch.randn(6)
    order = torch.randperm(6)
    one = soft_assign(z, codebook, log_w, torch.tensor(0.7))
    two = soft_assign(z, codebook[order], log_w[order], torch.tensor(0.7))
    assert torch.equal(order[two.numbers], one.numbers)
    assert torch.allclose(two.stats, one.stats[order], atol=1e-5)
    assert one.stats[:, -1].sum().item() == pytest.approx(30, rel=1e-5)


def test_whole_numbers_as_temperatures_fall_too():
    quantizer = BAQuantizer(4, 2, temperature_start=1, temperature_end=0.01, anneal_fraction=1)
    quantizer.set_progress(0.5)
    assert quantizer.temperature.item() == pytest.approx(0.1)


@pytest.mark.parametrize("kind, settings", [
    (VQEMAQuantizer, {"vq_recipe": "classical"}), (VQEMAQuantizer, {"vq_recipe": "tuned"}),
    (BAQuantizer, {"entropy_weight": 3.0, "temperature_start": 0.5, "temperature_end": 0.05, "anneal_fraction": 0.7,
                   "ba_iters": 4})])
def test_a_config_reaches_its_quantizer(kind, settings):
    common = {"codebook_size": 6, "metric": "cosine", "ema_decay": 0.95, "commitment_weight": 0.3, "restart_threshold": 0.2}
    name = "vq_ema" if kind is VQEMAQuantizer else "ba_vq"
    quantizer = vqvae.make_quantizer(vqvae.Config(quantizer=name, latent_dim=5, trellis="4", **common, **settings))
    assert type(quantizer) is kind and quantizer.dim == 5 and quantizer.trellis == 4
    assert all(getattr(quantizer, key.removeprefix("vq_")) == value for key, value in {**common, **settings}.items())
