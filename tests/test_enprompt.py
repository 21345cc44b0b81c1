"""EnPrompt: its initial value, the equations by hand, transport, its schedules and ablations."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import common
import enprompt
from tests import conftest
from tests.conftest import (
    NAMES,
    built,
    check_learning,
    match_gradients,
    plain_image,
    plain_text,
    rehearse,
    schedule,
    toy,
    unit,
)

TEMPLATES = ["a photo of a {}.", *common.SEVEN]
initial = functools.partial(conftest.initial, enprompt)


def moved(prompt):
    """prompt with an external layer that is no longer zero."""
    torch.manual_seed(0)
    for p in prompt.enla.parameters():
        p.data = 0.1 * torch.randn_like(p)
    return prompt


def logits_of(cfg, clip, prompt, images, names=NAMES):
    """The logits of class names, as evaluated; the prompt was trained on toy()."""
    target = toy()._replace(classnames=names)
    return enprompt.classifier(cfg, clip, prompt, toy(), target)(images, None)


def sentences(clip, names):
    """Token ids (K * 8, 77) of the names in every template."""
    return clip.tokenize([t.format(c.replace("_", " ")) for c in names for t in TEMPLATES])


def adapted(clip, prompt, names):
    """w (K, 8, D) of the features or the words, EnLa written out."""
    ids, W, b = sentences(clip, names), prompt.enla.weight, prompt.enla.bias
    if not prompt.on_words:
        e = unit(clip.encode_text(ids))
        return unit(e + e @ W.T + b).unflatten(0, (-1, 8))
    x, eot = clip.token_embedding(ids), ids.argmax(1)
    place = torch.arange(77)
    inside = (place > 0) & (place < eot[:, None])  # neither [SOS] nor [EOT] nor what follows
    x = torch.where(inside[..., None], x + x @ W.T + b, x)
    return unit(plain_text(clip, x, eot)).unflatten(0, (-1, 8))


def by_hand(clip, prompt, images, names=NAMES):
    """(g, patches, w (K, 8, D), w_k) by the equations of the docstring; trained on NAMES."""
    s = unit(unit(adapted(clip, prompt, NAMES).mean(1)).mean(0))
    P = list(prompt.visual)
    if prompt.fuse:
        P = [p + f.weight @ s for p, f in zip(P, prompt.fuse, strict=True)]
    rows = {-1: P[0], **{i: P[i] for i in range(1, len(P))}}
    g, patches = plain_image(clip, images, rows, patches=True)
    w = adapted(clip, prompt, names)
    return unit(g), unit(patches), w, unit(w.mean(1))


@pytest.mark.parametrize("enla", ["words", "features", "none"])
def test_without_visual_prompts_it_is_initially_the_template_ensemble(clip, enla):
    cfg, prompt = initial(clip, n_visual=0, enla=enla)
    images = torch.randn(4, 3, 32, 32)
    e = unit(clip.encode_text(sentences(clip, NAMES))).unflatten(0, (-1, 8))
    expected = clip.logit_scale.exp() * unit(clip.encode_image(images)) @ unit(e.mean(1)).T
    assert torch.allclose(logits_of(cfg, clip, prompt, images), expected, atol=1e-3)


@pytest.mark.parametrize("enla", ["words", "features"])
@pytest.mark.parametrize("depth", [1, 2, 9])
def test_logits_are_the_equations_by_hand(odd, enla, depth):
    cfg, prompt = initial(odd, enla=enla, depth=depth)
    assert len(moved(prompt).visual) == len(prompt.fuse) == min(depth, 3)  # odd has three layers
    images = torch.randn(4, 3, 32, 32)
    g, _, _, w_k = by_hand(odd, prompt, images)
    expected = odd.logit_scale.exp() * g @ w_k.T
    assert torch.allclose(logits_of(cfg, odd, prompt, images), expected, atol=1e-3)


@pytest.mark.parametrize("enla", ["words", "features"])
def test_other_class_names_change_the_classifier_alone(odd, enla):
    cfg, prompt = initial(odd, enla=enla)
    other, images = ["dog", NAMES[1]], torch.randn(4, 3, 32, 32)
    g, _, _, w_k = by_hand(odd, moved(prompt), images, other)
    found = logits_of(cfg, odd, prompt, images, other)
    assert torch.allclose(found, odd.logit_scale.exp() * g @ w_k.T, atol=1e-3)
    assert torch.allclose(found[:, 1], logits_of(cfg, odd, prompt, images)[:, 1], atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"enla": "words"}, {"ot": False}, {"strengthening": False}], ids=str
)
def test_the_loss_is_cross_entropy_and_transport_by_hand(odd, options):
    cfg, prompt = initial(odd, ot_weight=0.7, batch_size=6, **options)
    (step,), _ = rehearse(enprompt, cfg, odd, toy(), prompt)
    images, y = next(common.Loader(cfg, odd, toy()).epoch(0))
    g, l, w, w_k = by_hand(odd, prompt, images)
    expected = F.cross_entropy(odd.logit_scale.exp() * g @ w_k.T, y)
    if cfg.ot:
        C = 1 - torch.einsum("bmd,bnd->bmn", l, w[y])
        T = torch.exp(-C.detach() / 0.1)
        for _ in range(cfg.iterations):  # without logarithms: epsilon is not small here
            T = T / T.sum(2, keepdim=True) / 16
            T = T / T.sum(1, keepdim=True) / 8
        expected = expected + 0.7 * (T * C).sum((1, 2)).mean()
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    match_gradients(step, expected, prompt)


@pytest.mark.parametrize(
    "options, missing",
    [({"enla": "words"}, "nothing"), ({}, "nothing"), ({"enla": "none"}, "enla")]
    + [({"strengthening": False}, "fuse")],
)
def test_every_learnable_gets_a_gradient_unless_switched_off(odd, options, missing):
    cfg, prompt = initial(odd, **options)
    (step,), _ = rehearse(enprompt, cfg, odd, toy(3), prompt)
    learned = {name for name, p in prompt.named_parameters() if p.requires_grad}
    assert not any(missing in name for name in learned) and len(learned) > 1
    check_learning(step, odd, learned)


@pytest.mark.parametrize("enla, width", [("features", 24), ("words", 32)])
def test_the_learnables_number_the_formula(odd, enla, width):
    _, prompt = initial(odd, depth=2, enla=enla)
    D, d, M, J = 24, 48, 4, 2
    count = sum(p.numel() for p in prompt.parameters())
    assert count == width * width + width + J * (M * d + D * d)
    assert prompt.visual.std().item() == pytest.approx(0.02, rel=0.15)
    assert not prompt.enla.weight.any() and not prompt.enla.bias.any()


def test_the_usual_number_of_iterations_meets_the_marginals():
    cfg = enprompt.Config()
    l, w = unit(torch.randn(5, 196, 24)), unit(torch.randn(5, 8, 24))
    T = enprompt.sinkhorn(1 - l @ w.transpose(1, 2), cfg.epsilon, cfg.iterations)
    assert (T.sum(1) - 1 / 8).abs().max() < 1e-6
    assert (T.sum(2) - 1 / 196).abs().max() < 1e-3 / 196


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0])
def test_sinkhorn_is_the_plan_of_least_entropic_cost(epsilon):
    torch.manual_seed(0)
    C = 2 * torch.rand(5, 2, 6, 4)
    T = enprompt.sinkhorn(C, epsilon, 300)
    assert (T.sum(-1) - 1 / 6).abs().max() < 1e-3 / 6 and (T.sum(-2) - 1 / 4).abs().max() < 1e-3 / 4
    # T = diag(a) exp(-C / epsilon) diag(b): the log's mixed second differences are the cost's
    log = T.log() + C / epsilon
    mixed = log - log[..., :1, :] - log[..., :1] + log[..., :1, :1]
    assert mixed.abs().max() < 1e-3


def test_with_a_small_epsilon_the_plan_is_the_linear_programs():
    torch.manual_seed(1)
    for C in torch.rand(5, 3, 3):
        best = min(itertools.permutations(range(3)), key=lambda p: sum(C[range(3), p]))
        expected = torch.zeros(3, 3)
        expected[range(3), best] = 1 / 3  # by Birkhoff, an optimum is a permutation
        assert torch.allclose(enprompt.sinkhorn(C, 0.002, 5000), expected, atol=0.01)


@pytest.mark.parametrize("epsilon", [0.001, 0.01, 1.0])
def test_no_epsilon_gives_a_nan(epsilon):
    C = torch.cat([torch.rand(2, 16, 8), torch.zeros(1, 16, 8), 2 * torch.ones(1, 16, 8)])
    T = enprompt.sinkhorn(C, epsilon, 20)
    assert T.isfinite().all() and torch.allclose(T.sum((-1, -2)), torch.ones(4), atol=1e-3)
    assert enprompt.sinkhorn(C.half(), epsilon, 2).dtype == torch.float32


def test_one_template_gives_the_uniform_plan():
    assert torch.allclose(enprompt.sinkhorn(torch.rand(3, 16, 1), 0.1, 1), torch.tensor(1 / 16))


def test_the_plan_has_no_gradient_and_each_iteration_nears_the_marginals():
    C = torch.rand(16, 8, requires_grad=True)
    plans = [enprompt.sinkhorn(C, 0.1, n) for n in (1, 2, 3)]
    assert not any(T.requires_grad for T in plans)
    off = [(T.sum(-1) - 1 / 16).abs().sum() for T in plans]
    assert off[0] > off[1] > off[2]


@pytest.mark.parametrize(
    "dataset, options, epochs, depth",
    [("textures", {}, 50, 9), ("textures", {"classes": "base"}, 20, 9)]
    + [("imagenet", {}, 5, 3), ("imagenet", {"classes": "base"}, 20, 9)]
    + [("imagenet", {"depth": 9}, 5, 9), ("imagenet", {"epochs": 7, "depth": 1}, 7, 1)],
)
def test_each_setting_has_its_schedule_and_options_override_it(dataset, options, epochs, depth):
    clip = built(layers=10)
    data, options = toy()._replace(name=dataset), options | {"dataset": dataset}
    found = schedule(enprompt, clip, data, **options)
    assert len(found) == epochs and found[:2] == [[1e-5], [0.0025]]
    assert len(initial(clip, data, **options)[1].visual) == depth
    assert enprompt.Config().batch_size == 4


@pytest.mark.parametrize(
    "options",
    [{"enla": "words"}, {"enla": "none"}, {"ot": False}, {"strengthening": False}],
    ids=str,
)
def test_its_options_run(fit, options):
    assert fit(enprompt, dataset="textures", **options) > 0


@pytest.mark.parametrize("option", ["epsilon", "iterations"])
def test_a_transport_of_zero_epsilon_or_iterations_is_refused(odd, option):
    with pytest.raises(common.Error, match="--" + option):
        initial(odd, **{option: 0})
