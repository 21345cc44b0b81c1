"""Accuracies, rows, the last line; zero-shot CLIP; the command line."""

import dataclasses
import re

import pytest
import torch

import common
import coop
from tests.conftest import METHODS, NAMES, toy, unit

ROW = """method config evaluated_on classes n_test accuracy zero_shot mean_class_accuracy
    mean_class_zero_shot n_train activation trained evaluated""".split()
TRAINED = """commit modified source precision device torch open_clip n_train seconds losses
    peak_gpu_mb""".split()

# ---------------------------------------------------------------------------- accuracies


@pytest.fixture
def evaluated(clip, fit, tmp_path):
    """evaluated(data, classifier, ...) gives (accuracy, rows)."""

    def evaluated(data, classifier, per_class=(), **options):
        cfg = coop.Config(out=str(tmp_path), device="cpu", **options)
        return common.evaluate(cfg, clip, data, classifier, per_class), fit.rows()

    return evaluated


def known(labels, answers):
    """A data set with these labels, and a classifier that gives these answers."""
    paths = [path for path, _, _ in toy(len(labels)).test]
    test = [(path, label, NAMES[label]) for path, label in zip(paths, labels, strict=True)]
    logits = torch.nn.functional.one_hot(torch.tensor(answers), 3).float()
    return toy()._replace(test=test), lambda target: lambda x, f: logits


def features(clip, data):
    """Unit features (B, D) of the test images, and their labels."""
    images = [common.decode(path) for path, _, _ in data.test]
    x = common.normalize(clip, [common.preprocess(image, clip.image_size) for image in images])
    return unit(clip.encode_image(x)), torch.tensor([label for _, label, _ in data.test])


def hand_weights(clip, data, templates):
    """Unit text features (K, D) of the mean over templates, by open_clip's own text tower."""
    total = 0
    for template in templates:
        texts = [template.format(name.replace("_", " ")) for name in data.classnames]
        total = total + unit(clip.encode_text(clip.tokenize(texts)))
    return unit(total)


def test_accuracies_over_images_and_over_classes_of_known_answers(evaluated):
    accuracy, (row,) = evaluated(*known([0, 0, 0, 1, 2], [0, 2, 0, 1, 0]))
    assert accuracy == row["accuracy"] == pytest.approx(60) and row["n_test"] == 5
    assert row["mean_class_accuracy"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)


def test_a_class_without_test_images_does_not_count_in_the_mean_over_classes(evaluated):
    _, (row,) = evaluated(*known([0, 0, 2], [0, 1, 2]))
    assert row["mean_class_accuracy"] == pytest.approx(75)


def test_zero_shot_clip_is_counted_in_the_same_two_ways(evaluated, clip):
    labels = [0, 0, 0, 1, 2]
    data, classifier = known(labels, labels)
    f, y = features(clip, data)
    right = ((f @ hand_weights(clip, data, [data.template]).T).argmax(1) == y).tolist()
    _, (row,) = evaluated(data, classifier)
    assert row["zero_shot"] == pytest.approx(100 * sum(right) / 5)
    mean = (sum(right[:3]) / 3 + right[3] + right[4]) / 3
    assert row["mean_class_zero_shot"] == pytest.approx(100 * mean)
    assert row["zero_shot"] != row["mean_class_zero_shot"]


def test_a_classifier_of_text_features_takes_the_nearest_in_batches_of_any_size(
    evaluated, clip, monkeypatch
):
    data, w = toy(7), unit(torch.randn(3, 128, generator=torch.Generator().manual_seed(0)))
    f, y = features(clip, data)
    expected = 100 * ((f @ w.T).argmax(1) == y).double().mean().item()
    for batch in 1, 3, 100:
        monkeypatch.setattr(common, "TEST_BATCH", batch)
        accuracy, (row,) = evaluated(data, lambda target: w)
        assert accuracy == pytest.approx(expected) and row["n_test"] == 7


def test_the_last_line_is_the_mean_over_tasks_and_names_those_over_classes(evaluated, capsys):
    data, classifier = known([0, 0, 0, 1, 2], [0, 2, 0, 1, 0])
    accuracy, rows = evaluated([data, data._replace(name="other")], classifier, ["other"], seed=3)
    assert accuracy == pytest.approx((60 + 500 / 9) / 2)
    zero_shot = (rows[0]["zero_shot"] + rows[1]["mean_class_zero_shot"]) / 2
    *lines, last = capsys.readouterr().out.splitlines()
    note = "[mean over classes: other]"
    assert last == f"shapes 16 shots seed 3: 57.78 (zero-shot {zero_shot:.2f}) {note}, 0 s"
    assert any("toy" in line and ": 60.00" in line for line in lines)
    assert any("other" in line and ": 55.56" in line for line in lines)
    evaluated(data, classifier, seed=3)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"shapes 16 shots seed 3: 60.00 (zero-shot {rows[0]['zero_shot']:.2f}), 0 s"


@pytest.mark.parametrize("answers, new, H", [([0, 2, 0, 1, 0], 40, 48), ([1, 2, 2, 0, 0], 0, 0)])
def test_base_new_and_their_harmonic_mean_are_in_the_last_line(evaluated, answers, new, H, capsys):
    data, classifier = known([0, 0, 0, 1, 2], answers)
    other, _ = known([0, 1, 1, 1, 2], answers)
    data = data._replace(half="base", new=other._replace(half="new"))
    accuracy, rows = evaluated(data, classifier, classes="base")
    assert [row["classes"] for row in rows] == ["base", "new"]
    assert rows[1]["accuracy"] == pytest.approx(new)
    last = capsys.readouterr().out.splitlines()[-1]
    assert f": base {accuracy:.2f}, new {new:.2f}, H {H:.2f} (zero-shot base " in last


def test_numbers_are_printed_before_they_are_written(evaluated, monkeypatch, capsys):
    def full(path, content):
        raise OSError("no space left")

    monkeypatch.setattr(common, "write", full)
    with pytest.raises(OSError):
        evaluated(*known([0, 0, 0, 1, 2], [0, 2, 0, 1, 0]))
    assert ": 60.00 (zero-shot " in capsys.readouterr().out


# ---------------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", METHODS)
def test_a_script_records_its_halves_and_its_transfer(name, fit, capsys):
    accuracy = fit(METHODS[name], classes="base", transfer="shapes_negative", seed=3)
    own = [row for row in fit.rows() if row["evaluated_on"] != "shapes_negative"]
    base, new = ([row for row in own if row["classes"] == half] for half in ("base", "new"))
    assert len(base) == len(new) == (3 if name == "softcpt" else 1)
    mean = [sum(row["accuracy"] for row in rows) / len(rows) for rows in (base, new)]
    assert accuracy == pytest.approx(mean[0])
    (other,) = [row for row in fit.rows() if row["evaluated_on"] == "shapes_negative"]
    assert (other["n_test"], other["classes"]) == (80, "all")
    assert base[0]["n_test"] == new[0]["n_test"] == 40
    assert {row["n_train"] for row in fit.rows()} == {26 if name == "softcpt" else 20}
    H = 2 * mean[0] * mean[1] / sum(mean)
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"seed 3: base {mean[0]:.2f}, new {mean[1]:.2f}, H {H:.2f} (zero-shot base" in last
    assert re.search(r", \d+ s$", last)


def test_a_row_holds_the_fields_of_a_run(fit):
    accuracy = fit(coop, seed=2, epochs=2)
    (row,) = fit.rows()
    assert row.keys() == {*ROW} and row["trained"].keys() == {*TRAINED}
    assert (row["method"], row["accuracy"], row["config"]["seed"]) == ("coop", accuracy, 2)
    assert (row["evaluated_on"], row["classes"], row["activation"]) == (
        "shapes",
        "all",
        "QuickGELU",
    )
    trained = row["trained"]
    assert (row["n_train"], trained["n_train"], row["n_test"]) == (40, 40, 80)
    assert (trained["device"], trained["precision"], trained["peak_gpu_mb"]) == ("cpu", "fp32", 0)
    assert trained["seconds"] > 0 and len(trained["losses"]) == 2
    assert all(trained[key] == value for key, value in row["evaluated"].items())


def test_an_evaluation_replaces_its_own_row_and_no_other(evaluated, fit):
    labels = [0, 0, 0, 1, 2]
    data, good = known(labels, labels)
    base, new = data._replace(half="base"), data._replace(half="new")
    evaluated(data, good)
    evaluated([data._replace(name="other"), base, new], good)
    before = fit.rows()
    assert len(before) == 4
    _, rows = evaluated(data._replace(half="base"), known(labels, [0, 2, 0, 1, 0])[1])
    assert [row["accuracy"] for row in rows] == pytest.approx([100, 100, 100, 60])
    assert rows[:3] == [row for row in before if row["classes"] != "base"]


@pytest.mark.parametrize("name", ["textures", "imagenet"])
def test_zero_shot_accuracy_is_that_of_the_hand_templates(
    name, rendered, clip, monkeypatch, fit, tmp_path
):
    data = common.load_dataset("textures", str(rendered))._replace(name=name)
    monkeypatch.setattr(common, "few_shot", lambda cfg: data)
    monkeypatch.setattr(common, "load_clip", lambda cfg: clip)
    asked, weights = [], common.zero_shot_weights
    seven = [template("{}") for template in common.open_clip.SIMPLE_IMAGENET_TEMPLATES]
    own = [] if name == "imagenet" else [data.template]

    def noted(clip, dataset, templates=None):
        asked.append(templates)
        return weights(clip, dataset, templates)

    monkeypatch.setattr(common, "zero_shot_weights", noted)
    f, y = features(clip, data)
    for ensemble, templates in (False, [data.template]), (True, own + seven):
        w = hand_weights(clip, data, templates)
        expected = 100 * ((f @ w.T).argmax(1) == y).double().mean().item()
        out = str(tmp_path)
        assert common.zero_shot(common.ZeroShot(ensemble=ensemble, out=out)) == expected
        assert templates in asked
    (row, _) = fit.rows()
    assert (row["method"], row["n_train"]) == ("zero_shot", 0)


# ---------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("name", [*METHODS, "common"])
def test_every_option_is_listed_with_its_default_and_a_note(name, shell):
    module = METHODS.get(name, common)
    code, out, _ = shell(f"{name}.py", "--help")
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  --", out.split("options:")[1])]
    config = common.ZeroShot if module is common else module.Config
    assert code == 0 and module.__doc__.splitlines()[0] in out
    for field in dataclasses.fields(config):
        entry = next(entry for entry in entries if re.match(rf"{field.name}\b", entry))
        assert entry.endswith(f"[{field.default}]") and len(entry.split()) > 3


def test_the_command_line_fills_the_config():
    assert common.cli(coop.Config, []) == coop.Config()
    given = "--shots 4 --seed 3 --csc --lr 1e-2 --position front --no-force".split()
    cfg = common.cli(coop.Config, given)
    assert (cfg.shots, cfg.seed, cfg.csc, cfg.lr) == (4, 3, True, 0.01)
    assert cfg.position == "front" and not cfg.force
