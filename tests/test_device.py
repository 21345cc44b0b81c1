"""Every method on the emulated GPU: where its tensors are, what a step asks for, its numbers.

A step is counted from the end of the previous one, so its batch loading is included. An epoch's
first step is not counted: its requests include a checkpoint, or set-up that later steps reuse.
"""

import contextlib
import itertools
import json
import types
from typing import NamedTuple

import open_clip
import pytest
import torch

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.conftest import interrupted
from tests.emulated_gpu import Emulated
from tests.tools import benchmark

# At most so many launches in a step at 12 layers, 100 classes, batches of 32 and of EnPrompt 4
LIMITS = {
    "coop": (coop, {}, 800),
    "dpt, guided": (dpt, {}, 1400),
    "dpt, later": (dpt, {"guidance": 0}, 1400),
    "upt": (upt, {}, 1200),
    "softcpt": (softcpt, {}, 1400),
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
ZERO_SHOT = types.SimpleNamespace(Config=common.ZeroShot, main=common.zero_shot)
DEFAULTS = {name: OPTIONS[name] for name in ("coop", "dpt", "upt", "enprompt", "softcpt")}


class Run(NamedTuple):
    accuracy: float
    prompt: dict  # the learnables
    rows: list  # the records
    steps: list  # the Counts of each step but an epoch's first
    ends: list  # the Counts of each end of an epoch


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(method, device, ...) is the Run of method.main on two small data sets, or on one."""
    gpu, asked = None, []

    def load_clip(cfg):
        tokenize = open_clip.get_tokenizer("ViT-B-32")
        return common.Clip(benchmark.narrow(2), tokenize, cfg.device)

    def load_dataset(name, root):
        first = {"one": 0, "two": 7}[name]
        return benchmark.noise(tmp_path, 4, 8, name=name, first=first)

    def counted(name):
        function = getattr(common.Optimizer, name)

        def call(*args):
            result = function(*args)
            if gpu:
                asked.append((name, gpu.take()))
            return result

        monkeypatch.setattr(common.Optimizer, name, call)

    def run(method, device, **options):
        nonlocal gpu
        usual = {"dataset": "one,two" if method is softcpt else "one", "device": device}
        usual |= {"epochs": 2, "batch_size": 4, "lr": 0.1, "shots": 0, "out": str(tmp_path)}
        cfg = method.Config(**usual | options)
        asked.clear()
        gpu = Emulated() if device == "nogpu" else None
        with gpu or contextlib.nullcontext():
            accuracy = method.main(cfg)
        folder, prompt = common.run_folder(cfg), {}
        if method is not ZERO_SHOT:
            prompt = common.read_checkpoint(folder / "checkpoint.pt")["prompt"]
        files = sorted(folder.glob("results/*.json"))
        rows = [json.loads(file.read_text("utf-8")) for file in files]
        steps = [after for (x, _), (y, after) in itertools.pairwise(asked) if x == y == "step"]
        ends = [counts for name, counts in asked if name == "end_epoch"]
        return Run(accuracy, prompt, rows, steps, ends)

    monkeypatch.setattr(common, "load_clip", load_clip)
    monkeypatch.setattr(common, "load_dataset", load_dataset)
    counted("step")
    counted("end_epoch")
    return run


def assert_same(ours, theirs):
    """Asserts that two Runs agree in accuracy, learnables and records."""
    assert ours.accuracy == theirs.accuracy
    torch.testing.assert_close(ours.prompt, theirs.prompt, rtol=1e-3, atol=1e-5)
    keys = "evaluated_on", "classes", "accuracy", "mean_class_accuracy", "zero_shot", "n_test"
    for row, other in zip(ours.rows, theirs.rows, strict=True):
        assert [row[key] for key in keys] == [other[key] for key in keys]


@pytest.mark.parametrize(["method", "options"], OPTIONS.values(), ids=OPTIONS.keys())
def test_a_method_trains_without_synchronisation_to_the_numbers_of_the_cpu(run, method, options):
    """And is evaluated: everything is on the device, or this raises."""
    ours = run(method, "nogpu", **options)
    assert len(ours.steps) >= 2 and len(ours.ends) == 2
    for launches, waits, copies, places in ours.steps:
        assert launches and not waits, places
        assert copies["to device"] <= 2 or "class_rate" in options
    for end in ours.ends:
        assert end.waits.total() == 1, end.places
    assert_same(ours, run(method, "cpu", force=True, **options))


@pytest.mark.parametrize(["method", "options", "limit"], LIMITS.values(), ids=LIMITS.keys())
def test_a_step_launches_few_kernels(tmp_path, method, options, limit):
    cfg = method.Config(epochs=1, **options)
    launches, waits, copies, places = benchmark.requests(method, cfg, 12, 100, tmp_path)
    print(f"{launches.total()} launches")
    assert launches.total() <= limit, launches.most_common(8)
    assert not waits, places
    assert copies["to device"] == 2


@pytest.mark.parametrize(["method", "options"], DEFAULTS.values(), ids=DEFAULTS.keys())
def test_base_new_and_transfer_are_evaluated_as_on_the_cpu(run, method, options):
    transfer = "" if method is softcpt else "two"
    options = options | {"classes": "base", "transfer": transfer, "epochs": 1}
    ours = run(method, "nogpu", **options)
    assert_same(ours, run(method, "cpu", force=True, **options))
    found = {(row["evaluated_on"], row["classes"]) for row in ours.rows}
    assert found >= {("one", "base"), ("one", "new"), ("two", "all" if transfer else "new")}


@pytest.mark.parametrize(["method", "options"], DEFAULTS.values(), ids=DEFAULTS.keys())
def test_an_interrupted_run_ends_as_if_it_had_not_been(run, method, options):
    whole = run(method, "nogpu", **options)
    with interrupted(at=len(whole.steps) + 2):  # the last step
        run(method, "nogpu", **options, force=True)
    resumed = run(method, "nogpu", **options)
    assert len(resumed.ends) == 1  # the second epoch alone was left
    assert_same(resumed, whole)
    for name, tensor in resumed.prompt.items():
        assert torch.equal(tensor, whole.prompt[name])


def test_a_finished_run_of_the_device_is_evaluated_on_the_cpu(run):
    ours, theirs = run(coop, "nogpu"), run(coop, "cpu")
    assert_same(theirs, ours)
    devices = [(row["trained"]["device"], row["evaluated"]["device"]) for row in theirs.rows]
    assert devices == [("nogpu", "cpu")]


@pytest.mark.parametrize("ensemble", [False, True])
def test_zero_shot_clip(run, ensemble):
    ours = run(ZERO_SHOT, "nogpu", ensemble=ensemble)
    assert_same(ours, run(ZERO_SHOT, "cpu", ensemble=ensemble))


def test_a_model_is_loaded_onto_the_device(rendered):
    cfg = common.Config(model=f"local-dir:{rendered}/shapes/clip", device="cpu")
    here, images = common.load_clip(cfg), torch.randn(2, 3, 32, 32)
    cfg.device = "nogpu"
    with Emulated() as gpu:
        there, on_device = common.load_clip(cfg), images.to("nogpu")
        assert {x.device.type for x in (there, there.scale, there.mean)} == {"nogpu"}
        assert there.half is None and there.fingerprint == here.fingerprint
        gpu.take()
        f = common.unit_features(there, on_device)
        counts = gpu.take()
        assert counts.launches and not counts.waits
        torch.testing.assert_close(f.cpu(), common.unit_features(here, images))
