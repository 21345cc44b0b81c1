"""Whose number is it: of which pictures, which classes, which CLIP. Never another's, in silence."""

import json
import shutil
from pathlib import Path

import pytest

import common
import coop
import dpt
import softcpt
from tests.conftest import schedule, toy


@pytest.fixture
def own(world, tmp_path):
    """own(name) is a folder of the user's own below tmp_path, with the pictures of a task."""
    return lambda name, task="textures": str(
        shutil.copytree(Path(world, "shapes", task), tmp_path / name)
    )


def test_two_label_sets_of_one_name_keep_two_results(fit, own, world):
    real, art = own("real/pets"), own("art/pets", "colours")
    tiny = f"local-dir:{world}/shapes/clip"
    fit(coop, dataset=real, transfer=art, model=tiny)
    found = {row["evaluated_on"]: row["accuracy"] for row in fit.rows()}
    assert found.keys() == {real, art}
    fit(coop, dataset=art, model=tiny)
    fit(coop, dataset=real, model=tiny)  # finished: evaluated again
    again = {row["evaluated_on"]: row["accuracy"] for row in fit.rows() if row["dataset"] == real}
    assert again == found and len({row["dataset"] for row in fit.rows()}) == 2


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


def test_a_model_that_is_typed_is_taken_though_it_is_the_default(monkeypatch):
    asked = []

    def build(name, pretrained):
        asked.append(name)
        raise common.Error("that is all")

    monkeypatch.setattr(common, "build_model", build)
    for argv in ["--model", "ViT-B-16"], ["--model", "ViT-B-16", "--dataset", "textures"]:
        with pytest.raises(common.Error, match="--model ViT-B-16"):
            common.load_clip(common.cli(dpt.Config, argv))
    assert asked == ["ViT-B-16", "ViT-B-16"]


def test_a_loaded_run_in_another_precision_is_evaluated_in_it(fit, tmp_path, shell):
    fit(coop)
    folder = next(tmp_path.rglob("prompt.safetensors")).parent
    for precision, said in ("bf16", "torch.bfloat16"), ("fp32", "fp32"):
        code, out, _ = shell("coop.py", "--load", str(folder), "--precision", precision)
        (row,) = json.loads((folder / "results.json").read_text("utf-8"))
        assert (code, row["precision"]) == (0, said) and f"{row['accuracy']:.2f}" in out


def test_a_loaded_run_with_other_weights_is_refused(fit, tmp_path, shell):
    fit(coop)
    folder = next(tmp_path.rglob("prompt.safetensors")).parent
    before = (folder / "results.json").read_bytes()
    code, _, err = shell("coop.py", "--load", str(folder), "--model", "RN50", "--pretrained", "")
    assert code == 2 and "another CLIP" in err
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.parametrize("name", ["", "shapes,", ",shapes"])
def test_an_empty_name_is_not_the_current_folder(name, monkeypatch, own, world):
    monkeypatch.chdir(own("here"))
    assert common.load_dataset(".").name == "."  # which would do as a data set
    with pytest.raises(common.Error, match="no data set or folder"):
        common.load_dataset(name, str(world))
    with pytest.raises(common.Error, match="no data set or folder"):
        softcpt.load_tasks(softcpt.Config(dataset=name, data=str(world)))
