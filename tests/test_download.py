"""download.py against a server on 127.0.0.1: whole, broken, hostile; nothing half-made is left."""

import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import common
from tests.tools import download

resource = pytest.importorskip("resource")  # POSIX: a full disk is made by its limit
processes = multiprocessing.get_context("fork")  # children have imported torch already

# The folder of the images in each owner's archive
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
WORDNET = ["n01440764", "n01498041", "n02119022"]
VARIANTS = ["707-320", "Boeing 717", "F-A 18"]


class Server(ThreadingHTTPServer):
    """Serves .files {name: bytes} as .mood says, and notes the (name, Range) that were asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.files, self.mood, self.asked = {}, "kind", []

    def handle_error(self, *client):
        """A client that has gone is no news."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, name, wanted = self.server, self.path.split("/")[-1], self.headers.get("Range")
        server.asked.append((name, wanted))
        if name not in server.files or server.mood == "away":
            return self.send_error(404 if server.mood == "kind" else 503)
        content = server.files[name]
        start = int(wanted[6:-1]) if wanted and server.mood != "no ranges" else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if server.mood == "nonsense":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            return self.wfile.write(b"zzz\r\n")
        self.send_header("Content-Length", len(content) - start)
        self.end_headers()
        if server.mood == "cut":
            content = content[: len(content) * 2 // 3]
        for i in range(start, len(content), 1 << 16):
            self.wfile.write(content[i : i + (1 << 16)])
            time.sleep(0.01 if server.mood == "slow" else 0)

    def log_message(self, *message):
        pass


@pytest.fixture
def server(monkeypatch):
    """A running Server to which every address leads, the archives' checksums left out."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    sources = {}
    for name, source in download.SOURCES.items():
        sources[name] = source._replace(url=server.url + source.url.split("/")[-1], md5="")
    monkeypatch.setattr(download, "SOURCES", sources)
    monkeypatch.setattr(download, "SPLITS", server.url)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def pack(name, entries):
    """An archive of the type its name tells; entries are (name, bytes or fields of a TarInfo)."""
    file = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(file, "w") as archive:
            for entry, content in entries:
                archive.writestr(entry, content)
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w" if name.endswith(".tar") else "w:gz") as archive:
        for entry, content in entries:
            info = tarfile.TarInfo(entry)
            if isinstance(content, dict):
                for field, value in content.items():
                    setattr(info, field, value)
                content = b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def archive_name(name):
    return download.SOURCES[name].url.split("/")[-1]


def lists(name):
    """{part: [[path below the images, label, class name], ...]} of a small split file."""
    prefix = {"train": "", "val": "", "test": ""}
    if name == "stanford_cars":
        prefix = {"train": "cars_train/", "val": "cars_train/", "test": "cars_test/"}
    split = {}
    for i, part in enumerate(common.PARTS):
        rows = [[f"{prefix[part]}{label}_{i}.jpg", label, f"class {label}"] for label in range(3)]
        split[part] = rows
    return split


def owners(name):
    """(entries of the owner's archive, bytes of the split file or None)."""
    inside = INSIDE[name]
    if name == "fgvc_aircraft":
        above = inside.removesuffix("/images")
        entries = [(f"{above}/variants.txt", "\n".join(VARIANTS).encode())]
        for i, part in enumerate(common.PARTS):
            lines = [f"{10 * i + n} {variant}\n" for n, variant in enumerate(VARIANTS)]
            entries.append((f"{above}/images_variant_{part}.txt", "".join(lines).encode()))
            entries += [(f"{inside}/{10 * i + n}.jpg", b"picture") for n in range(3)]
        return entries, None
    if not common.BENCHMARKS[name].split:
        keys = ["0", "2", "10"] if name == "imagenetv2" else WORDNET
        return [(f"{inside}/{key}/1.jpeg", b"picture") for key in keys], None
    split = lists(name)
    above = inside.removesuffix("cars_train").rstrip("/")
    entries = []
    for part in common.PARTS:
        entries += [(f"{above}/{path}", b"picture") for path, *_ in split[part]]
    return entries, json.dumps(split).encode()


@pytest.fixture
def serve(server, monkeypatch):
    """serve(name) puts a small data set on the server as its owners pack it."""

    def serve(name):
        entries, split = owners(name)
        if name == "caltech101":  # an archive in the archive, packed on a Mac
            inner = [(entry.split("/", 1)[1], content) for entry, content in entries]
            images = "caltech-101/101_ObjectCategories.tar.gz"
            shadow = "__MACOSX/caltech-101/._101_ObjectCategories.tar.gz"
            entries = [(images, pack(".tar.gz", inner)), (shadow, b"\0\5\x16\7")]
        server.files[archive_name(name)] = pack(archive_name(name), entries)
        if split:
            title = common.BENCHMARKS[name].split
            server.files[f"split_zhou_{title}.json"] = split
            monkeypatch.setitem(download.BLOBS, title, blob(split))

    return serve


def blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()[:16]


def left(root):
    """What lies in root, files as well as folders, without the progress of a download."""
    return sorted(p.name for p in root.iterdir() if p.suffix != ".part") if root.exists() else []


def is_whole(name, root):
    data = common.load_dataset(name, root)
    pictures = [item[0] for item in data.train + data.val + data.test]
    return len(pictures) >= 3 and all(Path(p).read_bytes() == b"picture" for p in pictures)


def refused(function, *arguments):
    with pytest.raises(common.Error) as problem:
        function(*arguments)
    assert "\n" not in str(problem.value)
    return str(problem.value)


# ---------------------------------------------------------------------------- whole


def test_there_is_an_address_for_every_benchmark_but_imagenet():
    assert {*download.SOURCES, "imagenet"} == set(common.BENCHMARKS)
    assert set(download.BLOBS) == {b.split for b in common.BENCHMARKS.values() if b.split}
    for source in download.SOURCES.values():
        assert source.url.startswith("http") and source.url.endswith((".zip", ".tar", "gz"))


@pytest.mark.parametrize("name", INSIDE)
def test_each_archive_is_laid_out_as_it_is_read(name, server, serve, tmp_path):
    serve(name)
    root = tmp_path / "data"
    download.main([name, "--data", str(root)])
    assert is_whole(name, root)
    assert left(root) == [common.BENCHMARKS[name].folder]
    assert not list(root.rglob(".*")) and not list(root.rglob("*.gz"))
    asked = len(server.asked)
    download.main([name, "--data", str(root)])
    assert len(server.asked) == asked  # what is there is not fetched again


def test_a_split_file_is_checked_against_its_blob_id(server, serve, tmp_path, monkeypatch):
    serve("dtd")
    monkeypatch.setitem(download.BLOBS, "DescribableTextures", "0" * 16)
    assert "checksum" in refused(download.download, "dtd", tmp_path)
    assert not list(tmp_path.rglob("*.json*")) and left(tmp_path / "dtd") == []


def test_official_split_files_have_the_ids_of_the_table():
    folder = Path(__file__).parents[2] / "shared" / "splits"
    if not folder.is_dir():
        pytest.skip(f"no official split files at {folder}")
    files = sorted(folder.glob("split_zhou_*.json"))
    assert len(files) == 7
    for file in files:
        assert blob(file.read_bytes()) == download.BLOBS[file.stem.removeprefix("split_zhou_")]


def test_a_third_partys_copy_is_announced_with_its_terms(
    server, serve, tmp_path, monkeypatch, capsys
):
    serve("sun397")
    monkeypatch.setattr(download, "COPIES", server.url)
    download.download("sun397", tmp_path)
    text = capsys.readouterr().out
    assert "third party" in text and "research" in text


def test_the_command_says_where_imagenet_is_and_what_is_near_a_name(server, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        common.main("download", "imagenet", "--data", str(tmp_path))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert "login: get it at image-net.org" in line
    assert str(tmp_path / "imagenet/images") in line
    assert "near it: dtd" in refused(download.main, ["dttd", "--data", str(tmp_path)])
    assert "dataset" in refused(download.main, [])
    for name in common.BENCHMARKS:
        assert f"download {name}" in refused(common.load_dataset, name, tmp_path)
    assert server.asked == []


# ---------------------------------------------------------------------------- the network

CONTENT = random.Random(3).randbytes(3_000_000)


@pytest.fixture
def target(server, tmp_path):
    """(address, path) of a file on the server and of where it shall go."""
    server.files["x.zip"] = CONTENT
    return server.url + "x.zip", tmp_path / "data" / "x.zip"


def fetch(url, path, expected=""):
    download.fetch(url, path, download.md5, expected)


def test_what_is_not_there_is_named_with_its_address(server, target):
    url, path = target
    server.files.clear()
    line = refused(fetch, url, path)
    assert url in line and "404" in line and str(path) in line
    server.shutdown()
    server.server_close()
    assert url in refused(fetch, url, path)
    assert left(path.parent) == []


@pytest.mark.parametrize("mood", ["kind", "no ranges"])
def test_a_cut_connection_is_continued_where_it_broke(mood, server, target):
    url, path = target
    for bad in "cut", "away", "nonsense":
        server.mood = bad
        assert "repeat" in refused(fetch, url, path)
    assert left(path.parent) == []
    server.mood = mood
    fetch(url, path, hashlib.md5(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT
    assert server.asked[-1] == ("x.zip", "bytes=2000000-")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("there, asks", [(3_000_000, 1), (4_000_000, 2)])
def test_a_part_that_is_whole_or_too_long_ends_well(there, asks, server, target):
    url, path = target
    path.parent.mkdir()
    path.with_name("x.zip.part").write_bytes((CONTENT * 2)[:there])
    if asks == 2:
        assert "repeat" in refused(fetch, url, path)
    fetch(url, path)
    assert path.read_bytes() == CONTENT and len(server.asked) == asks


def test_wrong_bytes_are_deleted(target):
    url, path = target
    assert "checksum" in refused(fetch, url, path, "0" * 16)
    assert list(path.parent.iterdir()) == []


def test_an_archive_that_the_user_put_there_is_taken(server, serve, tmp_path):
    serve("imagenet_r")
    (tmp_path / "imagenet-r.tar").write_bytes(server.files.pop("imagenet-r.tar"))
    download.download("imagenet_r", tmp_path)
    assert is_whole("imagenet_r", tmp_path) and server.asked == []


@contextmanager
def full_disk(size):
    """No file of this process may grow beyond size bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_the_download_goes_on_later(server, target):
    url, path = target
    with full_disk(1_500_000):
        assert "File too large" in refused(fetch, url, path)
    assert left(path.parent) == []
    fetch(url, path, hashlib.md5(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT and server.asked[-1][1] == "bytes=1500000-"


def test_a_disk_that_is_full_when_unpacking_installs_nothing(server, serve, tmp_path):
    entries = [(f"imagenet-a/{key}/1.jpeg", b"picture") for key in WORDNET]
    entries.append(("imagenet-a/README.txt", bytes(50_000)))
    server.files["imagenet-a.tar"] = content = pack(".tar", entries)
    (tmp_path / "imagenet-a.tar").write_bytes(content)
    with full_disk(40_000):
        assert "repeat to go on" in refused(download.download, "imagenet_a", tmp_path)
    assert left(tmp_path) == ["imagenet-a.tar"]
    download.download("imagenet_a", tmp_path)
    assert left(tmp_path) == ["imagenet-adversarial"]


# ---------------------------------------------------------------------------- many processes


def started(name, root):
    """A process that downloads, as the command line does, and its log."""
    root.mkdir(exist_ok=True)
    log = root.parent / f"log{time.monotonic_ns()}"
    process = processes.Process(target=logged, args=(log, name, root))
    process.start()
    return process, log


def logged(log, name, root):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        common.script(lambda: download.main([name, "--data", str(root)]))


@pytest.fixture
def large(server, serve):
    """A data set of 200 pictures and 2 MB on a slow server."""
    entries, split = owners("dtd")
    server.files["split_zhou_DescribableTextures.json"] = split
    serve("dtd")
    noise = random.Random(4)
    entries += [(f"dtd/images/more/{i}.jpg", noise.randbytes(10_000)) for i in range(200)]
    server.files["dtd-r1.0.1.tar.gz"] = pack(".tar.gz", entries)
    server.mood = "slow"


def check_large(root):
    assert left(root) == ["dtd"] and is_whole("dtd", root)
    assert len(list((root / "dtd/images/more").iterdir())) == 200


def test_a_download_killed_at_any_moment_leaves_no_half_data_set(large, tmp_path):
    start = time.monotonic()
    process, log = started("dtd", tmp_path / "undisturbed")
    process.join()
    assert process.exitcode == 0, log.read_text()
    check_large(tmp_path / "undisturbed")
    seconds, rng, killed = time.monotonic() - start, random.Random(6), 0
    for kill in range(int(os.environ.get("KILLS", 6))):
        root = tmp_path / f"data{kill}"
        process, log = started("dtd", root)
        time.sleep(rng.uniform(0.05, 1) * seconds)
        process.kill()
        process.join()
        killed += process.exitcode != 0
        images = root / "dtd/images"
        assert not images.exists() or len(list((images / "more").iterdir())) == 200
        download.download("dtd", root)
        (root / "dtd-r1.0.1.tar.gz").unlink(missing_ok=True)  # if killed after the images came
        check_large(root)
    assert killed > 1


@pytest.mark.parametrize("crowd", range(int(os.environ.get("CROWDS", 1))))
def test_processes_at_once_end_with_one_whole_data_set(crowd, large, tmp_path):
    rng, root = random.Random(crowd), tmp_path / "data"
    children = []
    for _ in range(6):
        children.append(started("dtd", root))
        time.sleep(rng.uniform(0, 0.2))
    children.pop(2)[0].kill()
    for process, log in children:
        process.join()
        assert process.exitcode == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    download.download("dtd", root)  # removes what the killed one left
    assert not [name for name in left(root) if name != "dtd"]
    check_large(root)


# ---------------------------------------------------------------------------- hostile archives

GOOD = [(f"imagenet-a/{key}/1.jpeg", b"picture") for key in WORDNET]
LINK = {"type": tarfile.SYMTYPE}
TRAPS = {
    "up": [("../evil", b"x"), ("imagenet-a/../../../evil", b"x")],
    "absolute": [("{outside}/evil", b"x")],
    "link away": [("link", LINK | {"linkname": "{outside}"}), ("link/evil", b"x")],
    "link within": [("imagenet-a/link", LINK | {"linkname": "n01440764"})],
    "hard link": [("imagenet-a/a", {"type": tarfile.LNKTYPE, "linkname": "{outside}/secret"})],
    "device": [("imagenet-a/a", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})],
    "fifo": [("imagenet-a/a", {"type": tarfile.FIFOTYPE})],
}
FORMS = [(".tar", trap) for trap in TRAPS] + [(".zip", "up"), (".zip", "absolute")]
FORMS += [("inner", trap) for trap in TRAPS]


def filled(entries, outside):
    """The entries with the folder outside in their names and links."""
    done = []
    for name, content in entries:
        if isinstance(content, dict) and "linkname" in content:
            content = content | {"linkname": content["linkname"].format(outside=outside)}
        done.append((name.format(outside=outside), content))
    return done


@pytest.fixture
def offered(monkeypatch, tmp_path):
    """offered(form, content) puts an archive where that of imagenet_a is looked for."""

    def offered(form, content):
        source = download.Source(f"http://127.0.0.1:9/x{form}")
        monkeypatch.setitem(download.SOURCES, "imagenet_a", source)
        root = tmp_path / "data"
        root.mkdir(exist_ok=True)
        (root / f"x{form}").write_bytes(content)
        return root

    return offered


@pytest.mark.parametrize("form, trap", FORMS)
def test_no_entry_of_an_archive_leaves_its_folder(form, trap, offered, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    entries = GOOD + filled(TRAPS[trap], outside)
    if form == "inner":
        inner = pack(".tar.gz", entries)
        root = offered(".zip", pack(".zip", [*GOOD, ("imagenet-a/more.tar.gz", inner)]))
    else:
        root = offered(form, pack(form, entries))
    try:
        download.download("imagenet_a", root)
    except common.Error as problem:
        assert str(root) in str(problem) and "\n" not in str(problem)
        assert left(root) == []
    else:  # tarfile takes an absolute name for a relative one
        assert trap == "absolute" and is_whole("imagenet_a", root)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "outside"]
    assert [p.name for p in outside.iterdir()] == ["secret"]
    assert (outside / "secret").stat().st_nlink == 1


def test_damaged_archives_end_in_one_line_and_install_nothing(offered):
    rng, refusals = random.Random(1), 0
    for case in range(80):
        form = (".zip", ".tar.gz", ".tar", "inner")[case % 4]
        inner = [("imagenet-a/more.tar.gz", pack(".tar.gz", GOOD)[: rng.randrange(1, 150)])]
        form, entries = (".zip", inner) if form == "inner" else (form, GOOD)
        content = bytearray(pack(form, entries))
        if rng.random() < 0.4:
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.choice((1, 4, 30)) if content else 0):
            content[rng.randrange(len(content))] = rng.randrange(256)
        root = offered(form, bytes(content))
        try:
            download.download("imagenet_a", root)
        except common.Error as problem:
            refusals += 1
            assert f"x{form}" in str(problem) and "\n" not in str(problem)
            for file in root.iterdir():  # one that lacks the images is kept
                assert "holds no folder" in str(problem)
                file.unlink()
        else:
            pictures = list((root / "imagenet-adversarial").rglob("*.jpeg"))
            assert len(pictures) == 3
            shutil.rmtree(root / "imagenet-adversarial")
    assert refusals > 40


@pytest.mark.parametrize("damage", ["a header", "the last entries"])
def test_a_tar_that_tarfile_takes_for_whole_is_refused(damage, offered):
    content = pack(".tar", GOOD)
    if damage == "a header":
        content = content[:1030] + b"\xff" + content[1031:]
    else:
        content = content[:2048]  # two of three entries, and no end
    with tarfile.open(fileobj=io.BytesIO(content)) as file:
        assert 0 < len(file.getmembers()) < 3
    root = offered(".tar", content)
    assert "damaged" in refused(download.download, "imagenet_a", root)
    assert left(root) == []


def test_an_archive_without_the_images_is_named_and_kept(offered):
    root = offered(".zip", pack(".zip", [("readme", b"moved")]))
    assert "x.zip holds no folder imagenet-a" in refused(download.download, "imagenet_a", root)
    assert left(root) == ["x.zip"]
