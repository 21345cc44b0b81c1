"""--download against a server on 127.0.0.1: whole, broken, hostile; nothing half-made is left."""

import contextlib
import hashlib
import io
import os
import random
import resource
import shutil
import signal
import stat
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import common
from tests import download, miniatures
from tests.miniatures import child, confined, killed_at, miniature, refusal, watched

# Where the images' parent folder lies in each archive, and what the images are called there.
ARCHIVES = {
    "caltech101": ("caltech-101", "101_ObjectCategories.tar.gz"),  # an archive in the archive
    "dtd": ("dtd", "images"),
    "eurosat": ("", "2750"),
    "fgvc_aircraft": ("fgvc-aircraft-2013b/data", "images"),
    "food101": ("food-101", "images"),
    "oxford_flowers": ("", "jpg"),
    "oxford_pets": ("", "images"),
    "stanford_cars": ("stanford_cars", ""),
    "sun397": ("sun397", "SUN397"),
    "ucf101": ("ucf101", "UCF-101-midframes"),
    "imagenetv2": ("", "imagenetv2-matched-frequency-format-val"),
    "imagenet_sketch": ("", "sketch"),
    "imagenet_a": ("", "imagenet-a"),
    "imagenet_r": ("", "imagenet-r"),
}
SHIPPED = ("stanford_cars", "sun397", "ucf101")  # copies that bring their split file


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
    """A running Server to which every address of tests/download.py leads, checksums left out."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(download, "HOSTS", hosts(server.url))
    monkeypatch.setattr(download, "SOURCES", {k: row[:1] for k, row in download.SOURCES.items()})
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def hosts(url):
    return dict.fromkeys([*download.HOSTS, "http", "https"], url)


def archive_name(name):
    return download.SOURCES[name][0].split("/")[-1].split(":")[-1]


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
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def serve(server, name, tmp_path):
    """Puts a miniature of the data set on the server as its owners pack it; returns its items."""
    here = tmp_path / "owner"
    items = miniature(name, here)
    folder, images = Path(common.TABLE[name][0]), common.TABLE[name][1]
    inside, called = ARCHIVES[name]
    entries = []
    for path in sorted((here / folder).rglob("*")):
        relative = path.relative_to(here / folder)
        if path.is_dir():
            continue
        if path.suffix == ".json" and name not in SHIPPED:
            server.files[path.name] = path.read_bytes()
        elif images != "." and relative.parts[0] == images:
            entries.append((f"{called}/{relative.relative_to(images)}", path.read_bytes()))
        else:
            entries.append((str(relative), path.read_bytes()))
    if name == "caltech101":
        inner = [(e.replace(called, images), content) for e, content in entries]
        entries = [(called, pack(called, inner))]
        entries.append(("../__MACOSX/caltech-101/._101_ObjectCategories.tar.gz", b"\0\5\x16\7"))
    entries = [(os.path.normpath(f"{inside}/{e}").lstrip("/"), content) for e, content in entries]
    server.files[archive_name(name)] = pack(archive_name(name), entries)
    return items


def moved(items, old, new):
    return [(path.replace(str(old), str(new)), label, c) for path, label, c in items]


def blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()[:16]


@pytest.fixture
def accept(monkeypatch):
    """Makes the miniature split file's blob id the official one."""

    def accept(name, server):
        row = common.TABLE[name]
        if len(row) > 3 and (split := f"split_zhou_{row[2]}.json") in server.files:
            monkeypatch.setitem(common.TABLE, name, [*row[:3], blob(server.files[split])])

    return accept


def left(root):
    """What lies in root, files as well as folders, without the progress of a download."""
    return sorted(p.name for p in root.iterdir() if p.suffix != ".part") if root.exists() else []


# ---------------------------------------------------------------------------- whole


def test_there_is_an_address_for_every_set_but_imagenet():
    assert {*download.SOURCES, "imagenet"} == set(common.TABLE)
    assert {address.partition(":")[0] for address, *_ in download.SOURCES.values()} <= {
        *("http", "https"),
        *download.HOSTS,
    }
    rows = {name: row for name, row in common.TABLE.items() if row[2] not in ("wnids", "aircraft")}
    assert sorted(rows) == sorted(miniatures.SPLIT)
    assert all(len(row[3]) >= 16 for row in rows.values())  # a blob id each


@pytest.mark.parametrize("name", ARCHIVES)
def test_each_archive_is_laid_out_as_it_is_read(name, server, accept, tmp_path):
    items = serve(server, name, tmp_path)
    accept(name, server)
    root = tmp_path / "data"
    with confined(root):
        download.download(name, str(root))
        data = common.load_dataset(name, root)
    for part in "train", "val", "test":
        assert getattr(data, part) == moved(items[part], tmp_path / "owner", root)
    assert all(Path(item[0]).is_file() for item in data.train + data.val + data.test)
    assert left(root) == [common.TABLE[name][0]]
    asked = len(server.asked)
    download.download(name, root)
    common.load_dataset(name, root)
    assert len(server.asked) == asked  # what is there is not fetched again


def test_the_script_downloads_what_it_is_asked_to(server, accept, tmp_path, capsys):
    serve(server, "dtd", tmp_path)
    accept("dtd", server)
    clip, root, out = miniatures.tiny_clip(tmp_path / "clip"), tmp_path / "data", tmp_path / "runs"
    flags = ["--dataset", "dtd", "--data", root, "--out", out, "--model", clip]
    assert "--download" in refusal(capsys, miniatures.run_coop, *flags)
    with confined(root, out):
        miniatures.run_coop(*flags, "--download")
    assert len(miniatures.records(out)) == 1


def test_a_third_partys_copy_is_announced_with_its_terms(server, tmp_path, capsys):
    serve(server, "sun397", tmp_path)
    download.download("sun397", tmp_path / "data")
    text = capsys.readouterr().out
    assert "third party" in text and "research" in text


def test_imagenet_says_where_to_get_it(server, tmp_path, capsys):
    flags = ["--dataset", "imagenet", "--data", tmp_path / "data", "--download"]
    assert "image-net.org" in refusal(capsys, miniatures.run_coop, *flags)
    assert server.asked == []


# ---------------------------------------------------------------------------- split files


@pytest.mark.parametrize("name", ["dtd", "stanford_cars"])
def test_a_missing_split_file_is_fetched_and_checked(name, server, accept, tmp_path):
    items = miniature(name, tmp_path)
    split = tmp_path / common.TABLE[name][0] / miniatures.SPLIT[name][1]
    server.files[split.name] = split.read_bytes()
    split.unlink()
    with pytest.raises(common.Error, match="checksum"):  # it is not the official one
        common.load_dataset(name, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if ".json" in p.name]
    accept(name, server)
    data = common.load_dataset(name, tmp_path)
    assert data.train == items["train"]
    assert split.read_bytes() == server.files[split.name]


def test_official_split_files_have_the_ids_of_the_table():
    folder = Path(__file__).parents[2] / "shared" / "splits"
    if not folder.is_dir():
        pytest.skip(f"no official split files at {folder}")
    known = {f"split_zhou_{row[2]}.json": row[3] for row in common.TABLE.values() if row[3:]}
    files = sorted(folder.glob("split_zhou_*.json"))
    assert len(files) == 7
    for file in files:
        content = file.read_bytes()
        assert (
            hashlib.sha1(b"blob %d\0" % len(content) + content)
            .hexdigest()
            .startswith(known[file.name])
        )


# ---------------------------------------------------------------------------- the network


CONTENT = random.Random(3).randbytes(3_000_000)


@pytest.fixture
def target(server, tmp_path):
    """(address, path) of a file on the server and of where it shall go."""
    server.files["x.zip"] = CONTENT
    return server.url + "x.zip", tmp_path / "data" / "x.zip"


def fails(*arguments):
    with pytest.raises(common.Error) as problem:
        download.fetch(*arguments)
    return str(problem.value)


def test_what_is_not_there_is_named_with_its_address(server, target):
    url, path = target
    server.files.clear()
    line = fails(url, path)
    assert url in line and "404" in line and str(path) in line
    assert left(path.parent) == []


def test_a_server_that_is_not_there_is_one_line(tmp_path, server):
    server.shutdown()
    server.server_close()
    assert server.url in fails(server.url + "x.zip", tmp_path / "x.zip")
    assert left(tmp_path) == []


@pytest.mark.parametrize("mood", ["kind", "no ranges"])
def test_a_cut_connection_is_continued_where_it_broke(mood, server, target):
    url, path = target
    server.mood = "cut"
    assert "repeat" in fails(url, path)
    assert left(path.parent) == []
    server.mood = mood
    download.fetch(url, path, hashlib.md5(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT
    assert server.asked[-1] == ("x.zip", "bytes=2000000-")
    assert list(path.parent.iterdir()) == [path]


def test_a_server_that_is_out_of_order_does_not_cost_what_was_fetched(server, target):
    url, path = target
    for mood in "cut", "away", "nonsense":
        server.mood = mood
        fails(url, path)
    server.mood = "kind"
    download.fetch(url, path)
    assert server.asked[-1][1] == "bytes=2000000-" and path.read_bytes() == CONTENT


@pytest.mark.parametrize("there, asks", [(3_000_000, 1), (4_000_000, 2)])
def test_a_part_that_is_whole_or_too_long_ends_well(there, asks, server, target):
    url, path = target
    path.parent.mkdir()
    path.with_name("x.zip.part").write_bytes((CONTENT * 2)[:there])
    if asks == 2:
        assert "repeat" in fails(url, path)
    download.fetch(url, path)
    assert path.read_bytes() == CONTENT and len(server.asked) == asks


def test_wrong_bytes_are_deleted(server, target):
    url, path = target
    assert "checksum" in fails(url, path, "0" * 16)
    assert list(path.parent.iterdir()) == []


@contextlib.contextmanager
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
        assert "File too large" in fails(url, path)
    assert left(path.parent) == []
    download.fetch(url, path, hashlib.md5(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT


def test_a_disk_that_is_full_when_unpacking_installs_nothing(server, tmp_path):
    serve(server, "eurosat", tmp_path)
    root = tmp_path / "data"
    download.fetch(server.url + "EuroSAT.zip", root / "EuroSAT.zip")
    with full_disk(500), pytest.raises(common.Error, match="nothing was installed"):
        download.download("eurosat", root)
    assert left(root) == ["EuroSAT.zip"]
    download.download("eurosat", root)
    assert left(root) == ["eurosat"]


def test_a_killed_download_is_continued(server, target):
    url, path = target
    server.mood = "slow"
    process, part = child(download.fetch, url, path), path.with_name("x.zip.part")
    deadline = time.time() + 30
    while not (part.exists() and part.stat().st_size) and time.time() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    size = part.stat().st_size
    assert 0 < size < len(CONTENT) and left(path.parent) == []
    server.mood = "kind"
    download.fetch(url, path)
    assert server.asked[-1][1] == f"bytes={size}-" and path.read_bytes() == CONTENT


def install(name, root, url):
    download.HOSTS = hosts(url)
    download.SOURCES = {name: download.SOURCES[name][:1]}
    download.download(name, root)


def test_a_download_killed_at_any_write_leaves_no_half_data_set(server, tmp_path):
    items, writes = serve(server, "fgvc_aircraft", tmp_path), []
    with watched(writes.append):
        download.download("fgvc_aircraft", tmp_path / "undisturbed")
    moments = sorted({*range(1, len(writes), 7), *range(len(writes) - 8, len(writes) + 1)})
    for n in moments:
        root = tmp_path / f"data{n}"
        home = root / "fgvc_aircraft/images"
        assert killed_at(n, install, "fgvc_aircraft", root, server.url) == -signal.SIGKILL
        whole = home.exists()  # then the archive, which comes first in the list, may stay
        assert not whole or len(list(home.iterdir())) == 20
        download.download("fgvc_aircraft", root)
        assert left(root)[-1 if whole else 0 :] == ["fgvc_aircraft"]
        data = common.load_dataset("fgvc_aircraft", root)
        assert data.test == moved(items["test"], tmp_path / "owner", root)
        assert len(list(home.iterdir())) == 20
    print(f"\n{len(moments)} kills while downloading, {len(moments)} identical data sets")


# ---------------------------------------------------------------------------- hostile archives

GOOD = [("2750/Forest/Forest_1.jpg", b"image"), ("2750/River/River_1.jpg", b"image")]
LINK = {"type": tarfile.SYMTYPE}
TRAPS = {
    "up": [("../evil", b"x"), ("2750/../../../evil", b"x")],
    "absolute": [("{outside}/evil", b"x")],
    "link away": [("2750/link", LINK | {"linkname": "{outside}"}), ("2750/link/evil", b"x")],
    "link up": [("link", LINK | {"linkname": "../.."}), ("link/evil", b"x")],
    "hard link": [("2750/a.jpg", {"type": tarfile.LNKTYPE, "linkname": "{outside}/secret"})],
    "device": [("2750/a.jpg", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})],
    "fifo": [("2750/a.jpg", {"type": tarfile.FIFOTYPE})],
}
FORMS = [(".tar.gz", trap) for trap in TRAPS] + [(".zip", "up"), (".zip", "absolute")]
FORMS += [("inner.tar.gz", trap) for trap in TRAPS]


@pytest.mark.parametrize("form, trap", FORMS)
def test_no_entry_of_an_archive_leaves_its_folder(form, trap, tmp_path, monkeypatch):
    outside, root = tmp_path / "outside", tmp_path / "root" / "data"
    outside.mkdir()
    root.mkdir(parents=True)
    (outside / "secret").write_text("secret")
    entries = [
        (name.format(outside=outside), content)
        if isinstance(content, bytes)
        else (
            name,
            {k: v.format(outside=outside) if k == "linkname" else v for k, v in content.items()},
        )
        for name, content in TRAPS[trap]
    ]
    content = pack(form, GOOD + entries)
    if form == "inner.tar.gz":
        form, content = ".zip", pack(".zip", [*GOOD, ("2750/inner.tar.gz", content)])
    monkeypatch.setattr(download, "SOURCES", {"eurosat": [f"vgg:x{form}"]})
    (root / f"x{form}").write_bytes(content)
    with confined(root):
        try:
            download.download("eurosat", root)
        except common.Error as problem:
            assert f"x{form}" in str(problem) and "\n" not in str(problem)
            assert left(root) == [f"x{form}"]
    assert [p.name for p in outside.iterdir()] == ["secret"]
    assert not (outside / "secret").is_symlink() and (outside / "secret").stat().st_nlink == 1
    for path in root.rglob("*"):
        assert path.name != "evil" or path.resolve().is_relative_to(root)
        assert stat.S_ISREG(path.lstat().st_mode) or stat.S_ISDIR(path.lstat().st_mode)


def test_60_broken_archives_end_in_one_line_and_install_nothing(tmp_path, monkeypatch):
    rng, root, refused = random.Random(1), tmp_path / "data", 0
    root.mkdir()
    for case in range(60):
        form = (".zip", ".tar.gz", ".tar", "inner")[case % 4]
        inner = [("2750/more.tar.gz", pack(".tar.gz", GOOD)[: rng.randrange(1, 150)])]
        form, entries = (".zip", inner) if form == "inner" else (form, GOOD)
        content = bytearray(pack(form, entries))
        if rng.random() < 0.4:
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.choice((1, 4, 30)) if content else 0):
            content[rng.randrange(len(content))] = rng.randrange(256)
        monkeypatch.setattr(download, "SOURCES", {"eurosat": [f"vgg:{case}{form}"]})
        archive = root / f"{case}{form}"
        archive.write_bytes(content)
        with confined(root):
            try:
                download.download("eurosat", root)
            except common.Error as problem:
                refused += 1
                assert str(archive) in str(problem)
                assert left(root) == [archive.name]
                archive.unlink()
            else:
                assert left(root) == ["eurosat"]
                shutil.rmtree(root / "eurosat")
    assert refused > 30


def test_an_archive_without_the_images_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SOURCES", {"eurosat": ["vgg:x.zip"]})
    (tmp_path / "x.zip").write_bytes(pack(".zip", [("readme", b"moved")]))
    with pytest.raises(common.Error, match="x.zip holds no folder 2750"):
        download.download("eurosat", tmp_path)
    assert left(tmp_path) == ["x.zip"]
