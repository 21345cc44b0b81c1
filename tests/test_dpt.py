"""DPT: its limit cases, CAVPT and losses by hand, and where gradients flow."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import common
import dpt
from tests import conftest
from tests.conftest import (
    NAMES,
    check_learning,
    close,
    gradients,
    normalized,
    plain_image,
    plain_prompts,
    rehearse,
    schedule,
    tiny,
    toy,
    unit,
    words,
)

TINY = {"n_ctx": 4, "n_visual": 2, "top_k": 2, "cavpt_ctx": 3}
initial = functools.partial(conftest.initial, dpt, **TINY)


def logits_of(cfg, clip, prompt, images):
    """The logits of toy()'s classes, as evaluated."""
    z = common.unit_features(clip, images)
    return dpt.classifier(cfg, clip, prompt, toy(), toy())(images, z)


def hand(clip):
    """(3, D) unit features of the hand template."""
    texts = [f"a photo of a {c}.".replace("_", " ") for c in NAMES]
    return unit(clip.encode_text(clip.tokenize(texts)))


def by_hand(clip, prompt, images, T, top):
    """(v, layer logits, attention) of the official code, written out."""
    first, logits, maps = len(clip.blocks()) - len(prompt.cavpt), [], []

    def aware(c, P, X):
        H = T[top] @ c.meta.weight.T + c.meta.bias
        S = torch.cat([X.detach(), c.ctx.expand(len(X), -1, -1)], 1)
        A = (H @ c.query.weight.T) @ (S @ c.key.weight.T).transpose(1, 2) / math.sqrt(32)
        A = A.exp() / A.exp().sum(-1, keepdim=True)
        O = A @ S @ c.value.weight.T
        a = F.layer_norm(O, X.shape[-1:], c.norm_a.weight, c.norm_a.bias)
        Q = F.layer_norm(O + H, X.shape[-1:], c.norm_b.weight, c.norm_b.bias)
        logits.append(a @ c.classify.weight.T)
        maps.append(A)
        return torch.cat([P.expand(len(X), -1, -1), Q], 1)

    rows = dict(enumerate(prompt.visual[:first]))
    for l, c in enumerate(prompt.cavpt, first):
        P = prompt.visual[l : l + 1].flatten(0, 1)  # no row unless --visual_prompts_in_cavpt
        rows[l] = functools.partial(aware, c, P)
    return unit(plain_image(clip, images, rows)), logits, maps


def assembled(clip, **options):
    """(learnables without a norm at its initial 1 and 0, T, the selected classes)."""
    cfg, prompt = initial(clip, **options)
    for c in prompt.cavpt:
        for p in *c.norm_a.parameters(), *c.norm_b.parameters():
            p.data += 0.3 * torch.randn_like(p)
    T = prompt.text(clip, common.embed_names(clip, NAMES, cfg.n_ctx), None)
    return prompt, T, torch.tensor([[0, 2], [1, 0]] * 3)


@pytest.mark.parametrize(
    "options", [{}, {"cavpt_layers": 2}, {"visual_prompts_in_cavpt": True}, {"cavpt_layers": 0}]
)
def test_the_image_branch_is_the_equations_by_hand(odd, options):
    (prompt, T, top), images = assembled(odd, **options), normalized(odd, toy())
    more = "visual_prompts_in_cavpt" in options
    assert len(prompt.visual) == 3 - options.get("cavpt_layers", 1) + more
    ours = dpt.encode(odd, prompt, images, T, top)
    plain = by_hand(odd, prompt, images, T, top)
    weights = [torch.randn(6, 24), *(torch.randn_like(logits) for logits in plain[1])]
    found = []
    for v, logits, _ in ours, plain:
        loss = sum((a * b).sum() for a, b in zip([v, *logits], weights, strict=True))
        found.append([v, *logits, *gradients(loss, list(prompt.parameters()))])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 + 1e-4 * b.abs().max().item())
    for a, b in zip(ours[2], plain[2], strict=True):
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a.sum(-1), torch.ones(()))


def test_without_cavpt_it_is_vpt_deep_with_coop(odd):
    (prompt, T, top), images = assembled(odd, cavpt_layers=0), normalized(odd, toy())
    rows = dict(enumerate(prompt.visual))
    v, _, _ = dpt.encode(odd, prompt, images, T, top)
    assert len(rows) == 3 and torch.allclose(v, unit(plain_image(odd, images, rows)), atol=1e-5)
    cfg, prompt = initial(odd, n_ctx=0, cavpt_layers=0)  # VPT-deep: the hand template
    v = unit(plain_image(odd, images, dict(enumerate(prompt.visual))))
    expected = odd.logit_scale.exp() * v @ hand(odd).T
    assert torch.allclose(logits_of(cfg, odd, prompt, images), expected, atol=1e-4)


def test_without_prompts_and_with_real_words_it_is_zero_shot_clip(clip):
    cfg, prompt = initial(clip, n_visual=0, cavpt_layers=0)
    images = normalized(clip, toy())
    prompt.ctx.data = words(clip, "a photo of a")
    expected = clip.logit_scale.exp() * unit(clip.encode_image(images)) @ hand(clip).T
    assert torch.allclose(logits_of(cfg, clip, prompt, images), expected, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_is_guided_in_the_first_epochs_and_plain_in_the_later_ones(rendered, precision):
    model, clip = tiny(rendered), tiny(rendered, precision)
    cfg, prompt = initial(clip, guidance=1, alpha=0.7, beta=0.2)
    steps, _ = rehearse(dpt, cfg, clip, toy(), prompt, epochs=[0, 1])
    s, T0 = model.logit_scale.exp(), hand(model)
    T = plain_prompts(model, NAMES, prompt.ctx.expand(3, -1, -1))
    for epoch, step in enumerate(steps):
        images, y = next(common.Loader(cfg, model, toy()).epoch(epoch))
        z = unit(model.encode_image(images))
        top = (z @ T0.T).argsort(dim=1, descending=True)[:, :2]
        v, (layer,), _ = by_hand(model, prompt, images, T, top)
        pairs = [(b, top[b].tolist().index(k)) for b, k in enumerate(y) if k in top[b]]
        rows = [-layer[b, j].log_softmax(-1)[y[b]] for b, j in pairs]
        expected = F.cross_entropy(s * v @ unit(T).T, y)
        if epoch == 0:
            expected = 0.2 * expected + F.cross_entropy(s * z @ unit(T).T, y)
            expected = expected + F.cross_entropy(s * v @ T0.T, y)
        expected = expected + 0.7 * sum(rows) / len(rows)
        near = 1e-4 if precision == "fp32" else 0.1
        assert step.loss.item() == pytest.approx(expected.item(), rel=near)


def test_gradients_reach_the_context_through_the_query_alone(odd):
    (prompt, T, top), images = assembled(odd), normalized(odd, toy())
    y = torch.tensor([0, 1] * 3)
    for query, reached in (T, True), (T.detach(), False):
        v, layer, _ = dpt.encode(odd, prompt, images, query, top)
        visual = F.cross_entropy(100 * v @ hand(odd).T, y)  # no learned text in the classifier
        assert gradients(visual, [prompt.ctx])[0].abs().max().gt(0) == reached
    _, layer, _ = dpt.encode(odd, prompt, images, T, top)
    loss = dpt.cavpt_loss(layer, top, y)
    names = [n for n, _ in prompt.named_parameters()]
    found = dict(zip(names, gradients(loss, list(prompt.parameters())), strict=True))
    assert found.pop("visual").abs().max() == 0  # the image tokens are detached there
    without = {"cavpt.0.norm_b.weight", "cavpt.0.norm_b.bias"}
    assert {n for n, g in found.items() if g.abs().max() == 0} == without


def test_training_reaches_every_learnable_and_no_weight_of_clip(clip):
    cfg, prompt = initial(clip)
    (step,), _ = rehearse(dpt, cfg, clip, toy(), prompt)
    check_learning(step, clip, prompt.state_dict())


def test_layer_norms_have_torchs_eps(odd):
    _, prompt = initial(odd)
    (c,) = prompt.cavpt
    for p in c.meta.weight, c.meta.bias, c.value.weight:  # variances near 1e-5
        p.data *= 1e-2
    G, X = torch.randn(2, 2, 24), torch.randn(2, 17, 48)
    Q, logits, A = c(G, X)
    H, S = G @ c.meta.weight.T + c.meta.bias, torch.cat([X, c.ctx.expand(2, -1, -1)], 1)
    O = A @ S @ c.value.weight.T
    for x, found in (O, logits), (O + H, Q):
        centred = x - x.mean(-1, keepdim=True)
        normal = centred / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        assert x.var() < 1e-4
        assert close(found, normal @ c.classify.weight.T if x is O else normal)


def test_the_cavpt_loss_averages_the_true_classes_own_rows():
    logits = [torch.tensor([[[1.0, 2, 0], [0, 3, 1]], [[2, 2, 2], [0, 0, 5]]])]
    logits.append(-logits[0])
    top, y = torch.tensor([[2, 0], [1, 2]]), torch.tensor([0, 0])

    def ce(row, k):
        return math.log(sum(map(math.exp, row))) - row[k]

    both = (ce([0, 3, 1], 0) + ce([0, -3, -1], 0)) / 2  # the second image has no row
    assert dpt.cavpt_loss(logits, top, y).item() == pytest.approx(both)
    four = (ce([0, 3, 1], 0) + ce([0, 0, 5], 2) + ce([0, -3, -1], 0) + ce([0, 0, -5], 2)) / 4
    assert dpt.cavpt_loss(logits, top, torch.tensor([0, 2])).item() == pytest.approx(four)


def test_the_cavpt_loss_is_zero_where_no_true_class_is_selected(odd):
    (prompt, T, top), images = assembled(odd), normalized(odd, toy())
    layer = dpt.encode(odd, prompt, images, T, top)[1]
    loss = dpt.cavpt_loss(layer, top, torch.tensor([1, 2] * 3))
    assert loss.item() == 0 and loss.requires_grad
    assert not any(g.any() for g in gradients(loss, list(prompt.parameters())))
    assert dpt.cavpt_loss([], top, torch.tensor([1, 2] * 3)) == 0


def test_without_a_true_class_only_norm_a_and_classify_get_a_zero_gradient(odd):
    cfg, prompt = initial(odd, top_k=1)
    images = normalized(odd, toy())
    top = (common.unit_features(odd, images) @ hand(odd).T).argmax(1)
    never = [(images, (top + 1) % 3)]
    (step,), _ = rehearse(dpt, cfg, odd, toy(), prompt, never, epochs=[cfg.guidance])
    T = plain_prompts(odd, NAMES, prompt.ctx.expand(3, -1, -1))
    v, _, _ = by_hand(odd, prompt, images, T, top[:, None])
    logits = odd.logit_scale.exp() * v @ unit(T).T
    assert step.loss.item() == pytest.approx(F.cross_entropy(logits, never[0][1]).item(), rel=1e-4)
    alone = {"cavpt.0.norm_a.weight", "cavpt.0.norm_a.bias", "cavpt.0.classify.weight"}
    assert {name for name, g in step.gradients.items() if not g.any()} == alone


def test_steps_without_a_true_class_are_counted(odd, capsys):
    cfg, prompt = initial(odd, top_k=1, batch_size=1)
    images, hits = common.Loader(cfg, odd, toy()), []
    for epoch in 0, 1:
        for x, y in images.epoch(epoch):
            hits.append(((common.unit_features(odd, x) @ hand(odd).T).argmax(1) == y).item())
    missed = hits.count(False)
    assert 0 < missed < len(hits) == 12
    rehearse(dpt, cfg, odd, toy(), prompt, epochs=[0, 1])
    assert f"in {missed} steps no image had its true class" in capsys.readouterr().out
    cfg, prompt = initial(odd, top_k=1, batch_size=1, cavpt_layers=0)
    rehearse(dpt, cfg, odd, toy(), prompt, epochs=[0, 1])
    assert "true class" not in capsys.readouterr().out


def test_parameter_counts_are_those_of_vit_b_32():
    clip = SimpleNamespace(blocks=lambda: range(12), d_t=512, d_v=768, D=512)
    prompt = dpt.DualPrompt(dpt.Config(), clip, 100)
    count = {name: p.numel() for name, p in prompt.named_parameters()}
    assert count.pop("ctx") == 8192 and count.pop("visual") == 84480
    cavpt = {name.split(".", 2)[2]: n for name, n in count.items()}
    assert cavpt["meta.weight"] + cavpt["meta.bias"] == 393984
    assert cavpt["query.weight"] + cavpt["key.weight"] == 49152
    assert cavpt["value.weight"] == 589824 and cavpt["ctx"] == 7680
    assert sum(n for name, n in cavpt.items() if "norm" in name) == 3072
    assert cavpt["classify.weight"] == 76800
    assert sum(cavpt.values()) == 393984 + 49152 + 589824 + 7680 + 3072 + 76800


def test_text_context_and_image_branch_have_their_own_rates_and_warm_ups(odd):
    found = schedule(dpt, odd, toy(), shots=1)
    assert len(found) == 60 and len(schedule(dpt, odd, toy(), shots=2)) == 100
    expected = {0: [1e-5, 1e-5], 1: [0.002, 1e-5], 9: [0.00191395, 1e-5], 10: [0.00189101, 0.01]}
    for e, (text, visual) in expected.items():
        assert found[e] == pytest.approx([text, visual], rel=1e-3)
    assert found[59] == pytest.approx([5.4807e-6, 8.06647e-4], rel=1e-3)


def test_visual_prompts_and_cavpt_are_the_image_branch(odd):
    for rate in 1e-2, 0.0:  # without a rate the text context alone moves after the warm-up
        cfg, prompt = initial(odd, visual_lr=rate, visual_warmup=1)
        steps, _ = rehearse(dpt, cfg, odd, toy(), prompt, epochs=[0, 1], moving=True)
        before = steps[1].before
        moved = {name for name, p in prompt.named_parameters() if not torch.equal(p, before[name])}
        assert moved == (set(before) if rate else {"ctx"})


def test_imagenet_has_its_own_schedule_and_options_override_it(odd):
    source = toy()._replace(name="imagenet")
    found = schedule(dpt, odd, source)
    assert len(found) == 20 and found[1] == [0.002, 0.01]
    found = schedule(dpt, odd, source, visual_warmup=10, epochs=12)
    assert len(found) == 12 and found[9][1] == 1e-5 and found[10][1] == 0.01
    assert schedule(dpt, odd, toy(), visual_warmup=1)[1] == [0.002, 0.01]


def test_with_fewer_classes_than_top_k_every_true_class_is_selected(clip):
    cfg, prompt = initial(clip, top_k=10, guidance=0)
    (step,), _ = rehearse(dpt, cfg, clip, toy(), prompt)
    images, y = next(common.Loader(cfg, clip, toy()).epoch(0))
    top = torch.arange(3).expand(6, -1)
    T = plain_prompts(clip, NAMES, prompt.ctx.expand(3, -1, -1))
    v, (layer,), _ = by_hand(clip, prompt, images, T, top)
    own = F.cross_entropy(layer[torch.arange(6), y], y)
    expected = F.cross_entropy(clip.logit_scale.exp() * v @ unit(T).T, y) + 0.3 * own
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"n_ctx": 0, "cavpt_layers": 0, "guidance": 0}, {"cavpt_layers": 4}, {"n_visual": 0}],
)
def test_limit_cases_train(fit, options):
    assert fit(dpt, dataset="textures", **options) > 0


@pytest.mark.parametrize(
    "options", [{"cavpt_layers": 4}, {"n_ctx": 0}, {"top_k": 0}], ids=["layers", "text", "K"]
)
def test_options_that_leave_no_cavpt_are_refused(odd, options):
    with pytest.raises(common.Error, match="--cavpt_layers"):
        initial(odd, **options)


def test_transfer_to_a_data_set_of_fewer_classes_than_top_k(fit):
    fit(dpt, transfer="textures")
    found = {row["evaluated_on"]: row["n_test"] for row in fit.rows()}
    assert found == {"textures": 8, "shapes": 80}


def test_initial_values_are_small_normal_noise(odd):
    _, prompt = initial(odd, n_ctx=60, n_visual=60, cavpt_ctx=60)
    for p in prompt.ctx, prompt.visual, prompt.cavpt[0].ctx:
        assert p.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_step_with_a_single_true_class_is_not_counted(odd, capsys):
    cfg, prompt = initial(odd, top_k=1)
    images = normalized(odd, toy())
    y = (common.unit_features(odd, images) @ hand(odd).T).argmax(1)
    y[1:] = (y[1:] + 1) % 3
    rehearse(dpt, cfg, odd, toy(), prompt, [(images, y)])
    assert "true class" not in capsys.readouterr().out


def test_other_class_names_have_their_own_prompts_and_selection(odd):
    cfg, prompt = initial(odd)
    images, other = normalized(odd, toy()), toy()._replace(classnames=["dog", *NAMES])
    z, T0 = common.unit_features(odd, images), common.zero_shot_weights(odd, other)[:, 0]
    found = dpt.classifier(cfg, odd, prompt, toy(), other)(images, z)
    T = plain_prompts(odd, other.classnames, prompt.ctx.expand(4, -1, -1))
    top = (z @ T0.T).argsort(dim=1, descending=True)[:, :2]
    expected = odd.logit_scale.exp() * by_hand(odd, prompt, images, T, top)[0] @ unit(T).T
    assert torch.allclose(found, expected, atol=1e-3)
