"""CoOp: its limit case, what it learns, one step by hand, and its options."""

import pytest
import torch
import torch.nn.functional as F

import common
import coop
from tests.conftest import (
    NAMES,
    gradients,
    plain_prompts,
    rates,
    toy,
    unit,
    untrained,
)


@pytest.mark.parametrize(
    "position, sentence",
    [("end", "a photo of a {}."), ("middle", "a photo {} of a."), ("front", "{} a photo of a.")],
)
def test_with_real_words_in_the_context_coop_is_zero_shot_clip(clip, position, sentence):
    data, options = toy(), {"init": "a photo of a", "position": position}
    _, predictor = untrained(coop, clip, data, **options)
    f = unit(torch.randn(5, 128))
    ids = clip.tokenize([sentence.format(c.replace("_", " ")) for c in NAMES])
    expected = clip.logit_scale.exp() * f @ unit(clip.encode_text(ids)).T
    assert torch.allclose(predictor(data)(f, None), expected, atol=1e-3)
    other = data._replace(classnames=["dog", "cat"])
    assert torch.allclose(predictor(other)(f, None)[:, 1], expected[:, 0], atol=1e-3)


def test_the_context_is_all_that_is_learned(odd):
    for csc, shape in (False, (1, 5, 32)), (True, (3, 5, 32)):
        prompt, _ = untrained(coop, odd, toy(), n_ctx=5, csc=csc)
        assert {name: t.shape for name, t in prompt.state_dict().items()} == {"ctx": shape}
    large, _ = untrained(coop, odd, toy(), n_ctx=60, csc=True)
    assert large.ctx.std().item() == pytest.approx(0.02, rel=0.05) and large.ctx.requires_grad


@pytest.mark.parametrize("csc, position", [(False, "end"), (True, "middle")])
def test_a_step_of_training_is_the_equation_by_hand(clip, tmp_path, csc, position):
    cfg = coop.Config(n_ctx=4, csc=csc, position=position, epochs=2, out=str(tmp_path))
    data, scale = toy(), clip.logit_scale.exp()
    V = untrained(coop, clip, data, n_ctx=4, csc=csc)[0].ctx.detach().clone().requires_grad_()
    velocity = 0
    for epoch, lr in (0, 1e-5), (1, 2e-3):
        f, labels = next(common.loader(cfg, clip, data, frozen=True)(epoch))
        cut = 2 if position == "middle" else 4
        ids = clip.tokenize([" ".join(["X"] * 4 + [f"{c.replace('_', ' ')}."]) for c in NAMES])
        x, w = clip.token_embedding(ids), []
        for k in range(3):  # [SOS] V.. name ..V . [EOS], one class at a time
            v, n = V[k if csc else 0], int(ids[k].argmax()) - 6
            row = torch.cat([x[k, :1], v[:cut], x[k, 5 : 5 + n], v[cut:], x[k, 5 + n :]])[None]
            row = clip.transformer(row + clip.positional_embedding, attn_mask=clip.attn_mask)
            w.append(clip.ln_final(row[0, ids[k].argmax()]) @ clip.text_projection)
        loss = F.cross_entropy(scale * f @ unit(torch.stack(w)).T, labels)
        velocity = 0.9 * velocity + gradients(loss, [V])[0] + 5e-4 * V.detach()
        V = (V.detach() - lr * velocity).requires_grad_()
    prompt, _ = coop.train(cfg, clip, data)
    start = untrained(coop, clip, data, n_ctx=4, csc=csc)[0].ctx
    assert torch.allclose(prompt.ctx, V, atol=1e-3 * (V - start).abs().max().item())
    assert (V - start).abs().max() > 1e-4
    assert all(p.grad is None for p in clip.parameters())


def test_a_class_specific_context_serves_its_class_only(clip):
    prompt, predictor = untrained(coop, clip, toy(), csc=True, n_ctx=4)
    f = unit(torch.randn(2, 128))
    before = predictor(toy())(f, None)
    prompt.ctx.data[1] += torch.randn(4, 128)
    changed = (predictor(toy())(f, None) - before).abs().amax(0)
    assert changed[1] > 0.1 and changed[0] == changed[2] == 0
    w = plain_prompts(clip, NAMES, prompt.ctx)
    logits = clip.logit_scale.exp() * f @ unit(w).T
    assert torch.allclose(predictor(toy())(f, None), logits, atol=1e-3)
    with pytest.raises(common.Error, match="--csc"):
        predictor(toy()._replace(classnames=["dog", "cat", "cow"]))


@pytest.mark.parametrize(
    "shots, name, epochs",
    [(1, "d", 50), (2, "d", 100), (4, "d", 100), (8, "d", 200), (16, "d", 200)]
    + [(16, "imagenet", 50)],
)
def test_epochs_and_rates_are_the_papers(odd, shots, name, epochs):
    found = rates(coop, odd, toy()._replace(name=name), shots=shots)
    assert len(found) == epochs and found[:2] == [[1e-5], [0.002]]


@pytest.mark.parametrize("options", [{"init": "a photo", "csc": True}, {"init": "zzyzx"}])
def test_words_that_cannot_start_a_context_are_refused(odd, options):
    with pytest.raises(common.Error, match="--init"):
        untrained(coop, odd, toy(), **options)


def test_training_lowers_the_loss_on_its_own_images(clip, tmp_path):
    data = toy(12)
    f = common.unit_features(clip, common.views(clip, [item[0] for item in data.train]))
    labels = torch.tensor([item[1] for item in data.train])
    loss = []
    for epochs in 1, 30:
        cfg = coop.Config(epochs=epochs, views=2, out=str(tmp_path))
        loss.append(F.cross_entropy(coop.train(cfg, clip, data)[1](data)(f, None), labels))
    assert loss[1] < 0.8 * loss[0]


def test_a_step_that_fp16_would_lose_moves_the_context(clip):
    half = torch.tensor(0.02, dtype=torch.float16)
    assert half - 7e-6 == half  # the release's learnables; the spacing at 0.02 is 1.5e-5
    prompt, _ = untrained(coop, clip, toy(), n_ctx=1)
    before = prompt.ctx.detach().clone()
    optimizer, _ = common.sgd_cosine(prompt.parameters(), 7e-6, 10, warmup=0)
    common.step(prompt.ctx.sum(), optimizer)
    assert torch.allclose(before - prompt.ctx, torch.tensor(7e-6), rtol=1e-2)
