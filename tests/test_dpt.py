"""DPT: its limit cases, CAVPT and losses by hand, and where gradients flow."""

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F

import common
import dpt
from tests.conftest import (
    NAMES,
    gradients,
    new_prompt,
    plain_image,
    plain_prompts,
    rehearse,
    schedule,
    toy,
    unit,
    words,
)

TINY = {"n_ctx": 4, "n_visual": 2, "top_k": 2, "cavpt_ctx": 3}


def start(clip, **options):
    """(Config, DualPrompt at its start) for the classes of toy()."""
    cfg = dpt.Config(**TINY | options)
    return cfg, new_prompt(dpt, cfg, clip, toy())


def logits_of(cfg, clip, prompt, images):
    """The logits of toy()'s classes, as evaluated."""
    z = common.unit_features(clip, images)
    return dpt.classifier(cfg, clip, prompt, toy())(images, z)


def views(clip, count=6):
    return common.views(clip, [item[0] for item in toy(count).train])


def hand(clip):
    """(3, D) unit features of the hand template."""
    texts = [f"a photo of a {c}.".replace("_", " ") for c in NAMES]
    return unit(clip.encode_text(clip.tokenize(texts)))


def by_hand(clip, prompt, images, T, top, official=True):
    """(features, layer logits, attention) of the official code, written out."""
    v, n, logits, maps = clip.visual, 1 + 16, [], []
    x = v.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1)
    x, blocks = v.ln_pre(x + v.positional_embedding), v.transformer.resblocks
    J = len(blocks) - len(prompt.cavpt)
    for P, block in zip(prompt.visual[:J], blocks, strict=False):
        x = block(torch.cat([x, P.expand(len(x), -1, -1)], 1))[:, :n]
    for r, (c, block) in enumerate(zip(prompt.cavpt, blocks[J:], strict=True)):
        H = T[top] @ c.meta.weight.T + c.meta.bias
        S = torch.cat([x.detach(), c.ctx.expand(len(x), -1, -1)], 1)
        A = (H @ c.query.weight.T) @ (S @ c.key.weight.T).transpose(1, 2) / math.sqrt(32)
        A = A.exp() / A.exp().sum(-1, keepdim=True)
        O = A @ S @ c.value.weight.T
        logits.append(F.layer_norm(O, x.shape[-1:], c.norm_a.weight, c.norm_a.bias))
        logits[-1] = logits[-1] @ c.classify.weight.T
        Q = F.layer_norm(O + H, x.shape[-1:], c.norm_b.weight, c.norm_b.bias)
        rows = [] if official else [prompt.visual[J + r].expand(len(x), -1, -1)]
        x = block(torch.cat([x, *rows, Q], 1))[:, :n]
        maps.append(A)
    return unit(v.ln_post(x[:, 0]) @ v.proj), logits, maps


def assembled(clip, **options):
    """A prompt with no norm left at its initial 1 and 0, learned text and the classes asked for."""
    _, prompt = start(clip, **options)
    for c in prompt.cavpt:
        for norm in c.norm_a, c.norm_b:
            norm.weight.data += 0.3 * torch.randn_like(norm.weight)
            norm.bias.data += 0.3 * torch.randn_like(norm.bias)
    names = common.embed_names(clip, NAMES, TINY["n_ctx"])
    T = common.encode_prompts(clip, names, prompt.ctx)
    return prompt, T, torch.tensor([[0, 2], [1, 0]] * 3)


@pytest.mark.parametrize(
    "options", [{}, {"cavpt_layers": 2}, {"visual_prompts_in_cavpt": True}, {"cavpt_layers": 0}]
)
def test_the_image_branch_is_the_equations_by_hand(odd, options):
    prompt, T, top = assembled(odd, **options)
    official = "visual_prompts_in_cavpt" not in options
    assert len(prompt.visual) == 3 - options.get("cavpt_layers", 1) + (not official)
    ours = dpt.encode(odd, prompt, views(odd), T, top)
    plain = by_hand(odd, prompt, views(odd), T, top, official)
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
    prompt, T, top = assembled(odd, cavpt_layers=0)
    rows = dict(enumerate(prompt.visual))
    v, _, _ = dpt.encode(odd, prompt, views(odd), T, top)
    assert len(rows) == 3 and torch.allclose(v, unit(plain_image(odd, views(odd), rows)), atol=1e-5)
    cfg, prompt = start(odd, n_ctx=0, cavpt_layers=0)  # VPT-deep: the hand template
    v = unit(plain_image(odd, views(odd), dict(enumerate(prompt.visual))))
    expected = odd.logit_scale.exp() * v @ hand(odd).T
    assert torch.allclose(logits_of(cfg, odd, prompt, views(odd)), expected, atol=1e-4)


def test_without_prompts_and_with_real_words_it_is_zero_shot_clip(clip):
    cfg, prompt = start(clip, n_visual=0, cavpt_layers=0)
    prompt.ctx.data = words(clip, "a photo of a")
    expected = clip.logit_scale.exp() * unit(clip.encode_image(views(clip))) @ hand(clip).T
    assert torch.allclose(logits_of(cfg, clip, prompt, views(clip)), expected, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_guided_at_first_and_plain_later(world, precision):
    clip = common.load_clip(f"local-dir:{world}/shapes/clip", "openai", "cpu", precision)
    cfg, prompt = start(clip, guidance=1, alpha=0.7, beta=0.2)
    steps, _ = rehearse(dpt, cfg, clip, toy(), prompt, epochs=[0, 1])
    model = common.load_clip(f"local-dir:{world}/shapes/clip", "openai", "cpu", "fp32")
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
    prompt, T, top = assembled(odd)
    y = torch.tensor([0, 1] * 3)
    for query, reached in (T, True), (T.detach(), False):
        v, layer, _ = dpt.encode(odd, prompt, views(odd), query, top)
        visual = F.cross_entropy(100 * v @ hand(odd).T, y)  # no learned text in the classifier
        assert gradients(visual, [prompt.ctx])[0].abs().max().gt(0) == reached
    _, layer, _ = dpt.encode(odd, prompt, views(odd), T, top)
    loss = dpt.cavpt_loss(layer, top, y)
    names = [n for n, _ in prompt.named_parameters()]
    found = dict(zip(names, gradients(loss, list(prompt.parameters())), strict=True))
    assert found.pop("visual").abs().max() == 0  # the image tokens are detached there
    without = {"cavpt.0.norm_b.weight", "cavpt.0.norm_b.bias"}
    assert {n for n, g in found.items() if g.abs().max() == 0} == without


def test_training_reaches_every_learnable_and_no_weight_of_clip(clip):
    cfg, prompt = start(clip)
    (step,), _ = rehearse(dpt, cfg, clip, toy(), prompt)
    assert step.gradients.keys() == dict(prompt.named_parameters()).keys()
    assert all(g.abs().max() > 0 for g in step.gradients.values())
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())
    assert {p.dtype for p in prompt.parameters()} == {torch.float32}


def test_the_cavpt_loss_averages_the_true_classes_own_rows():
    logits = [torch.tensor([[[1.0, 2, 0], [0, 3, 1]], [[2, 2, 2], [0, 0, 5]]])]
    logits.append(-logits[0])
    top, y = torch.tensor([[2, 0], [1, 2]]), torch.tensor([0, 0])

    def ce(row, k):
        return math.log(sum(map(math.exp, row))) - row[k]

    both = (ce([0, 3, 1], 0) + ce([0, -3, -1], 0)) / 2  # the second sample has no row
    assert dpt.cavpt_loss(logits, top, y).item() == pytest.approx(both)
    four = (ce([0, 3, 1], 0) + ce([0, 0, 5], 2) + ce([0, -3, -1], 0) + ce([0, 0, -5], 2)) / 4
    assert dpt.cavpt_loss(logits, top, torch.tensor([0, 2])).item() == pytest.approx(four)


def test_a_batch_without_a_true_class_among_the_top_gives_a_zero_not_nan(odd):
    prompt, T, top = assembled(odd)
    layer = dpt.encode(odd, prompt, views(odd), T, top)[1]
    loss = dpt.cavpt_loss(layer, top, torch.tensor([1, 2] * 3))
    assert loss.item() == 0 and loss.requires_grad
    assert not any(g.any() for g in gradients(loss, list(prompt.parameters())))
    assert dpt.cavpt_loss([], top, torch.tensor([1, 2] * 3)) == 0


def test_a_step_without_a_true_class_trains_all_but_what_the_class_aware_loss_alone_reaches(odd):
    cfg, prompt = start(odd, top_k=1)
    images = views(odd)
    top = (common.unit_features(odd, images) @ hand(odd).T).argmax(1)
    never = [(images, (top + 1) % 3)]
    (step,), _ = rehearse(dpt, cfg, odd, toy(), prompt, never, epochs=[cfg.guidance])
    T = plain_prompts(odd, NAMES, prompt.ctx.expand(3, -1, -1))
    v, _, _ = by_hand(odd, prompt, images, T, top[:, None])
    logits = odd.logit_scale.exp() * v @ unit(T).T
    assert step.loss.item() == pytest.approx(F.cross_entropy(logits, never[0][1]).item(), rel=1e-4)
    alone = {"cavpt.0.norm_a.weight", "cavpt.0.norm_a.bias", "cavpt.0.classify.weight"}
    assert {name for name, g in step.gradients.items() if not g.any()} == alone


def test_steps_without_a_true_class_among_the_top_are_counted(odd, capsys):
    cfg, prompt = start(odd, top_k=1, batch_size=1)
    images, hits = common.Loader(cfg, odd, toy()), []
    for epoch in 0, 1:
        for x, y in images.epoch(epoch):
            hits.append(((common.unit_features(odd, x) @ hand(odd).T).argmax(1) == y).item())
    missed = hits.count(False)
    assert 0 < missed < len(hits) == 12
    rehearse(dpt, cfg, odd, toy(), prompt, epochs=[0, 1])
    assert f"{missed} steps had no true class" in capsys.readouterr().out
    cfg, prompt = start(odd, top_k=1, batch_size=1, cavpt_layers=0)
    rehearse(dpt, cfg, odd, toy(), prompt, epochs=[0, 1])
    assert "no true class" not in capsys.readouterr().out


def test_parameter_counts_are_those_of_vit_b_32():
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
        model.blocks = lambda: model.visual.transformer.resblocks  # as of common.Clip
        prompt = dpt.DualPrompt(dpt.Config(), model, classes=100)
    count = {name: p.numel() for name, p in prompt.named_parameters()}
    assert count.pop("ctx") == 8192 and count.pop("visual") == 84480
    cavpt = {name.split(".", 2)[2]: n for name, n in count.items()}
    assert cavpt["meta.weight"] + cavpt["meta.bias"] == 393984
    assert cavpt["query.weight"] + cavpt["key.weight"] == 49152
    assert cavpt["value.weight"] == 589824 and cavpt["ctx"] == 7680
    assert sum(n for name, n in cavpt.items() if "norm" in name) == 3072
    assert cavpt["classify.weight"] == 76800
    assert sum(cavpt.values()) == 393984 + 49152 + 589824 + 7680 + 3072 + 76800


def test_both_branches_have_rates_and_warm_ups_of_their_own(odd):
    found = schedule(dpt, odd, toy(), shots=1)
    assert len(found) == 60 and len(schedule(dpt, odd, toy(), shots=2)) == 100
    expected = {0: [1e-5, 1e-5], 1: [0.002, 1e-5], 9: [0.00191395, 1e-5], 10: [0.00189101, 0.01]}
    for e, (text, visual) in expected.items():
        assert found[e] == pytest.approx([text, visual], rel=1e-3)
    assert found[59] == pytest.approx([5.4807e-6, 8.06647e-4], rel=1e-3)


def test_visual_prompts_and_cavpt_are_the_visual_branch(odd):
    for rate in 1e-2, 0.0:  # without a rate nothing but the text context moves
        cfg, prompt = start(odd, visual_lr=rate, visual_warmup=0)
        before = {name: tensor.clone() for name, tensor in prompt.named_parameters()}
        rehearse(dpt, cfg, odd, toy(), prompt, moving=True)
        moved = {name for name, p in prompt.named_parameters() if not torch.equal(p, before[name])}
        assert moved == (set(before) if rate else {"ctx"})


def test_imagenet_has_a_schedule_of_its_own_and_flags_win_over_it(odd):
    source = toy()._replace(name="imagenet")
    found = schedule(dpt, odd, source)
    assert len(found) == 20 and found[1] == [0.002, 0.01]
    found = schedule(dpt, odd, source, visual_warmup=10, epochs=12)
    assert len(found) == 12 and found[9][1] == 1e-5 and found[10][1] == 0.01
    for data in toy(), source:
        assert schedule(dpt, odd, data, visual_warmup=0)[0] == [1e-5, 0.01]


def test_with_fewer_classes_than_prompts_every_true_class_has_one(clip):
    cfg, prompt = start(clip, top_k=10, guidance=0)
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
def test_a_cavpt_that_cannot_be_is_refused(odd, options):
    with pytest.raises(common.Error, match="--cavpt_layers"):
        start(odd, **options)


def test_a_prompt_moves_to_a_label_set_of_fewer_classes_than_prompts(fit):
    fit(dpt, transfer="textures")
    assert {row["evaluated_on"]: row["n_test"] for row in fit.rows()} == {
        "textures": 8,
        "shapes": 80,
    }


def test_a_resnet_is_refused(resnet):
    with pytest.raises(common.Error, match="ViT-B-16"):
        start(resnet)
