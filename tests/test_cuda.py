"""On a CUDA device: features, gradients, batches, runs and records against the CPU's in fp32."""

import pytest
import torch

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.conftest import NAMES, gradients, toy, words

DEVICE = "cuda"
TOLERANCE = {"fp32": 1e-4, "amp": 1e-2, "bf16": 8e-2}  # relative to the largest value
METHODS = [coop, dpt, upt, enprompt, softcpt]
missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu, missing]


def pair(world, precision):
    """The tiny CLIP on the CPU in fp32, and on the device."""
    name = f"local-dir:{world}/shapes/clip"
    on_device = common.load_clip(name, "", DEVICE, precision)
    return common.load_clip(name, "", "cpu", "fp32"), on_device


def apart(ours, reference):
    return (ours.float().cpu() - reference).abs().max() / reference.abs().max()


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_towers_and_gradients_are_those_of_the_cpu(world, precision, position):
    found = []
    for clip in pair(world, precision):
        prompt = coop.PromptLearner(coop.Config(n_ctx=4, position=position), clip, len(NAMES))
        start = words(clip, "a photo of a") if not found else found[0][-1]
        prompt.ctx.data = start.detach().to(clip.device)
        w, ctx = prompt(clip, common.embed_names(clip, NAMES, 4)), prompt.ctx
        torch.manual_seed(0)
        images = torch.randn(4, 3, 32, 32).to(clip.device)
        rows = torch.randn(2, 128).to(clip.device).requires_grad_()
        f = common.encode_image(clip, images, lambda i, x, rows=rows: rows if i < 1 else None)
        loss = clip.scale * w.square()[:, 0].sum() + f.square()[:, 0].sum()  # else fp16 underflows
        found.append((w, f, *gradients(loss, [ctx, rows]), ctx))
    for reference, ours in zip(*found, strict=True):
        assert apart(ours.detach(), reference.detach()) < TOLERANCE[precision]


def test_views_and_batches_are_those_of_the_cpu(world):
    cfg, epochs = common.Config(), []
    for clip in pair(world, "amp"):
        images, labels = next(common.Loader(cfg, clip, toy()).epoch(0))
        assert images.device.type == labels.device.type == clip.device.type
        epochs.append((images, labels.float()))
    for reference, ours in zip(*epochs, strict=True):
        assert apart(ours, reference) < 1e-6


def test_an_overflow_in_fp16_is_skipped_on_the_device(world):
    _, clip = pair(world, "amp")
    p = torch.nn.Parameter(torch.ones(1, device=DEVICE))
    optimizer = common.Optimizer(common.Config(), clip, [p], 2)
    before = optimizer.scaler.get_scale()
    optimizer.step((p * float("inf")).sum())
    assert p.item() == 1 and optimizer.scaler.get_scale() == before / 2
    optimizer.end_epoch()
    optimizer.step(p.sum())
    assert p.item() < 1


@pytest.mark.parametrize("method", [coop, dpt, enprompt], ids=lambda method: method.__name__)
def test_a_run_ends_near_the_one_on_the_cpu(fit, tmp_path, method):
    prompts = []
    for device in "cpu", DEVICE:
        options = {
            "device": device,
            "precision": "fp32",
            "epochs": 2,
            "out": str(tmp_path / device),
        }
        fit(method, batch_size=8, **options)
        folder = next((tmp_path / device).rglob("prompt.safetensors")).parent
        prompts.append(common.read_prompt(folder)[0])
    for name, reference in prompts[0].items():
        assert apart(prompts[1][name], reference) < 2e-2, name


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_run_is_recorded_with_its_device_precision_and_peak_memory(fit, method):
    accuracy = fit(method, device=DEVICE, epochs=2, batch_size=8)
    row = fit.rows()[-1]
    assert 0 < accuracy <= 100 and row["accuracy"] >= 0
    assert row["device"].startswith(DEVICE) and row["peak_gpu_mb"] > 0
    assert row["precision"] in ("torch.float16", "amp")
    assert fit(method, device=DEVICE, epochs=2, batch_size=8) == accuracy
