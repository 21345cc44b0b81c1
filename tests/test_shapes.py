"""The shapes world: the same pictures for ever, whole folders, and a study that moves one axis."""

import errno
import hashlib
import random
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.tools import shapes

SMALL = {"train": 2, "val": 1, "test": 1}


def first_pictures(name):
    """The training pictures of a task's first class."""
    _, _, pixels = next(shapes.pictures(name))
    return pixels


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Other kernels differ by one level in one of 60,000 values, which is enough for another digest
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="the digests are those of PyTorch's AVX kernels",
)
@pytest.mark.parametrize(
    "name, digest",
    [
        ("shapes", "462b0cc47eb22fa2035de5a48849fb1a5273c21b5fdb688405fe4c5193852cee"),
        ("textures", "34a61b0060b0715f0a3c9c52438f29975b30b0c19d70239379e30f5648a77ca7"),
        ("shapes_varied", "d6c6765e12bbb063ac9b8daba1c37508808e0587b679c58b1fe24c8b9b166e12"),
    ],
)
def test_the_pictures_are_those_of_all_published_figures(name, digest):
    assert hashlib.sha256(first_pictures(name).tobytes()).hexdigest() == digest


def test_a_folder_holds_the_pictures_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", SMALL)
    folder = shapes.write(tmp_path, "textures")
    assert folder == tmp_path / "shapes" / "textures"
    assert len(contents(folder)) == 4 * (2 + 1 + 1)
    for part, name, pixels in shapes.pictures("textures"):
        for i, picture in enumerate(pixels):
            written = Image.open(folder / part / name / f"{i:03d}.png")
            assert np.array_equal(np.asarray(written), picture)


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    folder = tmp_path / "shapes" / "textures"
    folder.mkdir(parents=True)
    assert shapes.write(tmp_path, "textures") == folder
    assert contents(folder) == {}


@pytest.mark.parametrize("name, writer", [("textures", Image.Image), ("clip", Path)])
def test_a_full_disk_leaves_nothing(name, writer, tmp_path, monkeypatch):
    method = "save" if writer is Image.Image else "write_bytes"

    def full(self, *arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, method, full)
    with pytest.raises(OSError, match="No space left"):
        shapes.write(tmp_path, name)
    assert list((tmp_path / "shapes").iterdir()) == []


def test_the_folder_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", SMALL)
    draw = shapes.pictures

    def watched(name):
        for drawn in draw(name):
            assert not (tmp_path / "shapes" / name).exists()
            yield drawn

    monkeypatch.setattr(shapes, "pictures", watched)
    assert shapes.write(tmp_path, "textures").is_dir()


def test_of_two_processes_the_first_one_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", SMALL)
    draw = shapes.pictures

    def overtaken(name):
        yield from draw(name)
        monkeypatch.setattr(shapes, "pictures", draw)
        first.update(contents(shapes.write(tmp_path, name)))

    first = {}
    monkeypatch.setattr(shapes, "pictures", overtaken)
    folder = shapes.write(tmp_path, "textures")
    assert contents(folder) == first != {}
    assert list((tmp_path / "shapes").iterdir()) == [folder]  # the second one's draft is gone


def test_names_suit_every_file_system_and_both_ring_worlds_number_them_alike():
    for task in shapes.TASKS.values():
        names = list(task.classes)
        assert all(name.replace("_", "").isalpha() for name in names)
    # Labels follow the sorted names: only so does a label mean the same picture in both worlds
    far = list(shapes.TASKS["rings_far"].classes)
    close = list(shapes.TASKS["rings_close"].classes)
    assert np.argsort(far).tolist() == np.argsort(close).tolist()


def test_a_caption_says_what_it_is_said_to_say():
    rng = random.Random(0)
    words = [shapes.SHAPES, shapes.TEXTURES, list(shapes.COLOURS), shapes.STYLES]
    seen = set()
    for fillers in [0, 5] * 200:
        attributes = [rng.randrange(len(kind)) for kind in words]
        text, says = shapes.caption(attributes, fillers, rng)
        seen.add(tuple(says))
        for kind, attribute, said in zip(words, attributes, says, strict=True):
            if said:
                assert kind[attribute] in text.replace(".", "").split()
    assert len(seen) > 8


def test_a_pretrained_clip_can_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "WEIGHTS", tmp_path / "tiny.safetensors")
    shapes.pretrain(steps=3, batch=4)
    assert capsys.readouterr().out.startswith("3 steps in")
    folder = shapes.write(tmp_path, "clip")
    clip = open_clip.create_model(f"local-dir:{folder}")
    assert clip.logit_scale.exp().item() == pytest.approx(100, rel=1e-2)


def test_the_command_line_sets_the_steps(monkeypatch):
    steps = []
    monkeypatch.setattr(shapes, "pretrain", steps.append)
    shapes.main([])
    shapes.main(["--steps", "3"])
    assert steps == [7000, 3]


# ----------------------------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    folder = shapes.write(tmp_path_factory.mktemp("data"), "clip")
    return open_clip.create_model(f"local-dir:{folder}").eval()


@torch.no_grad()
def variances(clip, name):
    """Variance of a task's text features, and mean variance of the pictures within its classes."""
    task = shapes.TASKS[name]
    texts = [task.template.format(c.replace("_", " ")) for c in task.classes]
    w = F.normalize(clip.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts)), dim=-1)
    within = []
    for _, _, pixels in shapes.pictures(name):
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        f = F.normalize(clip.encode_image(shapes.normalised(images)), dim=-1)
        within.append(squared_spread(f))
    return squared_spread(w), sum(within) / len(within)


def squared_spread(features):
    return ((features - features.mean(0)) ** 2).sum(1).mean().item()


@pytest.mark.parametrize(
    "more, less, moved",
    [("shapes_varied", "shapes_steady", "pictures"), ("rings_far", "rings_close", "texts")],
)
def test_each_pair_of_the_study_moves_one_axis(more, less, moved, tiny_clip, monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"test": 20})
    more_texts, more_pictures = variances(tiny_clip, more)
    less_texts, less_pictures = variances(tiny_clip, less)
    if moved == "pictures":
        assert more_pictures > 1.5 * less_pictures
        assert more_texts == less_texts
    else:
        assert more_texts > 1.5 * less_texts
        assert more_pictures == less_pictures


def test_the_names_of_the_study_hold_only_words_that_the_clip_has_seen():
    known = set(shapes.caption_tokens().tolist())
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    for name in ["shapes_steady", "rings_far", "rings_close"]:
        task = shapes.TASKS[name]
        texts = [task.template.format(c.replace("_", " ")) for c in task.classes]
        assert set(tokenize(texts).flatten().tolist()) <= known


def test_both_ring_worlds_show_the_same_pictures():
    assert np.array_equal(first_pictures("rings_far"), first_pictures("rings_close"))
