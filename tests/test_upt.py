"""UPT: the transform by hand in both modes, the shared prompts in both towers."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import common
import upt
from tests import conftest
from tests.conftest import (
    NAMES,
    built,
    check_learning,
    plain_image,
    plain_prompts,
    rehearse,
    schedule,
    toy,
    unit,
)

initial = functools.partial(conftest.initial, upt)


def logits_of(cfg, clip, prompt, images, data=None):
    """The logits of the classes of data, or of toy(), as evaluated."""
    return upt.classifier(cfg, clip, prompt, toy(), data or toy())(images, None)


def moved(clip, **options):
    """The learnables in evaluation mode, no norm or bias left at its initial value."""
    _, prompt = initial(clip, **options)
    for p in prompt.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return prompt.eval()


def by_hand(prompt, mixing=True):
    """U^ (2M, d_t) of the official code, written out."""
    U, a = prompt.prompts[0], prompt.attention
    Q, K, V = (U @ a.in_proj_weight.T + a.in_proj_bias).chunk(3, 1)
    A = (Q @ K.T / math.sqrt(32)).softmax(1) if mixing else torch.eye(len(U))
    O = (A @ V) @ a.out_proj.weight.T + a.out_proj.bias
    S = F.layer_norm(U + O, (32,), prompt.norm1.weight, prompt.norm1.bias)
    hidden = F.layer_norm(S, (32,), prompt.norm2.weight, prompt.norm2.bias)
    hidden = (hidden @ prompt.linear1.weight.T + prompt.linear1.bias).clamp(min=0)
    return S + hidden @ prompt.linear2.weight.T + prompt.linear2.bias


@pytest.mark.parametrize("official", [False, True])
def test_the_transform_is_the_equations_by_hand(odd, official):
    prompt = moved(odd, official=official)
    U, (V, P) = by_hand(prompt, not official), prompt()
    P_hand = U[4:] @ prompt.visual.weight.T + prompt.visual.bias
    assert torch.allclose(V[0], U[:4], atol=1e-5) and torch.allclose(P, P_hand, atol=1e-5)
    assert V.shape == (1, 4, 32) and P.shape == (4, 48)


@pytest.mark.parametrize("official", [False, True])
def test_rows_reach_each_other_unless_official(odd, official):
    prompt = moved(odd, official=official)
    before = prompt.transform().detach()
    prompt.prompts.data[0, 7] += 1
    changed = (prompt.transform() - before)[0].abs().amax(1)
    assert changed[7] > 1e-3
    assert (changed[:7] == 0).all() if official else (changed[:7] > 0).all()


def test_one_pass_serves_both_towers_unless_official(odd):
    for official, passes in (False, 1), (True, 2):
        prompt, count = moved(odd, official=official).train(), []
        prompt.norm1.register_forward_hook(lambda *args, count=count: count.append(args))
        V, P = prompt()
        assert len(count) == passes
        S = [args[2] for args in count]
        assert passes == 1 or not torch.equal(*S)  # two passes have dropout masks of their own
    assert not torch.equal(prompt()[0], prompt()[0])  # dropout while training
    assert torch.equal(prompt.eval()()[0], prompt()[0])
    images, (cfg, prompt) = torch.rand(2, 3, 32, 32), initial(odd)
    prompt.train()
    found = [logits_of(cfg, odd, prompt, images) for _ in range(2)]
    assert torch.equal(*found)  # evaluation has none


def test_the_parameters_number_1976064_at_vit_b_16():
    prompt = upt.UnifiedPrompt(upt.Config(), SimpleNamespace(d_t=512, d_v=768, blocks=list))
    assert sum(p.numel() for p in prompt.parameters() if p.requires_grad) == 1_976_064
    assert prompt.prompts.std().item() == pytest.approx(0.02, rel=0.05)


def test_prompts_follow_the_196_patches_of_vit_b_16_before_ln_pre():
    clip, seen = built(image_size=224, patch_size=16, layers=1), []
    for layer in clip.visual.ln_pre, clip.blocks()[0].ln_1:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    cfg, prompt = initial(clip)
    logits_of(cfg, clip, prompt, torch.zeros(1, 3, 224, 224))
    assert [x.shape for x in seen] == [(1, 1 + 196 + 4, 48)] * 2
    assert torch.allclose(seen[0][0, -4:], prompt()[1])  # behind the patches: no mask, no position


@pytest.mark.parametrize(
    "options", [{}, {"official": True}, {"side": "text"}, {"side": "visual"}], ids=str
)
def test_logits_are_those_of_the_plain_towers(odd, options):
    cfg, prompt = initial(odd, **options)
    images = torch.randn(5, 3, 32, 32)
    U = by_hand(prompt, not options.get("official"))
    ids = odd.tokenize([f"a photo of a {c}.".replace("_", " ") for c in NAMES])
    w, rows = odd.encode_text(ids), {}  # visual alone is VPT-shallow with the hand template
    if options.get("side") != "visual":
        w, U = plain_prompts(odd, NAMES, U[:4].expand(3, -1, -1)), U[4:]
    if options.get("side") != "text":  # text alone is CoOp
        P = U @ prompt.visual.weight.T + prompt.visual.bias
        rows = {-1: P}
    v = plain_image(odd, images, rows)
    expected = odd.logit_scale.exp() * unit(v) @ unit(w).T
    found = logits_of(cfg, odd, prompt, images)
    assert torch.allclose(found, expected, atol=1e-3)
    other = toy()._replace(classnames=["dog", NAMES[2]])
    assert torch.allclose(logits_of(cfg, odd, prompt, images, other)[:, 1], found[:, 2], atol=1e-3)


@pytest.mark.parametrize("official", [False, True])
def test_the_loss_is_cross_entropy_and_reaches_every_learnable(odd, official):
    cfg, prompt = initial(odd, dropout=0.0, official=official)
    (step,), _ = rehearse(upt, cfg, odd, toy(), prompt)
    images, y = next(common.Loader(cfg, odd, toy()).epoch(0))
    expected = F.cross_entropy(logits_of(cfg, odd, prompt, images), y)
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    check_learning(step, odd, prompt.state_dict())


def test_training_has_dropout_unless_it_is_zero(odd):
    losses = []
    for dropout in 0.1, 0.0:
        cfg, prompt = initial(odd, dropout=dropout)
        prompt.eval()  # train must switch it on itself
        batch = [next(common.Loader(cfg, odd, toy()).epoch(0))]
        steps, _ = rehearse(upt, cfg, odd, toy(), prompt, batch * 2)
        losses.append([step.loss.item() for step in steps])
        assert prompt.training and prompt.drop.p == prompt.attention.dropout == dropout
    (first, second), (dry, again) = losses
    assert first != second and dry == again


@pytest.mark.parametrize("options", [{"side": "text"}, {"side": "visual"}, {"official": True}])
def test_its_options_run(fit, options):
    assert fit(upt, dataset="textures", **options) > 0


@pytest.mark.parametrize("shots, epochs", [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_epochs_follow_coops_table(odd, shots, epochs):
    found = schedule(upt, odd, toy(), shots=shots)
    assert len(found) == epochs and found[:2] == [[1e-5], [0.002]]
    source = toy()._replace(name="imagenet")
    assert len(schedule(upt, odd, source)) == 50 and len(schedule(upt, odd, source, epochs=3)) == 3


@pytest.mark.parametrize("options", [{"n_ctx": 0}, {"dropout": 1.0}, {"dropout": -0.1}], ids=str)
def test_options_out_of_range_are_refused(odd, options):
    with pytest.raises(common.Error, match="--" + "".join(options)):
        initial(odd, **options)


def test_dropout_follows_the_attention_the_relu_and_the_last_layer(odd):
    prompt, seen = moved(odd), []
    for name, layer in prompt.named_children():
        layer.register_forward_hook(lambda layer, x, y, name=name: seen.append(name))
    prompt.transform()
    assert seen == "attention drop norm1 norm2 linear1 drop linear2 drop".split()
