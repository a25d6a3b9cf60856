"""What needs a CUDA device: agreement with the CPU, bounded memory, no host sync, a whole run. Skipped without one."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import vqvae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def _no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("n", "k", "d"), [(4096, 512, 8), (5000, 1000, 64), (2048, 16384, 8)])
def test_e_step_agrees_with_the_cpu(n, k, d):
    z, codebook, log_w = torch.randn(n, d), torch.randn(k, d), torch.randn(k)
    temperature = torch.tensor(0.05 * d)
    here = vqvae.soft_assign(z.double(), codebook.double(), log_w.double(), temperature.double())
    there = vqvae.soft_assign(z.cuda(), codebook.cuda(), log_w.cuda(), temperature.cuda())
    differ = (there.numbers.cpu() != here.numbers).nonzero().squeeze(1)
    chosen = [(z[differ] - codebook[i[differ]]).square().sum(1) for i in (there.numbers.cpu(), here.numbers)]
    assert len(differ) < n / 1000 and torch.allclose(*chosen, rtol=1e-4)  # ties within rounding only
    assert torch.allclose(there.stats[:, -1].cpu().double(), here.stats[:, -1], rtol=1e-3, atol=1e-4)
    assert torch.allclose(there.score.cpu().double(), here.score, rtol=1e-4)


@pytest.mark.parametrize(("n", "k", "d"), [(4096, 512, 8), (5000, 1000, 64), (2048, 16384, 8), (1500, 777, 200),
                                           (4096, 512, 256), (100, 3000, 32)])
@pytest.mark.parametrize("temperature", [0.2, 0.02])  # of the mean distortion: start and end of the annealing
def test_the_fused_e_step_agrees_with_the_chunked_one(n, k, d, temperature):
    kernels = pytest.importorskip("vqvae_kernels", reason="needs triton")
    z, codebook, log_w = torch.randn(n, d).cuda(), torch.randn(k, d).cuda(), torch.randn(k).cuda()
    tau = temperature * (z - codebook[vqvae.nearest_code(z, codebook)]).square().sum() / n
    chunked = vqvae.soft_assign(z, codebook, log_w, tau)
    fused = kernels.soft_assign(z, codebook, log_w, tau)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = kernels.soft_assign(z, codebook, log_w, tau)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, two) for one, two in zip(fused, again))  # no atomics
    differ = fused.numbers != chunked.numbers
    distances = [(z - codebook[i])[differ].double().square().sum(1) for i in (fused.numbers, chunked.numbers)]
    assert differ.sum() < n / 1000 and torch.allclose(*distances, rtol=1e-4)  # ties within rounding only
    assert (fused.stats[:, -1] - chunked.stats[:, -1]).abs().sum() < 1e-4 * n
    assert torch.allclose(fused.stats[:, -1], chunked.stats[:, -1], rtol=1e-3, atol=1e-4)
    error = (fused.stats[:, :-1] - chunked.stats[:, :-1]).norm() / chunked.stats[:, :-1].norm()
    assert error < 1e-4
    assert torch.allclose(fused.score, chunked.score, rtol=1e-4)
    assert torch.allclose(fused.overlap, chunked.overlap, rtol=1e-3, atol=1e-3 * n)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("k", [65536, 262144])
def test_memory_of_a_step_is_bounded(k, fused, monkeypatch):
    soft_assign = pytest.importorskip("vqvae_kernels", reason="needs triton").soft_assign if fused else vqvae.soft_assign
    monkeypatch.setattr(vqvae, "fastest_e_step", lambda device, dim: soft_assign)
    quantizer = vqvae.BAQuantizer(k, 8).cuda().train()
    z = torch.randn(16384, 8, device="cuda")
    quantizer(z)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantizer(z)
    assert torch.cuda.max_memory_allocated() - before < 256 * 2**20 + 20 * 4 * (z.numel() + 9 * k)


@pytest.mark.parametrize("trellis", ["none", "4", "16", "64"])
@pytest.mark.parametrize("prediction", ["none", "checkerboard", "scaled"])
@pytest.mark.parametrize("quantizer", ["vq_ema", "ba_vq"])
def test_a_step_never_waits_for_the_device(quantizer, prediction, trellis):
    config = vqvae.Config(hidden_dim=16, latent_dim=8, codebook_size=64, quantizer=quantizer, prediction=prediction,
                          trellis=trellis)
    model = vqvae.make_model(config).cuda().train()
    optimizer = vqvae.make_optimizer(model, 1e-3, "muon")
    x = torch.rand(16, 3, 32, 32, device="cuda")
    vqvae.train_step(model, optimizer, x, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for progress in (0.1, 0.9):
            model.quantizer.set_progress(progress)
            vqvae.train_step(model, optimizer, x, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("trellis", ["none", "4", "16", "64"])
@pytest.mark.parametrize("prediction", ["none", "checkerboard", "scaled"])
@pytest.mark.parametrize("quantizer", ["vq_ema", "ba_vq"])
def test_replayed_steps_are_the_steps(quantizer, prediction, trellis):
    check_replayed_steps(vqvae.Config(hidden_dim=16, latent_dim=8, codebook_size=2048, quantizer=quantizer, prediction=prediction,
                                      trellis=trellis, ema_decay=0.5))


def test_replayed_steps_of_adamw_are_the_steps():
    check_replayed_steps(vqvae.Config(hidden_dim=16, latent_dim=8, codebook_size=2048, ema_decay=0.5, optimizer="adamw"))


def check_replayed_steps(config):
    torch.use_deterministic_algorithms(True, warn_only=True)  # or the sums over latents differ from run to run
    images = torch.rand(12, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0)).cuda()  # 1024 latents: codes restart
    results = []
    for take_step in (vqvae.train_step, vqvae.GraphedStep(torch.device("cuda"))):
        model = vqvae.make_model(config).cuda().train()
        optimizer = vqvae.make_optimizer(model, 1e-3, config.optimizer)
        for i, x in enumerate(images):
            torch.manual_seed(i)
            vqvae.set_learning_rate(optimizer, 1e-3 / (i + 1))
            model.quantizer.set_progress(i / 12)
            losses, indices = take_step(model, optimizer, x, torch.bfloat16, quantize=i >= 5)
            results.append([losses.clone(), None if indices is None else indices.clone()])
        results.append(list(model.state_dict().values()))
    assert all(one is two or torch.equal(one, two) for eager, graphed in zip(results[:13], results[13:])
               for one, two in zip(eager, graphed) if one is None or torch.is_tensor(one))


@pytest.mark.parametrize("compile", [False, True])
def test_a_whole_run_and_its_checkpoint_on_the_cpu(tiny_config, compile):
    config = tiny_config(device="cuda", precision="auto", compile=compile, name=f"cuda_{compile}")
    metrics = vqvae.train(config)
    model, _ = vqvae.load_model(vqvae.Path(config.out_dir) / config.name / "final_model.pt")
    again = vqvae.evaluate(model, vqvae.test_images(config), config.codebook_size)
    assert again["psnr"] == pytest.approx(metrics["psnr"], abs=0.05)


@pytest.mark.parametrize("quantizer", ["vq_ema", "ba_vq"])
def test_deterministic_runs_have_the_same_bits(tiny, tmp_path, quantizer):
    folders = [tmp_path / "experiments" / name for name in ("one", "two")]
    for folder in folders:  # each in a process of its own: cuBLAS reads its workspace setting once
        settings = tiny(device="cuda", precision="auto", quantizer=quantizer, name=folder.name, epochs=4)
        flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        subprocess.run([sys.executable, str(ROOT / "train.py"), *flags, "--deterministic"], check=True)
    one, two = (torch.load(folder / "final_model.pt", weights_only=True)["model"] for folder in folders)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (folders[0] / "metrics.jsonl").read_bytes() == (folders[1] / "metrics.jsonl").read_bytes()


def test_resume_on_the_device(tiny, tmp_path):
    flags = [word for key, value in tiny(device="cuda:0", name="stopped", epochs=30).items() for word in (f"--{key}", str(value))]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    folder = tmp_path / "experiments" / "stopped"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        process.terminate()
        assert process.wait() in (0, 143)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads((folder / "final_metrics.json").read_text())["num_images"] == 40
