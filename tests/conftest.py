"""What the tests share: small CLIPs, small synthetic data sets, CLIP's towers written out."""

import contextlib
import functools
import json
import os
import runpy
import sys
import tempfile
import threading
from collections import namedtuple
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.tools import shapes

METHODS = {"coop": coop, "dpt": dpt, "upt": upt, "enprompt": enprompt, "softcpt": softcpt}

# tqdm's own lock is shared with forked children: one killed while holding it would hang us all
tqdm.set_lock(threading.RLock())

# Small tensors gain nothing from more threads, which on a shared machine wait for each other
torch.set_num_threads(1)

# Reading the vocabulary takes longer than most of the runs here
open_clip.get_tokenizer = functools.cache(open_clip.get_tokenizer)

HERE = Path(common.__file__).parent
FOLDER = tempfile.TemporaryDirectory()  # of random images, until the tests end
NAMES = ["cat", "striped_star", "a very blurry hourglass"]  # of one, two and more tokens


def plain_text(clip, x, eot):
    """Features of token embeddings x (K, 77, d) by open_clip's own tower: nothing cut or shared."""
    x = clip.transformer(x + clip.positional_embedding, attn_mask=clip.attn_mask)
    return clip.ln_final(x)[torch.arange(len(x)), eot] @ clip.text_projection


def plain_prompts(clip, names, ctx):
    """Features of "[SOS] V name . [EOS]", padded to 77 tokens, for ctx (K, M, d)."""
    M = ctx.shape[1]
    ids = clip.tokenize([" ".join(["X"] * M + [f"{c.replace('_', ' ')}."]) for c in names])
    x = clip.token_embedding(ids)
    return plain_text(clip, torch.cat([x[:, :1], ctx, x[:, 1 + M :]], 1), ids.argmax(1))


def plain_image(clip, images, rows=None, patches=False):
    """Image features by open_clip's own modules. rows[i], or rows[i](image tokens), replaces the
    prompts before block i, at i = -1 before ln_pre. They stand between the class token and the
    patches, as in UPT's official code. With patches also the features of the patches."""
    visual, rows = clip.visual, rows or {}
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
    x, N = x + visual.positional_embedding, x.shape[1] - 1
    for i, block in enumerate([visual.ln_pre, *visual.transformer.resblocks], -1):
        if i in rows:
            P = rows[i](torch.cat([x[:, :1], x[:, -N:]], 1)) if callable(rows[i]) else rows[i]
            x = torch.cat([x[:, :1], P.expand(len(x), -1, -1), x[:, -N:]], 1)
        x = block(x)
    x = visual.ln_post(x) @ visual.proj
    return (x[:, 0], x[:, -N:]) if patches else x[:, 0]


def words(clip, text):
    """(1, M, d) token embeddings of text."""
    return clip.token_embedding(torch.tensor([clip.tokenize.encode(text)]))


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def close(a, b, tolerance=1e-5):
    """Whether a equals b up to a share of b's largest value."""
    return (a - b).abs().max() <= tolerance * b.abs().max() and b.abs().max() > 0


def gradients(loss, parameters):
    """Gradients of loss, zeros where it does not depend on a parameter."""
    return torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )


@functools.cache
def random_image(i):
    """The path of a random image of 40 x 36 pixels."""
    generator = torch.Generator().manual_seed(i)
    image = torch.randint(256, (40, 36, 3), generator=generator, dtype=torch.uint8)
    path = Path(FOLDER.name, f"{i}.png")
    Image.fromarray(image.numpy()).save(path)
    return str(path)


def toy(count=6):
    """A data set of count random images, NAMES in turn."""
    items = [(random_image(i), i % 3, NAMES[i % 3]) for i in range(count)]
    return common.Dataset("toy", items, items, NAMES, "a photo of a {}.")


def normalized(clip, data):
    """The training images of data, preprocessed as for a test, in one batch."""
    images = [common.decode(path) for path, _, _ in data.train]
    return common.normalize(clip, [common.preprocess(image, clip.image_size) for image in images])


def initial(method, clip, data=None, **options):
    """(Config, learnables at their initial value) for data, by default toy()."""
    cfg = method.Config(**options)
    return cfg, method.learnables(cfg, clip, data or toy())


def match_gradients(step, loss, prompt):
    """Asserts that a Step's gradients are those of loss, and none of them zero."""
    parameters = dict(prompt.named_parameters())
    for name, b in zip(parameters, gradients(loss, list(parameters.values())), strict=True):
        assert close(step.gradients[name], b, 1e-3), name


def check_learning(step, clip, learned):
    """Asserts that every learnable is fp32 and gets a gradient, and that CLIP gets none.
    learned: names of the learnables."""
    assert step.gradients.keys() == set(learned)
    assert all(g.abs().max() > 0 and g.dtype == torch.float32 for g in step.gradients.values())
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())


class Batches:
    """Stands in for common.Loader: the same pairs of images and labels in every epoch."""

    def __init__(self, pairs):
        self.pairs = pairs

    def order(self, epoch):
        return range(len(self.pairs))

    def epoch(self, epoch):
        yield from self.pairs


# before, gradients: {name: tensor} of the learnables; times: how often SGD stepped
Step = namedtuple("Step", "before loss gradients times")


def rehearse(method, cfg, clip, data, prompt, batches=None, epochs=(0,), moving=False):
    """Runs some epochs of method.train: (its Steps, [rates of the groups] per epoch).

    The project's own Optimizer takes every step. Unless moving, the learnables are put back.
    batches: pairs of images and labels, the same in every epoch; None: those of common.Loader.
    epochs: their numbers; None for all that the method asks for.
    """
    steps, rates, take_step = [], [], common.Optimizer.step

    def stepped(*args):
        steps[-1].times.append(args)
        if not moving:
            prompt.load_state_dict(steps[-1].before)

    def resumed(cfg, clip, data, prompt, optimizer):
        optimizer.sgd.register_step_post_hook(stepped)
        for epoch in range(optimizer.epochs) if epochs is None else epochs:
            rates.append([group["lr"] for group in optimizer.sgd.param_groups])
            yield epoch
            if not optimizer.losses:  # an epoch without batches
                optimizer.losses.append(torch.zeros(()))
            optimizer.end_epoch()

    def step(optimizer, loss):
        before = {name: tensor.clone() for name, tensor in prompt.state_dict().items()}
        steps.append(Step(before, loss.detach(), {}, []))
        take_step(optimizer, loss)
        found = {n: p.grad.clone() for n, p in prompt.named_parameters() if p.grad is not None}
        steps[-1].gradients.update(found)

    with pytest.MonkeyPatch.context() as patch:
        if batches is not None:
            patch.setattr(common, "Loader", lambda cfg, clip, data: Batches(batches))
        patch.setattr(common, "resumed", resumed)
        patch.setattr(common.Optimizer, "step", step)
        method.train(cfg, clip, data, prompt)
    return [step._replace(times=len(step.times)) for step in steps], rates


def schedule(method, clip, data, **options):
    """The learning rates of each group of parameters in each epoch of method."""
    cfg, prompt = initial(method, clip, data, **options)
    return rehearse(method, cfg, clip, data, prompt, batches=[], epochs=None)[1]


def built(embed_dim=24, quick_gelu=True, **vision):
    """A CLIP of open_clip with random weights, no zero bias or unit norm among them."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 3, "width": 48, "patch_size": 8} | vision
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    model = open_clip.CLIP(embed_dim, {"head_width": 16} | vision, text, quick_gelu)
    for p in model.requires_grad_(False).parameters():
        p += 0.02 * torch.randn_like(p)
    model.visual.image_mean, model.visual.image_std = shapes.MEAN, shapes.STD
    return common.Clip(model, open_clip.get_tokenizer("ViT-B-32"))


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@contextlib.contextmanager
def interrupted(at):
    """Interrupts the training in its body, like Ctrl-C, in step `at`, which it must reach."""
    taken, take_step = [], common.Optimizer.step

    def counted(optimizer, loss):
        taken.append(loss)
        if len(taken) == at:
            raise KeyboardInterrupt
        take_step(optimizer, loss)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Optimizer, "step", counted)
        yield


@pytest.fixture(scope="session")
def odd():
    """A random ViT CLIP whose widths all differ: d_t 32, d 48, D 24."""
    return built()


@pytest.fixture(scope="session")
def resnet():
    return built(layers=[1, 1, 1, 1], width=8, image_size=64, head_width=32)


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """A --data folder: synthetic data sets of few images per class, and their pretrained CLIP."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNTS", {"train": 4, "val": 1, "test": 2})
        for name in ["shapes", "shapes_negative", "textures", "colours", "clip"]:
            shapes.write(folder, name)
    return folder


def tiny(rendered, precision="fp32", device="cpu"):
    """The pretrained tiny CLIP."""
    model = f"local-dir:{rendered}/shapes/clip"
    return common.load_clip(common.Config(model=model, device=device, precision=precision))


@pytest.fixture(scope="session")
def clip(rendered):
    return tiny(rendered)


@pytest.fixture
def fit(rendered, tmp_path):
    """fit(method, ...) runs method.main on the small data sets; fit.rows() are the rows of all its
    runs, the last evaluated last."""

    def fit(method, **options):
        usual = {
            "shots": 1,
            "epochs": 1,
            "device": "cpu",
            "data": str(rendered),
            "out": str(tmp_path),
        }
        return method.main(method.Config(**usual | options))

    def rows():
        files = sorted(tmp_path.rglob("results/*.json"), key=lambda path: path.stat().st_mtime_ns)
        return [json.loads(path.read_text("utf-8")) for path in files]

    fit.rows = rows
    return fit


@pytest.fixture
def shell(rendered, tmp_path, monkeypatch, capsys):
    """shell(script, ...) runs a script as its command line would: (exit code, stdout, stderr)."""

    def shell(script, *arguments):
        usual = ["--data", str(rendered), "--out", str(tmp_path), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [script, *usual, *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(HERE / script), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return shell
