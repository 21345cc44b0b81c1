"""What the five methods share, because it can move a number without being the method.

CLIP and its two towers, data sets and few-shot picks, augmentation, optimiser and schedule,
evaluation and the record of a run. A method is one file beside this one: copy the two together.

    python common.py --dataset caltech101 [--ensemble]     # zero-shot CLIP
    python common.py report [--plot accuracy.png]          # the table of all recorded runs

Letters: B batch, K classes, M context vectors, G contexts, P rows of a prefix or prompt, S rows
of a suffix, N patches, d width of a tower, D joint width; f image features, w text features.
Official files are those of KaiyangZhou/CoOp ff61507 and KaiyangZhou/Dassl.pytorch c61a1b5.
"""

import argparse
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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as vision
from tqdm import tqdm

try:
    from tests import shapes  # the default data set and its tiny CLIP; absent beside a copied file
except ImportError:
    shapes = None

# Data set, folder below --data, images below that, reader: split_zhou_<reader>.json where the last
# column is that file's git blob id.
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
IMAGE_TYPES = set(".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm".split())
TEST_BATCH = 100  # images, as Dassl
HERE = Path(__file__).parent
Dataset = namedtuple("Dataset", "name train val test classnames template")
Names = namedtuple("Names", "sos tail eot length")


class Error(ValueError):
    """Bad input: one line that names the thing and the way out."""


@dataclass
class Config:
    dataset: str = "shapes"  # a data set's name or a folder of yours; a comma list makes a grid
    shots: int = 16  # training images per class; a comma list makes a grid
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
    predict: str = ""  # with --load: comma list of images or folders to classify
    names: str = ""  # with --predict: comma list of class names to choose from
    json: bool = False  # with --predict: one JSON line per image
    interpret: bool = False  # with --load: the words nearest to each learned text vector


# These do not change what is learned, so they are no part of a run's name.
UPKEEP = set("dataset transfer device data out download workers cache_gb shard force load".split())
UPKEEP |= set("predict names json interpret attention task".split())


def cli(cls, argv=None):
    """Command line -> cls, a Config: the comment after a field is its help, unknown flags end it.

    --shots and --seed take comma lists, which then come back as lists of int.
    """
    source = "".join(inspect.getsource(c) for c in cls.__mro__[-2::-1])
    notes = dict(re.findall(r"^ +(\w+): .*?  # (.+)$", source, re.M))
    parser = argparse.ArgumentParser(
        description=sys.modules[cls.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: stop(f"{message}; --help lists every option")
    for field in dataclasses.fields(cls):
        kind = {"type": field.type, "metavar": field.type.__name__.upper()}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_args(field.type):
            kind = {"choices": get_args(field.type)}
        elif field.name in ("shots", "seed"):
            kind = {"type": lambda text: one_or_list(map(int, text.split(","))), "metavar": "N,.."}
        note = notes.get(field.name, "").replace("%", "%%") + f" [{field.default}]"
        parser.add_argument(f"--{field.name}", default=field.default, help=note, **kind)
    return cls(**vars(parser.parse_args(argv)))


def one_or_list(values):
    values = list(values)
    return values if len(values) > 1 else values[0]


def stop(message):
    """Ends the program: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def method_name(cfg):
    stem = Path(inspect.getfile(type(cfg))).stem
    return "zero-shot" if stem == "common" else stem


def run_folder(cfg):
    """runs/<method>/<dataset>/<name>; the name holds every option that changes what is learned."""
    parts = [f"{cfg.shots}shots", f"seed{cfg.seed}"] + ["base"] * (cfg.classes == "base")
    for field in dataclasses.fields(cfg):
        if field.name not in UPKEEP | {"shots", "seed", "classes"}:
            if (value := getattr(cfg, field.name)) != field.default:
                parts.append(f"{field.name}={value}")
    place = [
        re.sub(r"[^\w.=+,-]+", "-", text).strip("-.") for text in (cfg.dataset, "_".join(parts))
    ]
    place = [t if len(t) < 150 else t[:130] + hashlib.md5(t.encode()).hexdigest() for t in place]
    return Path(cfg.out, method_name(cfg), *place)


# --- CLIP


@functools.lru_cache(1)
def load_clip(model, pretrained="openai", device="cpu", precision="fp32"):
    """Loads an open_clip model of class CLIP, frozen and in eval mode.

    model: open_clip name, "local-dir:DIR" or "hf-hub:NAME"; pretrained: tag, file, "" for random
    weights. QuickGELU follows the tag (open_clip only warns). precision "amp" (fp16) or "bf16" hold
    the matrices of both towers in half precision and all else in fp32. The model also carries
    .tokenize, .half_dtype (None in fp32) and .fingerprint (of the fp32 weights).
    Raises Error for a device that is not there and for an unknown or unsupported model.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise Error(f"--device {device} is not to be had here; try --device cpu") from None
    known = open_clip.list_models()
    if ":" not in model and model not in known:
        near = difflib.get_close_matches(model, known, 3, 0.3)
        raise Error(f"--model {model}: open_clip has no such model; near it: {', '.join(near)}")
    tag = open_clip.get_pretrained_cfg(model, pretrained) if ":" not in model else {}
    gelu = {"quick_gelu": tag.get("quick_gelu", False)} if tag else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clip = open_clip.create_model(model, pretrained or None, **gelu)
        clip.tokenize = open_clip.get_tokenizer(model)
    except Exception as problem:  # open_clip raises many kinds
        raise Error(f"--model {model} --pretrained {pretrained}: {problem}") from problem
    clip.requires_grad_(False).eval().half_dtype = None
    if type(clip) is not open_clip.CLIP or not _reproduced(clip):
        why = "its towers are not those of OpenAI's CLIP (causal text, feature at the EOT; ViT, ResNet)"
        why = (
            why
            if type(clip) is open_clip.CLIP
            else f"{type(clip).__name__} is not open_clip's CLIP"
        )
        raise Error(f"--model {model} is not supported: {why}")
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    clip.fingerprint = digest.hexdigest()[:16]
    clip.half_dtype = {"amp": torch.float16, "bf16": torch.bfloat16, "fp32": None}[precision]
    if clip.half_dtype:
        open_clip.model.convert_weights_to_lp(clip, clip.half_dtype)
    return clip.to(device)


def _reproduced(clip):
    """Whether encode_text and encode_image give this model's own features."""
    try:
        with torch.no_grad():
            ids, image = clip.tokenize(["a photo of a dog"]), torch.rand(1, 3, *(2 * [side(clip)]))
            x = clip.token_embedding(ids)
            ours = encode_text(clip, x[:, :1], x[:, 1:], ids.argmax(1)), encode_image(clip, image)
            return all(
                map(
                    torch.allclose,
                    ours,
                    (clip.encode_text(ids), clip.encode_image(image)),
                    [1e-3] * 2,
                    [1e-4] * 2,
                )
            )
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False


def side(clip):
    """Pixels of the square image that clip sees."""
    size = clip.visual.image_size
    return size if isinstance(size, int) else size[0]


def autocast(clip):
    """The precision that clip was loaded in, for everything computed inside."""
    device = clip.logit_scale.device.type
    return torch.autocast(device, clip.half_dtype, enabled=clip.half_dtype is not None)


def _block(block, x, past=None, rows=None, mask=None):
    """One frozen pre-LN block on x (B, L, d); past (B, P, 2d): keys and values put in front.

    rows: index of the rows of x whose output is wanted (None: all); mask: True = may attend.
    Returns the rows' output and the keys and values (B, L, 2d) of x.
    """
    attn, d = block.attn, x.shape[-1]
    y = block.ln_1(x)
    own = kv = F.linear(y, attn.in_proj_weight[d:], attn.in_proj_bias[d:])
    if past is not None:
        kv = torch.cat([past, kv], 1)
    if rows is not None:
        x, y = x[rows], y[rows]
    q = F.linear(y, attn.in_proj_weight[:d], attn.in_proj_bias[:d])
    heads = [t.unflatten(-1, (attn.num_heads, -1)) for t in (q, *kv.chunk(2, -1))]
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in heads), attn_mask=mask)
    x = x + block.ls_1(attn.out_proj(y.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x))), own


def encode_text(clip, prefix, suffix, eot, group=None):
    """Text features of prefix + suffix, each shared prefix encoded once.

    The mask is causal: the tokens before the class name are the same for all classes of a context,
    and nothing after the EOT reaches it. So a prefix runs through the tower once, its keys and
    values are kept, and the suffixes, cut at the last EOT, attend to them.
    prefix (G, P, d), suffix (K, S, d): token embeddings without positions. eot (K,): the EOT's
    position in the whole sequence. group (K,): the prefix of each class (None: row 0).
    Returns (K, D) fp32 features before normalisation: clip.encode_text of the same sequences.
    """
    P, blocks = prefix.shape[1], clip.transformer.resblocks
    S = int(eot.max()) + 1 - P
    place = torch.arange(P + S, device=suffix.device)
    last = (torch.arange(len(suffix), device=suffix.device)[:, None], (eot - P)[:, None])
    with autocast(clip):
        x = prefix + clip.positional_embedding[:P]
        y = suffix[:, :S] + clip.positional_embedding[P : P + S]
        for block in blocks:
            x, past = _block(block, x, mask=place[:P] <= place[:P, None])
            past = past[:1].expand(len(y), -1, -1) if group is None else past[group]
            if block is not blocks[-1]:
                y, _ = _block(block, y, past, mask=place <= place[P:, None])
        y, _ = _block(block, y, past, last, place <= eot[:, None, None, None])  # the EOT's row only
        return (clip.ln_final(y[:, 0]) @ clip.text_projection).float()


def encode_image(clip, images, prompts=None, patches=False):
    """Image features, with prompt rows from one hook.

    prompts(i, tokens) is asked before block i, and at i = -1 before ln_pre, with the (B, 1 + N, d)
    tokens that are not prompts. The (P, d) or (B, P, d) rows it returns replace the prompt rows;
    None keeps them. Attention is blind to the order of tokens, so the rows stand at the end.
    images (B, 3, H, W), normalised. Returns (B, D) fp32 features before normalisation, without
    prompts those of clip.encode_image; with patches=True also the patches' (B, N, D), through
    ln_post and the projection. Raises Error for prompts or patches in a ResNet.
    """
    visual = clip.visual
    if not hasattr(visual, "transformer"):
        if prompts or patches:
            raise Error("a ResNet image tower takes no visual prompts; try --model ViT-B-16")
        with autocast(clip):
            return visual(images).float()
    with autocast(clip):
        x = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, N, d)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        x, count = x + visual.positional_embedding, 1 + x.shape[1] - 1

        def ask(i, x):
            rows = prompts(i, x[:, :count]) if prompts else None
            if rows is None:
                return x
            return torch.cat([x[:, :count], rows.expand(len(x), -1, -1).to(x.dtype)], 1)

        x = visual.ln_pre(ask(-1, x))
        for i, block in enumerate(visual.transformer.resblocks):
            end = i + 1 == len(visual.transformer.resblocks) and not patches
            only = (slice(None), slice(0, 1)) if end else None  # only the class token is needed
            x, _ = _block(block, ask(i, x), rows=only)
        x = (visual.ln_post(x[:, :count]) @ visual.proj).float()
    return (x[:, 0], x[:, 1:]) if patches else x[:, 0]


def unit_features(clip, images):
    """(B, D) unit features of the frozen image tower."""
    with torch.no_grad():
        return F.normalize(encode_image(clip, images), dim=-1)


def tokenize(clip, texts, names):
    """(K, L) token ids, cut at the longest. Raises Error naming the class that is too long."""
    for text, name in zip(texts, names, strict=True):
        if len(clip.tokenize.encode(text)) + 2 > clip.context_length:
            limit = f"{clip.context_length} tokens with its context"
            raise Error(f"class name {name[:60]!r} is too long for {limit}; shorten it")
    ids = clip.tokenize(texts)
    return ids[:, : int(ids.argmax(1).max()) + 1].to(clip.logit_scale.device)


def zero_shot_weights(clip, dataset, templates=None):
    """(K, T, D) unit text features of each class in the T templates (None: the data set's own)."""
    names = [c.replace("_", " ") for c in dataset.classnames]
    w = []
    for template in templates or [dataset.template]:
        ids = tokenize(clip, [template.format(c) for c in names], names)
        with torch.no_grad():
            x = clip.token_embedding(ids)  # (K, L, d)
            w.append(F.normalize(encode_text(clip, x[:1, :1], x[:, 1:], ids.argmax(1)), dim=-1))
    return torch.stack(w, 1)


def embed_names(clip, names, n_ctx):
    """What surrounds a learned context in "[SOS] X ... X <name>.", with n_ctx places.

    Returns sos (1, 1, d); tail (K, S, d): name, ".", EOT, padding; eot (K,): the EOT's position;
    length (K,): tokens of the name, counted in the sentence, where a "." may merge with its own.
    """
    names = [c.replace("_", " ") for c in names]
    ids = tokenize(clip, [" ".join(["X"] * n_ctx + [f"{c}."]) for c in names], names)
    x, eot = clip.token_embedding(ids), ids.argmax(1)
    return Names(x[:1, :1], x[:, 1 + n_ctx :], eot, eot - n_ctx - 2)


def encode_prompts(clip, names, ctx, group=None, position="end"):
    """(K, D) features of [SOS] V [CLASS] "." [EOS], before normalisation (official coop.py, forward).

    names: of embed_names; ctx (G, M, d): contexts V; group (K,): the context of each class (None:
    the first); position: the name at the "end", in the "middle" of V, or in "front" of it.
    """
    M, suffix = ctx.shape[1], names.tail
    behind = {"end": 0, "middle": M - M // 2, "front": M}[position]  # vectors after the name
    prefix = torch.cat([names.sos.expand(len(ctx), -1, -1), ctx[:, : M - behind]], 1)
    if behind:
        after = ctx[:, M - behind :]
        after = after.expand(len(suffix), -1, -1) if group is None else after[group]
        suffix = torch.cat([after, suffix], 1)  # (K, behind + S, d): V, name, rest; to be ordered
        j, n = torch.arange(suffix.shape[1], device=ctx.device), names.length[:, None]
        order = torch.where(j < n, j + behind, torch.where(j < n + behind, j - n, j))
        suffix = suffix.gather(1, order[..., None].expand(suffix.shape))
    return encode_text(clip, prefix, suffix, names.eot, group)


# --- data sets


def load_dataset(name, root="data"):
    """Dataset(name, train, val, test, classnames, template); items are (path, label, classname).

    name: one of TABLE, of the shapes world, or a folder of class folders. Only lists are read: a
    missing image is named when it is opened. Raises Error.
    """
    if shapes and name in shapes.TASKS:
        return _from_folders(name, shapes.write(Path(root), name), shapes.TASKS[name].template)
    if name not in TABLE:
        if Path(name).is_dir():
            return _from_folders(Path(name).resolve().name, Path(name), PHOTO)
        known = [*TABLE, *(shapes.TASKS if shapes else ())]
        near = difflib.get_close_matches(name, known, 3, 0.4) or known
        raise Error(f"no data set or folder {name!r}; known: {', '.join(near)}")
    folder, images, reader, *blob = TABLE[name]
    folder, template = Path(root, folder), TEMPLATES.get(name, PHOTO)
    if not (folder / images / ("cars_train" if images == "." else "")).is_dir():
        fix = "image-net.org asks for a login; lay out train/ and val/ of class folders there"
        fix = "--download fetches it" if name != "imagenet" else fix
        raise Error(f"{name}: no folder {folder / images}; {fix}; --data names its parent")
    if reader == "wnids":
        return _from_wnids(name, folder / images, template)
    if reader == "aircraft":
        return _from_aircraft(name, folder, template)
    split = folder / f"split_zhou_{reader}.json"
    if not split.exists():
        tool("download").fetch_split(split, *blob)
    try:
        splits = [
            [(str(folder / images / path), label, c) for path, label, c in part]
            for part in itertools.starmap(json.loads(split.read_text("utf-8")).__getitem__, PARTS)
        ]
        for path, label, c in itertools.chain(*splits):
            if type(label) is not int or label < 0 or type(c) is not str or ".." in path:
                raise ValueError(f"item {(path, label, c)}")
    except (ValueError, TypeError, LookupError, AttributeError) as problem:
        raise Error(f"{split} is no split file ({problem}); delete it to get it anew") from None
    return _checked(name, splits, template, split)


PARTS = [("train",), ("val",), ("test",)]


def _checked(name, splits, template, source):
    """The Dataset of three item lists, its classes named by label. Raises Error naming source."""
    names = {label: c for items in reversed(splits) for _, label, c in items}
    trained = {label for _, label, _ in splits[0] or splits[2]}
    if len(names) < 2:
        raise Error(f"{source}: fewer than two classes; nothing to tell apart")
    for label in range(max(names) + 1):
        if label not in trained:
            raise Error(f"{source}: class {names.get(label, label)!r} has no image to train on")
    first = (splits[0] or splits[2])[0][0]
    if not Path(first).is_file():
        raise Error(f"{source} names {first}, which is not there; is the download whole?")
    return Dataset(name, *splits, [names[label] for label in sorted(names)], template)


def _from_aircraft(name, folder, template):
    try:
        variants = (folder / "variants.txt").read_text("utf-8").splitlines()
        pairs = [
            [line.split(" ", 1) for line in (folder / f"images_variant_{p}.txt").open()]
            for p in ("train", "val", "test")
        ]
        splits = [
            [(f"{folder}/images/{i}.jpg", variants.index(v.strip()), v.strip()) for i, v in part]
            for part in pairs
        ]
    except (OSError, ValueError) as problem:
        raise Error(f"{name}: {problem}; {folder} must hold the archive's data/ folder") from None
    return _checked(name, splits, template, folder)


def listed(folder, folders=False):
    """Sorted names of the images (or folders) in folder, stray and hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(
            e.name
            for e in entries
            if not e.name.startswith(".")
            and (e.is_dir() if folders else Path(e.name).suffix.lower() in IMAGE_TYPES)
        )


def _from_wnids(name, images, template):
    """ImageNet and its variants by WordNet folder; A and R have labels of their own, V2's folders
    are labels. Sorted, where CoOp's listing was not, so its picks depended on the file system."""
    from timm.data import ImageNetInfo

    title = dict(zip(ImageNetInfo().label_names(), open_clip.IMAGENET_CLASSNAMES, strict=True))
    key = None
    if name == "imagenetv2":
        title, key = {str(i): c for i, c in enumerate(open_clip.IMAGENET_CLASSNAMES)}, int
    splits = []
    for part in ("train", None, "val") if name == "imagenet" else (None, None, "."):
        if part and not (images / part).is_dir():
            raise Error(f"{name}: no folder {images / part}; it holds one folder per class")
        found = [c for c in listed(images / part, True) if c in title] if part else []
        files = {c: listed(images / part / c) for c in sorted(found, key=key)}
        items = [
            [(f"{images / part / c}/{f}", i, title[c]) for f in files[c]]
            for i, c in enumerate(files)
        ]
        splits.append(sum(items, []))
    return _checked(name, splits, template, images)


def _from_folders(name, folder, template):
    """Class folders in train/, test/ and, if you like, val/; or alone, split 50/20/30 per class."""
    own = (folder / "train").is_dir()
    names = [("train",), ("val", "valid", "validation"), ("test",)]
    parts = [next((folder / p for p in some if (folder / p).is_dir()), None) for some in names]
    if own and not parts[2]:
        raise Error(f"{folder} has train/ but no test/; add it, or give class folders alone")
    classes = listed(parts[0] if own else folder, True)
    splits = [[], [], []]
    for part in filter(None, parts if own else [folder]):
        for c in listed(part, True):
            if c not in classes:
                raise Error(f"{part / c} is a class that {parts[0]} does not have")
            items = [(f"{part / c}/{file}", classes.index(c), c) for file in listed(part / c)]
            if own:
                splits[parts.index(part)] += items
                continue
            random.Random(0).shuffle(items)
            n, m = round(0.5 * len(items)), round(0.7 * len(items))
            for split, some in zip(splits, (items[:n], items[n:m], items[m:]), strict=True):
                split += some
    for label, c in enumerate(classes):
        if not any(item[1] == label for item in splits[2]):
            raise Error(f"{folder}: class {c!r} has no test image; add some or remove the class")
    return _checked(name, splits, template, folder)


def sample_few_shot(dataset, shots, seed):
    """CoOp's few-shot picks (Dassl data/datasets/base_dataset.py, generate_fewshot_dataset).

    Per class in order of first appearance, train and then val (at most 4) from one random stream; a
    class with too few keeps all. shots < 1 keeps everything; test is never sampled.
    """
    rng = random.Random(seed)

    def few(items, k):
        groups = defaultdict(list)
        for item in items:
            groups[item[1]].append(item)
        return [x for g in groups.values() for x in (rng.sample(g, k) if len(g) >= k else g)]

    if shots < 1:
        return dataset
    train = few(dataset.train, shots)
    return dataset._replace(train=train, val=few(dataset.val, min(shots, 4)))


def subset_classes(dataset, half):
    """The "base" (first and larger) or "new" half of the classes by label, relabelled from 0.

    Source: CoOp datasets/oxford_pets.py, subsample_classes. Use it after sample_few_shot.
    """
    labels = sorted({label for _, label, _ in dataset.train or dataset.test})
    m = math.ceil(len(labels) / 2)
    new = {label: i for i, label in enumerate(labels[:m] if half == "base" else labels[m:])}
    parts = {
        part: [(path, new[label], c) for path, label, c in getattr(dataset, part) if label in new]
        for part in ("train", "val", "test")
    }
    return dataset._replace(**parts, classnames=[dataset.classnames[label] for label in new])


# --- images


def decode(picture):
    """(3, H, W) uint8 RGB of a path, as PIL reads it; a tensor passes. Raises Error naming it."""
    if isinstance(picture, torch.Tensor):
        return picture
    try:
        with Image.open(picture) as image:
            if image.mode.startswith("I"):  # 16 bit, which PIL would clip to white
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
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
    """(B, 3, side, side) normalised views of uint8 pictures, made on clip's device.

    boxes: (top, left, height, width) each, cropped and resized to the square; None: the test view,
    shorter edge resized and centre cropped. mirror: bools. Antialiased bicubic, as PIL's.
    """
    device, size = clip.logit_scale.device, side(clip)
    how = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    x = []
    for i, picture in enumerate(pictures):
        if boxes is None:
            x.append(vision.center_crop(vision.resize(picture.to(device), size, **how), size))
        else:
            y = vision.resized_crop(picture.to(device), *boxes[i], [size, size], **how)
            x.append(y.flip(-1) if mirror[i] else y)
    return vision.normalize(torch.stack(x) / 255, *normalisation(clip))


def normalisation(clip):
    return clip.visual.image_mean, clip.visual.image_std


def loader(cfg, clip, data, frozen=False, repeat=0):
    """Returns batches(epoch), an iterator over (x, labels) of one epoch of data.train.

    x: augmented images (B, 3, side, side), or with frozen=True their unit features (B, D), encoded
    for the whole epoch first, in large batches without gradient: the same numbers in another order.
    repeat: encode this many epochs' views once and use them in turn (0: new views every epoch).
    Views and order depend on (seed, epoch) alone. As Dassl's loader: no image twice in an epoch,
    the last short batch dropped unless it is the only one; RandomResizedCrop (.08 to 1 of the area,
    ratio 3/4 to 4/3, bicubic) and flip. Pictures stay decoded in memory up to cfg.cache_gb.
    """
    pool, n, encoded = ThreadPoolExecutor(cfg.workers), len(data.train), {}
    pictures = [item[0] for item in data.train]
    labels = torch.tensor([item[1] for item in data.train], device=clip.logit_scale.device)
    room = cfg.cache_gb * 1e9 or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    chunks = [list(range(i, min(i + 256, n))) for i in range(0, n, 256)]
    for rows in tqdm(chunks, desc="decoding", disable=n < 5000, leave=False):
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
            yield views(clip, group, boxes, mirror)

    def batches(epoch):
        order = torch.Generator().manual_seed(hash((cfg.seed, epoch)) % 2**63)
        order = torch.randperm(n, generator=order).tolist()
        stop = n if n < cfg.batch_size else n - n % cfg.batch_size
        groups = [order[i : i + cfg.batch_size] for i in range(0, stop, cfg.batch_size)]
        if not frozen:
            for rows, x in zip(groups, augmented(epoch, groups), strict=True):
                yield x, labels[rows]
            return
        view = epoch % repeat if repeat else epoch
        if view not in encoded:
            f = torch.cat([unit_features(clip, x) for x in augmented(view, chunks)])  # (n, D)
            encoded.clear() if not repeat else None
            encoded[view] = f
        for rows in groups:
            yield encoded[view][rows], labels[rows]

    return batches


# --- training


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def sgd_cosine(groups, lr, epochs, warmup=1):
    """(optimizer, scheduler): SGD (momentum .9, weight decay 5e-4) and Dassl's cosine schedule.

    groups: parameters, or dicts {"params", "lr", "warmup"} with their own lr and warm-up. After k
    scheduler.step() calls a group's rate is 1e-5 for k < warmup, then
    lr/2 (1 + cos(pi (k - warmup) / epochs)), which never reaches 0: the period is not shortened by
    the warm-up (Dassl optim/lr_scheduler.py, ConstantWarmupScheduler with WARMUP_RECOUNT).
    """
    groups = [g if isinstance(g, dict) else {"params": [g]} for g in groups]
    groups = [{"lr": lr, "warmup": warmup, **g} for g in groups]

    def factor(group):
        w, top = group["warmup"], group["lr"]
        return lambda k: 1e-5 / top if k < w else (1 + math.cos(math.pi * (k - w) / epochs)) / 2

    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=5e-4)
    optimizer.losses, optimizer.skipped = [], 0
    optimizer.scaler = torch.amp.GradScaler(enabled=False)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, [factor(g) for g in groups])


def step(loss, optimizer, times=1):
    """One backward pass and `times` SGD steps with its gradient; fp16 gradients are scaled.

    Raises Error for a loss that is not finite, unless the scaler may skip the step (and counts it).
    """
    scaler = optimizer.scaler
    if not scaler.is_enabled() and not torch.isfinite(loss):
        raise Error(f"the loss is {loss.item()}: lower --lr, or try --precision fp32")
    optimizer.losses.append(loss.detach())
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    skipped = scaler.get_scale() < before
    optimizer.skipped += skipped
    for _ in range(0 if skipped else times - 1):
        optimizer.step()


def training(cfg, clip, data, prompt, optimizer, scheduler, epochs):
    """Yields the epochs still to be trained, with a progress bar.

    Writes a checkpoint after each and goes on from it; after the last, prompt.safetensors: the
    learnables and what they belong to. Where that exists it is loaded and nothing is yielded.
    """
    folder, device = run_folder(cfg), clip.logit_scale.device.type
    final = Path(cfg.load or folder, "prompt.safetensors")
    part, first, spent, names = (
        folder / "checkpoint.safetensors",
        0,
        0.0,
        dict(prompt.named_parameters()),
    )
    if final.exists():
        restore(final, cfg, clip, prompt)
        return
    optimizer.scaler = torch.amp.GradScaler(device, enabled=clip.half_dtype is torch.float16)
    if part.exists():
        saved, meta = restore(part, cfg, clip, prompt)
        first, spent = meta["epoch"], meta["seconds"]
        scheduler.last_epoch, optimizer.skipped = meta["steps"], meta["skipped"]
        optimizer.scaler.load_state_dict(meta["scaler"])
        for group, rate in zip(optimizer.param_groups, meta["rates"], strict=True):
            group["lr"] = rate
        for name, p in names.items():
            optimizer.state[p]["momentum_buffer"] = saved[f"momentum.{name}"].to(p.device)
    bar = tqdm(range(first, epochs), run_title(cfg), epochs, initial=first, unit="epoch")
    for epoch in bar:
        torch.manual_seed(hash((cfg.seed, epoch)) % 2**63)  # for dropout and class sampling
        optimizer.losses, start = [], time.time()
        yield epoch
        bar.set_postfix(loss=f"{torch.stack(optimizer.losses).mean().item():.3f}")
        spent += time.time() - start
        keep = {f"momentum.{n}": optimizer.state[p]["momentum_buffer"] for n, p in names.items()}
        rates = [group["lr"] for group in optimizer.param_groups]
        meta = {"epoch": epoch + 1, "seconds": spent, "steps": scheduler.last_epoch, "rates": rates}
        meta |= {"scaler": optimizer.scaler.state_dict(), "skipped": optimizer.skipped}
        sets = [
            d._replace(train=[], val=[], test=[]) for d in (data if type(data) is list else [data])
        ]
        meta |= {"method": method_name(cfg), "model": cfg.model, "fingerprint": clip.fingerprint}
        meta |= {"data": sets, "config": dataclasses.asdict(cfg)}
        done = epoch + 1 == epochs
        tensors = prompt.state_dict() | ({} if done else keep)
        write(
            final if done else part,
            save({n: t.contiguous() for n, t in tensors.items()}, {"json": json.dumps(meta)}),
        )
    part.unlink(missing_ok=True)
    if optimizer.skipped:
        print(f"{optimizer.skipped} steps were skipped, because fp16 gradients overflowed")


def restore(path, cfg, clip=None, prompt=None):
    """(tensors, metadata) of a prompt or checkpoint file, put into prompt. Raises Error."""
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads(file.metadata()["json"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        method, fingerprint = meta["method"], meta["fingerprint"]
    except Exception as problem:  # safetensors raises kinds of its own
        raise Error(f"{path} is no prompt file of ours: {problem}") from None
    if method != method_name(cfg):
        raise Error(f"{path} belongs to {method}.py, not to {method_name(cfg)}.py")
    if clip and fingerprint != clip.fingerprint:
        raise Error(
            f"{path} was trained with other CLIP weights ({meta['model']}) than {cfg.model}"
        )
    try:
        if prompt:
            prompt.load_state_dict(
                {n: t for n, t in tensors.items() if not n.startswith("momentum.")}
            )
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


# --- evaluation


def frozen_features(cfg, clip, items):
    """(n, D) unit features of the items' test views, kept below --out for as long as model, weights,
    precision, preprocessing and every file (size, time) stay the same. Raises Error."""
    groups = [
        [item[0] for item in items[i : i + TEST_BATCH]] for i in range(0, len(items), TEST_BATCH)
    ]
    path = None
    if items and not isinstance(items[0][0], torch.Tensor):
        try:
            files = [
                (os.path.abspath(i[0]), os.stat(i[0]).st_size, os.stat(i[0]).st_mtime_ns)
                for i in items
            ]
        except OSError as problem:
            raise Error(f"missing image {problem.filename}; is the download whole?") from None
        key = [clip.fingerprint, str(clip.half_dtype), str(clip.visual.preprocess_cfg), files]
        path = Path(cfg.out, "features", hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32])
        if path.exists():
            try:
                return load_file(path)["f"].to(clip.logit_scale.device)
            except Exception:  # a broken file is computed anew
                path.unlink(missing_ok=True)
    pool = ThreadPoolExecutor(cfg.workers)
    bar = tqdm(
        decoded(pool, groups), "test images", len(groups), leave=False, disable=len(groups) < 20
    )
    f = torch.cat([unit_features(clip, views(clip, pictures)) for pictures in bar])
    if path:
        try:
            write(path, save({"f": f.cpu()}))
        except OSError as problem:
            print(f"test features are not kept: {problem}", file=sys.stderr)
    return f


def classify(cfg, clip, items, logits, images):
    """(n, K) logits of the items' test views; logits(f, x) as train's predictor returns it."""
    f, pool = frozen_features(cfg, clip, items), ThreadPoolExecutor(cfg.workers)
    groups = [
        [item[0] for item in items[i : i + TEST_BATCH]] for i in range(0, len(items), TEST_BATCH)
    ]
    pictures = decoded(pool, groups) if images else [None] * len(groups)
    with torch.no_grad():
        bar = tqdm(
            zip(f.split(TEST_BATCH), pictures, strict=True), "evaluating", len(groups), leave=False
        )
        return torch.cat([logits(z, x and views(clip, x)).float().cpu() for z, x in bar])


def evaluate(logits, labels):
    """(overall, mean per class) accuracy in percent of logits (n, K) for labels (n,)."""
    right = (logits.argmax(1) == labels).double()
    classes = [right[labels == k].mean() for k in labels.unique()]
    return 100 * right.mean().item(), 100 * torch.stack(classes).mean().item()


def run_title(cfg):
    base = " base" if cfg.classes == "base" else ""
    return f"{method_name(cfg)} {cfg.dataset} {cfg.shots} shots{base} seed {cfg.seed}"


def run(cfg, train, images=True, tasks=None, per_class=lambda name: False):
    """Carries out the grid of cfg: train, evaluate, record; returns the last run's accuracy (%).

    train(cfg, clip, data) returns the learned module and predictor(dataset), which returns
    logits(f, x) for unit image features f (B, D) and, where images is set, pictures x. tasks(cfg)
    lists the data sets learned jointly (SoftCPT), and those of them for which per_class(name) holds
    are scored by their mean per class. Bad input ends in one line and exit code 2.
    """
    try:
        if cfg.load:
            cfg = loaded(cfg)
        many = {"dataset": [cfg.dataset] if tasks or cfg.load else cfg.dataset.split(",")}
        many |= {k: v if type(v := getattr(cfg, k)) is list else [v] for k in ("shots", "seed")}
        grid = [
            dict(zip(many, values, strict=True)) for values in itertools.product(*many.values())
        ]
        if cfg.shard:
            i, n = re.fullmatch(r"(\d+)/(\d+)", cfg.shard).groups()
            grid = grid[int(i) - 1 :: int(n)]
        for values in grid:
            accuracy = _run_one(dataclasses.replace(cfg, **values), train, images, tasks, per_class)
        return accuracy
    except Error as problem:
        stop(problem)
    except OSError as problem:  # a full disk, a folder that may not be written
        stop(f"{problem}; free the place or name another with --out or --data")


def _run_one(cfg, train, images, tasks, per_class):
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = cfg.precision or ("amp" if device.startswith("cuda") else "fp32")
    for name, value in dataclasses.asdict(cfg).items():
        if (
            name in ("batch_size", "lr", "workers")
            and value <= 0
            or type(value) in (int, float)
            and not 0 <= value < 1e9
        ):
            raise Error(f"--{name} {value} is out of range")
    transfer = [name for name in cfg.transfer.split(",") if name]
    for name in [*cfg.dataset.split(","), *transfer] if cfg.download else ():
        tool("download").download(name, cfg.data)
    own = shapes and cfg.dataset.split(",")[0] in shapes.TASKS and cfg.model == type(cfg).model
    model = f"local-dir:{shapes.write(Path(cfg.data), 'clip')}" if own else cfg.model
    learned = restore(Path(cfg.load, "prompt.safetensors"), cfg)[1]["data"] if cfg.load else ()
    learn = [Dataset(*d) for d in learned]
    if cfg.predict or cfg.interpret:
        clip = load_clip(model, cfg.pretrained, device, precision)
        prompt, predictor = train(cfg, clip, learn if tasks else learn[0])
        return tool("ask").ask(cfg, clip, learn, prompt, predictor, images)

    sets = tasks(cfg) if tasks else [load_dataset(cfg.dataset, cfg.data)]
    sets = [sample_few_shot(d, cfg.shots, cfg.seed) for d in sets]
    halves = ["base", "new"] if cfg.classes == "base" else ["all"]
    parts = {(d.name, h): subset_classes(d, h) if h != "all" else d for d in sets for h in halves}
    learn = learn or [parts[d.name, halves[0]] for d in sets]
    todo = parts | {(name, "all"): load_dataset(name, cfg.data) for name in transfer}
    folder, path = run_folder(cfg), Path(cfg.out, "results.jsonl")
    if cfg.force and not cfg.load:
        shutil.rmtree(folder, ignore_errors=True)
    run_id = f"{folder.relative_to(cfg.out)}"
    old = [row for row in records(path) if row["run"] == run_id and not cfg.force]
    old = {(row["evaluated_on"], row["classes"]): row for row in old}
    if not todo.keys() <= old.keys():
        clip = load_clip(model, cfg.pretrained, device, precision)
        prompt, predictor = train(cfg, clip, learn if tasks else learn[0])
        final = Path(cfg.load or folder, "prompt.safetensors")
        seconds = restore(final, cfg)[1]["seconds"] if final.exists() else 0.0
        same = {k: getattr(cfg, k, False) for k in "dataset shots seed pretrained official".split()}
        same |= {
            "method": method_name(cfg),
            "model": model,
            "run": run_id,
            "train_seconds": seconds,
        }
        same |= {"precision": precision, "device": device, "torch": torch.__version__}
        same |= {"open_clip": open_clip.__version__, "commit": _commit(), "config": vars(cfg)}
        new = {key: d for key, d in todo.items() if key not in old}
        for (name, half), d in new.items():
            start, labels = time.time(), torch.tensor([item[1] for item in d.test])
            accuracy = evaluate(classify(cfg, clip, d.test, predictor(d), images), labels)
            spent = time.time() - start
            w = zero_shot_weights(clip, d)[:, 0]
            zero = evaluate((frozen_features(cfg, clip, d.test) @ w.T).cpu(), labels)
            row = {"evaluated_on": name, "classes": half, "n_test": len(d.test)}
            row |= {"accuracy": accuracy[0], "mean_class_accuracy": accuracy[1]}
            row |= {"zero_shot": zero[0], "zero_shot_mean_class": zero[1], "eval_seconds": spent}
            row |= {"peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20, "time": time.ctime()}
            old[name, half] = same | row
        append(path, [old[key] for key in new])
    for name in transfer:
        row = old[name, "all"]
        print(f"  on {name}: {row['accuracy']:.2f} (zero-shot {row['zero_shot']:.2f})")
    means = []
    for kind in "accuracy", "zero_shot":  # of jointly learned tasks, the unweighted mean
        pair = {"accuracy": "mean_class_accuracy", "zero_shot": "zero_shot_mean_class"}[kind]
        rows = [[(per_class(d.name), old[d.name, h]) for d in sets] for h in halves]
        means.append(
            [np.mean([row[pair if mean else kind] for mean, row in part]) for part in rows]
        )
    text = [f"{m[0]:.2f}" for m in means]
    if len(halves) == 2:
        text = [
            "base {:.2f}, new {:.2f}, H {:.2f}".format(*m, 2 * m[0] * m[1] / sum(m)) for m in means
        ]
    title = f"{cfg.dataset} {cfg.shots} shots seed {cfg.seed}"
    print(
        f"{title}: {text[0]} (zero-shot {text[1]}), {next(iter(old.values()))['train_seconds']:.0f} s",
        flush=True,
    )
    return float(means[0][0])


def records(path):
    """The rows of a results.jsonl, [] where there is none."""
    return [json.loads(line) for line in path.open()] if path.exists() else []


def append(path, rows):
    """Adds rows to a results.jsonl under a lock, by renaming, so that no half line is ever there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old = path.read_bytes() if path.exists() else b""
        write(path, old + "".join(json.dumps(row) + "\n" for row in rows).encode())


@functools.lru_cache
def _commit():
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def tool(name):
    """The module tests/<name>.py: what no number depends on, so a copied file need not bring."""
    try:
        return importlib.import_module(f"tests.{name}")
    except ModuleNotFoundError:
        raise Error(f"this needs the repository's tests/{name}.py beside common.py") from None


def loaded(cfg):
    """cfg with the options that the run cfg.load was trained with, where it leaves the defaults."""
    saved = restore(Path(cfg.load, "prompt.safetensors"), cfg)[1]["config"]
    for field in dataclasses.fields(cfg):
        given = getattr(cfg, field.name) != field.default
        if field.name not in UPKEEP - {"dataset"} and not given:
            cfg = dataclasses.replace(cfg, **{field.name: saved[field.name]})
    return cfg


# --- zero-shot CLIP


@dataclass
class ZeroShot(Config):
    shots: int = 0  # nothing is trained
    ensemble: bool = False  # mean over CoOp's seven templates and the data set's own


def zero_shot(cfg, clip, data):
    """Zero-shot CLIP (CoOp trainers/zsclip.py, ZeroshotCLIP and ZeroshotCLIP2)."""
    seven = SEVEN if cfg.ensemble else []

    def predictor(dataset):
        w = zero_shot_weights(clip, dataset, [dataset.template, *seven])  # (K, T, D)
        w = F.normalize(w.mean(1), dim=-1)
        return lambda f, x: clip.logit_scale.exp() * f @ w.T

    return None, predictor


def main(argv):
    if argv[:1] == ["report"]:
        return tool("report").main(argv[1:])
    return run(cli(ZeroShot, argv), zero_shot, images=False)


if __name__ == "__main__":
    import common  # not __main__'s second copy of it

    common.main(sys.argv[1:])
