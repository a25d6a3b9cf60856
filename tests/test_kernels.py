"""vqvae_kernels.soft_assign against vqvae.soft_assign through Triton's interpreter, and compiled for GPUs that are not there."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import vqvae

triton = pytest.importorskip("triton", reason="triton comes with CUDA builds of torch")
import vqvae_kernels as kernels

# n, k, d, temperature: blocks that do not divide, fewer codes or rows than a block, several shares of the rows
CASES = {"odd": (150, 130, 8, 0.5), "cold": (150, 130, 8, 1e-3), "hard": (70, 40, 3, 1e-30), "one code": (33, 1, 2, 0.1),
         "one row": (1, 70, 5, 0.1), "prior": (97, 65, 20, 3.0), "wide": (80, 66, 200, 5.0), "widest": (65, 33, 256, 1.0),
         "many codes": (40, 2100, 4, 0.2)}
SCRIPT = """
import sys, torch, vqvae_kernels as kernels
cases = torch.load(sys.argv[1])
torch.save({name: tuple(kernels.soft_assign(*case)) for name, case in cases.items()}, sys.argv[2])
"""


def make_case(n, k, d, temperature):
    z, codebook, log_w = torch.randn(n, d), torch.randn(k, d), 3 * torch.randn(k)
    codebook[64:130:64] = codebook[0]  # exact ties, in other blocks
    return z, codebook, log_w, torch.tensor(temperature)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """{name: (arguments, fused results)}; another process, since Triton reads the variable when it is imported."""
    folder = tmp_path_factory.mktemp("kernels")
    torch.manual_seed(0)
    cases = {name: make_case(*case) for name, case in CASES.items()}
    torch.save(cases, folder / "cases.pt")
    subprocess.run([sys.executable, "-c", SCRIPT, folder / "cases.pt", folder / "results.pt"], check=True,
                   env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    results = torch.load(folder / "results.pt")
    return {name: (case, vqvae.Assignment(*results[name])) for name, case in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_fused_e_step_equals_the_chunked_one(computed, name):
    (z, codebook, log_w, temperature), fused = computed[name]
    chunked = vqvae.soft_assign(z, codebook, log_w, temperature)
    assert torch.equal(fused.numbers, chunked.numbers)
    assert fused.stats.shape == chunked.stats.shape
    scale = z.abs().max()
    assert torch.allclose(fused.stats[:, -1], chunked.stats[:, -1], rtol=1e-4, atol=1e-4)
    assert torch.allclose(fused.stats[:, :-1], chunked.stats[:, :-1], rtol=1e-4, atol=1e-4 * scale)
    assert torch.allclose(fused.score, chunked.score, rtol=1e-5, atol=1e-4)
    assert torch.allclose(fused.overlap, chunked.overlap, rtol=1e-4, atol=1e-4 * len(z))
    assert fused.stats[:, -1].sum().item() == pytest.approx(len(z), rel=1e-5)  # every latent is shared out wholly


@pytest.mark.parametrize(("device", "d", "capability", "fused"), [
    ("cuda:0", 16, (9, 0), True), ("cuda", 64, (8, 0), True), ("cuda", 65, (9, 0), False), ("cuda", 16, (7, 5), False),
    ("cpu", 16, None, False), ("mps", 16, None, False)])
def test_training_has_the_fused_e_step_where_it_is_faster(device, d, capability, fused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert vqvae.fastest_e_step(torch.device(device), d) is (kernels.soft_assign if fused else vqvae.soft_assign)


def test_in_a_package_it_has_the_kernels_beside_it(tmp_path, monkeypatch):
    (tmp_path / "their_network").mkdir()
    for name in ("vqvae.py", "vqvae_kernels.py"):
        (tmp_path / "their_network" / name).symlink_to(ROOT / name)
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("their_network.vqvae")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    e_step = theirs.fastest_e_step(torch.device("cuda"), 8)
    assert e_step.__module__ == "their_network.vqvae_kernels" and sys.modules[e_step.__module__].vqvae is theirs


@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3), reason="ahead-of-time interface of triton 3.3")
@pytest.mark.parametrize(("capability", "d"), [(80, 256), (90, 8)])
def test_compiles_within_the_shared_memory_of_any_gpu(capability, d, tmp_path, monkeypatch):
    """99 KiB is the least of Ampere and later; with more a launch fails."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (step, block_n, block_k), launch = kernels.blocks(d)
    values = {"D": d, "STEP": step, "WIDTH": max(16, d), "BLOCK_N": block_n, "BLOCK_K": block_k, "PRECISION": kernels.PRECISION}
    types = {**dict.fromkeys(values, "constexpr"), "N": "i32", "K": "i32", "share": "i32", "index_out": "*i64"}
    for kernel in (kernels._row_pass, kernels._column_pass):
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
        constants = {name: values[name] for name in kernel.arg_names if name in values}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        assert triton.compile(source, target=target, options=launch).metadata.shared <= 99 * 1024
