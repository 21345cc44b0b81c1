"""Everything the methods share: what affects the numbers without being the method.

    python coop.py --dataset caltech101 --shots 16       # a method is a script beside this file
    python common.py --dataset caltech101 --ensemble     # zero-shot CLIP, the smallest method

Chapters, in the order in which a method uses them:

 1 Options      Config, cli, script; run_folder, where a run is kept
 2 CLIP         load_clip; the two frozen towers: encode_text, encode_image
 3 Prompts      from class names and contexts to text features: embed_names, encode_prompts
 4 Data         few_shot; load_dataset and a reader per format
 5 Images       decode, augment, Loader: batches of augmented images
 6 Training     Optimizer; resumed, the loop over epochs that survives a kill
 7 Evaluation   evaluate: accuracies, records, the last line; zero-shot CLIP

Notation in all files: B batch, K classes, M context vectors, N patches, L layers, d_t and d_v text
and image tower widths, D joint width; f image features, w text features. "Official" means
KaiyangZhou/CoOp at commit ff61507 and Dassl.pytorch at c61a1b5 (see tests/AUDIT.md).
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import inspect
import io
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from textwrap import shorten
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import ImageNetInfo
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision
from tqdm import tqdm

TOOLS = Path(__file__).parent / "tests" / "tools"
shapes = None  # the synthetic data sets, where they were copied too
if (TOOLS / "shapes.py").is_file():
    from tests.tools import shapes
SYNTHETIC = shapes.TASKS if shapes else {}

# ------------------------------------------------------------------------------- 1 Options


class Error(ValueError):
    """Invalid input. The message is one line: what is wrong, and how to fix it."""


@dataclasses.dataclass
class Config:
    """Options that all methods share; the comment after each field is its --help text."""

    epochs: int = 0  # number of epochs; 0 = the method's schedule
    batch_size: int = 32  # images per step
    lr: float = 2e-3  # initial learning rate (SGD, cosine schedule)
    dataset: str = "shapes"  # a benchmark, a synthetic data set, or a folder of your own images
    shots: int = 16  # training images per class; 0 = all
    seed: int = 1  # random seed: few-shot split, initialisation, order, augmentation
    classes: Literal["all", "base"] = "all"  # base: train on the first half, test on each half
    transfer: str = ""  # comma-separated list of further data sets to evaluate on
    model: str = ""  # open_clip name, local-dir:DIR, hf-hub:NAME; default: the paper's
    pretrained: str = "openai"  # open_clip tag or weights file; "" = random weights
    precision: Literal["", "amp", "bf16", "fp32"] = ""  # default: amp on CUDA, else fp32
    device: str = ""  # default: cuda if available, else cpu
    data: str = "data"  # folder of the data sets
    out: str = "runs"  # output folder
    workers: int = 4  # threads that decode and augment images
    force: bool = False  # delete the run and retrain

    usual_model: ClassVar[str] = "ViT-B-16"  # the paper's backbone

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name in ("batch_size", "workers") else 0
            if field.type in (int, float) and not value >= least:
                raise Error(f"--{field.name} {value}: must be at least {least}")
            if field.type is str:
                setattr(self, field.name, str(value))  # a Path will do
        self.dataset = ",".join(name.strip().rstrip("/") for name in self.dataset.split(","))


NOT_LEARNED = "transfer device data out workers force".split()  # change no learnable


def cli(cls, argv=None):
    """A cls (a Config), filled from the command line."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # the description shows usage; errors stay one line long
        description=sys.modules[cls.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = inspect.getsource(Config) + inspect.getsource(cls)
    notes = dict(re.findall(r"^ +(\w+): .*?  # (.+)$", source, re.M))
    for field in dataclasses.fields(cls):
        choices, note = get_args(field.type), f"{notes[field.name]} [{field.default}]"
        kind = {"choices": choices} if choices else {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{field.name}", default=field.default, help=note, **kind)
    return cls(**vars(parser.parse_args(argv)))


def script(main):
    """Runs main(). Invalid input, out of memory and Ctrl-C print one line and exit with code 2."""
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # Windows
    # open_clip warns of random weights, which --pretrained "" asks for
    logging.getLogger().addFilter(lambda record: "initialized randomly" not in record.msg)
    try:
        return main()
    except (Error, OSError) as problem:
        line = shorten(str(problem), 600)
    except (RuntimeError, MemoryError) as problem:
        if str(problem) and "allocate" not in str(problem):  # torch's word
            raise
        line = "out of memory: lower --batch_size or use a smaller --model"
    except KeyboardInterrupt:
        line = "interrupted; without --force the same command resumes after the last complete epoch"
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


def source_file(cfg):
    """The file of the script that cfg belongs to; None for a class made in a notebook."""
    file = getattr(sys.modules[type(cfg).__module__], "__file__", None) or ""
    return Path(file) if os.path.isfile(file) else None


def method(cfg):
    """The name of the script that cfg belongs to."""
    file = source_file(cfg)
    name = file.stem if file else type(cfg).__module__
    return "zero_shot" if name == "common" else name


def run_folder(cfg):
    """runs/<method>/<dataset>/<name>; <name> has all non-default options that affect training."""
    name = f"{cfg.shots}shots_seed{cfg.seed}"
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default and field.name not in (*NOT_LEARNED, "dataset", "shots", "seed"):
            name += f"_{field.name}={value}"
    return Path(cfg.out, method(cfg), file_name(cfg.dataset), file_name(name))


def file_name(text):
    """A file name for text: valid on every file system, unique per text."""
    name = urllib.parse.quote(text, safe="=, ")
    return name if len(name) < 200 else name[:150] + sha256(name)[:16]


def sha256(x):
    """The SHA-256 of bytes, or of a text, number or list, in hexadecimal digits."""
    return hashlib.sha256(x if isinstance(x, bytes) else str(x).encode()).hexdigest()


def seed_of(*numbers):
    """One seed for several whole numbers; their hash is the same in every process."""
    return hash(numbers) % 2**63


def write(path, content):
    """Writes bytes to path atomically, through a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------- 2 CLIP


class Clip:
    """A frozen open_clip model in eval mode, plus the attributes that the methods need.

    tokenize, device, precision; scale: exp(logit_scale) = 1 / tau, on the device; widths d_t, D and
    d_v (of a ViT); image_size in pixels; mean and std (3, 1, 1); activation: "QuickGELU" or "GELU";
    fingerprint: hash of layer types, heads, weights, mean and std; half: dtype of frozen weight
    matrices and matmuls, torch.float16 (amp), torch.bfloat16 or None (fp32). Learnables, norms,
    logits and losses are fp32. Anything else, such as clip.visual, comes from the model itself.
    """

    def __init__(self, model, tokenize, device="cpu", precision="fp32"):
        model.requires_grad_(False).eval()
        layers = [[type(m).__name__, getattr(m, "num_heads", 0)] for m in model.modules()]
        weights = [[key, sha256(x.numpy().tobytes())] for key, x in model.state_dict().items()]
        colours = model.visual.image_mean, model.visual.image_std
        self.fingerprint = sha256([layers, weights, colours])[:16]
        self.precision = precision
        self.half = {"amp": torch.float16, "bf16": torch.bfloat16, "fp32": None}[precision]
        if self.half:
            open_clip.model.convert_weights_to_lp(model, self.half)
        self.model, self.tokenize = model.to(device), tokenize
        self.scale = self.model.logit_scale.exp()
        self.device = self.scale.device
        self.d_t, self.D = model.text_projection.shape
        self.d_v = model.visual.conv1.out_channels
        self.activation = type(model.transformer.resblocks[0].mlp.gelu).__name__
        self.image_size = int(np.max(model.visual.image_size))
        self.mean, self.std = to_device(torch.tensor(colours)[..., None, None], self.device)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def blocks(self):
        """The image tower's transformer blocks. Raises Error for a ResNet."""
        if not hasattr(self.visual, "transformer"):
            raise Error("visual prompts need a ViT, such as --model ViT-B-16")
        return self.visual.transformer.resblocks

    def autocast(self):
        """The context in which the towers run."""
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)


def load_clip(cfg):
    """The Clip of a Config; a synthetic data set has a tiny CLIP of its own. Raises Error."""
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = cfg.precision or ("amp" if device.startswith("cuda") else "fp32")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise Error(f"--device {device}: {shorten(str(problem), 200)}") from None
    name = cfg.model if ":" in cfg.model else cfg.model.replace("/", "-")
    if not name and cfg.dataset.split(",")[0] in SYNTHETIC:
        torch.set_num_threads(1)  # so that numbers do not depend on the number of cores
        name = f"local-dir:{shapes.write(Path(cfg.data), 'clip')}"
    name = name or cfg.usual_model
    with torch.random.fork_rng([]):
        torch.manual_seed(0)  # random weights are the same in every process
        model, tokenize = build_model(name, cfg.pretrained), open_clip.get_tokenizer(name)
        check_encoders(name, model, tokenize)
    return Clip(model, tokenize, device, precision)


def build_model(name, pretrained):
    """An open_clip model with its weights. Raises Error."""
    advice, options = "", {"require_pretrained": True}
    if ":" in name:  # a folder or a hub's repository, which brings its own weights
        if pretrained != Config.pretrained:
            raise Error(f"--pretrained {pretrained} does not apply: {name} has its own weights")
    elif name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), 4, 0.4)
        raise Error(f"--model {name}: open_clip has no such model; similar: {near}")
    elif Path(pretrained).is_file():
        return load_weights(name, Path(pretrained))
    else:
        quick = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
        options = {"pretrained": pretrained or None, "force_quick_gelu": quick}
        right = name.removesuffix("-quickgelu") + "-quickgelu" * quick
        advice = f"; offline, use --model {right} --pretrained FILE"
    try:
        return open_clip.create_model(name, **options)
    except Exception as problem:  # open_clip, its hub and torch raise many kinds
        raise Error(f"--model {name}: {shorten(str(problem), 200)}{advice}") from None


def load_weights(name, path):
    """A model with the weights in a file: a state dict, or OpenAI's TorchScript archive. Only an
    archive whose SHA-256 is in OpenAI's URL is loaded, because torch.jit.load runs its code."""
    url = open_clip.get_pretrained_cfg(name, "openai").get("url", "")
    by_openai = sha256(path.read_bytes()) in url
    try:
        if by_openai:
            weights = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            weights = open_clip.factory.load_state_dict(str(path), weights_only=True)
        for size in "input_resolution", "context_length", "vocab_size":  # of OpenAI's archives
            weights.pop(size, None)
    except Exception:  # torch and safetensors raise many kinds
        weights = {}
    if "token_embedding.weight" not in weights:
        raise Error(f"{path}: neither a state dict of open_clip's CLIP nor OpenAI's {name} file")
    model = open_clip.create_model(name, force_quick_gelu=by_openai)
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise Error(f"{path}: weights of another model than {name}") from None
    activation = type(model.transformer.resblocks[0].mlp.gelu).__name__
    right = name.removesuffix("-quickgelu") + "-quickgelu"
    print(f"{path}: using {activation}; OpenAI's weights need --model {right}")
    return model


def check_encoders(name, model, tokenize):
    """Raises Error if encode_text or encode_image differs from the model's own, in fp32."""
    try:
        clip = Clip(model, tokenize)
        image = torch.randn(1, 3, clip.image_size, clip.image_size)
        names = embed_names(clip, ["a photo"], 0)
        ours = encode_prompts(clip, names, names.sos[:, :0]), encode_image(clip, image)
        theirs = model.encode_text(tokenize(["a photo."])), model.encode_image(image)
        x, y = F.normalize(torch.cat(ours)), F.normalize(torch.cat(theirs))
        same = torch.allclose(x, y, atol=1e-4)
    except (AttributeError, RuntimeError):
        same = False
    if not same:
        raise Error(f"--model {name}: its encoders are not those of OpenAI's CLIP; try ViT-B-16")


def encode_text(clip, prefix, suffix, own, last, group=None):
    """(K, D) fp32 features of K sequences, prefix[group[k]] followed by suffix[k], read at [EOT].

    Equals clip.encode_text on the same tokens, with less work, because the tower is causal. A
    prefix does not depend on the class name after it, so each of the G prefixes runs once, and all
    of its classes share its keys and values. Tokens after [EOT] do not affect it, so linear layers
    and norms run on each class's tokens up to [EOT] only, unpadded, as one list of n rows.

    prefix (G, P, d_t), suffix (K, S, d_t): token embeddings without positions; own (n,): where the
    tokens up to [EOT] are among the K * S; last (K,): which of those n are [EOT]; group (K,):
    each class's prefix, ignored if G is 1. Official: clip/model.py, encode_text."""
    (G, P, _), (K, S, _), position = prefix.shape, suffix.shape, clip.positional_embedding
    # A suffix token attends to its whole prefix, and to its suffix up to itself
    mask = torch.ones(S, P + S, dtype=torch.bool, device=clip.device).tril(P)

    def pad(rows):  # (n, width) -> (K, S, width)
        zeros = rows.new_zeros(K * S, rows.shape[1])
        return zeros.index_copy(0, own, rows).unflatten(0, (K, S))

    def unpad(x):  # (K, S, width) -> (n, width)
        return x.flatten(0, 1).index_select(0, own)

    def with_past(past, x):  # (G, heads, P, ...), (K, heads, S, ...) -> (K, heads, P + S, ...)
        past = past.expand(K, -1, -1, -1) if G == 1 else past.index_select(0, group)
        return torch.cat([past, x], 2)

    with clip.autocast():
        x = unpad(suffix + position[P : P + S])
        x = torch.cat([(prefix + position[:P]).flatten(0, 1), x])  # (G * P + n, d)
        for block in clip.transformer.resblocks:
            rows = project(block, x)
            q, past_k, past_v = heads(block, rows[: G * P].unflatten(0, (G, P)))
            shared = F.scaled_dot_product_attention(q, past_k, past_v, is_causal=True)
            q, k, v = heads(block, pad(rows[G * P :]))
            k, v = with_past(past_k, k), with_past(past_v, v)
            each = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            seen = torch.cat([merge(shared).flatten(0, 1), unpad(merge(each))])
            x = residual(block, x, seen)
        x = x[G * P :].index_select(0, last)
        return (clip.ln_final(x) @ clip.text_projection).float()


def project(block, x):
    """The rows (..., 3d) of queries, keys and values of a block's input."""
    return F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)


def heads(block, rows):
    """q, k, v (B, heads, n, d / heads) of projected rows (B, n, 3d)."""
    shape = 3, block.attn.num_heads, block.attn.head_dim
    return rows.unflatten(-1, shape).permute(2, 0, 3, 1, 4).unbind()


def merge(seen):
    """(B, heads, n, d / heads) -> (B, n, d)"""
    return seen.transpose(1, 2).flatten(2)


def residual(block, x, seen):
    """A block's output from its input x and its attention output."""
    x = x + block.ls_1(block.attn.out_proj(seen))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def encode_image(clip, images, prompts=None, patches=False):
    """Image features, with prompt tokens inserted by a hook.

    The hook prompts(i, X) runs outside autocast, before each block i and, with i = -1, before
    ln_pre. X (B, 1 + N, d_v) holds the image tokens without prompts. The rows it returns, (P, d_v)
    or (B, P, d_v), replace the prompt tokens after the image tokens; None leaves those in place.
    images (B, 3, H, W), normalised. Returns fp32 features (B, D), with patches=True also patches
    (B, N, D). Raises Error for either in a ResNet. Official: clip/model.py, VisionTransformer."""
    visual = clip.visual
    with clip.autocast():
        if not (prompts or patches or hasattr(visual, "transformer")):  # a ResNet
            return visual(images).float()
        blocks = clip.blocks()
        x = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, N, d_v)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        x, count = x + visual.positional_embedding, x.shape[1]

        def with_prompts(i, x):
            with torch.autocast(clip.device.type, enabled=False):  # a method computes in fp32
                rows = prompts(i, x[:, :count]) if prompts else None
            return x if rows is None else torch.cat([x[:, :count], rows.expand(len(x), -1, -1)], 1)

        x = visual.ln_pre(with_prompts(-1, x))
        for i, block in enumerate(blocks):
            x = with_prompts(i, x)
            q, k, v = heads(block, project(block, x))
            x = residual(block, x, merge(F.scaled_dot_product_attention(q, k, v)))
        x = (visual.ln_post(x[:, :count]) @ visual.proj).float()  # without the prompts
    return (x[:, 0], x[:, 1:]) if patches else x[:, 0]


@torch.no_grad()
def unit_features(clip, images):
    """(B, D) unit features of normalised images (B, 3, H, W), by the frozen image tower."""
    return F.normalize(encode_image(clip, images), dim=-1)


# ------------------------------------------------------------------------------- 3 Prompts


class Names(NamedTuple):
    """K embedded class names that will follow a context, [SOS] V ... V <name>. [EOT]. sos
    (1, 1, d_t); tail (K, S, d_t), from the name on; eot (K,), on the CPU: index of [EOT] in tail;
    own, last: see encode_text."""

    sos: torch.Tensor
    tail: torch.Tensor
    eot: torch.Tensor
    own: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, sos, tail, eot):
        S = int(eot.max()) + 1
        own = torch.arange(S) <= eot[:, None]  # (K, S), on the CPU: no GPU synchronisation
        last = own.sum(1).cumsum(0) - 1
        own = own.flatten().nonzero()[:, 0]
        return cls(sos, tail[:, :S], eot, *(to_device(x, tail.device) for x in (own, last)))


def embed_names(clip, names, n_ctx, template="{}."):
    """Tokenises and embeds class names in a template, leaving room for n_ctx context vectors.
    Raises Error for a name that is too long for the text tower."""
    texts = ["X " * n_ctx + template.format(name.replace("_", " ")) for name in names]
    # One place more than the tower has: a text that reaches it is too long
    ids = clip.tokenize(texts, clip.context_length + 1)  # (K, 78)
    if ids[:, -1].any():
        c = names[int(ids[:, -1].argmax())]
        raise Error(f"class name {c!r} is too long to follow {n_ctx} context vectors")
    x = clip.token_embedding(to_device(ids, clip.device))
    eot = ids.argmax(1)  # [EOT] has the vocabulary's largest id
    return Names.of(x[:1, :1], x[:, 1 + n_ctx :], eot - 1 - n_ctx)


def encode_prompts(clip, names, ctx, group=None):
    """(K, D) features of the prompts [SOS] V <name>. [EOT]. ctx (G, M, d_t): the contexts V; group
    (K,): each class's context, ignored if G is 1. Official: trainers/coop.py, PromptLearner."""
    prefix = torch.cat([names.sos.expand(len(ctx), -1, -1), ctx], 1)
    return encode_text(clip, prefix, names.tail, names.own, names.last, group)


@torch.no_grad()
def zero_shot_weights(clip, dataset, templates=None):
    """(K, T, D) unit text features of each class in T templates, by default the data set's own."""
    features = []
    for template in templates or [dataset.template]:
        names = embed_names(clip, dataset.classnames, 0, template)
        features.append(encode_prompts(clip, names, names.sos[:, :0]))
    return F.normalize(torch.stack(features, 1), dim=-1)


# ---------------------------------------------------------------------------------- 4 Data


# Folder below --data, folder of images in it, Name of split_zhou_Name.json, CoOp's template
Benchmark = namedtuple("Benchmark", "folder images split template")
TABLE = """
imagenet        | imagenet | images | - | a photo of a {}.
caltech101      | caltech-101 | 101_ObjectCategories | Caltech101 | a photo of a {}.
dtd             | dtd | images | DescribableTextures | {} texture.
eurosat         | eurosat | 2750 | EuroSAT | a centered satellite photo of {}.
fgvc_aircraft   | fgvc_aircraft | images | - | a photo of a {}, a type of aircraft.
food101         | food-101 | images | Food101 | a photo of {}, a type of food.
oxford_flowers  | oxford_flowers | jpg | OxfordFlowers | a photo of a {}, a type of flower.
oxford_pets     | oxford_pets | images | OxfordPets | a photo of a {}, a type of pet.
stanford_cars   | stanford_cars | - | StanfordCars | a photo of a {}.
sun397          | sun397 | SUN397 | SUN397 | a photo of a {}.
ucf101          | ucf101 | UCF-101-midframes | UCF101 | a photo of a person doing {}.
imagenetv2      | imagenetv2 | imagenetv2-matched-frequency-format-val | - | a photo of a {}.
imagenet_sketch | imagenet-sketch | images | - | a photo of a {}.
imagenet_a      | imagenet-adversarial | imagenet-a | - | a photo of a {}.
imagenet_r      | imagenet-rendition | imagenet-r | - | a photo of a {}.
"""
BENCHMARKS = {
    name: Benchmark(*(cell.strip("-") for cell in cells))
    for name, *cells in (re.split(r" *\| ", row) for row in TABLE.strip().splitlines())
}
SEVEN = [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]  # CoOp's ensemble
IMAGES = tuple(".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm".split())


class Dataset(NamedTuple):
    """A data set, whose train and test are lists of (image path, label, class name)."""

    name: str
    train: list
    test: list
    classnames: list
    template: str = "a photo of a {}."
    crop: tuple = (0.08, 1.0)  # smallest and largest share of the area in a random crop
    half: str = "all"  # which classes: "all", "base" or "new"
    new: "Dataset | None" = None  # with --classes base, the other half
    transfer: tuple = ()  # the Datasets of --transfer


def few_shot(cfg, data=None):
    """The few-shot subset of data (default: cfg.dataset). With --classes base it has the first
    half of the classes, .new the second. .transfer has the --transfer data sets. Raises Error."""
    data = sample_few_shot(data or load_dataset(cfg.dataset, cfg.data), cfg.shots, cfg.seed)
    names = [name.strip() for name in cfg.transfer.split(",") if name.strip()]
    data = data._replace(transfer=tuple(load_dataset(name, cfg.data) for name in names))
    show(data, data.train + data.test)
    for target in data.transfer:
        show(target, target.test)
    if cfg.classes == "base":
        if len(data.classnames) < 4:
            raise Error(f"--classes base: {data.name} needs 4 classes, 2 in each half")
        data = subset_classes(data, "base")._replace(new=subset_classes(data, "new"))
    return data


def show(data, used):
    """Prints a summary. Raises Error if the image of any item in used is missing or empty."""
    synthetic = " (synthetic)" * (data.name in SYNTHETIC)
    names = shorten(", ".join(data.classnames), 50, placeholder=" ...")
    counts = f"{len(data.train)} training and {len(data.test)} test images"
    print(f"{data.name}{synthetic}: {len(data.classnames)} classes ({names}), {counts}")
    wordless = [c for c in data.classnames if c.upper() == c.lower()]
    if wordless:
        print(f"{data.name}: class name {wordless[0]!r} has no letter; CLIP needs words")
    bad = [path for path, *_ in used if not os.path.isfile(path) or not os.path.getsize(path)]
    if bad:
        raise Error(f"{data.name}: {len(bad)} images missing or empty, such as {bad[0]}")


def load_dataset(name, root="data"):
    """The Dataset of a benchmark, a synthetic set or a folder; lists, no images. Raises Error."""
    if name not in {**BENCHMARKS, **SYNTHETIC}:
        return from_own_folder(name)
    if Path(name).is_dir() and Path(name) != Path(root, name):
        raise Error(f"{name} is both a known data set and a folder; use ./{name} for the folder")
    if name in BENCHMARKS:
        return from_benchmark(name, Path(root))
    data = from_class_folders(name, shapes.write(Path(root), name))
    return data._replace(template=SYNTHETIC[name].template, crop=shapes.CROP)


def from_benchmark(name, root):
    """A benchmark, by the reader of its format."""
    folder, images, split, template = BENCHMARKS[name]
    folder, images = root / folder, root / folder / images
    try:
        if not images.is_dir():
            raise OSError(f"no folder {images}")
        if split:
            data = from_split_file(name, folder / f"split_zhou_{split}.json", images)
        elif name == "fgvc_aircraft":
            data = from_aircraft_lists(name, folder, images)
        else:
            data = from_wordnet_folders(name, images)
    except (OSError, ValueError) as problem:
        how = "see DATASETS.md of KaiyangZhou/CoOp"
        if (TOOLS / "download.py").is_file():
            how = f'python -m tests.tools.download {name} --data "{root}"'
        raise Error(f"{folder}: {problem}; to get it: {how}") from None
    return data._replace(template=template)


def from_split_file(name, split, images):
    """{"train": [["Faces/image_0274.jpg", 0, "face"], ...], "val": ..., "test": ...}: paths below
    the folder images, labels, class names. val is not used, as in CoOp. Official:
    datasets/oxford_pets.py:122-138."""
    try:
        lists = json.loads(split.read_text("utf-8"))
        train, test = (
            [(f"{images}/{path}", int(y), str(c)) for path, y, c in lists[part]]
            for part in ("train", "test")
        )
    except Exception:  # a list can hold anything
        raise OSError(f"{split} is missing or damaged") from None
    names = {y: c for _, y, c in train + test}
    return checked(name, train, test, [names[y] for y in sorted(names)])


def from_aircraft_lists(name, folder, images):
    """variants.txt: the classes in order; images_variant_{train,test}.txt: lines as
    "1025794 707-320", an image and its variant. Official: datasets/fgvc_aircraft.py."""
    variants = (folder / "variants.txt").read_text("utf-8").splitlines()

    def items(part):
        lines = (folder / f"images_variant_{part}.txt").read_text("utf-8").splitlines()
        pairs = (line.split(" ", 1) for line in lines)
        return [(f"{images}/{i}.jpg", variants.index(v), v) for i, v in pairs]

    return checked(name, items("train"), items("test"), variants)


def from_wordnet_folders(name, images):
    """ImageNet: class folders n01440764/ ... in train/ and val/. Its variants: class folders only;
    V2's are 0/ ... 999/, A and R have 200. Official: datasets/imagenet.py and those next to it."""
    keys = [*map(str, range(1000))] if name == "imagenetv2" else ImageNetInfo().label_names()
    titles = dict(zip(keys, open_clip.IMAGENET_CLASSNAMES, strict=True))
    if name in ("imagenet_a", "imagenet_r"):
        keys = files("timm.data._info").joinpath(f"{name}_synsets.txt").read_text().split()
        titles = {key: titles[key] for key in keys}
    train, test = ("train", "val") if name == "imagenet" else (None, ".")
    present = {path.name for path in class_folders(images / test)}
    missing = [key for key in titles if key not in present]
    if missing:
        raise Error(f"{images / test} lacks {len(missing)} of {len(titles)} classes: {missing[0]}")
    return from_class_folders(name, images, train, test, titles)


def from_own_folder(name):
    """FOLDER/{train,test}/<class>/*.jpg, or FOLDER/<class>/*.jpg with a fixed 70/30 split."""
    folder = Path(name or " ")
    if not folder.is_dir():
        near = difflib.get_close_matches(name, [*BENCHMARKS, *SYNTHETIC], 4)
        lack = "neither a folder of class folders nor a data set"
        raise Error(f"{name!r}: {lack}; similar: {near}; synthetic ones: tests/tools/shapes.py")
    parts = [p for p in ("train", "val", "test") if any(map(Path.is_dir, listed(folder / p)))]
    if "train" in parts and "test" in parts:
        return from_class_folders(name, folder)
    if parts:
        raise Error(f"{folder} has {parts}: train/ and test/ are needed; rename val/ to test/")
    data = from_class_folders(name, folder, None, ".")
    train, test = [], []
    for group in by_class(data.test):
        random.Random(0).shuffle(group)
        most = round(0.7 * len(group))
        train, test = train + group[:most], test + group[most:]
    return checked(name, train, test, data.classnames)


def from_class_folders(name, folder, train="train", test="test", titles=None):
    """The Dataset of class folders in train (or None) and test. titles: {folder: class name}.
    Files are sorted; the official order depends on the file system (datasets/imagenet.py:84)."""
    if titles is None:
        found = class_folders(folder / test) + (class_folders(folder / train) if train else [])
        titles = {key: key for key in sorted({path.name for path in found})}

    def items(part):
        return [
            (str(file), label, title)
            for label, (key, title) in enumerate(titles.items())
            for file in listed(folder / part / key)
            if file.suffix.lower() in IMAGES
        ]

    return checked(name, items(train) if train else [], items(test), [*titles.values()])


def class_folders(folder):
    """The sorted subfolders of a folder. Raises Error if there are none, saying what is there."""
    folders = [path for path in listed(folder) if path.is_dir()]
    if not folders:
        found = f"{len(listed(folder)):,} files and no class folders"
        raise Error(f"{folder} holds {found}; expected {folder}/<class>/*.jpg")
    return folders


def listed(folder):
    """Sorted paths in a folder, without hidden ones; none where there is no folder."""
    return sorted(folder.glob("[!.]*"), key=str)


def checked(name, train, test, classnames):
    """The Dataset. Raises Error for a class without images, and for fewer than two classes."""
    if len(classnames) < 2:
        raise Error(f"{name}: at least two classes are needed; found {classnames}")
    for kind, items in ("training", train or test), ("test", test):  # some sets have no train
        missing = set(range(len(classnames))) - {label for _, label, _ in items}
        if missing:
            lack = f"no {kind} images for class {classnames[min(missing)]!r}"
            raise Error(f"{name}: {lack}; each class needs training and test images")
    return Dataset(name, train, test, classnames)


def by_class(items):
    """Lists of the items of each class, in order of their first appearance."""
    groups = {}
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return list(groups.values())


def sample_few_shot(dataset, shots, seed):
    """Keeps `shots` training images of each class, or all if a class has fewer or shots is 0.
    Official: Dassl data/datasets/base_dataset.py:167-223."""
    stream = random.Random(seed)
    train = []
    for group in by_class(dataset.train):
        train += stream.sample(group, shots) if 0 < shots <= len(group) else group
    return dataset._replace(train=train)


def subset_classes(dataset, half):
    """The "base" (first, larger) or "new" half of the classes. Official: oxford_pets.py:140-186."""
    names = dataset.classnames
    middle = math.ceil(len(names) / 2)
    names = names[:middle] if half == "base" else names[middle:]
    first = 0 if half == "base" else middle
    train, test = (
        [(path, y - first, c) for path, y, c in items if 0 <= y - first < len(names)]
        for items in (dataset.train, dataset.test)
    )
    return dataset._replace(train=train, test=test, classnames=names, half=half)


# -------------------------------------------------------------------------------- 5 Images

BICUBIC = InterpolationMode.BICUBIC
TEST_BATCH = 100  # images, as in CoOp's configs
CACHE_BYTES = 4 * 2**30  # of decoded training images; others are decoded again
PREFETCH = 2  # batches


def decode(path):
    """The RGB PIL image of a file, turned as its EXIF tag says. Raises Error."""
    try:
        with Image.open(path) as image:
            image.load()
            with contextlib.suppress(Exception):  # ignore a damaged tag
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bit, which convert() would clip to white
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except Exception as problem:  # PIL raises many kinds
        raise Error(f"cannot read image {path}: {shorten(str(problem), 200)}") from None


def preprocess(image, side):
    """A PIL image's shorter edge resized to side, then its centre, uint8 (3, side, side)."""
    return vision.pil_to_tensor(vision.center_crop(vision.resize(image, [side], BICUBIC), [side]))


def augment(image, side, crop, numbers):
    """A random crop of a PIL image, resized, and mirrored half the time: uint8 (3, side, side).
    Its share of the area lies within crop, its aspect ratio between 3/4 and 4/3. Like
    torchvision's RandomResizedCrop and flip, but numbers is one stream per image, for threads."""
    width, height = image.size
    for _ in range(10):
        area = width * height * numbers.uniform(*crop)
        ratio = (4 / 3) ** numbers.uniform(-1, 1)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = numbers.randint(0, width - w), numbers.randint(0, height - h)
            break
    else:  # of a very long image the centre
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    image = vision.resized_crop(image, top, left, h, w, [side, side], BICUBIC)
    image = vision.pil_to_tensor(image)
    return image.flip(-1) if numbers.random() < 0.5 else image


def normalize(clip, images):
    """uint8 images on the CPU -> one batch on the device, normalised as CLIP wants it."""
    return (to_device(torch.stack(images), clip.device) / 255 - clip.mean) / clip.std


def to_device(x, device):
    """Non-blocking copy to the device, from pinned memory on CUDA."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def prefetch(workers, function, batches):
    """Yields [function(item) for item in batch] per batch; threads prefetch PREFETCH batches."""
    pending = []
    with ThreadPoolExecutor(workers) as pool:
        for batch in batches:
            pending.append(pool.map(function, batch))
            if len(pending) > PREFETCH:
                yield list(pending.pop(0))
        yield from map(list, pending)


class Loader:
    """Batches of augmented training images, decoded once if the cache has room. Each image depends
    only on (seed, epoch, image), the order on (seed, epoch), so epochs are repeatable."""

    def __init__(self, cfg, clip, data):
        """Raises Error if there are no training images."""
        if not data.train:
            raise Error(f"{data.name} has no training images; use it only with --transfer")
        self.cfg, self.clip, self.data = cfg, clip, data
        self.crops = [data.crop] * len(data.train)  # of each image
        self.cache, self.room = {}, CACHE_BYTES
        self.labels = torch.tensor([label for _, label, _ in data.train])

    def order(self, epoch):
        """Lists of indices, one per batch; a short last one is dropped if there are others."""
        generator = torch.Generator().manual_seed(seed_of(self.cfg.seed, epoch))
        order = torch.randperm(len(self.labels), generator=generator)
        batches = order.split(self.cfg.batch_size)
        return [batch.tolist() for batch in batches if len(batch) == len(batches[0])]

    def epoch(self, epoch):
        """Yields images (B, 3, side, side) and labels (B,), on the device."""
        batches = self.order(epoch)
        augmented = prefetch(self.cfg.workers, lambda i: self.augmented(epoch, i), batches)
        pairs = zip(batches, augmented, strict=True)
        for batch, images in tqdm(pairs, "steps", len(batches), leave=False):
            yield normalize(self.clip, images), to_device(self.labels[batch], self.clip.device)

    def augmented(self, epoch, i):
        """Image i as this epoch shows it, uint8 (3, side, side)."""
        image = self.cache.get(i)
        if image is None:
            image = decode(self.data.train[i][0])
            if self.room > 0:
                self.cache[i] = image
                self.room -= 4 * image.width * image.height  # bytes, in PIL
        numbers = random.Random(seed_of(self.cfg.seed, epoch, i))
        return augment(image, self.clip.image_size, self.crops[i], numbers)


# ------------------------------------------------------------------------------ 6 Training


class Optimizer:
    """SGD, momentum .9, weight decay 5e-4, cosine schedule with warm-up (Dassl optim/optimizer.py
    and lr_scheduler.py).

    After k epochs the rate is 1e-5 while k < warmup, then lr/2 (1 + cos(pi (k - warmup) / epochs)),
    never 0. groups: parameters, or dicts {"params", "lr", "warmup"} (else 1). In fp16, GradScaler
    scales the loss, and fused SGD skips a step that overflows, without a GPU synchronisation."""

    def __init__(self, cfg, clip, groups, epochs):
        self.epochs, self.losses, self.learns = epochs, [], False
        self.sgd = torch.optim.SGD(groups, cfg.lr, momentum=0.9, weight_decay=5e-4, fused=True)
        self.scaler = torch.amp.GradScaler(clip.device.type, enabled=clip.half is torch.float16)
        for group in self.sgd.param_groups:  # saved with SGD's own state
            group.update(top=group["lr"], k=0, warmup=group.get("warmup", 1))
            for p in group["params"]:  # which a skipped first step would not set
                self.sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.schedule(0)

    def schedule(self, steps):
        """Advances the schedule by `steps` epochs and sets each group's rate."""
        for group in self.sgd.param_groups:
            group["k"] += steps
            k = group["k"] - group["warmup"]
            cosine = (1 + math.cos(math.pi * k / self.epochs)) / 2
            group["lr"] = group["top"] * cosine if k >= 0 else 1e-5

    def step(self, loss):
        """Backward and one step of SGD. Raises Error if the first gradients are all zero."""
        self.losses.append(loss.detach())
        self.sgd.zero_grad()
        self.scaler.scale(loss).backward()
        if not self.learns:  # first step only; later ones need no GPU synchronisation
            found = [p.grad for group in self.sgd.param_groups for p in group["params"]]
            self.learns = any(grad is not None and grad.any() for grad in found)
        if not self.learns:
            raise Error("these options leave nothing to learn: all gradients are zero")
        self.scaler.unscale_(self.sgd)
        self.scaler.step(self.sgd)
        self.scaler.update()

    def end_epoch(self):
        """Sets the next rates; returns the mean loss. Raises Error if the training diverged."""
        self.schedule(1)
        loss = torch.stack(self.losses).mean().item()
        self.losses.clear()
        if not math.isfinite(loss) or self.scaler.get_scale() < 1:  # 1 where nothing is scaled
            raise Error(f"training diverged (loss {loss}): lower --lr or use --precision fp32")
        return loss


def resumed(cfg, clip, data, prompt, optimizer):
    """Yields the remaining epochs and saves a checkpoint after each. The same command resumes from
    it, on a CPU bit for bit. A finished run is loaded into prompt and yields no epochs. data: a
    Dataset or a list of them. Raises Error if the checkpoint belongs to another run."""
    path, sets = run_folder(cfg) / "checkpoint.pt", data if isinstance(data, list) else [data]
    epochs, first, n_train = optimizer.epochs, 0, sum(len(d.train) for d in sets)
    run = identity(cfg, clip, sets, epochs)
    trained = {"n_train": n_train, "seconds": 0.0, "losses": []}
    trained |= provenance(source_file(cfg), clip.precision, clip.device.type)
    if cfg.force:
        shutil.rmtree(path.parent, ignore_errors=True)
    if path.exists():
        first, trained = load_checkpoint(path, run, trained, prompt, optimizer)
    label = f"{method(cfg)} {cfg.dataset[:30]}"
    bar = tqdm(range(first, epochs), label, epochs, initial=first)
    for epoch in bar:
        # For dropout and SoftCPT's class sampling; the order has a seed of its own
        torch.manual_seed(seed_of(cfg.seed, epoch, -1))
        start = time.time()
        yield epoch
        loss = optimizer.end_epoch()
        bar.set_postfix(loss=loss)
        trained["losses"].append(loss)
        trained["seconds"] += time.time() - start
        trained["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
        state = {"run": run, "trained": trained, "epoch": epoch + 1, "config": vars(cfg)}
        state |= {"prompt": prompt.state_dict(), "sgd": optimizer.sgd.state_dict()}
        content = io.BytesIO()
        torch.save(state | {"scaler": optimizer.scaler.state_dict()}, content)
        write(path, content.getvalue())


def identity(cfg, clip, sets, epochs):
    """What defines a run, apart from the code, the device and the precision in use."""
    images = [[sha256(Path(path).read_bytes()), y, c] for d in sets for path, y, c in d.train]
    return {
        "method": method(cfg),
        **{f"--{name}": value for name, value in vars(cfg).items() if name not in NOT_LEARNED},
        "number of epochs": epochs,
        "CLIP": clip.fingerprint,
        "training images": sha256(images),
        "class names": {d.name: d.classnames for d in sets},
        "templates": {d.name: d.template for d in sets},
    }


@functools.cache
def provenance(file, precision, device):
    """What else a result may depend on: the code (the method's file, common.py) and the machine.
    Read once, before training, because the files may change while it runs."""
    paths = [path.resolve() for path in (file, Path(__file__)) if path]
    command = ["git", "status", "--porcelain=v2", "--branch", "--", *paths]
    try:
        git = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=paths[-1].parent)
        status = git.stdout  # "# branch.oid COMMIT", ..., and a line for each modified file
    except OSError:  # no git
        status = ""
    return {
        "commit": status[13:20],
        "modified": bool(re.search(r"^[12u?] ", status, re.M)),
        "source": sha256([path.read_bytes() for path in paths])[:16] if file else "",
        "precision": precision,
        "device": device,
        "torch": str(torch.__version__),
        "open_clip": open_clip.__version__,
    }


def read_checkpoint(path):
    """The contents of a checkpoint. Raises Error."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert state["run"]  # which an earlier version lacks
        return state
    except Exception:  # torch raises many kinds
        raise Error(f"{path}: damaged or of an earlier version; --force retrains") from None


def load_checkpoint(path, run, now, prompt, optimizer):
    """Loads a checkpoint; returns (epoch, trained). now: this process's facts. Raises Error."""
    state, folder = read_checkpoint(path), path.parent
    then, trained = state["run"], state["trained"]
    changed = [key for key in {**then, **run} if then.get(key) != run.get(key)]
    finished = state["epoch"] == then["number of epochs"]
    if not finished:
        changed += [key for key in ("source", "device", "precision") if trained[key] != now[key]]
    if changed:
        raise Error(f"{folder} was trained with a different {', '.join(changed)}; --force retrains")
    if trained["source"] != now["source"]:
        earlier = f"an earlier {run['method']}.py or common.py at commit {trained['commit']}"
        print(f"{folder} was trained by {earlier}; --force retrains")
    try:
        prompt.load_state_dict(state["prompt"])
    except RuntimeError:
        raise Error(f"{folder}: this code has different learnables; --force retrains") from None
    if not finished:
        optimizer.sgd.load_state_dict(state["sgd"])
        optimizer.scaler.load_state_dict(state["scaler"])
    return state["epoch"], trained


# ---------------------------------------------------------------------------- 7 Evaluation


def targets_of(data):
    """All Datasets to evaluate on, in order: data (one or a list), its new halves, --transfer's."""
    sets = data if isinstance(data, list) else [data]
    return sets + [d.new for d in sets if d.new] + [*sets[0].transfer]


@torch.no_grad()
def check_targets(data, classifier):
    """Builds each classifier that evaluate() will use. Raises Error before training, rather than
    after it, if a class name is too long or contexts were learned for other classes."""
    for target in targets_of(data):
        classifier(target)


def evaluate(cfg, clip, data, classifier, per_class=()):
    """Evaluates on every test set that cfg asks for; prints and records each result. Returns the
    accuracy in percent, averaged over tasks; with --classes base, that of the base half.

    data: the Dataset trained on, or a list of them. classifier(dataset) returns unit text features
    w (K, D) to compare with CLIP's own image features f (B, D), or a function of images
    (B, 3, H, W) and f that returns logits (B, K). per_class: names of the Datasets in data scored
    by the mean accuracy over classes."""
    sets, path = data if isinstance(data, list) else [data], run_folder(cfg) / "checkpoint.pt"
    trained = {"seconds": 0.0, "n_train": 0}  # zero-shot CLIP's
    if path.exists():
        trained = read_checkpoint(path)["trained"]
    scores, both = [], "{:.2f} (zero-shot {:.2f})".format
    for target in targets_of(data):
        row = measured(cfg, clip, target, classifier)
        kind = "mean_class_" * (target.name in per_class)
        scores.append([row[kind + "accuracy"], row[kind + "zero_shot"]])
        # Print first: writing may fail
        print(f"  {target.name}, {target.half} classes:", both(*scores[-1]))
        record(cfg, clip, target, row, trained)
    own = np.mean(scores[: len(sets)], 0)  # ours, zero-shot CLIP's
    result = both(*own)
    if cfg.classes == "base":
        new = np.mean(scores[len(sets) : 2 * len(sets)], 0)
        H = 2 * own * new / np.maximum(own + new, 1e-9)
        three = "base {:.2f}, new {:.2f}, H {:.2f}".format
        result = "{} (zero-shot {})".format(*map(three, own, new, H))
    if per_class:
        result += f" [mean over classes: {', '.join(per_class)}]"
    result += f", {trained['seconds']:.0f} s"
    print(f"in {path.parent}\n{cfg.dataset} {cfg.shots} shots seed {cfg.seed}: {result}")
    return float(own[0])


@torch.no_grad()
def measured(cfg, clip, target, classifier):
    """Accuracies in percent, over images and over classes, of a classifier and zero-shot CLIP."""
    predict, w = classifier(target), zero_shot_weights(clip, target)[:, 0]
    batches = [target.test[i : i + TEST_BATCH] for i in range(0, len(target.test), TEST_BATCH)]
    found, side = [], clip.image_size
    ready = prefetch(cfg.workers, lambda item: preprocess(decode(item[0]), side), batches)
    for batch in tqdm(ready, "test images", len(batches), leave=False):
        x = normalize(clip, batch)
        f = unit_features(clip, x)
        logits = predict(x, f) if callable(predict) else f @ predict.T
        found.append(torch.stack([logits.argmax(1), (f @ w.T).argmax(1)]))
    y = torch.tensor([label for _, label, _ in target.test])
    right = 100 * (torch.cat(found, 1).cpu() == y).double()  # (2, n)
    by_class = torch.stack([y.bincount(row) for row in right]) / y.bincount()
    row = {"n_test": len(y)}
    row["accuracy"], row["zero_shot"] = right.mean(1).tolist()
    row["mean_class_accuracy"], row["mean_class_zero_shot"] = by_class.nanmean(1).tolist()
    return row


def record(cfg, clip, target, row, trained):
    """Writes one result to a JSON file; facts of training and of evaluation are kept apart."""
    row = {
        "method": method(cfg),
        "config": vars(cfg),
        "evaluated_on": target.name,
        "classes": target.half,
        **row,
        "n_train": trained["n_train"],
        "activation": clip.activation,
        "trained": trained,
        "evaluated": provenance(source_file(cfg), clip.precision, clip.device.type),
    }
    name = file_name(target.name) + f"-{target.half}".replace("-all", "") + ".json"
    write(run_folder(cfg) / "results" / name, json.dumps(row, indent=1).encode())


@dataclasses.dataclass
class ZeroShot(Config):
    shots: int = 0  # nothing is trained
    ensemble: bool = False  # CoOp's ensemble: 7 templates plus, except on ImageNet, the set's own


def zero_shot(cfg):
    """Zero-shot CLIP, the smallest method. Official: trainers/zsclip.py:31-99."""
    data = few_shot(cfg)
    clip = load_clip(cfg)

    def classifier(dataset):
        templates = [dataset.template]
        if cfg.ensemble:
            templates = SEVEN if dataset.name == "imagenet" else templates + SEVEN
        return F.normalize(zero_shot_weights(clip, dataset, templates).mean(1), dim=-1)

    return evaluate(cfg, clip, data, classifier)


if __name__ == "__main__":
    script(lambda: zero_shot(cli(ZeroShot)))
