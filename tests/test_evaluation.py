"""Accuracies, records, the last line; zero-shot CLIP; the command line and a run's folder."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.conftest import NAMES, toy, unit

METHODS = [coop, dpt, upt, enprompt, softcpt]
FIELDS = """method dataset evaluated_on classes shots seed model pretrained official accuracy
    mean_class_accuracy zero_shot mean_class_zero_shot intra_class_variance inter_class_variance
    n_test train_seconds eval_seconds peak_gpu_mb precision device torch open_clip commit config
    time""".split()


# --- accuracies


@pytest.fixture
def evaluated(clip, tmp_path):
    """evaluated(data, classifier, ...) gives (accuracy, rows of results.json)."""

    def evaluated(data, classifier, per_class=(), **options):
        cfg = coop.Config(out=str(tmp_path), device="cpu", **options)
        accuracy = common.evaluate(cfg, clip, data, classifier, per_class)
        return accuracy, json.loads((common.run_folder(cfg) / "results.json").read_text())

    return evaluated


def known(labels, answers):
    """A data set with these labels, and a classifier that gives these answers."""
    pictures = [picture for picture, _, _ in toy(len(labels)).test]
    test = [(x, label, NAMES[label]) for x, label in zip(pictures, labels, strict=True)]
    logits = torch.nn.functional.one_hot(torch.tensor(answers), 3).float()
    return toy()._replace(test=test), lambda target: lambda x, f: logits


def test_accuracies_overall_and_per_class_of_known_answers(evaluated):
    accuracy, (row,) = evaluated(*known([0, 0, 0, 1, 2], [0, 2, 0, 1, 0]))
    assert accuracy == row["accuracy"] == pytest.approx(60)
    assert row["mean_class_accuracy"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)


def test_a_class_without_test_images_does_not_count_in_the_mean_over_classes(evaluated):
    _, (row,) = evaluated(*known([0, 0, 2], [0, 1, 2]))
    assert row["mean_class_accuracy"] == pytest.approx(75)


def test_zero_shot_clip_is_counted_in_the_same_two_ways(evaluated, clip):
    labels = [0, 0, 0, 1, 2]
    data, classifier = known(labels, labels)
    images = common.views(clip, [picture for picture, _, _ in data.test])
    texts = [data.template.format(name.replace("_", " ")) for name in NAMES]
    w = unit(clip.encode_text(clip.tokenize(texts)))
    right = (common.unit_features(clip, images) @ w.T).argmax(1) == torch.tensor(labels)
    _, (row,) = evaluated(data, classifier)
    assert row["zero_shot"] == pytest.approx(100 * sum(right.tolist()) / 5)
    mean = (sum(right[:3].tolist()) / 3 + int(right[3]) + int(right[4])) / 3
    assert row["mean_class_zero_shot"] == pytest.approx(100 * mean)
    assert row["zero_shot"] != row["mean_class_zero_shot"]


def test_a_task_counts_by_the_mean_over_its_classes_where_asked(evaluated):
    data, classifier = known([0, 0, 0, 1, 2], [0, 2, 0, 1, 0])
    other = data._replace(name="other")
    accuracy, _ = evaluated([data, other], classifier, per_class=("other",))
    assert accuracy == pytest.approx((60 + 500 / 9) / 2)


def test_a_classifier_of_text_features_takes_the_nearest(evaluated, clip):
    data = toy()
    images = common.views(clip, [picture for picture, _, _ in data.test])
    w = unit(torch.randn(3, 128, generator=torch.Generator().manual_seed(0)))
    best = (common.unit_features(clip, images) @ w.T).argmax(1)
    labels = torch.tensor([label for _, label, _ in data.test])
    accuracy, (row,) = evaluated(data, lambda target: w)
    assert accuracy == pytest.approx(100 * (best == labels).double().mean().item())
    assert row["n_test"] == 6


def test_the_variances_are_those_within_and_between_classes(evaluated, clip):
    data = toy()
    _, (row,) = evaluated(data, lambda target: torch.ones(3, 128))
    images = common.views(clip, [picture for picture, _, _ in data.test])
    f, within = common.unit_features(clip, images), []
    for k in range(3):
        group = f[torch.tensor([label == k for _, label, _ in data.test])]
        within += (group - group.mean(0)).square().sum(1).tolist()
    texts = [data.template.format(name.replace("_", " ")) for name in NAMES]
    w = unit(clip.encode_text(clip.tokenize(texts)))
    between = (w - w.mean(0)).square().sum(1).mean().item()
    assert row["intra_class_variance"] == pytest.approx(sum(within) / 6, rel=1e-4)
    assert row["inter_class_variance"] == pytest.approx(between, rel=1e-4)


def test_base_new_and_their_harmonic_mean_are_printed_last(evaluated, capsys):
    data, classifier = known([0, 0, 0, 1, 2], [0, 2, 0, 1, 0])
    new, _ = known([0, 1, 1, 1, 2], [0, 2, 0, 0, 0])  # 20 %
    accuracy, rows = evaluated(data._replace(new=new), classifier, classes="base", seed=3)
    assert accuracy == pytest.approx(60) and [row["classes"] for row in rows] == ["base", "new"]
    last = capsys.readouterr().out.splitlines()[-1]
    H = 2 * 60 * rows[1]["accuracy"] / (60 + rows[1]["accuracy"])
    new = rows[1]["accuracy"]
    assert last.startswith(f"shapes 16 shots seed 3: base 60.00, new {new:.2f}, H {H:.2f} (zero-")


# --- records


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_script_records_its_halves_and_its_transfer(method, fit, capsys):
    accuracy = fit(method, classes="base", transfer="shapes_negative", seed=3)
    own = [row for row in fit.rows() if row["evaluated_on"] != "shapes_negative"]
    base, new = ([row for row in own if row["classes"] == half] for half in ("base", "new"))
    assert len(base) == len(new) == (3 if method is softcpt else 1)
    mean = [sum(row["accuracy"] for row in rows) / len(rows) for rows in (base, new)]
    assert accuracy == pytest.approx(mean[0])
    (other,) = [row for row in fit.rows() if row["evaluated_on"] == "shapes_negative"]
    assert (other["n_test"], other["classes"]) == (80, "all")
    assert base[0]["n_test"] == new[0]["n_test"] == 40
    H = 2 * mean[0] * mean[1] / sum(mean)
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"seed 3: base {mean[0]:.2f}, new {mean[1]:.2f}, H {H:.2f} (zero-shot base" in last
    assert re.search(r", \d+ s$", last)


def test_a_row_holds_the_fields_of_a_run(fit, tmp_path):
    accuracy = fit(coop, seed=2)
    (row,) = fit.rows()
    assert not set(FIELDS) - row.keys() and row["accuracy"] == accuracy
    assert (row["method"], row["seed"], row["config"]["seed"]) == ("coop", 2, 2)
    assert (row["dataset"], row["evaluated_on"], row["classes"]) == ("shapes", "shapes", "all")
    assert (row["official"], row["device"], row["peak_gpu_mb"]) == (False, "cpu", 0)
    assert row["train_seconds"] > 0 and row["eval_seconds"] > 0


def test_a_repeated_evaluation_takes_the_place_of_its_row_and_of_no_other(evaluated):
    labels = [0, 0, 0, 1, 2]
    data, good = known(labels, labels)
    other = data._replace(name="other")
    accuracy, before = evaluated([data, other, data._replace(name="third")], good)
    assert accuracy == pytest.approx(100)
    accuracy, rows = evaluated(other, known(labels, [0, 2, 0, 1, 0])[1])
    assert accuracy == rows[1]["accuracy"] == pytest.approx(60)
    assert [row["evaluated_on"] for row in rows] == ["toy", "other", "third"]
    assert (rows[0], rows[2]) == (before[0], before[2])
    new = data._replace(new=other._replace(name="toy"))  # the same name, another half
    _, rows = evaluated(new, good, classes="base")
    assert [row["classes"] for row in rows] == ["base", "new"]


@pytest.mark.parametrize("change", ["picture", "label", "names", "template"])
def test_a_repeated_evaluation_is_of_the_test_set_as_it_is_now(evaluated, tmp_path, change):
    path = tmp_path / "x.ppm"
    data = toy()._replace(test=[(str(path), 0, NAMES[0]), *toy().test[1:]])
    w = torch.eye(128)[:3]
    found = []
    for changed in False, True:
        colour = b"\xff" if changed and change == "picture" else b"\0"  # under the same name
        path.write_bytes(b"P6 4 4 255\n" + 48 * colour)
        if changed and change == "label":
            data = data._replace(test=[(str(path), 1, NAMES[1]), *data.test[1:]])
        if changed and change == "names":
            data = data._replace(classnames=["dog", *NAMES[1:]])
        if changed and change == "template":
            data = data._replace(template="{} texture.")
        for _ in range(2):
            _, (row,) = evaluated(data, lambda target: w)
            found.append((row["intra_class_variance"], row["inter_class_variance"]))
    assert found[0] == found[1] and found[2] == found[3] and found[1] != found[2]


@pytest.mark.parametrize("label", [-1, 3])
def test_test_labels_that_name_no_class_are_refused(label, evaluated):
    data = toy()._replace(test=[*toy().test, (toy().test[0][0], label, "dog")])
    with pytest.raises(common.Error, match="toy: labels"):
        evaluated(data, lambda target: torch.eye(3, 128))


def test_without_test_images_there_is_no_evaluation(evaluated):
    with pytest.raises(common.Error, match="toy has no images"):
        evaluated(toy()._replace(test=[]), lambda target: torch.eye(3, 128))


def test_a_loaded_run_is_evaluated_and_not_trained(fit, tmp_path, monkeypatch, shell):
    accuracy = fit(coop, n_ctx=3, epochs=2)
    folder = next(tmp_path.rglob("prompt.safetensors")).parent
    before = (folder / "prompt.safetensors").read_bytes()
    monkeypatch.setattr(common.Optimizer, "step", None)
    assert fit(coop, load=str(folder), n_ctx=3, force=True) == accuracy
    code, out, _ = shell("coop.py", "--load", str(folder), "--transfer", "textures")
    assert code == 0 and "on textures" in out and f": {accuracy:.2f} (" in out.splitlines()[-1]
    assert (folder / "prompt.safetensors").read_bytes() == before
    targets = [row["evaluated_on"] for row in json.loads((folder / "results.json").read_text())]
    assert sorted(targets) == ["shapes", "textures"]
    code, _, err = shell("coop.py", "--load", str(folder), "--n_ctx", "5")
    assert code == 2 and "trained with --n_ctx 3" in err
    with pytest.raises(common.Error, match="does not fit"):
        fit(coop, load=str(folder), n_ctx=5)
    with pytest.raises(common.Error, match="another method"):
        fit(dpt, load=str(folder))


def test_zero_shot_accuracy_is_that_of_the_hand_templates(world, clip, shell):
    data = common.load_dataset("shapes", str(world))
    f = common.unit_features(clip, common.views(clip, [picture for picture, _, _ in data.test]))
    labels = torch.tensor([label for _, label, _ in data.test])
    for flags, count in ([], 1), (["--ensemble"], 8):
        w = 0
        for template in ["a photo of a {}.", *common.SEVEN][:count]:
            texts = [template.format(name.replace("_", " ")) for name in data.classnames]
            w = w + unit(clip.encode_text(clip.tokenize(texts)))
        expected = 100 * ((f @ unit(w).T).argmax(1) == labels).double().mean().item()
        code, out, _ = shell("common.py", *flags)
        assert code == 0 and f": {expected:.2f} (zero-shot" in out.splitlines()[-1]


# --- options and folders


@pytest.mark.parametrize("method", [*METHODS, common], ids=lambda method: method.__name__)
def test_every_option_is_listed_with_its_default_and_a_note(method, shell):
    code, out, _ = shell(f"{method.__name__}.py", "--help")
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  --", out.split("options:")[1])]
    config = method.ZeroShot if method is common else method.Config
    assert code == 0 and method.__doc__.splitlines()[0] in out
    for field in dataclasses.fields(config):
        entry = next(entry for entry in entries if re.match(rf"{field.name}\b", entry))
        assert entry.endswith(f"[{field.default}]") and len(entry.split()) > 3
        assert "None" not in entry or field.default is None


def test_the_command_line_fills_the_config():
    assert common.cli(coop.Config, []) == coop.Config()
    given = "--shots 4 --seed 3 --csc --lr 1e-2 --position front --no-force".split()
    cfg = common.cli(coop.Config, given)
    assert (cfg.shots, cfg.seed, cfg.csc, cfg.lr) == (4, 3, True, 0.01)
    assert cfg.position == "front" and not cfg.force


def test_load_takes_the_options_of_the_run_and_its_clip_may_be_typed(fit, tmp_path):
    fit(coop, n_ctx=3, csc=True, seed=5)
    folder = str(next(tmp_path.rglob("prompt.safetensors")).parent)
    load = ["--load", folder, "--device", "cpu"]
    cfg = common.cli(coop.Config, [*load, "--csc", "--model", "RN50", "--precision", "bf16"])
    assert (cfg.n_ctx, cfg.csc, cfg.seed, cfg.shots, cfg.epochs) == (3, True, 5, 1, 1)
    assert (cfg.model, cfg.precision) == ("RN50", "bf16")
    for typed in ["--no-csc"], ["--lr", "0.1"], ["--shots", "16"], ["--dataset", "textures"]:
        with pytest.raises(common.Error, match=f"trained with {typed[0].replace('no-', '')} "):
            common.cli(coop.Config, [*load, *typed])
    assert (cfg.load, cfg.out, cfg.data) == (folder, "runs", "data")  # the machine's own
    assert common.run_folder(cfg) == Path(folder)
