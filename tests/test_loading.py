"""Loading CLIP: precisions, weights files, fingerprints, and what is refused."""

import json
import os

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.conftest import NAMES, built, gradients, toy
from tests.test_clip import close
from tests.tools import shapes

SMALL = {key: value for key, value in shapes.MODEL.items() if key != "quick_gelu"}


def described(folder, **changes):
    """A local-dir model with random weights: the tiny CLIP's configuration with changes."""
    text, image = changes.pop("text", {}), changes.pop("vision", {})
    model = {**shapes.MODEL, **changes}
    model["text_cfg"] = {**model["text_cfg"], "layers": 1, **text}
    model["vision_cfg"] = {**model["vision_cfg"], "layers": 1, **image}
    content = {"model_cfg": model}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    state = open_clip.create_model(f"local-dir:{folder}").state_dict()
    save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def load(name, pretrained="", precision="fp32"):
    return common.load_clip(name, pretrained, "cpu", precision)


@pytest.fixture
def small(monkeypatch):
    """open_clip's ViT-B-16 becomes as small as the tiny CLIP; returns one with random weights."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16", SMALL)
    torch.manual_seed(0)
    return open_clip.CLIP(**SMALL, quick_gelu=False).eval()


def test_a_loaded_clip_is_frozen_and_in_eval_mode(clip):
    assert not any(p.requires_grad for p in clip.parameters())
    assert not any(module.training for module in clip.modules())


def test_a_clip_knows_its_scale_size_colours_and_device(clip):
    assert clip.scale.item() == pytest.approx(clip.logit_scale.exp().item())
    assert (clip.image_size, clip.device, clip.half) == (32, torch.device("cpu"), None)
    assert clip.mean.flatten().tolist() == pytest.approx(shapes.MEAN)
    assert clip.std.flatten().tolist() == pytest.approx(shapes.STD)
    assert len(clip.blocks()) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"custom_text": True, "multimodal_cfg": {"width": 128, "layers": 1, "heads": 2}},
        {"custom_text": True, "init_logit_bias": -10},
        {"text": {"no_causal_mask": True}},
        {"vision": {"attentional_pool": True}},
        {"vision": {"qk_norm": True}},
        {"text": {"scale_heads": True}},
        {"text": {"proj_bias": True}},
    ],
    ids=["CoCa", "CustomTextCLIP", "not causal", "attention pooling", "norms", "scales", "bias"],
)
def test_a_model_with_other_towers_is_refused(tmp_path, changes):
    if "multimodal_cfg" in changes:
        changes = {**changes, "text": {"embed_cls": True, "output_tokens": True}}
    name = described(tmp_path, **changes)
    with pytest.raises(common.Error, match="class CLIP") as refusal:
        load(name)
    assert name in str(refusal.value)


def test_layer_scale_is_supported(tmp_path):
    scaled = {"ls_init_value": 0.5}
    clip = load(described(tmp_path, vision=scaled, text=scaled))
    images = torch.rand(1, 3, 32, 32)
    rows = common.encode_image(clip, images, patches=True)[0]
    assert close(rows, clip.encode_image(images), 1e-6)
    names = common.embed_names(clip, NAMES, 0)
    ids = clip.tokenize([f"{name.replace('_', ' ')}." for name in NAMES])
    assert close(common.encode_prompts(clip, names, names.sos[:, :0]), clip.encode_text(ids))


def same_features(clip, model):
    images, ids = torch.randn(2, 3, 32, 32), clip.tokenize(["a photo of a cat."])
    same_images = close(clip.encode_image(images), model.encode_image(images))
    return same_images and close(clip.encode_text(ids), model.encode_text(ids))


@pytest.mark.parametrize("kind", ["safetensors", "plain", "nested", "of many GPUs"])
def test_a_weights_file_gives_the_model_that_it_was_saved_from(tmp_path, small, kind):
    state, path = small.state_dict(), str(tmp_path / "weights.pt")
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    contents = {"plain": state, "nested": {"state_dict": state}, "of many GPUs": prefixed}
    if kind == "safetensors":
        path = str(tmp_path / "weights.safetensors")
        save_file(state, path)
    else:
        torch.save(contents[kind], path)
    assert same_features(load("ViT-B-16", path), small)


@pytest.mark.filterwarnings("ignore")  # torch.jit, which OpenAI's files were made with, is old
def test_openais_archives_are_read_with_quick_gelu(tmp_path, small):
    quick = open_clip.CLIP(**SMALL, quick_gelu=True).eval()
    quick.load_state_dict(small.state_dict())
    ids = open_clip.get_tokenizer("ViT-B-16")(["a"])
    archive = torch.jit.trace(quick, (torch.zeros(1, 3, 32, 32), ids), check_trace=False)
    archive.save(str(tmp_path / "ViT-B-16.pt"))
    clip = load("ViT-B-16", str(tmp_path / "ViT-B-16.pt"))
    assert same_features(clip, quick) and not same_features(clip, small)


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_weights_file_with_code_in_it_runs_none_and_is_refused(tmp_path, small):
    torch.save(small.state_dict() | {"more": Code(tmp_path / "made")}, tmp_path / "model.pt")
    with pytest.raises(common.Error, match="ViT-B-16"):
        load("ViT-B-16", str(tmp_path / "model.pt"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4broken"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_weights_file_that_is_none_is_refused(tmp_path, small, content, suffix):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(common.Error, match="ViT-B-16"):
        load("ViT-B-16", str(path))


@pytest.mark.parametrize("tag, quick", [("openai", True), ("laion2b_s34b_b88k", False)])
def test_quick_gelu_follows_the_pretrained_tag(tmp_path, monkeypatch, small, tag, quick):
    expected = open_clip.CLIP(**SMALL, quick_gelu=quick).eval()
    other = open_clip.CLIP(**SMALL, quick_gelu=not quick).eval()
    other.load_state_dict(expected.state_dict())
    path = str(tmp_path / "weights.safetensors")
    save_file(expected.state_dict(), path)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **more: path)
    clip = load("ViT-B-16", tag)
    assert same_features(clip, expected) and not same_features(clip, other)


@pytest.mark.parametrize("method", [coop, dpt, upt, enprompt, softcpt], ids=lambda m: m.__name__)
def test_the_draws_of_a_new_model_leave_a_prompts_start_alone(fit, clip, monkeypatch, method):
    starts, counts = [], iter([1, 2, 2])

    def load_clip(cfg):
        torch.rand(next(counts))
        return clip

    monkeypatch.setattr(common, "load_clip", load_clip)
    monkeypatch.setattr(method, "train", lambda *args: starts.append(args[-1].state_dict()))
    monkeypatch.setattr(common, "evaluate", lambda *args: 0.0)
    dataset = "textures,colours" if method is softcpt else "textures"
    for seed in 1, 1, 2:
        fit(method, dataset=dataset, seed=seed)
    first, again, other = starts
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert not all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_the_fingerprint_sees_weights_activation_heads_and_colours():
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
    assert fingerprint() == found[0] and len(set(found)) == 5


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("ViT-B-61", "openai", "cpu"), "ViT-B-61"),
        (("ViT-B-16", "openia", "cpu"), "openia"),
        (("local-dir:nowhere", "", "cpu"), "nowhere"),
        (("ViT-B-16", "openai", "cuda:99"), "cuda:99"),
        (("ViT-B-16", "openai", "abacus"), "abacus"),
    ],
)
def test_an_unknown_model_tag_folder_or_device_is_named(arguments, said):
    with pytest.raises(common.Error, match=said):
        common.load_clip(*arguments)


@pytest.mark.parametrize("colours", [{"std": [0.2, 0.0, 0.2]}, {"mean": [0.5, 0.5], "std": [1, 1]}])
def test_colours_that_cannot_be_are_refused(tmp_path, colours):
    name = described(tmp_path)
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preprocess_cfg": colours}))
    with pytest.raises(common.Error, match="image mean and std"):
        load(name)


def test_random_weights_are_the_same_in_every_process(small):
    torch.manual_seed(3)
    first = load("ViT-B-16")
    torch.manual_seed(4)
    assert load("ViT-B-16").fingerprint == first.fingerprint


def test_the_fingerprint_does_not_depend_on_how_torch_prints_a_layer(monkeypatch):
    before = built().fingerprint
    monkeypatch.setattr(torch.nn.LayerNorm, "extra_repr", lambda self: "another version")
    assert built().fingerprint == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_its_name_is_refused():
    with pytest.raises(common.Error, match="--device cuda"):
        common.load_clip("ViT-B-16", "", "cuda")


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.02), ("amp", 0.004)])
def test_half_precision_gives_nearly_the_same_features(world, clip, precision, tolerance):
    half = load(f"local-dir:{world}/shapes/clip", "", precision)
    assert half.half == {"bf16": torch.bfloat16, "amp": torch.float16}[precision]
    assert half.visual.transformer.resblocks[0].mlp.c_fc.weight.dtype == half.half
    assert half.ln_final.weight.dtype == half.positional_embedding.dtype == torch.float32
    assert half.fingerprint == clip.fingerprint
    images = common.views(clip, [item[0] for item in toy().train])
    V = (0.02 * torch.randn(1, 4, 128)).requires_grad_()
    rows = torch.randn(2, 128).requires_grad_()
    features, slopes = [], []
    for model in clip, half:
        f = common.encode_image(model, images, lambda i, tokens: rows)
        w = common.encode_prompts(model, common.embed_names(model, NAMES, 4), V)
        assert f.dtype == w.dtype == torch.float32
        features.append([f, w])
        slopes.append(gradients(f.sum() + w.sum(), [V, rows]))
    for reference, ours in zip(*features, strict=True):
        assert (ours - reference).norm() < tolerance * reference.norm()
    for reference, ours in zip(*slopes, strict=True):
        assert (ours - reference).norm() < 5 * tolerance * reference.norm()
