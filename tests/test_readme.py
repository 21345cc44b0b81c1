"""README keeps its word: its Python runs, the lines, tests and options that it names exist."""

import importlib
import re
import shlex

import pytest
import torch

import common
import coop
from tests.conftest import HERE, toy, unit

README = (HERE / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_python_examples_run_on_ones_own_tensors(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(coop.EPOCHS, 16, 2)
    mine = {"my_pairs": [item[:2] for item in toy().train[::3] + toy().train[1::3]]}
    mine["my_images"] = [item[0] for item in toy().train]
    for text in blocks("python"):
        text = text.replace('"ViT-B-16", "openai"', f'"local-dir:{world}/shapes/clip", ""')
        exec(text.replace('"cuda", "amp"', '"cpu", "fp32"'), mine)
    found, clip, w, x = (mine[name] for name in ("logits", "clip", "w", "x"))
    own = clip.logit_scale.exp() * unit(clip.encode_image(x)) @ unit(w).T
    assert found.shape == (6, 2) and torch.allclose(own, found, atol=1e-3)
    assert list(tmp_path.rglob("prompt.safetensors"))


def test_every_line_and_length_is_as_the_tables_say():
    guide = re.findall(r"^\| `(\w+\.py)` \|(.*) \|$", README, re.M)
    named = [(file, *pair) for file, row in guide for pair in re.findall(r"`(\w+)` (\d+)", row)]
    assert len(named) > 12
    for file, name, line in named:
        assert name in (HERE / file).read_text().splitlines()[int(line) - 1], (file, name)
    sizes = re.findall(r"`(\w+\.py)` \((\d+)\)", README)
    assert len(sizes) == 5
    for file, size in sizes:
        assert len((HERE / file).read_text().splitlines()) == int(size), file


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(test_\w+\.py)`: `(test_\w+)`", README)
    assert len(named) > 8
    for file, test in named:
        assert f"def {test}(" in (HERE / "tests" / file).read_text(), test


def commands():
    for block in blocks("bash"):
        for line in re.findall(r"python (\w+\.py .*?)(?:'$|$)", block, re.M):
            yield shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "1"), comments=True)


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_every_command_is_understood(command):
    script, *flags = command
    if flags[0] != "report":
        module = "tests.zero_shot" if script == "common.py" else script[:-3]
        common.cli(importlib.import_module(module).Config, flags)
