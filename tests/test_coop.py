"""CoOp: its limit case, what it learns, steps by hand, and its options."""

import functools

import pytest
import torch
import torch.nn.functional as F

import common
import coop
from tests import conftest
from tests.conftest import (
    NAMES,
    gradients,
    normalized,
    plain_prompts,
    schedule,
    toy,
    unit,
    words,
)

initial = functools.partial(conftest.initial, coop)


def features(cfg, clip, prompt, data=None):
    """w of the classes of data, or of toy(); trained on toy()."""
    return coop.classifier(cfg, clip, prompt, toy(), data or toy())


def test_initialised_with_words_coop_is_zero_shot_clip(clip):
    cfg, prompt = initial(clip, init="a photo of a")
    ids = clip.tokenize([f"a photo of a {c}.".replace("_", " ") for c in NAMES])
    expected = unit(clip.encode_text(ids))
    assert torch.allclose(features(cfg, clip, prompt), expected, atol=1e-5)
    other = toy()._replace(classnames=["dog", "cat"])
    assert torch.allclose(features(cfg, clip, prompt, other)[1], expected[0], atol=1e-5)


def test_the_context_is_all_that_is_learned(odd):
    for csc, shape in (False, (1, 5, 32)), (True, (3, 5, 32)):
        _, prompt = initial(odd, n_ctx=5, csc=csc)
        assert {name: t.shape for name, t in prompt.state_dict().items()} == {"ctx": shape}
    _, large = initial(odd, n_ctx=60, csc=True)
    assert large.ctx.std().item() == pytest.approx(0.02, rel=0.05) and large.ctx.requires_grad


def features_by_hand(clip, V, cut):
    """(3, D) features of [SOS] V[:cut] name V[cut:] . [EOT], one class at a time, V (3, M, d)."""
    M, w = V.shape[1], []
    ids = clip.tokenize([" ".join(["X"] * M + [f"{c.replace('_', ' ')}."]) for c in NAMES])
    for v, row, x in zip(V, ids, clip.token_embedding(ids), strict=True):
        eot = int(row.argmax())
        name, end = x[1 + M : eot - 1], x[eot - 1 :]
        x = torch.cat([x[:1], v[:cut], name, v[cut:], end])[None]
        x = clip.transformer(x + clip.positional_embedding, attn_mask=clip.attn_mask)
        w.append(clip.ln_final(x[0, eot]) @ clip.text_projection)
    return torch.stack(w)


@pytest.mark.parametrize(
    "context, position, sentence",
    [
        ("a photo of a", "end", "a photo of a {}."),
        ("a photo of a", "middle", "a photo {} of a."),
        ("a photo of a", "front", "{} a photo of a."),
        ("a photo of", "middle", "a {} photo of."),
        ("a", "middle", "{} a."),
    ],
)
def test_a_context_of_real_words_gives_the_features_of_the_sentence(
    clip, context, position, sentence
):
    V, data = words(clip, context), toy()._replace(classnames=[*NAMES, "dr. st"])
    ids = clip.tokenize([sentence.format(name.replace("_", " ")) for name in data.classnames])
    expected = unit(clip.encode_text(ids))
    for csc in False, True:
        cfg, prompt = initial(clip, data, n_ctx=V.shape[1], csc=csc, position=position)
        prompt.ctx.data = V.expand(len(prompt.ctx), -1, -1).clone()
        w = coop.classifier(cfg, clip, prompt, data, data)
        assert torch.allclose(w, expected, atol=1e-5)
    first = gradients(w[0].sum(), [prompt.ctx])[0]
    assert first[0].abs().min() > 0 and first[1:].abs().max() == 0  # each class has its own


def test_punctuation_at_a_names_end_stays_with_the_name(clip):
    """Deviation 2: "?." is one token, which the context divides."""
    data = toy()._replace(classnames=["what?", "cat"])
    for position, sentence in ("middle", "a photo what? of a."), ("front", "what? a photo of a."):
        cfg, prompt = initial(clip, init="a photo of a", position=position)
        expected = unit(clip.encode_text(clip.tokenize([sentence])))
        assert torch.allclose(features(cfg, clip, prompt, data)[:1], expected, atol=1e-5)


@pytest.mark.parametrize("csc", [False, True])
@pytest.mark.parametrize("position, cut", [("end", 5), ("middle", 2), ("front", 0)])
def test_features_and_gradients_are_those_of_the_whole_sequence(odd, position, cut, csc):
    cfg, prompt = initial(odd, n_ctx=5, csc=csc, position=position)
    prompt.ctx.data *= 5
    ours = features(cfg, odd, prompt)
    plain = unit(features_by_hand(odd, prompt.ctx.expand(3, -1, -1), cut))
    assert torch.allclose(ours, plain, atol=1e-5)
    weight = torch.randn(3, 24)
    a, b = (gradients((w * weight).sum(), [prompt.ctx])[0] for w in (ours, plain))
    assert b.abs().max() > 0 and torch.allclose(a, b, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("csc, position, cut", [(False, "end", 4), (True, "middle", 2)])
def test_training_is_the_equations_by_hand(clip, tmp_path, csc, position, cut):
    options = {"n_ctx": 4, "csc": csc, "position": position, "epochs": 2, "out": str(tmp_path)}
    cfg, prompt = initial(clip, **options)
    before = prompt.ctx.detach().clone()
    V, velocity = before, 0
    for epoch, lr in (0, 1e-5), (1, 2e-3):
        images, labels = next(common.Loader(cfg, clip, toy()).epoch(epoch))
        f = unit(clip.encode_image(images))
        V = V.clone().requires_grad_()
        w = unit(features_by_hand(clip, V.expand(3, -1, -1), cut))
        loss = F.cross_entropy(clip.logit_scale.exp() * f @ w.T, labels)
        velocity = 0.9 * velocity + gradients(loss, [V])[0] + 5e-4 * V.detach()
        V = V.detach() - lr * velocity
    coop.train(cfg, clip, toy(), prompt)
    assert (V - before).abs().max() > 1e-4
    assert torch.allclose(prompt.ctx, V, atol=1e-3 * (V - before).abs().max().item())
    assert all(p.grad is None for p in clip.parameters())


def test_a_class_specific_context_serves_its_class_only(clip):
    cfg, prompt = initial(clip, csc=True, n_ctx=4)
    before = features(cfg, clip, prompt)
    prompt.ctx.data[1] += torch.randn(4, 128)
    after = features(cfg, clip, prompt)
    changed = (after - before).abs().amax(1)
    assert changed[1] > 0.01 and changed[0] == changed[2] == 0
    assert torch.allclose(after, unit(plain_prompts(clip, NAMES, prompt.ctx)), atol=1e-5)
    with pytest.raises(common.Error, match="--csc"):
        features(cfg, clip, prompt, toy()._replace(classnames=["dog", "cat"]))


@pytest.mark.parametrize(
    "shots, name, epochs",
    [(1, "d", 50), (2, "d", 100), (4, "d", 100), (8, "d", 200), (16, "d", 200)]
    + [(16, "imagenet", 50), (0, "d", 200)],
)
def test_epochs_and_rates_are_the_papers(odd, shots, name, epochs):
    data = toy()._replace(name=name)
    rates = schedule(coop, odd, data, shots=shots)
    assert len(rates) == epochs and rates[:2] == [[1e-5], [0.002]]
    assert len(schedule(coop, odd, data, shots=shots, epochs=7)) == 7


@pytest.mark.parametrize(
    "options",
    [{"init": "zzyzx"}, {"init": "a photo", "csc": True}, {"init": "a photo", "n_ctx": 8}],
    ids=str,
)
def test_options_that_contradict_init_are_refused(odd, options):
    with pytest.raises(common.Error, match="--init"):
        initial(odd, **options)
    assert initial(odd, init="a photo", n_ctx=2)[1].ctx.shape[1] == 2


@pytest.mark.parametrize("options", [{"transfer": "colours"}, {"classes": "base"}], ids=str)
def test_contexts_of_other_classes_are_refused_before_training(fit, monkeypatch, options):
    monkeypatch.setattr(coop, "train", None)
    with pytest.raises(common.Error, match="--csc"):
        fit(coop, dataset="textures", csc=True, **options)


def test_training_lowers_the_loss_on_its_own_images(clip, tmp_path):
    data = toy(12)
    f = common.unit_features(clip, normalized(clip, data))
    labels = torch.tensor([item[1] for item in data.train])
    cfg, prompt = initial(clip, epochs=30, out=str(tmp_path))

    def loss():
        return F.cross_entropy(clip.scale * f @ features(cfg, clip, prompt).T, labels).item()

    before = loss()
    coop.train(cfg, clip, data, prompt)
    assert loss() < 0.8 * before


def test_a_step_that_fp16_would_lose_moves_the_context(clip):
    half = torch.tensor(0.02, dtype=torch.float16)
    assert half - 7e-6 == half  # the official learnables; the spacing at 0.02 is 1.5e-5
    cfg, prompt = initial(clip, n_ctx=1, lr=7e-6)
    before = prompt.ctx.detach().clone()
    groups = [{"params": prompt.parameters(), "warmup": 0}]
    common.Optimizer(cfg, clip, groups, 10).step(prompt.ctx.sum())
    assert torch.allclose(before - prompt.ctx, torch.tensor(7e-6), rtol=1e-2)


@pytest.mark.parametrize("options", [{"csc": True}, {"position": "front", "n_ctx": 3}], ids=str)
def test_its_options_run(fit, options):
    assert fit(coop, dataset="textures", **options) > 0
