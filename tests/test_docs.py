"""The notebook runs, the snippets in the documents work, and the documents name files that exist."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import analysis
import train
import vqvae

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare


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
    assert pictures == 8 and "make run" in text and "sample" in text
    assert text.count("BA-VQ over VQ-EMA") == 2 and " ± " in text


def test_the_notebook_shows_the_users_runs(tmp_path, tiny_config, monkeypatch):
    for quantizer in ("vq_ema", "ba_vq"):
        for seed in (0, 1):
            vqvae.train(tiny_config(quantizer=quantizer, name=f"mine_{quantizer}_{seed}", seed=seed, epochs=1))
    pictures, text = pictures_and_text(run_notebook(tiny_config().out_dir, monkeypatch))
    assert pictures == 8 and "mine_ba_vq_1" in text and "sample" not in text and " ± " in text


def test_figures_of_every_kind(tiny_config, tmp_path):
    small = dict(epochs=1, image_size=8, val_size=0)  # no SSIM, no validation images
    vqvae.train(tiny_config(name="ema", quantizer="vq_ema", vq_recipe="classical", **small))
    vqvae.train(tiny_config(name="ba", **small))
    vqvae.train(tiny_config(name="ba_cosine", metric="cosine", latent_dim=2, **small))
    vqvae.train(tiny_config(name="ba_lambda0_k8", entropy_weight=0.0, codebook_size=8, latent_dim=1, **small))
    records, models, histograms, images = analysis.open_runs(analysis.load_runs(analysis.find_runs(tiny_config().out_dir)))
    assert [record["name"] for record in records] == ["ba", "ba_cosine", "ba_lambda0_k8", "ema"] and len(images) == 40
    assert [histogram.shape[1] for histogram in histograms] == [64, 16, 32, 16]
    figures = [analysis.training_curves(records), analysis.usage_histograms(records, histograms),
               analysis.reconstruction_grid(records, models, images, [0, 3, 99]), analysis.rate_distortion(records),
               analysis.codes_and_latents(records, models, images), analysis.cell_sizes(records, models, images),
               analysis.size_picture(records)]
    for figure in figures:
        vqvae.write_figure(tmp_path / "figure.png", figure)
        shown = [axes for axes in figure.axes if axes.has_data()]
        assert (tmp_path / "figure.png").stat().st_size > 3000 and shown
        if figure is not figures[2]:
            assert all(axes.get_xlabel() and axes.get_ylabel() for axes in shown) and figure.legends
    assert [axes.get_xlabel() for axes in figures[2].axes[-2:]] == ["image 0", "image 3"]
    assert "-" in analysis.table(records).splitlines()[1].split()  # the SSIM that is absent


def test_training_curves_say_which_images_they_are_of(tmp_path):
    sample = ROOT / "results" / "sample" / "ba_vq_k32_s0"
    lines = [json.loads(line) for line in (sample / "metrics.jsonl").read_text().splitlines()]
    for split, kept in (("val", lines), ("train", [{k: v for k, v in line.items() if k[:4] != "val_"} for line in lines])):
        (tmp_path / split).mkdir()
        (tmp_path / split / "final_metrics.json").write_text((sample / "final_metrics.json").read_text())
        (tmp_path / split / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    left, right = analysis.training_curves(analysis.load_runs([tmp_path / "val", tmp_path / "train"])).axes
    for axes, of_val, of_train in ((left, "val_psnr", None), (right, "val_perplexity", "train_perplexity")):
        val, train = axes.get_lines()
        assert (val.get_label(), train.get_label()) == ("val", "train (training images)")
        assert "validation unless noted" in axes.get_ylabel()
        share = 1 if axes is left else 32
        assert list(val.get_ydata()) == [line[of_val] / share for line in lines]
        assert list(train.get_ydata()) == [line[of_train] / share if of_train else vqvae.psnr(line["recon_loss"]).item()
                                           for line in lines]


@pytest.mark.parametrize("name", ["short", "vq_ema_classical_k16384_d8_h64_e10_s0"])
def test_the_legend_fits_the_figure(tiny_config, name):
    records = [made_up(tiny_config(name=name + suffix)) for suffix in ("a", "b")]
    figure = analysis.usage_histograms(records, [torch.arange(1, 17), torch.arange(1, 17)])
    figure.draw_without_rendering()
    legend, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert legend.x0 >= 0 and legend.x1 <= whole.width and legend.y0 >= 0
    assert (legend.height < 30) == (name == "short")  # side by side where there is room


def test_a_figure_of_no_runs_has_an_empty_legend():
    for figure in (analysis.training_curves([]), analysis.usage_histograms([], []), analysis.rate_distortion([]),
                   analysis.size_picture([])):
        assert not figure.legends[0].get_texts()


def test_runs_on_other_images_are_left_out(tiny_config, capsys):
    for name, size in (("a", 16), ("b", 8), ("c", 16)):
        vqvae.train(tiny_config(name=name, image_size=size, epochs=1))
    (vqvae.Path(tiny_config().out_dir) / "b" / "final_model.pt").unlink()  # nor looked at
    records, models, _, images = analysis.open_runs(analysis.load_runs(analysis.find_runs(tiny_config().out_dir)))
    assert [record["name"] for record in records] == ["a", "c"] and len(models) == 2 and images.shape[1] == 16
    assert "left out, other test images: b" in capsys.readouterr().out


def test_runs_whose_images_are_gone_are_left_out(tiny_config, capsys, monkeypatch):
    for name in "ab":
        vqvae.train(tiny_config(name=name, image_size=16 if name == "b" else 8, epochs=1))
    real = vqvae.test_images

    def test_images(config):
        if config.image_size == 8:
            raise vqvae.UserError("data_dir: nowhere is no folder")
        return real(config)

    monkeypatch.setattr(vqvae, "test_images", test_images)
    records = analysis.load_runs(analysis.find_runs(tiny_config().out_dir))
    assert [record["name"] for record in analysis.open_runs(records)[0]] == ["b"]
    out = capsys.readouterr().out
    assert "no test images: data_dir: nowhere" in out and "left out, no test images: a" in out
    with pytest.raises(vqvae.UserError, match="the test images of none of these runs are there"):
        analysis.open_runs(records[:1])


def test_latents_are_made_of_as_many_images_as_fit(tiny_config, monkeypatch):
    model, images = vqvae.make_model(tiny_config()).eval(), vqvae.test_images(tiny_config())
    whole, seen = analysis.latents_of(model, images), []
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    monkeypatch.setattr(vqvae, "evaluation_batch", lambda side, device: 15)
    assert torch.allclose(analysis.latents_of(model, images), whole, atol=1e-5) and seen == [15, 15, 10]


def made_up(config, **metrics):
    """A record of analysis.load_runs without training."""
    values = {"psnr": 20.0, "ssim": 0.5, "perplexity": 10.0, "perplexity_share": 0.6, "usage_rate": 1.0, "bits_per_index": 3.3}
    return {"name": config.name, "method": analysis.method(config), **values, **metrics, "config": config.to_dict()}


def test_over_seeds_shows_mean_and_deviation(tiny_config):
    records = [made_up(tiny_config(seed=seed, quantizer=quantizer), psnr=psnr) for seed, quantizer, psnr in
               ((0, "ba_vq", 20.0), (1, "ba_vq", 22.0), (0, "vq_ema", 19.5), (1, "vq_ema", 21.0), (2, "vq_ema", 9.0))]
    text = analysis.over_seeds(records)
    assert "21.00 ± 1.41" in text  # BA-VQ
    assert "+0.750 ± 0.354" in text  # paired by seed: 0.5 and 1; the third baseline has no partner
    assert analysis.over_seeds([*records, *records[:2]]) == text  # copies are no further seeds


def test_a_few_runs_show_each_quantizer(tiny_config):
    folder = vqvae.Path(tiny_config().out_dir)
    runs = ("ba_vq", 0.001, 0), ("ba_vq", 0.001, 1), ("ba_vq", 0.002, 0), ("vq_ema", 0.001, 0)
    for i, (quantizer, lr, seed) in enumerate(runs):
        (folder / str(i)).mkdir(parents=True)
        record = made_up(tiny_config(name=str(i), quantizer=quantizer, lr=lr, seed=seed))
        (folder / str(i) / "final_metrics.json").write_text(json.dumps(record))
    assert [record["name"] for record in analysis.one_seed(analysis.load_runs(analysis.find_runs(folder)))] == ["0", "3", "2"]


def test_images_are_told_apart_where_runs_differ_in_them(tiny_config):
    records = [made_up(tiny_config(image_size=size, dataset=dataset, data_dir="/my/cats")) for size, dataset in
               ((16, "dead_leaves"), (16, "folder"), (8, "folder"))]
    label = analysis._series(records)
    assert [label(record).partition(", ")[2] for record in records] == [
        "dead_leaves 16px", "folder /my/cats 16px", "folder /my/cats 8px"]
    assert analysis._series(records[:1])(records[0]) == records[0]["method"]


def test_over_seeds_tells_settings_apart(tiny_config):
    folders = [made_up(tiny_config(dataset=dataset, data_dir=place)) for dataset, place in
               (("dead_leaves", "data"), ("folder", "cats"), ("folder", "dogs"))]
    assert "cats" in analysis.over_seeds(folders) and "dogs" in analysis.over_seeds(folders)
    lines = analysis.over_seeds([made_up(tiny_config(lr=lr)) for lr in (0.001, 0.002)]).splitlines()
    assert "lr" in lines[0].split() and "0.001" in lines[1] and "0.002" in lines[2]
    lines = analysis.over_seeds([made_up(tiny_config(lr=lr, quantizer=quantizer)) for lr in (0.001, 0.002)
                                 for quantizer in ("ba_vq", "vq_ema")]).splitlines()
    assert "lr" in lines[-3].split() and "0.001" in lines[-2] and "0.002" in lines[-1]  # the differences, too
    records = [made_up(tiny_config(quantizer=quantizer, warmup_fraction=share)) for quantizer, share in
               (("ba_vq", 0.25), ("vq_ema", 0.25), ("vq_ema", 0.5))]
    alike, unlike = analysis.over_seeds(records).splitlines()[-2:]
    assert " 0.25  " in alike and " - 0.5 " not in alike and " 0.25 - 0.5 " in unlike


def test_the_table_is_sortable(tiny_config):
    records = [made_up(tiny_config(name="a", codebook_size=256), psnr=20.0),
               made_up(tiny_config(name="b", codebook_size=32, entropy_weight=3.0), psnr=22.0),
               made_up(tiny_config(name="c", codebook_size=64, train_subset=None), psnr=21.0)]

    def order(*arguments, **options):
        return "".join(line[0] for line in analysis.table(records, *arguments, **options).splitlines()[1:])

    assert order() == "abc" and order("psnr") == "acb" and order("psnr", descending=True) == "bca"
    assert order("codebook_size") == "bca" and order("entropy_weight")[0] == "b" and order("train_subset")[-1] == "c"
    with pytest.raises(vqvae.UserError, match="sort_by"):
        analysis.table(records, "quality")


def test_cell_radii_by_hand():
    class Model:
        quantizer = SimpleNamespace(codebook=torch.tensor([[0.0], [10.0], [99.0]]), metric="euclid")

        def latents(self, x):
            return torch.tensor([3.0, -4.0, 12.0]).view(3, 1, 1, 1)

    radii = analysis.cell_radii(Model(), torch.zeros(3, 4, 4, 3, dtype=torch.uint8))
    assert radii.tolist() == pytest.approx([12.5 ** 0.5, 2.0])  # the third code is not in use


def test_the_lifting_snippets_work():
    text = (ROOT / "CODE_OVERVIEW.md").read_text()
    in_readme = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    assert in_readme in text
    snippet = re.search(r"## Lifting.*?```python\n(.*?)```", text, re.S).group(1)
    names = {"z": torch.randn(2, 64, 4, 4), "step": 1, "total_steps": 10}
    exec(snippet, names)
    swap = re.search(r"stood:\n\n```python\n(.*?)```", text, re.S).group(1)
    exec(swap, names)
    assert names["quantized"].shape == (2, 64, 4, 4)
    assert names["codes"].shape == (2, 4, 4, 64) and names["loss"].shape == ()
    assert len(snippet.strip().splitlines()) == 5
    predictive = re.search(r"With prediction, for latents on a grid:\n\n```python\n(.*?)```", text, re.S).group(1)
    exec(predictive, names)
    assert names["z_q"].shape == names["z"].shape and names["indices"].shape == (2, 4, 4)


def test_it_stands_in_for_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch", reason="optional peer library is not installed")
    z = torch.randn(2, 8, 4, 4)
    theirs = library.VectorQuantize(dim=8, codebook_size=16, accept_image_fmap=True)(z)
    ours = vqvae.BAQuantizer(codebook_size=16, dim=8)(z)
    for one, two in zip(theirs, ours):
        assert one.shape == two.shape or one.numel() == two.numel() == 1


@pytest.mark.parametrize("document, at_least", [("README.md", 9), ("CODE_OVERVIEW.md", 9), ("results/FINDINGS.md", 2)])
def test_documents_name_files_that_exist(document, at_least):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|sh|yaml|ipynb|md|txt))`", text))
    made_by_runs = {"config.yaml"}
    assert len(named) >= at_least
    assert not [name for name in named - made_by_runs if not (ROOT / name).exists()]


def test_the_documented_commands_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = "".join((ROOT / name).read_text() for name in ("README.md", "results/FINDINGS.md")).replace("\\\n", "")
    commands = {line.strip() for line in re.findall(r"^python train\.py .*$", text, re.M)}
    assert len(commands) >= 5
    for command in commands:
        words = command.split("#")[0].split()
        train.main([*words[2:], "--dry_run"])  # raises UserError where a flag is wrong
    comparisons = {line.strip() for line in re.findall(r"^python benchmarks/compare\.py .*$", text, re.M)}
    assert len(comparisons) >= 5
    for command in comparisons:
        _, cells, extra = compare.parse(command.split("#")[0].split()[2:])
        for size, dim, seed, _ in cells:
            compare.cell("ba_vq_lambda10", size, dim, seed, extra)  # the peers need their library
