"""What the tests share: small CLIPs, a small shapes world, CLIP's towers written out plainly."""

import contextlib
import json
import runpy
import sys
from pathlib import Path

import open_clip
import pytest
import torch

import common
from tests import shapes

HERE = Path(common.__file__).parent
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
    """Image features by open_clip's own modules; rows[i] replaces the prompts before block i.

    At i = -1 they come before ln_pre. They stand between the class token and the patches, as in
    UPT's release. With patches also the features of the patches.
    """
    visual, rows = clip.visual, rows or {}
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
    x, N = x + visual.positional_embedding, x.shape[1] - 1
    for i, block in enumerate([visual.ln_pre, *visual.transformer.resblocks], -1):
        if i in rows:
            x = torch.cat([x[:, :1], rows[i].expand(len(x), -1, -1), x[:, -N:]], 1)
        x = block(x)
    x = visual.ln_post(x) @ visual.proj
    return (x[:, 0], x[:, -N:]) if patches else x[:, 0]


def words(clip, text):
    """(1, M, d) token embeddings of text."""
    return clip.token_embedding(torch.tensor([clip.tokenize.encode(text)]))


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def gradients(loss, parameters):
    """Gradients of loss, zeros where it does not depend on a parameter."""
    return torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def toy(count=6):
    """A data set of count random pictures in memory, NAMES in turn."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (count, 3, 40, 36), generator=generator, dtype=torch.uint8)
    items = [(picture, i % 3, NAMES[i % 3]) for i, picture in enumerate(pictures)]
    return common.Dataset("toy", items, [], items, NAMES, "a photo of a {}.")


def untrained(method, clip, data, **options):
    """What method.train returns when there is no epoch left to train: its initial state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "training", lambda *args: ())
        return method.train(method.Config(**options), clip, data)


def rehearsed(method, clip, data, **options):
    """The losses, epoch by epoch, of training that takes no step, and the initial learnables."""
    losses = []

    def step(loss, optimizer, times=1):
        losses.append(loss)
        optimizer.step()  # without gradients: moves nothing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "training", lambda *args: range(args[-1]))
        patch.setattr(common, "step", step)
        prompt, _ = method.train(method.Config(**options), clip, data)
    return losses, prompt


def rates(method, clip, data, **options):
    """The learning rate of each parameter group in each epoch of the schedule of method."""
    found = []

    def training(cfg, clip, data, prompt, optimizer, scheduler, epochs):
        for epoch in range(epochs):
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()  # without gradients: moves nothing
            yield epoch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "training", training)
        patch.setattr(common, "loader", lambda *args, **more: lambda epoch: ())
        method.train(method.Config(**options), clip, data)
    return found


def built(embed_dim=24, quick_gelu=True, **vision):
    """A CLIP of open_clip with random weights, no zero bias or unit norm among them."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 3, "width": 48, "patch_size": 8} | vision
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    clip = open_clip.CLIP(embed_dim, {"head_width": 16} | vision, text, quick_gelu)
    for p in clip.requires_grad_(False).eval().parameters():
        p += 0.02 * torch.randn_like(p)
    clip.visual.image_mean, clip.visual.image_std = shapes.MEAN, shapes.STD
    clip.tokenize, clip.half_dtype = open_clip.get_tokenizer("ViT-B-32"), None
    clip.fingerprint = "built"
    return clip


@contextlib.contextmanager
def interrupted(at):
    """The body's training ends like a Ctrl-C in its step number at, which it must reach."""
    taken, step = [], common.step

    def counted(*args):
        taken.append(args)
        if len(taken) == at:
            raise KeyboardInterrupt
        step(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "step", counted)
        yield


@pytest.fixture(scope="session")
def odd():
    """A random ViT CLIP whose widths all differ: d_t 32, d 48, D 24."""
    return built()


@pytest.fixture(scope="session")
def resnet():
    return built(layers=[1, 1, 1, 1], width=8, image_size=64, head_width=32)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A --data folder: the shapes world with few pictures per class, and its pretrained CLIP."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNTS", {"train": 4, "val": 1, "test": 2})
        for name in ["shapes", "shapes_negative", "textures", "colours", "clip"]:
            shapes.write(folder, name)
    return folder


@pytest.fixture(scope="session")
def clip(world):
    """The pretrained tiny CLIP."""
    return common.load_clip(f"local-dir:{world}/shapes/clip", "openai", "cpu", "fp32")


@pytest.fixture
def fit(world, tmp_path):
    """fit(method, ...) runs method.main on the small world; fit.rows() are its records."""

    def fit(method, **options):
        usual = {"shots": 1, "epochs": 1, "device": "cpu", "data": str(world), "out": str(tmp_path)}
        return method.main(method.Config(**usual | options))

    def rows():
        path = tmp_path / "results.jsonl"
        return [json.loads(line) for line in path.open()] if path.exists() else []

    fit.rows = rows
    return fit


@pytest.fixture
def shell(world, tmp_path, monkeypatch, capsys):
    """shell(script, ...) runs a script as its command line would: (exit code, stdout, stderr)."""

    def shell(script, *arguments):
        usual = ["--data", str(world), "--out", str(tmp_path), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [script, *usual, *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(HERE / script), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return shell
