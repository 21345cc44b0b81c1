"""tests/tools/download.py against a server on this machine: whole, damaged, hostile, killed."""

import functools
import hashlib
import io
import itertools
import multiprocessing
import os
import re
import runpy
import signal
import sys
import tarfile
import tempfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from torchvision.datasets.utils import download_url

import common
from tests.tools import download

# The folder of images in the owners' archives
INSIDE = {
    "caltech101": "caltech-101/101_ObjectCategories",
    "dtd": "dtd/images",
    "eurosat": "2750",
    "fgvc_aircraft": "fgvc-aircraft-2013b/data/images",
    "food101": "food-101/images",
    "oxford_flowers": "jpg",
    "oxford_pets": "images",
    "stanford_cars": "stanford_cars/cars_train",
    "sun397": "sun397/SUN397",
    "ucf101": "ucf101/UCF-101-midframes",
    "imagenetv2": "imagenetv2-matched-frequency-format-val",
    "imagenet_sketch": "sketch",
    "imagenet_a": "imagenet-a",
    "imagenet_r": "imagenet-r",
}
THIRD_PARTY = ["eurosat", "stanford_cars", "sun397", "ucf101"]
SHARED = Path(__file__).parents[2] / "shared"
old = not hasattr(tarfile, "data_filter")
pytestmark = pytest.mark.skipif(old, reason="needs Python 3.11.4")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="children share the server")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path[1:])
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", len(content))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", hashlib.sha1(content).hexdigest())
        self.end_headers()
        if self.command == "GET":
            self.server.asked.append(self.path[1:])
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *message):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of .files {address: bytes}, where an address on the hub lacks the hub's name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.handle_error = {}, [], lambda *client: None
    here = f"http://127.0.0.1:{server.server_port}"
    hub = functools.partial(huggingface_hub.hf_hub_download, endpoint=here)
    monkeypatch.setattr(download, "hf_hub_download", hub)
    other = lambda url, *more: download_url(f"{here}/{url}", *more)  # noqa: E731
    monkeypatch.setattr(download, "download_url", other)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def pack(name, entries):
    """An archive of the kind that name tells; entries are (name, bytes or (type, link))."""
    file = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w") as archive:
            for entry, content in entries:
                archive.writestr(entry, content)
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w" if name.endswith(".tar") else "w:gz") as archive:
        for entry, content in entries:
            info = tarfile.TarInfo(entry)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                content = b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def good(name):
    """The entries of a small archive, laid out as its owners do."""
    inside = Path(INSIDE[name])
    beside = (inside.parent / "lists/2.txt").as_posix(), b"list"
    if name != "caltech101":
        return [(f"{INSIDE[name]}/a/1.jpg", b"image"), beside]
    # An archive in the archive, packed on a Mac
    inner = pack(".tar.gz", [("101_ObjectCategories/a/1.jpg", b"image")])
    shadow = "__MACOSX/caltech-101/._101_ObjectCategories.tar.gz"
    return [("caltech-101/101_ObjectCategories.tar.gz", inner), (shadow, b"Mac"), beside]


@pytest.fixture
def serve(server, monkeypatch):
    """serve(name) puts a small benchmark on the server: addresses of archive and split file."""

    def serve(name, extra=()):
        archive = download.ARCHIVES[name].removeprefix(download.HUB)
        split = f"{download.SPLITS}split_zhou_{common.BENCHMARKS[name].split}.json"
        server.files |= {archive: pack(archive, [*good(name), *extra]), split: b"{}"}
        md5 = hashlib.md5(server.files[archive]).hexdigest()
        for url, digest in (archive, md5), (split, hashlib.sha1(b"blob 2\0{}").hexdigest()):
            if Path(url).name in download.CHECKSUMS:
                monkeypatch.setitem(download.CHECKSUMS, Path(url).name, digest)
        return archive, split

    return serve


def files(root):
    found = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return {path for path in found if not path.endswith(".lock")}


def whole(name):
    """The files of the small benchmark in --data."""
    folder, images, split, _ = common.BENCHMARKS[name]
    found = {f"{folder}/{images or 'cars_train'}/a/1.jpg", f"{folder}/lists/2.txt"}
    return found | ({f"{folder}/split_zhou_{split}.json"} if split else set())


def run(name, root):
    common.script(lambda: download.main([name, "--data", str(root)]))


def refused(capsys, name, root):
    """The one line with which a download ends, exit code 2."""
    with pytest.raises(SystemExit, match="^2$"):
        run(name, root)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "\\n" not in lines[-1]
    return lines[-1]


def test_every_benchmark_has_an_address_or_advice(tmp_path, capsys):
    assert {*INSIDE, "imagenet"} == {*download.ARCHIVES, "imagenet"} == set(common.BENCHMARKS)
    splits = {f"split_zhou_{b.split}.json" for b in common.BENCHMARKS.values() if b.split}
    assert splits == {file for file in download.CHECKSUMS if file.endswith(".json")}
    line = refused(capsys, "imagenet", tmp_path)
    assert "login: get it at image-net.org" in line and f"{tmp_path / 'imagenet/images'}/" in line


@pytest.mark.skipif(not SHARED.is_dir(), reason="the list of data sets is not here")
def test_addresses_and_checksums_are_those_of_the_list():
    text = (SHARED / "DATASETS.md").read_text("utf-8")
    words = set(re.findall(r"[\w-]+", text))
    for url in [*download.ARCHIVES.values(), download.SPLITS]:
        assert set(re.findall(r"[\w-]+", url)) <= words, url
    assert set(download.CHECKSUMS.values()) <= words
    assert all(map(download.is_right, (SHARED / "splits").glob("split_zhou_*.json")))


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["download.py", "dttd", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(download.__file__, run_name="__main__")
    assert capsys.readouterr().err == "error: no data set 'dttd' to download; similar: dtd\n"
    with pytest.raises(SystemExit, match="^0$"):
        download.main(["--help"])
    assert "usage: python -m tests.tools.download" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_an_old_python_is_refused_before_anything_is_downloaded(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    assert "needs Python 3.11.4" in refused(capsys, "dtd", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", INSIDE)
def test_a_whole_download(name, server, serve, tmp_path, capsys):
    serve(name)
    run(name, tmp_path)
    assert files(tmp_path) == whole(name)
    assert ("third party" in capsys.readouterr().out) == (name in THIRD_PARTY)
    server.asked.clear()
    run(name, tmp_path)
    assert "to download them again, delete" in capsys.readouterr().out and not server.asked


@pytest.mark.parametrize("trouble", ["not there", "wrong checksum", "no network"])
@pytest.mark.parametrize("which", [0, 1], ids=["archive", "split file"])
@pytest.mark.parametrize("name", ["dtd", "eurosat"])  # not on the hub; on it
def test_a_download_that_fails(name, which, trouble, server, serve, tmp_path, capsys, monkeypatch):
    urls = serve(name)
    file = Path(urls[which]).name
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub tries again
    if trouble == "not there":
        del server.files[urls[which]]
    elif trouble == "wrong checksum":
        monkeypatch.setitem(download.CHECKSUMS, file, "0" * 32)
    else:
        server.shutdown()
        server.server_close()
        file = Path(urls[1]).name
    line = refused(capsys, name, tmp_path)
    assert f"/{file}: " in line and ".;" not in line
    assert "; run the command again, or put the file at" in line
    assert trouble != "wrong checksum" or "wrong checksum" in line
    assert files(tmp_path) == {p for p in whole(name) if "split" in p and file not in p}


@pytest.mark.parametrize("content", [b"", b"[]"])
def test_a_wrong_split_file_is_named_and_replaced(content, server, serve, tmp_path, capsys):
    archive, _ = serve("dtd")
    split = tmp_path / "dtd/split_zhou_DescribableTextures.json"
    run("dtd", tmp_path)
    split.write_bytes(content)
    del server.files[archive]
    run("dtd", tmp_path)
    assert f"{split}: wrong checksum" in capsys.readouterr().out
    assert files(tmp_path) == whole("dtd") and split.read_bytes() == b"{}"


def child(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


@needs_fork
@pytest.mark.parametrize("crowd", range(int(os.environ.get("CROWDS", 2))))
def test_three_at_once_end_with_one_whole_copy(crowd, serve, tmp_path):
    more = {f"dtd/lists/{i}.txt" for i in range(500)}
    serve("dtd", [(path, b"list") for path in more])
    children = [child(run, "dtd", tmp_path) for _ in range(3)]
    for process in children:
        process.join()
    assert [process.exitcode for process in children] == [0, 0, 0]
    assert files(tmp_path) == whole("dtd") | more


def killed(n, root):
    """Downloads dtd; is killed before its n-th open, mkdir, rename or rmtree."""
    count = itertools.count(1)

    def hook(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "shutil.rmtree"):
            if str(arguments[0]).startswith(str(root)) and next(count) == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    run("dtd", root)


@needs_fork
def test_a_killed_download_leaves_nothing_that_looks_complete(serve, tmp_path):
    serve("dtd")
    for n in itertools.count(1):
        root = tmp_path / f"{n}th"
        process = child(killed, n, root)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert not (root / "dtd/images").exists() or files(root) >= whole("dtd")
        for half in root.glob(".dtd.partial/*.tar.gz"):
            half.write_bytes(b"half")  # as if killed while writing
        run("dtd", root)
        assert files(root) == whole("dtd")
    assert n > 20


EVIL = str(Path(tempfile.gettempdir(), f"evil-{os.getpid()}"))
UP = [("../../../evil", b"evil")]
LINK = [("link", (tarfile.SYMTYPE, "../../..")), ("link/evil", b"evil")]
ZIP_LINK = zipfile.ZipInfo("link")
ZIP_LINK.external_attr = 0o120777 << 16
# What is wrong: name, extra entries, damage to the whole archive, what the error line says
BAD = {
    "tar up": ("imagenet_a", UP, None, "outside"),
    "tar absolute": ("imagenet_a", [(EVIL, b"evil")], None, ""),  # loses its first slash
    "link out": ("imagenet_a", LINK, None, "symbolic link"),
    "link within": ("imagenet_a", [("b", (tarfile.SYMTYPE, "c"))], None, "symbolic link"),
    "hard link out": ("imagenet_a", [("b", (tarfile.LNKTYPE, UP[0][0]))], None, "outside"),
    "device": ("imagenet_a", [("b", (tarfile.CHRTYPE, ""))], None, "special"),
    "gz up": ("imagenetv2", UP, None, "outside"),
    "zip up": ("imagenet_sketch", UP, None, "leaves the folder"),
    "long name": ("imagenet_sketch", [("../" * 200, b"")], None, "../../.."),
    "zip absolute": ("imagenet_sketch", [(EVIL, b"evil")], None, "leaves the folder"),
    "zip link": ("imagenet_sketch", [(ZIP_LINK, b"../../..")], None, ""),  # is a plain file
    "inner up": ("imagenet_sketch", [("b.tar.gz", pack(".gz", UP))], None, "outside"),
    "inner link": ("imagenet_sketch", [("b.tar.gz", pack(".gz", LINK))], None, "link"),
    "cut between entries": ("imagenet_a", [], lambda b: b[:1024], "breaks off"),
    "cut in an entry": ("imagenet_a", [], lambda b: b[:700], "end of data"),
    "tar header": ("imagenet_a", [], lambda b: b[:1030] + b"?" + b[1031:], "breaks off"),
    "gz cut": ("imagenetv2", [], lambda b: b[:-9], "ended before"),
    "gz checksum": ("imagenetv2", [], lambda b: b[:-8] + b"????" + b[-4:], "CRC"),
    "zip cut": ("imagenet_sketch", [], lambda b: b[:-9], "not a zip"),
    "zip checksum": ("imagenet_sketch", [], lambda b: b.replace(b"image", b"?mage", 1), "CRC"),
    "a page": ("imagenet_a", [], lambda b: b"<html>", "could not be opened"),
    "no images": ("imagenet_a", [], lambda b: pack(".tar", good("dtd")), "no folder imagenet-a"),
}


@pytest.mark.parametrize("name, extra, damage, said", BAD.values(), ids=BAD)
def test_a_bad_archive_that_lies_in_data(name, extra, damage, said, server, tmp_path, capsys):
    root, secret = tmp_path / "data", tmp_path / "evil"
    root.mkdir()
    secret.write_text("secret")
    place = root / Path(download.ARCHIVES[name]).name
    content = pack(place.name, [*good(name), *extra])
    place.write_bytes(damage(content) if damage else content)
    if said:
        line = refused(capsys, name, root)
        assert said in line and f"{place}: " in line and line.endswith("; replace it")
        assert files(root) == {place.name} and len(line) < len(str(place)) + 330
    else:
        run(name, root)
        assert files(root) > {place.name, *whole(name)}
    assert not server.asked and not os.path.exists(EVIL)
    assert sorted(tmp_path.iterdir()) == [root, secret]
    assert secret.read_text() == "secret" and secret.stat().st_nlink == 1
    assert not any(path.is_symlink() for path in root.rglob("*"))
