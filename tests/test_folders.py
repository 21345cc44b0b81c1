"""Folders of the user's own, and broken pictures."""

import collections
import json
import struct
import zlib
from pathlib import Path

import pytest

import common
from tests import miniatures
from tests.miniatures import miniature, records, refusal, run_coop, tree


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return miniatures.tiny_clip(tmp_path_factory.mktemp("model") / "clip")


@pytest.fixture
def coop(tmp_path, tiny):
    """run_coop with a tiny CLIP and everything below tmp_path; more flags as it is called."""
    places = ["--model", tiny, "--data", tmp_path / "data", "--out", tmp_path / "runs"]
    return lambda *flags: run_coop(*places, "--shots", 1, *flags)


# ---------------------------------------------------------------------------- own folders


def test_own_folders_with_parts_are_read_and_what_is_no_image_is_left_out(tmp_path):
    for part in "train", "val", "test":
        tree(tmp_path / part, ["cat/1.jpg", "a_dog/2.JPG", "a_dog/1.bmp", "cat/notes.txt"])
        tree(tmp_path / part, ["cat/.1.jpg", "cat/Thumbs.db", ".git/1.jpg", "list.txt", "9.jpg"])
    data = common.load_dataset(str(tmp_path), "unused")
    assert data.classnames == ["a_dog", "cat"]
    for part, items in ("train", data.train), ("val", data.val), ("test", data.test):
        names = [("a_dog/1.bmp", 0), ("a_dog/2.JPG", 0), ("cat/1.jpg", 1)]
        assert [(path, label) for path, label, _ in items] == [
            (f"{tmp_path / part}/{name}", label) for name, label in names
        ]


def test_own_folders_without_parts_are_split_once_and_for_all(tmp_path):
    files = [f"{c}/{i}.png" for c in ("x", "y") for i in range(20)]
    one, two = (common.load_dataset(str(tree(tmp_path / f, files)), "unused") for f in "ab")
    lists = [one.train, one.val, one.test]
    assert [collections.Counter(c for _, _, c in part) for part in lists] == [
        {"x": n, "y": n} for n in (10, 4, 6)
    ]
    paths = sorted(path for part in lists for path, _, _ in part)
    assert paths == sorted(f"{tmp_path}/a/{file}" for file in files)  # all, and none twice
    for part, same in zip(lists, [two.train, two.val, two.test], strict=True):
        assert [Path(path).name for path, _, _ in part] == [Path(path).name for path, _, _ in same]


@pytest.mark.parametrize(
    "files, named",
    [
        (["only/1.jpg", "only/2.jpg"], "two"),
        (["a/1.jpg", "a/2.jpg", "b/notes.txt"], "'b'"),
        (["a/1.jpg", "a/2.jpg", "b/notes.txt", "c/1.jpg", "c/2.jpg"], "'b'"),
        (["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", "c/notes.txt"], "'c'"),
        (["a/1.jpg", "b/1.jpg"], "no training image"),  # one image cannot be trained on and tested
        (["train/a/1.jpg", "train/b/1.jpg"], "no test image"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg"], "'b'"),
        (["train/a/1.jpg", "train/b/x.txt", "test/a/1.jpg", "test/b/1.jpg"], "'b'"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg", "test/c/1.jpg"], "c"),
        (["1.jpg", "2.jpg", "notes.txt"], "no"),
    ],
)
def test_folders_that_cannot_be_learned_say_what_they_lack(files, named, tmp_path, coop, capsys):
    line = refusal(capsys, coop, "--dataset", tree(tmp_path / "own", files))
    assert str(tmp_path / "own") in line and named in line.replace(str(tmp_path), "")


NAMES = ["under_score", "Ünïcødé 猫", 'it\'s "quoted"', "{} {0} {x}", "🦊", "100% <b> $HOME; ls"]


def test_class_names_may_hold_anything(tmp_path, coop):
    own = tree(tmp_path / "möine {} '\"", [f"{c}/{i}.png" for c in NAMES for i in range(4)])
    coop("--dataset", own)
    (row,) = records(tmp_path / "runs")
    assert row["n_test"] == len(NAMES)
    (prompt,) = (tmp_path / "runs").rglob("prompt.safetensors")
    assert prompt.is_relative_to(tmp_path / "runs/coop")


@pytest.mark.parametrize("name, fits", [("very " * 60, True), ("猫é" * 150, False)])
def test_a_class_name_of_300_characters_is_used_or_named(name, fits, tmp_path, coop, capsys):
    miniature("dtd", tmp_path / "data")
    split = tmp_path / "data/dtd" / miniatures.SPLIT["dtd"][1]
    split.write_text(split.read_text().replace('"banded"', json.dumps(name)))
    if fits:
        assert 0 <= coop("--dataset", "dtd") <= 100
    else:
        assert name[:40] in refusal(capsys, coop, "--dataset", "dtd")


# ---------------------------------------------------------------------------- broken images


def chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def huge_png():
    """A few bytes that claim 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999))
    )


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "folder", "huge", "half png"])
def test_an_image_that_cannot_be_read_is_named(kind, tmp_path, coop, capsys):
    own = tree(
        tmp_path / "own",
        [f"{p}/{c}/{i}.jpg" for p in ("train", "test") for c in "ab" for i in "12"],
    )
    broken = own / "test/b/1.jpg"
    content = {"text": b"hello", "huge": huge_png(), "half png": huge_png()[:50], "empty": b""}
    content["truncated"] = broken.read_bytes()[:-300]
    broken.unlink()
    broken.mkdir() if kind == "folder" else broken.write_bytes(content[kind])
    assert str(broken) in refusal(capsys, coop, "--dataset", own)
    assert not list((tmp_path / "runs").rglob("results.json"))
