"""Training runs that are interrupted, repeated or diverge."""

import gc

import pytest
import torch
from PIL import Image

import common
from tests.conftest import METHODS, interrupted

TEXTURES = {"dataset": "textures", "shots": 4, "batch_size": 8}
INTERRUPTED = {  # options with more to resume than by default
    "coop": {"csc": True},
    "dpt": {},
    "upt": {"official": True},
    "enprompt": {"enla": "words"},
    "softcpt": {"official": True, "dataset": "textures,colours"},
}


def learned(folder):
    """What a run has learned and seen: its tensors, and its losses per epoch as one more."""
    (path,) = folder.rglob("checkpoint.pt")
    state = common.read_checkpoint(path)
    return state["prompt"] | {"losses": torch.tensor(state["trained"]["losses"])}


@pytest.mark.parametrize("name", METHODS)
def test_runs_agree_bit_for_bit_also_when_one_was_interrupted(name, fit, tmp_path):
    method, options = METHODS[name], TEXTURES | {"epochs": 3} | INTERRUPTED[name]
    first = fit(method, out=str(tmp_path / "a"), **options)
    with interrupted(at=8 if name == "softcpt" else 4):  # in the second epoch
        fit(method, out=str(tmp_path / "b"), **options)
    assert len(learned(tmp_path / "b")["losses"]) == 1
    assert not list((tmp_path / "b").rglob("*.json"))
    assert fit(method, out=str(tmp_path / "b"), **options) == first
    a, b = learned(tmp_path / "a"), learned(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    fit(method, out=str(tmp_path / "c"), seed=2, **options)
    c = learned(tmp_path / "c")
    assert not all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("name", METHODS)
def test_a_training_that_diverges_is_one_line_and_keeps_the_epochs_before(name, fit, tmp_path):
    with pytest.raises(common.Error, match="diverged.*--lr"):
        fit(METHODS[name], epochs=9, lr=1e38, **TEXTURES | INTERRUPTED[name])
    state = learned(tmp_path)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert 1 <= len(state["losses"]) < 9
    assert not list(tmp_path.rglob("*.json"))


def living():
    """How many tensors, elements of them, and images this process holds."""
    gc.collect()
    kinds = torch.Tensor, torch.nn.Parameter, Image.Image
    held = [o for o in gc.get_objects() if type(o) in kinds]
    tensors = [o for o in held if type(o) is not Image.Image]
    return len(tensors), sum(tensor.numel() for tensor in tensors), len(held) - len(tensors)


def test_many_runs_in_one_process_take_no_more_memory(fit):
    counts = []
    for seed in range(3):
        for name in METHODS:
            fit(METHODS[name], seed=seed, **TEXTURES | INTERRUPTED[name])
        counts.append(living())
    assert counts[1] == counts[2]  # the first round may fill caches
