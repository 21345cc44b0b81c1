"""EnPrompt: identity at init, transport by hand and by linear programme, label sets, ablations."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import common
import enprompt
from tests.conftest import (
    NAMES,
    gradients,
    plain_image,
    rates,
    rehearsed,
    toy,
    unit,
    untrained,
)

TEMPLATES = ["a photo of a {}.", *common.SEVEN]


def templates(clip, names=NAMES):
    """e (K, 8, D), the frozen unit features of the names in every template."""
    texts = [t.format(c.replace("_", " ")) for c in names for t in TEMPLATES]
    return unit(clip.encode_text(clip.tokenize(texts))).unflatten(0, (len(names), 8))


def moved(prompt):
    """prompt with an external layer that is not zero any more."""
    torch.manual_seed(0)
    prompt.enla.weight.data = 0.1 * torch.randn_like(prompt.enla.weight)
    prompt.enla.bias.data = 0.1 * torch.randn_like(prompt.enla.bias)
    return prompt


def by_hand(clip, prompt, images, names=NAMES, trained=NAMES):
    """(g, patches, w (K, N, D), w_k) by the equations of the docstring, written out."""
    W, b = prompt.enla.weight, prompt.enla.bias

    def adapted(names):
        e = templates(clip, names)
        w = unit(e + e @ W.T + b)
        return w, unit(w.mean(1))

    s = unit(adapted(trained)[1].mean(0))
    P = [p + f.weight @ s for p, f in zip(prompt.visual, prompt.fuse, strict=True)]
    rows = {-1: P[0], **{i: P[i] for i in range(1, len(P))}}
    g, patches = plain_image(clip, images, rows, patches=True)
    return unit(g), unit(patches), *adapted(names)


def test_without_visual_prompts_it_starts_as_the_template_ensemble(clip):
    _, predictor = untrained(enprompt, clip, toy(), n_visual=0)
    images = torch.randn(4, 3, 32, 32)
    w = unit(templates(clip).mean(1))
    expected = clip.logit_scale.exp() * unit(clip.encode_image(images)) @ w.T
    assert torch.allclose(predictor(toy())(None, images), expected, atol=1e-3)


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_logits_are_the_equations_by_hand(odd, depth):
    prompt, predictor = untrained(enprompt, odd, toy(), depth=depth)
    assert len(moved(prompt).visual) == len(prompt.fuse) == min(depth, 3)  # odd has three layers
    images = torch.randn(4, 3, 32, 32)
    g, _, _, w_k = by_hand(odd, prompt, images)
    expected = odd.logit_scale.exp() * g @ w_k.T
    assert torch.allclose(predictor(toy())(None, images), expected, atol=1e-4)


def test_another_label_set_changes_nothing_but_the_classifier(odd):
    other, images = ["dog", NAMES[1]], torch.randn(4, 3, 32, 32)
    data = toy()._replace(classnames=other)
    for strengthening, trained in ("train", NAMES), ("target", other):
        prompt, predictor = untrained(enprompt, odd, toy(), strengthening=strengthening)
        g, _, _, w_k = by_hand(odd, moved(prompt), images, other, trained)
        found, own = predictor(data)(None, images), predictor(toy())(None, images)
        assert torch.allclose(found, odd.logit_scale.exp() * g @ w_k.T, atol=1e-4)
        assert torch.allclose(found[:, 1], own[:, 1], atol=1e-4) == (strengthening == "train")


@pytest.mark.parametrize("ot", ["true", "all", "none"])
def test_the_loss_is_cross_entropy_and_transport_by_hand(odd, ot):
    options = {"ot": ot, "ot_weight": 0.7, "batch_size": 6, "tolerance": 0.0}
    losses, prompt = rehearsed(enprompt, odd, toy(), epochs=1, **options)
    images, y = next(common.loader(enprompt.Config(batch_size=6), odd, toy())(0))
    s = odd.logit_scale.exp()
    g, l, w, w_k = by_hand(odd, prompt, images)
    C = 1 - torch.einsum("bmd,knd->bkmn", l, w)
    T = torch.exp(-C.detach() / 0.1)
    for _ in range(100):  # Sinkhorn without logarithms: epsilon is not small here
        T = T / T.sum(-1, keepdim=True) / 16
        T = T / T.sum(-2, keepdim=True) / 8
    distance = (T * C).sum((-1, -2))  # (B, K)
    term = {"none": 0, "true": distance[range(6), y].mean()}
    term = term[ot] if ot != "all" else F.cross_entropy(s * (1 - distance), y)
    expected = F.cross_entropy(s * g @ w_k.T, y) + 0.7 * term
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(prompt.parameters())
    for a, b in zip(gradients(losses[0], parameters), gradients(expected, parameters), strict=True):
        assert b.abs().max() > 0 and torch.allclose(a, b, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize(
    "options, missing", [({"enla": False}, "enla"), ({"strengthening": "none"}, "fuse")]
)
def test_every_learnable_gets_a_gradient_unless_switched_off(odd, options, missing):
    losses, prompt = rehearsed(enprompt, odd, toy(), epochs=1, **options)
    learned = {name: p for name, p in prompt.named_parameters() if p.requires_grad}
    assert not any(missing in name for name in learned) and len(learned) > 1
    assert all(g.abs().max() > 0 for g in gradients(losses[0], list(learned.values())))
    assert not any(p.requires_grad for p in odd.parameters())


def test_the_learnables_number_the_formula(odd):
    prompt, _ = untrained(enprompt, odd, toy(), depth=2)
    D, d, M, J = 24, 48, 4, 2
    assert sum(p.numel() for p in prompt.parameters()) == D * D + D + J * (M * d + D * d)
    assert prompt.visual.std().item() == pytest.approx(0.02, rel=0.15)
    assert not prompt.enla.weight.any() and not prompt.enla.bias.any()


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0])
def test_sinkhorn_is_a_plan_of_least_entropic_cost(epsilon):
    torch.manual_seed(0)
    C = 2 * torch.rand(5, 2, 6, 4)
    T = enprompt.sinkhorn(C, epsilon, 300)
    assert (T.sum(-1) - 1 / 6).abs().max() < 1e-3 / 6 and (T.sum(-2) - 1 / 4).abs().max() < 1e-3 / 4
    # T = diag(a) exp(-C / epsilon) diag(b): the log's mixed second differences are the cost's
    log = T.log() + C / epsilon
    mixed = log - log[..., :1, :] - log[..., :1] + log[..., :1, :1]
    assert mixed.abs().max() < 1e-3


def test_with_a_small_epsilon_the_plan_is_the_linear_programmes():
    torch.manual_seed(1)
    for C in torch.rand(5, 3, 3):
        best = min(itertools.permutations(range(3)), key=lambda p: sum(C[range(3), p]))
        expected = torch.zeros(3, 3)
        expected[range(3), best] = 1 / 3  # by Birkhoff, an optimum is a permutation
        assert torch.allclose(enprompt.sinkhorn(C, 0.002, 5000), expected, atol=0.01)


@pytest.mark.parametrize("epsilon", [0.001, 0.01, 1.0])
def test_no_epsilon_gives_a_nan(epsilon):
    C = torch.cat([torch.rand(2, 16, 8), torch.zeros(1, 16, 8), 2 * torch.ones(1, 16, 8)])
    T = enprompt.sinkhorn(C, epsilon, 100)
    assert T.isfinite().all() and torch.allclose(T.sum((-1, -2)), torch.ones(4), atol=1e-3)
    assert enprompt.sinkhorn(C.half(), epsilon, 2).dtype == torch.float32


def test_one_template_gives_the_uniform_plan():
    assert torch.allclose(enprompt.sinkhorn(torch.rand(3, 16, 1), 0.1, 5), torch.tensor(1 / 16))


def test_the_plan_is_fixed_and_stops_at_its_tolerance():
    C = torch.rand(16, 8, requires_grad=True)
    assert not enprompt.sinkhorn(C, 0.1, 100).requires_grad
    short = [enprompt.sinkhorn(C, 0.1, n) for n in (1, 2, 3)]
    assert torch.equal(enprompt.sinkhorn(C, 0.1, 100, math.inf), short[0])
    off = [(T.sum(-1) - 1 / 16).abs().sum() for T in short]
    assert off[0] > off[1] > off[2]
    between = (off[0] + off[1]).item() / 2
    assert torch.equal(enprompt.sinkhorn(C, 0.1, 100, between), short[1])


@pytest.mark.parametrize(
    "name, options, epochs, depth",
    [("d", {}, 50, 9), ("d", {"classes": "base"}, 20, 9), ("imagenet", {}, 5, 3)],
)
def test_the_four_settings_have_their_schedules(clip, name, options, epochs, depth):
    data = toy()._replace(name=name)
    found = rates(enprompt, clip, data, **options)
    assert len(found) == epochs and set(found[1]) == {0.0025}
    assert enprompt.Config().batch_size == 4
    assert len(untrained(enprompt, clip, data)[0].visual) == min(depth, 4)


@pytest.mark.parametrize(
    "options", [{"enla": False}, {"ot": "none"}, {"ot": "all"}, {"strengthening": "none"}], ids=str
)
def test_the_ablations_run(fit, options):
    assert fit(enprompt, dataset="textures", **options) > 0


def test_a_resnet_is_refused(resnet):
    with pytest.raises(common.Error, match="ViT-B-16"):
        untrained(enprompt, resnet, toy())
