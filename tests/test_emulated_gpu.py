"""The emulated GPU: what counts as a launch, a wait and a copy, and that the numbers are right."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import gradients
from tests.emulated_gpu import Emulated


@pytest.fixture
def gpu():
    with Emulated() as gpu:
        yield gpu


@pytest.fixture
def x(gpu):
    """A matrix on the device, 0 to 11, for which nothing is counted yet."""
    x = torch.arange(12.0).view(4, 3).to("nogpu")
    gpu.take()
    return x


def totals(gpu):
    """Numbers of launches, waits and copies."""
    return tuple(counter.total() for counter in gpu.take()[:3])


MIXED = {
    "a sum": lambda x: x + torch.ones(4, 3),
    "writing a number": lambda x: torch.zeros(()).add_(x.sum()),
    "an index that is no x[...]": lambda x: F.embedding(torch.tensor([0]), x),
    "writing to a list of rows": lambda x: x.__setitem__([0, 2], x[:2]),
    "an index on the device": lambda x: torch.ones(3)[x[0].long()],
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], torch.ones(1, 4, 3)),
    "a generator": lambda x: torch.randn(2, device="nogpu", generator=torch.Generator()),
}


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED.keys())
def test_mixing_devices_raises(x, mixed):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mixed(x)


def test_a_number_of_the_host_may_be_mixed_in_and_an_index_is_copied(gpu, x):
    assert (x + torch.tensor(1.0)).device.type == "nogpu" and totals(gpu) == (1, 0, 0)
    for index in torch.tensor([0, 2]), [0, 2]:
        chosen = x[index]
        assert totals(gpu) == (1, 0, 1)
        assert chosen.tolist() == [[0.0, 1.0, 2.0], [6.0, 7.0, 8.0]]
        gpu.take()


WAITS = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "format": lambda x: f"{x[0, 0]:.1f}",
    "comparison": lambda x: 1 if x.max() < 1e-3 else 0,
    "copy to the host": lambda x: x.to("cpu", non_blocking=True),
    "nonzero": lambda x: x.nonzero(),
    "mask as an index": lambda x: x[x > 3],
    "masked_select": lambda x: x.masked_select(x > 3),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x[0].long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x[:, 0].long(), 0),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_the_host_waits_for_values_and_sizes(gpu, x, wait):
    wait(x)
    assert gpu.take().waits.total() == 1


NO_WAITS = {
    "index tensor": lambda x: x[x[0].long()],
    "masked_fill": lambda x: x.masked_fill(x > 3, 0.0),
    "where": lambda x: torch.where(x > 3, x, 0.0),
    "topk": lambda x: x.topk(2),
    "repeat_interleave": lambda x: x.repeat_interleave(x[0].new_ones(4).long(), 0, output_size=4),
    "cross entropy": lambda x: F.cross_entropy(x, x[:, 0].long().clamp(0, 2)),
    "a constant": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="nogpu"),
}


@pytest.mark.parametrize("asked", NO_WAITS.values(), ids=NO_WAITS.keys())
def test_the_host_does_not_wait_for_what_stays_on_the_device(gpu, x, asked):
    asked(x)
    launches, waits, *_ = gpu.take()
    assert launches and not waits


def test_a_wait_names_the_line_of_our_own_code(gpu, x):
    torch.equal(x, x)  # this line
    with open(__file__, encoding="utf-8") as file:
        number = next(i for i, line in enumerate(file, 1) if line.endswith("x)  # this line\n"))
    expected = f"test_emulated_gpu.py:{number} torch.equal(x, x)  # this line"
    assert list(gpu.take().places) == [expected]


def test_a_view_launches_nothing_and_shares_its_numbers(gpu, x):
    view = x.t().unsqueeze(0)[:, 1:].expand(2, 2, 4).unbind()[0]
    assert totals(gpu) == (0, 0, 0)
    view.zero_()
    assert totals(gpu) == (1, 0, 0)
    assert x.tolist() == [[3.0 * i, 0.0, 0.0] for i in range(4)]


def test_a_copy_to_the_device_is_one_copy_without_a_wait(gpu):
    host = torch.ones(3)
    there = host.to("nogpu", non_blocking=True)
    assert totals(gpu) == (0, 0, 1)
    assert there.to("nogpu") is there and totals(gpu) == (0, 0, 0)
    assert there.double().dtype == torch.float64 and totals(gpu) == (1, 0, 0)
    host.zero_()
    assert there.tolist() == [1.0, 1.0, 1.0]


def test_attention_is_one_launch_each_way_with_the_numbers_of_the_cpu(gpu):
    host = torch.randn(3, 2, 4, 5, 8).requires_grad_()
    there = host.detach().to("nogpu").requires_grad_()
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    gpu.take()
    out = F.scaled_dot_product_attention(*there.unbind(), mask.to("nogpu"))
    assert dict(gpu.take().launches) == {"attention": 1}
    loss = out.square().sum()
    gpu.take()
    (slope,) = gradients(loss, [there])
    assert gpu.take().launches["attention backward"] == 1
    expected = F.scaled_dot_product_attention(*host.unbind(), mask)
    torch.testing.assert_close(out.cpu(), expected)
    torch.testing.assert_close(slope.cpu(), *gradients(expected.square().sum(), [host]))


def test_dropout_is_one_launch_each_way(gpu):
    layer, x = nn.Dropout(0.5), torch.ones(100).to("nogpu").requires_grad_()
    layer(x).sum().backward()
    launches = gpu.take().launches
    assert launches["native_dropout"] == launches["native_dropout_backward"] == 1
    assert set(x.grad.tolist()) == {0.0, 2.0}
    assert layer.eval()(x) is x


def test_fused_sgd_is_one_launch(gpu):
    module = nn.Linear(3, 3).to("nogpu")
    module(torch.ones(2, 3).to("nogpu")).sum().backward()
    gpu.take()
    torch.optim.SGD(module.parameters(), 0.1, fused=True).step()
    assert dict(gpu.take().launches) == {"_fused_sgd_": 1}


def test_a_file_is_written_from_the_host(gpu, x):
    file = io.BytesIO()
    torch.save({"there": x}, file)
    file.seek(0)
    found = torch.load(file, map_location="cpu", weights_only=True)["there"]
    assert found.device.type == "cpu" and found.tolist() == x.tolist()


def test_outside_of_the_block_a_tensor_of_the_device_is_refused():
    with Emulated():
        x = torch.ones(2).to("nogpu")
    with pytest.raises(RuntimeError, match="outside"):
        x + 1
