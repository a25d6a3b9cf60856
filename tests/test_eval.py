"""eval_cifar.py: r-FID and r-IS against references, and the whole path with a stand-in Inception."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import rounds_to_tf32
from PIL import Image

import eval_cifar
import vqvae
from eval_cifar import frechet_distance, inception_score


class StandIn(torch.nn.Module):
    """The interface of clean-fid's TorchScript Inception: layers -> 2048 features, output -> 1008 logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.AvgPool2d(23), torch.nn.Flatten(1), torch.nn.Linear(3 * 13 * 13, 2048))
        self.output = torch.nn.Linear(2048, 1008)

    def forward(self, x):
        return torch.softmax(self.output(self.layers((x - 128) / 128)), 1)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / eval_cifar.INCEPTION_NAME
    torch.jit.script(StandIn().eval()).save(path)
    return path


@pytest.fixture
def run_folder(tiny_config):
    config = tiny_config(epochs=1)
    vqvae.train(config)
    return vqvae.Path(config.out_dir) / config.name


def sqrtm_distance(a, b):
    """The textbook formula with a matrix square root of the covariance product."""
    from scipy import linalg
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(ca @ cb).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root)


def test_frechet_distance_equals_the_matrix_square_root_form():
    a = torch.randn(300, 20, dtype=torch.float64)
    b = torch.randn(400, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64) + 1
    assert frechet_distance(a, b) == pytest.approx(sqrtm_distance(a.numpy(), b.numpy()), rel=1e-8)


def test_frechet_distance_equals_clean_fids_own():
    fid = pytest.importorskip("cleanfid.fid")
    a, b = np.random.default_rng(0).normal(size=(2, 500, 16))
    b = b * 2 + 0.5
    try:
        reference = fid.frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    except (TypeError, ValueError) as error:
        pytest.skip(f"clean-fid does not work with this SciPy: {error}")
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(reference, rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    # Samples whitened to exact moments: |m|^2 + sum (s - 1)^2.
    x = torch.randn(2000, 5, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    scale, shift = torch.tensor([1.0, 2, 3, 0.5, 1], dtype=torch.float64), 2.0
    assert frechet_distance(x, x * scale + shift) == pytest.approx(5 * 4 + (0 + 1 + 4 + 0.25), rel=1e-9)


def test_frechet_distance_is_stable_when_singular():
    few = torch.randn(30, 200, dtype=torch.float64)  # far fewer rows than features
    assert frechet_distance(few, few.clone()) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few.float(), few.float() + 1) == pytest.approx(200, rel=1e-6)
    with pytest.raises(ValueError):
        frechet_distance(few[:1], few)


def test_inception_score_equals_a_double_loop():
    p = torch.softmax(torch.randn(50, 7, dtype=torch.float64), 1)
    scores = []
    for part in range(5):
        rows = p[part * 10:(part + 1) * 10]
        marginal = rows.mean(0)
        total = 0.0
        for i in range(10):
            for j in range(7):
                total += rows[i, j].item() * (math.log(rows[i, j].item()) - math.log(marginal[j].item()))
        scores.append(math.exp(total / 10))
    mean, deviation = inception_score(p, splits=5)
    assert mean == pytest.approx(np.mean(scores)) and deviation == pytest.approx(np.std(scores))


def test_inception_score_limits():
    assert inception_score(torch.full((40, 8), 1 / 8))[0] == pytest.approx(1.0)
    assert inception_score(torch.eye(8).repeat(10, 1), splits=10)[0] == pytest.approx(8.0)
    with pytest.raises(ValueError):
        inception_score(torch.full((5, 8), 1 / 8))


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
def test_the_whole_path_with_a_stand_in(run_folder, stand_in, mode, capsys):
    code = eval_cifar.main(["--checkpoint", str(run_folder / "final_model.pt"), "--inception", str(stand_in),
                            "--mode", mode, "--batch_size", "16"])
    metrics = json.loads((run_folder / "eval_metrics.json").read_text())
    assert code == 0 and metrics["rfid"] > 0 and metrics["ris"] >= 1 and metrics["num_images"] == 40
    assert metrics["fid_mode"] == mode and len(metrics["inception_sha256"]) == 64 and metrics["clean_fid_version"]
    trained = json.loads((run_folder / "final_metrics.json").read_text())
    for key in ("psnr", "ssim", "perplexity", "usage_rate", "bits_per_index"):
        assert metrics[key] == pytest.approx(trained[key], rel=1e-5)
    assert "rfid" in capsys.readouterr().out


def test_refined_codes_are_measured_and_recorded(run_folder, stand_in):
    path, results = run_folder / "final_model.pt", []
    for refine in ("0", "3"):
        eval_cifar.main(["--checkpoint", str(path), "--inception", str(stand_in), "--refine", refine])
        results.append(json.loads((run_folder / "eval_metrics.json").read_text()))
    plain, refined = results
    assert (plain["refine"], refined["refine"]) == (0, 3)
    assert refined["mse"] < plain["mse"] and refined["rfid"] != plain["rfid"]


def test_rfid_of_perfect_reconstructions_is_zero(stand_in):
    class Identity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, refine=0):
            return vqvae.Reconstruction(x, None, None)

    images = torch.randint(0, 256, (30, 32, 32, 3), dtype=torch.uint8)
    network = eval_cifar.Inception(stand_in, "clean", "cpu")
    originals = eval_cifar.original_features(images, network, 11)
    got = eval_cifar.inception_metrics(Identity(), images, originals, network, 7)
    assert got["rfid"] == pytest.approx(0, abs=1e-6)
    features, p = network(images)
    from cleanfid.inception_torchscript import InceptionV3W
    resized = torch.from_numpy(np.stack([network.resize(image) for image in images.numpy()])).permute(0, 3, 1, 2)
    theirs = InceptionV3W(str(stand_in.parent), download=False)(resized)  # clean-fid's own normalisation
    assert torch.allclose(features, theirs, atol=1e-5)
    x = torch.nn.functional.softmax(network.network.output(features), 1)
    assert features.shape == (30, 2048) and torch.allclose(p, x, atol=1e-6)


def test_features_are_made_without_tf32(stand_in):
    network, seen = eval_cifar.Inception(stand_in, "clean", "cpu"), []
    layers = network.layers
    network.layers = lambda x: seen.append(rounds_to_tf32()) or layers(x)
    network(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8))
    assert seen == [False] and rounds_to_tf32()


def test_offline_without_weights_keeps_the_other_metrics(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(eval_cifar, "INCEPTION_NAME", "no-such-network.pt")
    monkeypatch.setattr(eval_cifar, "INCEPTION_URL", "http://127.0.0.1:9/x.pt")
    code = eval_cifar.main(["--checkpoint", str(run_folder)])
    metrics = json.loads((run_folder / "eval_metrics.json").read_text())
    err = capsys.readouterr().err
    assert code == 3 and "--inception FILE" in err and err.count("\n") == 1
    assert metrics["psnr"] > 0 and "rfid" not in metrics and "ris" not in metrics


def test_inception_is_downloaded_once_to_the_cache(stand_in, tmp_path, monkeypatch):
    import http.server
    import threading

    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            data = stand_in.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(eval_cifar, "INCEPTION_NAME", "stand-in.pt")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(eval_cifar, "INCEPTION_URL", f"http://127.0.0.1:{server.server_address[1]}/stand-in.pt")
        for _ in range(2):
            path = eval_cifar.find_inception()
        server.shutdown()
    assert path.read_bytes() == stand_in.read_bytes() and requests == ["/stand-in.pt"]
    assert eval_cifar.Inception(path, "clean", "cpu")


def test_an_inception_file_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    """Of another user's in /tmp, say. Root may read all, so the permission is made up."""
    cache = tmp_path / "vqvae" / "stand-in.pt"
    cache.parent.mkdir()
    cache.write_bytes(b"somebody else's")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(eval_cifar, "INCEPTION_NAME", cache.name)
    assert eval_cifar.find_inception() == cache
    monkeypatch.setattr(eval_cifar.os, "access", lambda path, mode: path != cache)
    downloads = []
    monkeypatch.setattr(eval_cifar.vqvae, "download", lambda urls, path: downloads.append(path))
    eval_cifar.find_inception()
    assert downloads == [cache]
    with pytest.raises(eval_cifar.vqvae.UserError, match="no file that can be read"):
        eval_cifar.find_inception(cache)


@pytest.mark.parametrize("refine", [0, 3])
def test_the_pictures_show_the_test_images(run_folder, refine):
    for name in ("reconstructions.png", "codebook_usage.png"):
        (run_folder / name).unlink()
    assert eval_cifar.main(["--checkpoint", str(run_folder), "--no_fid", "--refine", str(refine)]) == 0
    model, config = vqvae.load_model(run_folder / "final_model.pt")
    images = vqvae.test_images(config)[:16]  # 16 pixels a side, shown fourfold; 2 pixels between
    pixels = np.asarray(Image.open(run_folder / "reconstructions.png").convert("RGB"))
    bottom = pixels.shape[0] - 4 * (4 * 18 + 2)
    y = vqvae.to_bytes(model(vqvae.to_float(images), refine=refine).images).permute(0, 2, 3, 1).detach()
    for row, shown in ((0, images[:8]), (1, y[:8]), (2, images[8:]), (3, y[8:])):
        for column in range(8):
            top, left = bottom + 4 * (2 + 18 * row), 4 * (2 + 18 * column)
            got = pixels[top:top + 64:4, left:left + 64:4].astype(int)
            assert np.abs(got - shown[column].numpy()).max() <= 1, (row, column)
    assert (run_folder / "codebook_usage.png").stat().st_size > 3000


def test_the_last_row_of_originals_is_filled_up_in_white(run_folder, tmp_path):
    model, config = vqvae.load_model(run_folder / "final_model.pt")
    images = vqvae.test_images(config)[:10]
    vqvae.reconstruction_picture(model, images, "ten images", tmp_path / "ten.png")
    pixels = np.asarray(Image.open(tmp_path / "ten.png").convert("RGB"))
    top = pixels.shape[0] - 4 * (4 * 18 + 2) + 4 * (2 + 18 * 2)  # the third of four rows: originals 8 and 9
    row = pixels[top:top + 64:4, ::4].astype(int)
    assert np.abs(row[:, 2:18] - images[8].numpy()).max() <= 1 and (row[:, 2 + 18 * 2:] == 255).all()


def test_a_folder_stands_for_all_runs_below(run_folder, tiny_config, capsys):
    vqvae.train(tiny_config(epochs=1, name="other", quantizer="vq_ema"))
    assert eval_cifar.main(["--checkpoint", str(run_folder.parent), "--no_fid"]) == 0
    out = capsys.readouterr().out
    assert "tiny/final_model.pt" in out and "other/final_model.pt" in out


def test_runs_behind_links_are_found(run_folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "run").symlink_to(run_folder)
    (linked / "a_link").symlink_to(linked / "own")
    (linked / "own").mkdir()
    (linked / "own" / "final_model.pt").touch()
    (linked / "again").mkdir()
    (linked / "again" / "circle").symlink_to(linked)
    (run_folder / "latest").symlink_to(run_folder)  # as wandb has them
    assert eval_cifar.find_checkpoints([str(linked)]) == [linked / "own" / "final_model.pt", linked / "run" / "final_model.pt"]


def test_a_folder_that_cannot_be_written_is_named_before_the_work(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(vqvae.os, "access", lambda path, mode: path != str(run_folder))  # root may write all
    monkeypatch.setattr(vqvae, "evaluate", None)
    assert vqvae.run_command(lambda: eval_cifar.main(["--checkpoint", str(run_folder), "--no_fid"])) == 2
    assert f"{run_folder}: cannot write here" in capsys.readouterr().err


def test_without_a_home_the_inception_file_is_kept_in_tmp(monkeypatch):
    monkeypatch.setattr(eval_cifar.os.path, "expanduser", lambda path: path)  # as where nobody's home is known
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(eval_cifar, "INCEPTION_NAME", "not-there.pt")
    downloads = []
    monkeypatch.setattr(vqvae, "download", lambda urls, path: downloads.append(str(path)))
    eval_cifar.find_inception()
    assert downloads == ["/tmp/not-there.pt"]


def test_peers_below_a_folder_are_left_out_and_named_alone(run_folder, tiny_config, capsys):
    class Peer(vqvae.VQEMAQuantizer):
        pass

    vqvae.train(tiny_config(epochs=1, name="peer", quantizer="vq_ema", prediction="none"), Peer(16, 4))
    assert eval_cifar.main(["--checkpoint", str(run_folder.parent), "--no_fid"]) == 0
    assert "left out, Peer" in capsys.readouterr().out and not (run_folder.parent / "peer" / "eval_metrics.json").exists()
    assert vqvae.run_command(lambda: eval_cifar.main(["--checkpoint", str(run_folder.parent / "peer" / "final_model.pt")])) == 2
    assert "has a quantizer of benchmarks/peers.py (Peer)" in capsys.readouterr().err
    with pytest.raises(vqvae.UserError, match="another quantizer"):
        vqvae.train(tiny_config(epochs=1, name="peer", quantizer="vq_ema", prediction="none"))
    (run_folder.parent / "peer" / "final_metrics.json").unlink()  # an unfinished run
    with pytest.raises(vqvae.UserError, match="another quantizer"):
        vqvae.train(tiny_config(epochs=1, name="peer", quantizer="vq_ema", prediction="none"))
    with pytest.raises(vqvae.UserError, match="Peer"):  # whose state would fit a VQ-EMA
        vqvae.load_model(run_folder.parent / "peer" / "checkpoint_epoch_0001.pt")


def test_a_model_without_codes_is_found_before_any_is_evaluated(run_folder, tiny_config, capsys):
    vqvae.train(tiny_config(epochs=2, name="warming_up", warmup_fraction=0.8))
    early = run_folder.parent / "warming_up" / "checkpoint_epoch_0001.pt"
    assert vqvae.run_command(lambda: eval_cifar.main(["--checkpoint", str(run_folder), str(early), "--no_fid"])) == 2
    assert "warm-up" in capsys.readouterr().err and not (run_folder / "eval_metrics.json").exists()


def test_several_checkpoints_share_the_originals(run_folder, tiny_config, stand_in, monkeypatch):
    vqvae.train(tiny_config(epochs=1, name="other", quantizer="vq_ema"))
    alone = {}
    for name in ("tiny", "other"):
        path = run_folder.parent / name
        eval_cifar.main(["--checkpoint", str(path), "--inception", str(stand_in)])
        alone[name] = json.loads((path / "eval_metrics.json").read_text())
    calls = []
    compute = eval_cifar.original_features
    monkeypatch.setattr(eval_cifar, "original_features", lambda *arguments: calls.append(1) or compute(*arguments))
    eval_cifar.main(["--checkpoint", str(run_folder.parent), "--inception", str(stand_in)])
    together = {name: json.loads((run_folder.parent / name / "eval_metrics.json").read_text()) for name in alone}
    assert len(calls) == 1 and alone["tiny"]["rfid"] != alone["other"]["rfid"]
    assert all(together[name]["rfid"] == alone[name]["rfid"] for name in alone)


@pytest.mark.parametrize("words", [
    [], ["--checkpoint"], ["--checkpoint", "nowhere.pt"], ["--checkpoint", "."], ["--checkpoint", "x", "--mode", "best"],
    ["--checkpoint", "x", "--batch_size", "0"], ["--checkpoint", "x", "--refine", "-1"],
    ["--checkpoint", "x", "--device", "tpu"], ["--inception", "x"], ["--checkpoint", "x" * 300]])
def test_bad_words_give_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = vqvae.run_command(lambda: eval_cifar.main(words))
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_checkpoints_that_share_a_folder_are_refused(tmp_path):
    paths = [tmp_path / "final_model.pt", tmp_path / "checkpoint_epoch_0001.pt"]
    (tmp_path / "circle").symlink_to("circle")
    assert eval_cifar.find_checkpoints([tmp_path / "circle" / "x.pt"])  # and is then no file
    with pytest.raises(vqvae.UserError, match="share a folder"):
        eval_cifar.find_checkpoints(paths)


def test_missing_test_images_are_noticed_before_any_checkpoint_is_evaluated(run_folder, tiny_config, tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (16, 16)).save(tmp_path / "images" / split / f"{number}.png")
    vqvae.train(tiny_config(epochs=1, name="zebra", dataset="folder", data_dir=str(tmp_path / "images"), train_subset=None,
                            test_subset=None, val_size=0))
    (tmp_path / "images").rename(tmp_path / "moved")
    assert vqvae.run_command(lambda: eval_cifar.main(["--checkpoint", str(run_folder.parent), "--no_fid"])) == 2
    assert "zebra/final_model.pt: data_dir: " in capsys.readouterr().err
    assert not (run_folder / "eval_metrics.json").exists()


def test_too_few_images_for_inception_metrics(run_folder, stand_in, capsys):
    words = ["--checkpoint", str(run_folder), "--inception", str(stand_in), "--test_subset", "9"]
    assert vqvae.run_command(partial(eval_cifar.main, words)) == 2
    err = capsys.readouterr().err
    assert "at least 10 images" in err and "--no_fid" in err and not (run_folder / "eval_metrics.json").exists()


def test_a_bad_inception_file_is_named(run_folder, tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(b"no network")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "foreign.pt")
    for file in ("bad.pt", "missing.pt", "foreign.pt", "x" * 300):
        words = ["--checkpoint", str(run_folder), "--inception", str(tmp_path / file)]
        assert vqvae.run_command(partial(eval_cifar.main, words)) == 2
        err = capsys.readouterr().err
        assert file in err and err.count("\n") == 1
