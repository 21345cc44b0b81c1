"""The optimiser and its schedule, by hand and against Dassl's figures."""

import math
from types import SimpleNamespace

import pytest
import torch

import common
import coop
from tests.conftest import toy


def optimizer_of(groups, epochs, lr=0.1, half=None):
    """An Optimizer on the CPU; half: as of a Clip."""
    clip = SimpleNamespace(device=torch.device("cpu"), half=half)
    return common.Optimizer(common.Config(lr=lr), clip, groups, epochs)


def learnable(*values):
    return torch.nn.Parameter(torch.tensor(values))


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
    p, q = learnable(0.0), learnable(0.0)
    optimizer = optimizer_of([{"params": [p], "lr": lr, "warmup": warmup}, {"params": [q]}], E, 0.5)
    for k in range(E):
        found, usual = (group["lr"] for group in optimizer.sgd.param_groups)
        cosine = 0.5 * lr * (1 + math.cos(math.pi * (k - warmup) / E))
        assert found == pytest.approx(cosine if k >= warmup else 1e-5, abs=1e-9)
        assert found == pytest.approx(values.get(k, found), rel=2e-5)
        assert k != 1 or usual == 0.5  # --lr, one epoch of warm-up
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


def test_an_epoch_ends_with_its_mean_loss_and_an_empty_list():
    p = learnable(1.0)
    optimizer = optimizer_of([{"params": [p], "lr": 0.0, "warmup": 0}], 3)
    for value in 1.0, 3.0:
        optimizer.step(value * p.sum())
    assert optimizer.end_epoch() == 2
    optimizer.step(7 * p.sum())
    assert optimizer.end_epoch() == 7


def test_a_first_step_without_a_gradient_is_an_error():
    p, q = learnable(1.0), learnable(1.0)
    for loss in 0 * p.sum(), learnable(1.0).sum():  # a zero gradient, and none
        with pytest.raises(common.Error, match="nothing to learn"):
            optimizer_of([p, q], 2).step(loss)
    optimizer = optimizer_of([p, q], 2)
    optimizer.step(q.sum())  # one learnable is enough
    optimizer.step(0 * p.sum())  # as is the first step


def test_the_loss_is_scaled_in_fp16_alone():
    for half in None, torch.bfloat16, torch.float16:
        optimizer = optimizer_of([learnable(0.0)], 2, half=half)
        assert optimizer.scaler.is_enabled() == (half is torch.float16)


def test_a_gradient_that_overflows_in_fp16_is_skipped_and_lowers_the_scale():
    p = learnable(1.0)
    optimizer = optimizer_of([p], 2, half=torch.float16)
    before = optimizer.scaler.get_scale()
    optimizer.step((p * 1e34).sum())
    assert p.item() == 1 and optimizer.scaler.get_scale() == before / 2
    optimizer.end_epoch()  # is no Error: the scale can still be lowered
    optimizer.step(p.sum())
    assert p.item() != 1


def test_gradients_that_overflow_even_unscaled_end_training_though_the_loss_is_finite():
    p = learnable(1.0)
    optimizer = optimizer_of([p], 2, half=torch.float16)
    for _ in range(20):
        optimizer.step((p - 1).sqrt().sum())  # 0, and its gradient infinite
    assert p.item() == 1
    with pytest.raises(common.Error, match="loss 0.0"):
        optimizer.end_epoch()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_training_and_leaves_the_last_checkpoint(
    clip, bad, tmp_path
):
    cfg, prompt = coop.Config(out=str(tmp_path)), torch.nn.Linear(1, 1)
    optimizer = optimizer_of(prompt.parameters(), 3)
    with pytest.raises(common.Error, match=f"{bad}.*--lr"):
        for epoch in common.resumed(cfg, clip, toy(), prompt, optimizer):
            good = {name: tensor.clone() for name, tensor in prompt.state_dict().items()}
            optimizer.step(prompt(torch.ones(1)).sum() * (bad if epoch else 1.0))
    state = common.read_checkpoint(common.run_folder(cfg) / "checkpoint.pt")
    assert state["epoch"] == 1
    assert all(torch.equal(state["prompt"][name], tensor) for name, tensor in good.items())
