"""Every method on the emulated device: where its tensors are, what a step asks for, its numbers.

A step is counted from the end of the one before, so with the loading of its batch. An epoch's first
step is not counted: it ends the epoch before, or makes what the later ones find.
"""

import copy
import json
from collections import Counter
from functools import cache, partial

import open_clip
import pytest
import torch

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.nogpu import DEVICE, Emulated
from tests.tools import shapes

NAMES = open_clip.IMAGENET_CLASSNAMES

# A limit is DESIGN's for one step at 12 layers in both towers, 100 classes and batches of 32 (4).
LIMITS = {
    "coop": (coop, {}, 800),
    "dpt, guided": (dpt, {}, 1400),
    "dpt, later": (dpt, {"guidance": 0}, 1400),
    "upt": (upt, {}, 1200),
    "softcpt": (softcpt, {"dataset": "one"}, 1400),
    "enprompt": (enprompt, {}, 850),
}
UPT = {"dropout": 0.0}  # whose random numbers differ between devices
SAMPLED = {"class_rate": 0.5}
OPTIONS = {
    "coop": (coop, {}),
    "coop, per class": (coop, {"csc": True}),
    "coop, per class, middle": (coop, {"csc": True, "position": "middle"}),
    "coop, front": (coop, {"position": "front"}),
    "coop, words": (coop, {"init": "a photo of a"}),
    "dpt": (dpt, {"guidance": 1}),
    "dpt, VLP": (dpt, {"guidance": 1, "cavpt_layers": 0}),
    "dpt, two": (dpt, {"guidance": 1, "cavpt_layers": 2, "visual_prompts_in_cavpt": True}),
    "dpt, VPT": (dpt, {"guidance": 0, "cavpt_layers": 0, "n_ctx": 0}),
    "upt": (upt, UPT),
    "upt, official": (upt, UPT | {"official": True}),
    "upt, text": (upt, UPT | {"side": "text"}),
    "upt, visual": (upt, UPT | {"side": "visual"}),
    "enprompt": (enprompt, {}),
    "enprompt, words": (enprompt, {"enla": "words"}),
    "enprompt, none": (enprompt, {"enla": "none"}),
    "enprompt, no transport": (enprompt, {"ot": False}),
    "enprompt, no strengthening": (enprompt, {"strengthening": False}),
    "softcpt": (softcpt, {}),
    "softcpt, classes": (softcpt, SAMPLED | {"class_context": "shared"}),
    "softcpt, own classes": (softcpt, SAMPLED | {"class_context": "specific"}),
    "softcpt, own tasks": (softcpt, {"task_context": "specific"}),
    "softcpt, one context": (softcpt, {"baseline": "one context"}),
    "softcpt, context per task": (softcpt, {"baseline": "one per task"}),
    "softcpt, official": (softcpt, {"official": True}),
}


@cache
def built(layers):
    """A narrow random CLIP: what a step asks for depends on its layers, not on its width."""
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": layers, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": layers}
    model = open_clip.CLIP(12, vision, text, quick_gelu=True)
    model.visual.image_mean, model.visual.image_std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)
    return model


def toy(classes, train, test, name, root="data"):
    """A data set of random pictures in memory, its classes in turn; other ones for another name."""
    start = {"one": 0, "two": 7}[name]
    generator = torch.Generator().manual_seed(start)
    shape = train + test, 3, 20, 18
    pictures = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    names = NAMES[start : start + classes]
    items = [(picture, i % classes, names[i % classes]) for i, picture in enumerate(pictures)]
    return common.Dataset(name, items[:train], [], items[train:], names)


class World:
    """method.main on a toy world, its steps watched."""

    def __init__(self, patch, out, layers=2, classes=4, train=12, test=12):
        model, tokenize = built(layers), open_clip.get_tokenizer("ViT-B-32")

        def load_clip(cfg):
            return common.Clip(copy.deepcopy(model), tokenize, cfg.device, "fp32")

        patch.setattr(common, "load_clip", load_clip)
        patch.setattr(common, "load_dataset", partial(toy, classes, train, test))
        patch.setattr(common, "evaluate", self.watched(common.evaluate))
        for name in "step", "end_epoch":
            patch.setattr(common.Optimizer, name, self.watched(getattr(common.Optimizer, name)))
        self.out, self.gpu, self.asked = out, None, []

    def watched(self, function):
        """function, which notes what it was and what the device has been asked for till its end."""

        def call(*args):
            result = function(*args)
            if self.gpu:
                counters = self.gpu.launches, self.gpu.waits, self.gpu.copies, self.gpu.places
                self.asked.append((function.__name__, [Counter(c) for c in counters]))
            return result

        return call

    def config(self, cls, device, **options):
        dataset = "one,two" if cls is softcpt.Config else "one"
        usual = {"epochs": 2, "batch_size": 4, "lr": 0.1, "shots": 0, "workers": 2}
        places = {"dataset": dataset, "device": device, "out": str(self.out / device)}
        return cls(**{**usual, **places, **options})

    def run(self, cfg, main):
        """(accuracy, learned tensors, rows of results.json) of main(cfg), on cfg's device."""
        if cfg.device == "nogpu":
            with Emulated() as self.gpu:
                accuracy = main(cfg)
        else:
            accuracy = main(cfg)
        self.gpu, folder = None, common.run_folder(cfg)
        tensors = {}
        if (folder / "prompt.safetensors").exists():
            tensors = common.read_prompt(folder)[0]
        return accuracy, tensors, json.loads((folder / "results.json").read_text("utf-8"))

    def spans(self, kind):
        """(launches, waits, copies, places) from the end of what came before to the end of each
        call of kind; of steps, but for each epoch's first."""
        found = []
        for (before, start), (name, end) in zip(self.asked, self.asked[1:], strict=False):
            if name == kind and before == "step":
                found.append([b - a for a, b in zip(start, end, strict=True)])
        return found


@pytest.fixture
def world(monkeypatch, tmp_path):
    return World(monkeypatch, tmp_path)


def assert_same(ours, theirs):
    """Two results of World.run, but for the device and the time in the rows."""
    (accuracy, tensors, rows), (expected, their_tensors, their_rows) = ours, theirs
    assert accuracy == expected
    torch.testing.assert_close(tensors, their_tensors, rtol=1e-3, atol=1e-5)
    keys = "evaluated_on", "classes", "accuracy", "mean_class_accuracy", "zero_shot", "n_test"
    for row, other in zip(rows, their_rows, strict=True):
        assert [row[key] for key in keys] == [other[key] for key in keys]
        assert row["intra_class_variance"] == pytest.approx(other["intra_class_variance"], 1e-3)


@pytest.mark.parametrize(["method", "options"], OPTIONS.values(), ids=OPTIONS.keys())
def test_a_method_trains_without_a_wait_to_the_numbers_of_the_cpu(world, method, options):
    """And is evaluated: everything is on the device, or this raises."""
    ours = world.run(world.config(method.Config, "nogpu", **options), method.main)
    steps = world.spans("step")
    assert len(steps) >= 4
    for launches, waits, copies, places in steps:
        assert launches and not waits, places
        assert copies["to device"] <= 2 or "class_rate" in options
    for _, waits, *_ in world.spans("end_epoch"):
        assert waits.total() == 1
    assert len(world.spans("end_epoch")) == 2
    theirs = world.run(world.config(method.Config, "cpu", **options), method.main)
    assert_same(ours, theirs)


@pytest.mark.parametrize(["method", "options", "limit"], LIMITS.values(), ids=LIMITS.keys())
def test_a_step_launches_few_kernels(monkeypatch, tmp_path, method, options, limit):
    batch = method.Config().batch_size
    world = World(monkeypatch, tmp_path, 12, 100, train=3 * batch, test=0)
    monkeypatch.setattr(common, "evaluate", lambda *args: 0.0)
    cfg = world.config(method.Config, "nogpu", epochs=1, batch_size=batch, **options)
    with Emulated() as world.gpu:
        method.main(cfg)
    steps = world.spans("step")
    assert len(steps) == 2
    for launches, waits, copies, places in steps:
        assert launches.total() <= limit, launches.most_common(8)
        assert not waits, places
        assert copies["to device"] == 2


DEFAULTS = {name: OPTIONS[name] for name in ("coop", "dpt", "upt", "enprompt", "softcpt")}


@pytest.mark.parametrize(["method", "options"], DEFAULTS.values(), ids=DEFAULTS.keys())
def test_base_new_and_transfer_are_evaluated_as_on_the_cpu(world, method, options):
    transfer = "" if method is softcpt else "two"
    options = options | {"classes": "base", "transfer": transfer, "epochs": 1}
    ours, theirs = (
        world.run(world.config(method.Config, device, **options), method.main)
        for device in ("nogpu", "cpu")
    )
    assert_same(ours, theirs)
    labels = {(row["evaluated_on"], row["classes"]) for row in ours[2]}
    assert labels >= {("one", "base"), ("one", "new"), ("two", "new" if not transfer else "all")}


@pytest.mark.parametrize(["method", "options"], DEFAULTS.values(), ids=DEFAULTS.keys())
def test_an_interrupted_run_ends_as_if_it_had_not_been(world, monkeypatch, method, options):
    whole = world.run(world.config(method.Config, "nogpu", **options), method.main)
    end_epoch, epochs = common.Optimizer.end_epoch, []

    def interrupted(optimizer):
        epochs.append(optimizer)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return end_epoch(optimizer)

    again = world.config(method.Config, "nogpu", **options, force=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Optimizer, "end_epoch", interrupted)
        world.run(again, method.main)
    world.asked.clear()
    resumed = world.run(world.config(method.Config, "nogpu", **options), method.main)
    assert len(world.spans("end_epoch")) == 1  # the second epoch alone was left
    assert_same(resumed, whole)
    for name, tensor in resumed[1].items():
        assert torch.equal(tensor, whole[1][name])


def test_a_finished_run_of_the_device_is_evaluated_on_the_cpu(world):
    cfg = world.config(coop.Config, "nogpu")
    ours = world.run(cfg, coop.main)
    loaded = world.config(coop.Config, "cpu", load=str(common.run_folder(cfg)))
    theirs = world.run(loaded, coop.main)
    assert_same(theirs, ours)
    assert [row["device"] for *_, (row,) in (ours, theirs)] == ["nogpu:0", "cpu"]


@pytest.mark.parametrize("ensemble", [False, True])
def test_zero_shot_clip(world, ensemble):
    cfg = world.config(common.ZeroShot, "nogpu", ensemble=ensemble)
    there = world.run(cfg, common.zero_shot)
    here = world.config(common.ZeroShot, "cpu", ensemble=ensemble)
    assert_same(there, world.run(here, common.zero_shot))


def test_a_model_is_loaded_onto_the_device(tmp_path):
    name = f"local-dir:{shapes.write(tmp_path, 'clip')}"
    here, images = common.load_clip(name, device="cpu"), torch.randn(2, 3, 32, 32)
    with Emulated() as gpu:
        there = common.load_clip(name, device="nogpu")
        assert there.device == there.scale.device == there.mean.device == DEVICE
        assert there.half is None and there.fingerprint == here.fingerprint
        on_device = images.to("nogpu")
        gpu.reset()
        f = common.unit_features(there, on_device)
        assert gpu.launches and not gpu.waits
        torch.testing.assert_close(f.cpu(), common.unit_features(here, images))
