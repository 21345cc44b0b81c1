"""Data sets: the fifteen in miniature, CoOp's picks, the user's own folders, and broken input."""

import collections
import json
import math
import os
import random
from pathlib import Path

import open_clip
import pytest

import common
from tests import miniatures
from tests.miniatures import miniature, picture, records, refusal, run_coop, tree

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

        def __enter__(self):
            return iter(self)

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
    for name in "dtd", "imagenet", "fgvc_aircraft":
        assert "images" in line(name) and f"download {name}" in line(name)
    (tmp_path / "data/dtd/images").mkdir(parents=True)
    assert "split_zhou_DescribableTextures.json" in line("dtd")
    (tmp_path / "data/imagenet/images/train/n01440764").mkdir(parents=True)
    assert "imagenet" in line("imagenet")
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
