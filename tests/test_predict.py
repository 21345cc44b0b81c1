"""What can be asked of a finished run: python common.py predict and interpret."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.tools import ask

METHODS = [coop, dpt, upt, enprompt, softcpt]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """trained(method, **options): the folder of a run of the method on the small world."""
    out = str(tmp_path_factory.mktemp("runs"))

    def train(method, **options):
        usual = {"shots": 1, "epochs": 1, "device": "cpu", "data": str(world), "workers": 1}
        cfg = method.Config(**usual | {"out": out} | options)
        run = common.run_folder(cfg)
        if not (run / "results.json").exists():
            method.main(cfg)
        return str(run)

    return train


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A --data folder without a data set: only the tiny CLIP is written there."""
    return tmp_path_factory.mktemp("no data")


@pytest.fixture
def photos(world, tmp_path):
    """Three test pictures of the world below tmp_path / "new": two in class folders, one not."""
    items = common.load_dataset("shapes", world).test[:3]
    places = [tmp_path / "new" / name for name in ("a/1.png", "b/2.png", "3.png")]
    for (file, *_), place in zip(items, places, strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return [str(place) for place in places]


@pytest.fixture
def asked(elsewhere, capsys):
    """asked(question, ...): (exit code, lines of stdout, lines of stderr)."""

    def ask_it(question, *argv):
        capsys.readouterr()
        code = 0
        try:
            common.script(lambda: question([*argv, "--data", str(elsewhere), "--device", "cpu"]))
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return ask_it


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_predict_gives_the_softmax_of_the_trained_classifier(
    method, trained, photos, world, asked, monkeypatch
):
    made = {}
    evaluate = common.evaluate

    def spied(cfg, clip, data, classifier, *more):
        made["clip"], made["classifier"] = clip, classifier
        return evaluate(cfg, clip, data, classifier, *more)

    options = {"dataset": "textures,shapes"} if method is softcpt else {}
    run = trained(method, **options)
    monkeypatch.setattr(common, "evaluate", spied)
    method.main(method.Config(**common.read_prompt(run)[1]["config"]))
    data, clip = common.load_dataset("shapes", world), made["clip"]
    with torch.no_grad():
        answer = made["classifier"](data)
        x = common.views(clip, photos)
        f = common.unit_features(clip, x)
        logits = answer(x, f) if callable(answer) else clip.scale * f @ answer.T
    task = ["--task", "shapes"] if method is softcpt else []
    code, lines, _ = asked(ask.predict, run, *photos, "--json", *task)
    answers = [json.loads(line) for line in lines]
    assert code == 0
    assert [answer["image"] for answer in answers] == photos
    for answer, p in zip(answers, F.softmax(logits, dim=-1), strict=True):
        top = p.topk(5)
        assert answer["classes"] == [data.classnames[k] for k in top.indices]
        assert answer["probabilities"] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_names_given_on_the_spot_are_chosen_from(trained, photos, asked, elsewhere):
    run = trained(coop, init="a photo", lr=0.0)  # at its start: zero-shot CLIP with "a photo"
    code, lines, _ = asked(ask.predict, run, photos[0], "--names", "red star, blue_ring", "--json")
    clip = common.load_clip(f"local-dir:{elsewhere}/shapes/clip", device="cpu")
    texts = clip.encode_text(clip.tokenize(["a photo red star.", "a photo blue ring."]))
    f = common.unit_features(clip, common.views(clip, photos[:1]))
    p = F.softmax(clip.scale * f @ F.normalize(texts, dim=-1).T, dim=-1)[0].tolist()
    answer = json.loads(lines[0])
    found = dict(zip(answer["classes"], answer["probabilities"], strict=True))
    assert code == 0
    assert found == pytest.approx({"red star": p[0], "blue_ring": p[1]}, abs=1e-4)
    assert "two class names" in asked(ask.predict, run, photos[0], "--names", "cat")[2][0]
    assert "'cat' twice" in asked(ask.predict, run, photos[0], "--names", "cat,dog,cat")[2][0]


def test_folders_are_searched_and_a_broken_picture_stops_no_other(trained, photos, asked, tmp_path):
    run = trained(coop)
    (tmp_path / "new/a/broken.jpg").write_bytes(b"no picture")
    (tmp_path / "new/.hidden.png").write_bytes(b"no picture")
    (tmp_path / "new/folder.png").mkdir()
    code, lines, errors = asked(ask.predict, run, str(tmp_path / "new"))
    assert sorted(line.split(".png: ")[0] + ".png" for line in lines) == sorted(photos)
    assert code == 2
    assert "broken.jpg" in errors[0]
    assert "1 of 4 pictures" in errors[-1]
    for place, reason in ("absent", "nothing is there"), ("new/folder.png", "no picture in it"):
        code, _, errors = asked(ask.predict, run, str(tmp_path / place))
        assert code == 2
        assert place in errors[-1].replace("\\", "/")
        assert reason in errors[-1]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_picture_of_any_name_is_answered_in_one_line(trained, photos, asked, tmp_path):
    place = tmp_path / "a\nb.png"
    shutil.copy(photos[0], place)
    (tmp_path / "c\nd.png").write_bytes(b"no picture")
    code, lines, errors = asked(ask.predict, trained(coop), str(place), str(tmp_path / "c\nd.png"))
    assert (code, len(lines), len(errors)) == (2, 1, 2)
    assert "a\\nb.png: " in lines[0] and "c\\nd.png: " in errors[0]


def test_a_task_that_was_not_learned_is_one_line(trained, photos, asked):
    run = trained(softcpt, dataset="shapes,textures")
    code, _, errors = asked(ask.predict, run, photos[0], "--task", "birds")
    assert code == 2
    assert len(errors) == 1
    assert "'birds'" in errors[0] and "shapes, textures" in errors[0]


def rewritten(run, **changes):
    """Changes what a run's prompt says of itself."""
    tensors, about = common.read_prompt(run)
    metadata = {"about": json.dumps(about | changes)}
    save_file(tensors, Path(run, "prompt.safetensors"), metadata)


def test_a_run_that_cannot_be_loaded_is_one_line(trained, photos, asked, tmp_path):
    run = shutil.copytree(trained(coop), tmp_path / "run")
    about = common.read_prompt(run)[1]
    wrong = {
        "by 'os'": {"method": "os"},  # no module is imported because a file names it
        "this version": {"config": about["config"] | {"flavour": 1}},
        "another CLIP": {"CLIP": "0"},
        "does not fit": {"config": about["config"] | {"n_ctx": 3}},
        "--n_ctx cannot be": {"config": about["config"] | {"n_ctx": "3"}},
    }
    for reason, changes in wrong.items():
        rewritten(run, **about | changes)
        code, _, errors = asked(ask.predict, str(run), photos[0])
        assert code == 2
        assert reason in errors[-1]
    code, _, errors = asked(ask.interpret, str(tmp_path))
    assert code == 2
    assert "prompt.safetensors" in errors[-1]


def test_enprompt_keeps_the_strengthening_feature_of_its_training_classes(
    trained, photos, asked, monkeypatch
):
    run = trained(enprompt)
    seen = []
    classifier = enprompt.classifier

    def spied(cfg, clip, prompt, data, target):
        seen.append((len(data.classnames), target.classnames))
        return classifier(cfg, clip, prompt, data, target)

    monkeypatch.setattr(enprompt, "classifier", spied)
    assert asked(ask.predict, run, photos[0], "--names", "star,ring")[0] == 0
    assert seen == [(40, ["star", "ring"])]


def test_interpret_finds_the_words_that_a_context_is_made_of(trained, asked):
    run = trained(coop, init="a photo of", lr=0.0)
    code, lines, _ = asked(ask.interpret, run)
    for line, word in zip(lines, ["a", "photo", "of"], strict=False):
        assert f": {word} (0.000)" in line
    assert code == 0
    assert len(lines) == 4
    assert "warn" in lines[-1]


def test_interpret_reads_upt_behind_its_transform_without_dropout(trained, asked):
    run = trained(upt, n_ctx=2)
    _, lines, _ = asked(ask.interpret, run)
    tensors, about = common.read_prompt(run)
    prompt = upt.UnifiedPrompt(upt.Config(**about["config"]), 128, 128)
    prompt.load_state_dict(tensors)
    V, P = prompt.eval()()
    assert f"vector 2, norm {V[0, 1].norm():.3f}" in lines[1]
    norms = [f"{norm:.3f}" for norm in P.norm(dim=-1).tolist()]
    assert lines[2].split()[-2:] == norms
    assert len(lines) == 4


def test_interpret_names_the_tensors_of_each_method(trained, asked):
    beginnings = {
        dpt: ["ctx, vector 1", "norms of visual prompts, layer 1"],
        enprompt: ["norms of visual prompts, layer 4"],
        softcpt: ["task_ctx, vector 4", "class_ctx, vector 1"],
    }
    for method, expected in beginnings.items():
        tasks = {"dataset": "shapes,textures", "class_context": "shared"}
        _, lines, _ = asked(ask.interpret, trained(method, **(tasks if method is softcpt else {})))
        for beginning in expected:
            assert any(line.startswith(beginning) for line in lines)


def test_attention_is_drawn_red_over_the_picture(trained, photos, asked, tmp_path):
    file = tmp_path / "map.png"
    run = trained(dpt)
    code, lines, errors = asked(ask.predict, run, photos[2], "--attention", str(file))
    assert code == 0
    assert str(file) in errors[-1]
    sheet = np.asarray(Image.open(file)).astype(float)[16:]  # below the class names
    assert sheet.shape == (224, 4 * 224, 3)
    photo, first = sheet[:, :224], sheet[:, 224:448]
    change = (first - photo).mean((0, 1))
    assert change[0] - change[1:].mean() > 5
    code, _, errors = asked(ask.predict, trained(coop), photos[2], "--attention", str(file))
    assert code == 2
    assert "only a run of dpt.py" in errors[-1]


def test_attention_shows_the_patch_that_the_prompt_looks_at(trained, photos, asked, monkeypatch):
    """A in the corner, where all the attention goes to the last patch, is red; the rest is not."""
    encode, sheets = dpt.encode, []

    def fixed(clip, prompt, images, T, top):
        v, layer_logits, maps = encode(clip, prompt, images, T, top)
        A = torch.zeros_like(maps[-1])
        A[..., 16] = 1.0  # 0 is the class token; 1 to 16 the patches
        return v, layer_logits, [A]

    monkeypatch.setattr(dpt, "encode", fixed)
    monkeypatch.setattr(ask.attention, "save", lambda rows, file: sheets.extend(rows))
    run = trained(dpt)
    assert asked(ask.predict, run, photos[0], "--attention", "map.png")[0] == 0
    (_, photo), (_, first), *_ = sheets[0]
    change = np.abs(np.asarray(first).astype(float) - np.asarray(photo)).sum(2)
    assert change[180:, 180:].mean() > 20 * change[:140, :140].mean()
