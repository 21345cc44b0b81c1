"""What the five methods share, because it can move a number without being the method.

    python coop.py --dataset caltech101 --shots 16       # a method is a script beside this file
    python common.py --dataset caltech101 --ensemble     # zero-shot CLIP, the smallest method
    python common.py predict RUN PICTURES                # a tool; TOOLS, at the end, lists them

Chapters, in the order in which a method uses them:

 1 Options      Config, cli, script; run_folder, where a run is kept
 2 CLIP         load_clip; the two frozen towers: encode_text, encode_image
 3 Prompts      from class names and contexts to text features: embed_names, encode_prompts
 4 Data         load_dataset and a reader per format; few-shot picks, halves of the classes
 5 Pictures     decode, views, Loader: batches of augmented pictures
 6 Training     Optimizer; resumed, the loop over epochs that survives a kill
 7 Evaluation   evaluate: accuracies, records, the last line; zero-shot CLIP

Chapters 1 to 6 decide what is learned; chapter 7 only measures it and writes it down.

Letters: B batch, K classes, M context vectors, G contexts, P tokens of a prefix or rows of a
prompt, S places for a class's own tokens, n tokens in a list, N patches, d width of a tower, D
joint width; f image features, w text features. "Official" are the files of KaiyangZhou/CoOp,
commit ff61507, and KaiyangZhou/Dassl.pytorch, commit c61a1b5.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import io
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import warnings
import zipfile
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from timm.data import ImageNetInfo
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision
from tqdm import tqdm

# ------------------------------------------------------------------------------- 1 Options


class Error(ValueError):
    """Bad input: one line that names the thing and the way out."""


@dataclasses.dataclass
class Config:
    """The options that all methods share; the comment behind a field is its text in --help."""

    epochs: int = 0  # 0 = the paper's schedule
    batch_size: int = 32  # images per step
    lr: float = 2e-3  # of SGD, on a cosine
    dataset: str = "shapes"  # a benchmark's name, or a folder of yours
    shots: int = 16  # training images per class; 0 = all
    seed: int = 1  # of the picks, the start, the order and the views
    classes: Literal["all", "base"] = "all"  # base: train on the first half; base, new and H
    transfer: str = ""  # comma list of further data sets to evaluate the trained prompt on
    load: str = ""  # folder of a finished run: evaluate it, train nothing
    model: str = ""  # open_clip name, local-dir:DIR, hf-hub:NAME; "" = the paper's, or shapes' own
    pretrained: str = "openai"  # tag or file (TorchScript: OpenAI's, QuickGELU); "" = random
    precision: Literal["", "amp", "bf16", "fp32"] = ""  # "" = amp on CUDA, else fp32
    device: str = ""  # "" = cuda where there is one, else cpu
    data: str = "data"  # folder of the data sets
    out: str = "runs"  # folder of everything written
    workers: int = 8  # threads that decode and augment images
    force: bool = False  # delete the run and train anew; with --load, evaluate anew

    paper_model: ClassVar[str] = "ViT-B-16"  # what --model "" stands for

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 1 if field.name in ("batch_size", "workers") else 0
            if field.type in (int, float) and getattr(self, field.name) < min(least, field.default):
                raise Error(f"--{field.name} must be at least {least}")


NOT_LEARNED = "transfer load device data out workers force".split()  # not in a run's name


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are Errors."""

    def error(self, message):
        raise Error(f"{message}; --help lists every option")


def cli(cls, argv=None):
    """The Config class cls, filled from the command line; with --load RUN, by the options that RUN
    was trained with, but for those typed. Raises Error."""
    lineage = cls.__mro__[-2::-1]  # Config first, cls last
    source = "".join(inspect.getsource(c) for c in lineage)
    notes = dict(re.findall(r"^ +(\w+): .*?  # (.+)$", source, re.M))
    parser = Parser(
        description=sys.modules[cls.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not typed stays out of `typed`
    )
    shared = [field.name for field in dataclasses.fields(Config)]
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name in shared):
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_args(field.type):
            kind = {"choices": get_args(field.type)}
        note = f"{notes.get(field.name)} [{field.default}]"
        parser.add_argument(f"--{field.name}", help=note, **kind)
    typed = vars(parser.parse_args(argv))
    try:
        if typed.get("load"):
            trained = read_prompt(typed["load"])[1]["config"]
            known = {field.name for field in dataclasses.fields(cls)} - set(NOT_LEARNED)
            typed = {name: trained[name] for name in known & set(trained)} | typed
        return cls(**typed)
    except (TypeError, LookupError) as problem:
        raise Error(f"--load {typed.get('load')}: its options are not ours ({problem})") from None


def script(main):
    """Runs main(). Bad input ends in one printable line on stderr and exit code 2."""
    try:
        return main()
    except (Error, OSError) as problem:
        line = str(problem)
    except torch.OutOfMemoryError:
        line = "the GPU's memory is full; lower --batch_size, or take a smaller --model"
    except KeyboardInterrupt:
        line = "interrupted; the same command goes on after the last whole epoch"
    print("error:", "".join(c if c.isprintable() else " " for c in line), file=sys.stderr)
    raise SystemExit(2)


def method(cfg):
    """The name of the script that cfg belongs to."""
    return Path(inspect.getfile(type(cfg))).stem.replace("common", "zero_shot")


def run_folder(cfg):
    """runs/<method>/<dataset>/<name>: the name holds every option that changes what is learned."""
    name = f"{cfg.shots}shots_seed{cfg.seed}"
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default and field.name not in (*NOT_LEARNED, "dataset", "shots", "seed"):
            name += f"_{field.name}={value}"
    place = Path(cfg.out, method(cfg), file_name(cfg.dataset), file_name(name))
    return Path(cfg.load) if cfg.load else place


def file_name(text):
    """text as a name that every disk takes, a name of its own for every text."""
    name = urllib.parse.quote(text, safe="=, ", errors="surrogatepass")
    if len(name) > 200 or not name.strip("."):  # too long, or a folder above
        name = name[:150] + hashlib.sha256(name.encode()).hexdigest()[:16]
    return name


def seed_of(*numbers):
    """One seed for several whole numbers; their hash is the same in every process."""
    return hash(numbers) % 2**63


def write(path, content):
    """Writes bytes to path whole or not at all: to a draft beside it, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.urandom(4).hex()}")  # two hosts share process ids
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------- 2 CLIP


class Clip:
    """A frozen open_clip model in eval mode, and what the methods ask of it besides.

    tokenize, device; scale: exp(logit_scale) = 1 / tau, on the device; image_size in pixels; mean
    and std (3, 1, 1); fingerprint: of weights, heads and activation; half: torch.float16 ("amp"),
    torch.bfloat16 or None (fp32): what the towers' matrices are held and multiplied in, while
    norms, learnables, logits and losses stay fp32. All else, as clip.visual, is the model's own.
    """

    def __init__(self, model, tokenize, device="cpu", precision="fp32"):
        model.requires_grad_(False).eval()
        self.fingerprint = fingerprint(model)
        self.half = {"amp": torch.float16, "bf16": torch.bfloat16, "fp32": None}[precision]
        if self.half:
            open_clip.model.convert_weights_to_lp(model, self.half)
        self.model, self.tokenize = model.to(device), tokenize
        self.scale = self.model.logit_scale.exp()
        self.device = self.scale.device
        self.image_size = int(np.max(model.visual.image_size))
        colours = torch.tensor([model.visual.image_mean, model.visual.image_std])
        self.mean, self.std = to_device(colours[..., None, None], self.device)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def blocks(self):
        """The image tower's transformer blocks. Raises Error for a ResNet."""
        if not hasattr(self.visual, "transformer"):
            raise Error("visual prompts need a ViT, and this --model is a ResNet; try ViT-B-16")
        return self.visual.transformer.resblocks

    def autocast(self):
        """The context in which the towers run."""
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)


def fingerprint(model):
    """Hash of a model's weights, layers (its activation among them) and heads."""
    heads = [getattr(module, "num_heads", 0) for module in model.modules()]
    total = hashlib.sha256(f"{model} {heads}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def load_clip(model, pretrained="openai", device="", precision=""):
    """The Clip of a Config; or of an open_clip name, "local-dir:DIR" or "hf-hub:NAME".

    pretrained: open_clip tag, weights file, or "" for random weights. Raises Error for a model that
    is unknown, cannot be had, or is not of open_clip's class CLIP with OpenAI's towers.
    """
    if isinstance(model, Config):
        cfg = model
        return load_clip(cfg.model or default_model(cfg), cfg.pretrained, cfg.device, cfg.precision)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision or ("amp" if device.startswith("cuda") else "fp32")
    logging.disable()  # the hub's 40 lines of retries, which the one line below sums up
    try:
        torch.empty(0, device=device)
        with torch.random.fork_rng([]), warnings.catch_warnings(action="ignore"):
            built = build_model(model, pretrained)  # leaves alone the numbers of a prompt's start
        tokenize = open_clip.get_tokenizer(model)
    except Exception as problem:  # open_clip, its hub and torch raise many kinds
        raise Error(f"--model {model}, --device {device}: {problem}") from None
    finally:
        logging.disable(logging.NOTSET)
    if not supported(built):
        raise Error(f"--model {model} is not of open_clip's class CLIP with OpenAI's towers")
    return Clip(built, tokenize, device, precision)


def supported(model):
    """Whether the towers below compute what the model's own do: OpenAI's ViT or ResNet, read at the
    class token, and a causal text tower, read at the EOT."""
    visual = model.visual
    towers = open_clip.transformer.VisionTransformer, open_clip.modified_resnet.ModifiedResNet
    if type(model) is not open_clip.CLIP or not isinstance(visual, towers):
        return False
    if model.attn_mask is None or getattr(model, "text_pool_type", "argmax") != "argmax":
        return False
    if hasattr(visual, "transformer"):
        usual = (
            type(visual.transformer.resblocks[0]) is open_clip.transformer.ResidualAttentionBlock
        )
        plain = visual.pool_type == "tok" and not visual.final_ln_after_pool
        return usual and plain and visual.attn_pool is None
    return True


def default_model(cfg):
    """The paper's backbone; for a drawn data set its own tiny CLIP, on one thread, so that its
    numbers do not depend on the machine's cores and load."""
    world = drawn_world()
    if not world or cfg.dataset.split(",")[0] not in world.TASKS:
        return cfg.paper_model
    torch.set_num_threads(1)
    return f"local-dir:{world.write(Path(cfg.data), 'clip')}"


def drawn_world():
    """tests/tools/shapes.py, which draws the default data sets; None where it was not copied."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module("tests.tools.shapes")


def build_model(name, pretrained):
    """An open_clip model with its weights, and the activation that they were trained with."""
    if ":" in name:  # a folder or a hub's repository, which says all of it
        return open_clip.create_model(name, require_pretrained=True)
    if name not in open_clip.list_models():
        raise Error("open_clip has no such model; open_clip.list_models() lists them")
    if Path(pretrained).is_file():
        weights, from_openai = read_weights(pretrained)
        model = open_clip.create_model(name, force_quick_gelu=from_openai)
        model.load_state_dict(weights)
        quick = any(isinstance(m, open_clip.transformer.QuickGELU) for m in model.modules())
        print(f"{pretrained}: taken with {'QuickGELU' if quick else 'GELU'}", file=sys.stderr)
        return model
    quick = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
    return open_clip.create_model(name, pretrained or None, force_quick_gelu=quick)


def read_weights(path):
    """(state dict, whether OpenAI's) of a file of safetensors, of torch.save (plain, nested in
    "state_dict", prefixed by "module."), or of TorchScript, which OpenAI's own are. No code in it
    is run: torch.jit.load would compile the archive's, so its tensors are read past it."""
    scripted = zipfile.is_zipfile(path) and any(
        name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()
    )
    if path.endswith(".safetensors"):
        weights = load_file(path)
    elif scripted:
        weights = ArchiveReader(path).state_dict()
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = weights.get("state_dict", weights)
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    for name in "input_resolution", "context_length", "vocab_size":  # OpenAI's, no weights
        weights.pop(name, None)
    return weights, scripted


class ArchiveReader(pickle.Unpickler):
    """The tensors of a TorchScript archive. Every class that its pickle names becomes an empty
    Node, which holds the attributes and does nothing."""

    class Node:
        def __init__(self, *unused):
            pass

    def __init__(self, path):
        self.archive = zipfile.ZipFile(path)
        self.top = self.archive.namelist()[0].split("/")[0]
        super().__init__(io.BytesIO(self.archive.read(f"{self.top}/data.pkl")))

    def find_class(self, module, name):
        if name == "_rebuild_tensor_v2":
            return lambda data, start, size, stride, *unused: data.as_strided(size, stride, start)
        return getattr(torch, name).dtype if name.endswith("Storage") else self.Node

    def persistent_load(self, saved):
        _, dtype, key, _, _ = saved  # "storage", dtype, file, device, length
        content = self.archive.read(f"{self.top}/data/{key}")
        return torch.frombuffer(bytearray(content), dtype=dtype)

    def state_dict(self, node=None, prefix=""):
        """{name: tensor}, without the causal masks, which the model makes itself."""
        found = {}
        for name, value in vars(node or self.load()).items():
            if isinstance(value, self.Node):
                found |= self.state_dict(value, f"{prefix}{name}.")
            elif isinstance(value, torch.Tensor) and name != "attn_mask":
                found[prefix + name] = value
        return found


class Layout:
    """Where the own tokens of K classes stand: in one list of n tokens for all but attention, and
    padded to K rows of S places for attention. Made on the host.

    token (n,): the place, among K * S, of each token of the list; padded (K * S,): the token of the
    list at each place, and where none stands the class's EOT; last (K,): each EOT in the list; mask
    (S, P + S): where a token may look, at all of its prefix and at its class's tokens up to itself.
    """

    def __init__(self, lengths, P, S, device):
        """lengths (K,), on the host: how many own tokens each class has, its EOT included; P: how
        many tokens of its prefix stand before them."""
        place, after = torch.arange(S), lengths.cumsum(0)
        first, last = (after - lengths)[:, None], (after - 1)[:, None]
        filled = place < lengths[:, None]  # (K, S)
        self.token = to_device(filled.flatten().nonzero()[:, 0], device)
        self.padded = to_device((first + place).minimum(last).flatten(), device)
        self.last = to_device(last[:, 0], device)
        causal = torch.ones(S, P + S, dtype=torch.bool).tril(P)
        self.mask = to_device(causal, device)


def encode_text(clip, prefix, suffix, eot, group=None, layout=None):
    """(K, D) fp32 features of the sequences prefix[group[k]] + suffix[k], read at their EOT.

    Equals clip.encode_text of the same tokens, for less work, because the tower is causal: a prefix
    cannot see the class behind it, so each of the G prefixes runs once; nothing behind an EOT
    reaches it, so a class's own tokens end there. Linear layers and norms see one list without
    padding: the G * P prefix tokens, then the n own tokens of all classes.

    prefix (G, P, d) and suffix (K, S, d): token embeddings, positions not yet added; eot (K,):
    place of the EOT in the whole; group (K,): each class's prefix, None where there is one for all;
    layout: what Names has kept, else made of eot.
    """
    (G, P, _), S = prefix.shape, suffix.shape[1]
    layout = layout or Layout(eot.cpu() + 1 - P, P, S, clip.device)
    position = clip.positional_embedding
    own = (suffix + position[P : P + S]).flatten(0, 1).index_select(0, layout.token)
    with clip.autocast():
        x = torch.cat([(prefix + position[:P]).flatten(0, 1), own])  # (G * P + n, d)
        for block in clip.transformer.resblocks:
            x = x + block.ls_1(attend(block.attn, block.ln_1(x), G, P, group, layout))
            if block is clip.transformer.resblocks[-1]:
                x = x[G * P :].index_select(0, layout.last)  # (K, d): only the EOTs are read
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        return (clip.ln_final(x) @ clip.text_projection).float()


def attend(attn, x, G, P, group, layout):
    """A block's attention on encode_text's list x (G * P + n, d). Prefixes attend to themselves;
    each class's tokens to its prefix's keys and values and to themselves. Padding stands behind the
    EOT, so the causal mask hides it from every token that is read."""
    K = len(layout.last)
    rows = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)  # (G * P + n, 3d)
    prefixes, rows = rows.split([G * P, len(rows) - G * P])
    q, past_k, past_v = heads(attn, prefixes.clone(), G)  # else backward keeps all of rows
    shared = F.scaled_dot_product_attention(q, past_k, past_v, is_causal=True)
    if group is None:
        past_k, past_v = past_k.expand(K, -1, -1, -1), past_v.expand(K, -1, -1, -1)
    else:
        past_k, past_v = past_k.index_select(0, group), past_v.index_select(0, group)
    q, k, v = heads(attn, rows.index_select(0, layout.padded), K)
    q = q.contiguous()  # else backward keeps all three
    k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)  # (K, heads, P + S, d / heads)
    own = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask)
    shared, own = (t.transpose(1, 2).flatten(2).flatten(0, 1) for t in (shared, own))
    return attn.out_proj(torch.cat([shared, own.index_select(0, layout.token)]))


def heads(attn, rows, count):
    """q, k, v (count, heads, length, d / heads) of the projected rows (..., 3d) of equal lists."""
    parts = rows.view(count, -1, 3, attn.num_heads, attn.head_dim)
    return parts.permute(2, 0, 3, 1, 4).unbind()


def attend_all(attn, x):
    """A block's attention, each of x (B, n, d) to all of its list: open_clip's, without the copies
    of q, k and v that nn.MultiheadAttention makes forward and the zeros that it fills backward."""
    q, k, v = heads(attn, F.linear(x, attn.in_proj_weight, attn.in_proj_bias), len(x))
    seen = F.scaled_dot_product_attention(q, k, v)
    return attn.out_proj(seen.transpose(1, 2).flatten(2))


def encode_image(clip, images, prompts=None, patches=False):
    """Image features, with prompt rows that one hook supplies.

    prompts(i, tokens) is asked before block i, and at i = -1 before ln_pre, and shown the image
    tokens (B, 1 + N, d). The rows that it returns, (P, d) or (B, P, d), replace the prompt rows,
    which stand behind the image tokens; None keeps those that the block before put out. images
    (B, 3, H, W), normalised. Returns fp32 features (B, D), with patches also theirs (B, N, D).
    """
    visual = clip.visual
    with clip.autocast():
        if not (prompts or patches or hasattr(visual, "transformer")):  # a ResNet
            return visual(images).float()
        blocks = clip.blocks()
        x = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, N, d)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        x, count = x + visual.positional_embedding, x.shape[1]

        def with_prompts(i, x):
            rows = prompts(i, x[:, :count]) if prompts else None
            if rows is None:
                return x
            return torch.cat([x[:, :count], rows.expand(len(x), -1, -1).to(x.dtype)], 1)

        x = visual.ln_pre(with_prompts(-1, x))
        for i, block in enumerate(blocks):
            x = with_prompts(i, x)
            x = x + block.ls_1(attend_all(block.attn, block.ln_1(x)))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        x = (visual.ln_post(x[:, :count]) @ visual.proj).float()  # without the prompt rows
    return (x[:, 0], x[:, 1:]) if patches else x[:, 0]


@torch.no_grad()
def unit_features(clip, images):
    """(B, D) unit features by the frozen image tower of normalised images (B, 3, H, W)."""
    return F.normalize(encode_image(clip, images), dim=-1)


# ------------------------------------------------------------------------------- 3 Prompts


@dataclasses.dataclass
class Names:
    """The tokens around a context in "[SOS] V ... V <name>." [EOT], for K class names.

    sos (1, 1, d), tail (K, S, d) from the name on: embeddings, on the device. eot (K,): place of
    the EOT in the whole, length (K,): tokens of the name, in the template "{}.", on the host.
    layouts, orders: those made so far.
    """

    sos: torch.Tensor
    tail: torch.Tensor
    eot: torch.Tensor
    length: torch.Tensor
    layouts: dict = dataclasses.field(default_factory=dict)
    orders: dict = dataclasses.field(default_factory=dict)

    def select(self, columns):
        """The Names of some classes; columns: their indices, on the host."""
        tail = self.tail.index_select(0, to_device(columns, self.tail.device))
        return Names(self.sos, tail, self.eot[columns], self.length[columns])

    def layout(self, P, S):
        """The Layout behind a prefix of P tokens, in rows of S places; made once."""
        if P not in self.layouts:
            self.layouts[P] = Layout(self.eot + 1 - P, P, S, self.tail.device)
        return self.layouts[P]

    def order(self, behind):
        """Index (K, behind + S, 1) that turns the first tokens left, so that `behind` vectors from
        before a name come to stand after it; made once."""
        if behind not in self.orders:
            place = torch.arange(behind + self.tail.shape[1])
            end = self.length[:, None] + behind  # of what turns; the rest stays
            order = torch.where(place < end, (place + behind) % end, place)
            self.orders[behind] = to_device(order[..., None], self.tail.device)
        return self.orders[behind]


def embed_names(clip, names, n_ctx, template="{}."):
    """The Names of class names in a template, with room for n_ctx context vectors before it.
    Raises Error for a name that is too long for the text tower."""
    texts = []
    for name in names:
        texts.append("X " * n_ctx + template.format(name.replace("_", " ")))
        if len(clip.tokenize.encode(texts[-1])) + 2 > clip.context_length:
            raise Error(f"class name {name[:60]!r} is too long for {clip.context_length} tokens")
    ids = clip.tokenize(texts)  # (K, 77); the EOT has the largest id
    eot = ids.argmax(1)
    x = clip.token_embedding(to_device(ids[:, : eot.max() + 1].contiguous(), clip.device))
    # The name is all but [SOS], context, "." and EOT. It is counted in the sentence, because a "."
    # may merge with its end.
    return Names(x[:1, :1], x[:, 1 + n_ctx :], eot, eot - n_ctx - 2)


def encode_prompts(clip, names, ctx, group=None, position="end"):
    """(K, D) features of the prompts [SOS] V <name>. [EOT] (official trainers/coop.py).

    names: with room for M vectors; ctx (G, M, d): contexts; group (K,): each class's, which may
    be None where there is one; position of the name: "end" of V, "front" of it, or its "middle".
    """
    M, suffix = ctx.shape[1], names.tail
    group = None if len(ctx) == 1 else group  # one context serves all
    behind = {"end": 0, "middle": M - M // 2, "front": M}[position]  # vectors after the name
    before, after = ctx[:, : M - behind], ctx[:, M - behind :]
    prefix = torch.cat([names.sos.expand(len(ctx), -1, -1), before], 1)
    if behind:
        after = after.expand(len(suffix), -1, -1) if group is None else after.index_select(0, group)
        suffix = torch.cat([after, suffix], 1)  # V V NAME NAME . EOT
        suffix = suffix.take_along_dim(names.order(behind), 1)  # NAME NAME V V . EOT
    layout = names.layout(prefix.shape[1], suffix.shape[1])
    return encode_text(clip, prefix, suffix, names.eot, group, layout)


@torch.no_grad()
def zero_shot_weights(clip, dataset, templates=None):
    """(K, T, D) unit text features of each class in T templates; None: in the data set's own."""
    features = []
    for template in templates or [dataset.template]:
        names = embed_names(clip, dataset.classnames, 0, template)
        features.append(encode_prompts(clip, names, names.sos[:, :0]))
    return F.normalize(torch.stack(features, 1), dim=-1)


# ---------------------------------------------------------------------------------- 4 Data


class Benchmark(NamedTuple):
    """Where a benchmark lies below --data, in CoOp's layout; the Name of its split_zhou_Name.json;
    CoOp's template (CUSTOM_TEMPLATES in trainers/zsclip.py)."""

    folder: str
    images: str
    split: str = ""
    template: str = "a photo of a {}."


SEVEN = [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]  # CoOp's ensemble
PARTS = "train", "val", "test"
IMAGES = tuple(".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm".split())
TYPE, SATELLITE = "a photo of a {}, a type of %s.", "a centered satellite photo of {}."
FOOD, ACTION = "a photo of {}, a type of food.", "a photo of a person doing {}."
BENCHMARKS = {
    "imagenet": Benchmark("imagenet", "images"),
    "caltech101": Benchmark("caltech-101", "101_ObjectCategories", "Caltech101"),
    "dtd": Benchmark("dtd", "images", "DescribableTextures", "{} texture."),
    "eurosat": Benchmark("eurosat", "2750", "EuroSAT", SATELLITE),
    "fgvc_aircraft": Benchmark("fgvc_aircraft", "images", "", TYPE % "aircraft"),
    "food101": Benchmark("food-101", "images", "Food101", FOOD),
    "oxford_flowers": Benchmark("oxford_flowers", "jpg", "OxfordFlowers", TYPE % "flower"),
    "oxford_pets": Benchmark("oxford_pets", "images", "OxfordPets", TYPE % "pet"),
    "stanford_cars": Benchmark("stanford_cars", "", "StanfordCars"),
    "sun397": Benchmark("sun397", "SUN397", "SUN397"),
    "ucf101": Benchmark("ucf101", "UCF-101-midframes", "UCF101", ACTION),
    "imagenetv2": Benchmark("imagenetv2", "imagenetv2-matched-frequency-format-val"),
    "imagenet_sketch": Benchmark("imagenet-sketch", "images"),
    "imagenet_a": Benchmark("imagenet-adversarial", "imagenet-a"),
    "imagenet_r": Benchmark("imagenet-rendition", "imagenet-r"),
}


class Dataset(NamedTuple):
    """Items (picture, label, class name), a picture being a path or a uint8 tensor (3, H, W)."""

    name: str
    train: list
    val: list
    test: list
    classnames: list
    template: str = "a photo of a {}."
    crop: tuple = (0.08, 1.0)  # share of the area that a training view shows
    new: "Dataset | None" = None  # with --classes base, the other half of the classes


def few_shot(cfg, data=None):
    """The picks of cfg from data, or from cfg's own Dataset; with --classes base the first half of
    the classes, the second in .new. Raises Error."""
    data = sample_few_shot(data or load_dataset(cfg.dataset, cfg.data), cfg.shots, cfg.seed)
    if cfg.classes == "base":
        return subset_classes(data, "base")._replace(new=subset_classes(data, "new"))
    return data


def load_dataset(name, root="data"):
    """The Dataset of a benchmark, a drawn data set, or a folder of class folders, by name. Only
    lists are read: a missing picture is named when it is opened. Raises Error."""
    world = drawn_world()
    tasks = world.TASKS if world else {}
    if name in BENCHMARKS:
        return from_benchmark(name, Path(root))
    if name in tasks:
        data = from_class_folders(name, world.write(Path(root), name))
        return data._replace(template=tasks[name].template, crop=world.CROP)
    if name and Path(name).is_dir():
        return from_class_folders(name, Path(name))
    known = [*BENCHMARKS, *tasks]
    near = difflib.get_close_matches(name, known, 4, 0.4) or known
    raise Error(f"no data set or folder {name!r}; there is {', '.join(near)}")


def from_benchmark(name, root):
    """A benchmark, by the reader of its format."""
    folder, images, split, template = BENCHMARKS[name]
    folder = root / folder
    images = folder / images
    try:
        if not images.is_dir():
            raise OSError(f"no folder {images}")
        if split:
            parts = from_split_file(folder / f"split_zhou_{split}.json", images)
        elif name == "fgvc_aircraft":
            parts = from_aircraft_lists(folder, images)
        else:
            parts = from_wordnet_folders(name, images)
    except (OSError, ValueError, TypeError, LookupError) as problem:
        raise Error(f"{name}: {problem}; python common.py download {name} gets it") from None
    return checked(name, parts, folder)._replace(template=template)


def from_split_file(split, images):
    """{"train": [["Faces/image_0274.jpg", 0, "face"], ...], "val": ..., "test": ...}: paths below
    the folder images, labels, class names."""
    lists = json.loads(split.read_text("utf-8"))
    return [[(f"{images}/{path}", int(y), str(c)) for path, y, c in lists[part]] for part in PARTS]


def from_aircraft_lists(folder, images):
    """variants.txt: the classes in order; images_variant_{train,val,test}.txt: lines as
    "1025794 707-320", an image and its variant."""
    variants = (folder / "variants.txt").read_text("utf-8").splitlines()
    parts = []
    for part in PARTS:
        lines = (folder / f"images_variant_{part}.txt").read_text("utf-8").splitlines()
        pairs = [line.split(" ", 1) for line in lines]
        parts.append([(f"{images}/{i}.jpg", variants.index(v), v) for i, v in pairs])
    return parts


def from_wordnet_folders(name, images):
    """ImageNet: train/ and val/ of folders n01440764/ ...; its variants: such folders alone, of
    ImageNetV2 0/ ... 999/. Labels count the folders present. Files are sorted: CoOp's listing was
    not, so that its picks depended on the file system."""
    keys = [*map(str, range(1000))] if name == "imagenetv2" else ImageNetInfo().label_names()
    titles = dict(zip(keys, open_clip.IMAGENET_CLASSNAMES, strict=True))
    test = images / "val" if name == "imagenet" else images
    present = [key for key in keys if (test / key).is_dir()]
    train = class_items(images / "train", present, titles) if name == "imagenet" else []
    return train, [], class_items(test, present, titles)


def from_class_folders(name, folder):
    """train/, test/ and, if you like, val/ of class folders; or class folders alone, which are
    split 50/20/30 per class, always alike."""
    if (folder / "train").is_dir():
        names = sorted({c for part in PARTS for c in listed(folder / part, Path.is_dir)})
        return checked(name, [class_items(folder / part, names) for part in PARTS], folder, names)
    train, val, test = [], [], []
    names = listed(folder, Path.is_dir)
    for group in by_class(class_items(folder, names)):
        random.Random(0).shuffle(group)
        half, most = round(0.5 * len(group)), round(0.7 * len(group))
        train += group[:half]
        val += group[half:most]
        test += group[most:]
    return checked(name, [train, val, test], folder, names)


def class_items(folder, keys, titles=None):
    """The items of class folders, labelled in the order of keys; titles: {folder: class name}."""
    items = []
    for label, key in enumerate(keys):
        title = titles[key] if titles else key
        files = listed(folder / key, lambda path: path.suffix.lower() in IMAGES)
        items += [(f"{folder}/{key}/{file}", label, title) for file in files]
    return items


def listed(folder, wanted):
    """Sorted names of what is wanted(path) in a folder, hidden ones left out."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [name for name in names if not name.startswith(".") and wanted(folder / name)]


def by_class(items):
    """Lists of the items of each class, in order of their first appearance."""
    groups = defaultdict(list)
    for item in items:
        groups[item[1]].append(item)
    return list(groups.values())


def checked(name, parts, source, titles=()):
    """The Dataset of lists train, val, test; titles: all classes, where the lists might lack one.
    Raises Error for a class without images."""
    train, val, test = parts
    names = dict(enumerate(titles)) or {label: c for _, label, c in [*test, *val, *train]}
    for kind, items in ("training", train or test), ("test", test):
        missing = set(range(max(2, len(names)))) - {label for _, label, _ in items}
        if missing:
            c = names.get(min(missing), min(missing))
            raise Error(f"{source}: class {c!r}, of at least two, has no {kind} image")
    return Dataset(name, train, val, test, [names[label] for label in range(len(names))])


def sample_few_shot(dataset, shots, seed):
    """CoOp's few-shot picks (Dassl data/datasets/base_dataset.py): from train, then from val (at
    most 4 a class), by one stream of random numbers. All of a class that has too few, and of every
    class for 0 shots. The test set is never sampled."""
    stream = random.Random(seed)
    picks = {}
    for part, k in ("train", shots), ("val", min(shots, 4)):
        picks[part] = []
        for group in by_class(getattr(dataset, part)):
            picks[part] += stream.sample(group, k) if 0 < k <= len(group) else group
    return dataset._replace(**picks)


def subset_classes(dataset, half):
    """The "base" (first, larger) or "new" half of the classes, relabelled from 0 (CoOp
    datasets/oxford_pets.py, subsample_classes)."""
    names = dataset.classnames
    middle = math.ceil(len(names) / 2)
    start, end = (0, middle) if half == "base" else (middle, len(names))
    parts = {}
    for part in PARTS:
        items = getattr(dataset, part)
        parts[part] = [(picture, y - start, c) for picture, y, c in items if start <= y < end]
    return dataset._replace(classnames=names[start:end], **parts)


# ------------------------------------------------------------------------------ 5 Pictures

BICUBIC = InterpolationMode.BICUBIC
TEST_BATCH = 100  # images, as in Dassl
KEPT_BYTES = 4 * 2**30  # of decoded training pictures; the others are decoded in every epoch
AHEAD = 2  # batches on which threads work before they are asked for


def decode(picture):
    """(3, H, W) uint8 RGB of an image file, as PIL reads it; a tensor passes. Raises Error."""
    if isinstance(picture, torch.Tensor):
        if picture.dtype != torch.uint8 or picture.dim() != 3 or len(picture) != 3:
            kind = f"{picture.dtype} {tuple(picture.shape)}"
            raise Error(f"a picture is a path or a uint8 tensor (3, H, W), not {kind}")
        return picture
    try:
        with Image.open(picture) as image:
            if image.mode.startswith("I"):  # 16 bit, which convert() would clip to white
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            return vision.pil_to_tensor(image.convert("RGB"))
    except Exception as problem:  # PIL raises many kinds
        raise Error(f"cannot read image {picture}: {problem}") from None


def views(clip, pictures, boxes=None, mirror=None):
    """(B, 3, side, side) normalised views of uint8 pictures, resized as by PIL: of boxes (top,
    left, height, width), mirrored where mirror says; without boxes the centred test views."""
    side, B = clip.image_size, len(pictures)
    cuts = zip(pictures, boxes or [None] * B, mirror or [False] * B, strict=True)
    return normalised(clip, [view(picture, side, box, flip) for picture, box, flip in cuts])


def view(picture, side, box=None, flip=False):
    """uint8 (3, side, side), by PIL: the box resized, mirrored or not; without a box the central
    square of the picture with its shorter edge resized."""
    image = vision.to_pil_image(picture)
    if box is None:
        image = vision.center_crop(vision.resize(image, [side], BICUBIC), [side])
    else:
        image = vision.resized_crop(image, *box, [side, side], BICUBIC)
    square = vision.pil_to_tensor(image)
    return square.flip(-1) if flip else square


def random_box(height, width, crop, generator):
    """(top, left, height, width) of a random share of the area, within crop, at an aspect ratio
    within 3/4 and 4/3: torchvision's RandomResizedCrop, number by number, which takes its numbers
    from one global generator, as threads must not."""

    def uniform(low, high):
        return torch.empty(()).uniform_(low, high, generator=generator).item()

    for _ in range(10):
        area = height * width * uniform(*crop)
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(height - h + 1, (), generator=generator).item()
            return top, torch.randint(width - w + 1, (), generator=generator).item(), h, w
    h, w = min(height, round(width / (3 / 4))), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w  # of a very long picture the centre


def normalised(clip, views):
    """uint8 views on the host -> one batch on the device, normalised as CLIP wants it."""
    return (to_device(torch.stack(views), clip.device) / 255 - clip.mean) / clip.std


def to_device(x, device):
    """Copies without a wait of the host, which on CUDA takes pinned memory."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def ahead(pool, function, groups):
    """Yields [function(item) for item in group] of each group, on which the threads of pool work
    before it is asked for."""
    pending = deque()
    for group in groups:
        pending.append([pool.submit(function, item) for item in group])
        if len(pending) > AHEAD:
            yield [future.result() for future in pending.popleft()]
    for futures in pending:
        yield [future.result() for future in futures]


class Loader:
    """Batches of the training pictures: decoded once, while KEPT_BYTES last; cropped and mirrored
    anew for every epoch (CoOp's transforms) by threads. A view depends on (seed, epoch, picture)
    alone, the order on (seed, epoch), so that an epoch repeats itself after a kill."""

    def __init__(self, cfg, clip, data):
        """Raises Error where data has no training pictures."""
        if not data.train:
            raise Error(f"{data.name} has no training images; evaluate on it with --transfer")
        self.clip, self.data, self.seed, self.batch_size = clip, data, cfg.seed, cfg.batch_size
        self.labels = torch.tensor([label for _, label, _ in data.train])
        self.pool, self.kept, self.room = ThreadPoolExecutor(cfg.workers), {}, KEPT_BYTES

    def order(self, epoch):
        """The epoch's batches, as lists of picture numbers. As in Dassl, a last batch that is not
        full is dropped, unless it is the only one."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        order = torch.randperm(len(self.labels), generator=generator)
        batches = [batch.tolist() for batch in order.split(self.batch_size)]
        return [batch for batch in batches if len(batch) == len(batches[0])]

    def epoch(self, epoch):
        """Yields images (B, 3, side, side) and labels (B,), on the device."""
        batches = self.order(epoch)
        augmented = ahead(self.pool, lambda i: self.view(epoch, i), batches)
        for batch, views in zip(batches, augmented, strict=True):
            yield normalised(self.clip, views), to_device(self.labels[batch], self.clip.device)

    def view(self, epoch, i):
        """Picture i as this epoch shows it, uint8 (3, side, side)."""
        picture = self.picture(i)
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, i))
        box = random_box(*picture.shape[1:], self.data.crop, generator)
        flip = torch.rand((), generator=generator) < 0.5
        return view(picture, self.clip.image_size, box, flip)

    def picture(self, i):
        """Picture i, decoded; kept for the next epoch while there is room."""
        if i in self.kept:
            return self.kept[i]
        picture = decode(self.data.train[i][0])
        self.room -= picture.numel()
        if self.room > 0:
            self.kept[i] = picture
        return picture


# ------------------------------------------------------------------------------ 6 Training


class Optimizer:
    """SGD, momentum .9, weight decay 5e-4, on a cosine with warm-up (Dassl optim/lr_scheduler.py).

    After k epochs the rate is 1e-5 while k < warmup, then lr/2 (1 + cos(pi (k - warmup) / epochs)),
    never 0; with repeat, k counts the schedule's steps, and the rate can touch 0 and rise again.
    groups: parameters, or dicts {"params", "lr", "warmup"}. Where CLIP runs in fp16,
    GradScaler scales the loss, and SGD, one fused kernel, skips a step whose gradients overflow,
    without a wait of the host. repeat: steps per gradient and epoch, 1 but for SoftCPT's release.
    """

    def __init__(self, cfg, clip, groups, epochs, repeat=1):
        self.epochs, self.repeat, self.losses = epochs, repeat, []
        self.sgd = torch.optim.SGD(groups, cfg.lr, momentum=0.9, weight_decay=5e-4, fused=True)
        self.scaler = torch.amp.GradScaler(clip.device.type, enabled=clip.half is torch.float16)
        for group in self.sgd.param_groups:  # kept with SGD's own state
            group.update(top=group["lr"], k=0, warmup=group.get("warmup", 1))
            for p in group["params"]:  # else undefined where the first step is skipped
                self.sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.schedule(0)

    def schedule(self, steps):
        """Sets each group's rate after `steps` more steps of the schedule."""
        for group in self.sgd.param_groups:
            group["k"] += steps
            k = group["k"] - group["warmup"]
            cosine = (1 + math.cos(math.pi * k / self.epochs)) / 2
            group["lr"] = group["top"] * cosine if k >= 0 else 1e-5

    def step(self, loss):
        """Backward and one step of SGD, or `repeat` of them with the same gradient."""
        self.losses.append(loss.detach())
        self.sgd.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.sgd)
        self.scaler.step(self.sgd)
        self.scaler.update()
        for _ in range(self.repeat - 1):
            for p in self.sgd.param_groups[0]["params"]:
                p.grad.nan_to_num_(0, 0, 0)  # where fp16 has overflowed
            self.sgd.step()

    def end_epoch(self):
        """Sets the next rates; returns the mean loss, for which alone the host waits. Raises
        Error if it is not finite, in fp16 once the loss's scale cannot be lowered any more."""
        self.schedule(self.repeat)
        loss = torch.stack(self.losses).mean().item()
        self.losses.clear()
        if not math.isfinite(loss) and self.scaler.get_scale() <= 1:
            raise Error(f"the loss is {loss}: lower --lr, or try --precision fp32")
        return loss

    def state_dict(self):
        return {"sgd": self.sgd.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        self.sgd.load_state_dict(state["sgd"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def resumed(cfg, clip, data, prompt, optimizer):
    """Yields the epochs still to be trained, and keeps what they learn in the run's folder.

    After each, checkpoint.pt, from which the same command goes on after a kill; torch is seeded
    anew for every epoch, so that on a CPU it ends with the same numbers. After the last,
    prompt.safetensors: the learnables and what they belong to. Where that exists it is loaded into
    prompt and no epoch is left. data: the Dataset, or a list of them. Raises Error where these are
    not the pictures, labels, class names or CLIP that the run began with.
    """
    folder, sets = run_folder(cfg), data if isinstance(data, list) else [data]
    final, part = folder / "prompt.safetensors", folder / "checkpoint.pt"
    about = {
        "method": method(cfg),
        "fingerprint": clip.fingerprint,
        "pictures": digest([item for d in sets for item in d.train]),
        "classnames": {d.name: d.classnames for d in sets},
        "templates": {d.name: d.template for d in sets},
        "config": vars(cfg),
    }
    if cfg.force and not cfg.load:
        shutil.rmtree(folder, ignore_errors=True)
    if cfg.load or final.exists():
        tensors, saved = read_prompt(folder)
        restore(folder, saved, about, prompt, tensors)
        return
    state = {"epoch": 0, "seconds": 0.0, "about": json.dumps(about)}
    if part.exists():
        state = read_checkpoint(part)
        restore(folder, json.loads(state["about"]), about, prompt, state["prompt"])
        optimizer.load_state_dict(state["optimizer"])
    write(folder / "config.json", json.dumps(vars(cfg), indent=1).encode())
    bar = tqdm(range(state["epoch"], optimizer.epochs), str(folder), initial=state["epoch"])
    for epoch in bar:
        torch.manual_seed(seed_of(cfg.seed, epoch))  # for dropout
        start = time.time()
        yield epoch
        bar.set_postfix(loss=optimizer.end_epoch())
        state.update(prompt=prompt.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch + 1)
        state["seconds"] += time.time() - start
        content = io.BytesIO()
        torch.save(state, content)
        write(part, content.getvalue())
    about["train_seconds"] = state["seconds"]
    tensors = {name: tensor.cpu() for name, tensor in prompt.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise Error(f"the last step of {folder} diverged: lower --lr, and --force")
    write(final, save(tensors, {"about": json.dumps(about)}))
    part.unlink(missing_ok=True)


def read_checkpoint(path):
    """What resumed kept of a run that is not finished. Raises Error."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises many kinds
        raise Error(f"{path} is damaged ({problem}); delete it, or --force trains anew") from None


def restore(folder, saved, about, prompt, tensors):
    """Loads tensors into prompt. Raises Error where they belong to another method, CLIP or training
    set, or do not fit."""
    for key, what in {
        "method": "by another method",
        "fingerprint": "with another CLIP (--model, --pretrained)",
        "pictures": "on other pictures, labels or class names",
    }.items():
        if saved[key] != about[key]:
            raise Error(f"{folder} was trained {what}; --force trains anew")
    try:
        prompt.load_state_dict(tensors)
    except RuntimeError as problem:
        raise Error(f"{folder} does not fit these options: {problem}") from None


def read_prompt(folder):
    """(tensors, what they belong to) of a finished run's prompt.safetensors. Raises Error."""
    path = Path(folder, "prompt.safetensors")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        tensors = load_file(path)
        if not all(x.dtype == torch.float32 and x.isfinite().all() for x in tensors.values()):
            raise Error("its tensors are not finite fp32 numbers")
        if not {"method", "fingerprint", "pictures", "train_seconds"} <= about.keys():
            raise Error("it does not tell what it was trained on")
        return tensors, about
    except Exception as problem:  # safetensors raises kinds of its own
        raise Error(f"{path} is no prompt of a finished run: {problem}") from None


def digest(items):
    """Hash of the items' pictures (of every byte), labels and class names, in order."""
    total = hashlib.sha256()
    for picture, *label in items:
        is_tensor = isinstance(picture, torch.Tensor)
        content = picture.numpy().tobytes() if is_tensor else Path(picture).read_bytes()
        total.update(f"{len(content)} {label}".encode() + content)
    return total.hexdigest()[:32]


# ---------------------------------------------------------------------------- 7 Evaluation

OVERALL = "accuracy", "zero_shot"  # keys of a row: of the classifier, of zero-shot CLIP
MEAN_CLASS = "mean_class_accuracy", "zero_shot_mean_class"


def evaluate(cfg, clip, data, classifier, per_class=()):
    """Evaluates on the test set of every label set asked for, records it in results.json, prints
    the result and returns the accuracy in percent: the mean over the tasks, if halved of "base".

    data: the Dataset trained on, or a list of them. classifier(dataset) returns unit text features
    w (K, D), where the features f (B, D) of CLIP's own image tower decide; where they do not, a
    function of normalised images (B, 3, H, W) and f that gives logits (B, K).
    per_class: names of the tasks that count by the mean over their classes' accuracies.
    """
    tasks = data if isinstance(data, list) else [data]
    targets = [(task, cfg.classes) for task in tasks]
    targets += [(task.new, "new") for task in tasks if task.new]
    scores = defaultdict(list)  # of each half: (accuracy, zero-shot) per task
    for target, half in targets:
        row = recorded(cfg, clip, target, half, classifier)
        keys = MEAN_CLASS if target.name in per_class else OVERALL
        scores[half].append([row[key] for key in keys])
    for name in filter(None, cfg.transfer.split(",")):
        row = recorded(cfg, clip, load_dataset(name, cfg.data), "all", classifier)
        print(f"  on {name}: {row['accuracy']:.2f} (zero-shot {row['zero_shot']:.2f})")
    means = np.array([np.mean(pairs, 0) for pairs in scores.values()])  # (1 or 2 halves, 2)
    ours, zero_shot, seconds = summary(means[:, 0]), summary(means[:, 1]), row["train_seconds"]
    print(f"in {run_folder(cfg)}")
    result = f"{ours} (zero-shot {zero_shot}), {seconds:.0f} s"
    print(f"{cfg.dataset} {cfg.shots} shots seed {cfg.seed}: {result}", flush=True)
    return float(means[0, 0])


def summary(values):
    """One accuracy, or those of base and new classes with their harmonic mean, as text."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    base, new = values
    return f"base {base:.2f}, new {new:.2f}, H {2 * base * new / max(base + new, 1e-9):.2f}"


def recorded(cfg, clip, target, half, classifier):
    """The row of results.json for one label set. It is computed, unless it is there already for the
    same prompt, CLIP, precision, class names and test pictures."""
    folder = run_folder(cfg)
    path, trained = folder / "results.json", {"train_seconds": 0.0}
    if (folder / "prompt.safetensors").exists():
        trained = read_prompt(folder)[1]
    options = [(name, value) for name, value in vars(cfg).items() if name not in NOT_LEARNED]
    names = [target.name, half, target.classnames, target.template]
    stamp = repr([trained, options, clip.fingerprint, clip.half, names, digest(target.test)])
    stamp = hashlib.sha256(stamp.encode()).hexdigest()
    if stamp in (rows := read_rows(path)) and not cfg.force:
        return rows[stamp]
    row = {"official": False, **vars(cfg), "config": vars(cfg), "method": method(cfg)}
    row |= {"evaluated_on": target.name, "classes": half, "n_test": len(target.test)}
    row |= measured(cfg, clip, target, classifier)
    row |= {"train_seconds": trained["train_seconds"], "precision": str(clip.half or "fp32")}
    row |= {"device": str(clip.device), "torch": torch.__version__, "commit": commit()}
    row |= {"open_clip": open_clip.__version__, "time": time.ctime(), "stamp": stamp}
    others = read_rows(path).values()  # anew: meanwhile another process may have added some
    others = [r for r in others if (r["evaluated_on"], r["classes"]) != (target.name, half)]
    write(path, json.dumps([*others, row], indent=1).encode())
    return row


def read_rows(path):
    """{stamp: row} of a results.json, nothing where there is none. Raises Error."""
    try:
        rows = json.loads(path.read_text("utf-8")) if path.exists() else []
        return {row["stamp"]: row for row in rows}
    except (ValueError, TypeError, LookupError) as problem:
        raise Error(f"{path} holds no results ({problem}); move it away") from None


@torch.no_grad()
def measured(cfg, clip, target, classifier):
    """Accuracies in percent of a classifier and of zero-shot CLIP, and the two variances of UPT's
    study (Fig. 1 d, e): of unit image features within a class, of unit text features between."""
    start, predict = time.time(), classifier(target)
    pictures = [picture for picture, _, _ in target.test]
    batches = [pictures[i : i + TEST_BATCH] for i in range(0, len(pictures), TEST_BATCH)]
    pool, features, logits = ThreadPoolExecutor(cfg.workers), [], []
    ready = ahead(pool, lambda picture: view(decode(picture), clip.image_size), batches)
    for batch in tqdm(ready, "test images", len(batches), leave=False):
        x = normalised(clip, batch)
        f = unit_features(clip, x)
        features.append(f)
        logits.append(predict(x, f) if callable(predict) else f @ predict.T)
    f, w = torch.cat(features), zero_shot_weights(clip, target)[:, 0]
    y = to_device(torch.tensor([label for _, label, _ in target.test]), clip.device)
    member = F.one_hot(y).double()  # (n, K)
    row = {}
    ours_and_zero_shot = torch.cat(logits), f @ w.T
    for scores, overall, mean_class in zip(ours_and_zero_shot, OVERALL, MEAN_CLASS, strict=True):
        right = 100 * (scores.argmax(1) == y).double()
        row[overall] = right.mean().item()
        row[mean_class] = (right @ member / member.sum(0)).mean().item()
    centre = (member.T @ f.double() / member.sum(0)[:, None])[y]  # (n, D)
    row["intra_class_variance"] = (f - centre).square().sum(1).mean().item()
    row["inter_class_variance"] = (w - w.mean(0)).square().sum(1).mean().item()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return row | {"eval_seconds": time.time() - start, "peak_gpu_mb": peak / 2**20}


def commit():
    """The repository's commit, "" where there is none."""
    with contextlib.suppress(OSError):
        command = ["git", "rev-parse", "--short", "HEAD"]
        folder = Path(__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip()
    return ""


@dataclasses.dataclass
class ZeroShot(Config):
    shots: int = 0  # nothing is trained
    ensemble: bool = False  # the mean over CoOp's seven templates and the data set's own


def zero_shot(cfg):
    """Zero-shot CLIP, the smallest method (CoOp trainers/zsclip.py)."""
    data = few_shot(cfg)
    clip = load_clip(cfg)

    def classifier(dataset):
        templates = [dataset.template, *(SEVEN if cfg.ensemble else ())]
        return F.normalize(zero_shot_weights(clip, dataset, templates).mean(1), dim=-1)

    return evaluate(cfg, clip, data, classifier)


TOOLS = {
    "predict": "ask.predict",
    "interpret": "ask.interpret",
    "report": "report.main",
    "download": "download.main",
    "benchmark": "benchmark.main",
    "shapes": "shapes.main",
}


def main(name="", *argv):
    """A tool by its name, else zero-shot CLIP."""
    if name in TOOLS:
        module, function = TOOLS[name].split(".")
        tool = importlib.import_module(f"tests.tools.{module}")
        script(lambda: getattr(tool, function)(list(argv)))
    else:
        script(lambda: zero_shot(cli(ZeroShot)))


if __name__ == "__main__":
    import common  # the module that the tools import, not this second copy of it

    common.main(*sys.argv[1:])
