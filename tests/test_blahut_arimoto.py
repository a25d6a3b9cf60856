"""The textbook algorithm against closed forms of R(D)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae import blahut_arimoto


def binary_entropy(p):
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def hamming(k):
    return 1 - torch.eye(k, dtype=torch.float64)


@pytest.mark.parametrize("p", [0.5, 0.3, 0.1])
@pytest.mark.parametrize("D", [0.02, 0.05, 0.09])
def test_bernoulli_source_with_hamming_distortion(p, D):
    # R(D) = H(p) - H(D), reached at slope beta = ln((1 - D) / D): Cover & Thomas, theorem 10.3.1.
    point = blahut_arimoto(hamming(2), math.log((1 - D) / D), source=torch.tensor([1 - p, p], dtype=torch.float64))
    assert abs(point.distortion - D) < 1e-6
    assert abs(point.rate - (binary_entropy(p) - binary_entropy(D))) < 1e-6


@pytest.mark.parametrize("k", [3, 8])
def test_uniform_source_with_hamming_distortion(k):
    # R(D) = log2 k - H(D) - D log2(k - 1).
    D = 0.2
    point = blahut_arimoto(hamming(k), math.log((k - 1) * (1 - D) / D))
    assert abs(point.distortion - D) < 1e-6
    assert abs(point.rate - (math.log2(k) - binary_entropy(D) - D * math.log2(k - 1))) < 1e-6


def test_binary_source_with_erasure_distortion():
    # Letters 0, 1, erasure; d = 0 if right, 1 if erased, very large if wrong: R(D) = 1 - D on the line of
    # slope ln 2 between (0, 1) and (1, 0); off that slope the ends are reached.
    distances = torch.tensor([[0.0, 1e3, 1.0], [1e3, 0.0, 1.0]], dtype=torch.float64)
    steep, flat = blahut_arimoto(distances, 2.0), blahut_arimoto(distances, 0.3)
    assert abs(steep.rate - 1) < 1e-6 and abs(steep.distortion) < 1e-6
    assert abs(flat.rate) < 1e-6 and abs(flat.distortion - 1) < 1e-6


def test_point_beyond_the_useful_distortion_has_rate_zero():
    point = blahut_arimoto(hamming(2), 0.1, source=torch.tensor([0.9, 0.1], dtype=torch.float64))
    assert abs(point.rate) < 1e-6 and abs(point.distortion - 0.1) < 1e-6


def test_it_stops_by_the_bound_gap():
    distances = torch.rand(20, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="bound gap"):
        blahut_arimoto(distances, 5.0, tolerance=1e-12, max_iterations=3)


def test_float32_input_stays_float32():
    point = blahut_arimoto(torch.rand(20, 6), 5.0, tolerance=1e-4)
    assert point.P.dtype == point.rate.dtype == torch.float32


@pytest.mark.parametrize("distances, beta", [
    (torch.rand(3), 1.0), (torch.rand(0, 3), 1.0), (torch.full((2, 2), math.nan), 1.0),
    (torch.rand(2, 2), -1.0), (torch.rand(2, 2), math.inf), (torch.rand(2, 2), math.nan), (torch.ones(2, 2).int(), 1.0)])
def test_bad_arguments(distances, beta):
    with pytest.raises(ValueError):
        blahut_arimoto(distances, beta)


def test_no_iteration_is_a_bad_argument():
    with pytest.raises(ValueError, match="max_iterations"):
        blahut_arimoto(torch.rand(2, 2), 1.0, max_iterations=0)


def test_probabilities_of_another_precision_are_taken():
    distances, source, prior = torch.rand(3, 2).double(), torch.rand(3) + 0.1, torch.rand(2) + 0.1
    expected = blahut_arimoto(distances, 2.0, source.double(), prior.double())
    assert torch.allclose(blahut_arimoto(distances, 2.0, source, prior).P, expected.P, atol=1e-5)


@pytest.mark.parametrize("which", ["source", "prior"])
@pytest.mark.parametrize("values", [[-0.5, 1.5], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [0.5, 0.3, 0.2]])
def test_bad_probabilities(which, values):
    with pytest.raises(ValueError, match=which):
        blahut_arimoto(torch.rand(2, 2), 1.0, **{which: torch.tensor(values)})


def test_a_zero_is_allowed_in_the_source_only():
    distances = torch.rand(2, 2, dtype=torch.float64)
    zero = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert blahut_arimoto(distances, 1.0, source=zero).rate.item() == pytest.approx(0, abs=1e-8)  # one source symbol
    with pytest.raises(ValueError, match="prior"):
        blahut_arimoto(distances, 1.0, prior=zero)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), beta=st.floats(0.1, 20))
def test_marginals_permutation_and_optimality(seed, beta):
    generator = torch.Generator().manual_seed(seed)
    distances = torch.rand(12, 5, generator=generator, dtype=torch.float64)
    point = blahut_arimoto(distances, beta, tolerance=1e-6)
    assert torch.allclose(point.P.sum(1), torch.ones(12, dtype=torch.float64))
    assert torch.allclose(point.q, point.P.mean(0))
    order = torch.randperm(5, generator=generator)
    permuted = blahut_arimoto(distances[:, order], beta, tolerance=1e-6)
    lagrangian = point.rate * math.log(2) + beta * point.distortion
    assert torch.allclose(permuted.rate * math.log(2) + beta * permuted.distortion, lagrangian, atol=2e-6)
    # No channel of a random family does better.
    for _ in range(20):
        P = torch.softmax(4 * torch.randn(12, 5, generator=generator, dtype=torch.float64), 1)
        rate = (P * (P / P.mean(0)).log()).sum(1).mean()
        assert rate + beta * (P * distances).sum(1).mean() >= lagrangian - 2e-6


def test_a_slope_too_steep_for_the_dtype_is_named():
    with pytest.raises(ValueError, match="too much for torch.float32"):
        blahut_arimoto(torch.rand(4, 3), 1e39)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), beta=st.floats(0.5, 10))
def test_the_objective_never_rises(seed, beta):
    generator = torch.Generator().manual_seed(seed)
    distances = torch.rand(15, 6, generator=generator, dtype=torch.float64)
    q = torch.full((6,), 1 / 6, dtype=torch.float64)
    last = math.inf
    for _ in range(30):  # one iteration at a time: the gap is never asked for
        point = blahut_arimoto(distances, beta, prior=q, tolerance=math.inf, max_iterations=1)
        value = (point.rate * math.log(2) + beta * point.distortion).item()
        assert value <= last + 1e-12
        last, q = value, point.q
    best = blahut_arimoto(distances, beta, tolerance=1e-6)
    assert last - (best.rate * math.log(2) + beta * best.distortion).item() < 0.02  # nor does it stand still
