"""Data sets: determinism, splits, folders of odd images, and downloads against a local server."""

import errno
import hashlib
import http.server
import io
import itertools
import os
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import vqvae
from vqvae import Config, UserError


def test_dead_leaves_are_deterministic_and_varied():
    one = vqvae.dead_leaves(range(30), 16, seed=1)
    assert one.shape == (30, 16, 16, 3) and one.dtype == torch.uint8
    assert torch.equal(one, vqvae.dead_leaves(range(30), 16, seed=1))
    assert not torch.equal(one, vqvae.dead_leaves(range(30), 16, seed=2))
    assert len(one.flatten(1).unique(dim=0)) == 30


def test_dead_leaves_can_be_made_from_anywhere():
    """As of 220 images only some are wanted, the others are not painted, but the same ones come."""
    whole = vqvae.dead_leaves(range(220), 8, seed=0)
    for wanted in (range(5), range(95, 105), range(150, 220), range(100, 200), range(220, 220)):
        assert torch.equal(vqvae.dead_leaves(wanted, 8, seed=0), whole[wanted.start:wanted.stop])


def test_dead_leaves_have_natural_statistics():
    # Power spectrum of natural images falls about as 1/f^2 (Field 1987): between f^-1.4 and f^-3 here.
    images = vqvae.dead_leaves(range(200), 64, seed=0).float().mean(3)
    images = images - images.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(images).abs().square().mean(0)
    f = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(64), torch.fft.fftfreq(64), indexing="ij"))
    radii = torch.tensor([2, 4, 8, 16]) / 64
    levels = torch.stack([power[(f - r).abs() < 0.01].mean() for r in radii])
    slope = np.polyfit(radii.log().numpy(), levels.log().numpy(), 1)[0]
    assert -3 < slope < -1.4


def test_splits_do_not_overlap():
    config = Config(dataset="dead_leaves", image_size=8, val_size=5000, downsample=2)
    train, val = vqvae.training_images(config)
    test = vqvae.test_images(config)
    assert (len(train), len(val), len(test)) == (10000, 5000, 2000)
    rows = torch.cat([train, val, test]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)
    smaller, same_val = vqvae.training_images(Config(dataset="dead_leaves", image_size=8, downsample=2, train_subset=7))
    assert torch.equal(smaller, train[:7]) and torch.equal(same_val, val)


def test_cifar10_splits(cifar10_dir):
    config = Config(data_dir=str(cifar10_dir))
    train, val = vqvae.training_images(config)
    test = vqvae.test_images(config)
    assert (len(train), len(val), len(test)) == (45000, 5000, 10000)
    assert train.shape[1:] == (32, 32, 3) and train.dtype == torch.uint8
    assert abs(train.float().mean() / 255 - 0.4734) < 2e-3  # the published mean of CIFAR-10


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)


def folder_config(root, **changes):
    return Config(**{**dict(dataset="folder", data_dir=str(root), image_size=16, val_size=1), **changes})


def test_folder_reads_odd_images(tmp_path):
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    save(tmp_path / "train" / "a" / "grey.png", color[:, :, 0])
    save(tmp_path / "train" / "a" / "cmyk.jpg", color, "CMYK")
    save(tmp_path / "train" / "b" / "alpha.png", color, "RGBA")
    save(tmp_path / "train" / "b" / "palette.png", color, "P")
    save(tmp_path / "train" / "b" / "tiny.png", color[:1, :1])
    save(tmp_path / "test" / "a" / "large.png", np.tile(color, (40, 40, 1)))
    train, val = vqvae.training_images(folder_config(tmp_path))
    assert train.shape == (4, 16, 16, 3) and val.shape == (1, 16, 16, 3)
    assert vqvae.test_images(folder_config(tmp_path)).shape == (1, 16, 16, 3)


def test_folder_without_splits_keeps_about_a_tenth_for_the_test_also_when_it_grows(tmp_path):
    def parts():
        images = [*vqvae.training_images(folder_config(tmp_path, val_size=20)), vqvae.test_images(folder_config(tmp_path))]
        return [part[:, 0, 0, 0].tolist() for part in images]

    for i in range(200):
        save(tmp_path / f"class{i // 100}" / f"{i:03d}.png", np.full((4, 4, 3), i, np.uint8))
    (tmp_path / "folder.png").mkdir()
    train, val, test = parts()
    assert len(val) == 20 and 10 < len(test) < 30 and sorted(train + val + test) == list(range(200))
    assert {value // 100 for value in val} == {0, 1}  # no split is one class
    for i in range(200, 240):
        save(tmp_path / "class0" / f"{i:03d}.png", np.full((4, 4, 3), i, np.uint8))
    grown = parts()
    assert len(sum(grown, [])) == 240 and not set(grown[2]) & {*train, *val} and set(test) <= set(grown[2])


def test_a_link_to_no_image_is_named(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "one.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "train" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="lost.png: cannot read this image"):
        vqvae.training_images(folder_config(tmp_path, val_size=0))


def test_images_of_a_folder_that_are_not_wanted_are_not_read(tmp_path):
    for split, name in itertools.product(("train", "test"), range(6)):
        save(tmp_path / split / f"{name}.png", np.full((4, 4, 3), name, np.uint8))
    config = folder_config(tmp_path, val_size=2, train_subset=1, test_subset=2)
    train, val, test = *vqvae.training_images(config), vqvae.test_images(config)
    assert len(train) == 1 and len(val) == len(test) == 2 and train.dtype == torch.uint8
    wanted = {"train": [*train, *val], "test": test}
    for split, images in wanted.items():
        for name in {*range(6)} - {image[0, 0, 0].item() for image in images}:
            (tmp_path / split / f"{name}.png").write_bytes(b"damaged")
    again = *vqvae.training_images(config), vqvae.test_images(config)
    assert all(torch.equal(one, two) for one, two in zip((train, val, test), again))
    with pytest.raises(UserError, match="cannot read this image"):
        vqvae.test_images(folder_config(tmp_path))


def test_linked_folders_are_read_but_not_twice(tmp_path):
    save(tmp_path / "elsewhere" / "one.png", np.zeros((4, 4, 3), np.uint8))
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "linked").symlink_to(tmp_path / "elsewhere")
    config = folder_config(tmp_path / "data", val_size=0)
    assert len(vqvae.training_images(config)[0]) == len(vqvae.test_images(config)) == 1
    (tmp_path / "data" / "train" / "circle").symlink_to(tmp_path / "data" / "train")
    with pytest.raises(UserError, match="train/circle: links lead to this folder twice"):
        vqvae.training_images(config)


def test_an_image_does_not_count_twice_by_a_link(tmp_path):
    for name in range(3):
        save(tmp_path / f"{name}.png", np.full((4, 4, 3), name, np.uint8))
    (tmp_path / "copy.png").symlink_to(tmp_path / "1.png")
    with pytest.raises(UserError, match=r"(1|copy)\.png: is the same file as .*(1|copy)\.png, by a link"):
        vqvae.training_images(folder_config(tmp_path, val_size=0))


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, MemoryError])
def test_whatever_a_decoder_raises_names_the_image(tmp_path, monkeypatch, error):
    save(tmp_path / "train" / "bad.png", np.zeros((4, 4, 3), np.uint8))
    save(tmp_path / "test" / "0.png", np.zeros((4, 4, 3), np.uint8))

    def fails(path):
        raise error("of a damaged file")

    monkeypatch.setattr(vqvae.Image, "open", fails)
    with pytest.raises(UserError, match=r"bad\.png: cannot read this image \(of a damaged file\)"):
        vqvae.training_images(folder_config(tmp_path, val_size=0))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    save(tmp_path / "train" / "one.png", np.zeros((4, 4, 3), np.uint8))
    save(tmp_path / "train" / "closed" / "two.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "test").mkdir()
    real_scandir = os.scandir

    def scandir(path):  # permissions do not stop a superuser
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="closed: cannot read this folder .Permission denied."):
        vqvae.training_images(folder_config(tmp_path, val_size=0))


def bomb(path):
    save(path, np.zeros((1, 1, 3), np.uint8))
    data = bytearray(path.read_bytes())
    data[16:24] = (60000).to_bytes(4, "big") * 2  # the header claims 60000 x 60000 pixels
    import zlib
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "bomb", "wrong crc"])
def test_a_broken_image_is_named(tmp_path, kind):
    path = tmp_path / "train" / "a" / "broken.png"
    save(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    save(tmp_path / "test" / "a" / "fine.png", np.zeros((16, 16, 3), np.uint8))
    data = path.read_bytes()
    if kind == "bomb":
        bomb(path)
    else:
        path.write_bytes({"text": b"not an image", "empty": b"", "truncated": data[:len(data) // 2],
                          "wrong crc": data[:60] + b"XXXX" + data[64:]}[kind])
    with pytest.raises(UserError, match="broken.png"):
        vqvae.training_images(folder_config(tmp_path, val_size=0))


@pytest.mark.parametrize("kind", ["I;16 png", "F tiff", "I tiff"])
def test_images_of_more_than_8_bits_are_refused_not_clipped(tmp_path, kind):
    mode, suffix = kind.split()
    array = np.linspace(0, 60000, 256).reshape(16, 16).astype({"I;16": np.uint16, "F": np.float32, "I": np.int32}[mode])
    save(tmp_path / "train" / f"deep.{suffix}", array)
    save(tmp_path / "test" / "fine.png", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="deep.*convert it to 8 bits"):
        vqvae.training_images(folder_config(tmp_path, val_size=0))


@pytest.mark.parametrize("layout", ["missing", "empty", "no images", "a file", "a circle"])
def test_folders_without_images(tmp_path, layout):
    root = tmp_path / "data"
    if layout == "a file":
        root.write_text("x")
    elif layout == "a circle":
        root.symlink_to(root)
    elif layout != "missing":
        root.mkdir()
        if layout == "no images":
            (root / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="data_dir"):
        vqvae.training_images(folder_config(root))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves /good, /garbage, /half (drops the line), /stall (sends nothing more), RAW and redirects; else 404."""

    content, requests = b"", []
    RAW = {"/noise": b"\0\1noise\r\n\r\n", "/nothing": b"", "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz",
           "/length": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc", "/error": b"HTTP/1.1 500 Oh\r\n\r\n"}

    def do_GET(self):
        self.requests.append(self.path)
        if self.path in self.RAW:
            self.wfile.write(self.RAW[self.path])
            return
        if self.path in ("/circle", "/leak"):  # 127.1 is this machine too, but no name that plain http is allowed to
            self.send_response(302)
            host = self.headers["Host"] if self.path == "/circle" else self.headers["Host"].replace("127.0.0.1", "127.1")
            self.send_header("Location", f"http://{host}/" + ("circle" if self.path == "/circle" else "good"))
            return self.end_headers()
        body = {"/good": self.content, "/garbage": b"<html>sorry</html>", "/half": self.content[:100],
                "/stall": self.content[:100]}.get(self.path)
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content) if self.path in ("/half", "/stall") else len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        if self.path == "/stall":
            time.sleep(3)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Handler.content, Handler.requests = bytes(range(256)) * 50, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def test_download_checks_and_is_atomic(server, tmp_path):
    target = tmp_path / "file"
    vqvae.download([f"{server}/missing", f"{server}/garbage", f"{server}/half", f"{server}/good"], target,
                   hashlib.md5(Handler.content).hexdigest())
    assert target.read_bytes() == Handler.content and list(tmp_path.iterdir()) == [target]
    assert Handler.requests == ["/missing", "/garbage", "/half", "/good"]


@pytest.mark.parametrize("path", ["missing", "garbage", "half", "stall", "noise", "nothing", "chunks", "length", "error",
                                  "circle", "leak", "with a blank", "\x01"])
def test_a_failing_download_leaves_nothing(server, tmp_path, monkeypatch, path):
    monkeypatch.setattr(vqvae, "DOWNLOAD_TIMEOUT", 0.5)
    with pytest.raises(UserError, match=f"(?s){path}.*by hand"):
        vqvae.download([f"{server}/{path}"], tmp_path / "file", hashlib.md5(Handler.content).hexdigest())
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(vqvae.UserError, match="cannot write the download here"):
        vqvae.download(["http://127.0.0.1:9/x"], tmp_path / "file" / "x")


def test_a_full_disk_is_not_blamed_on_the_address(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(vqvae, "open", full, raising=False)
    with pytest.raises(vqvae.UserError, match="cannot write the download here: No space left"):
        vqvae.download([f"{server}/good", f"{server}/good"], tmp_path / "file")


def test_only_https_leaves_this_machine(tmp_path):
    for url in ("http://example.org/x", "ftp://example.org/x", "file:///etc/passwd"):
        with pytest.raises(UserError, match="only https"):
            vqvae.download([url], tmp_path / "file", "0")


def test_a_short_download_is_noticed_without_a_checksum(server, tmp_path):
    with pytest.raises(UserError, match="ended after 100 of 12800 bytes"):
        vqvae.download([f"{server}/half"], tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_redirect_to_plain_http_is_refused(server, tmp_path):
    with pytest.raises(UserError, match="only https is allowed, not http://127.1:"):
        vqvae.download([f"{server}/leak"], tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_the_built_in_addresses_are_https_with_a_checksum():
    assert all(url.startswith("https://") for url in vqvae.CIFAR10_URLS) and len(vqvae.CIFAR10_MD5) == 32


def test_cifar10_offline_is_one_clear_error(tmp_path):
    config = Config(data_dir=str(tmp_path / "data"), cifar10_url="http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(UserError, match="could not download cifar-10-python.tar.gz.*by hand"):
        vqvae.training_images(config)


def test_unreadable_cifar10_is_one_clear_error(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", refused)
    with pytest.raises(UserError, match="cannot read CIFAR-10 in .*Permission denied.*--data_dir"):
        vqvae.training_images(Config(data_dir=str(tmp_path)))


def test_an_unreadable_archive_is_one_clear_error(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", refused)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("not there")))
    with pytest.raises(UserError, match="cifar-10-python.tar.gz: cannot unpack it.*Permission denied"):
        vqvae.training_images(Config(data_dir=str(tmp_path)))


def test_cifar10_downloads_unpacks_and_verifies(server, tmp_path, monkeypatch, cifar10_dir):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(cifar10_dir / "cifar-10-batches-py", "cifar-10-batches-py")
    Handler.content = archive.getvalue()
    monkeypatch.setattr(vqvae, "CIFAR10_MD5", hashlib.md5(Handler.content).hexdigest())
    config = Config(data_dir=str(tmp_path), cifar10_url=f"{server}/good")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(Handler.content[:1000])  # a partial download of another program
    assert len(vqvae.test_images(config)) == 10000
    assert len(vqvae.training_images(config)[0]) == 45000
    assert Handler.requests == ["/good"] and not list(tmp_path.glob(".*.part"))
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    batch.write_bytes(batch.read_bytes()[:-1])  # damaged later: mended from the archive
    assert len(vqvae.training_images(config)[0]) == 45000 and Handler.requests == ["/good"]


def test_archive_members_cannot_escape(server, tmp_path, monkeypatch):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("../escaped")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    Handler.content = archive.getvalue()
    monkeypatch.setattr(vqvae, "CIFAR10_MD5", hashlib.md5(Handler.content).hexdigest())
    with pytest.raises(UserError, match="cannot unpack"):
        vqvae.test_images(Config(data_dir=str(tmp_path / "data"), cifar10_url=f"{server}/good"))
    assert not (tmp_path / "escaped").exists()


def test_a_read_only_disk_gives_one_line(tmp_path):
    """Permissions do not stop root, a read-only mount does."""
    in_namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o ro none {tmp_path}"
    if subprocess.run([*in_namespace, mount], capture_output=True).returncode:
        pytest.skip("no user namespaces here to mount a read-only disk in")
    script = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import train, vqvae
        vqvae.DEAD_LEAVES_SIZES = {{True: 200, False: 60}}
        for words in (["--data_dir", "{tmp_path}/data"], ["--dataset", "dead_leaves", "--out_dir", "{tmp_path}/x"]):
            print(vqvae.run_command(lambda: train.main([*words, "--device", "cpu", "--val_size", "9"])))"""
    done = subprocess.run([*in_namespace, f'{mount} && exec "$@"', "-", sys.executable, "-c", script], text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    errors = done.stderr.splitlines()
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["2", "2"], done.stderr
    assert len(errors) == 2 and all("Read-only file system" in line for line in errors), errors
    assert "choose another --data_dir" in errors[0] and "choose another --out_dir" in errors[1]
