"""Fused E-step for CUDA, in Triton: the results of vqvae.soft_assign without ever storing a score.

    from vqvae_kernels import soft_assign     # same arguments, same Assignment; tensors on CUDA

Two passes over the N x K scores, as in flash attention (Dao 2022, arXiv 2205.14135), each computing them anew:
    rows      nearest code, its score, and the log-sum-exp of the weighted scores: three numbers per latent
    columns   P from those; per code its count, centroid sum and sum of P^2, over a share of the latents
No atomics: the shares are added afterwards, so results repeat bit for bit.
TRITON_INTERPRET=1 runs it on the CPU (tests/test_kernels.py).
"""

import torch
import triton
import triton.language as tl

if __package__:  # both files copied into a package
    from . import vqvae
else:
    import vqvae

PRECISION = "tf32x3"  # of the products: float32 accuracy on tensor cores; "ieee": without them
PROGRAMS = 512        # of the column pass, at most, unless K alone asks for more: a few per multiprocessor


@triton.jit
def _scores(z, codebook, half_norms, rows, columns, N, K, D: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """vqvae._scores of a block (rows, columns); -inf beyond K. Both passes call it, so they see equal scores."""
    product = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in tl.static_range(0, D, STEP):
        dims = start + tl.arange(0, STEP)
        latents = tl.load(z + rows[:, None] * D + dims[None, :],
                          mask=(rows < N)[:, None] & (dims < D)[None, :], other=0.0)  # (BLOCK_N, STEP)
        codes = tl.load(codebook + columns[None, :] * D + dims[:, None],
                        mask=(columns < K)[None, :] & (dims < D)[:, None], other=0.0)  # (STEP, BLOCK_K)
        product = tl.dot(latents, codes, product, input_precision=PRECISION)
    return product - tl.load(half_norms + columns, mask=columns < K, other=float("inf"))[None, :]


@triton.jit
def _row_pass(z, codebook, half_norms, log_w, temperature, best_out, log_sum_out, index_out, N, K,
              D: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = 2 / tl.load(temperature)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)  # score of the nearest code so far
    index = tl.zeros([BLOCK_N], tl.int32)                 # that code
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)   # largest logit so far; logits are relative to `best`
    total = tl.zeros([BLOCK_N], tl.float32)               # sum of exp(logit - top) so far
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        scores = _scores(z, codebook, half_norms, rows, columns, N, K, D, STEP, PRECISION)  # (BLOCK_N, BLOCK_K)
        block_best, block_index = tl.max(scores, 1, return_indices=True)
        index = tl.where(block_best > best, start + block_index, index)
        new_best = tl.maximum(best, block_best)
        prior = tl.load(log_w + columns, mask=columns < K, other=0.0)
        logits = (scores - new_best[:, None]) * scale + prior[None, :]
        old_top = top + (best - new_best) * scale  # what went before, relative to the new best
        top = tl.maximum(old_top, tl.max(logits, 1))
        total = total * tl.exp(old_top - top) + tl.sum(tl.exp(logits - top[:, None]), 1)
        best = new_best
    tl.store(best_out + rows, best, mask=rows < N)
    tl.store(log_sum_out + rows, top + tl.log(total), mask=rows < N)
    tl.store(index_out + rows, index.to(tl.int64), mask=rows < N)


@triton.jit
def _column_pass(z, codebook, half_norms, log_w, temperature, best, log_sum, stats_out, squares_out, N, K, share,
                 D: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                 PRECISION: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * share
    dims = tl.arange(0, WIDTH)
    scale = 2 / tl.load(temperature)
    prior = tl.load(log_w + columns, mask=columns < K, other=0.0)
    sums = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    counts = tl.zeros([BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in range(first, tl.minimum(first + share, N), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        scores = _scores(z, codebook, half_norms, rows, columns, N, K, D, STEP, PRECISION)  # (BLOCK_N, BLOCK_K)
        row_best = tl.load(best + rows, mask=rows < N, other=float("inf"))  # so P = 0 beyond N
        row_sum = tl.load(log_sum + rows, mask=rows < N, other=0.0)
        # The minimum guards exp at tiny temperatures, should the two passes ever round a score differently.
        P = tl.exp(tl.minimum(scores - row_best[:, None], 0.0) * scale + prior[None, :] - row_sum[:, None])
        latents = tl.load(z + rows[:, None] * D + dims[None, :],
                          mask=(rows < N)[:, None] & (dims < D)[None, :], other=0.0)  # (BLOCK_N, WIDTH)
        sums = tl.dot(tl.trans(P), latents, sums, input_precision=PRECISION)
        counts += tl.sum(P, 0)
        squares += tl.sum(P * P, 0)
    out = tl.program_id(1) * K + columns
    tl.store(stats_out + out[:, None] * (D + 1) + dims[None, :], sums, mask=(columns < K)[:, None] & (dims < D)[None, :])
    tl.store(stats_out + out * (D + 1) + D, counts, mask=columns < K)
    tl.store(squares_out + out, squares, mask=columns < K)


def blocks(d):
    """(STEP, BLOCK_N, BLOCK_K), warps and pipeline stages for dimension d: no register spills and under 99 KiB shared."""
    if d <= 16:
        return (16, 64, 64), {"num_warps": 4, "num_stages": 2}
    if d <= 64:
        return (32, 64, 32), {"num_warps": 4, "num_stages": 2}
    return (32, 32, 32), {"num_warps": 8, "num_stages": 1}


def soft_assign(z, codebook, log_w, temperature):
    """vqvae.soft_assign; all tensors float32 on one CUDA device. D <= 256; extra memory O(N + K D) + 17 MiB."""
    (n, d), k = z.shape, len(codebook)
    (step, block_n, block_k), launch = blocks(d)
    z, codebook, log_w = z.contiguous(), codebook.contiguous(), log_w.contiguous()
    half_norms = vqvae._half_norms(codebook)  # (K,)
    best, log_sum = z.new_empty(2, n)
    indices = torch.empty(n, dtype=torch.int64, device=z.device)
    column_blocks = triton.cdiv(k, block_k)
    shares = max(1, min(PROGRAMS // column_blocks, triton.cdiv(n, block_n)))
    share = triton.cdiv(triton.cdiv(n, shares), block_n) * block_n  # latents of one program
    stats, squares = z.new_empty(shares, k, d + 1), z.new_empty(shares, k)
    with torch.cuda.device_of(z):
        _row_pass[(triton.cdiv(n, block_n),)](z, codebook, half_norms, log_w, temperature, best, log_sum, indices, n, k,
                                              d, step, block_n, block_k, PRECISION, **launch)
        _column_pass[(column_blocks, shares)](z, codebook, half_norms, log_w, temperature, best, log_sum, stats, squares, n, k,
                                              share, d, step, max(16, triton.next_power_of_2(d)), block_n, block_k, PRECISION,
                                              **launch)
    return vqvae.Assignment(indices, stats.sum(0), best.sum(), n - squares.sum())
