"""The emulated GPU: what counts as a launch, a wait and a copy, and that the numbers are right."""

import copy
import io

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.nogpu import DEVICE, Emulated


@pytest.fixture
def gpu():
    with Emulated() as gpu:
        yield gpu


@pytest.fixture
def x(gpu):
    """A matrix on the device, 0 to 11, for which nothing is counted yet."""
    x = torch.arange(12.0).view(4, 3).to("nogpu")
    gpu.reset()
    return x


def counts(gpu):
    return gpu.launches.total(), gpu.waits.total(), gpu.copies.total()


def clip_and_batch():
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 48, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
    clip = open_clip.CLIP(24, vision, text)
    return clip, torch.randn(3, 3, 32, 32), torch.randint(1, 100, (3, 77))


def contrastive_step(clip, images, texts, optimizer):
    f = F.normalize(clip.encode_image(images), dim=-1)
    w = F.normalize(clip.encode_text(texts), dim=-1)
    loss = F.cross_entropy(clip.logit_scale.exp() * f @ w.T, torch.arange(3, device=images.device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


MIXED = {
    "a sum": lambda x: x + torch.ones(4, 3),
    "writing a number": lambda x: torch.zeros(()).add_(x.sum()),
    "an index that is no x[...]": lambda x: F.embedding(torch.tensor([0]), x),
    "an index on the device": lambda x: torch.ones(3)[x[0].long()],
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], torch.ones(1, 4, 3)),
}


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED.keys())
def test_mixing_devices_raises(x, mixed):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mixed(x)


def test_a_number_of_the_host_may_be_mixed_in_and_an_index_is_copied(gpu, x):
    assert (x + torch.tensor(1.0)).device == DEVICE and counts(gpu) == (1, 0, 0)
    gpu.reset()
    assert x[torch.tensor([0, 2])].device == DEVICE and counts(gpu) == (1, 0, 1)


def test_a_list_in_an_index_is_copied_to_the_device(gpu, x):
    x[:, [0, 2]] = x[[0]][:, [1]]
    assert gpu.copies["to device"] == 3 and not gpu.waits
    assert x.tolist()[3] == [1.0, 10.0, 1.0]


def test_a_generator_of_the_host_is_refused(gpu):
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device="nogpu", generator=torch.Generator())


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
    assert gpu.waits.total() == 1


RUNS_AHEAD = {
    "index tensor": lambda x: x[x[0].long()],
    "masked_fill": lambda x: x.masked_fill(x > 3, 0.0),
    "where": lambda x: torch.where(x > 3, x, 0.0),
    "topk": lambda x: x.topk(2),
    "repeat_interleave": lambda x: x.repeat_interleave(x[0].new_ones(4).long(), 0, output_size=4),
    "cross entropy": lambda x: F.cross_entropy(x, x[:, 0].long().clamp(0, 2)),
    "a constant": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="nogpu"),
}


@pytest.mark.parametrize("ahead", RUNS_AHEAD.values(), ids=RUNS_AHEAD.keys())
def test_the_host_runs_ahead_of_what_stays_on_the_device(gpu, x, ahead):
    ahead(x)
    assert gpu.launches
    assert not gpu.waits


def test_a_wait_names_the_line_of_our_own_code(gpu, x):
    torch.equal(x, x)  # this line
    assert list(gpu.places) == [f"test_nogpu.py:{this_line()} torch.equal(x, x)  # this line"]


def this_line():
    with open(__file__, encoding="utf-8") as file:
        return next(i for i, line in enumerate(file, 1) if line.endswith("x)  # this line\n"))


def test_a_view_launches_nothing_and_shares_its_numbers(gpu, x):
    view = x.t().unsqueeze(0)[:, 1:].expand(2, 2, 4).unbind()[0]
    assert counts(gpu) == (0, 0, 0)
    view.zero_()
    assert counts(gpu) == (1, 0, 0)
    assert x.tolist() == [[3.0 * i, 0.0, 0.0] for i in range(4)]
    assert x[:1].squeeze_(0).shape == (3,) and gpu.launches.total() == 1
    assert x.double().dtype == torch.float64 and gpu.launches.total() == 2


def test_a_copy_to_the_device_is_one_copy_without_a_wait(gpu):
    host = torch.ones_like(torch.empty(3, pin_memory=True)).pin_memory()
    there = host.to("nogpu", non_blocking=True)
    assert counts(gpu) == (0, 0, 1) and gpu.copies["to device"] == 1
    assert there.to("nogpu") is there and counts(gpu) == (0, 0, 1)
    host.zero_()
    assert there.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_is_one_launch_each_way(gpu, dropout):
    q, k, v = torch.randn(3, 2, 4, 5, 8).to("nogpu").requires_grad_().unbind()
    gpu.reset()
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    assert dict(gpu.launches) == {"attention": 1}
    gpu.reset()
    torch.autograd.grad(out, (q, k, v), out.detach())
    assert dict(gpu.launches) == {"attention backward": 1}


def test_a_training_step_has_the_numbers_of_the_cpu_and_no_wait(gpu):
    clip, images, texts = clip_and_batch()
    there = copy.deepcopy(clip).to("nogpu")
    batch = images.to("nogpu"), texts.to("nogpu")
    optimizers = [torch.optim.SGD(c.parameters(), 0.1, 0.9, fused=True) for c in (clip, there)]
    for _ in range(2):
        gpu.reset()
        loss = contrastive_step(clip, images, texts, optimizers[0])
        emulated = contrastive_step(there, *batch, optimizers[1])
        assert emulated.device == DEVICE
        assert not gpu.waits and gpu.launches["_fused_sgd_"] == 1
        assert gpu.launches["attention"] == gpu.launches["attention backward"] == 4
        torch.testing.assert_close(emulated.cpu(), loss)
    for ours, theirs in zip(there.parameters(), clip.parameters(), strict=True):
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_numbers_are_the_same(gpu, context):
    clip, images, _ = clip_and_batch()
    there, batch = copy.deepcopy(clip).to("nogpu"), images.to("nogpu")
    gpu.reset()
    with context():
        features = there.encode_image(batch)
        assert not gpu.waits and gpu.launches["attention"] == 2
        torch.testing.assert_close(features.cpu(), clip.encode_image(images))


def test_attention_that_returns_weights_trains_with_dropout_of_one_launch(gpu):
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).to("nogpu")
    x = torch.randn(2, 5, 8).to("nogpu")
    out, weights = attention(x, x, x)
    out.square().sum().backward()
    assert weights.shape == (2, 5, 5)
    assert gpu.launches["native_dropout"] == gpu.launches["native_dropout_backward"] == 1
    assert attention.in_proj_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_takes_kernels_for_lists_unless_it_is_fused(gpu, optimizer):
    modules = [nn.Linear(3, 3).to("nogpu") for _ in range(2)]
    launches = []
    for module, fused in zip(modules, [None, True], strict=True):
        module(torch.ones(2, 3).to("nogpu")).sum().backward()
        step = optimizer(module.parameters(), 0.1, fused=fused).step
        step()
        gpu.reset()
        step()
        launches.append(set(gpu.launches))
    assert launches[0] and all(name.startswith("_foreach") for name in launches[0])
    assert len(launches[1] - {"_foreach_add_"}) == 1  # AdamW counts its steps on the device


def test_copies_of_modules_and_optimizers_go_on_alike(gpu):
    module, x = nn.Linear(3, 3).to("nogpu"), torch.ones(2, 3).to("nogpu")
    optimizer = torch.optim.SGD(module.parameters(), 0.1, 0.9, fused=True)
    twins = [(module, optimizer)]
    for step in range(3):
        for m, o in twins:
            o.zero_grad()
            m(x).square().sum().backward()
            o.step()
        if step == 0:
            twin = copy.deepcopy(module)
            assert isinstance(twin.weight, nn.Parameter) and twin.weight.device == DEVICE
            again = torch.optim.SGD(twin.parameters(), 0.1, 0.9, fused=True)
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            twins.append((twin, again))
    assert torch.equal(twin.weight, module.weight)


def test_a_file_is_written_from_the_host_and_read_onto_the_device(gpu, x):
    file = io.BytesIO()
    torch.save({"there": x, "host": x.cpu(), "step": 3}, file)
    file.seek(0)
    found = torch.load(file, map_location="nogpu", weights_only=True)
    assert found["there"].device == found["host"].device == DEVICE
    assert torch.equal(found["there"], x) and found["step"] == 3


def test_autocast_and_a_disabled_scaler_change_nothing(gpu, x):
    with torch.autocast("nogpu", torch.float16):
        assert (x @ x.T).dtype == torch.float32
    scaler = torch.amp.GradScaler("nogpu", enabled=False)
    assert scaler.scale(x) is x


def test_outside_of_the_block_a_tensor_of_the_device_is_refused():
    with Emulated():
        x = torch.ones(2).to("nogpu")
    with pytest.raises(RuntimeError, match="outside"):
        x + 1
