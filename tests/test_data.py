"""Data sets: the fifteen in miniature, CoOp's picks, the user's own folders, and broken input."""

import collections
import json
import math
import os
import random
import struct
import zlib
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

import common
from tests import download, miniatures
from tests.miniatures import confined, miniature, one_line, picture, records, refusal, run_coop

ALL = [*miniatures.WNIDS, *miniatures.SPLIT, "fgvc_aircraft"]
OFFICIAL = Path(__file__).parents[2] / "shared" / "splits"
TEMPLATES = collections.defaultdict(lambda: "a photo of a {}.") | {
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "food101": "a photo of {}, a type of food.",
    "ucf101": "a photo of a person doing {}.",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return miniatures.tiny_clip(tmp_path_factory.mktemp("model") / "clip")


@pytest.fixture
def coop(tmp_path, tiny):
    """run_coop with a tiny CLIP and everything below tmp_path; more flags as it is called."""
    places = ["--model", tiny, "--data", tmp_path / "data", "--out", tmp_path / "runs"]
    return lambda *flags: run_coop(*places, "--shots", 1, *flags)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every address becomes a closed port of this machine."""
    closed = dict.fromkeys([*download.HOSTS, "http", "https"], "http://127.0.0.1:9/")
    monkeypatch.setattr(download, "HOSTS", closed)


def tree(folder, files, label=0):
    """Draws images at these paths below folder; other files hold a few words."""
    for file in files:
        if Path(file).suffix in (".png", ".jpg", ".JPG", ".bmp"):
            picture(folder / file, label)
        else:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("no image")
    return folder


# ---------------------------------------------------------------------------- the fifteen


@pytest.mark.parametrize("name", ALL)
def test_each_benchmark_set_is_read_from_its_own_layout(name, tmp_path):
    items = miniature(name, tmp_path)
    data = common.load_dataset(name, tmp_path)
    for part in "train", "val", "test":
        assert [tuple(item) for item in getattr(data, part)] == items[part]
    labels = {label: c for _, label, c in items["test"]}
    assert data.classnames == [labels[i] for i in range(len(labels))]
    assert data.template == TEMPLATES[name]
    assert data.name == name


@pytest.mark.parametrize("name", [name for name in ALL if name not in miniatures.TEST_ONLY])
def test_each_benchmark_set_trains_and_evaluates(name, tmp_path, coop):
    items = miniature(name, tmp_path / "data")
    accuracy = coop("--dataset", name)
    (row,) = records(tmp_path / "runs")
    assert (row["dataset"], row["evaluated_on"], row["n_test"]) == (name, name, len(items["test"]))
    assert row["accuracy"] == accuracy


def test_the_variants_of_imagenet_are_transfer_targets_with_their_own_classes(tmp_path, coop):
    for name in miniatures.WNIDS:
        miniature(name, tmp_path / "data")
    coop("--dataset", "imagenet", "--transfer", ",".join(miniatures.TEST_ONLY))
    counts = {row["evaluated_on"]: row["n_test"] for row in records(tmp_path / "runs")}
    classes = {name: len(classes) for name, (_, _, classes) in miniatures.WNIDS.items()}
    assert counts == {name: 3 * classes[name] for name in miniatures.WNIDS}


@pytest.mark.parametrize("name", miniatures.TEST_ONLY)
def test_a_set_without_training_images_cannot_be_learned(name, tmp_path, coop, capsys):
    miniature(name, tmp_path / "data")
    assert name in refusal(capsys, coop, "--dataset", name)


def test_imagenets_folders_are_labelled_by_open_clips_names(tmp_path):
    folders = ["n15075141", "n01440764", "n02119022", "not_a_wnid"]
    tree(
        tmp_path / "imagenet/images", [f"{p}/{f}/a.jpg" for p in ("train", "val") for f in folders]
    )
    names = [open_clip.IMAGENET_CLASSNAMES[label] for label in (0, 277, 999)]
    assert common.load_dataset("imagenet", tmp_path).classnames == names
    assert names == ["tench", "red fox", "toilet paper"]


def test_the_order_in_which_a_disk_lists_its_files_does_not_matter(tmp_path, monkeypatch):
    for name in ALL:
        miniature(name, tmp_path)
    tree(tmp_path / "own", [f"{c}/{i}.png" for c in "ab" for i in range(9)])
    names = [*ALL, str(tmp_path / "own")]
    before = [common.load_dataset(name, tmp_path) for name in names]
    listdir, scandir = os.listdir, os.scandir

    class Backwards(list):
        def __init__(self, *folder):
            with scandir(*folder) as entries:
                super().__init__(sorted(entries, key=lambda e: e.name, reverse=True))

        __enter__ = iter

        def __exit__(self, *problem):
            pass

        def __next__(self):
            return self.pop(0)

    monkeypatch.setattr(os, "listdir", lambda *folder: sorted(listdir(*folder), reverse=True))
    monkeypatch.setattr(os, "scandir", Backwards)
    assert [common.load_dataset(name, tmp_path) for name in names] == before


@pytest.mark.parametrize("name", ["sun397", "food101"])
def test_a_list_of_images_is_read_without_asking_the_disk_for_each(name, tmp_path, monkeypatch):
    (first, *_) = miniature(name, tmp_path)["train"]
    images, split, _ = miniatures.SPLIT[name]
    split = tmp_path / images.split("/")[0] / split
    items = json.loads(split.read_text())
    items["train"] += [[f"x/{i}.jpg", i % 3, items["train"][i % 3][2]] for i in range(3000)]
    split.write_text(json.dumps(items))
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: asked.append(path) or stat(path, **how))
    assert len(common.load_dataset(name, tmp_path).train) == 3006
    assert len(asked) < 30


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_image_is_named_when_it_is_needed(part, tmp_path, coop, capsys):
    gone = miniature("sun397", tmp_path / "data")[part][-1][0]
    Path(gone).unlink()
    common.load_dataset("sun397", tmp_path / "data")
    assert gone in refusal(capsys, coop, "--dataset", "sun397", "--shots", 2)


def test_what_is_not_there_is_named_with_the_way_out(tmp_path, coop, capsys):
    def line(name):
        return refusal(capsys, coop, "--dataset", name)

    assert "caltech101" in line("caltech11")  # the near name
    assert "--download" in line("dtd") and "dtd/images" in line("dtd")
    assert "image-net.org" in line("imagenet") and "train/" in line("imagenet")
    (tmp_path / "data/imagenet/images/train/n01440764").mkdir(parents=True)
    assert "no test image" in line("imagenet")
    (tmp_path / "data/fgvc_aircraft/images").mkdir(parents=True)
    assert "variants.txt" in line("fgvc_aircraft")


# ---------------------------------------------------------------------------- few-shot picks


def picks(split, shots, seed, half):
    """DATASETS 3.1 and 3.2 in plain Python: {part: [(path, label), ...]} and the class names."""
    rng, chosen, names = random.Random(seed), {"test": split["test"]}, {}
    for part, count in ("train", shots), ("val", min(shots, 4)):  # one stream for both
        classes = {}  # in order of first appearance
        for item in split[part]:
            classes.setdefault(item[1], []).append(item)
        chosen[part] = []
        for items in classes.values():
            chosen[part] += rng.sample(items, count) if len(items) >= count else items
    for _, label, name in split["train"]:
        names[label] = name
    labels = sorted(names)
    m = math.ceil(len(labels) / 2)
    labels = {"all": labels, "base": labels[:m], "new": labels[m:]}[half]
    relabelled = {
        part: [(path, labels.index(label)) for path, label, _ in items if label in labels]
        for part, items in chosen.items()
    }
    return relabelled, [names[label] for label in labels]


def drawn_split():
    """Five classes in mixed order, 2 to 30 training images each."""
    rng, split = random.Random(7), {}
    for part, sizes in ("train", (30, 2, 16, 9, 20)), ("val", (3, 9, 4, 1, 12)), ("test", [2] * 5):
        items = [
            [f"{part}/{c}/{i}.jpg", c, f"c {c}"] for c, n in enumerate(sizes) for i in range(n)
        ]
        split[part] = rng.sample(items, len(items))
    return split


@pytest.mark.parametrize("name", ["drawn", *sorted(miniatures.SPLIT)])
def test_picks_are_those_of_coop(name, tmp_path):
    folder, file, _ = miniatures.SPLIT["dtd" if name == "drawn" else name]
    images = tmp_path / folder
    (images / "cars_train").mkdir(parents=True)
    text = json.dumps(drawn_split())
    if name != "drawn":
        if not OFFICIAL.is_dir():
            pytest.skip(f"no official split files at {OFFICIAL}")
        if not (OFFICIAL / file).exists():
            pytest.skip(f"{file} is not among the official split files at {OFFICIAL}")
        text = (OFFICIAL / file).read_text()
    (tmp_path / folder.split("/")[0] / file).write_text(text)
    split = json.loads(text)
    picture(images / split["train"][0][0])
    data = common.load_dataset("dtd" if name == "drawn" else name, tmp_path)
    for shots in 1, 2, 4, 8, 16:
        for seed in 1, 2, 3:
            some = common.sample_few_shot(data, shots, seed)
            for half in "all", "base", "new":
                ours = some if half == "all" else common.subset_classes(some, half)
                wanted, names = picks(split, shots, seed, half)
                for part, items in wanted.items():
                    found = [(path, label) for path, label, _ in getattr(ours, part)]
                    assert found == [(f"{images}/{path}", label) for path, label in items]
                assert ours.classnames == names


TOY = {  # METHODS 1.5, k = 4: train, then val
    1: "4 18 27 25 30 31 32 37 49 40 64 107 109 106 108 110 111 118 115 127 112",
    2: "27 1 2 11 30 31 32 43 75 52 49 109 103 100 104 110 111 117 125 124 127",
    3: "7 18 17 4 30 31 32 56 71 63 73 109 101 100 106 110 111 127 120 119 115",
}


@pytest.mark.parametrize(
    "seed, train, val",
    [(s, [*map(int, t.split())][:11], [*map(int, t.split())][11:]) for s, t in TOY.items()],
)
def test_picks_of_the_toy_lists_are_those_written_down(seed, train, val):
    def items(*groups):
        return [(i, label, "c") for label, group in enumerate(groups) for i in group]

    lists = (
        items(range(30), range(30, 33), range(33, 80)),
        items(range(100, 110), range(110, 112), range(112, 130)),
    )
    data = common.Dataset("toy", *lists, [], ["c"] * 3, "{}")
    some = common.sample_few_shot(data, 4, seed)
    assert ([item[0] for item in some.train], [item[0] for item in some.val]) == (train, val)


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
        (["only/1.jpg", "only/2.jpg"], "fewer than two classes"),
        (["a/1.jpg", "a/2.jpg", "b/notes.txt"], "'b'"),
        (["a/1.jpg", "a/2.jpg", "b/notes.txt", "c/1.jpg", "c/2.jpg"], "'b'"),
        (["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", "c/notes.txt"], "'c'"),
        (["a/1.jpg", "b/1.jpg"], "test image"),  # one image cannot be trained on and tested
        (["train/a/1.jpg", "train/b/1.jpg"], "test/"),
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
    (folder,) = (tmp_path / "runs").rglob("prompt.safetensors")
    assert folder.is_relative_to(tmp_path / "runs/coop")


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
    assert not (tmp_path / "runs/results.jsonl").exists()


@pytest.mark.parametrize(
    "suffix, mode, colour, rgb",
    [
        (".jpg", "CMYK", (0, 255, 255, 0), (254, 0, 0)),
        (".png", "P", 1, (10, 200, 30)),
        (".png", "I;16", 32896, (128, 128, 128)),
        (".png", "1", 1, (255, 255, 255)),
        (".png", "RGBA", (1, 2, 3, 0), (1, 2, 3)),
        (".png", "LA", (77, 9), (77, 77, 77)),
        (".jpg", "L", 50, (50, 50, 50)),
        (".tif", "F", 90.0, (90, 90, 90)),
        (".webp", "RGB", (0, 0, 255), (0, 0, 255)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(suffix, mode, colour, rgb, tmp_path):
    image = Image.new(mode, (5, 4), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / f"x{suffix}")
    pixels = common.decode(str(tmp_path / f"x{suffix}"))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 4, 5))
    assert (pixels.int() - torch.tensor(rgb)[:, None, None]).abs().max() <= 3


def test_an_animated_gif_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert common.decode(tmp_path / "x.gif")[:, 3, 3].tolist() == [255, 0, 0]


# ---------------------------------------------------------------------------- fuzz

JUNK = [None, True, -1, 7, 10**12, 1.5, "", "a" * 4000, [], {}, "../../etc/passwd", "/etc/passwd"]
JUNK += ["\0", "\ud800", "\n\x1b[31m", [[]], ["x", 0], {"train": 0}, float("nan")]


def broken_split(rng, text):
    """A split file with one thing wrong."""
    split, how = json.loads(text), rng.randrange(7)
    part = rng.choice(list(split))
    if how == 0:
        return text[: rng.randrange(len(text))].encode()
    if how == 1:
        noise = bytearray(text.encode())
        for _ in range(rng.choice((1, 5, 100))):
            noise[rng.randrange(len(noise))] = rng.randrange(256)
        return bytes(noise)
    if how == 2:
        return rng.choice([b"", b"[" * 10**5, b"null", b"\xff\xfe", b"1" * 5000, b'{"a": NaN}'])
    if how == 3:
        item = rng.choice(split[part])
        item[rng.randrange(3)] = rng.choice(JUNK)
    elif how == 4:
        split[part][rng.randrange(len(split[part]))] = rng.choice(JUNK)
    elif how == 5:
        split[part] = rng.choice([*JUNK, split[part][:1]])
    else:
        del split[part]
    return json.dumps(split).encode()


def broken_tree(rng, folder):
    """A tree of folders with images, stray files, broken images, and links to nowhere."""
    tops = rng.choice([["."], ["train", "test"], ["train", "val", "test"], ["train", "val"]])
    for top in tops:
        for c in rng.sample(["a", "b", "c d", "é", ".hidden", "train", "x.jpg"], rng.randrange(5)):
            for i in range(rng.choice((0, 1, 2, 6))):
                path = folder / top / c / f"{i}{rng.choice(('.jpg', '.png', '.png', '.txt'))}"
                tree(folder, [path])
                if rng.random() < 0.15:
                    path.unlink()
                    rng.choice((path.mkdir, path.touch, lambda p=path: p.symlink_to("nowhere")))()
    folder.mkdir(exist_ok=True)
    return folder


WORDS = [
    "",
    "0",
    "-1",
    "x",
    "1e9",
    "1.5",
    "nan",
    "1,,2",
    "0/2",
    "3/2",
    "1/0",
    "a/b",
    ",",
    "/",
    "..",
    "{}",
]
WORDS += ["\ud800", "é 猫", "a" * 300, "--help-me", "local-dir:/nowhere", "RN50x99"]
FLAGS = """dataset shots seed classes transfer model epochs batch_size lr precision device cache_gb
workers shard load names n_ctx position init views""".split()


def test_200_broken_splits_trees_and_flags_end_in_one_line_and_write_nowhere_else(
    tmp_path, coop, capsys, monkeypatch
):
    rng, results, faults = random.Random(0), collections.Counter(), []
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    miniature("dtd", tmp_path / "data")
    split = tmp_path / "data/dtd" / miniatures.SPLIT["dtd"][1]
    whole = split.read_text()
    coop("--dataset", "dtd")  # what is imported late has been imported

    def count(kind, *flags):
        capsys.readouterr()
        try:
            with confined(tmp_path / "data", tmp_path / "runs"):
                coop(*flags)
            results[kind, "run"] += 1
        except SystemExit as end:
            assert one_line(capsys, end)
            results[kind, "refused"] += 1
        except Exception as problem:
            faults.append(f"{kind} {flags} {split.read_bytes()[:99]}: {problem!r}")

    for case in range(90):
        split.write_bytes(broken_split(rng, whole))
        count("split", "--dataset", "dtd", "--seed", case)
    split.write_text(whole)
    for case in range(50):
        count("tree", "--dataset", broken_tree(rng, tmp_path / f"tree{case}"))
    for case in range(90):
        some = [
            (f"--{flag}", rng.choice(WORDS)) for flag in rng.sample(FLAGS, rng.choice((1, 1, 2)))
        ]
        count("flags", "--dataset", "dtd", *sum(some, ()), "--seed", 1000 + case)
    assert not faults, "\n".join(faults)
    assert results.total() == 230
    assert all(results[kind, "refused"] > 25 for kind in ("split", "tree", "flags"))
    assert os.listdir(tmp_path / "elsewhere") == []
