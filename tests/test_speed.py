"""Arithmetic and tables of the speed benchmarks; nothing here is timed."""

import json
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import quantizer_step
import scaling
import throughput
import vqvae

RATES = {"flops_per_second": 1e9, "copy_bytes_per_second": 1e9}


def test_floor_is_the_larger_of_operations_and_bytes():
    assert quantizer_step.floor_seconds(1000, 500, 10, RATES) == pytest.approx(2 * 2 * 1000 * 500 * 10 / 1e9)
    assert quantizer_step.floor_seconds(1000, 1, 1, RATES) == pytest.approx(4 * (2 * 1000 + 3 * 2) / 1e9)


def test_floor_of_the_network_counts_its_operations(tiny_config, monkeypatch):
    monkeypatch.setattr(throughput, "machine_rates", lambda *_: RATES)
    floors = [throughput.step_floor(tiny_config(batch_size=size), torch.device("cpu")) for size in (4, 8)]
    assert floors[1]["network_flops"] == 2 * floors[0]["network_flops"] > 0
    assert floors[0]["network_bytes"] < floors[1]["network_bytes"] < 2 * floors[0]["network_bytes"]  # parameters once


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
def test_exponent_of_a_power_law(slope):
    records = [{"K": k, "seconds": 3 * k**slope, "extra_bytes": 0} for k in (512, 4096, 65536)]
    assert scaling.exponent(records, "K", "seconds") == pytest.approx(slope)
    assert scaling.exponent(records, "K", "extra_bytes") is None


def test_tables_name_what_did_not_fit():
    record = {"K": 64, "D": 8, "N": 128, "floor": 0.001, "seconds": {"vq_ema": 0.01, "ba_vq": 0.02}}
    row = quantizer_step.time_table([record], quantizer_step.METHODS).splitlines()[-1]
    assert row == "| 64 | 8 | 128 | 1 | 10 | 20 | – | – | 20.00 | 2.00 | – | – |"


def test_crossover_is_where_the_fused_step_stays_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    assert "Not measured" in scaling.crossover()
    gains = {512: 1.5, 1024: 0.8, 4096: 1.2, 16384: 3.0}
    records = [{"K": k, "D": 8, "N": 64, "seconds": {"ba_vq_chunked": gain, "ba_vq_fused": 1.0}} for k, gain in gains.items()]
    (tmp_path / "quantizer_step_fused_cuda.json").write_text(json.dumps({"machine": {"device": "some GPU"}, "records": records}))
    assert "ahead from K=4096" in scaling.crossover()


def test_points_vary_one_quantity_at_a_time():
    plan = scaling.points(scaling.parse(["--max_processes", "4", "--tiny"]))
    for what, planned in plan.items():
        values = [{p[name] for p in planned} for name in ("K", "D", "N", "processes")]
        assert sum(len(v) > 1 for v in values) == 1 and len({p[what] for p in planned}) > 1
    assert sorted({p["processes"] for p in plan["processes"]}) == [1, 2, 4]


def test_several_processes_take_a_gpu_each(monkeypatch):
    words = []
    done = SimpleNamespace(stdout="{}", returncode=0)
    monkeypatch.setattr(scaling.subprocess, "run", lambda command, **_: words.append(command) or done)
    for processes, device in ((1, "cpu"), (2, "cuda:1")):
        scaling.run_point({"processes": processes}, torch.device(device))
    assert [command[command.index("--device") + 1] for command in words] == ["cpu", "cuda"]


def test_a_measurement_that_fails_ends_without_a_traceback(monkeypatch):
    failed = SimpleNamespace(stdout="", returncode=2)
    monkeypatch.setattr(scaling.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(vqvae.UserError, match="failed, for the reason above"):
        scaling.run_point({"processes": 1}, torch.device("cpu"))
    words = ["--memory", "--codebook_sizes", "64", "--latent_dims", "8", "--vectors", "64", "--device", "cpu"]
    assert quantizer_step.main(words) == 2


def test_a_rehearsal_stores_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "RESULTS", tmp_path / "results" / "speed")
    monkeypatch.setattr(scaling, "run_point", lambda point, device: {**point, "seconds": 1.0})
    scaling.main(["--tiny", "--device", "cpu"])
    assert not list(tmp_path.iterdir())


def test_a_damaged_measurement_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    (tmp_path / "scaling_cpu.json").write_text('{"machine": ')
    with pytest.raises(vqvae.UserError, match="scaling_cpu.json: cannot read this JSON file"):
        scaling.main(["--summary"])


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(vqvae, "pick_device", lambda device: (torch.device("cuda"), "asked for"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(vqvae.UserError, match="max_processes: 2 is more than the 1 GPUs"):
        scaling.main(["--max_processes", "2"])


def test_throughput_refuses_what_it_does_not_do():
    for words in (["--dry_run"], ["--quantizer", "vq_ema"], ["--metric", "cosine"], ["--steps", "0"]):
        with pytest.raises(vqvae.UserError, match=words[0][2:]):
            throughput.parse(words)


def test_throughput_takes_prediction_and_trellis_where_asked():
    configs = [throughput.parse(words)[1] for words in ([], ["--prediction", "scaled"], ["--trellis", "4"])]
    assert [(config.prediction, config.states) for config in configs] == [("none", 0), ("scaled", 16), ("none", 4)]


def test_throughput_names_its_files_by_what_decides_the_speed():
    names = {throughput.size_name(throughput.parse(words)[1]) for words in (
        [], ["--dataset", "dead_leaves", "--image_size", "64"], ["--downsample", "8"], ["--precision", "float32"],
        ["--prediction", "scaled"], ["--optimizer", "adamw"])}
    assert names == {"h128x2_d256_k512_b256" + more
                     for more in ("_muon", "_64by4_muon", "_32by8_muon", "_muon_float32", "_scaled16_muon", "")}


def test_throughput_trains_at_the_temperature_asked_for(tiny_config):
    images = torch.zeros(4, 16, 16, 3, dtype=torch.uint8)
    for progress, temperature in ((0.0, 0.2), (1.0, 0.02)):
        config = tiny_config(batch_size=2, temperature_start=0.2, temperature_end=0.02)
        epoch, model = throughput.project_epoch(config, images, torch.device("cpu"), progress=progress)
        epoch()
        found = [module.temperature.item() for module in model.modules() if isinstance(module, vqvae.BAQuantizer)]
        assert found and found == pytest.approx([temperature] * len(found))


def test_peak_memory_of_a_large_step_stays_far_below_its_scores():
    """N x K is 512 MiB here; a heap whose holes are split by small tensors would grow to about that."""
    command = [sys.executable, str(ROOT / "benchmarks" / "quantizer_step.py"), "--memory", "--one_size", "--device", "cpu",
               "--codebook_sizes", "65536", "--latent_dims", "8", "--vectors", "2048"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert json.loads(done.stdout)["extra_bytes"] < 80 * 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_kept_for_the_next_step():
    program = """
import resource, torch, vqvae
if KEEP:
    vqvae.keep_freed_memory()
model = vqvae.make_model(vqvae.Config(hidden_dim=64, latent_dim=8))
optimizer = torch.optim.AdamW(model.parameters())
x = torch.rand(128, 3, 32, 32)
faults = []
for step in range(20):
    vqvae.train_step(model, optimizer, x, torch.float32)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[9])
"""
    faults = []
    for keep in ("True", "False"):
        command = [sys.executable, "-c", program.replace("KEEP", keep)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        faults.append(int(done.stdout))
    assert faults[0] < 0.05 * faults[1]


def test_training_on_the_cpu_keeps_it(tiny_config, monkeypatch):
    calls = []
    monkeypatch.setattr(vqvae, "keep_freed_memory", lambda: calls.append("once"))
    vqvae.train(tiny_config(epochs=1, device="cpu"))
    assert calls == ["once"]
