"""What can be asked of a finished run: --predict, --names, --json, --interpret, --attention."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.conftest import unit

METHODS = [coop, dpt, upt, enprompt, softcpt]


@pytest.fixture
def photos(world, tmp_path):
    """Three test pictures of the world below tmp_path / "new": two in class folders, one not."""
    items = common.load_dataset("shapes", world).test[:3]
    places = [tmp_path / "new" / name for name in ("a/1.png", "b/2.png", "3.png")]
    for (file, *_), place in zip(items, places, strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return [str(place) for place in places]


def folder(tmp_path, method):
    (found,) = (tmp_path / method.__name__).rglob("prompt.safetensors")
    return str(found.parent)


@pytest.mark.parametrize("method", METHODS)
def test_predict_gives_the_softmax_of_the_trained_predictor(
    method, fit, photos, world, clip, tmp_path, shell, monkeypatch
):
    made = []
    train = method.train
    monkeypatch.setattr(method, "train", lambda *args: made.append(train(*args)) or made[-1])
    dataset = {"dataset": "shapes,textures"} if method is softcpt else {}
    fit(method, **dataset)
    data = common.load_dataset("shapes", world)
    x = common.views(clip, [common.decode(photo) for photo in photos])
    with torch.no_grad():
        logits = made[0][1](data)(common.unit_features(clip, x), x)
    p = F.softmax(logits, dim=-1)
    code, out, _ = shell(
        f"{method.__name__}.py", "--load", folder(tmp_path, method), "--json", "--predict", *photos
    )
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [answer["image"] for answer in answers] == photos
    for answer, row in zip(answers, p, strict=True):
        top = row.topk(5)
        assert answer["classes"] == [data.classnames[k] for k in top.indices]
        assert answer["probabilities"] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_names_given_on_the_spot_are_chosen_from(fit, photos, clip, tmp_path, shell):
    fit(coop, n_ctx=2, init="a photo", lr=0.0)  # at its start: zero-shot CLIP with "a photo"
    flags = ["--load", folder(tmp_path, coop), "--predict", photos[0], "--names"]
    code, out, _ = shell("coop.py", *flags, "red star, blue_circle,ring", "--json")
    texts = ["a photo red star.", "a photo blue circle.", "a photo ring."]
    f = common.unit_features(clip, common.views(clip, [common.decode(photos[0])]))
    p = F.softmax(100 * f @ unit(clip.encode_text(clip.tokenize(texts))).T, dim=-1)[0].tolist()
    answer = json.loads(out)
    expected = dict(zip(["red star", "blue_circle", "ring"], p, strict=True))
    assert code == 0 and dict(
        zip(answer["classes"], answer["probabilities"], strict=True)
    ) == pytest.approx(expected, abs=1e-3)
    assert "two class names" in shell("coop.py", *flags, "cat")[2]
    assert "'cat' twice" in shell("coop.py", *flags, "cat,dog,cat")[2]


def test_folders_are_searched_and_a_broken_image_stops_no_other(fit, photos, tmp_path, shell):
    fit(coop)
    (tmp_path / "new/a/broken.jpg").write_bytes(b"no picture")
    (tmp_path / "new/.hidden.png").write_bytes(b"no picture")
    (tmp_path / "new/folder.png").mkdir()
    flags = ["--load", folder(tmp_path, coop), "--predict"]
    code, out, err = shell("coop.py", *flags, str(tmp_path / "new"))
    lines = [line for line in out.splitlines() if ".png: " in line]
    assert sorted(line.split(": ")[0] for line in lines) == sorted(photos)
    assert code == 2 and "broken.jpg" in err and "1 of 4 images" in err.splitlines()[-1]
    for place in "absent", str(tmp_path / "coop"), ",".join(photos):
        code, out, err = shell("coop.py", *flags, place)
        assert code == 2 and place in err and ("nothing is there" in err or "no image in" in err)


def test_questions_that_miss_their_half_are_one_line(fit, photos, tmp_path, shell):
    fit(coop)
    for flags in (["--names", "a,b"], ["--json"], ["--interpret", "--predict", photos[0]]):
        code, _, err = shell("coop.py", "--load", folder(tmp_path, coop), *flags)
        assert code == 2 and "go with --predict" in err and len(err.splitlines()) == 1
    same = ["--shots", "1", "--epochs", "1"]  # a finished run need not be named
    assert shell("coop.py", *same, "--predict", photos[0])[0] == 0
    fit(softcpt, dataset="shapes,textures")
    flags = ["--load", folder(tmp_path, softcpt), "--predict", photos[0], "--task", "birds"]
    code, _, err = shell("softcpt.py", *flags)
    assert code == 2 and "'birds'" in err and "shapes, textures" in err


def test_interpret_finds_the_words_that_a_context_is_made_of(fit, tmp_path, shell):
    fit(coop, n_ctx=3, init="a photo of", lr=0.0)
    code, out, _ = shell("coop.py", "--load", folder(tmp_path, coop), "--interpret")
    lines = out.splitlines()
    for line, word in zip(lines, ["a", "photo", "of"], strict=False):
        assert f": {word} (0.000)" in line
    assert code == 0 and len(lines) == 4 and "warn" in lines[-1]


def test_interpret_prints_the_norms_of_visual_rows(fit, tmp_path, shell):
    fit(upt)
    code, out, _ = shell("upt.py", "--load", folder(tmp_path, upt), "--interpret")
    assert code == 0 and "norms of the visual rows" in out


def test_attention_is_drawn_red_over_the_image(fit, photos, tmp_path, shell):
    fit(dpt)
    file = tmp_path / "map.png"
    flags = ["--load", folder(tmp_path, dpt), "--predict", photos[2], "--attention", str(file)]
    code, out, _ = shell("dpt.py", *flags)
    assert code == 0 and str(file) in out
    sheet = np.asarray(Image.open(file)).astype(float)[16:]  # below the class names
    assert sheet.shape == (224, 4 * 224, 3)
    photo, first = sheet[:, :224], sheet[:, 224:448]
    red = (first - photo)[..., 0].mean() - (first - photo)[..., 1:].mean()
    assert red > 5
