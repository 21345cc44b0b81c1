"""Ours against the plain path, in one process: python tests/benchmark.py [--device cuda].

Plain: every class pushes 77 tokens through the text tower at every step, images are decoded,
augmented and encoded inside every step, and every row of every block is computed. Both run the
method's own train() for two epochs from the same seed; seconds are those of the faster one, and
"difference" is the relative one of the losses and of the last step's gradients. Weights are random
(no download): time does not depend on them. "held" is the memory that a step keeps for its backward
pass; on CUDA, the peak of the memory allocated. "products" is the share of our time inside matrix
products, convolutions and attention, and "bound" the ratio if there were nothing else.

On the CPU the plain text tower at 1000 classes would hold some 40 GB for its backward pass, so it
goes through the classes 100 at a time and computes each chunk a second time backward; the seconds
of the extra forward pass are measured and taken off, and "held" is that of one chunk.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import coop  # noqa: E402
import dpt  # noqa: E402
import enprompt  # noqa: E402
import softcpt  # noqa: E402
import upt  # noqa: E402

PRODUCTS = re.compile(r"::(add|b|addb|baddb)?mm$|convolution|scaled_dot_product")
CHUNK = 100  # classes the plain path encodes at a time
GENERAL10 = [100, 47, 10, 100, 101, 102, 37, 196, 397, 101]  # classes of each task, 1191 in all


class Chunked(torch.autograd.Function):
    """encode(x) by chunks of rows, recomputed backward; extra adds up the spare forward seconds."""

    extra = 0.0

    @staticmethod
    def forward(ctx, encode, x, eot):
        ctx.encode = encode
        ctx.save_for_backward(x, eot)
        start = time.perf_counter()
        with torch.no_grad():
            y = torch.cat(
                [encode(*part) for part in zip(x.split(CHUNK), eot.split(CHUNK), strict=True)]
            )
        Chunked.extra += time.perf_counter() - start
        return y

    @staticmethod
    def backward(ctx, grad):
        x, eot = ctx.saved_tensors
        grads = []
        parts = x.split(CHUNK), eot.split(CHUNK), grad.split(CHUNK)
        for part, at, g in zip(*parts, strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                grads += torch.autograd.grad(ctx.encode(part, at), part, g)
        return None, torch.cat(grads), None


def plain_encode_text(clip, prefix, suffix, eot, group=None):
    """The sequences padded to 77 tokens, all of them through the whole tower."""

    def encode(x, eot):
        with torch.autocast(x.device.type, clip.half_dtype, enabled=bool(clip.half_dtype)):
            x = clip.transformer(x + clip.positional_embedding, attn_mask=clip.attn_mask)
            rows = clip.ln_final(x)[torch.arange(len(x), device=x.device), eot]
            return (rows @ clip.text_projection).float()

    one = group is None or len(prefix) == 1
    prefix = prefix[:1].expand(len(suffix), -1, -1) if one else prefix[group]
    x = torch.cat([prefix, suffix], 1)
    pad = clip.token_embedding.weight[:1].expand(len(x), clip.context_length - x.shape[1], -1)
    x = torch.cat([x, pad], 1)
    if len(x) > CHUNK and x.requires_grad and x.device.type == "cpu":
        return Chunked.apply(encode, x, eot)
    return encode(x, eot)


def plain_encode_image(clip, images, prompts=None, patches=False):
    """encode_image by open_clip's own blocks, each of which computes every row."""
    visual = clip.visual
    with torch.autocast(images.device.type, clip.half_dtype, enabled=bool(clip.half_dtype)):
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        x, count = x + visual.positional_embedding, x.shape[1]
        for i, block in enumerate([visual.ln_pre, *visual.transformer.resblocks], -1):
            rows = prompts and prompts(i, x[:, :count])
            if rows is not None:
                x = torch.cat([x[:, :count], rows.expand(len(x), -1, -1).to(x.dtype)], 1)
            x = block(x)
        f = (visual.ln_post(x[:, :count]) @ visual.proj).float()
    return (f[:, 0], f[:, 1:]) if patches else f[:, 0]


def plain_loader(cfg, clip, data, frozen=False, repeat=0):
    """Images decoded and encoded inside every step."""
    steps = ours["loader"](dataclasses.replace(cfg, cache_gb=1e-9), clip, data)

    def batches(epoch):
        for x, labels in steps(epoch):
            yield (common.unit_features(clip, x) if frozen else x), labels

    return batches


ours = {name: getattr(common, name) for name in ("encode_text", "encode_image", "loader", "step")}


@contextlib.contextmanager
def path(plain):
    """common's functions replaced by the plain ones; yields the list of the steps' losses."""
    losses = []

    def step(loss, optimizer, times=1):
        losses.append(loss.item())
        ours["step"](loss, optimizer, times)

    swap = {"encode_text": plain_encode_text, "encode_image": plain_encode_image}
    swap |= {"loader": plain_loader}
    for name, function in [*(swap.items() if plain else ()), ("step", step)]:
        setattr(common, name, function)
    try:
        yield losses
    finally:
        for name, function in ours.items():
            setattr(common, name, function)


def epoch_seconds(method, cfg, clip, data, plain, epochs=1, profiler=contextlib.nullcontext):
    """Seconds of each epoch of method.train, without its set-up; the losses; the last gradients of
    all learnables in one row; the bytes held."""
    seconds, held = [], []

    def training(cfg, clip, data, prompt, optimizer, scheduler, _):
        optimizer.scaler = torch.amp.GradScaler(
            clip.logit_scale.device.type, enabled=clip.half_dtype is torch.float16
        )
        for epoch in range(epochs):
            synchronize(clip)
            with profiler(), memory(clip, held):
                start, Chunked.extra = time.perf_counter(), 0.0
                yield epoch
                synchronize(clip)
                seconds.append(time.perf_counter() - start - Chunked.extra)

    real, common.training = common.training, training
    try:
        with path(plain) as losses:
            prompt, _ = method.train(cfg, clip, data)
    finally:
        common.training = real
    slopes = [p.grad.flatten().cpu() for p in prompt.parameters() if p.grad is not None]
    return seconds, torch.tensor(losses), torch.cat(slopes), max(held)


def synchronize(clip):
    if clip.logit_scale.is_cuda:
        torch.cuda.synchronize()


@contextlib.contextmanager
def memory(clip, held):
    """Appends to held the bytes at the peak on CUDA, else those of the distinct tensors that are
    kept for a backward pass (freed and taken again, a place counts once)."""
    seen = {}

    def keep(t):
        place, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
        seen[place] = max(size, seen.get(place, 0))
        return t

    if clip.logit_scale.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        yield
        held.append(torch.cuda.max_memory_allocated())
    else:
        frozen = {p.data_ptr() for p in clip.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            yield
        held.append(sum(size for place, size in seen.items() if place not in frozen))


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def text_tower(clip, classes):
    """Forward and backward of K classes in one context of 16: ours against 77 tokens."""
    names = common.embed_names(clip, open_clip.IMAGENET_CLASSNAMES[:classes], 16)
    torch.manual_seed(0)
    ctx = (0.02 * torch.randn(1, 16, names.sos.shape[-1])).to(names.sos.device).requires_grad_()
    results = {}
    for plain in (False, True):
        with path(plain):
            best = float("inf")
            for _ in range(3 if classes <= CHUNK or not plain else 2):
                synchronize(clip)
                start, Chunked.extra, ctx.grad = time.perf_counter(), 0.0, None
                w = common.encode_prompts(clip, names, ctx)
                w.square().sum().backward()
                synchronize(clip)
                best = min(best, time.perf_counter() - start - Chunked.extra)
            held = []
            with memory(clip, held):
                common.encode_prompts(clip, tuple_of(names, CHUNK), ctx)
            results[plain] = best, w.detach(), ctx.grad.clone(), *held
    (a, w, g, m), (b, plain_w, plain_g, plain_m) = results[False], results[True]
    print(
        f"text tower, {classes} classes: plain {b:.2f} s, ours {a:.3f} s, ratio {b / a:.1f}; held "
        f"per {CHUNK} classes {plain_m / 2**20:.0f} and {m / 2**20:.0f} MB; relative difference of "
        f"features {relative(w, plain_w):.1e}, of context gradients {relative(g, plain_g):.1e}",
        flush=True,
    )


def tuple_of(names, count):
    return common.Names(names.sos, *(x[:count] for x in names[1:]))


def drawn_data(folder, classes, images, size=(300, 200)):
    """A data set of drawn JPEGs of Caltech101's usual size, class by class until all are there."""
    rng = np.random.default_rng(0)
    items = []
    for i in range(images):
        file = folder / f"{i}.jpg"
        if not file.exists():
            picture = Image.fromarray(rng.integers(0, 255, (10, 15, 3), dtype=np.uint8))
            picture.resize(size).save(file)
        items.append((str(file), i % classes, ""))
    random.Random(0).shuffle(items)
    names = list(open_clip.IMAGENET_CLASSNAMES[:classes])
    return common.Dataset("drawn", items, [], items, names, common.PHOTO)


def general10(folder, images):
    """General-10's class counts with ImageNet's names: one drawn data set per task."""
    whole, start, sets = drawn_data(folder, 32, images), 0, []
    names = list(open_clip.IMAGENET_CLASSNAMES) * 2
    for task, count in enumerate(GENERAL10):
        train = [(file, i % count, "") for i, (file, *_) in enumerate(whole.train[task::10])]
        one = whole._replace(
            name=f"task {task}", train=train, classnames=names[start : start + count]
        )
        sets.append(one)
        start += count
    return sets


def compare(name, method, cfg, clip, data):
    """Prints one line: seconds per epoch both ways, their ratio, and what else the top explains."""
    seconds, losses, slopes, held = epoch_seconds(method, cfg, clip, data, False, epochs=2)
    plain_seconds, *plain, plain_held = epoch_seconds(method, cfg, clip, data, True, epochs=2)
    a, b = min(seconds), min(plain_seconds)
    profiler = torch.profiler.profile(acc_events=True)
    (whole,), *_ = epoch_seconds(method, cfg, clip, data, False, profiler=lambda: profiler)
    cuda, events = clip.logit_scale.is_cuda, profiler.key_averages()
    events = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    took = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
    share = sum(t for key, t in took.items() if PRODUCTS.search(key)) / 1e6 / whole
    host = f", host {1 - sum(took.values()) / 1e6 / whole:.0%}" if cuda else ""
    print(
        f"{name}: plain {b:.2f} s, ours {a:.2f} s, ratio {b / a:.1f} per epoch; difference of "
        f"losses {relative(losses, plain[0]):.1e}, of gradients {relative(slopes, plain[1]):.1e}; "
        f"held {plain_held / 2**20:.0f} and {held / 2**20:.0f} MB; products {share:.0%}{host}, "
        f"bound {b / a / share:.1f}",
        flush=True,
    )
    return b


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="", help="default: amp on CUDA, fp32 on the CPU")
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--classes", default="100,1000", help="comma list")
    parser.add_argument("--images", type=int, default=32, help="per epoch, in batches of 32")
    parser.add_argument("--rows", default="text,coop,dpt,upt,enprompt,softcpt,views,store")
    options = parser.parse_args()
    precision = options.precision or ("amp" if options.device == "cuda" else "fp32")
    clip = common.load_clip(options.model, "", options.device, precision)
    machine = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    )
    print(f"{options.model}, {precision}, {machine}, torch {torch.__version__}", flush=True)
    rows, classes = options.rows.split(","), [int(k) for k in options.classes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def config(method, **more):
            return method.Config(out=folder, epochs=1, lr=1e-4, seed=1, **more)

        for k in classes if "text" in rows else ():
            text_tower(clip, k)
        for k in classes:
            data, plain = drawn_data(root, k, options.images), 0
            for method in (coop, dpt, upt):
                if method.__name__ in rows:
                    took = compare(
                        f"{method.__name__}, {k} classes", method, config(method), clip, data
                    )
                    plain = took if method is coop else plain
            for batch in (4, 32) if "enprompt" in rows and k == classes[0] else ():
                small = data._replace(train=data.train[:batch])
                cfg = config(enprompt, batch_size=batch)
                compare(f"enprompt, {k} classes, batch {batch}", enprompt, cfg, clip, small)
            if "views" in rows and plain and k == classes[0]:
                cfg = config(coop, views=1)
                (first, later), *_ = epoch_seconds(coop, cfg, clip, data, False, epochs=2)
                ratio = 200 * plain / (10 * first + 190 * later)
                print(
                    f"coop --views 10, {k} classes: ratio {ratio:.1f} over 200 epochs", flush=True
                )
            if "store" in rows and k == classes[0]:
                times = []
                for _ in range(2):
                    start = time.perf_counter()
                    common.classify(config(coop), clip, data.test, lambda f, x: f, False)
                    times.append(time.perf_counter() - start)
                print(
                    f"second evaluation of {len(data.test)} images: ratio {times[0] / times[1]:.0f}"
                )
        if "softcpt" in rows:
            cfg = config(softcpt)
            compare(
                "softcpt, General-10's 1191 classes",
                softcpt,
                cfg,
                clip,
                general10(root, options.images),
            )


if __name__ == "__main__":
    main()
