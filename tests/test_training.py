"""Trainings that are interrupted, resumed, repeated or refused."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file, save

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.conftest import interrupted, toy
from tests.test_loading import Code
from tests.test_optimizer import optimizer_of

METHODS = [coop, dpt, upt, enprompt, softcpt]
INTERRUPTED = {
    coop: {"csc": True},
    dpt: {},
    upt: {"official": True},
    enprompt: {"enla": "words"},
    softcpt: {"official": True, "dataset": "textures,colours"},
}


def learned(folder):
    return load_file(next(folder.rglob("prompt.safetensors")))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_runs_agree_bit_for_bit_also_when_one_was_interrupted(method, fit, tmp_path):
    options = {"dataset": "textures", "shots": 4, "batch_size": 8, "epochs": 3}
    options |= INTERRUPTED[method]
    first = fit(method, out=str(tmp_path / "a"), **options)
    with interrupted(at=8 if method is softcpt else 4):  # in the second epoch
        fit(method, out=str(tmp_path / "b"), **options)
    assert list((tmp_path / "b").rglob("checkpoint.pt"))
    assert not list((tmp_path / "b").rglob("prompt.safetensors"))
    assert fit(method, out=str(tmp_path / "b"), **options) == first
    a, b = learned(tmp_path / "a"), learned(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not list(tmp_path.rglob("checkpoint*"))
    fit(method, out=str(tmp_path / "c"), seed=2, **options)
    assert not all(torch.equal(a[name], other) for name, other in learned(tmp_path / "c").items())


@pytest.fixture
def trained(clip, tmp_path):
    """trained(data, ...) trains a small prompt for two epochs of one step; returns its epochs."""

    def trained(data, clip=clip, stop_after=None, prompt=None, config=coop.Config, **options):
        cfg = config(out=str(tmp_path), **options)
        prompt = prompt or torch.nn.Linear(2, 1)
        optimizer, epochs = optimizer_of(prompt.parameters(), 2), []
        for epoch in common.resumed(cfg, clip, data, prompt, optimizer):
            if epoch == stop_after:
                raise KeyboardInterrupt
            epochs.append(epoch)
            optimizer.step(prompt(torch.ones(2)).sum())
        return epochs

    return trained


def test_only_the_epochs_that_are_left_are_trained(trained):
    with pytest.raises(KeyboardInterrupt):
        trained(toy(), stop_after=1)
    assert trained(toy()) == [1] and trained(toy()) == []
    assert trained(toy(), force=True) == [0, 1]


def test_a_finished_prompt_says_what_it_belongs_to(trained, clip, tmp_path):
    trained(toy())
    folder = next(tmp_path.rglob("prompt.safetensors")).parent
    tensors, about = common.read_prompt(folder)
    assert tensors.keys() == {"weight", "bias"}
    assert (about["method"], about["CLIP"]) == ("coop", clip.fingerprint)
    assert about["training set"] == common.digest(toy().train)
    assert about["classnames"] == {"toy": toy().classnames} and about["config"]["seed"] == 1
    assert about["train_seconds"] > 0
    assert json.loads((folder / "config.json").read_text())["n_ctx"] == coop.Config.n_ctx


def changed(kind):
    data = toy()
    picture, label, name = data.train[0]
    first = {
        "picture": (picture.clone().index_fill_(0, torch.tensor([0]), 7), label, name),
        "label": (picture, 1, name),
        "name": (picture, label, "dog"),
    }
    return data._replace(train=[first[kind], *data.train[1:]])


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
@pytest.mark.parametrize("kind", ["picture", "label", "name"])
def test_other_pictures_labels_or_names_are_refused_until_forced(trained, kind, finished):
    if finished:
        trained(toy())
    else:
        with pytest.raises(KeyboardInterrupt):
            trained(toy(), stop_after=1)
    with pytest.raises(common.Error, match="another training set; --force"):
        trained(changed(kind))
    assert trained(changed(kind), force=True) == [0, 1]


def test_another_clip_or_a_prompt_of_another_size_is_refused(trained, odd):
    trained(toy())
    with pytest.raises(common.Error, match="another CLIP; --force"):
        trained(toy(), clip=odd)
    with pytest.raises(common.Error, match="does not fit"):
        trained(toy(), prompt=torch.nn.Linear(3, 1))


@pytest.mark.parametrize(
    "content", [b"", b"hello", save({"weight": torch.ones(1, 2)}, {"about": "{"})]
)
def test_a_damaged_prompt_is_named(trained, tmp_path, content):
    trained(toy())
    path = next(tmp_path.rglob("prompt.safetensors"))
    path.write_bytes(content)
    with pytest.raises(common.Error, match="prompt.safetensors"):
        trained(toy())


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4broken", "half"])
def test_a_damaged_checkpoint_is_named(trained, tmp_path, content):
    with pytest.raises(KeyboardInterrupt):
        trained(toy(), stop_after=1)
    path = next(tmp_path.rglob("checkpoint.pt"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(common.Error, match="checkpoint.pt"):
        trained(toy())


FOREIGN = {  # in place of a checkpoint's parts
    "no about": {"about": [1]},
    "an empty about": {"about": {}},
    "a word for an epoch": {"epoch": "x"},
    "no prompt": {"prompt": [1]},
    "no optimizer": {"optimizer": {}},
    "an optimizer of nothing": {"optimizer": {"sgd": {"state": {}, "param_groups": []}}},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_of_something_else_is_named(trained, tmp_path, kind):
    with pytest.raises(KeyboardInterrupt):
        trained(toy(), stop_after=1)
    path = next(tmp_path.rglob("checkpoint.pt"))
    torch.save(torch.load(path) | FOREIGN[kind], path)
    with pytest.raises(common.Error, match="checkpoint.pt is damaged.*--force"):
        trained(toy())
    assert trained(toy(), force=True) == [0, 1]


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
def test_a_run_of_another_method_is_refused(trained, tmp_path, finished):
    with contextlib.suppress(KeyboardInterrupt):
        trained(toy(), stop_after=None if finished else 1)
    cfg = dpt.Config(out=str(tmp_path))
    common.run_folder(cfg).parent.mkdir(parents=True)
    next(tmp_path.rglob("16shots*")).rename(common.run_folder(cfg))
    with pytest.raises(common.Error, match="another method; --force"):
        trained(toy(), config=dpt.Config)


def test_no_code_in_a_checkpoint_is_run(trained, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(toy(), stop_after=1)
    path = next(tmp_path.rglob("checkpoint.pt"))
    torch.save(torch.load(path) | {"more": Code(tmp_path / "made")}, path)
    with pytest.raises(common.Error, match="checkpoint.pt"):
        trained(toy())
    assert not (tmp_path / "made").exists()
