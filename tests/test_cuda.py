"""On a CUDA device: features, gradients, batches, runs and records against the CPU's in fp32."""

import pytest
import torch

import common
from tests import conftest
from tests.conftest import METHODS, NAMES, gradients, tiny, toy, words

DEVICE = "cuda"
TOLERANCE = {"fp32": 1e-4, "amp": 1e-2, "bf16": 8e-2}  # relative to the largest value
missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu, missing]


def pair(rendered, precision):
    """The tiny CLIP on the CPU in fp32, and on the device."""
    return tiny(rendered), tiny(rendered, precision, DEVICE)


def apart(ours, reference):
    return (ours.float().cpu() - reference).abs().max() / reference.abs().max()


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_towers_and_gradients_are_those_of_the_cpu(rendered, precision, position):
    found = []
    for clip in pair(rendered, precision):
        _, prompt = conftest.initial(METHODS["coop"], clip, n_ctx=4, position=position)
        context = words(clip, "a photo of a") if not found else found[0][-1]
        prompt.ctx.data = context.detach().to(clip.device)
        w, ctx = prompt(clip, *prompt.embed(clip, NAMES)), prompt.ctx
        torch.manual_seed(0)
        images = torch.randn(4, 3, 32, 32).to(clip.device)
        rows = torch.randn(2, 128).to(clip.device).requires_grad_()
        f = common.encode_image(clip, images, lambda i, x, rows=rows: rows if i < 1 else None)
        loss = clip.scale * w.square()[:, 0].sum() + f.square()[:, 0].sum()  # else fp16 underflows
        found.append((w, f, *gradients(loss, [ctx, rows]), ctx))
    for reference, ours in zip(*found, strict=True):
        assert apart(ours.detach(), reference.detach()) < TOLERANCE[precision]


def test_batches_of_augmented_images_are_those_of_the_cpu(rendered):
    cfg, epochs = common.Config(), []
    for clip in pair(rendered, "amp"):
        images, labels = next(common.Loader(cfg, clip, toy()).epoch(0))
        assert images.device.type == labels.device.type == clip.device.type
        epochs.append((images, labels.float()))
    for reference, ours in zip(*epochs, strict=True):
        assert apart(ours, reference) < 1e-6


def test_an_overflow_in_fp16_is_skipped_on_the_device(rendered):
    _, clip = pair(rendered, "amp")
    p = torch.nn.Parameter(torch.ones(1, device=DEVICE))
    optimizer = common.Optimizer(common.Config(), clip, [p], 2)
    before = optimizer.scaler.get_scale()
    optimizer.step((p * 1e34).sum())
    assert p.item() == 1 and optimizer.scaler.get_scale() == before / 2
    optimizer.end_epoch()
    optimizer.step(p.sum())
    assert p.item() < 1


@pytest.mark.parametrize("name", ["coop", "dpt", "enprompt"])
def test_a_run_ends_near_the_one_on_the_cpu(fit, tmp_path, name):
    prompts = []
    for device in "cpu", DEVICE:
        options = {"device": device, "out": str(tmp_path / device), "precision": "fp32"}
        fit(METHODS[name], batch_size=8, epochs=2, **options)
        (path,) = (tmp_path / device).rglob("checkpoint.pt")
        prompts.append(common.read_checkpoint(path)["prompt"])
    for name, reference in prompts[0].items():
        assert apart(prompts[1][name], reference) < 2e-2, name


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_recorded_with_its_device_precision_and_peak_memory(fit, name):
    options = {"device": DEVICE, "epochs": 2, "batch_size": 8}
    accuracy = fit(METHODS[name], **options)
    row = fit.rows()[-1]
    assert 0 < accuracy <= 100 and row["accuracy"] >= 0
    for part in row["trained"], row["evaluated"]:
        assert part["device"] == DEVICE and part["precision"] == "amp"
    assert row["trained"]["peak_gpu_mb"] > 0
    assert fit(METHODS[name], **options) == accuracy
