"""What can be asked of a finished run: python -m tests.tools.predict."""

import json
import shutil
from pathlib import Path

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
from tests.conftest import METHODS
from tests.tools import predict


@pytest.fixture(scope="module")
def trained(rendered, tmp_path_factory):
    """trained(method, **options): the folder of a run of the method on the small rendered sets."""
    out = str(tmp_path_factory.mktemp("runs"))

    def train(method, **options):
        usual = {"shots": 1, "epochs": 1, "device": "cpu", "data": str(rendered), "workers": 1}
        cfg = method.Config(**usual | {"dataset": "textures", "out": out} | options)
        run = common.run_folder(cfg)
        if not (run / "checkpoint.pt").exists():
            method.main(cfg)
        return str(run)

    return train


@pytest.fixture
def images(rendered, tmp_path):
    """Three test images, copied below tmp_path / "new": two in class folders, one not."""
    items = common.load_dataset("textures", rendered).test[:3]
    places = [tmp_path / "new" / name for name in ("3.png", "a/1.png", "b/2.png")]
    for (file, *_), place in zip(items, places, strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return [str(place) for place in places]


@pytest.fixture
def asked(capsys):
    """asked(...): (exit code, lines of stdout, lines of stderr) of the tool."""

    def ask(*argv):
        capsys.readouterr()
        code = 0
        try:
            common.script(lambda: predict.main([*map(str, argv), "--device", "cpu"]))
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return ask


def evaluated(run):
    """The one row of results in a run's folder."""
    (path,) = Path(run, "results").glob("textures*.json")
    return json.loads(path.read_text("utf-8"))


# ------------------------------------------------------------------------------- accuracies


@pytest.mark.parametrize("name", METHODS)
def test_accuracy_is_the_recorded_one_without_the_training_images(
    name, trained, rendered, asked, tmp_path
):
    """Per class and per image, by data set name and by folder, given only the CLIP and the test
    images, both moved."""
    method = METHODS[name]
    run = trained(method, **({"dataset": "textures,colours"} if method is softcpt else {}))
    moved = shutil.copytree(rendered / "shapes/textures/test", tmp_path / "moved/test")
    clip = shutil.copytree(rendered / "shapes/clip", tmp_path / "clip")
    where = "--model", f"local-dir:{clip}", "--data", tmp_path / "nothing"
    row, names = evaluated(run), sorted(path.name for path in moved.iterdir())
    code, lines, _ = asked(run, moved, *where)
    loaded = predict.load_run(run, device="cpu").prompt.state_dict()
    saved = common.read_checkpoint(Path(run, "checkpoint.pt"))["prompt"]
    assert all(torch.equal(loaded[key], saved[key]) for key in saved | loaded)
    assert code == 0
    assert lines[0] == f"accuracy {row['accuracy']:.2f} on 8 images"
    mean = f"{row['mean_class_accuracy']:.2f} (4 classes to choose from)"
    assert lines[1] == f"mean over classes {mean}"
    assert [line.split()[-1] for line in lines[2:6]] == names
    by_name = asked(run, "--dataset", "textures", "--data", rendered)
    assert by_name[:2] == (code, lines)
    code, lines, errors = asked(run, moved, *where, "--json")
    answers = [json.loads(line) for line in lines]
    right = [answer["true"] == answer["predicted"] for answer in answers]
    assert code == 0 and "accuracy" in errors[0]
    assert 100 * np.mean(right) == row["accuracy"]
    for answer in answers:
        assert answer["true"] == Path(answer["image"]).parent.name
        assert answer["predicted"] == answer["classes"][0]
        assert sum(answer["probabilities"]) == pytest.approx(1)


def test_a_run_knows_the_template_of_its_data_set(trained, rendered):
    (data,) = predict.load_run(trained(dpt)).sets
    assert data.template == common.load_dataset("textures", rendered).template
    assert data.template != common.Dataset._field_defaults["template"]


def test_confused_pairs_are_counted(capsys):
    pairs = [(0, 0), (0, 1), (0, 1), (1, 1), (2, 0)]
    predict.print_accuracy(pairs, ["cat", "dog", "bird", "fish"], None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "accuracy 40.00 on 5 images",
        "mean over classes 44.44 (4 classes to choose from)",
    ]
    assert lines[2:5] == ["   33.33 on 3 of cat", "  100.00 on 1 of dog", "    0.00 on 1 of bird"]
    assert lines[5:] == ["  2 of 3 cat taken for dog", "  1 of 1 bird taken for cat"]


def test_a_folder_with_other_classes_is_classified_among_these(trained, images, asked):
    Path(images[0]).unlink()
    code, lines, _ = asked(trained(coop), Path(images[0]).parent, "--json")
    answers = [json.loads(line) for line in lines]
    assert code == 0
    assert [answer["true"] for answer in answers] == ["a", "b"]
    assert {*answers[0]["classes"]} == {"a", "b"}


def test_some_of_the_runs_classes_are_classified_among_all_of_them(
    trained, rendered, asked, tmp_path
):
    test = rendered / "shapes/textures/test"
    shutil.copytree(test / "plain", tmp_path / "own/test/plain")
    (tmp_path / "own/train").mkdir()
    code, lines, _ = asked(trained(coop, csc=True), tmp_path / "own")
    assert code == 0
    assert lines[1].endswith("(4 classes to choose from)")


@pytest.mark.parametrize(
    ("method", "options"), [(coop, {"csc": True}), (softcpt, {"class_context": "specific"})]
)
def test_contexts_of_classes_are_refused_for_other_classes(method, options, trained, images, asked):
    run = trained(method, **options)
    learned = "striped,plain,dotted,checkered"
    assert asked(run, images[0], "--names", learned)[0] == 0
    code, _, errors = asked(run, images[0], "--names", "cat,dog")
    assert code == 2
    assert errors == ["error: the contexts of this run belong to its own classes"]


# ------------------------------------------------------------------------- unlabelled images


def test_names_given_on_the_spot_are_chosen_from(trained, images, asked, rendered):
    run = trained(coop, init="a photo", lr=0.0)  # its initial value: zero-shot CLIP with "a photo"
    code, lines, _ = asked(run, images[0], "--names", "red star, blue_ring", "--json")
    clip = common.load_clip(common.Config(model=f"local-dir:{rendered}/shapes/clip", device="cpu"))
    texts = clip.encode_text(clip.tokenize(["a photo red star.", "a photo blue ring."]))
    image = common.preprocess(common.decode(images[0]), clip.image_size)
    f = common.unit_features(clip, common.normalize(clip, [image]))
    p = F.softmax(clip.scale * f @ F.normalize(texts, dim=-1).T, dim=-1)[0].tolist()
    answer = json.loads(lines[0])
    found = dict(zip(answer["classes"], answer["probabilities"], strict=True))
    assert code == 0
    assert found == pytest.approx({"red star": p[0], "blue_ring": p[1]}, abs=1e-4)
    for names in "cat", "cat,dog,cat":
        assert "two different class names" in asked(run, images[0], "--names", names)[2][0]


def test_folders_are_searched_and_a_broken_image_stops_no_other(trained, images, asked, tmp_path):
    run = trained(coop)
    (tmp_path / "new/a/broken.jpg").write_bytes(b"no image")
    (tmp_path / "new/.hidden.png").write_bytes(b"no image")
    (tmp_path / "new/folder.png").mkdir()
    code, lines, errors = asked(run, tmp_path / "new", "--top", "2")
    assert [line.split(": ")[0] for line in lines] == images
    assert all(line.count("%") == 2 for line in lines)
    assert code == 2
    assert "broken.jpg" in errors[0]
    assert errors[1:] == ["error: 1 of 4 images could not be read"]


def test_a_task_is_asked_by_its_name(trained, images, asked):
    run = trained(softcpt, dataset="textures,colours")
    code, lines, _ = asked(run, images[0], "--task", "colours", "--json")
    known = common.load_dataset(
        "colours", json.loads(Path(run, "results/colours.json").read_text())["config"]["data"]
    )
    assert code == 0
    assert {*json.loads(lines[0])["classes"]} <= {*known.classnames}
    code, _, errors = asked(run, images[0], "--task", "birds")
    assert code == 2
    assert errors == ["error: --task birds: this run was trained on textures, colours"]


def test_enprompt_keeps_the_strengthening_feature_of_its_training_classes(
    trained, images, asked, monkeypatch
):
    run, seen, classifier = trained(enprompt), [], enprompt.classifier

    def spied(cfg, clip, prompt, data, target):
        seen.append((len(data.classnames), target.classnames))
        return classifier(cfg, clip, prompt, data, target)

    monkeypatch.setattr(enprompt, "classifier", spied)
    assert asked(run, images[0], "--names", "star,ring")[0] == 0
    assert seen == [(4, ["star", "ring"])]


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": {"method": "os"}}, "was trained by os, not by"),
        ({"run": {"CLIP": "0"}}, "was trained with another CLIP"),
        ({"run": {"number of epochs": 2}}, "is not finished"),
        ({"config": {"flavour": 1}}, "another --flavour"),
        ({"trained": {"source": "0", "commit": "abc"}}, "by other code: coop.py at commit abc"),
    ],
)
def test_a_run_that_does_not_fit_is_told_in_one_line(
    change, reason, trained, images, asked, tmp_path
):
    run = shutil.copytree(trained(coop), tmp_path / "run")
    state = common.read_checkpoint(run / "checkpoint.pt")
    for part, values in change.items():
        state[part] |= values
    torch.save(state, run / "checkpoint.pt")
    code, _, errors = asked(run, images[0])
    assert code == (0 if "trained" in change else 2)
    assert len(errors) == 1
    assert reason in errors[0]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "one of IMAGES, --dataset NAME and --interpret"),
        (["--interpret", "--names", "a,b"], "are for IMAGES"),
        (["--dataset", "textures", "--task", "textures"], "are for IMAGES"),
        (
            ["x.png", "--attention", "a.png"],
            "--attention needs a run of dpt.py",
        ),
    ],
)
def test_questions_that_make_no_sense_are_refused(argv, reason, trained, asked, tmp_path):
    code, _, errors = asked(trained(coop), *argv)
    assert code == 2
    assert len(errors) == 1 and reason in errors[0]
    assert asked(tmp_path, "x.png")[2][-1].endswith("is not a run: it has no checkpoint.pt")


# ---------------------------------------------------------------------- interpret, attention


def test_interpret_finds_the_words_that_a_context_is_made_of(trained, asked):
    run = trained(coop, init="a photo of", lr=0.0)
    code, lines, _ = asked(run, "--interpret")
    for line, word in zip(lines, ["a", "photo", "of"], strict=False):
        assert f": {word}, " in line
    assert code == 0
    assert len(lines) == 4 and "warn" in lines[-1]


def test_interpret_reads_each_methods_contexts(trained, asked):
    beginnings = {
        dpt: "ctx 1, vector 1:",
        upt: "ctx 1, vector 4:",
        softcpt: "task_ctx 1, vector 4:",
    }
    for method, beginning in beginnings.items():
        lines = asked(trained(method), "--interpret")[1]
        assert any(line.startswith(beginning) for line in lines)
    run = predict.load_run(trained(upt), device="cpu")
    V, words = run.prompt.eval()()[0], run.clip.token_embedding.weight
    near = torch.cdist(V[0], words).argmin(1).tolist()
    lines = asked(trained(upt), "--interpret")[1]
    for word, line in zip(near, lines, strict=False):
        assert f": {run.clip.tokenize.decode([word]).strip()}, " in line


def test_attention_is_red_over_the_image_where_the_prompt_looks(
    trained, images, asked, monkeypatch, tmp_path
):
    """A class that frozen CLIP did not select has no prompt, and its cell says so."""
    encode = dpt.encode

    def fixed(clip, prompt, x, T, top):
        v, layer_logits, maps = encode(clip, prompt, x, T, top)
        A = torch.zeros_like(maps[-1])
        A[..., 16] = 1.0  # 0 is the class token; 1 to 16 the patches
        return v, layer_logits, [A]

    monkeypatch.setattr(dpt, "encode", fixed)
    rows, save = [], predict.attention.save
    monkeypatch.setattr(
        predict.attention, "save", lambda cells, file: (rows.extend(cells), save(cells, file))
    )
    monkeypatch.setattr(dpt, "selected", lambda cfg, z, T0: (z @ T0.T).topk(2).indices)
    file = tmp_path / "map.png"
    code, lines, errors = asked(trained(dpt), *images, "--attention", file, "--top", "3")
    assert code == 0 and errors[-1].startswith(f"{file}: red is where")
    assert np.asarray(Image.open(file)).shape == (3 * 240, 4 * 224, 3)
    for line, ((_, image), *cells) in zip(lines, rows, strict=True):
        for answer, (text, cell) in zip(line.split(": ")[1].split(", "), cells, strict=True):
            assert answer.startswith(text.split(":")[0])  # the classes predicted, in this order
            change = np.abs(np.asarray(cell).astype(float) - np.asarray(image)).sum(2)
            if text.endswith("no prompt"):
                assert not change.any()
            else:
                assert change[180:, 180:].mean() > 20 * change[:140, :140].mean()
    assert any("no prompt" in text for row in rows for text, _ in row)
