"""What a run is: a number is never credited to other options, data, CLIP, code or machine."""

import dataclasses
import functools
import json
import pickle
import shutil
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path
from typing import get_args

import pytest
import torch

import common
import coop
import dpt
import softcpt
from tests.conftest import METHODS, interrupted, schedule, toy

# ------------------------------------------------------------------------ one change at a time

OPTIONS = {"dataset": "textures", "shots": 1, "batch_size": 2, "device": "cpu"}
LEARNED = {  # what changes: how the Error names it
    "an int": "--",
    "a float": "--",
    "a bool": "--",
    "a choice": "--",
    "a str": "--model",
    "one option more": "--more",
    "one option less": "--less",
    "the epochs": "number of epochs",
    "an image": "training images",
    "a label": "training images",
    "a class name": "class names",
    "the template": "templates",
    "a weight": "CLIP",
}
FACTS = {  # what changes in evaluated; the first is named where the run is not finished
    "the method's file": ["source"],
    "common.py": ["source"],
    "the precision": ["precision"],
    "the device": ["device", "torch"],
}
Runs = namedtuple("Runs", "method options out")
INITIALISE, LOAD_CLIP = common.Optimizer.__init__, common.load_clip


@pytest.fixture
def quick(clip, monkeypatch):
    """Loads the tiny CLIP once."""
    monkeypatch.setattr(common, "load_clip", lambda cfg: clip)


@pytest.fixture(autouse=True)
def forget():
    """Lets the next test read the code again, which this one may have replaced."""
    clear = common.provenance.cache_clear
    yield
    clear()


@pytest.fixture(scope="module", params=METHODS)
def runs(request, rendered, clip, tmp_path_factory):
    """A method, options, and a folder with a finished and an unfinished run of two epochs."""
    method, out = METHODS[request.param], tmp_path_factory.mktemp("out")
    options = OPTIONS | {"data": str(rendered)}
    if method is softcpt:
        options["dataset"] = "textures,colours"
    with pytest.MonkeyPatch.context() as patch:
        set_epochs(patch, method, 2)
        patch.setattr(common, "load_clip", lambda cfg: clip)
        method.main(method.Config(out=str(out / "finished"), **options))
        with interrupted(at=8 if method is softcpt else 4):
            method.main(method.Config(out=str(out / "unfinished"), **options))
    return Runs(method, options, out)


def set_epochs(patch, method, count):
    """Sets the number of epochs in the method's table or, without one, in its optimiser."""
    if hasattr(method, "EPOCHS"):
        patch.setattr(method, "EPOCHS", {1: count})
        return

    def init(optimizer, cfg, clip, groups, epochs):
        INITIALISE(optimizer, cfg, clip, groups, count)

    patch.setattr(common.Optimizer, "__init__", init)


def config_with(method, change, options):
    """The method's Config with another default of some kind, or with one option more."""
    fields = [f for f in dataclasses.fields(method.Config) if f.name not in common.NOT_LEARNED]
    kinds = {"an int": int, "a float": float, "a bool": bool}
    if change == "one option more":
        name, value = "more", 1
    elif change == "a str":
        name, value = "model", f"local-dir:{options['data']}/shapes/clip"
    elif change == "a choice":
        field = [f for f in fields if get_args(f.type)][-1]
        name, value = field.name, next(c for c in get_args(field.type) if c != field.default)
    else:
        field = [f for f in fields if f.type is kinds[change]][-1]
        values = {int: field.default + 1, float: (field.default + 1) / 2, bool: not field.default}
        name, value = field.name, values[field.type]
    fields = [(name, type(value), value)]
    Config = dataclasses.make_dataclass("Config", fields, bases=(method.Config,))
    Config.__module__ = method.__name__
    return Config


def changed_data(change, data, folder):
    """The Dataset with another image, label, class name or template."""
    (image, y, c), *rest = data.train
    if change == "an image":
        other = folder / c / Path(image).name
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(Path(image).read_bytes() + b"\0")
        return data._replace(train=[(str(other), y, c), *rest])
    if change == "a label":
        return data._replace(train=[(image, y + 1, c), *rest])
    if change == "a class name":
        return data._replace(classnames=["velvet", *data.classnames[1:]])
    return data._replace(template="a drawing of a {}.")


def edited(module, folder):
    """A copy of a module's file with one more line."""
    path = folder / Path(module.__file__).name
    path.write_text(Path(module.__file__).read_text("utf-8") + "# one more line\n", "utf-8")
    common.provenance.cache_clear()
    return path


def make(change, runs, patch, folder):
    """Makes the change for the next run of the method; returns its Config class."""
    method, few_shot, build_model = runs.method, common.few_shot, common.build_model
    provenance = common.provenance

    def heavier(*names):
        model = build_model(*names)
        model.ln_final.bias.data[0] += 1e-6
        return model

    if change == "one option less":
        (path,) = folder.rglob("checkpoint.pt")
        state = torch.load(path)
        state["run"]["--less"] = 1
        torch.save(state, path)
    elif change == "the epochs":
        set_epochs(patch, method, 3)
    elif change == "a weight":
        patch.setattr(common, "build_model", heavier)
        patch.setattr(common, "load_clip", LOAD_CLIP)
    elif change == "the method's file":
        file = edited(method, folder)
        patch.setattr(common, "source_file", lambda cfg: file)
    elif change == "common.py":
        patch.setattr(common, "__file__", str(edited(common, folder)))
    elif change == "the precision":
        half = functools.partial(dataclasses.replace, precision="amp")
        patch.setattr(common, "load_clip", lambda cfg: LOAD_CLIP(half(cfg)))
    elif change == "the device":
        other = {"device": "cuda", "torch": "0.1"}
        patch.setattr(common, "provenance", lambda *of: provenance(*of) | other)
    elif change in ("an image", "a label", "a class name", "the template"):
        patch.setattr(common, "few_shot", lambda *a: changed_data(change, few_shot(*a), folder))
    else:
        return config_with(method, change, runs.options)
    return method.Config


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["finished", "unfinished"])
@pytest.mark.parametrize("change", [*LEARNED, *FACTS])
def test_a_run_is_refused_or_noted_when_options_data_clip_or_code_change(
    change, stage, runs, quick, monkeypatch, tmp_path, capsys
):
    out = shutil.copytree(runs.out / stage, tmp_path / "runs")
    set_epochs(monkeypatch, runs.method, 2)
    Config = make(change, runs, monkeypatch, tmp_path)
    before = contents(out)
    cfg = Config(out=str(out), **runs.options)
    if change in LEARNED or stage == "unfinished":
        name = LEARNED[change] if change in LEARNED else FACTS[change][0]
        with pytest.raises(common.Error, match=f"different {name}.*; --force retrains"):
            runs.method.main(cfg)
        assert contents(out) == before
        return
    (checkpoint,) = out.rglob("checkpoint.pt")
    trained = common.read_checkpoint(checkpoint)["trained"]
    runs.method.main(cfg)
    said = [line for line in capsys.readouterr().out.splitlines() if "--force" in line]
    assert len(said) == (FACTS[change] == ["source"])
    for line in said:
        assert f"trained by an earlier {runs.method.__name__}.py" in line
        assert f"at commit {trained['commit']};" in line
    for path in out.rglob("results/*.json"):
        row = json.loads(path.read_text("utf-8"))
        now = row["evaluated"]
        assert row["trained"] == trained and checkpoint.read_bytes() == before[checkpoint]
        differ = {key for key in now.keys() & trained.keys() if now[key] != trained[key]}
        assert differ - {"seconds", "commit", "modified"} == {*FACTS[change]}


def test_the_commit_and_whether_the_code_differs_from_it(monkeypatch, tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True)
        return done.stdout.decode().strip()

    for name in "coop.py", "common.py", "notes.txt":
        (tmp_path / name).write_text(name)
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    found = {}
    for name in "notes.txt", "common.py", "coop.py":
        (tmp_path / name).write_text("changed")
        common.provenance.cache_clear()
        found[name] = common.provenance(tmp_path / "coop.py", "fp32", "cpu")
        git("checkout", name)
    commits = {code["commit"] for code in found.values()}
    assert commits == {git("rev-parse", "HEAD")[:7]} != {""}
    assert not found["notes.txt"]["modified"]
    assert found["common.py"]["modified"] and found["coop.py"]["modified"]
    assert len({code["source"] for code in found.values()}) == 3


CELL = """
from dataclasses import dataclass
import coop

@dataclass
class Config(coop.Config):
    n_ctx: int = 3
"""


def test_a_config_from_a_notebook_trains_and_has_no_source(rendered, monkeypatch, tmp_path):
    cell = types.ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", cell)
    exec(CELL, vars(cell))
    cfg = cell.Config(epochs=1, **OPTIONS, data=str(rendered), out=str(tmp_path))
    coop.main(cfg)
    (path,) = tmp_path.rglob("results/*.json")
    row = json.loads(path.read_text("utf-8"))
    assert row["method"] == "notebook" and row["config"]["n_ctx"] == 3
    assert row["trained"]["source"] == row["evaluated"]["source"] == ""


def test_a_config_from_standard_input_has_no_source(monkeypatch):
    monkeypatch.setattr(sys.modules["coop"], "__file__", "<stdin>")  # as of "python - < FILE"
    assert common.source_file(coop.Config()) is None


# --------------------------------------------------------------------- damage and force


class Bomb:
    """Makes a file if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


DAMAGE = {  # what becomes of the file's bytes
    "empty": lambda content, folder: b"",
    "text": lambda content, folder: b"hello",
    "half": lambda content, folder: content[: len(content) // 2],
    "a zip's first bytes": lambda content, folder: b"PK\3\4" + bytes(100),
    "a pickle": lambda content, folder: pickle.dumps(Bomb(folder / "executed"), 2),
}
STATES = {  # what becomes of its contents
    "torch's pickle": lambda state, folder: Bomb(folder / "executed"),
    "a pickle within": lambda state, folder: state | {"more": Bomb(folder / "executed")},
    "a list": lambda state, folder: [state],
    "an earlier version": lambda state, folder: {"about": state["run"], "epoch": 1},
}


@pytest.mark.parametrize("kind", [*DAMAGE, *STATES])
def test_a_damaged_or_earlier_checkpoint_is_named_and_no_code_in_it_runs(
    kind, quick, fit, tmp_path
):
    fit(coop, **OPTIONS)
    (path,) = tmp_path.rglob("checkpoint.pt")
    if kind in DAMAGE:
        path.write_bytes(DAMAGE[kind](path.read_bytes(), tmp_path))
    else:
        torch.save(STATES[kind](torch.load(path), tmp_path), path)
    before = contents(tmp_path)
    with pytest.raises(common.Error, match="checkpoint.pt.*--force retrains"):
        fit(coop, **OPTIONS)
    assert contents(tmp_path) == before
    fit(coop, force=True, **OPTIONS)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("bad", [{"transfer": "colours"}, {"transfer": "x"}, {"device": "cuda:99"}])
def test_force_deletes_nothing_where_a_check_fails(bad, fit, tmp_path):
    fit(coop, csc=True, **OPTIONS)
    before = contents(tmp_path)
    with pytest.raises(common.Error):
        fit(coop, csc=True, force=True, **OPTIONS | bad)
    assert contents(tmp_path) == before


def test_force_deletes_the_run_before_its_first_epoch_and_then_it_resumes(
    quick, fit, monkeypatch, tmp_path
):
    accuracy, taken = fit(coop, epochs=2, **OPTIONS), []
    with interrupted(at=1):
        fit(coop, epochs=2, force=True, **OPTIONS)
    assert not contents(tmp_path)
    with interrupted(at=4):
        fit(coop, epochs=2, force=True, **OPTIONS)
    step = common.Optimizer.step
    monkeypatch.setattr(common.Optimizer, "step", lambda *of: taken.append(step(*of)))
    assert fit(coop, epochs=2, **OPTIONS) == accuracy and len(taken) == 2  # one epoch's steps


def test_a_finished_run_of_other_learnables_is_one_line(quick, fit, monkeypatch):
    fit(coop, **OPTIONS)
    learnables = coop.learnables

    def more(*of):
        prompt = learnables(*of)
        prompt.more = torch.nn.Parameter(torch.ones(1))
        return prompt

    monkeypatch.setattr(coop, "learnables", more)
    with pytest.raises(common.Error, match="--force retrains"):
        fit(coop, **OPTIONS)


# -------------------------------------------------------------------- two of the same name


@pytest.fixture
def own(rendered, tmp_path):
    """own(name) is a folder of the user's own below tmp_path, with the images of a task."""
    return lambda name, task="textures": str(
        shutil.copytree(Path(rendered, "shapes", task), tmp_path / name)
    )


def test_two_folders_of_one_name_keep_two_results(fit, own, rendered):
    real, art = own("real/pets"), own("art/pets", "colours")
    tiny = f"local-dir:{rendered}/shapes/clip"
    fit(coop, dataset=real, transfer=art, model=tiny)
    found = {row["evaluated_on"]: row["accuracy"] for row in fit.rows()}
    assert found.keys() == {real, art}
    fit(coop, dataset=art, model=tiny)
    fit(coop, dataset=real, model=tiny)  # finished: evaluated again
    of_real = [row for row in fit.rows() if row["config"]["dataset"] == real]
    assert {row["evaluated_on"]: row["accuracy"] for row in of_real} == found
    assert len(fit.rows()) == 3


@pytest.mark.parametrize("name", ["imagenet", "caltech101", "shapes", "oxford_pets"])
def test_a_folder_called_as_a_benchmark_is_not_it(name, own, clip, monkeypatch, tmp_path):
    data = common.load_dataset(own(name), "nowhere")
    assert (data.template, data.crop) == ("a photo of a {}.", (0.08, 1.0))
    assert data.name not in softcpt.PER_CLASS
    assert softcpt.title_of(data.name) == f"{name.replace('_', ' ')} classification"
    (rates,) = {len(schedule(coop, clip, toy()._replace(name=data.name)))}
    assert rates == 200  # not the 50 epochs of ImageNet
    monkeypatch.chdir(tmp_path)
    assert common.load_dataset(f"./{name}", "nowhere").classnames == data.classnames


def test_the_paper_s_schedule_belongs_to_the_benchmark(clip):
    assert len(schedule(coop, clip, toy()._replace(name="imagenet"))) == 50


def test_an_explicit_model_overrides_the_data_sets_own(monkeypatch):
    asked = []

    def build(name, pretrained):
        asked.append(name)
        raise common.Error("no more")

    monkeypatch.setattr(common, "build_model", build)
    for dataset in "caltech101", "textures":
        with pytest.raises(common.Error, match="no more"):
            common.load_clip(dpt.Config(model="ViT-B-16", dataset=dataset))
    assert asked == ["ViT-B-16", "ViT-B-16"]


@pytest.mark.parametrize("name", ["", "shapes,", ",shapes"])
def test_an_empty_name_is_not_the_current_folder(name, monkeypatch, own, rendered):
    monkeypatch.chdir(own("here"))
    assert common.load_dataset(".").name == "."  # which would do as a data set
    with pytest.raises(common.Error, match="nor a data set"):
        common.load_dataset(name, str(rendered))
    with pytest.raises(common.Error, match="nor a data set"):
        softcpt.load_tasks(softcpt.Config(dataset=name, data=str(rendered)))
