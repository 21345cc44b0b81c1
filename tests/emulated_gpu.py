"""An emulated GPU: the CPU's numbers under the name of another device, and every request counted.

    with Emulated() as gpu:
        model, x = model.to("nogpu"), x.to("nogpu")
        step(model, x)  # the first step makes what later steps find
        gpu.take()
        step(model, x)
        counts = gpu.take()  # of what was asked since the take() before
    counts.launches  # Counter by operator: the kernels that the host asks for
    counts.waits  # Counter by operator: GPU synchronisations, for a value or a size
    counts.copies  # Counter of "to device" and "to host"
    counts.places  # Counter of "file:line code", the line of our own code behind each wait

Mixing devices raises as CUDA does. Tensors of the device are for this block and its thread; code
that backward() calls, such as a hook, may use them but not move others with `.to("nogpu")`.

How it works: a `DeviceTensor` has no memory of its own; it holds a tensor of the CPU, its `host`.
Each operator on it arrives, after autograd has recorded it, in `Operators`, which counts it, runs
it on the tensors of the host and wraps the result. `Requests` comes earlier, where Python calls
PyTorch, and catches what would bypass `Operators`.

What it cannot show: time, memory, the numbers of CUDA's own kernels, its random numbers (a
generator is always the CPU's and refused), a second device or stream, autocast (allowed, without
effect), and what happens inside an operator: several kernels count as one, and the waits of linear
algebra not at all. What our code does not use is missing: inference mode, pinned memory,
torch.load() to the device, x[[0, 2]] = y. A copy to the host waits. In the block the device "meta"
is this one as well.
"""

import contextlib
import functools
import linecache
import sysconfig
import traceback
import types
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_KERNEL = MEMORY | {"_unsafe_view", "lift_fresh", "_local_scalar_dense"}  # besides the views
LIBRARIES = (sysconfig.get_path("stdlib"), str(Path(torch.__file__).parents[1]), __file__)

# Autograd asks a device for its streams, in C++, where a name of our own has no answer; "meta" is a
# device that needs none. Therefore C++ is told "meta" where Python is told "nogpu".
CPP_DEVICE = torch.device("meta")


@functools.cache
def device():
    """The device, registered at its first use: torch.device() reads registered names only, and a
    registration lasts for the whole process."""
    torch.utils.rename_privateuse1_backend("nogpu")
    module = types.SimpleNamespace(
        is_available=lambda: False,  # for torch.accelerator, which would ask for streams
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        manual_seed_all=lambda seed: None,  # random numbers are the CPU's, seeded as always
        _is_in_bad_fork=lambda: False,
    )
    torch._register_device_module("nogpu", module)
    return torch.device("nogpu", 0)


def is_ours(value):
    names = ("nogpu", "nogpu:0", "meta")
    return isinstance(value, str | torch.device) and str(value) in names


class DeviceTensor(torch.Tensor):
    """A tensor on the device. Its numbers are those of host, a tensor of the CPU."""

    device = property(lambda self: device())
    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, dtype=host.dtype, device=CPP_DEVICE, **layout
        )
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a tensor of the emulated device, outside of Emulated()")

    def __getitem__(self, key):
        """A list of numbers in the key is copied to the device."""
        key = key if isinstance(key, tuple) else (key,)
        key = [torch.tensor(x).to(CPP_DEVICE) if isinstance(x, list) else x for x in key]
        return super().__getitem__(tuple(key))

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.detach().cpu(), spec)

    def __repr__(self):  # for debuggers and failed assertions: not counted
        return f"nogpu {self.host!r}"

    def __reduce_ex__(self, protocol):  # torch.save writes a tensor of the CPU
        return self.detach().cpu().__reduce_ex__(protocol)


@functools.cache
def is_view(func):
    """Whether func returns a view of its input: its signature is like (Tensor(a)) -> Tensor(a)."""
    if torch.Tag.inplace_view in func.tags:
        return True
    results = [result.alias_info for result in func._schema.returns]
    return bool(results) and all(info is not None and not info.is_write for info in results)


def needs_answer(func, args, kwargs):
    """Whether the host must know a value, or the size of the result, before it can go on."""
    name = func.overloadpacket.__name__
    if name in INDEXING:
        indices = [i for i in args[1] if isinstance(i, DeviceTensor)]
        return any(i.dtype in (torch.bool, torch.uint8) for i in indices)
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in tags)


def refuse(name, tensor):
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, nogpu:0 "
        f"and cpu! ({name}, a tensor of shape {tuple(tensor.shape)} on the cpu)"
    )


class Operators(TorchDispatchMode):
    """Counts each operator, holds it to CUDA's rules and runs it on the CPU."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [*tensors_in((*args, *kwargs.values()))]
        on_device = any(isinstance(x, DeviceTensor) for x in tensors)
        if name == "copy_":
            on_device = isinstance(args[0], DeviceTensor)
        elif kwargs.get("device") is not None:
            on_device = is_ours(kwargs["device"])

        if name == "copy_":
            self.count_copy(name, source=args[1], to_device=on_device)
        elif name == "_to_copy":
            self.count_copy(name, source=args[0], to_device=on_device)
        elif on_device:
            self.refuse_mixed(func, args, kwargs, tensors)
            if needs_answer(func, args, kwargs):
                self.gpu.wait(name)
            if name not in NO_KERNEL and not is_view(func):
                self.gpu.counts.launches[name] += 1
        return run(func, args, kwargs, on_device)

    def count_copy(self, name, source, to_device):
        """Within the device a copy is a kernel; to the host it waits for the numbers."""
        from_device, counts = isinstance(source, DeviceTensor), self.gpu.counts
        if from_device and to_device:
            counts.launches[name] += 1
        elif to_device:
            counts.copies["to device"] += 1
        elif from_device:
            counts.copies["to host"] += 1
            self.gpu.wait("to host")

    def refuse_mixed(self, func, args, kwargs, tensors):
        """Refuses tensors of the host, except single numbers and indices (which CUDA copies)."""
        name = func.overloadpacket.__name__
        if kwargs.get("generator") is not None:
            refuse(name, kwargs["generator"].get_state())
        if not any(isinstance(x, DeviceTensor) for x in tensors):
            return  # zeros_like() and the like, of a tensor of the host for the device
        written = args[0] if name.endswith("_") else None
        indices = []
        if name in INDEXING and isinstance(args[0], DeviceTensor):
            indices = [id(x) for x in args[1]]
        for x in tensors:
            if isinstance(x, DeviceTensor) or (x.dim() == 0 and x is not written):
                continue
            if id(x) not in indices or x.is_meta:
                refuse(name, x)
            self.gpu.counts.copies["to device"] += 1


def run(func, args, kwargs, on_device):
    """Runs func on the tensors of the host; the result is the device's if on_device."""
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if torch.Tag.inplace_view in func.tags:  # squeeze_() changes the shape of the wrapper, too
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
    args, kwargs = changed(DeviceTensor, lambda x: x.host, (args, kwargs))
    result = func(*args, **kwargs)
    return changed(torch.Tensor, DeviceTensor, result) if on_device else result


def tensors_in(values):
    """Yields the tensors among an operator's arguments, those in lists too."""
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from tensors_in(x)


def changed(kind, change, x):
    """x with change(y) for each y of a kind in it. PyTorch's tree_map_only() does the same and
    takes longer than all else here."""
    if isinstance(x, kind):
        return change(x)
    if isinstance(x, list | tuple):
        return type(x)([changed(kind, change, y) for y in x])
    if isinstance(x, dict):
        return {key: changed(kind, change, y) for key, y in x.items()}
    return x


class Requests(TorchFunctionMode):
    """Calls of Python that name the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_ours(kwargs.get("device")):
            # They fill memory themselves, without an operator
            return func(*args, **kwargs | {"device": "cpu"}).to(CPP_DEVICE)
        args = [CPP_DEVICE if is_ours(x) else x for x in args]
        kwargs = {key: CPP_DEVICE if is_ours(x) else x for key, x in kwargs.items()}
        return func(*args, **kwargs)


class Attention(torch.autograd.Function):
    """Fused attention: one kernel forward and one backward."""

    @staticmethod
    def forward(ctx, gpu, options, mask, *qkv):
        gpu.counts.launches["attention"] += 1
        learned = any(ctx.needs_input_grad)
        ctx.gpu = gpu
        ctx.qkv = [x.host.detach().requires_grad_(learned) for x in qkv]
        mask = None if mask is None else mask.host
        with torch.set_grad_enabled(learned):
            ctx.out = nn.functional.scaled_dot_product_attention(*ctx.qkv, mask, **options)
        return DeviceTensor(ctx.out.detach())

    @staticmethod
    def backward(ctx, grad):
        ctx.gpu.counts.launches["attention backward"] += 1
        grads = torch.autograd.grad(ctx.out, ctx.qkv, grad.host, retain_graph=True)
        return None, None, None, *map(DeviceTensor, grads)


class Counts(NamedTuple):
    launches: Counter
    waits: Counter
    copies: Counter
    places: Counter


class Emulated:
    """Within this context "nogpu" is a device, and all requests to it are counted."""

    def __init__(self):
        device()
        self.take()

    def take(self):
        """The Counts since the take() before."""
        taken = getattr(self, "counts", None)
        self.counts = Counts(Counter(), Counter(), Counter(), Counter())
        return taken

    def wait(self, name):
        """Notes a wait, and the innermost line on the stack that is not a library's."""
        self.counts.waits[name] += 1
        for frame, line in traceback.walk_stack(None):
            file = frame.f_code.co_filename
            if not file.startswith(LIBRARIES):
                code = linecache.getline(file, line).strip()
                self.counts.places[f"{Path(file).name}:{line} {code}"] += 1
                return

    def attention(self, q, k, v, mask=None, dropout=0.0, causal=False, **options):
        for x in (q, k, v, mask):
            if x is not None and not isinstance(x, DeviceTensor):
                refuse("attention", x)
        assert mask is None or not mask.requires_grad, "attention to a learned mask"
        options = options | {"dropout_p": dropout, "is_causal": causal}
        return Attention.apply(self, options, mask, q, k, v)

    def dropout(self, x, p, train):
        return aten.native_dropout(x, p, train)[0] if train and p > 0 else x

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        enter = self.stack.enter_context
        # PyTorch makes these of many kernels on devices that it does not know; CUDA has one each
        library = enter(torch.library._scoped_library("aten", "IMPL"))
        library.impl("scaled_dot_product_attention", self.attention, "AutogradMeta")
        library.impl("dropout", self.dropout, "AutogradMeta")
        enter(Operators(self))
        enter(Requests())
        return self

    def __exit__(self, *error):
        self.stack.close()
