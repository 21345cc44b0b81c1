"""The synthetic data sets: their pixels, their folders, the tiny CLIP and UPT's study."""

import errno
import functools
import hashlib
import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

import common
import upt
from tests.tools import shapes, study

WEIGHTS = shapes.WEIGHTS
DIGESTS = {  # of the training images of the first class
    "shapes": "462b0cc47eb22fa2035de5a48849fb1a5273c21b5fdb688405fe4c5193852cee",
    "textures": "34a61b0060b0715f0a3c9c52438f29975b30b0c19d70239379e30f5648a77ca7",
    "shapes_varied": "d6c6765e12bbb063ac9b8daba1c37508808e0587b679c58b1fe24c8b9b166e12",
}
VARIANCES = {  # within classes of images, between classes of texts: one differs in each pair
    "shapes_steady": (0.051, 0.243),
    "shapes_varied": (0.106, 0.243),
    "rings_close": (0.037, 0.215),
    "rings_far": (0.037, 0.338),
}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"train": 2, "val": 1, "test": 1})


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Other kernels differ by one level in one of 60,000 values, which is enough for another digest
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="the digests are those of PyTorch's AVX kernels",
)
@pytest.mark.parametrize("name", DIGESTS)
def test_the_images_are_those_of_all_results(name, monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"train": 20})
    _, _, pixels = next(shapes.images(name))
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == DIGESTS[name]


def test_a_folder_holds_the_rendered_images(tmp_path):
    folder = shapes.write(tmp_path, "textures")
    assert folder == tmp_path / "shapes" / "textures"
    assert len(contents(folder)) == 4 * (2 + 1 + 1) + 1
    for part, name, pixels in shapes.images("textures"):
        for i, image in enumerate(pixels):
            written = Image.open(folder / part / name / f"{i:03d}.png")
            assert np.array_equal(np.asarray(written), image)


@pytest.mark.parametrize("change", ["nothing", "code", "weights", "a file", "the stamp"])
def test_a_folder_of_other_code_or_that_lacks_files_is_replaced(
    change, tmp_path, monkeypatch, capsys
):
    name = "clip" if change == "weights" else "textures"
    folder = shapes.write(tmp_path, name)
    before = contents(folder)
    if change == "code":
        monkeypatch.setattr(shapes, "SOURCE", b"other")
    elif change == "weights":
        monkeypatch.setattr(shapes, "WEIGHTS", tmp_path / "weights")
        shapes.WEIGHTS.write_bytes(save(load_file(WEIGHTS), {"other": "header"}))
    elif change == "a file":
        next(folder.rglob("*.png")).unlink()
    elif change == "the stamp":
        (folder / shapes.STAMP).unlink()
    capsys.readouterr()
    shapes.write(tmp_path, name)
    assert (f" in {folder} ...\n" in capsys.readouterr().err) == (change != "nothing")
    after = contents(folder)
    assert after.keys() == before.keys()
    assert (after == before) == (change not in ("code", "weights"))  # which the stamp tells


def test_writers_at_the_same_time_all_get_a_whole_folder(tmp_path):
    whole = contents(shapes.write(tmp_path, "textures"))

    def written(root):
        return contents(shapes.write(root, "textures"))

    for i in range(8):
        folder = tmp_path / str(i) / "shapes"
        (folder / "textures" / "of other code").mkdir(parents=True)
        with ThreadPoolExecutor(3) as pool:
            assert [*pool.map(written, 3 * [folder.parent])] == 3 * [whole]
        assert [path.name for path in folder.iterdir()] == ["textures"]


class Killed(BaseException):
    pass


MOMENTS = [(Image.Image, "save", 3), (Path, "rename", 1), (Path, "rename", 2)]


@pytest.mark.parametrize("owner, method, call", MOMENTS)
def test_a_kill_leaves_the_old_folder_or_none(owner, method, call, tmp_path):
    folder = shapes.write(tmp_path, "textures")
    whole = contents(folder)
    (folder / shapes.STAMP).write_text("other code")
    old, usual, calls = contents(folder), getattr(owner, method), itertools.count(1)

    def killed(*arguments):
        if next(calls) == call:
            raise Killed
        return usual(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, method, killed)
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # no time to clean up
        shapes.write(tmp_path, "textures")
    assert contents(folder) in ({}, old)
    assert contents(shapes.write(tmp_path, "textures")) == whole


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    for name in "textures", "clip":
        with pytest.raises(OSError, match="No space left"):
            shapes.write(tmp_path, name)
    assert list((tmp_path / "shapes").iterdir()) == []


def test_the_tiny_clip_classifies_new_images(clip):
    assert shapes.accuracy(clip, torch.arange(49408), count=500) > 0.99


def test_a_pretrained_clip_can_be_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "WEIGHTS", tmp_path / "tiny.safetensors")
    monkeypatch.setattr(shapes, "accuracy", functools.partial(shapes.accuracy, count=20))
    monkeypatch.setattr(shapes, "pretrain", functools.partial(shapes.pretrain, batch=4))
    shapes.main(["--steps", "3"])
    assert capsys.readouterr().out.startswith("3 steps: zero-shot ")
    clip = common.load_clip(common.Config(data=tmp_path, device="cpu"))
    assert clip.scale.item() == pytest.approx(100, rel=1e-2)


# ----------------------------------------------------------------------------------- UPT's study


@pytest.mark.parametrize("name", study.SETS)
def test_the_variances_are_those_of_the_results(name, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"train": 1, "test": 20})
    images, texts = study.variances(clip, common.load_dataset(name, tmp_path))
    assert images == pytest.approx(VARIANCES[name][0], rel=0.1)
    assert texts == pytest.approx(VARIANCES[name][1], rel=0.01)


def test_the_class_names_hold_only_words_of_the_pretraining(clip):
    known = set(shapes.caption_tokens().tolist())
    for task in shapes.TASKS.values():
        texts = [task.template.format(c.replace("_", " ")) for c in task.classes]
        assert set(clip.tokenize(texts).flatten().tolist()) <= known


def test_the_study_shows_the_mean_gain_of_all_seeds(fit, tmp_path, capsys):
    for seed in 1, 2:
        fit(upt, dataset="textures", side="text", seed=seed, transfer="colours")
    own = [row for row in fit.rows() if row["evaluated_on"] == "textures"]
    gains = [row["accuracy"] - row["zero_shot"] for row in own]
    capsys.readouterr()
    study.main(["--out", str(tmp_path), "--data", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:6]] == study.SETS
    options = "--epochs 1 --shots 1 --side text"
    gain = f"{np.mean(gains):.2f} ± {np.std(gains):.2f}"
    assert lines[9:] == [f"| textures | {options} | 2 | {gain} |"]
