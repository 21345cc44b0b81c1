"""On a CUDA device: its features, losses and records against those of the CPU in fp32."""

import pytest
import torch

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.conftest import NAMES, gradients, rehearsed, toy, words

DEVICE = "cuda"
TOLERANCE = {"fp32": 1e-4, "amp": 1e-2, "bf16": 8e-2}  # relative to the largest value
missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu, missing]


def loaded(world, precision):
    """The tiny CLIP on the CPU in fp32 and on the device; load_clip itself keeps only one."""
    load, place = common.load_clip.__wrapped__, f"local-dir:{world}/shapes/clip"
    return load(place, "", "cpu", "fp32"), load(place, "", DEVICE, precision)


def apart(ours, reference):
    return (ours.float().cpu() - reference).abs().max() / reference.abs().max()


@pytest.mark.parametrize("precision", TOLERANCE)
def test_towers_and_gradients_are_those_of_the_cpu(world, precision):
    found = []
    for clip in loaded(world, precision):
        device = clip.logit_scale.device
        ctx = words(clip, "a photo of a") if device.type == "cpu" else found[0][-1].to(device)
        ctx = ctx.detach().clone().requires_grad_()
        w = common.encode_prompts(clip, common.embed_names(clip, NAMES, 4), ctx)
        torch.manual_seed(0)
        images = torch.randn(4, 3, 32, 32).to(device)
        rows = torch.randn(2, 128).to(device).requires_grad_()
        f = common.encode_image(clip, images, lambda i, x, rows=rows: rows if i < 1 else None)
        slopes = gradients(w.square()[:, 0].sum() + f.square()[:, 0].sum(), [ctx, rows])
        found.append((w, f, *slopes, ctx))
    for ours, reference in zip(found[1], found[0], strict=True):
        assert apart(ours, reference.detach()) < TOLERANCE[precision]


@pytest.mark.parametrize("method", [coop, dpt, enprompt], ids=lambda m: m.__name__)
def test_the_losses_of_an_epoch_are_those_of_the_cpu(world, method):
    reference, ours = (
        torch.stack(rehearsed(method, clip, toy(), epochs=2)[0]) for clip in loaded(world, "amp")
    )
    assert apart(ours, reference) < 2e-2


@pytest.mark.parametrize("method", [coop, dpt, upt, enprompt, softcpt], ids=lambda m: m.__name__)
def test_a_run_is_recorded_with_its_device_precision_and_peak_memory(fit, method):
    accuracy = fit(method, device=DEVICE, epochs=2, batch_size=8)
    row = fit.rows()[-1]
    assert 0 < accuracy <= 100 and row["accuracy"] >= 0
    assert (row["device"], row["precision"]) == (DEVICE, "amp") and row["peak_gpu_mb"] > 0
    again = fit(method, device=DEVICE, epochs=2, batch_size=8)
    assert again == accuracy
