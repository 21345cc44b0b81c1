"""Ours against the plain path, in one process: a table of times, memory, differences and launches.

    python -m tests.tools.benchmark [--device cpu] [--classes 100,1000] [--rows text,coop,dpt]

The plain path encodes all 77 tokens of every class with open_clip's own blocks. A row is two
epochs of a method's train() on ViT-B/16 with random weights and images; "text" is the text tower
alone, with one context of 16 vectors.

s           seconds of the faster epoch
MB          tensors that the first step saves for its backward pass, without CLIP's weights
differ by   largest difference of losses and of last gradients, relative to the largest value
launches    kernels that one of our steps launches on the emulated GPU, at the first of --classes

On a CPU the plain text tower would save 18 GB at 1000 classes, so it encodes 100 at a time with
gradient checkpointing; its first forward pass is not counted. The project's figures are made with

    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import open_clip
import torch
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.emulated_gpu import Emulated

CHUNK = 100  # classes that the plain path encodes at a time
GENERAL10 = [100, 47, 10, 100, 101, 102, 37, 196, 397, 101]  # classes of each task, 1191 in all
NAMES = open_clip.IMAGENET_CLASSNAMES
SIZE = 250  # pixels, about a photograph of Caltech101
HEAD = """\
| | plain s | ours s | ratio | plain MB | ours MB | losses differ by | gradients by | launches |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


class TextTower:
    """A method whose loss is the sum of the squared text features; it reads no image."""

    Config, learnables = coop.Config, coop.learnables

    def train(cfg, clip, data, prompt):
        optimizer = common.Optimizer(cfg, clip, prompt.parameters(), cfg.epochs)
        names, _ = prompt.embed(clip, data.classnames)
        for _ in common.resumed(cfg, clip, data, prompt, optimizer):
            optimizer.step(common.encode_prompts(clip, names, prompt.ctx).square().sum())


METHODS = {"text": TextTower, "coop": coop, "dpt": dpt, "upt": upt}
METHODS |= {"enprompt": enprompt, "softcpt": softcpt}

spare = []  # seconds of forward passes in chunks, which are computed again backward


def plain_text(clip, prefix, suffix, own, last, group=None):
    """common.encode_text with every sequence padded to 77 tokens, all through the whole tower."""
    (_, P, _), (K, S, _) = prefix.shape, suffix.shape
    end = P + own[last] % S  # (K,) index of [EOT]
    prefix = prefix.expand(K, -1, -1) if len(prefix) == 1 else prefix[group]
    padding = clip.token_embedding.weight[0].expand(K, clip.context_length - P - S, -1)
    x = torch.cat([prefix, suffix, padding], 1)

    def encode(x, end):
        with clip.autocast():
            x = clip.transformer(x + clip.positional_embedding, attn_mask=clip.attn_mask)
            x = clip.ln_final(x)[torch.arange(len(x), device=x.device), end]
            return (x @ clip.text_projection).float()

    if K <= CHUNK or x.device.type != "cpu" or not x.requires_grad:
        return encode(x, end)
    start = time.perf_counter()
    parts = zip(x.split(CHUNK), end.split(CHUNK), strict=True)
    features = [checkpoint(encode, *part, use_reentrant=True) for part in parts]
    spare.append(time.perf_counter() - start)
    return torch.cat(features)


def plain_image(clip, images, prompts=None, patches=False):
    """common.encode_image by open_clip's own blocks."""
    visual = clip.visual
    with clip.autocast():
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        x = x + visual.positional_embedding
        count = x.shape[1]
        for i, block in enumerate([visual.ln_pre, *clip.blocks()], -1):
            with torch.autocast(clip.device.type, enabled=False):
                rows = prompts(i, x[:, :count].float()) if prompts else None
            if rows is not None:
                x = torch.cat([x[:, :count], rows.expand(len(x), -1, -1).to(x.dtype)], 1)
            x = block(x)
        f = (visual.ln_post(x[:, :count]) @ visual.proj).float()
    return (f[:, 0], f[:, 1:]) if patches else f[:, 0]


PLAIN = {"encode_text": plain_text, "encode_image": plain_image}


class Measured(NamedTuple):
    seconds: float  # of the faster epoch
    kept: int  # bytes that the first step keeps for its backward pass; 0: not known
    losses: list
    gradients: list  # of the last step


class Kept(saved_tensors_hooks):
    """Notes the sizes of the tensors saved for backward in its block, except CLIP's weights."""

    def __init__(self, clip):
        super().__init__(self.note, lambda tensor: tensor)
        self.weights = {p.untyped_storage().data_ptr() for p in clip.parameters()}
        self.sizes = {}

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def measure(method, cfg, clip, sets, functions):
    """Measures two epochs of method.train with these functions in place of common's."""
    seconds, losses, kept = [], [], []
    tally, take_step = Kept(clip), common.Optimizer.step

    def resumed(cfg, clip, data, prompt, optimizer):
        for epoch in range(2):
            torch.manual_seed(epoch)  # for dropout
            spare.clear()
            start = now(clip)
            with contextlib.nullcontext() if epoch else tally:
                yield epoch
            seconds.append(now(clip) - start - sum(spare))

    def step(optimizer, loss):
        kept.append(0 if spare else sum(tally.sizes.values()))
        losses.append(loss.detach())
        take_step(optimizer, loss)

    learned = train(method, cfg, clip, sets, step, functions | {"resumed": resumed})
    gradients = [p.grad for p in learned if p.grad is not None]
    return Measured(min(seconds), kept[0], losses, gradients)


def requests(method, cfg, layers, classes, folder):
    """The Counts of one steady-state step on the emulated GPU, including the loading of its batch.
    They depend on CLIP's number of layers, not on its widths."""
    counts, take_step = [], common.Optimizer.step
    sets = [noise(folder, classes, 2 * cfg.batch_size)]
    with Emulated() as gpu:

        def step(*args):
            take_step(*args)
            counts.append(gpu.take())

        clip = common.Clip(narrow(layers), open_clip.get_tokenizer("ViT-B-32"), "nogpu")
        train(method, cfg, clip, sets, step, {"resumed": lambda *args: [0]})
    return counts[-1]


def train(method, cfg, clip, sets, step, functions):
    """Runs method.train silently, with Optimizer.step and some of common's functions replaced;
    returns the learnables."""
    data = softcpt.tasks_of(cfg, sets) if method is softcpt else sets[0]
    prompt = method.learnables(cfg, clip, data)
    with (
        mock.patch.multiple(common, **functions),
        mock.patch.object(common.Optimizer, "step", step),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        method.train(cfg, clip, data, prompt)
    return prompt.parameters()


def now(clip):
    """The time in seconds, once the device has finished its queued work."""
    if clip.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def narrow(layers):
    """A narrow open_clip CLIP with random weights."""
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": layers, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": layers}
    model = open_clip.CLIP(12, vision, text, quick_gelu=True)
    model.visual.image_mean, model.visual.image_std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)
    return model


def noise(folder, classes, count, size=20, name="noise", first=0):
    """A data set of random square images, labelled in turn; its names start at NAMES[first]."""
    rng, items, names = np.random.default_rng(first), [], (NAMES * 2)[first : first + classes]
    for i in range(count):
        path = Path(folder, f"{name}{size}_{i}.png")
        if not path.exists():
            Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).save(path)
        items.append((str(path), i % classes, names[i % classes]))
    return common.Dataset(name, items, items, names)


def general10(folder, count, most):
    """Data sets with the class counts of General-10's tasks, but at most `most`."""
    sets, first = [], 0
    for task, size in enumerate(GENERAL10):
        size = min(size, most)
        share = len(range(task, count, 10))  # of the images
        sets.append(noise(folder, size, share, SIZE, f"task{task}", first))
        first += size
    return sets


def rows(name, clip, classes, images, folder):
    """Yields a method's row of the table for each number of classes."""
    method = METHODS[name]
    cfg = method.Config(epochs=1, lr=1e-4)
    launches = requests(method, cfg, len(clip.blocks()), classes[0], folder).launches.total()
    worlds = [[noise(folder, K, images, SIZE)] for K in classes]
    if method is softcpt:
        worlds = [general10(folder, images, max(classes))]
    for sets in worlds:
        ours, plain = (measure(method, cfg, clip, sets, path) for path in ({}, PLAIN))
        cells = [f"{name}, {sum(len(d.classnames) for d in sets)} classes"]
        seconds = plain.seconds, ours.seconds, plain.seconds / ours.seconds
        cells += [f"{number:.3g}" for number in seconds]
        cells += [f"{path.kept / 2**20:.1f}" if path.kept else "" for path in (plain, ours)]
        cells += [relative(ours.losses, plain.losses), relative(ours.gradients, plain.gradients)]
        yield [*cells, str(launches)]


def relative(ours, plain):
    """The largest difference of two lists of tensors, relative to the largest number."""
    ours, plain = (torch.cat([x.flatten().cpu() for x in tensors]) for tensors in (ours, plain))
    return f"{((ours - plain).abs().max() / plain.abs().max()).item():.1e}"


def main(argv=None):
    """Prints the table, each row as soon as it is measured."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="", help="default: cuda if available, else cpu")
    parser.add_argument("--classes", default="100,1000", help="numbers of classes")
    parser.add_argument("--images", type=int, default=32, help="images of an epoch")
    parser.add_argument("--rows", default=",".join(METHODS), help=f"default: {','.join(METHODS)}")
    options = parser.parse_args(argv)
    names, classes = options.rows.split(","), [int(K) for K in options.classes.split(",")]
    if unknown := set(names) - set(METHODS):
        raise common.Error(f"--rows {unknown.pop()}: no such row; there are {','.join(METHODS)}")
    clip = common.load_clip(common.Config(model="ViT-B-16", pretrained="", device=options.device))
    machine = f"{clip.device}, {os.cpu_count()} CPU cores, torch {torch.__version__}"
    print(f"ViT-B/16, {clip.precision}, {machine}\n\n{HEAD}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for row in rows(name, clip, classes, options.images, folder):
                print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    common.script(main)
