"""UPT: the transform by hand in both modes, the shared prompts in both towers."""

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F

import common
import upt
from tests.conftest import (
    NAMES,
    gradients,
    plain_image,
    plain_prompts,
    rates,
    rehearsed,
    toy,
    unit,
    untrained,
)


def learner(**options):
    """UnifiedPrompt of the odd CLIP's widths, no norm or bias left at its initial value."""
    torch.manual_seed(0)
    prompt = upt.UnifiedPrompt(upt.Config(**options), 32, 48, 3)
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
def test_the_transform_is_the_equations_by_hand(official):
    prompt = learner(official=official)
    U, (V, P) = by_hand(prompt, not official), prompt()
    P_hand = U[4:] @ prompt.visual.weight.T + prompt.visual.bias
    assert torch.allclose(V[0], U[:4], atol=1e-5) and torch.allclose(P[0], P_hand, atol=1e-5)
    assert V.shape == (1, 4, 32) and P.shape == (1, 4, 48)


@pytest.mark.parametrize("official", [False, True])
def test_rows_reach_each_other_unless_official(official):
    prompt = learner(official=official)
    before = prompt.transform().detach()
    prompt.prompts.data[0, 7] += 1
    changed = (prompt.transform() - before)[0].abs().amax(1)
    assert changed[7] > 1e-3
    assert (changed[:7] == 0).all() if official else (changed[:7] > 0).all()


def test_one_pass_serves_both_towers_unless_official(odd):
    for official, passes in (False, 1), (True, 2):
        prompt, count = learner(official=official).train(), []
        prompt.norm1.register_forward_hook(lambda *args, count=count: count.append(args))
        V, P = prompt()
        assert len(count) == passes
        S = [args[2] for args in count]
        assert passes == 1 or not torch.equal(*S)  # two passes have dropout masks of their own
    assert not torch.equal(prompt()[0], prompt()[0])  # dropout while training
    assert torch.equal(prompt.eval()()[0], prompt()[0])
    _, predictor = untrained(upt, odd, toy())
    f, images = torch.zeros(2, 24), torch.rand(2, 3, 32, 32)
    assert torch.equal(predictor(toy())(f, images), predictor(toy())(f, images))


def test_the_parameters_number_1976064_at_vit_b_16():
    prompt = upt.UnifiedPrompt(upt.Config(), 512, 768, 12)
    assert sum(p.numel() for p in prompt.parameters() if p.requires_grad) == 1_976_064
    assert prompt.prompts.std().item() == pytest.approx(0.02, rel=0.05)


def test_at_vit_b_16_the_prompts_join_196_patches_before_ln_pre():
    config, seen = open_clip.get_model_config("ViT-B-16"), []
    vision, text = config["vision_cfg"] | {"layers": 1}, config["text_cfg"] | {"layers": 1}
    clip = open_clip.CLIP(512, vision, text).requires_grad_(False).eval()
    clip.tokenize, clip.half_dtype = open_clip.get_tokenizer("ViT-B-16"), None
    clip.visual.ln_pre.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    clip.visual.transformer.resblocks[0].ln_1.register_forward_hook(
        lambda *args: seen.append(args[2])
    )
    prompt, predictor = untrained(upt, clip, toy())
    predictor(toy())(None, torch.zeros(1, 3, 224, 224))
    assert [x.shape for x in seen] == [(1, 1 + 4 + 196, 768)] * 2
    rows = {tuple(row[:8].tolist()) for row in seen[0][0].detach()}
    assert all(tuple(row[:8].tolist()) in rows for row in prompt.eval()()[1][0].detach())


@pytest.mark.parametrize(
    "options", [{}, {"official": True}, {"deep": True}, {"side": "text"}, {"side": "visual"}]
)
def test_logits_are_those_of_the_plain_towers(odd, options):
    prompt, predictor = untrained(upt, odd, toy(), **options)
    images = torch.randn(5, 3, 32, 32)
    U = by_hand(prompt, not options.get("official"))
    ids = odd.tokenize([f"a photo of a {c}.".replace("_", " ") for c in NAMES])
    w, rows = odd.encode_text(ids), {}  # visual alone is VPT-shallow with the hand template
    if options.get("side") != "visual":
        w, U = plain_prompts(odd, NAMES, U[:4].expand(3, -1, -1)), U[4:]
    if options.get("side") != "text":  # text alone is CoOp
        P = U @ prompt.visual.weight.T + prompt.visual.bias
        rows = {-1: P}
    if options.get("deep"):
        rows = {i: P[i::3] for i in range(3)}  # prompt-major, as in the release
    v = plain_image(odd, images, rows)
    expected = odd.logit_scale.exp() * unit(v) @ unit(w).T
    found = predictor(toy())(None, images)
    assert torch.allclose(found, expected, atol=1e-3)
    other = predictor(toy()._replace(classnames=["dog", NAMES[2]]))(None, images)
    assert torch.allclose(other[:, 1], found[:, 2], atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"official": True}, {"deep": True}])
def test_the_loss_is_cross_entropy_and_reaches_every_learnable(odd, options):
    losses, prompt = rehearsed(upt, odd, toy(), epochs=1, dropout=0.0, **options)
    predictor = untrained(upt, odd, toy(), **options)[1]
    images, y = next(common.loader(upt.Config(), odd, toy())(0))
    assert losses[0].item() == pytest.approx(
        F.cross_entropy(predictor(toy())(None, images), y).item(), rel=1e-4
    )
    found = gradients(losses[0], list(prompt.parameters()))
    assert all(g.abs().max() > 0 for g in found)
    assert {p.dtype for p in prompt.parameters()} == {torch.float32}


def test_training_has_dropout_and_evaluation_has_none(odd):
    losses, prompt = rehearsed(upt, odd, toy(), epochs=2)
    assert prompt.training and prompt.drop.p == prompt.attention.dropout == 0.1
    dry, _ = rehearsed(upt, odd, toy(), epochs=2, dropout=0.0)
    assert losses[0] != dry[0]


@pytest.mark.parametrize("side", ["text", "visual"])
def test_a_script_with_one_side_switched_off_runs(fit, side):
    assert fit(upt, dataset="textures", side=side) > 0


@pytest.mark.parametrize("shots, epochs", [(1, 50), (4, 100), (16, 200)])
def test_epochs_follow_coops_table(odd, shots, epochs):
    found = rates(upt, odd, toy(), shots=shots)
    assert len(found) == epochs and set(found[1]) == {0.002}
    assert len(rates(upt, odd, toy()._replace(name="imagenet"))) == 50


def test_a_resnet_is_refused(resnet):
    with pytest.raises(common.Error, match="ViT-B-16"):
        untrained(upt, resnet, toy())
