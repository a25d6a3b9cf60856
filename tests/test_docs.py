"""The notebook runs, the snippets in the documents work, and the documents name files that exist."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import analysis
import vqvae


def run_notebook(out_dir, monkeypatch):
    """Execute analyze.ipynb with RUNS=out_dir; returns its outputs."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("RUNS", str(out_dir))
    notebook = nbformat.read(ROOT / "analyze.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": str(ROOT)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures_and_text(outputs):
    text = "".join(output.get("text", "") for output in outputs)
    return sum("image/png" in output.get("data", {}) for output in outputs), text


def test_the_notebook_runs_without_runs(tmp_path, monkeypatch):
    pictures, text = pictures_and_text(run_notebook(tmp_path / "none", monkeypatch))
    assert pictures == 7 and "make run" in text and "sample" in text and "BA-VQ over VQ-EMA" in text


def test_the_notebook_shows_the_users_runs(tmp_path, tiny_config, monkeypatch):
    for quantizer in ("vq_ema", "ba_vq"):
        for seed in (0, 1):
            vqvae.train(tiny_config(quantizer=quantizer, name=f"mine_{quantizer}_{seed}", seed=seed, epochs=1))
    pictures, text = pictures_and_text(run_notebook(tiny_config().out_dir, monkeypatch))
    assert pictures == 7 and "mine_ba_vq_1" in text and "sample" not in text and " ± " in text


def test_figures_of_every_kind(tiny_config, tmp_path):
    for metric in ("euclid", "cosine"):
        vqvae.train(tiny_config(name=metric, metric=metric, epochs=1))
    folders = analysis.find_runs(tiny_config().out_dir)
    model, config, images = analysis.open_run(folders[0])
    assert config.metric == "cosine" and len(images) == 40
    histogram = vqvae.code_histogram(model, images, 16)
    records = analysis.load_runs(folders)
    figures = [analysis.training_curves(folders), analysis.usage_histograms({"a": histogram}),
               analysis.reconstruction_grid({"a": model}, images[:3]), analysis.rate_distortion(records),
               analysis.codes_and_latents(model, images, "a"), analysis.cell_sizes({"a": model}, images),
               analysis.size_picture(records)]
    for figure in figures:
        analysis.save_figure(figure, tmp_path / "figure.png")
        labels = [text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())]
        assert (tmp_path / "figure.png").stat().st_size > 3000 and (any(labels) or figure is figures[2])


def test_over_seeds_shows_mean_and_deviation(tiny_config):
    def record(seed, psnr):
        return {"method": "BA-VQ", "config": tiny_config(seed=seed).to_dict(), "psnr": psnr,
                "perplexity": 10.0, "usage_rate": 1.0}

    assert "21.00 ± 1.41" in analysis.over_seeds([record(0, 20.0), record(1, 22.0)])


def test_the_lifting_snippet_works():
    text = (ROOT / "CODE_OVERVIEW.md").read_text()
    snippet = re.search(r"## Lifting.*?```python\n(.*?)```", text, re.S).group(1)
    names = {"z": torch.randn(2, 64, 4, 4), "step": 1, "total_steps": 10}
    exec(snippet, names)
    swap = re.search(r"stood:\n\n```python\n(.*?)```", text, re.S).group(1)
    exec(swap, names)
    assert names["quantized"].shape == (2, 64, 4, 4)
    assert names["codes"].shape == (2, 4, 4, 64) and names["loss"].shape == ()
    assert len(snippet.strip().splitlines()) == 5


def test_it_stands_in_for_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch", reason="optional peer library is not installed")
    z = torch.randn(2, 8, 4, 4)
    theirs = library.VectorQuantize(dim=8, codebook_size=16, accept_image_fmap=True)(z)
    ours = vqvae.BAQuantizer(codebook_size=16, dim=8)(z)
    for one, two in zip(theirs, ours):
        assert one.shape == two.shape or one.numel() == two.numel() == 1


@pytest.mark.parametrize("document", ["README.md", "CODE_OVERVIEW.md"])
def test_documents_name_files_that_exist(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|sh|yaml|ipynb|md|txt))`", text))
    made_by_runs = {"config.yaml"}
    assert len(named) > 8
    assert not [name for name in named - made_by_runs if not (ROOT / name).exists()]


def test_the_readme_commands_are_valid():
    text = (ROOT / "README.md").read_text()
    commands = {line.strip() for line in re.findall(r"^python train\.py .*$", text, re.M)}
    assert len(commands) >= 5
    for command in commands:
        words = command.split("#")[0].split()
        done = subprocess.run([sys.executable, *words[1:], "--dry_run"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
