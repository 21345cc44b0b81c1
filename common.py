"""What the five methods share, because it can move a number without being the method.

    python common.py --dataset caltech101 [--ensemble]     # zero-shot CLIP
    python common.py report [--plot accuracy.png]          # the table of all recorded runs

Letters: B batch, K classes, M context vectors, G contexts, P rows of a prefix or prompt, S rows
of a suffix, N patches, d width of a tower, D joint width; f image features, w text features.
Official files are those of KaiyangZhou/CoOp ff61507 and KaiyangZhou/Dassl.pytorch c61a1b5.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import huggingface_hub
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from timm.data import ImageNetInfo
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as vision
from tqdm import tqdm

try:
    from tests import shapes  # the default data set and its tiny CLIP
except ImportError:
    shapes = None

# Data set, folder below --data, images in it, reader (with a git blob id: split_zhou_<it>.json).
TABLE = """
imagenet        imagenet             images                                  wnids
caltech101      caltech-101          101_ObjectCategories   Caltech101             8be694a80de04a39
dtd             dtd                  images                 DescribableTextures    8dd197a94b598fa4
eurosat         eurosat              2750                   EuroSAT                6bdc847a5d5c49dc
fgvc_aircraft   fgvc_aircraft        images                                  aircraft
food101         food-101             images                 Food101                39557040ee6501bd
oxford_flowers  oxford_flowers       jpg                    OxfordFlowers          8d10037b0690b6c6
oxford_pets     oxford_pets          images                 OxfordPets             fa821d9f9e7d32fd
stanford_cars   stanford_cars        .                      StanfordCars           dcdb8264712e9940
sun397          sun397               SUN397                 SUN397                 8d5725db8f70bcf0
ucf101          ucf101               UCF-101-midframes      UCF101                 ea87e3de7b4f6f00
imagenetv2      imagenetv2           imagenetv2-matched-frequency-format-val wnids
imagenet_sketch imagenet-sketch      images                                  wnids
imagenet_a      imagenet-adversarial imagenet-a                              wnids
imagenet_r      imagenet-rendition   imagenet-r                              wnids
"""
TABLE = {row.split()[0]: row.split()[1:] for row in TABLE.strip().splitlines()}
PHOTO = "a photo of a {}."
TEMPLATES = {  # CoOp's CUSTOM_TEMPLATES (trainers/zsclip.py); PHOTO for the others
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "food101": "a photo of {}, a type of food.",
    "ucf101": "a photo of a person doing {}.",
}
SEVEN = [t("{}") for t in open_clip.SIMPLE_IMAGENET_TEMPLATES]  # CoOp's ensemble
IMAGES = tuple(".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm".split())
BICUBIC = InterpolationMode.BICUBIC
TEST_BATCH = 100  # images, as Dassl
PARTS = "train", "val", "test"
SCORES = ("zero_shot", "zero_shot_mean_class"), ("accuracy", "mean_class_accuracy")  # percent
Dataset = namedtuple("Dataset", "name train val test classnames template")
Names = namedtuple("Names", "sos tail eot length")


class Error(ValueError):
    """Bad input: one line that names the thing and the way out."""


@dataclasses.dataclass
class Config:
    dataset: str = "shapes"  # a data set's name or a folder of yours; a comma list makes a grid
    shots: int = 16  # training images per class, 0 = all; a comma list makes a grid
    seed: int = 1  # of picks, initialisation and order; a comma list makes a grid
    classes: Literal["all", "base"] = "all"  # base: train on the first half; base, new and H
    transfer: str = ""  # comma list of further data sets to evaluate the trained prompt on
    model: str = "ViT-B-16"  # open_clip name, local-dir:DIR or hf-hub:NAME; shapes has its own
    pretrained: str = "openai"  # open_clip tag or weights file; "" = random weights
    epochs: int = 0  # 0 = the paper's schedule
    batch_size: int = 32  # images per step
    lr: float = 2e-3  # of SGD, cosine
    precision: Literal["", "amp", "bf16", "fp32"] = ""  # default: amp on CUDA, else fp32
    device: str = ""  # default: cuda where there is one, else cpu
    data: str = "data"  # folder of the data sets
    out: str = "runs"  # folder of everything written
    download: bool = False  # fetch what is missing below --data
    workers: int = 8  # threads that decode images
    cache_gb: float = 0.0  # memory for decoded training images; 0 = a quarter of what is free
    shard: str = ""  # i/n: only every n-th run of the grid, from the i-th (1 to n)
    force: bool = False  # redo finished runs
    load: str = ""  # folder of a finished run: evaluate or ask it, train nothing
    predict: str = ""  # with --load: images or folders to classify
    names: str = ""  # with --predict: comma list of class names to choose from
    json: bool = False  # with --predict: one JSON line per image
    interpret: bool = False  # with --load: the words nearest to each learned text vector


# The options from device on do not change what is learned, so they are no part of a run's name.
UPKEEP = [field.name for field in dataclasses.fields(Config)]
UPKEEP = {*UPKEEP[UPKEEP.index("device") :], "transfer", "attention", "task"}


def cli(cls, argv=None):
    """Command line -> cls, a Config; a field's comment is its help, shots and seed may be lists."""
    source = "".join(inspect.getsource(c) for c in cls.__mro__[-2::-1])
    notes = dict(re.findall(r"^ +(\w+): .*?  # (.+)$", source, re.M))
    form, about = argparse.RawDescriptionHelpFormatter, sys.modules[cls.__module__].__doc__
    parser = argparse.ArgumentParser(description=about, formatter_class=form, allow_abbrev=False)
    parser.error = lambda m: stop(f"{m}; --help lists every option".replace("<lambda>", "N,.."))
    for field in dataclasses.fields(cls):
        kind = {"type": field.type, "metavar": getattr(field.type, "__name__", "").upper()}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif choices := get_args(field.type):
            kind = {"choices": choices}
        elif field.name in ("shots", "seed"):
            kind = {"type": lambda text: [int(n) for n in text.split(",")], "metavar": "N,.."}
        elif field.name == "predict":
            kind = {"nargs": "+", "metavar": "PATH"}
        note = notes.get(field.name, "").replace("%", "%%") + f" [{field.default}]"
        parser.add_argument(f"--{field.name}", default=field.default, help=note, **kind)
    return cls(**vars(parser.parse_args(argv)))


def stop(message):
    """Ends the program: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def run_folder(cfg):
    """runs/<method>/<dataset>/<name>; the name holds every option that changes what is learned."""
    given = {f.name: v for f in dataclasses.fields(cfg) if (v := getattr(cfg, f.name)) != f.default}
    own = [f"_{n}={v}" for n, v in given.items() if n not in UPKEEP | {"dataset", "shots", "seed"}]
    name = f"{cfg.shots}shots_seed{cfg.seed}" + "".join(own)
    plain = [re.sub(r"[^\w.=+,-]+", "-", part).strip("-.")[:110] for part in (cfg.dataset, name)]
    digest = "-" + hashlib.md5(f"{cfg.dataset}/{name}".encode()).hexdigest()[:8]
    return Path(cfg.out, method(cfg), plain[0], plain[1] + digest * (plain != [cfg.dataset, name]))


def method(cfg):
    return Path(inspect.getfile(type(cfg))).stem


def tool(name):
    """tests/<name>.py: what no number depends on stays out of this file."""
    try:
        return importlib.import_module(f"tests.{name}")
    except ModuleNotFoundError as problem:
        stop(f"{problem}: this needs the repository's tests/ beside common.py")


@functools.lru_cache(1)
def load_clip(model, pretrained="openai", device="cpu", precision="fp32"):
    """An open_clip model of class CLIP, frozen, in eval mode, QuickGELU as its tag (or file) says.
    model: open_clip name, "local-dir:DIR" or "hf-hub:NAME"; pretrained: tag, file, "" for random
    weights. precision "amp" (fp16) or "bf16" hold the towers' matrices in half, all else in fp32.
    Adds .tokenize, .half_dtype (None in fp32), .fingerprint (of fp32 weights). Raises Error."""
    named, known = ":" not in model, open_clip.list_models()
    if named and model not in known:
        near = ", ".join(difflib.get_close_matches(model, known, 3, 0.3))
        raise Error(f"--model {model}: open_clip has no such model; near it: {near}")
    options = {"pretrained": named and pretrained or None, "require_pretrained": not named}
    if named and (tag := open_clip.get_pretrained_cfg(model, pretrained)):
        options["quick_gelu"] = tag.get("quick_gelu", False)
    try:
        torch.empty(0, device=device)
        huggingface_hub.utils.logging.set_verbosity_error()  # instead of 40 lines of retries
        with warnings.catch_warnings(action="ignore"):
            clip = open_clip.create_model(model, **options)
        clip.tokenize, clip.half_dtype = open_clip.get_tokenizer(model), None
    except Exception as problem:  # open_clip raises many kinds
        raise Error(f"--model {model}: {problem} (--device {device})") from None
    clip.requires_grad_(False).eval()
    if device == "cpu" and sys.platform == "linux":  # freed memory stays ours: no new page faults
        for option in (-4, 0), (-1, -1):  # glibc, whole process: M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(*option)
    try:  # the towers below must give the model's own features
        ids, size = clip.tokenize(["a photo of a dog"]), np.max(clip.visual.image_size)
        x, image = clip.token_embedding(ids), torch.rand(1, 3, size, size)
        ours = encode_text(clip, x[:, :1], x[:, 1:], ids.argmax(1)), encode_image(clip, image)
        theirs = clip.encode_text(ids), clip.encode_image(image)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    except (AttributeError, TypeError, ValueError, RuntimeError, AssertionError):
        why = "is not of open_clip's class CLIP with a causal text tower and OpenAI's ViT or ResNet"
        raise Error(f"--model {model} is not supported: its {type(clip).__name__} {why}") from None
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    clip.fingerprint = digest.hexdigest()[:16]
    clip.half_dtype = {"amp": torch.float16, "bf16": torch.bfloat16, "fp32": None}[precision]
    if clip.half_dtype:
        open_clip.model.convert_weights_to_lp(clip, clip.half_dtype)
    return clip.to(device)


def _block(block, x, attend):
    """A frozen pre-LN block on x (..., d); attend(q, kv): attention of q to kv (..., 2d). Returns
    out(rows), its output at an index of x, so that only the rows in use are computed, and kv."""
    attn, d = block.attn, x.shape[-1]
    y = block.ln_1(x)
    kv = F.linear(y, attn.in_proj_weight[d:], attn.in_proj_bias[d:])

    def out(rows):
        q = F.linear(y[rows], attn.in_proj_weight[:d], attn.in_proj_bias[:d])
        z = x[rows] + block.ls_1(attn.out_proj(attend(q, kv, heads=attn.num_heads)))
        return z + block.ls_2(block.mlp(block.ln_2(z)))

    return out, kv


def attention(q, kv, heads, mask=None):
    """Attention of q (B, Q, d) to keys and values kv (B, T, 2d); mask: True = may attend."""
    parts = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, -1))]
    return F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(2)


def encode_text(clip, prefix, suffix, eot, group=None):
    """(K, D) fp32 features of prefix + suffix, as clip.encode_text: in a causal tower nothing
    before the class name depends on it and nothing after the EOT reaches it, so each prefix runs
    once and the suffixes, cut at their EOT, attend to its keys and values. prefix (G, P, d), suffix
    (K, S, d): token embeddings without positions. eot (K,): place in the whole. group (K,): each
    class's prefix (None or one: row 0). In attention, 8 neighbours share a copy of their prefix."""
    (K, S, _), (G, P, _), blocks = suffix.shape, prefix.shape, clip.transformer.resblocks
    place, length = torch.arange(P + K * S, device=eot.device), eot + 1 - P
    owner = place[:K].repeat_interleave(length)  # (n,) class of each token; no padding
    group = torch.zeros_like(eot) if group is None or G == 1 else group
    key, row = (group * K + place[:K] // 8).unique_consecutive(return_inverse=True)  # (R,), (K,)
    count = row[owner].bincount()  # tokens of each row
    filled = place[: count.max()] < count[:, None]  # (R, W): in attention's R rows of W places
    slot = filled.flatten().nonzero()[:, 0]  # (n,) place of each token there

    def spread(x, to):  # (n, c) -> (R, W, c): row i at place to[i], 0 where none stands
        return x.new_zeros(filled.numel(), x.shape[1]).index_copy_(0, to, x).view(*filled.shape, -1)

    def attend(q, kv, heads, past, to):
        kv = torch.cat([past.index_select(0, key // K), spread(kv, slot)], 1)
        return attention(spread(q, to), kv, heads, mask).flatten(0, 1).index_select(0, to)

    own, causal = spread(owner[:, None], slot), place[:P] <= place[:P, None]
    mask = F.pad((own == own.mT).tril(), (P, 0), value=True)[:, None]  # True = may attend
    with torch.autocast(suffix.device.type, clip.half_dtype, enabled=bool(clip.half_dtype)):
        out = (prefix + clip.positional_embedding[:P]).__getitem__
        y = (suffix + clip.positional_embedding[P : P + S])[place[:S] < length[:, None]]  # (n, d)
        for block in blocks:
            out, past = _block(block, out(...), functools.partial(attention, mask=causal))
            rows = length.cumsum(0) - 1 if block is blocks[-1] else ...  # there only the EOTs
            y = _block(block, y, functools.partial(attend, past=past, to=slot[rows]))[0](rows)
        return (clip.ln_final(y) @ clip.text_projection).float()


def encode_image(clip, images, prompts=None, patches=False):
    """Image features, with prompt rows from one hook: prompts(i, tokens) is asked before block i,
    and at i = -1 before ln_pre, with the (B, 1 + N, d) tokens that are not prompts. The (P, d) or
    (B, P, d) rows it returns replace the prompt rows, None keeps them. images (B, 3, H, W),
    normalised. Returns (B, D) fp32 features, with patches also (B, N, D). Error for a ResNet."""
    visual = clip.visual
    with torch.autocast(images.device.type, clip.half_dtype, enabled=bool(clip.half_dtype)):
        if not hasattr(visual, "transformer"):
            if prompts or patches:
                raise Error("this image tower takes no visual prompts; try --model ViT-B-16")
            return visual(images).float()
        x = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, N, d)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        out, count = (x + visual.positional_embedding).__getitem__, x.shape[1]
        for i, block in enumerate([visual.ln_pre, *visual.transformer.resblocks], -1):
            tokens = out(np.s_[:, :count])
            stay = (rows := prompts and prompts(i, tokens)) is None
            rows = out(np.s_[:, count:]) if stay else rows.expand(len(x), -1, -1).to(x.dtype)
            x = torch.cat([tokens, rows], 1) if rows.shape[1] else tokens
            out = _block(block, x, attention)[0] if i >= 0 else block(x).__getitem__
            if (stay or not rows.shape[1]) and block is not visual.transformer.resblocks[-1]:
                out = out(...).__getitem__  # what stayed likely stays again: all rows in one go
        x = visual.ln_post(out(np.s_[:, : count if patches else 1])) @ visual.proj
    return (x[:, 0].float(), x[:, 1:].float()) if patches else x[:, 0].float()


def unit_features(clip, images):
    """(B, D) unit features of the frozen image tower."""
    with torch.no_grad():
        return F.normalize(encode_image(clip, images), dim=-1)


def embed_names(clip, names, n_ctx, template="{}."):
    """What surrounds a context in "[SOS] X ... X <name>.", with n_ctx places X: sos (1, 1, d), tail
    (K, S, d) from the name on, eot (K,) position, length (K,) tokens of the name in the sentence,
    where a "." may merge. Raises Error for a name that is too long."""
    names = [name.replace("_", " ") for name in names]
    texts = [" ".join(["X"] * n_ctx + [template.format(name)]) for name in names]
    for text, name in zip(texts, names, strict=True):
        if len(clip.tokenize.encode(text)) + 2 > clip.context_length:
            raise Error(f"class name {name[:60]!r} is too long for {clip.context_length} tokens")
    ids = clip.tokenize(texts).to(clip.logit_scale.device)
    x, eot = clip.token_embedding(ids[:, : ids.argmax(1).max() + 1]), ids.argmax(1)
    return Names(x[:1, :1], x[:, 1 + n_ctx :], eot, eot - n_ctx - 2)


@torch.no_grad()
def zero_shot_weights(clip, dataset, templates=None):
    """(K, T, D) unit text features of each class in the T templates (None: the data set's own)."""
    templates, empty = templates or [dataset.template], clip.positional_embedding[None, :0]
    names = [embed_names(clip, dataset.classnames, 0, t) for t in templates]
    return F.normalize(torch.stack([encode_prompts(clip, n, empty) for n in names], 1), dim=-1)


def encode_prompts(clip, names, ctx, group=None, position="end"):
    """(K, D) features of [SOS] V [CLASS] "." [EOS] (official coop.py) for names of embed_names and
    contexts ctx (G, M, d). group (K,): each class's context; position: of the name, against V."""
    M, suffix = ctx.shape[1], names.tail
    behind = {"end": 0, "middle": M - M // 2, "front": M}[position]  # vectors after the name
    prefix = torch.cat([names.sos.expand(len(ctx), -1, -1), ctx[:, : M - behind]], 1)
    if behind:
        rows = torch.zeros_like(names.eot) if group is None or len(ctx) == 1 else group
        suffix = torch.cat([ctx[:, M - behind :].index_select(0, rows), suffix], 1)  # V, name, rest
        j, end = torch.arange(suffix.shape[1], device=ctx.device), names.length[:, None] + behind
        suffix = suffix.take_along_dim(torch.where(j < end, (j + behind) % end, j)[..., None], 1)
    return encode_text(clip, prefix, suffix, names.eot, group)


def load_dataset(name, root="data", fetch=False):
    """Dataset(name, train, val, test, classnames, template) with items (path, label, classname), of
    a name of TABLE, of the shapes world, or a folder of class folders. Only lists are read: a
    missing image is named when opened. fetch: download what is not there. Raises Error."""
    task = shapes.TASKS.get(name) if shapes else None
    if task or name not in TABLE:
        folder = shapes.write(Path(root), name) if task else Path(name)
        if not folder.is_dir():
            known = [*TABLE, *(shapes.TASKS if shapes else ())]
            near = ", ".join(difflib.get_close_matches(name, known, 3, 0.4) or known)
            raise Error(f"no data set or folder {name!r}; there is {near}")
        title, template = (name, task.template) if task else (folder.resolve().name, PHOTO)
        return _checked(title, _from_folders(folder), template, folder)
    folder, images, reader, *blob = TABLE[name]
    folder, template = Path(root, folder), TEMPLATES.get(name, PHOTO)
    split, images = folder / f"split_zhou_{reader}.json", folder / images
    source = split if blob else folder
    if fetch:
        tool("download").download(name, root)
    if not (images / ("cars_train" if name == "stanford_cars" else "")).is_dir():
        raise Error(f"no {images}; --download fetches it (imagenet's train/, val/: image-net.org)")
    if blob and not split.exists():
        tool("download").fetch_split(split, *blob)
    try:
        if blob:
            parts = json.loads(split.read_text("utf-8"))
            parts = [[(f"{images}/{i}", y, str(c)) for i, y, c in parts[p]] for p in PARTS]
            if not all(type(y) is int and y >= 0 for part in parts for _, y, _ in part):
                raise ValueError("a label is not 0, 1, ...")
        elif reader == "aircraft":
            variants = (folder / "variants.txt").read_text("utf-8").splitlines()
            lines = [(folder / f"images_variant_{p}.txt").read_text().splitlines() for p in PARTS]
            pairs = [[line.split(" ", 1) for line in part] for part in lines]
            parts = [[(f"{images}/{i}.jpg", variants.index(v), v) for i, v in p] for p in pairs]
        else:
            parts = _from_wnids(name, images)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as problem:
        raise Error(f"{source} is not as published ({problem}); get it anew") from None
    return _checked(name, parts, template, source)


def _checked(name, splits, template, source):
    """The Dataset of three item lists, its classes named by label. Raises Error naming source."""
    if not splits[2]:
        raise Error(f"{source}: no test image")
    names = {label: c for items in reversed(splits) for _, label, c in items}
    trained = {label for _, label, _ in splits[0] or splits[2]}
    if len(names) < 2:
        raise Error(f"{source}: fewer than two classes; nothing to tell apart")
    if missing := sorted(set(range(max(names) + 1)) - trained):
        raise Error(f"{source}: class {names.get(missing[0], missing[0])!r} has no training image")
    return Dataset(name, *splits, [names[label] for label in sorted(names)], template)


def listed(folder, folders=False):
    """Sorted names of the images (or folders) in folder, stray and hidden ones left out."""
    found = sorted(n for n in (os.listdir(folder) if folder.is_dir() else ()) if n[0] != ".")
    return [n for n in found if ((folder / n).is_dir() if folders else n.lower().endswith(IMAGES))]


def _from_wnids(name, root):
    """By WordNet folder (V2: by label), sorted; CoOp's listing was not, so its picks varied."""
    keys = ImageNetInfo().label_names() if name != "imagenetv2" else map(str, range(1000))
    title = dict(zip(keys, open_clip.IMAGENET_CLASSNAMES, strict=True))
    splits = [[], [], []]
    for k, part in [(0, "train"), (2, "val")] if name == "imagenet" else [(2, "")]:
        found = set(listed(root / part, True))
        for i, c in enumerate(c for c in title if c in found):  # in the order of labels
            splits[k] += [(f"{root / part / c}/{f}", i, title[c]) for f in listed(root / part / c)]
    return splits


def _from_folders(folder):
    """Class folders in train/, test/ and, if you like, val/; or alone, split 50/20/30 per class."""
    own = (folder / "train").is_dir()
    classes = listed(folder / "train" if own else folder, True)
    if own and (odd := set(listed(folder / "test", True)) ^ set(classes)):
        raise Error(f"{folder}: class {min(odd)!r} is not in both train/ and test/")
    splits = []
    for place in [folder / part for part in PARTS] if own else [folder]:
        files = [[f"{place}/{c}/{file}" for file in listed(place / c)] for c in classes]
        splits.append([[(f, i, c) for f in files[i]] for i, c in enumerate(classes)])
    if not own:
        groups, cuts = splits[0], [(0, 0.5), (0.5, 0.7), (0.7, 1)]
        for group in groups:
            random.Random(0).shuffle(group)
        splits = [[g[round(a * len(g)) : round(b * len(g))] for g in groups] for a, b in cuts]
    for c, train, test in zip(classes, splits[0], splits[2], strict=True):
        if not (train and test):
            raise Error(f"{folder}: class {c!r} has no {'training' if test else 'test'} image")
    return [sum(groups, []) for groups in splits]


def sample_few_shot(dataset, shots, seed):
    """CoOp's few-shot picks (Dassl data/datasets/base_dataset.py): classes by first appearance,
    train then val (at most 4) from one stream; too few, or 0 shots: all. test is never sampled."""
    rng = random.Random(seed)

    def few(items, k):
        groups = defaultdict(list)
        for item in items:
            groups[item[1]].append(item)
        return [x for g in groups.values() for x in (rng.sample(g, k) if 0 < k <= len(g) else g)]

    return dataset._replace(train=few(dataset.train, shots), val=few(dataset.val, min(shots, 4)))


def subset_classes(dataset, half):
    """The "base" (first, larger) or "new" half of the classes, relabelled (CoOp oxford_pets.py)."""
    labels = sorted({label for _, label, _ in dataset.train or dataset.test})
    m = math.ceil(len(labels) / 2)
    new = {label: i for i, label in enumerate(labels[:m] if half == "base" else labels[m:])}
    parts = [[(path, new[y], c) for path, y, c in items if y in new] for items in dataset[1:4]]
    return Dataset(dataset.name, *parts, [dataset.classnames[y] for y in new], dataset.template)


def digest(items):
    """Hash of labels, class names, and the files' names and sizes (tensors: their sums)."""
    sizes = [x.sum().item() if torch.is_tensor(x) else os.path.getsize(x) for x, *_ in items]
    names = [(os.path.basename(str(x)), *label) for x, *label in items]
    return hashlib.md5(repr((sizes, names)).encode()).hexdigest()


def decode(picture):
    """(3, H, W) uint8 RGB of a path, as PIL reads it; a tensor passes. Raises Error naming it."""
    if isinstance(picture, torch.Tensor):
        return picture
    try:
        with Image.open(picture) as image:
            if image.mode.startswith("I"):  # 16 bit, which convert would clip to white
                image = image.point(lambda v: v * (1 / 257)).convert("L")
            return vision.pil_to_tensor(image.convert("RGB"))
    except Exception as problem:  # PIL raises many kinds
        raise Error(f"cannot read image {picture}: {problem}") from None


def decoded(pool, groups):
    """Yields each group of paths as decoded pictures, the next group being decoded meanwhile."""
    ahead = []
    for group in itertools.chain(groups, [[]]):
        done, ahead = ahead, [pool.submit(decode, picture) for picture in group]
        if done:
            yield [future.result() for future in done]


def views(clip, pictures, boxes=None, mirror=None):
    """(B, 3, side, side) normalised views of uint8 pictures, antialiased bicubic as PIL's: boxes
    (top, left, height, width), then mirrored where mirror says; None: the centred test view."""
    size, x = int(np.max(clip.visual.image_size)), [p.to(clip.logit_scale.device) for p in pictures]
    if boxes is None:
        x = [vision.center_crop(vision.resize(p, size, BICUBIC), size) for p in x]
    else:
        x = [vision.resized_crop(p, *b, [size] * 2, BICUBIC) for p, b in zip(x, boxes, strict=True)]
        x = [p.flip(-1) if flip else p for p, flip in zip(x, mirror, strict=True)]
    return vision.normalize(torch.stack(x) / 255, clip.visual.image_mean, clip.visual.image_std)


def loader(cfg, clip, data, frozen=False, repeat=0):
    """batches(epoch), an iterator over (x, labels) of data.train. x: augmented images (B, 3, side,
    side), or with frozen=True unit features (B, D), encoded for the whole epoch first. repeat:
    encode this many epochs' views and use them in turn. Views and order depend on (seed, epoch).
    As Dassl's: a short last batch dropped unless alone; random crop (area .08 to 1) and flip."""
    pool, n, encoded = ThreadPoolExecutor(cfg.workers), len(data.train), {}
    if not n and not cfg.load:
        raise Error(f"{data.name} has no training images; evaluate on it with --transfer")
    pictures = [item[0] for item in data.train]
    labels = torch.tensor([item[1] for item in data.train], device=clip.logit_scale.device)
    room = cfg.cache_gb * 1e9 or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    chunks = [list(range(i, min(i + 256, n))) for i in range(0, n, 256)]
    for rows in tqdm(chunks, "decoding", leave=False, disable=n < 5000):
        if room > 0:
            pictures[rows[0] : rows[-1] + 1] = pool.map(decode, [pictures[i] for i in rows])
            room -= sum(pictures[i].numel() for i in rows)
    scale = shapes.CROP if shapes and data.name in shapes.TASKS else (0.08, 1.0)

    def augmented(epoch, groups):
        names = ([pictures[i] for i in rows] for rows in groups)
        for rows, group in zip(groups, decoded(pool, names), strict=True):
            boxes, mirror = [], []
            with torch.random.fork_rng([]):
                for i, picture in zip(rows, group, strict=True):
                    torch.default_generator.manual_seed(hash((cfg.seed, epoch, i)) % 2**63)
                    boxes.append(RandomResizedCrop.get_params(picture, scale, (3 / 4, 4 / 3)))
                    mirror.append(torch.rand(()) < 0.5)
            yield rows, views(clip, group, boxes, mirror)

    def batches(epoch):
        order = torch.Generator().manual_seed(hash((cfg.seed, epoch)) % 2**63)
        order = torch.randperm(n, generator=order).tolist()
        end = n if n < cfg.batch_size else n - n % cfg.batch_size
        groups = [order[i : i + cfg.batch_size] for i in range(0, end, cfg.batch_size)]
        if not frozen:
            yield from ((x, labels[rows]) for rows, x in augmented(epoch, groups))
            return
        view = epoch % repeat if repeat else epoch
        if view not in encoded:
            if not repeat:
                encoded.clear()
            encoded[view] = torch.cat([unit_features(clip, x) for _, x in augmented(view, chunks)])
        yield from ((encoded[view][rows], labels[rows]) for rows in groups)

    return batches


def sgd_cosine(groups, lr, epochs, warmup=1):
    """(optimizer, scheduler): SGD with momentum .9, weight decay 5e-4; groups: parameters, or dicts
    {"params", "lr", "warmup"}. After k scheduler.step() calls the rate is 1e-5 for k < warmup, then
    lr/2 (1 + cos(pi (k - warmup) / epochs)), so never 0 (Dassl optim/lr_scheduler.py)."""
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=5e-4)

    def rate(k, w, top):
        return 1e-5 / (top or 1) if k < w else (1 + math.cos(math.pi * (k - w) / epochs)) / 2

    pairs = [(g.get("warmup", warmup), g["lr"]) for g in optimizer.param_groups]
    factors = [functools.partial(rate, w=w, top=top) for w, top in pairs]
    vars(optimizer).update(losses=[], skipped=0, scaler=torch.amp.GradScaler(enabled=False))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def step(loss, optimizer, times=1):
    """Backward, and `times` SGD steps with the gradient; none where fp16 gradients overflowed."""
    scaler, before = optimizer.scaler, optimizer.scaler.get_scale()
    optimizer.losses.append(loss.detach())
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.skipped += (skipped := scaler.get_scale() < before)
    for _ in range(0 if skipped else times - 1):
        optimizer.step()


def training(cfg, clip, data, prompt, optimizer, scheduler, epochs):
    """Yields the epochs still to be trained; keeps a checkpoint after each and goes on from it;
    last, prompt.safetensors: the learnables and what they belong to, loaded where it exists. Raises
    Error if those were other images, or after an epoch with a loss not finite (fp16: stays so)."""
    folder, first, seconds = run_folder(cfg), 0, 0.0
    part, final = folder / "checkpoint.safetensors", folder / "prompt.safetensors"
    sets, done = data if type(data) is list else [data], cfg.load or final.exists()
    images = digest(items := sum((d.train for d in sets), []))
    fp16, device = clip.half_dtype is torch.float16, clip.logit_scale.device.type
    optimizer.scaler = scaler = torch.amp.GradScaler(device, enabled=fp16)
    if done or part.exists():
        tensors, meta = restore(cfg, clip, prompt, None if done else part)
        if not cfg.load and meta.get("images", images) != images:
            raise Error(f"{folder} was trained on other images or class names; --force redoes it")
        if done:
            return
        state = {int(k[9:]): {"momentum_buffer": tensors[k]} for k in tensors if "momentum." in k}
        optimizer.load_state_dict({"state": state, "param_groups": meta["groups"]})
        scaler.load_state_dict(meta["scaler"] or scaler.state_dict())  # {} after fp32
        first, seconds, scheduler.last_epoch, optimizer.skipped = meta["progress"]
    write(folder / "config.json", json.dumps(vars(cfg), indent=1).encode())
    sets = [d._replace(train=[], val=[], test=[]) for d in sets]
    title = f"{method(cfg)} {cfg.dataset} {cfg.shots} shots seed {cfg.seed}, {len(items)} images"
    bar = tqdm(range(first, epochs), title, epochs, initial=first, unit="epoch")
    for epoch in bar:
        torch.manual_seed(hash((cfg.seed, epoch)) % 2**63)  # for dropout and class sampling
        optimizer.losses, start = [], time.time()
        yield epoch
        losses = torch.stack(optimizer.losses).tolist()
        if (bad := [x for x in losses if not math.isfinite(x)]) and scaler.get_scale() <= 1:
            raise Error(f"the loss is {bad[0]}: lower --lr, or try --precision fp32")
        bar.set_postfix(loss=f"{np.mean(losses):.3f}")
        seconds += time.time() - start
        tensors, state, last = prompt.state_dict(), optimizer.state_dict(), epoch + 1 == epochs
        for i, buffers in state["state"].items() if not last else ():
            tensors[f"momentum.{i}"] = buffers["momentum_buffer"]
        meta = {"method": method(cfg), "fingerprint": clip.fingerprint, "config": vars(cfg)}
        meta |= {"data": sets, "images": images, "groups": state["param_groups"]}
        meta["progress"] = epoch + 1, seconds, scheduler.last_epoch, optimizer.skipped
        meta["scaler"] = scaler.state_dict()
        write(final if last else part, save(tensors, {"json": json.dumps(meta)}))
    part.unlink(missing_ok=True)
    if optimizer.skipped:
        print(f"{optimizer.skipped} steps were skipped, because fp16 gradients overflowed")


def restore(cfg, clip=None, prompt=None, path=None):
    """(tensors, metadata) of a prompt or checkpoint file, put into prompt. Raises Error."""
    path = path or Path(cfg.load or run_folder(cfg), "prompt.safetensors")
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads(file.metadata()["json"])
        fields = dataclasses.fields(cfg) if meta["method"] == method(cfg) else ()
        meta["config"] = {f.name: meta["config"][f.name] for f in fields}
        meta["data"] = [Dataset(*d) for d in meta["data"]]
        tensors, owner, weights = load_file(path), meta["method"], meta["fingerprint"]
    except Exception as problem:  # safetensors raises kinds of its own
        raise Error(f"{path} is no finished run of ours, for --load to name: {problem}") from None
    if owner != method(cfg):
        raise Error(f"{path} belongs to {owner}.py, not to {method(cfg)}.py")
    if clip and weights != clip.fingerprint:
        raise Error(f"{path} was trained with other CLIP weights, of {meta['config']['model']}")
    try:
        if prompt:
            prompt.load_state_dict({n: t for n, t in tensors.items() if "momentum." not in n})
    except RuntimeError as problem:
        raise Error(f"{path} does not fit these options: {problem}") from None
    return tensors, meta


def write(path, content):
    """Writes bytes to path at once or not at all: through a file beside it that is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def test_pictures(cfg, items):
    """Yields the items' decoded pictures, TEST_BATCH at a time, with a progress bar."""
    groups = [[i[0] for i in items[k : k + TEST_BATCH]] for k in range(0, len(items), TEST_BATCH)]
    return decoded(ThreadPoolExecutor(cfg.workers), tqdm(groups, "test images", leave=False))


def frozen_features(cfg, clip, items):
    """(n, D) unit features of the items' test views, kept below --out for as long as weights,
    precision, preprocessing and every file (size, time) stay the same. Raises Error."""
    files = [(os.path.abspath(i[0]), *os.stat(i[0])[6:9:2]) for i in items]
    key = [clip.fingerprint, str(clip.half_dtype), str(clip.visual.preprocess_cfg), files]
    path = Path(cfg.out, "features", hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32])
    with contextlib.suppress(Exception):  # absent, or broken by a full disk: computed anew
        return load_file(path)["f"].to(clip.logit_scale.device)
    f = torch.cat([unit_features(clip, views(clip, p)) for p in test_pictures(cfg, items)])
    with contextlib.suppress(OSError):  # a full disk only costs the time to compute it again
        write(path, save({"f": f.cpu()}))
    return f


def classify(cfg, clip, items, logits, images):
    """(n, K) logits of the items' test views; logits(f, x) as train's predictor returns it."""
    f = frozen_features(cfg, clip, items).split(TEST_BATCH)
    x = (views(clip, p) for p in test_pictures(cfg, items)) if images else itertools.repeat(None)
    with torch.no_grad():
        return torch.cat([logits(*pair).float().cpu() for pair in zip(f, x, strict=False)])


def evaluate(logits, labels):
    """(overall, mean per class) accuracy in percent of logits (n, K) for labels (n,)."""
    right = 100 * (logits.argmax(1) == labels).double()
    return right.mean().item(), np.mean([right[labels == k].mean() for k in labels.unique()])


def run(cfg, train, images=True, tasks=None, per_class=lambda name: False):
    """Carries out the grid of cfg: train, evaluate, record; returns the last accuracy (%).
    train(cfg, clip, data) returns the learned module and predictor(dataset) -> logits(f, x) of unit
    features f (B, D) and, where images is set, pictures x. tasks(cfg) lists data sets to learn
    jointly; those of which per_class(name) holds count by mean per class."""
    try:
        if cfg.load:  # the options it was trained with, in place of those left at their defaults
            old = restore(cfg)[1]["config"]
            unset = {f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) == f.default}
            cfg = type(cfg)(**vars(cfg) | {n: old[n] for n in unset - UPKEEP | {"shots", "seed"}})
        names = [cfg.dataset] if tasks or cfg.load else cfg.dataset.split(",")
        lists = ([v] if type(v) is int else v for v in (cfg.shots, cfg.seed))
        grid = list(itertools.product(names, *lists))
        shard = re.fullmatch(r"([1-9]\d*)/(\d+)", cfg.shard or "1/1")
        i, n = map(int, shard.groups()) if shard else (1, 0)
        if i > n:
            raise Error(f"--shard {cfg.shard}: must be i/n with 1 <= i <= n")
        for dataset, shots, seed in grid[i - 1 :: n]:
            one = dataclasses.replace(cfg, dataset=dataset, shots=shots, seed=seed)
            accuracy = _run_one(one, train, images, tasks, per_class)
        return accuracy if grid[i - 1 :: n] else None
    except (Error, OSError) as problem:  # OSError: a full disk, a folder that may not be written
        stop(problem)


def records(path):
    """The rows of a results.jsonl, an empty list where there is none. Raises Error."""
    keys = [*"run method model shots evaluated_on classes train_seconds config".split(), *SCORES[1]]
    try:
        rows = [json.loads(line) for line in path.open()] if path.exists() else []
        return [{key: row[key] for key in [*keys, *SCORES[0]]} | row for row in rows]
    except (ValueError, LookupError, TypeError) as problem:
        raise Error(f"{path} holds a line that is no record ({problem}); mend or move it") from None


def _run_one(cfg, train, pictures, tasks, per_class):
    for name, value in vars(cfg).items():  # batch_size and workers are at least 1
        if type(value) in (int, float) and not (name in ("batch_size", "workers")) <= value < 1e9:
            raise Error(f"--{name} {value} is out of range")
    asked = cfg.predict or cfg.names or cfg.json or cfg.interpret
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = cfg.precision or ("amp" if device.startswith("cuda") else "fp32")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    cfg = dataclasses.replace(cfg, load=cfg.load or (str(run_folder(cfg)) if asked else ""))
    folder, path = Path(cfg.load or run_folder(cfg)), Path(cfg.out, "results.jsonl")
    done = cfg.load or not cfg.force and (folder / "prompt.safetensors").exists()
    meta = restore(cfg)[1] if done else {"config": vars(cfg), "progress": [0, 0]}
    first = str(meta["config"]["dataset"]).split(",")[0]
    tiny = shapes and first in shapes.TASKS and cfg.model == type(cfg).model
    model = f"local-dir:{shapes.write(Path(cfg.data), 'clip')}" if tiny else cfg.model
    if asked:
        clip = load_clip(model, cfg.pretrained, device, precision)
        return tool("ask").ask(cfg, clip, train, meta["data"], pictures, tasks)
    sets = tasks(cfg) if tasks else [load_dataset(cfg.dataset, cfg.data, cfg.download)]
    sets = [sample_few_shot(d, cfg.shots, cfg.seed) for d in sets]
    halves = ["base", "new"] if cfg.classes == "base" else ["all"]
    parts = {(d.name, h): subset_classes(d, h) if h != "all" else d for d in sets for h in halves}
    other = [load_dataset(t, cfg.data, cfg.download) for t in cfg.transfer.split(",") if t]
    todo = parts | {(d.name, "all"): d for d in other}
    own = {"run": os.path.relpath(folder, cfg.out), "method": method(cfg), "model": model}
    own["train_seconds"] = meta["progress"][1]  # rows of another training do not count
    rows = {(r["evaluated_on"], r["classes"]): r for r in records(path) if own.items() <= r.items()}
    images = {k: digest(sum((e.train for e in sets), d.test)) for k, d in todo.items()}
    new = {k: d for k, d in todo.items() if cfg.force or rows.get(k, {}).get("images") != images[k]}
    if new:
        clip = load_clip(model, cfg.pretrained, device, precision)
        known = meta["data"] if cfg.load else [parts[d.name, halves[0]] for d in sets]
        if cfg.force and not cfg.load:
            shutil.rmtree(folder, ignore_errors=True)
        prompt, predictor = train(cfg, clip, known if tasks else known[0])
        git = {"shell": True, "cwd": Path(__file__).parent, "capture_output": True, "text": True}
        commit = subprocess.run("git rev-parse --short HEAD", check=False, **git).stdout.strip()
        own["train_seconds"] = restore(cfg)[1]["progress"][1] if prompt else 0
        record = own | {n: getattr(cfg, n, False) for n in ("dataset", "shots", "seed", "official")}
        record |= {"pretrained": cfg.pretrained, "device": device, "precision": precision}
        record |= {"torch": torch.__version__, "open_clip": open_clip.__version__, "commit": commit}
        for (name, half), d in new.items():
            start, labels = time.time(), torch.tensor([item[1] for item in d.test])
            got = classify(cfg, clip, d.test, predictor(d), pictures)
            row = {"eval_seconds": time.time() - start, "evaluated_on": name, "classes": half}
            zero = frozen_features(cfg, clip, d.test) @ zero_shot_weights(clip, d)[:, 0].T
            for keys, scores in zip(SCORES, (zero.cpu(), got), strict=True):
                row |= zip(keys, evaluate(scores, labels), strict=True)
            row |= {"n_test": len(labels), "images": images[name, half], "config": vars(cfg)}
            row |= {"peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20}
            rows[name, half] = record | row | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with open(path.with_suffix(".lock"), "w") as lock:  # two processes lose nothing
            fcntl.flock(lock, fcntl.LOCK_EX)
            lines = [json.dumps(row) + "\n" for row in [*records(path), *map(rows.get, new)]]
            write(path, "".join(lines).encode())
    for r in (rows[d.name, "all"] for d in other):
        print(f"  on {r['evaluated_on']}: {r['accuracy']:.2f}, zero-shot {r['zero_shot']:.2f}")
    lines = []
    for keys in SCORES:
        a = [np.mean([rows[d.name, h][keys[per_class(d.name)]] for d in sets]) for h in halves]
        b = f"base {a[0]:.2f}, new {a[-1]:.2f}, H {2 * a[0] * a[-1] / max(a[0] + a[-1], 1e-9):.2f}"
        lines.append(b if len(halves) == 2 else f"{a[0]:.2f}")
    where = "finished before, " * (not new) + f"in {folder}\n"
    title = where * folder.exists() + f"{cfg.dataset} {cfg.shots} shots seed {cfg.seed}"
    print(f"{title}: {lines[1]} (zero-shot {lines[0]}), {own['train_seconds']:.0f} s", flush=True)
    return float(a[0])


if __name__ == "__main__":
    tool("report" if sys.argv[1:2] == ["report"] else "zero_shot").main()
