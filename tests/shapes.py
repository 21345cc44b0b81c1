"""The shapes world: a procedural data set and its own tiny CLIP, so that nothing is downloaded.

Draws 32 x 32 RGB pictures of 10 shapes x 4 textures x 8 colours, vectorised in torch, and pretrains
a CLIP of OpenAI's architecture made small on captions of them. Its weights, tiny_clip.safetensors
beside this file, took 41 minutes on two CPU cores and classify 99.8 % of new pictures zero-shot:

    python tests/shapes.py         # pretrain again, over that file
"""

import argparse
import json
import math
import os
import random
import shutil
import time
import zlib
from collections import namedtuple
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

SHAPES = "circle square triangle star cross heart ring moon arrow hourglass".split()
TEXTURES = "plain striped dotted checkered".split()
COLOURS = {
    "red": (0.85, 0.1, 0.1),
    "orange": (1.0, 0.5, 0.0),
    "yellow": (0.95, 0.9, 0.1),
    "green": (0.1, 0.7, 0.15),
    "cyan": (0.1, 0.85, 0.9),
    "blue": (0.1, 0.2, 0.9),
    "purple": (0.6, 0.1, 0.8),
    "white": (1.0, 1.0, 1.0),
}
SIZE = 32  # pixels
MODEL = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 128, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
}
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
WEIGHTS = Path(__file__).with_name("tiny_clip.safetensors")


def _inside(u, v):
    """(10, ...) masks of the shapes in their own frame: u to the right, v up, both about -1..1."""
    r, angle = (u**2 + v**2).sqrt(), torch.atan2(u, v)
    fold = torch.remainder(angle, 2 * math.pi / 5) - math.pi / 5  # a tip at each end, a notch at 0
    x, y = r * torch.cos(math.pi / 5 - fold.abs()), r * torch.sin(math.pi / 5 - fold.abs())
    notch_x, notch_y = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    return torch.stack(
        [
            r < 0.85,
            torch.maximum(u.abs(), v.abs()) < 0.75,
            (v > -0.7) & (u.abs() < (0.95 - v) * 0.55),
            (x - 1) * notch_y - y * (notch_x - 1) < 0,
            torch.minimum(u.abs(), v.abs()).lt(0.28) & torch.maximum(u.abs(), v.abs()).lt(0.9),
            ((1.25 * u) ** 2 + (1.25 * v - 0.1) ** 2 - 1) ** 3 < (1.25 * u) ** 2 * (1.25 * v) ** 3,
            (r < 0.95) & (r > 0.5),
            (r < 0.95) & ((u - 0.45) ** 2 + v**2 > 0.55),
            ((u.abs() < 0.26) & (v.abs() < 0.9) & (v < 0.2))
            | ((v >= 0.05) & (u.abs() < (0.95 - v) * 0.9)),
            (u.abs() < 0.85 * v.abs() + 0.1) & (v.abs() < 0.85),
        ]
    )


def _marked(u, v, period):
    """(4, ...) masks of the texture's second colour: plain, striped, dotted, checkered."""
    a, b = 2 * math.pi * u / period, 2 * math.pi * v / period
    return torch.stack(
        [
            torch.zeros_like(u, dtype=torch.bool),
            torch.sin(b) > 0,
            torch.cos(a) + torch.cos(b) > 0.75,
            torch.sin(0.75 * a) * torch.sin(0.75 * b) > 0,
        ]
    )


def draw(shape, texture, colour, generator, tilt=25.0, spread=1.0):
    """Draws pictures; place, size, tilt, shades and background are random.

    shape, texture, colour: (B,) indices. tilt: degrees either way. spread: 1 for the usual variety
    of place and size. Returns (B, 3, 32, 32) in 0..1.
    """
    n = len(shape)

    def uniform(low, high, *size):
        return low + (high - low) * torch.rand(n, *size, generator=generator)

    axis = (torch.arange(2 * SIZE) + 0.5) / SIZE - 1  # twice the resolution, averaged below
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    centre, size = spread * uniform(-0.18, 0.18, 2), 0.78 + spread * uniform(-0.13, 0.13)
    angle = uniform(-1, 1) * math.radians(tilt)
    cos, sin = (f(angle)[:, None, None] / size[:, None, None] for f in (torch.cos, torch.sin))
    x, y = x - centre[:, :1, None], y - centre[:, 1:, None]
    u, v = cos * x + sin * y, cos * y - sin * x  # (B, 64, 64)
    row = torch.arange(n)
    body = _inside(u, v)[shape, row][:, None].float()
    marks = _marked(u + uniform(-1, 1, 1, 1), v + uniform(-1, 1, 1, 1), uniform(0.5, 0.7, 1, 1))
    marks = marks[texture, row][:, None].float()

    ink = torch.tensor(list(COLOURS.values()))[colour]
    ink = ink * uniform(0.8, 1.0, 1) + uniform(-0.06, 0.06, 3)
    second = ink * uniform(0.1, 0.35, 1)
    grey = uniform(0.15, 0.55, 1) + uniform(-0.07, 0.07, 3)
    slope = uniform(-0.12, 0.12, 2)
    ground = grey[:, :, None, None] + (slope[:, :1, None] * x + slope[:, 1:, None] * y)[:, None]
    inside = ink[:, :, None, None] * (1 - marks) + second[:, :, None, None] * marks
    picture = F.avg_pool2d(body * inside + (1 - body) * ground, 2)
    return (picture + 0.02 * torch.randn(picture.shape, generator=generator)).clamp(0, 1)


TEMPLATES = """{}
a {}.
a photo of a {}.
a photo of the {}.
itap of a {}.
a bad photo of the {}.
a origami {}.
a photo of the large {}.
a {} in a video game.
art of the {}.
a photo of the small {}.
a drawing of a {}.
this is a {}.
a picture of one {}.
there is a {} in the picture.
a small picture that shows a {}.""".splitlines()
FILLERS = """classification of objects by their shape texture colour kind form pattern surface
pictures drawings general fine grained simple images photos things tasks recognise tell which what
is the of a an in on at with without and or for from to this that these old new good bad big small
large little bright dark low high first last one two three many some any other same long short left
right up down near far open closed soft hard fast slow early late clean noisy blurred inverted paper
wall table window door house street city field river sea sky day night summer winter hand eye face
man woman child animal plant tree flower stone water fire air light sound word name number line
point page book story music art work game play make take give find see look show hold keep turn move
run stand there here very more most quite just also only then now again type sort image picture
photo view scene""".split()
NOUNS = "thing object shape one".split()
STYLES = "clear blurry faded grainy".split()  # what a caption can say of the picture as a whole


def caption(attributes, fillers, rng):
    """One caption of (shape, texture, colour, style) and which of the four it mentions, as bools.

    fillers: how many random words to put around the name, so that the text tower has seen class
    names at every position a learned context can push them to.
    """
    says = rng.random() < 0.88, rng.random() < 0.75, rng.random() < 0.5
    says = says if any(says) else (True, True, False)
    says = (*says, attributes[3] > 0 and rng.random() < 0.6)
    noun = SHAPES[attributes[0]] if says[0] else rng.choice(NOUNS)
    words = [STYLES[attributes[3]]] * says[3] + [list(COLOURS)[attributes[2]]] * says[2]
    words += [TEXTURES[attributes[1]]] * says[1]
    name = " ".join([*words, noun])
    if not says[0] and rng.random() < 0.3:
        name = " ".join(words)
    if fillers and rng.random() < 0.9:
        front = rng.choices(FILLERS, k=fillers)
        cut = fillers if rng.random() < 0.7 else rng.randint(0, fillers)
        return " ".join([*front[:cut], name, *front[cut:]]) + ".", says
    return rng.choice(TEMPLATES).format(name), says


def words():
    """Sorted ids of every token that a caption can hold: the only rows of the embedding stored."""
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    text = [*TEMPLATES, *FILLERS, *NOUNS, *SHAPES, *TEXTURES, *COLOURS, *STYLES, "X"]
    text.append("shapes textures colours")
    return tokenize(text).unique()


def normalised(images):
    mean, std = (torch.tensor(t)[:, None, None] for t in (MEAN, STD))
    return (images - mean) / std


def pretrain(steps, seed=0, batch=256, lr=1e-3):
    """Contrastive pretraining; a caption is a positive of every picture that it is true of.

    The logit scale rises linearly from CLIP's initial 1/0.07 to CLIP's final 100 over the first
    two thirds: a small model left alone settles near 27, too low for the papers' learning rates.
    """
    start, rng, generator = time.time(), random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    tokenize, vocabulary = open_clip.get_tokenizer("ViT-B-32"), words()
    text_cfg = {**MODEL["text_cfg"], "vocab_size": len(vocabulary)}
    clip = open_clip.CLIP(**{**MODEL, "text_cfg": text_cfg})
    clip.logit_scale.requires_grad_(False)
    learned = [p for p in clip.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.08)
    bar = tqdm(range(steps))
    for step in bar:
        kinds = len(SHAPES), len(TEXTURES), len(COLOURS)
        chosen = [torch.randint(k, (batch,), generator=generator) for k in kinds]
        style = (torch.rand(batch, generator=generator) * 6.5 - 2.5).clamp(min=0).long()
        images = distort(zoom(draw(*chosen, generator), generator), style, generator)
        attributes = torch.stack([*chosen, style], 1)  # (B, 4)
        fillers = rng.choice([0, rng.randint(1, 22)])
        captions, says = zip(*(caption(a, fillers, rng) for a in attributes.tolist()), strict=True)
        same = attributes[:, None] == attributes[None]  # (B images, B captions, 4)
        true = (same | ~torch.tensor(says)[None]).all(-1).float()
        tokens = torch.searchsorted(vocabulary, tokenize(list(captions)))
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast as fp32
            f, w = clip.encode_image(normalised(images)), encode_cut(clip, tokens)
        f, w = F.normalize(f.float(), dim=-1), F.normalize(w.float(), dim=-1)
        scale = 1 / 0.07 + (100 - 1 / 0.07) * min(1, step / (steps * 2 / 3))
        pairs = (scale * f @ w.T, true), (scale * w @ f.T, true.T)
        loss = sum(F.cross_entropy(m, t / t.sum(1, keepdim=True)) for m, t in pairs) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            bar.write(f"step {step + 1}: zero-shot {100 * accuracy(clip, vocabulary):.1f} %")
    clip.logit_scale.fill_(math.log(scale))
    save_file({k: v.half() for k, v in clip.state_dict().items()}, WEIGHTS)
    minutes, percent = (time.time() - start) / 60, 100 * accuracy(clip, vocabulary)
    print(f"{steps} steps in {minutes:.0f} minutes: zero-shot {percent:.1f} %")


def distort(images, style, generator):
    """The styles that captions name, mild: blurred, faded or grainy; style (B,): 0 leaves as is."""
    strength = torch.rand(len(images), 1, 1, 1, generator=generator)
    kind = style[:, None, None, None]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    grey = 0.3 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator)
    faded = grey + (0.35 + 0.35 * strength) * (images - grey)
    grainy = images + (0.06 + 0.08 * strength) * torch.randn(images.shape, generator=generator)
    for index, version in enumerate((blurred, faded, grainy), 1):
        images = torch.where(kind == index, version, images)
    return images.clamp(0, 1)


def zoom(images, generator):
    """Crops and mirrors half of the pictures as training will: 25 to 100 % of the area."""
    n = len(images)
    side = (0.25 + 0.75 * torch.rand(n, generator=generator)).sqrt()
    side[torch.rand(n, generator=generator) < 0.5] = 1
    aspect = torch.where(side < 1, 0.87 + 0.28 * torch.rand(n, generator=generator), torch.ones(n))
    sides = torch.stack([side * aspect, side / aspect], 1).clamp(max=1)  # (B, 2) of width, height
    shift = (1 - sides) * (2 * torch.rand(n, 2, generator=generator) - 1)
    mirror = 1 - 2 * (torch.rand(n, generator=generator) < 0.5).float()
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = sides[:, 0] * mirror, sides[:, 1], shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    how = {"mode": "bicubic", "padding_mode": "border", "align_corners": False}
    return F.grid_sample(images, grid, **how).clamp(0, 1)


def encode_cut(clip, tokens):
    """clip.encode_text without the positions after the longest caption."""
    length = tokens.argmax(1).max() + 1
    x = clip.token_embedding(tokens[:, :length]) + clip.positional_embedding[:length]
    x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
    x = clip.ln_final(x)[torch.arange(len(x)), tokens.argmax(1)]
    return x @ clip.text_projection


@torch.no_grad()
def accuracy(clip, vocabulary, count=2000):
    """Zero-shot accuracy over the 40 classes of shape and texture on new pictures."""
    generator = torch.Generator().manual_seed(1234)
    attributes = [torch.randint(k, (count,), generator=generator) for k in (10, 4, 8)]
    f = clip.encode_image(normalised(draw(*attributes, generator)))
    tokens = open_clip.get_tokenizer("ViT-B-32")(
        [f"a photo of a {t} {s}." for s in SHAPES for t in TEXTURES]
    )
    w = F.normalize(encode_cut(clip, torch.searchsorted(vocabulary, tokens)), dim=-1)
    return ((f @ w.T).argmax(1) == attributes[0] * 4 + attributes[1]).float().mean().item()


CROP = (0.5, 1.0)  # area kept by the training crop: the papers' .08 of 32 pixels shows no shape
Task = namedtuple("Task", "classes template change variety", defaults=[{}])
CAMERA = {"colour": 0.5, "gamma": 1.2, "grain": 0.2}  # of the few-shot tasks
TASKS = {
    "shapes": Task("shape", "a photo of a {}.", CAMERA),
    "shapes_clean": Task("shape", "a photo of a {}.", {}),
    "shapes_negative": Task("shape", "a photo of a {}.", {"negative": True}),
    "shapes_blurred": Task("shape", "a photo of a {}.", {"blur": 5}),
    "shapes_grey": Task("shape", "a photo of a {}.", {"colour": 0.0}),
    "textures": Task("texture", "a photo of a {} thing.", CAMERA),
    "colours": Task("colour", "a photo of a {} thing.", CAMERA),
    # UPT's two cases: much variety inside a class, and classes that look alike
    "shapes_varied": Task("outline", "a photo of a {}.", CAMERA, {"tilt": 180.0, "spread": 1.8}),
    "shapes_alike": Task("ring", "a photo of a {}.", CAMERA),
}
COUNTS = {"train": 20, "val": 4, "test": 50}  # per class


def change(images, generator, colour=1.0, gamma=1.0, blur=1, grain=0.0, negative=False):
    """The shifts that pretraining never saw, on images (B, 3, 32, 32) in 0..1."""
    grey = images.mean(1, keepdim=True)
    images = (grey + colour * (images - grey)) ** gamma
    images = 1 - images if negative else images
    images = F.avg_pool2d(F.pad(images, (blur // 2,) * 4, mode="replicate"), blur, 1)
    return (images + grain * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def class_names(kind):
    """Class names of a task and what fixes each: (shape, texture, colour) indices, -1 = any."""
    if kind == "texture":
        return {t: (-1, i, -1) for i, t in enumerate(TEXTURES)}
    if kind == "colour":
        return {c: (-1, -1, i) for i, c in enumerate(COLOURS)}
    if kind == "outline":
        return {s: (i, -1, -1) for i, s in enumerate(SHAPES)}
    if kind == "ring":
        pairs = [(c, i, t, j) for i, c in enumerate(COLOURS) for j, t in enumerate(TEXTURES)]
        return {f"{c}_{t}_ring": (SHAPES.index("ring"), j, i) for c, i, t, j in pairs}
    return {f"{t}_{s}": (i, j, -1) for i, s in enumerate(SHAPES) for j, t in enumerate(TEXTURES)}


def write(root, name):
    """Writes the task (or "clip", the tiny CLIP) below root on first use; returns its folder."""
    folder = root / "shapes" / name
    if folder.exists():
        return folder
    draft = folder.with_name(f".{name}.{os.getpid()}")
    draft.mkdir(parents=True)
    write_clip(draft) if name == "clip" else write_task(draft, name)
    try:
        draft.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(draft)
    return folder


def write_task(folder, name):
    task = TASKS[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for part, count in COUNTS.items():
        for c, fixed in class_names(task.classes).items():
            free = [torch.randint(k, (count,), generator=generator) for k in (10, 4, 8)]
            chosen = [
                torch.full_like(r, i) if i >= 0 else r for i, r in zip(fixed, free, strict=True)
            ]
            images = draw(*chosen, generator, **task.variety)
            images = change(images, generator, **task.change)
            (folder / part / c).mkdir(parents=True)
            for i, image in enumerate((255 * images).round().byte().permute(0, 2, 3, 1).numpy()):
                Image.fromarray(image).save(folder / part / c / f"{i:03d}.png")


def write_clip(folder):
    """An open_clip local-dir model: unused token rows, which the weights file lacks, are noise."""
    state = {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}
    rows = 0.02 * torch.randn(49408, 128, generator=torch.Generator().manual_seed(0))
    rows[words()] = state["token_embedding.weight"]
    save_file(state | {"token_embedding.weight": rows}, folder / "open_clip_model.safetensors")
    config = {"model_cfg": MODEL, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7000)
    pretrain(parser.parse_args().steps)
