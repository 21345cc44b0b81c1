"""Loading CLIP: weights files, precisions, fingerprints, and what is refused."""

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

import common
from tests.conftest import (
    METHODS,
    NAMES,
    Code,
    built,
    close,
    gradients,
    normalized,
    tiny,
    toy,
)
from tests.tools import shapes

VISION = {"image_size": 32, "layers": 1, "width": 48, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
SMALL = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
LARGE = SMALL | {"vision_cfg": VISION | {"layers": 2}}
WIDE = SMALL | {"vision_cfg": VISION | {"width": 64}}


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """open_clip's ViT-B-16 becomes a small model; returns one with random weights. The tests run in
    an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name, quick in ("ViT-B-16", {}), ("ViT-B-16-quickgelu", {"quick_gelu": True}):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, SMALL | quick)
    return model(1)


def model(seed, config=SMALL, **options):
    torch.manual_seed(seed)
    return open_clip.CLIP(**config, **options).eval()


def load(model="ViT-B-16", pretrained="", device="cpu", **options):
    cfg = common.Config(model=model, pretrained=pretrained, device=device, **options)
    return common.load_clip(cfg)


def refusal(*arguments, **options):
    """load()'s message, which is one short line in our words."""
    with pytest.raises(common.Error) as error:
        load(*arguments, **options)
    line = str(error.value)
    assert "\n" not in line and len(line) <= 300 and "weights_only" not in line
    return line


def local(folder, text=None, vision=None, **changes):
    """The name of a local-dir model with random weights: SMALL with changes."""
    model = SMALL | {"text_cfg": TEXT | (text or {}), "vision_cfg": VISION | (vision or {})}
    content = json.dumps({"model_cfg": model | changes})
    (folder / "open_clip_config.json").write_text(content)
    state = open_clip.create_model(f"local-dir:{folder}").state_dict()
    state = {name: x + 0.02 * torch.randn_like(x) for name, x in state.items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def save(content, path="weights.pt"):
    """Writes bytes, a TorchScript archive, or tensors in either format; returns the path."""
    if isinstance(content, bytes):
        open(path, "wb").write(content)
    elif isinstance(content, torch.jit.ScriptModule):
        content.save(path)
    elif path.endswith("safetensors"):
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def traced(model):
    """A TorchScript archive with the tensors of OpenAI's."""
    model.attn_mask = model._buffers.pop("attn_mask")  # there it is no buffer
    for name, size in SIZES.items():
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(size))
    ids = open_clip.get_tokenizer("ViT-B-16")(["a"])
    return torch.jit.trace(model, (torch.zeros(1, 3, 32, 32), ids), check_trace=False)


def same_features(clip, model):
    images, ids = torch.randn(2, 3, 32, 32), clip.tokenize(["a photo of a cat."])
    same_images = close(clip.encode_image(images), model.encode_image(images))
    return same_images and close(clip.encode_text(ids), model.encode_text(ids))


def renamed(state, change):
    return {change(name): tensor for name, tensor in state.items()}


def test_a_loaded_clip_is_frozen_and_knows_its_sizes(clip):
    assert not any(p.requires_grad for p in clip.parameters())
    assert not any(module.training for module in clip.modules())
    assert clip.scale.item() == pytest.approx(clip.logit_scale.exp().item())
    assert (clip.image_size, clip.device, clip.half) == (32, torch.device("cpu"), None)
    assert (clip.activation, clip.precision) == ("QuickGELU", "fp32")
    assert clip.mean.flatten().tolist() == pytest.approx(shapes.MEAN)
    assert clip.std.flatten().tolist() == pytest.approx(shapes.STD)
    assert len(clip.blocks()) == 4
    odd = built()
    assert (odd.d_t, odd.d_v, odd.D) == (32, 48, 24)


@pytest.mark.parametrize(
    "changes",
    [
        {"custom_text": True, "multimodal_cfg": TEXT, "text": {"embed_cls": True}},
        {"custom_text": True, "init_logit_bias": -10},
        {"text": {"no_causal_mask": True}},
        {"text": {"pool_type": "last"}},
        {"vision": {"pool_type": "avg"}},
        {"embed_dim": 48, "vision": {"attentional_pool": True}},
        {"vision": {"qk_norm": True}},
        {"text": {"scale_heads": True}},
        {"text": {"proj_bias": True}},
    ],
    ids="CoCa SigLIP not-causal last-token mean attention norms scales bias".split(),
)
def test_a_model_whose_encoders_differ_is_refused(tmp_path, changes):
    assert "ViT-B-16" in refusal(local(tmp_path, **changes), "openai")


def test_layer_scale_is_supported(tmp_path):
    scaled = {"ls_init_value": 0.5}  # load_clip compares the features
    load(local(tmp_path, vision=scaled, text=scaled), "openai")


SIZES = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}  # OpenAI's own keys
GOOD = {
    "safetensors": lambda state: state,
    "plain": lambda state: state,
    "nested": lambda state: {"state_dict": state},
    "of many GPUs": lambda state: renamed(state, "module.{}".format),
    "OpenAI's keys": lambda state: state | {k: torch.tensor(n) for k, n in SIZES.items()},
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_weights_file_gives_the_model_that_it_was_saved_from(small, capsys, kind):
    suffix = "safetensors" if kind == "safetensors" else "pt"
    path = save(GOOD[kind](small.state_dict()), f"weights.{suffix}")
    clip = load("ViT-B/16", path)
    assert same_features(clip, small) and clip.activation == "GELU"
    assert load("ViT-B-16-quickgelu", path).activation == "QuickGELU"
    first, second = capsys.readouterr().out.splitlines()
    assert "using GELU" in first and "--model ViT-B-16-quickgelu" in first
    assert "using QuickGELU" in second


@pytest.mark.filterwarnings("ignore")  # torch.jit, which OpenAI's files were made with, is old
def test_openais_own_archive_is_read_with_quick_gelu_and_no_other(small, monkeypatch, capsys):
    quick = model(1, quick_gelu=True)
    path = save(traced(quick))
    assert "state dict" in refusal("ViT-B-16", path)
    url = f"https://host/{common.sha256(open(path, 'rb').read())}/ViT-B-16.pt"
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"url": url})
    clip = load("ViT-B-16", path)
    assert same_features(clip, quick) and not same_features(clip, small)
    assert "using QuickGELU" in capsys.readouterr().out


BAD = {
    "transformers": lambda state: renamed(state, "text_model.{}".format),
    "Lightning": lambda state: {"state_dict": renamed(state, "model.{}".format)},
    "NumPy scalar": lambda state: {"state_dict": state, "epoch": np.float64(1)},
    "code": lambda state: state | {"more": Code("made")},
    "list": lambda state: [*state.values()],
    "nothing": lambda state: {},
    "text": lambda state: b"hello",
    "empty": lambda state: b"",
    "broken": lambda state: b"PK\3\4broken",
    "more layers": lambda state: model(1, LARGE).state_dict(),
    "other widths": lambda state: model(1, WIDE).state_dict(),
    "fewer layers": lambda state: {k: v for k, v in state.items() if "resblocks.0.ln" not in k},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_weights_file_of_another_kind_or_model_is_refused(small, tmp_path, kind):
    line = refusal("ViT-B-16", save(BAD[kind](small.state_dict())))
    other_model = [*BAD].index(kind) > [*BAD].index("broken")
    assert ("another model" if other_model else "state dict") in line and "ViT-B-16" in line
    if kind in ("text", "empty", "broken"):
        assert "state dict" in refusal("ViT-B-16", save(BAD[kind]({}), "weights.safetensors"))
    assert not (tmp_path / "made").exists()  # no code was run


@pytest.mark.parametrize("tag, quick", [("openai", True), ("laion2b_s34b_b88k", False)])
def test_quick_gelu_follows_the_pretrained_tag(monkeypatch, tag, quick):
    expected, other = model(1, quick_gelu=quick), model(1, quick_gelu=not quick)
    path = save(expected.state_dict(), "weights.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **more: path)
    clip = load("ViT-B-16", tag)
    assert same_features(clip, expected) and not same_features(clip, other)


@pytest.mark.parametrize(
    "name, tag, right",
    [("ViT-B-16", "openai", "ViT-B-16-quickgelu"), ("ViT-B-16", "laion2b_s34b_b88k", "ViT-B-16")]
    + [("ViT-B-16-quickgelu", "openai", "ViT-B-16-quickgelu")],
)
def test_offline_the_advice_names_the_model_that_fits_the_weights(monkeypatch, name, tag, right):
    def offline(*arguments, **more):
        raise OSError("no network\n" * 100)

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    assert f"--model {right} --pretrained FILE" in refusal(name, tag)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"model": "ViT-B-61"}, "ViT-B-16"),  # a near name
        ({"pretrained": "openia"}, "openia"),
        ({"model": "local-dir:nowhere", "pretrained": "openai"}, "nowhere"),
        ({"model": "local-dir:nowhere", "pretrained": "w.pt"}, "--pretrained w.pt"),
        ({"model": "hf-hub:a/b", "pretrained": "laion2b"}, "--pretrained laion2b"),
        ({"model": "", "dataset": "textures", "pretrained": "w.pt"}, "--pretrained w.pt"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"device": "abacus"}, "--device abacus"),
    ]
    + [({"device": "cuda"}, "--device cuda")] * (not torch.cuda.is_available()),
    ids=str,
)
def test_a_model_weights_or_device_that_cannot_be_is_refused(rendered, options, said):
    assert said in refusal(**{"data": str(rendered)} | options)


@pytest.mark.parametrize("name", METHODS)
def test_initial_values_depend_on_the_seed_and_not_on_the_model(fit, clip, monkeypatch, name):
    method, found, counts = METHODS[name], [], iter([1, 2, 2])

    def load_clip(cfg):
        torch.rand(next(counts))
        return clip

    monkeypatch.setattr(common, "load_clip", load_clip)
    monkeypatch.setattr(method, "train", lambda *args: found.append(args[-1].state_dict()))
    monkeypatch.setattr(common, "evaluate", lambda *args: 0.0)
    dataset = "textures,colours" if name == "softcpt" else "textures"
    for seed in 1, 1, 2:
        fit(method, dataset=dataset, seed=seed)
    first, again, other = found
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert not all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_the_fingerprint_sees_weights_activation_heads_and_colours(monkeypatch):
    def fingerprint(change=None, **options):
        model = built(**options).model
        if change:
            change(model)
        return common.Clip(model, None).fingerprint

    def other_weight(model):
        model.visual.proj[0, 0] += 1e-3

    def other_colours(model):
        model.visual.image_std = (0.1, 0.2, 0.3)

    found = [fingerprint(), fingerprint(other_weight), fingerprint(other_colours)]
    found += [fingerprint(quick_gelu=False), fingerprint(head_width=24)]
    assert len(set(found)) == 5
    monkeypatch.setattr(torch.nn.LayerNorm, "extra_repr", lambda self: "another version of torch")
    assert fingerprint() == found[0]


def test_random_weights_are_the_same_in_every_process():
    found = []
    for seed in 3, 4:
        torch.manual_seed(seed)
        found.append(load().fingerprint)
    assert found[0] == found[1]


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.02), ("amp", 0.004)])
def test_half_precision_gives_nearly_the_same_features(rendered, clip, precision, tolerance):
    half = tiny(rendered, precision)
    assert half.half == {"bf16": torch.bfloat16, "amp": torch.float16}[precision]
    assert half.visual.transformer.resblocks[0].mlp.c_fc.weight.dtype == half.half
    assert half.ln_final.weight.dtype == half.positional_embedding.dtype == torch.float32
    assert half.fingerprint == clip.fingerprint
    images = normalized(clip, toy())
    V = (0.02 * torch.randn(1, 4, 128)).requires_grad_()
    rows = torch.randn(2, 128).requires_grad_()
    features, slopes = [], []
    for model in clip, half:
        f = common.encode_image(model, images, lambda i, X: rows)
        w = common.encode_prompts(model, common.embed_names(model, NAMES, 4), V)
        assert f.dtype == w.dtype == torch.float32
        features.append([f, w])
        slopes.append(gradients(f.sum() + w.sum(), [V, rows]))
    for reference, ours in zip(*features, strict=True):
        assert (ours - reference).norm() < tolerance * reference.norm()
    for reference, ours in zip(*slopes, strict=True):
        assert (ours - reference).norm() < 5 * tolerance * reference.norm()
