"""The optimiser and its schedule, by hand and against Dassl's figures."""

import contextlib
import math
import types

import pytest
import torch

import common
import coop
from tests.conftest import toy

FP32 = types.SimpleNamespace(
    device=torch.device("cpu"), half=None
)  # what an Optimizer asks of a Clip


def optimizer_of(groups, epochs, lr=0.1, **more):
    return common.Optimizer(common.Config(lr=lr), FP32, groups, epochs, **more)


@pytest.mark.parametrize(
    "lr, warmup, E, values",
    [  # METHODS 1.2
        (0.002, 1, 50, {0: 1e-5, 1: 0.002, 2: 0.00199803, 25: 0.00106279, 49: 7.8853e-6}),
        (0.002, 1, 200, {100: 0.00101571, 199: 4.9344e-7}),
        (0.002, 1, 10, {9: 1.90983e-4}),
        (0.01, 10, 60, {0: 1e-5, 9: 1e-5, 10: 0.01, 11: 0.00999315, 59: 8.06647e-4}),
        (0.01, 10, 100, {99: 2.95596e-4}),
        (0.01, 1, 60, {59: 2.739e-5}),
    ],
)
def test_the_schedule_is_dassls(lr, warmup, E, values):
    p, q = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = optimizer_of([{"params": [p], "lr": lr, "warmup": warmup}, {"params": [q]}], E, 0.5)
    for k in range(E):
        found, usual = (group["lr"] for group in optimizer.sgd.param_groups)
        cosine = 0.5 * lr * (1 + math.cos(math.pi * (k - warmup) / E))
        assert found == pytest.approx(cosine if k >= warmup else 1e-5, abs=1e-9)
        assert found == pytest.approx(values.get(k, found), rel=2e-5)
        assert k != 1 or usual == 0.5  # a group of its own: lr of the config, one epoch's warm-up
        optimizer.step((p + q).sum())
        optimizer.end_epoch()


def test_two_steps_are_sgd_with_momentum_and_weight_decay():
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = optimizer_of([{"params": [p], "warmup": 0}], 10)
    expected, velocity = [2.0, -1.0], [0.0, 0.0]
    for gradient in ([1.0, 3.0], [-2.0, 0.5]):
        optimizer.step((p * torch.tensor(gradient)).sum())
        for i, g in enumerate(gradient):
            velocity[i] = 0.9 * velocity[i] + g + 5e-4 * expected[i]
            expected[i] -= 0.1 * velocity[i]
        assert p.tolist() == pytest.approx(expected, abs=1e-12)


def test_repeated_steps_take_the_same_gradient_and_as_many_steps_of_the_schedule():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in "ab")
    thrice, once = optimizer_of([p], 20, repeat=3), optimizer_of([q], 20)
    thrice.step(p.square().sum())
    gradient = 2 * q.detach()
    for _ in range(3):
        once.step((q * gradient).sum())
    assert torch.allclose(p, q) and len(thrice.losses) == 1
    thrice.end_epoch()
    for _ in range(3):
        once.losses.append(torch.zeros(()))
        once.end_epoch()
    assert thrice.sgd.param_groups[0]["lr"] == once.sgd.param_groups[0]["lr"] != 1e-5


def test_repeated_steps_are_refused_where_the_loss_is_scaled():
    p = torch.nn.Parameter(torch.zeros(1))
    for half, scaled in (None, False), (torch.bfloat16, False), (torch.float16, True):
        clip = types.SimpleNamespace(device=torch.device("cpu"), half=half)
        with pytest.raises(common.Error, match="fp32") if scaled else contextlib.nullcontext():
            common.Optimizer(common.Config(), clip, [p], 2, repeat=3)


def test_an_epoch_ends_with_its_mean_loss_and_an_empty_list():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = optimizer_of([p], 3)
    for value in 1.0, 3.0:
        optimizer.step(0 * p.sum() + value)
    assert optimizer.end_epoch() == 2
    optimizer.step(0 * p.sum() + 7)
    assert optimizer.end_epoch() == 7


def test_the_loss_is_scaled_in_fp16_alone():
    p = torch.nn.Parameter(torch.zeros(1))
    for half, scaled in (None, False), (torch.bfloat16, False), (torch.float16, True):
        clip = types.SimpleNamespace(device=torch.device("cpu"), half=half)
        optimizer = common.Optimizer(common.Config(), clip, [p], 2)
        assert optimizer.scaler.is_enabled() == scaled


def test_a_gradient_that_overflows_in_fp16_is_skipped_and_lowers_the_scale():
    p = torch.nn.Parameter(torch.ones(1))
    clip = types.SimpleNamespace(device=torch.device("cpu"), half=torch.float16)
    optimizer = common.Optimizer(common.Config(), clip, [p], 2)
    before = optimizer.scaler.get_scale()
    optimizer.step((p * 1e34).sum())
    assert p.item() == 1 and optimizer.scaler.get_scale() == before / 2
    optimizer.end_epoch()  # is no Error: the scale can still be lowered
    optimizer.step(p.sum())
    assert p.item() != 1


def test_gradients_that_overflow_even_unscaled_end_training_though_the_loss_is_finite():
    p = torch.nn.Parameter(torch.ones(1))
    clip = types.SimpleNamespace(device=torch.device("cpu"), half=torch.float16)
    optimizer = common.Optimizer(common.Config(), clip, [p], 2)
    for _ in range(20):
        optimizer.step((p - 1).sqrt().sum())  # 0, and its gradient infinite
    assert p.item() == 1
    with pytest.raises(common.Error, match="loss 0.0"):
        optimizer.end_epoch()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_training_and_keeps_the_last_good_epoch(clip, bad, tmp_path):
    cfg, prompt = coop.Config(out=str(tmp_path)), torch.nn.Linear(1, 1)
    optimizer = optimizer_of(prompt.parameters(), 3)
    with pytest.raises(common.Error, match=f"{bad}.*--lr"):
        for epoch in common.resumed(cfg, clip, toy(), prompt, optimizer):
            good = {name: tensor.clone() for name, tensor in prompt.state_dict().items()}
            optimizer.step(prompt(torch.ones(1)).sum() * (bad if epoch else 1.0))
    state = torch.load(common.run_folder(cfg) / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(torch.equal(state["prompt"][name], tensor) for name, tensor in good.items())
