"""Ours against the plain path, in one process.

    python common.py benchmark [--device cuda] [--classes 100,1000] [--rows text,coop,dpt]

Plain: at every step each class pushes all of its 77 tokens through the text tower, and both towers
run open_clip's own blocks. Both paths run the method's own main(), without its evaluation, for two
epochs from the same seed; seconds are those of the faster epoch. "Difference" is the largest one,
relative to the largest number: of the losses, and of the last step's gradients. Weights are random,
so nothing is downloaded: time does not depend on them. "Kept" is the memory that a step keeps for
its backward pass; on CUDA the peak of the memory allocated. Launches and waits are those of one
step of ours on the emulated device, tests/nogpu.py, at --count_classes classes.

On the CPU the plain text tower at 1000 classes would keep some 20 GB for its backward pass, so it
goes through the classes 100 at a time and computes each chunk a second time backward; the seconds
of the spare forward pass are measured and taken off, and what is kept is that of one chunk.

Linux's C library gives large blocks back to the system and takes them anew, page by page, which at
1000 classes costs ours a quarter of its time. MALLOC_MMAP_THRESHOLD_=4294967296 and
MALLOC_TRIM_THRESHOLD_=8589934592, set before the command, keep them, for both paths.
"""

import contextlib
import dataclasses
import importlib
import os
import random
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import torch
from PIL import Image

import common

CHUNK = 100  # classes that the plain path encodes at a time
ROWS = "text,coop,dpt,upt,enprompt,softcpt"
GENERAL10 = [100, 47, 10, 100, 101, 102, 37, 196, 397, 101]  # classes of each task, 1191 in all
NAMES = open_clip.IMAGENET_CLASSNAMES
EMULATED = Path(__file__).parents[1] / "nogpu.py"


# ------------------------------------------------------------------------------- the plain path


class Chunked(torch.autograd.Function):
    """encode(x, eot) by chunks of rows, recomputed backward; spare: seconds of the first pass."""

    spare = 0.0

    @staticmethod
    def forward(ctx, encode, x, eot):
        ctx.encode = encode
        ctx.save_for_backward(x, eot)
        start, features = time.perf_counter(), []
        with torch.no_grad():
            for part, ends in zip(x.split(CHUNK), eot.split(CHUNK), strict=True):
                features.append(encode(part, ends))
        Chunked.spare += time.perf_counter() - start
        return torch.cat(features)

    @staticmethod
    def backward(ctx, grad):
        x, eot = ctx.saved_tensors
        parts = zip(x.split(CHUNK), eot.split(CHUNK), grad.split(CHUNK), strict=True)
        grads = []
        for part, ends, slope in parts:
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                features = ctx.encode(part, ends)
            grads += torch.autograd.grad(features, part, slope)
        return None, torch.cat(grads), None


def plain_text(clip, prefix, suffix, eot, group=None, layout=None):
    """common.encode_text with every sequence padded to 77 tokens, all through the whole tower."""

    def encode(x, eot):
        with clip.autocast():
            x = clip.transformer(x + clip.positional_embedding, attn_mask=clip.attn_mask)
            last = clip.ln_final(x)[torch.arange(len(x), device=x.device), eot]
            return (last @ clip.text_projection).float()

    if len(prefix) == 1:
        prefix = prefix.expand(len(suffix), -1, -1)
    else:
        prefix = prefix[group]
    missing = clip.context_length - prefix.shape[1] - suffix.shape[1]
    padding = clip.token_embedding.weight[0].expand(len(suffix), missing, -1)
    x = torch.cat([prefix, suffix, padding], 1)
    if len(x) > CHUNK and x.requires_grad and x.device.type == "cpu":
        return Chunked.apply(encode, x, eot.to(x.device))
    return encode(x, eot.to(x.device))


def plain_image(clip, images, prompts=None, patches=False):
    """common.encode_image by open_clip's own blocks."""
    visual = clip.visual
    with clip.autocast():
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        x = x + visual.positional_embedding
        count = x.shape[1]
        blocks = [visual.ln_pre, *visual.transformer.resblocks]
        for i, block in enumerate(blocks, -1):
            rows = prompts(i, x[:, :count]) if prompts else None
            if rows is not None:
                x = torch.cat([x[:, :count], rows.expand(len(x), -1, -1).to(x.dtype)], 1)
            x = block(x)
        f = (visual.ln_post(x[:, :count]) @ visual.proj).float()
    return (f[:, 0], f[:, 1:]) if patches else f[:, 0]


PLAIN = {"encode_text": plain_text, "encode_image": plain_image}


@contextlib.contextmanager
def swapped(functions):
    """In this block common has these functions in place of its own."""
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(common, name, function))
        yield


# ---------------------------------------------------------------------------- what is measured


@dataclasses.dataclass
class Measured:
    """Of one path: seconds of its epochs, losses of its steps, the last gradients, bytes kept."""

    seconds: list = dataclasses.field(default_factory=list)
    losses: list = dataclasses.field(default_factory=list)
    gradients: list = dataclasses.field(default_factory=list)
    kept: int = 0


def train(method, cfg, clip, data, plain, epochs=2):
    """Runs method.main on data, a dict of Datasets by name, without its evaluation."""
    found = Measured()

    def resumed(cfg, clip, data, prompt, optimizer):
        for epoch in range(epochs):
            torch.manual_seed(epoch)  # for dropout
            with kept(clip, found):
                start, Chunked.spare = now(clip), 0.0
                yield epoch
                found.seconds.append(now(clip) - start - Chunked.spare)
            found.losses += [loss.cpu() for loss in optimizer.losses]
            optimizer.end_epoch()
        slopes = [p.grad for p in prompt.parameters() if p.grad is not None]
        found.gradients = [slope.flatten().cpu() for slope in slopes]

    functions = {
        "load_clip": lambda cfg: clip,
        "load_dataset": lambda name, root: data[name],
        "resumed": resumed,
        "evaluate": lambda *args: 0.0,
    }
    with swapped(functions | (PLAIN if plain else {})):
        method.main(cfg)
    return found


def now(clip):
    """Seconds, once the device has done what it was asked for."""
    if clip.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def kept(clip, found):
    """Notes in found the bytes at the peak on CUDA, else those of the distinct tensors kept for a
    backward pass: memory freed and taken again counts once, weights do not count."""
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        sizes[place] = max(storage.nbytes(), sizes.get(place, 0))
        return tensor

    if clip.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield
        found.kept = torch.cuda.max_memory_allocated()
        return
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield
    weights = {p.untyped_storage().data_ptr() for p in clip.parameters()}
    found.kept = sum(size for place, size in sizes.items() if place not in weights)


def relative(ours, plain):
    """The largest difference, relative to the largest number."""
    return ((ours - plain).abs().max() / plain.abs().max()).item()


def requests(method, cfg, layers, classes):
    """(launches, waits) of one step in steady state on the emulated device. They depend on the
    layers, not on the width, so CLIP is narrow here."""
    nogpu, step, after = importlib.import_module("tests.nogpu"), common.Optimizer.step, []
    data = {"drawn": noise(classes, 3 * cfg.batch_size)}
    cfg = dataclasses.replace(cfg, device="nogpu", dataset="drawn")
    with nogpu.Emulated() as gpu:

        def counted(*args):
            step(*args)
            after.append((gpu.launches.total(), gpu.waits.total()))

        clip = common.Clip(narrow(layers), open_clip.get_tokenizer("ViT-B-16"), "nogpu")
        with mock.patch.object(common.Optimizer, "step", counted):
            train(method, cfg, clip, data, plain=False, epochs=1)
    (launches, waits), (more, longer) = after[-2:]
    return more - launches, longer - waits


def narrow(layers):
    """A CLIP of open_clip of little width, with random weights."""
    vision = {"image_size": 16, "layers": layers, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": layers}
    model = open_clip.CLIP(12, vision, text, quick_gelu=True)
    model.visual.image_mean = model.visual.image_std = (0.5, 0.5, 0.5)
    return model


# -------------------------------------------------------------------------------------- the data


def drawn(folder, classes, images):
    """A data set of drawn JPEGs of Caltech101's usual size, class by class until all are there."""
    rng = np.random.default_rng(0)
    items = []
    for i in range(images):
        file = folder / f"{i}.jpg"
        if not file.exists():
            picture = Image.fromarray(rng.integers(0, 255, (10, 15, 3), dtype=np.uint8))
            picture.resize((300, 200)).save(file)
        items.append((str(file), i % classes, ""))
    random.Random(0).shuffle(items)
    return common.Dataset("drawn", items, [], items, list(NAMES[:classes]))


def noise(classes, images):
    """A data set of small pictures in memory."""
    pictures = torch.randint(256, (images, 3, 20, 20), dtype=torch.uint8)
    items = [(picture, i % classes, "") for i, picture in enumerate(pictures)]
    return common.Dataset("drawn", items, [], items, list(NAMES[:classes]))


def general10(folder, images, most):
    """Data sets with the class counts of General-10's tasks, but at most `most`, by name."""
    whole, names, sets = drawn(folder, 32, images), list(NAMES) * 2, {}
    for task, count in enumerate(GENERAL10):
        count = min(count, most)
        files = [file for file, _, _ in whole.train[task::10]]
        train = [(file, i % count, "") for i, file in enumerate(files)]
        own, names = names[:count], names[count:]
        sets[f"task{task}"] = whole._replace(name=f"task{task}", train=train, classnames=own)
    return sets


# -------------------------------------------------------------------------------------- the rows


def text_row(clip, classes):
    """Forward and backward of K classes in one context of 16, and what is kept for CHUNK."""
    names = common.embed_names(clip, NAMES[:classes], 16)
    few = names.select(torch.arange(min(classes, CHUNK)))
    torch.manual_seed(0)
    ctx = 0.02 * torch.randn(1, 16, names.sos.shape[-1])
    ctx = ctx.to(clip.device).requires_grad_()
    results = []
    for functions in {}, PLAIN:
        found = Measured()
        with swapped(functions):
            for _ in range(2 if functions and classes > CHUNK else 3):
                start, Chunked.spare, ctx.grad = now(clip), 0.0, None
                w = common.encode_prompts(clip, names, ctx)
                w.square().sum().backward()
                found.seconds.append(now(clip) - start - Chunked.spare)
            with kept(clip, found):
                common.encode_prompts(clip, few, ctx)
        results.append((found, w.detach().cpu(), ctx.grad.cpu()))
    (ours, w, slope), (plain, plain_w, plain_slope) = results
    features, gradients = relative(w, plain_w), relative(slope, plain_slope)
    differences = f"features {features:.1e}, gradients {gradients:.1e}"
    show(f"text tower, {classes} classes", ours, plain, differences)


def method_row(name, method, cfg, clip, data, counts=""):
    """Both paths through the method's training."""
    ours = train(method, cfg, clip, data, plain=False)
    plain = train(method, cfg, clip, data, plain=True)
    losses = relative(torch.stack(ours.losses), torch.stack(plain.losses))
    gradients = relative(torch.cat(ours.gradients), torch.cat(plain.gradients))
    differences = f"losses {losses:.1e}, gradients {gradients:.1e}{counts}"
    show(name, ours, plain, differences)


def show(name, ours, plain, rest):
    a, b = min(ours.seconds), min(plain.seconds)
    print(
        f"{name}: plain {b:.2f} s, ours {a:.3f} s, ratio {b / a:.1f}; kept "
        f"{plain.kept / 2**20:.0f} and {ours.kept / 2**20:.0f} MB; difference of {rest}",
        flush=True,
    )


def counted(method, cfg, clip, classes):
    """What a step asks of the emulated device, as text; "" where tests/nogpu.py was not copied."""
    if not EMULATED.exists():
        return ""
    layers = len(clip.blocks())
    launches, waits = requests(method, cfg, layers, classes)
    return f"; {launches} launches, {waits} waits a step ({layers} layers, {classes} classes)"


def load(options):
    """The Clip of --model with random weights, and its first --layers layers."""
    precision = options.precision or ("amp" if options.device == "cuda" else "fp32")
    clip = common.load_clip(options.model, "", options.device, precision)
    clip.blocks()  # raises Error for a ResNet, which has no plain path here
    for tower in clip.transformer, clip.visual.transformer:
        tower.resblocks = tower.resblocks[: options.layers or None]
    machine = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{options.model}, {precision}, {machine}, torch {torch.__version__}", flush=True)
    return clip


def numbers(text):
    """The numbers of a comma list. Raises ValueError."""
    return [int(number) for number in text.split(",")]


def parsed(argv):
    parser = common.Parser("python common.py benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="", help="default: amp on CUDA, fp32 on the CPU")
    parser.add_argument("--model", default="ViT-B-16", help="an open_clip name, or local-dir:DIR")
    parser.add_argument("--layers", type=int, default=0, help="of each tower; 0: all")
    note = "comma list; of a task the largest"
    parser.add_argument("--classes", type=numbers, default="100,1000", help=note)
    parser.add_argument("--count_classes", type=int, default=100, help="at which steps are counted")
    parser.add_argument("--images", type=int, default=32, help="of an epoch")
    parser.add_argument("--rows", default=ROWS, help="comma list")
    options = parser.parse_args(argv)
    if unknown := set(options.rows.split(",")) - set(ROWS.split(",")):
        raise common.Error(f"--rows {','.join(sorted(unknown))}: unknown; there are {ROWS}")
    return options


def main(argv):
    """Prints one line per row and number of classes."""
    options = parsed(argv)
    clip, rows = load(options), options.rows.split(",")
    classes = options.classes
    for K in classes if "text" in rows else ():
        text_row(clip, K)
    usual = {"epochs": 1, "lr": 1e-4, "shots": 0}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in [row for row in rows if row not in ("text", "softcpt")]:
            method = importlib.import_module(name)
            cfg = method.Config(out=folder, dataset="drawn", **usual)
            counts = counted(method, cfg, clip, options.count_classes)
            for K in classes:
                data = {"drawn": drawn(root, K, options.images)}
                method_row(f"{name}, {K} classes", method, cfg, clip, data, counts)
        if "softcpt" in rows:
            method = importlib.import_module("softcpt")
            data = general10(root, options.images, max(classes))
            K = sum(len(task.classnames) for task in data.values())
            cfg = method.Config(out=folder, dataset=",".join(data), **usual)
            counts = counted(method, cfg, clip, options.count_classes)
            method_row(f"softcpt, {K} classes of 10 tasks", method, cfg, clip, data, counts)
