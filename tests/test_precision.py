"""Which tensors are fp32 where CLIP runs in fp16 or bf16, and that fp16 gradients are finite."""

import inspect
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

import common
import dpt
import softcpt
from tests import conftest
from tests.conftest import METHODS, gradients, normalized, rehearse, tiny, toy


@pytest.fixture(scope="module")
def clips(rendered):
    return {precision: tiny(rendered, precision) for precision in ("fp32", "amp", "bf16")}


def initial(name, clip, count):
    """(Config, data of count images, learnables); of SoftCPT two tasks and a class context."""
    data, more = toy(count), {}
    if name == "softcpt":
        sets = [toy(count // 2), toy(count // 2)._replace(name="other")]
        data, more = softcpt.tasks_of(softcpt.Config(), sets), {"class_context": "shared"}
    cfg, prompt = conftest.initial(METHODS[name], clip, data, batch_size=32, **more)
    return cfg, data, prompt


@pytest.fixture
def record(monkeypatch):
    """record(method, prompt) returns {name: dtypes of arguments and results} of method's functions
    and modules, and of normalize and cross_entropy."""
    found = defaultdict(set)

    def note(name, *values):
        for x in values:
            if isinstance(x, tuple | list):
                note(name, *x)
            elif isinstance(x, torch.Tensor) and x.is_floating_point():
                found[name].add(x.dtype)
        return values[-1] if values else None

    def noted(name, function):
        return lambda *x, **more: note(name, x, function(*x, **more))

    def record(method, prompt):
        own = [(method, name) for name, _ in inspect.getmembers(method, inspect.isfunction)]
        for place, name in [*own, (F, "normalize"), (F, "cross_entropy")]:
            monkeypatch.setattr(place, name, noted(name, getattr(place, name)))
        for module in prompt.modules():
            module.register_forward_hook(lambda m, *values: note(type(m).__name__, *values))
        return found

    return record


@pytest.mark.parametrize("precision", ["fp32", "amp", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_learnables_gradients_logits_and_losses_are_fp32(clips, record, name, precision):
    method, clip = METHODS[name], clips[precision]
    cfg, data, prompt = initial(name, clip, 6)
    found, images = record(method, prompt), normalized(clip, toy())
    (step,), _ = rehearse(method, cfg, clip, data, prompt)
    target, f = data.sets[1] if name == "softcpt" else data, common.unit_features(clip, images)
    predict = method.classifier(cfg, clip, prompt, data, target)
    logits = predict(images, f) if callable(predict) else f @ predict.T
    rest = logits, step.loss, *prompt.parameters(), *step.gradients.values()
    found["the rest"] = {x.dtype for x in rest}
    more = {"dpt": {"ClassAware", "cavpt_loss"}, "enprompt": {"sinkhorn", "transport"}}
    assert found.keys() >= {"normalize", "cross_entropy"} | more.get(name, set())
    assert all(dtypes == {torch.float32} for dtypes in found.values()), found


def test_the_cavpt_losss_gradients_are_finite_at_every_scale(clips):
    clip = clips["amp"]
    cfg, data, prompt = initial("dpt", clip, 32)
    images, y = normalized(clip, data), torch.tensor([label for _, label, _ in data.train])
    T0, z = common.zero_shot_weights(clip, data)[:, 0], common.unit_features(clip, images)
    T = prompt.text(clip, common.embed_names(clip, data.classnames, cfg.n_ctx), T0)
    top = dpt.selected(cfg, z, T0)
    L_ca = dpt.cavpt_loss(dpt.encode(clip, prompt, images, T, top)[1], top, y)
    for k in range(17):  # GradScaler begins at 2**16
        found = gradients(2.0**k * L_ca, list(prompt.parameters()))
        assert L_ca > 0 and all(g.isfinite().all() for g in found), k


@pytest.mark.parametrize("name", METHODS)
def test_the_first_steps_scaled_gradients_are_finite_in_fp16(clips, name):
    cfg, data, prompt = initial(name, clips["amp"], 32)
    steps, _ = rehearse(METHODS[name], cfg, clips["amp"], data, prompt, epochs=[0, 30])
    for step in steps:  # of DPT a guided and a later one
        assert all(g.isfinite().all() and g.any() for g in step.gradients.values())
