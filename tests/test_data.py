"""Data sets: miniature benchmarks, CoOp's few-shot split, folders of your own images."""

import collections
import json
import math
import random
from pathlib import Path

import pytest

import common
import coop
from tests import fake_benchmarks
from tests.fake_benchmarks import put, tree, write_benchmark

ALL = [*fake_benchmarks.WORDNET, *fake_benchmarks.SPLIT, "fgvc_aircraft"]
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
WORDNET_LABELS = {
    "imagenet": {"n01440764": (0, "tench"), "n02119022": (277, "red fox")},
    "imagenetv2": {"2": (2, "great white shark"), "999": (999, "toilet paper")},
    "imagenet_sketch": {"n01443537": (1, "goldfish"), "n15075141": (999, "toilet paper")},
    "imagenet_a": {"n01498041": (0, "stingray"), "n12144580": (198, "corn")},
    "imagenet_r": {"n01443537": (0, "goldfish"), "n09472597": (196, "volcano")},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return fake_benchmarks.tiny_clip(tmp_path_factory.mktemp("model") / "clip")


# ------------------------------------------------------------------------- the benchmarks


@pytest.mark.parametrize("name", ALL)
def test_each_benchmark_is_read_from_its_own_layout(name, tmp_path):
    items = write_benchmark(name, tmp_path)
    data = common.load_dataset(name, tmp_path)
    for part in "train", "test":
        assert [tuple(item) for item in getattr(data, part)] == items[part]
    labels = {label: c for _, label, c in items["test"]}
    assert data.classnames == [labels[i] for i in range(len(labels))]
    assert (data.name, data.template) == (name, TEMPLATES[name])
    labels = {Path(path).parent.name: label for path, label, _ in data.test}
    for folder, (label, c) in WORDNET_LABELS.get(name, {}).items():
        assert (labels[folder], data.classnames[label]) == (label, c)


@pytest.mark.parametrize("name", [name for name in ALL if name not in fake_benchmarks.TEST_ONLY])
def test_each_benchmark_trains_and_evaluates(name, tmp_path, tiny, fit):
    transfer = fake_benchmarks.TEST_ONLY if name == "imagenet" else []
    tests = {each: write_benchmark(each, tmp_path)["test"] for each in [name, *transfer]}
    options = {"dataset": name, "transfer": ", ".join(transfer), "data": str(tmp_path)}
    accuracy = fit(coop, model=tiny, n_ctx=2, batch_size=1000, **options)
    rows = {row["evaluated_on"]: row for row in fit.rows()}
    assert {each: row["n_test"] for each, row in rows.items()} == {e: len(tests[e]) for e in tests}
    assert rows[name]["accuracy"] == accuracy


def test_the_order_in_which_a_disk_lists_its_files_does_not_matter(tmp_path, monkeypatch):
    write_benchmark("imagenet_r", tmp_path)
    own = tree(tmp_path / "own", "a,b/1.png,2.png,3.png,4.png")
    before = [common.load_dataset(name, tmp_path) for name in ("imagenet_r", str(own))]
    for method in "glob", "iterdir":
        usual = getattr(Path, method)
        monkeypatch.setattr(Path, method, lambda *a, f=usual: sorted(f(*a), reverse=True))
    assert [common.load_dataset(name, tmp_path) for name in ("imagenet_r", str(own))] == before


def test_images_that_a_run_does_not_use_need_not_be_there(tmp_path):
    write_benchmark("sun397", tmp_path)
    cfg = common.Config(dataset="sun397", shots=1, data=str(tmp_path))
    used = {path for path, *_ in common.few_shot(cfg).train}
    for path, *_ in common.load_dataset("sun397", tmp_path).train:
        if path not in used:
            Path(path).unlink()
    assert {path for path, *_ in common.few_shot(cfg).train} == used


# --------------------------------------------------------------------- the few-shot split


def plain_few_shot(split, shots, seed, half):
    """DATASETS 3.1 and 3.2 in plain Python: {part: [(path, label), ...]} and the class names."""
    numbers, chosen, names, classes = random.Random(seed), {"test": split["test"]}, {}, {}
    for item in split["train"]:
        classes.setdefault(item[1], []).append(item)  # in order of first appearance
        names[item[1]] = item[2]
    chosen["train"] = []
    for items in classes.values():
        chosen["train"] += numbers.sample(items, shots) if len(items) >= shots else items
    labels = sorted(names)
    m = math.ceil(len(labels) / 2)
    labels = {"all": labels, "base": labels[:m], "new": labels[m:]}[half]
    relabelled = {
        part: [(path, labels.index(label)) for path, label, _ in items if label in labels]
        for part, items in chosen.items()
    }
    return relabelled, [names[label] for label in labels]


def mixed_split():
    """Five classes in mixed order, 2 to 30 training images each."""
    numbers, split = random.Random(7), {}
    for part, sizes in ("train", (30, 2, 16, 9, 20)), ("test", [2] * 5):
        items = [
            [f"{part}/{c}/{i}.jpg", c, f"c {c}"] for c, n in enumerate(sizes) for i in range(n)
        ]
        split[part] = numbers.sample(items, len(items))
    return split


@pytest.mark.parametrize("name", ["mixed", *sorted(fake_benchmarks.SPLIT)])
def test_the_few_shot_split_is_that_of_coop(name, tmp_path):
    key = "dtd" if name == "mixed" else name
    folder, file, _ = fake_benchmarks.SPLIT[key]
    if name != "mixed" and not (OFFICIAL / file).exists():
        pytest.skip(f"no official {file} in {OFFICIAL}")
    text = json.dumps(mixed_split()) if name == "mixed" else (OFFICIAL / file).read_text("utf-8")
    images, split = tmp_path / folder, json.loads(text)
    images.mkdir(parents=True)
    (tmp_path / folder.split("/")[0] / file).write_text(text, "utf-8")
    data = common.load_dataset(key, tmp_path)
    for shots in 1, 2, 4, 8, 16:
        for seed in 1, 2, 3:
            some = common.sample_few_shot(data, shots, seed)
            for half in "all", "base", "new":
                ours = some if half == "all" else common.subset_classes(some, half)
                wanted, names = plain_few_shot(split, shots, seed, half)
                for part, items in wanted.items():
                    found = [(path, label) for path, label, _ in getattr(ours, part)]
                    assert found == [(f"{images}/{path}", label) for path, label in items]
                assert ours.classnames == names


TOY = {  # METHODS 1.5: 4 shots of 30, 3 and 47 images
    1: "4 18 27 25 30 31 32 37 49 40 64",
    2: "27 1 2 11 30 31 32 43 75 52 49",
    3: "7 18 17 4 30 31 32 56 71 63 73",
}


@pytest.mark.parametrize("seed", TOY)
def test_the_few_shot_split_of_the_toy_lists_is_that_written_down(seed):
    groups = range(30), range(30, 33), range(33, 80)
    train = [(i, label, "c") for label, group in enumerate(groups) for i in group]
    some = common.sample_few_shot(common.Dataset("toy", train, [], ["c"] * 3), 4, seed)
    assert [i for i, *_ in some.train] == [*map(int, TOY[seed].split())]


# --------------------------------------------------------------------- folders of your own


def test_files_that_are_not_images_are_ignored(tmp_path):
    for part in "train", "val", "test":
        tree(tmp_path / part, "cat/1.jpg", "a_dog/2.JPG", "a_dog/1.bmp", "cat/.1.jpg", ".git/1.jpg")
        tree(tmp_path / part, "cat/notes.txt", "list.txt", "9.jpg")
    data = common.load_dataset(str(tmp_path), "unused")
    assert data.classnames == ["a_dog", "cat"]
    names = [("a_dog/1.bmp", 0), ("a_dog/2.JPG", 0), ("cat/1.jpg", 1)]
    for part, items in ("train", data.train), ("test", data.test):
        found = [(path, label) for path, label, _ in items]
        assert found == [(f"{tmp_path / part}/{name}", label) for name, label in names]


@pytest.mark.parametrize(
    "n, test", [(2, "1"), (3, "1"), (4, "3"), (5, "3"), (7, "3 6"), (20, "6 15 8 1 13 12")]
)
def test_a_folder_without_parts_is_split_70_to_30_once_and_for_all(n, test, tmp_path):
    own = tree(tmp_path / "own", f"x,y/{','.join(f'{i:02d}.png' for i in range(n))}")
    data = common.load_dataset(str(own), "unused")
    for c in "xy":
        found = [[int(Path(p).stem) for p, _, d in part if d == c] for part in data[1:3]]
        assert found[1] == [*map(int, test.split())]
        assert sorted(found[0] + found[1]) == [*range(n)]


@pytest.mark.parametrize("classes", ["bus,train", "test,train,val"])
def test_a_folder_called_train_that_holds_images_is_a_class(classes, tmp_path):
    own = tree(tmp_path / "own", f"{classes}/1.jpg,2.jpg")
    assert common.load_dataset(str(own)).classnames == classes.split(",")


@pytest.mark.parametrize("name", ["colours", "dtd"])
def test_a_folder_with_a_data_sets_name_is_meant_by_a_dot_and_a_slash(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(Path(name), "a,b/1.jpg,2.jpg")
    assert common.load_dataset(f"./{name}").classnames == ["a", "b"]


NAMES = ["under_score", "Ünïcødé 猫", 'it\'s "quoted"', "{} {0} {x}", "🦊", "100% <b> $HOME; ls"]


def test_class_names_may_hold_anything(tmp_path, tiny, fit):
    own = tmp_path / "möine {} '\""
    for c in NAMES:
        for i in range(4):
            put(own / c / f"{i}.png")
    fit(coop, dataset=str(own), model=tiny)
    (row,) = fit.rows()
    assert row["n_test"] == len(NAMES)
