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
from safetensors.torch import load, save
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

    epochs: int = 0  # 0 = the method's schedule
    batch_size: int = 32  # images per step
    lr: float = 2e-3  # of SGD, on a cosine
    dataset: str = "shapes"  # a benchmark's name, or a folder of yours
    shots: int = 16  # training images per class; 0 = all
    seed: int = 1  # of the picks, the start, the order and the views
    classes: Literal["all", "base"] = "all"  # base: train on the first half, test on each half
    transfer: str = ""  # comma list of further data sets to evaluate the trained prompt on
    load: str = ""  # folder of a finished run: evaluate it, train nothing
    model: str = ""  # open_clip name, local-dir:DIR, hf-hub:NAME; "" = the method's, or shapes' own
    pretrained: str = "openai"  # tag or file (TorchScript: OpenAI's, QuickGELU); "" = random
    precision: Literal["", "amp", "bf16", "fp32"] = ""  # "" = amp on CUDA, else fp32
    device: str = ""  # "" = cuda where there is one, else cpu
    data: str = "data"  # folder of the data sets
    out: str = "runs"  # folder of everything written
    workers: int = 8  # threads that decode and augment images
    force: bool = False  # delete the run and train anew

    # What --model "" stands for
    usual_model: ClassVar[str] = "ViT-B-16"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and not fits(field, value):  # a default may be -1
                known = "see --help; numbers go from 0 (batch_size, workers: from 1) to 2^31"
                raise Error(f"--{field.name} cannot be {value!r}: {known}")


def fits(field, value):
    """Whether value is of a Config field's type and, if a number, neither negative nor huge."""
    if get_args(field.type):
        return value in get_args(field.type)
    if field.type in (int, float):
        least = 1 if field.name in ("batch_size", "workers") else 0
        return isinstance(value, (int, field.type)) and least <= value < 2**31
    return isinstance(value, (str, Path) if field.type is str else field.type)


NOT_LEARNED = "transfer load device data out workers force".split()  # not in a run's name


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are Errors."""

    def error(self, message):
        raise Error(f"{message}; --help lists every option")


def cli(cls, argv=None):
    """The Config class cls, filled from the command line; with --load RUN, by the options that RUN
    was trained with, but for those typed. Raises Error."""
    parser = Parser(
        description=sys.modules[cls.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not typed stays out of `typed`
    )
    own, shared = comments(cls), comments(Config)
    fields = cls.__dataclass_fields__
    for name, note in (own | shared | own).items():  # own options first, and with their own note
        field = fields[name]
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_args(field.type):
            kind = {"choices": get_args(field.type)}
        parser.add_argument(f"--{name}", help=f"{note} [{field.default}]", **kind)
    typed = vars(parser.parse_args(argv))
    trained = {}
    if typed.get("load"):
        config = read_prompt(typed["load"])[1]["config"]
        trained = {name: value for name, value in config.items() if name not in NOT_LEARNED}
        for name in trained.keys() & typed.keys() - {"model", "pretrained", "precision"}:
            if typed[name] != trained[name]:
                raise Error(f"--load {typed['load']}: it was trained with --{name} {trained[name]}")
    try:
        return cls(**trained | typed)
    except (TypeError, Error) as problem:
        raise Error(f"--load {typed['load']}: {problem}" if trained else problem) from None


def comments(cls):
    """{field: the comment behind it} of a dataclass."""
    return dict(re.findall(r"^ +(\w+): .*?  # (.+)$", inspect.getsource(cls), re.M))


def script(main):
    """Runs main(). Bad input, a full memory or an interrupt end in one line and exit code 2."""
    logging.disable()  # the hub's forty lines of retries, which the one line sums up
    warnings.simplefilter("ignore")
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed by the shell
    try:
        return main()
    except (Error, OSError) as problem:
        line = str(problem)
    except (RuntimeError, MemoryError) as problem:
        full = isinstance(problem, (torch.OutOfMemoryError, MemoryError))
        if not full and "allocate memory" not in str(problem):  # of a CPU
            raise
        line = "the memory is full; lower --batch_size, or take a smaller --model"
    except KeyboardInterrupt:
        line = "interrupted; the same command goes on after the last whole epoch"
    say(f"error: {line}", sys.stderr)
    raise SystemExit(2)


def say(line, file=None):
    """Prints one line, whatever a file's name may hold: what cannot be shown is escaped."""
    encoding = getattr(file or sys.stdout, "encoding", None) or "ascii"
    line = printable(line).encode(encoding, "backslashreplace").decode(encoding)
    print(line, file=file, flush=True)


def printable(text):
    """text, with what cannot be printed, as a line's end, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def method(cfg):
    """The name of the script that cfg belongs to."""
    return Path(inspect.getfile(type(cfg))).stem.replace("common", "zero_shot")


def run_folder(cfg):
    """runs/<method>/<dataset>/<name>: the name holds every option that changes what is learned."""
    if cfg.load:
        return Path(cfg.load)
    name = f"{cfg.shots}shots_seed{cfg.seed}"
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default and field.name not in (*NOT_LEARNED, "dataset", "shots", "seed"):
            name += f"_{field.name}={value}"
    return Path(cfg.out, method(cfg), file_name(cfg.dataset), file_name(name))


def file_name(text):
    """text as a name that every disk takes, a name of its own for every text."""
    name = urllib.parse.quote(text, safe="=, ", errors="surrogatepass")
    if len(name) < 200 and name.strip("."):  # neither too long nor a folder above
        return name
    return name[:150] + hashlib.sha256(name.encode()).hexdigest()[:16]


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
        if colours.shape != (2, 3) or not colours.isfinite().all() or not (colours[1] > 0).all():
            raise Error(f"image mean and std are {colours.tolist()}, not three numbers each")
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise Error("its weights are not finite numbers")
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
    """Hash of a model's weights, kinds of layers (its activation among them), heads and colours."""
    layers = [[type(layer).__name__, getattr(layer, "num_heads", 0)] for layer in model.modules()]
    colours = model.visual.image_mean, model.visual.image_std
    total = hashlib.sha256(f"{layers} {colours}".encode())
    for name, tensor in model.state_dict().items():
        total.update(name.encode() + tensor.numpy().tobytes())
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
    try:
        torch.zeros(1, device=device).item()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)  # random weights are the same in every process
            built = build_model(model, pretrained)
        if not supported(built):
            raise Error("it is not of open_clip's class CLIP with OpenAI's towers")
        return Clip(built, open_clip.get_tokenizer(model), device, precision)
    except Exception as problem:  # open_clip, its hub and torch raise many kinds
        options = f"--model {model} --pretrained {pretrained} --device {device}"
        raise Error(f"{options}: {str(problem) or repr(problem)}") from None


def supported(model):
    """Whether the towers below compute what the model's own do: OpenAI's ViT or ResNet, read at the
    class token, and a causal text tower, read at the EOT, of open_clip's plain blocks."""
    towers = open_clip.transformer.VisionTransformer, open_clip.modified_resnet.ModifiedResNet
    custom = open_clip.transformer.CustomResidualAttentionBlock
    if type(model) is not open_clip.CLIP or not isinstance(model.visual, towers):
        return False
    if model.attn_mask is None or any(isinstance(module, custom) for module in model.modules()):
        return False
    text = getattr(model, "text_pool_type", "argmax"), type(model.text_projection)
    image = getattr(model.visual, "pool_type", "tok"), getattr(model.visual, "attn_pool", None)
    return text == ("argmax", torch.nn.Parameter) and image == ("tok", None)


def default_model(cfg):
    """The method's backbone; for a drawn data set its own tiny CLIP, on one thread, so that its
    numbers do not depend on the machine's cores and load."""
    world = drawn_world()
    if not world or cfg.dataset.split(",")[0] not in world.TASKS:
        return cfg.usual_model
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
    if not Path(pretrained).is_file():
        quick = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
        return open_clip.create_model(name, pretrained or None, force_quick_gelu=quick)
    weights, from_openai = read_weights(pretrained)
    model = open_clip.create_model(name, force_quick_gelu=from_openai)
    model.load_state_dict(weights)
    activation = type(model.transformer.resblocks[0].mlp.gelu).__name__
    print(f"{pretrained}: taken with {activation}", file=sys.stderr)
    return model


def read_weights(path):
    """(state dict, whether of TorchScript, as OpenAI's own) of a file of safetensors, of torch.save
    (plain, nested in "state_dict", prefixed by "module."), or of TorchScript."""
    files = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    scripted = any(file.endswith("/constants.pkl") for file in files)
    if scripted:  # torch.jit.load would compile code of the file; this reads its tensors alone
        weights = importlib.import_module("tests.tools.archive").tensors(path)
    else:
        weights = open_clip.factory.load_state_dict(path, weights_only=True)
    sizes = "input_resolution", "context_length", "vocab_size"  # which OpenAI's files hold too
    return {name: x for name, x in weights.items() if name not in sizes}, scripted


class Layout:
    """Where the own tokens of K classes stand: in one list of n tokens for all but attention, and
    padded to K rows of S places for attention. Computed on the host, where lengths stays.

    token (n,): the place, among K * S, of each token of the list; padded (K * S,): the token of the
    list at each place, and where none stands the class's EOT; last (K,): each EOT in the list; mask
    (S, P + S): where a token may look, at all of its prefix and at its class's tokens up to itself;
    eot (K,): each EOT's place in its row.
    """

    def __init__(self, lengths, P, device):
        """lengths (K,), on the host: how many own tokens each class has, its EOT included; P: how
        many tokens of its prefix stand before them."""
        self.lengths, self.P, self.S = lengths, P, int(lengths.max())
        place, after = torch.arange(self.S), lengths.cumsum(0)
        first, last = (after - lengths)[:, None], (after - 1)[:, None]
        filled = place < lengths[:, None]  # (K, S)
        self.token = to_device(filled.flatten().nonzero()[:, 0], device)
        self.padded = to_device((first + place).minimum(last).flatten(), device)
        self.last, self.eot = to_device(last[:, 0], device), to_device(lengths - 1, device)
        causal = torch.ones(self.S, P + self.S, dtype=torch.bool).tril(P)
        self.mask = to_device(causal, device)


def encode_text(clip, prefix, suffix, eot, group=None, layout=None):
    """(K, D) fp32 features of sequences, prefix[group[k]] and behind it suffix[k], read at the EOT.

    Equals clip.encode_text of the same tokens, for less work, because the tower is causal: a prefix
    cannot see the class behind it, so each of the G prefixes runs once; nothing behind an EOT
    reaches it, so a class's own tokens end there. Linear layers and norms see one list without
    padding: the G * P prefix tokens, then the n own tokens of all classes.

    prefix (G, P, d) and suffix (K, S or more, d): token embeddings, positions not yet added; eot
    (K,): place of the EOT in the whole; group (K,): each class's prefix, unread where there is one
    for all; layout: what Names has kept, else made of eot.
    """
    G, P, _ = prefix.shape
    layout = layout or Layout(eot.cpu() + 1 - P, P, clip.device)
    position = clip.positional_embedding
    own = suffix[:, : layout.S] + position[P : P + layout.S]  # (K, S, d)
    own = own.flatten(0, 1).index_select(0, layout.token)  # (n, d)
    with clip.autocast():
        x = torch.cat([(prefix + position[:P]).flatten(0, 1), own])  # (G * P + n, d)
        for block in clip.transformer.resblocks:
            x = x + block.ls_1(attend(block.attn, block.ln_1(x), G, P, group, layout))
            if block is clip.transformer.resblocks[-1]:  # whose MLP need see the EOTs alone
                x = x[G * P :].index_select(0, layout.last)  # (K, d)
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
    if G == 1:
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
    which stand behind the image tokens; None keeps those that stand there, if any. images
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


class Names(NamedTuple):
    """K class names as tokens around a context, [SOS] V ... V <name>. [EOT]: sos (1, 1, d) and tail
    (K, S, d), from the name on, are embeddings; eot (K,), on the host, is the EOT's place in the
    whole; layouts holds those made so far."""

    sos: torch.Tensor
    tail: torch.Tensor
    eot: torch.Tensor
    layouts: dict

    def select(self, columns):
        """The Names of some classes; columns: their indices, on the host."""
        tail = self.tail.index_select(0, to_device(columns, self.tail.device))
        return Names(self.sos, tail, self.eot[columns], {})

    def layout(self, P):
        """The Layout behind a prefix of P tokens, made once."""
        if P not in self.layouts:
            self.layouts[P] = Layout(self.eot + 1 - P, P, self.tail.device)
        return self.layouts[P]


def embed_names(clip, names, n_ctx, template="{}."):
    """The Names of class names in a template, which stands behind n_ctx context vectors.
    Raises Error for a name that is too long for the text tower."""
    texts = ["X " * n_ctx + template.format(name.replace("_", " ")) for name in names]
    ids = clip.tokenize(texts, clip.context_length + 1)  # (K, 78); a place more than there is
    if ids[:, -1].any():
        longest = f"{clip.context_length} tokens with {n_ctx} context vectors"
        name = names[int(ids[:, -1].argmax())][:60]
        raise Error(f"class name {name!r} is too long for {longest} (--n_ctx, --init)")
    eot = ids.argmax(1)  # which has the largest id
    x = clip.token_embedding(to_device(ids[:, : eot.max() + 1].contiguous(), clip.device))
    return Names(x[:1, :1], x[:, 1 + n_ctx :], eot, {})


def encode_prompts(clip, names, ctx, group=None, position="end"):
    """(K, D) features of the prompts [SOS] V <name>. [EOT] (official trainers/coop.py).

    names: with room for M vectors; ctx (G, M, d): the contexts V; group (K,): each class's, unread
    where there is one; position of the name: at V's "end", in its "middle", or in "front" of it.
    """
    M = ctx.shape[1]
    behind = {"end": 0, "middle": M - M // 2, "front": M}[position]  # vectors after the name
    before, after = ctx[:, : M - behind], ctx[:, M - behind :]
    prefix = torch.cat([names.sos.expand(len(ctx), -1, -1), before], 1)
    layout, suffix = names.layout(prefix.shape[1]), names.tail
    if behind:  # turn V V NAME NAME . EOT left by len(after), all but its last two
        after = after.index_select(0, group) if len(ctx) > 1 else after.expand(len(suffix), -1, -1)
        end = layout.eot[:, None] - 1  # (K, 1)
        place = torch.arange(suffix.shape[1] + behind, device=clip.device)
        order = torch.where(place < end, (place + behind) % end, place)
        suffix = torch.cat([after, suffix], 1).take_along_dim(order[..., None], 1)
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
    if name and Path(name, "train").is_dir():
        return from_class_folders(name, Path(name))
    if name and Path(name).is_dir():
        return divided(from_class_folders(name, Path(name), (".", "-", ".")))
    known = [*BENCHMARKS, *tasks]
    near = difflib.get_close_matches(name, known, 4, 0.4) or known
    raise Error(f"no data set or folder {name!r}; there is {', '.join(near)}")


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
    except Error:
        raise
    except Exception as problem:  # what a list holds is of any kind
        raise Error(f"{name}: {problem}; python common.py download {name} gets it") from None
    return data._replace(template=template)


def from_split_file(name, split, images):
    """{"train": [["Faces/image_0274.jpg", 0, "face"], ...], "val": ..., "test": ...}: paths below
    the folder images, labels, class names."""
    lists = json.loads(regular(split).read_text("utf-8"))
    parts = [[(f"{images}/{path}", int(y), str(c)) for path, y, c in lists[part]] for part in PARTS]
    names = {y: c for items in parts for _, y, c in items}
    return checked(name, parts, [names[y] for y in sorted(names)])


def from_aircraft_lists(name, folder, images):
    """variants.txt: the classes in order; images_variant_{train,val,test}.txt: lines as
    "1025794 707-320", an image and its variant."""
    variants = (folder / "variants.txt").read_text("utf-8").splitlines()
    parts = []
    for part in PARTS:
        lines = (folder / f"images_variant_{part}.txt").read_text("utf-8").splitlines()
        pairs = [line.split(" ", 1) for line in lines]
        parts.append([(f"{images}/{i}.jpg", variants.index(v), v) for i, v in pairs])
    return checked(name, parts, variants)


def from_wordnet_folders(name, images):
    """ImageNet: train/ and val/ of folders n01440764/ ...; its variants: such folders alone, of
    ImageNetV2 0/ ... 999/. Labels count the folders present."""
    keys = map(str, range(1000)) if name == "imagenetv2" else ImageNetInfo().label_names()
    titles = dict(zip(keys, open_clip.IMAGENET_CLASSNAMES, strict=True))
    parts = ("train", "-", "val") if name == "imagenet" else ("-", "-", ".")
    return from_class_folders(name, images, parts, titles)


def from_class_folders(name, folder, parts=PARTS, titles=None):
    """Folders train/, test/ and, if you like, val/, or those called as parts says, each of class
    folders. titles: {class folder: class name}, in order; by default the folders' names, sorted.
    Files are sorted: CoOp's listing was not, so that its picks depended on the file system."""
    found = {path.name for part in parts for path in listed(folder / part) if path.is_dir()}
    titles = titles or {key: key for key in sorted(found)}
    keys = [key for key in titles if key in found]
    lists = []
    for part in parts:
        items = []
        for label, key in enumerate(keys):
            files = [file for file in listed(folder / part / key) if file.suffix.lower() in IMAGES]
            items += [(str(file), label, titles[key]) for file in files]
        lists.append(items)
    return checked(name, lists, [titles[key] for key in keys])


def listed(folder):
    """Sorted paths of what a folder holds, hidden ones left out; none where there is no folder."""
    return sorted(folder.glob("[!.]*"), key=str)


def checked(name, parts, classnames):
    """The Dataset of the lists train, val and test. Raises Error for a class without images, and
    for fewer than two classes."""
    train, val, test = parts
    for kind, items in ("training", train or test), ("test", test):
        labels = {label for _, label, _ in items}
        missing = sorted(set(range(max(2, len(classnames)))) - labels)
        if missing:
            c = classnames[missing[0]] if missing[0] < len(classnames) else missing[0]
            raise Error(f"{name}: class {c!r}, of at least two, has no {kind} image")
    return Dataset(name, train, val, test, classnames)


def divided(data):
    """The Dataset of class folders alone: 50, 20 and 30 % of each class's images, always alike."""
    train, val, test = [], [], []
    for group in by_class(data.test):
        random.Random(0).shuffle(group)
        half, most = round(0.5 * len(group)), round(0.7 * len(group))
        train += group[:half]
        val += group[half:most]
        test += group[most:]
    return checked(data.name, (train, val, test), data.classnames)


def by_class(items):
    """Lists of the items of each class, in order of their first appearance."""
    groups = defaultdict(list)
    for item in items:
        groups[item[1]].append(item)
    return list(groups.values())


def sample_few_shot(dataset, shots, seed):
    """CoOp's few-shot picks (Dassl data/datasets/base_dataset.py): from train, then from val (at
    most 4 a class), by one stream of random numbers. All of a class that has too few, and of every
    class for 0 shots. The test set is never sampled."""
    stream = random.Random(seed)
    picks = {"train": [], "val": []}
    for part, k in ("train", shots), ("val", min(shots, 4)):
        for group in by_class(getattr(dataset, part)):
            picks[part] += stream.sample(group, k) if 0 < k <= len(group) else group
    return dataset._replace(**picks)


def subset_classes(dataset, half):
    """The "base" (first, larger) or "new" half of the classes, relabelled from 0 (CoOp
    datasets/oxford_pets.py, subsample_classes)."""
    K = len(dataset.classnames)
    kept = range(math.ceil(K / 2)) if half == "base" else range(math.ceil(K / 2), K)
    parts = {}
    for part in PARTS:
        items = getattr(dataset, part)
        parts[part] = [(picture, y - kept.start, c) for picture, y, c in items if y in kept]
    return dataset._replace(classnames=dataset.classnames[kept.start : kept.stop], **parts)


# ------------------------------------------------------------------------------ 5 Pictures

BICUBIC = InterpolationMode.BICUBIC
TEST_BATCH = 100  # images, as in Dassl
KEPT_BYTES = 4 * 2**30  # of decoded training pictures; the others are decoded in every epoch
AHEAD = 2  # batches on which threads work before they are asked for


def decode(picture):
    """The RGB PIL image of a file, or of a uint8 tensor (3, H, W). Raises Error."""
    if isinstance(picture, torch.Tensor):
        if picture.dtype != torch.uint8 or picture.dim() != 3 or len(picture) != 3:
            kind = f"{picture.dtype} {tuple(picture.shape)}"
            raise Error(f"a picture is a path or a uint8 tensor (3, H, W), not {kind}")
        return vision.to_pil_image(picture)
    try:
        with Image.open(regular(picture)) as image:
            if image.mode.startswith("I"):  # 16 bit, which convert() would clip to white
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except Exception as problem:  # PIL raises many kinds
        raise Error(f"cannot read image {picture}: {problem}") from None


def regular(path):
    """The Path of a regular file; a pipe, say, would be waited for. Raises OSError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file")
    return Path(path)


def views(clip, pictures, boxes=None, mirror=None):
    """(B, 3, side, side) normalised views of paths or tensors: of boxes (top, left, height, width),
    mirrored where mirror says; without boxes the test views."""
    side, images = clip.image_size, [decode(picture) for picture in pictures]
    if boxes is None:
        return normalised(clip, [test_view(image, side) for image in images])
    cuts = zip(images, boxes, mirror or [False] * len(images), strict=True)
    return normalised(clip, [boxed_view(image, side, box, flip) for image, box, flip in cuts])


def test_view(image, side):
    """(3, side, side) uint8: the shorter edge resized to side, then the centre cropped."""
    width, height = image.size  # of a very long one, too large when resized, the ends go first
    image = vision.center_crop(image, [min(height, 9 * width), min(width, 9 * height)])
    return vision.pil_to_tensor(vision.center_crop(vision.resize(image, [side], BICUBIC), [side]))


def train_view(image, side, crop, numbers):
    """(3, side, side) uint8: a box of a random share of the area, within crop, and of an aspect
    ratio within 3/4 and 4/3, resized, and mirrored half the time: torchvision's RandomResizedCrop
    and flip, which take their numbers from a global generator, as threads must not."""
    width, height = image.size
    for _ in range(10):
        area = width * height * numbers.uniform(*crop)
        ratio = (4 / 3) ** numbers.uniform(-1, 1)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = numbers.randint(0, width - w), numbers.randint(0, height - h)
            break
    else:  # of a very long picture the centre
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return boxed_view(image, side, (top, left, h, w), numbers.random() < 0.5)


def boxed_view(image, side, box, flip):
    """(3, side, side) uint8: the box (top, left, height, width) resized, mirrored or not."""
    view = vision.pil_to_tensor(vision.resized_crop(image, *box, [side, side], BICUBIC))
    return view.flip(-1) if flip else view


def normalised(clip, views):
    """uint8 views on the host -> one batch on the device, normalised as CLIP wants it."""
    return (to_device(torch.stack(views), clip.device) / 255 - clip.mean) / clip.std


def to_device(x, device):
    """Copies without a wait of the host, which on CUDA takes pinned memory."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def ahead(workers, function, batches):
    """Yields [function(item) for item in batch] of each batch, on which threads work before it is
    asked for."""
    pool, pending = ThreadPoolExecutor(workers), deque()
    for batch in [*batches, *[[]] * AHEAD]:  # the empty ones drive out the last
        pending.append(pool.map(function, batch))
        if len(pending) > AHEAD:
            yield list(pending.popleft())


def labels_of(data, items):
    """(n,) labels of some items of data, on the host. Raises Error."""
    labels = torch.tensor([label for _, label, _ in items])
    if not items:
        raise Error(f"{data.name} has no images for this: train on another set, and --transfer")
    if labels.min() < 0 or labels.max() >= len(data.classnames):
        raise Error(f"{data.name}: labels must count its class names, from 0")
    return labels


class Loader:
    """Batches of the training pictures: decoded once, while KEPT_BYTES last; cropped and mirrored
    anew for every epoch (CoOp's transforms) by threads. A view depends on (seed, epoch, picture)
    alone, the order on (seed, epoch), so that an epoch repeats itself after a kill."""

    def __init__(self, cfg, clip, data):
        """Raises Error where data has no training pictures, or labels beyond its class names."""
        self.cfg, self.clip, self.data, self.kept, self.room = cfg, clip, data, {}, KEPT_BYTES
        self.labels = labels_of(data, data.train)

    def order(self, epoch):
        """The epoch's batches, as lists of picture numbers. As in Dassl, a last batch that is not
        full is dropped, unless it is the only one."""
        generator = torch.Generator().manual_seed(seed_of(self.cfg.seed, epoch))
        order = torch.randperm(len(self.labels), generator=generator)
        batches = [batch.tolist() for batch in order.split(self.cfg.batch_size)]
        return [batch for batch in batches if len(batch) == len(batches[0])]

    def epoch(self, epoch):
        """Yields images (B, 3, side, side) and labels (B,), on the device."""
        batches = self.order(epoch)
        augmented = ahead(self.cfg.workers, lambda i: self.view(epoch, i), batches)
        for batch, views in zip(batches, augmented, strict=True):
            yield normalised(self.clip, views), to_device(self.labels[batch], self.clip.device)

    def view(self, epoch, i):
        """Picture i as this epoch shows it, uint8 (3, side, side)."""
        image = self.kept.get(i) or decode(self.data.train[i][0])
        if i not in self.kept and self.room > 0:
            self.kept[i] = image
            self.room -= 4 * image.width * image.height  # bytes, in PIL
        numbers = random.Random(seed_of(self.cfg.seed, epoch, i))
        return train_view(image, self.clip.image_size, self.data.crop, numbers)


# ------------------------------------------------------------------------------ 6 Training


class Optimizer:
    """SGD, momentum .9, weight decay 5e-4, on a cosine with warm-up (Dassl optim/lr_scheduler.py).

    After k epochs the rate is 1e-5 while k < warmup, then lr/2 (1 + cos(pi (k - warmup) / epochs)),
    never 0; with repeat, k counts the schedule's steps, and the rate can touch 0 and rise again.
    groups: parameters, or dicts {"params", "lr", "warmup"} (else 1). Where CLIP runs in fp16,
    GradScaler scales the loss, and SGD, one fused kernel, skips a step whose gradients overflow,
    without a wait of the host. repeat: steps per gradient and epoch, 1 but for SoftCPT's release.
    """

    def __init__(self, cfg, clip, groups, epochs, repeat=1):
        self.epochs, self.repeat, self.losses = epochs, repeat, []
        self.sgd = torch.optim.SGD(groups, cfg.lr, momentum=0.9, weight_decay=5e-4, fused=True)
        learned = [p for group in self.sgd.param_groups for p in group["params"] if p.numel()]
        if not learned:
            raise Error("these options leave nothing to learn; --help lists them")
        self.scaler = torch.amp.GradScaler(clip.device.type, enabled=clip.half is torch.float16)
        if repeat > 1 and self.scaler.is_enabled():
            raise Error("repeated steps are not scaled: they need --precision fp32")
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
        for _ in range(self.repeat):
            self.scaler.step(self.sgd)
        self.scaler.update()

    def end_epoch(self):
        """Sets the next rates; returns the mean loss, for which the host waits. Raises Error if it
        is not finite, or if gradients overflow even unscaled."""
        self.schedule(self.repeat)
        loss = torch.stack(self.losses).mean().item()
        self.losses.clear()
        if not math.isfinite(loss) or self.scaler.get_scale() < 1:  # 1 where nothing is scaled
            raise Error(f"training diverged (loss {loss}): lower --lr, or try --precision fp32")
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
        "CLIP": clip.fingerprint,
        "training set": digest([item for d in sets for item in d.train]),
        "classnames": {d.name: d.classnames for d in sets},
        "config": vars(cfg),
        "train_seconds": 0.0,
    }
    if cfg.force and not cfg.load and folder.exists():
        shutil.rmtree(folder)
    kept = None
    # Read before looking for the prompt: another process writes that, and then deletes this
    with contextlib.suppress(FileNotFoundError):
        kept = regular(part).read_bytes()
    if cfg.load or final.exists():
        tensors, saved = read_prompt(folder)
        restore(folder, prompt, tensors, saved, about)
        return
    first = 0
    if kept is not None:
        first, about["train_seconds"] = read_checkpoint(part, kept, prompt, optimizer, about)
    write(folder / "config.json", json.dumps(vars(cfg), indent=1).encode())
    epochs = range(first, optimizer.epochs)
    bar = tqdm(epochs, printable(str(folder)), optimizer.epochs, initial=first)
    for epoch in bar:
        torch.manual_seed(seed_of(cfg.seed, epoch))  # for dropout
        start = time.time()
        yield epoch
        bar.set_postfix(loss=optimizer.end_epoch())
        about["train_seconds"] += time.time() - start
        state = {"epoch": epoch + 1, "about": about, "prompt": prompt.state_dict()}
        content = io.BytesIO()
        torch.save(state | {"optimizer": optimizer.state_dict()}, content)
        write(part, content.getvalue())
    write(final, save(prompt.state_dict(), {"about": json.dumps(about)}))
    part.unlink(missing_ok=True)


def read_checkpoint(path, kept, prompt, optimizer, about):
    """Loads an unfinished run's checkpoint, the bytes kept at path; returns its (epochs, seconds).
    Raises Error."""
    try:
        state = torch.load(io.BytesIO(kept), map_location="cpu", weights_only=True)
        restore(path.parent, prompt, state["prompt"], state["about"], about)
        optimizer.load_state_dict(state["optimizer"])
        return int(state["epoch"]), float(state["about"]["train_seconds"])
    except Error:
        raise
    except Exception as problem:  # torch raises many kinds
        raise Error(f"{path} is damaged ({problem}); delete it, or --force trains anew") from None


def restore(folder, prompt, tensors, saved, about):
    """Loads tensors into prompt. Raises Error where they belong to another method, CLIP or training
    set, or do not fit."""
    for key in "method", "CLIP", "training set":
        if saved[key] != about[key]:
            raise Error(f"{folder} was trained with another {key}; --force trains anew")
    try:
        prompt.load_state_dict(tensors)
    except RuntimeError as problem:
        raise Error(f"{folder} does not fit these options: {problem}") from None


def read_prompt(folder):
    """(tensors, what they belong to) of a finished run's prompt.safetensors. Raises Error."""
    path = Path(folder, "prompt.safetensors")
    try:
        # Not by its path, which may hold bytes that are no UTF-8
        content = regular(path).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        tensors, about = load(content), json.loads(header["__metadata__"]["about"])
        if not {"method", "CLIP", "training set", "train_seconds"} <= about.keys():
            raise Error("it does not tell what it was trained on")
        if not all(x.dtype == torch.float32 and x.isfinite().all() for x in tensors.values()):
            raise Error("its tensors are not finite fp32 numbers; --force trains anew")
        about["config"].items()
        about["train_seconds"] = float(about["train_seconds"])
        return tensors, about
    except Exception as problem:  # safetensors raises kinds of its own
        raise Error(f"{path} is no prompt of a finished run: {problem}") from None


def digest(items):
    """Hash of the items' pictures (of every byte), labels and class names, in order."""
    total = hashlib.sha256()
    for picture, *label in items:
        if isinstance(picture, torch.Tensor):
            content = picture.numpy().tobytes()
        else:
            content = regular(picture).read_bytes()
        total.update(f"{len(content)} {label}".encode() + content)
    return total.hexdigest()[:32]


# ---------------------------------------------------------------------------- 7 Evaluation


def evaluate(cfg, clip, data, classifier, per_class=()):
    """Evaluates on the test set of every label set asked for, records it in results.json, prints
    the result and returns the accuracy in percent: the mean over the tasks, with --classes base of
    the base half.

    data: the Dataset trained on, or a list of them. classifier(dataset) returns unit text features
    w (K, D), where the features f (B, D) of CLIP's own image tower decide; where they do not, a
    function of normalised images (B, 3, H, W) and f that gives logits (B, K).
    per_class: names of the data sets that count by the mean over their classes' accuracies.
    """
    sets, rows = data if isinstance(data, list) else [data], []

    def mean(targets, half):
        """(accuracy, zero-shot CLIP's) over the targets."""
        pairs = []
        for target in targets:
            rows.append(record(cfg, clip, target, half, classifier))
            kind = "mean_class_" if target.name in per_class else ""
            pairs.append([rows[-1][kind + "accuracy"], rows[-1][kind + "zero_shot"]])
        return np.mean(pairs, 0)

    scores = mean(sets, cfg.classes)
    ours, zero_shot = (f"{score:.2f}" for score in scores)
    if cfg.classes == "base":
        new = mean([d.new for d in sets], "new")
        harmonic = 2 * scores * new / np.maximum(scores + new, 1e-9)
        three = zip(scores, new, harmonic, strict=True)
        ours, zero_shot = (f"base {b:.2f}, new {n:.2f}, H {h:.2f}" for b, n, h in three)
    for name in filter(None, map(str.strip, cfg.transfer.split(","))):
        there = mean([load_dataset(name, cfg.data)], "all")
        say(f"  on {name}: {there[0]:.2f} (zero-shot {there[1]:.2f})")
    say(f"in {run_folder(cfg)}")
    result = f"{ours} (zero-shot {zero_shot}), {rows[0]['train_seconds']:.0f} s"
    say(f"{cfg.dataset} {cfg.shots} shots seed {cfg.seed}: {result}")
    return float(scores[0])


def record(cfg, clip, target, half, classifier):
    """The row of one label set, which takes the place of an earlier one in results.json."""
    folder, seconds = run_folder(cfg), 0.0
    if (folder / "prompt.safetensors").exists():
        seconds = read_prompt(folder)[1]["train_seconds"]
    row = {
        "official": False,
        **vars(cfg),
        "config": vars(cfg),
        "method": method(cfg),
        "evaluated_on": target.name,
        "classes": half,
        **measured(cfg, clip, target, classifier),
        "train_seconds": seconds,
        "precision": str(clip.half or "fp32"),
        "device": str(clip.device),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "commit": commit(),
        "time": time.ctime(),
    }
    path = folder / "results.json"
    try:
        rows = json.loads(regular(path).read_text("utf-8")) if path.exists() else []
        rows = {(r["evaluated_on"], r["classes"]): r for r in rows}
    except (ValueError, TypeError, LookupError, RecursionError) as problem:
        raise Error(f"{path} holds no results ({problem}); move it away") from None
    rows[target.name, half] = row
    write(path, json.dumps([*rows.values()], indent=1).encode())
    return row


@torch.no_grad()
def measured(cfg, clip, target, classifier):
    """Accuracies in percent of a classifier and of zero-shot CLIP, and frozen CLIP's variances in
    UPT's study (Fig. 1 d, e): of unit image features within classes, of text features between."""
    start, predict, labels = time.time(), classifier(target), labels_of(target, target.test)
    batches = [target.test[i : i + TEST_BATCH] for i in range(0, len(target.test), TEST_BATCH)]
    ready = ahead(cfg.workers, lambda item: test_view(decode(item[0]), clip.image_size), batches)
    features, logits = [], []
    for batch in tqdm(ready, "test images", len(batches), leave=False):
        x = normalised(clip, batch)
        f = unit_features(clip, x)
        features.append(f)
        logits.append(predict(x, f) if callable(predict) else f @ predict.T)
    f, w = torch.cat(features), zero_shot_weights(clip, target)[:, 0]
    y = to_device(labels, clip.device)
    member = F.one_hot(y, len(w)).double()  # (n, K)
    member = member / member.sum(0)
    row = {"n_test": len(y)}
    for name, scores in ("accuracy", torch.cat(logits)), ("zero_shot", f @ w.T):
        right = 100 * (scores.argmax(1) == y).double()
        row[name] = right.mean().item()
        row["mean_class_" + name] = (right @ member).nanmean().item()
    within = f - (member.T @ f.double())[y]  # from the class's mean
    row["intra_class_variance"] = within.square().sum(1).mean().item()
    row["inter_class_variance"] = (w - w.mean(0)).square().sum(1).mean().item()
    row["eval_seconds"] = time.time() - start
    on_gpu = clip.device.type == "cuda"
    row["peak_gpu_mb"] = torch.cuda.max_memory_allocated(clip.device) / 2**20 if on_gpu else 0.0
    return row


def commit():
    """The repository's commit, "" where there is none, or no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        return ended.stdout.strip()
    return ""


@dataclasses.dataclass
class ZeroShot(Config):
    shots: int = 0  # nothing is trained
    ensemble: bool = False  # the mean over CoOp's seven templates and the data set's own


def zero_shot(cfg):
    """Zero-shot CLIP, the smallest method (CoOp trainers/zsclip.py)."""
    if cfg.load:
        raise Error("zero-shot CLIP learns nothing that --load could load")
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
