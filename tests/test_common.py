"""The towers, the assembly of prompts, the schedule, images, loading, evaluation and runs."""

import json
import math
import re
import resource
import subprocess
import sys
from dataclasses import fields
from functools import partial

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import transforms
from torchvision.transforms import functional as vision

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests import shapes
from tests.conftest import (
    HERE,
    NAMES,
    gradients,
    interrupted,
    plain_image,
    plain_prompts,
    plain_text,
    toy,
    unit,
    words,
)

METHODS = [coop, dpt, upt, enprompt, softcpt]


def close(a, b, tolerance=1e-5):
    """Whether a equals b up to a share of b's largest value."""
    return (a - b).abs().max() <= tolerance * b.abs().max() and b.abs().max() > 0


# --- the text tower


TASKS = [0] * 3 + [1] * 11 + [2] * 6  # groups that begin within eight neighbours, and end


@pytest.mark.parametrize(
    "group", [None, TASKS, [1, 0] * 10, range(20)], ids=["one", "tasks", "mixed", "each"]
)
def test_shared_prefixes_give_the_features_and_gradients_of_77_tokens(clip, group):
    torch.manual_seed(0)
    classes = [*NAMES, *open_clip.IMAGENET_CLASSNAMES[: 20 - len(NAMES)]]
    rows = torch.tensor([0] * 20 if group is None else group)
    ctx = (0.1 * torch.randn(rows.max() + 1, 5, 128)).requires_grad_()
    names = common.embed_names(clip, classes, 5)
    ours = common.encode_prompts(clip, names, ctx, None if group is None else rows)
    plain = plain_prompts(clip, classes, ctx[rows])
    weight = torch.randn_like(plain)
    assert close(ours, plain)
    assert close(*(gradients((x * weight).sum(), [ctx])[0] for x in (ours, plain)))


@pytest.mark.parametrize("case", ["contexts", "class-aware prompts", "meta-network"])
def test_two_threads_sum_the_same_gradient_every_time(clip, request, case):
    """As repeating a killed run needs; plain indexing adds up rows used twice in any order."""
    torch.manual_seed(0)
    texts = list(open_clip.IMAGENET_CLASSNAMES[:300])
    if case == "contexts":
        x = torch.randn(2, 8, 128, requires_grad=True)
        names, group = common.embed_names(clip, texts, 8), torch.randint(2, (300,))
        run = partial(common.encode_prompts, clip, names, x, group, "middle")
    elif case == "meta-network":
        cfg = softcpt.Config(variant="CATA", n_ctx=2, task_n_ctx=2, class_n_ctx=2)
        prompt, of = softcpt.SoftContext(cfg, 128, 128, 3, 300), torch.randint(3, (300,))
        x, zeros = prompt.task_ctx, torch.zeros_like(of)
        titles = common.embed_names(clip, ["a", "b", "c"], 2)
        pair = [common.embed_names(clip, texts, 2)] * 2
        run = partial(softcpt.text_features, clip, prompt, titles, zeros[:3], pair, zeros, of)
    else:
        x, top = torch.randn(40, 128, requires_grad=True), torch.randint(40, (32, 10))
        prompt, images = dpt.DualPrompt(dpt.Config(), clip, 40), torch.randn(32, 3, 32, 32)
        run = partial(dpt.encode, clip, prompt, images, x, top)
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    seen = set()
    for _ in range(6):
        out = run()[0] if case == "class-aware prompts" else run()
        seen.add(gradients(out.square().sum(), [x])[0].numpy().tobytes())
    assert len(seen) == 1


def test_untouched_embeddings_give_clips_own_text_features(clip):
    ids = clip.tokenize(["a photo of a cat.", "art of the very large striped star."])
    x = clip.token_embedding(ids)
    assert close(plain_text(clip, x, ids.argmax(1)), clip.encode_text(ids))
    for P in 1, 3:  # where the first P tokens are the same, one prefix is enough
        ours = common.encode_text(clip, x[:, :P], x[:, P:], ids.argmax(1), torch.arange(2))
        assert close(ours, clip.encode_text(ids))


@pytest.mark.parametrize(
    "context, position, sentence",
    [
        ("a photo of a", "end", "a photo of a {}."),
        ("a photo of a", "middle", "a photo {} of a."),
        ("a photo of a", "front", "{} a photo of a."),
        ("a photo of", "middle", "a {} photo of."),
    ],
)
def test_real_words_as_context_give_the_sentence_that_they_spell(clip, context, position, sentence):
    V, names = words(clip, context), [*NAMES, "dr. st"]
    ids = clip.tokenize([sentence.format(c.replace("_", " ")) for c in names])
    tokens = common.embed_names(clip, names, V.shape[1])
    ours = common.encode_prompts(clip, tokens, V, None, position)
    each = V.expand(len(names), -1, -1).clone().requires_grad_()
    own = common.encode_prompts(clip, tokens, each, torch.arange(len(names)), position)
    one = common.encode_prompts(
        clip, tokens, V, torch.arange(len(names)), position
    )  # row 0 for all
    assert torch.equal(one, ours)
    assert close(ours, clip.encode_text(ids)) and close(own, clip.encode_text(ids))
    first = gradients(own[0].sum(), [each])[0]
    assert first[0].abs().min() > 0 and first[1:].abs().max() == 0  # a class feels its own context


def test_a_name_that_ends_in_a_full_stop_keeps_its_tokens(clip):
    ours = common.encode_prompts(clip, common.embed_names(clip, ["st."], 4), words(clip, "a b c d"))
    assert close(ours, clip.encode_text(clip.tokenize(["a b c d st.."])))


def test_a_name_may_fill_the_77_tokens_and_no_more(clip):
    assert common.embed_names(clip, ["cat " * 57 + "cat"], 16).eot.tolist() == [76]
    with pytest.raises(common.Error, match="class name 'dog dog.* too long"):
        common.embed_names(clip, ["cat", "dog " * 58 + "dog"], 16)


def test_zero_shot_weights_are_the_unit_features_of_every_template(clip):
    templates = ["a photo of a {}.", "{} texture."]
    w = common.zero_shot_weights(clip, toy(), templates)
    for t, template in enumerate(templates):
        ids = clip.tokenize([template.format(c.replace("_", " ")) for c in NAMES])
        assert close(w[:, t], unit(clip.encode_text(ids)))


# --- the image tower


def test_without_prompts_the_image_features_are_clips_own(clip, odd, resnet):
    for model in clip, odd, resnet:
        size = 64 if model is resnet else 32
        images = torch.rand(3, 3, size, size)
        assert close(common.encode_image(model, images), model.encode_image(images), 1e-6)
        f = common.unit_features(model, images)
        assert close(f, unit(model.encode_image(images)), 1e-6)


@pytest.mark.parametrize(
    "given",
    [{-1: (2, 48)}, {0: (2, 48), 1: (3, 2, 48), 2: (5, 48)}, {-1: (4, 48), 1: (4, 48)}]
    + [{0: (3, 4, 48), 2: (0, 48)}],
    ids=["shallow", "deep", "mixed", "dropped"],
)
def test_prompt_rows_join_stay_are_replaced_and_leave(odd, given):
    torch.manual_seed(0)
    images, asked = torch.rand(3, 3, 32, 32), []
    rows = {i: torch.randn(shape).requires_grad_() for i, shape in given.items()}

    def prompts(i, tokens):
        asked.append((i, tokens.shape))
        return rows.get(i)

    ours = common.encode_image(odd, images, prompts, patches=True)
    plain = plain_image(odd, images, rows, patches=True)
    assert asked == [(i, (3, 17, 48)) for i in (-1, 0, 1, 2)]  # never with the rows themselves
    assert close(ours[0], plain[0]) and close(ours[1], plain[1])
    assert close(common.encode_image(odd, images, prompts), plain[0])
    weight = torch.randn(3, 24)
    for a, b in zip(
        *(gradients((x[0] * weight).sum(), rows.values()) for x in (ours, plain)), strict=True
    ):
        assert not b.numel() or close(a, b)


def test_only_rows_in_use_are_computed_and_each_once(odd):
    rows, images, counted = torch.randn(4, 48), torch.rand(2, 3, 32, 32), []
    wanted = {"deep": 17, "shallow": 21}  # the class token, 16 patches and, if they stay, 4 prompts
    hooks = {"deep": lambda i, x: rows if i >= 0 else None}
    hooks["shallow"] = lambda i, x: rows if i == -1 else None
    for kind, hook in hooks.items():
        blocks = odd.visual.transformer.resblocks
        handles = [
            b.mlp.register_forward_hook(lambda m, x, y: counted.append(y.shape[1])) for b in blocks
        ]
        common.encode_image(odd, images, hook)
        for handle in handles:
            handle.remove()
        assert counted == [wanted[kind]] * (len(blocks) - 1) + [1], kind
        counted.clear()


def test_a_hook_sees_the_tokens_that_enter_its_block(odd):
    seen, images = {}, torch.rand(2, 3, 32, 32)
    common.encode_image(odd, images, lambda i, tokens: seen.update({i: tokens}))
    x = odd.visual.ln_pre(seen[-1])
    for i, block in enumerate(odd.visual.transformer.resblocks):
        assert close(seen[i], x)
        x = block(x)


def test_a_resnet_takes_no_prompts(resnet):
    images = torch.rand(1, 3, 64, 64)
    for more in {"prompts": lambda i, tokens: None}, {"patches": True}:
        with pytest.raises(common.Error, match="ViT-B-16"):
            common.encode_image(resnet, images, **more)


# --- loading CLIP


def described(folder, **changes):
    """A local-dir model with random weights: the tiny CLIP's configuration with changes."""
    text, image = changes.pop("text", {}), changes.pop("vision", {})
    model = {**shapes.MODEL, **changes}
    model["text_cfg"] = {**model["text_cfg"], "layers": 1, **text}
    model["vision_cfg"] = {**model["vision_cfg"], "layers": 1, **image}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    state = open_clip.create_model(f"local-dir:{folder}").state_dict()
    save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("CoCa", {"custom_text": True, "multimodal_cfg": {"width": 128, "layers": 1, "heads": 2}}),
        ("CustomTextCLIP", {"custom_text": True, "init_logit_bias": -10}),
        ("CLIP", {"text": {"no_causal_mask": True}}),
        ("CLIP", {"text": {"pool_type": "last"}}),
        ("CLIP", {"text": {"proj_bias": True}}),
        ("CLIP", {"vision": {"pool_type": "avg"}}),
        ("CLIP", {"vision": {"attentional_pool": True}}),
    ],
    ids=["CoCa", "SigLIP", "not causal", "last token", "bias", "mean pooling", "attention pooling"],
)
def test_a_model_with_other_towers_is_refused(tmp_path, kind, changes):
    if kind == "CoCa":
        changes = {**changes, "text": {"embed_cls": True, "output_tokens": True}}
    with pytest.raises(common.Error, match=rf"not supported: .*\b{kind}\b"):
        common.load_clip(described(tmp_path, **changes), "")


def test_layer_scale_is_supported(tmp_path):
    changes = {"ls_init_value": 0.5}
    clip = common.load_clip(described(tmp_path, vision=changes, text=changes), "")
    images = torch.rand(1, 3, 32, 32)
    assert close(common.encode_image(clip, images), clip.encode_image(images), 1e-6)


@pytest.mark.parametrize("tag, quick", [("openai", True), ("laion2b_s34b_b88k", False)])
def test_quick_gelu_follows_the_pretrained_tag(tmp_path, monkeypatch, tag, quick):
    small = {k: v for k, v in shapes.MODEL.items() if k != "quick_gelu"}
    torch.manual_seed(0)
    expected = open_clip.CLIP(**small, quick_gelu=quick).eval()
    other = open_clip.CLIP(**small, quick_gelu=not quick).eval()
    other.load_state_dict(expected.state_dict())
    save_file(expected.state_dict(), tmp_path / "weights.safetensors")
    path = str(tmp_path / "weights.safetensors")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16", small)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **more: path)
    clip, images = common.load_clip("ViT-B-16", tag), torch.randn(2, 3, 32, 32)
    ids = clip.tokenize(["a photo of a cat."])
    for model, same in (expected, True), (other, False):
        assert close(clip.encode_image(images), model.encode_image(images)) == same
        assert close(clip.encode_text(ids), model.encode_text(ids)) == same
    common.load_clip.cache_clear()  # it was no ViT-B-16


def test_a_loaded_clip_is_frozen_and_in_eval_mode(clip):
    assert not any(p.requires_grad for p in clip.parameters())
    assert not any(module.training for module in clip.modules())


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_on_a_cpu_freed_memory_is_kept_for_the_next_step(clip):
    def pages():  # handed over and zeroed by the system so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    new = []
    for _ in range(8):  # the first ones may take places of the heap that were never in use
        before = pages()
        torch.ones(2**24)  # 64 MiB
        new.append(pages() - before)
    assert min(new) < 2**26 / resource.getpagesize() / 16


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("ViT-B-61", "openai"), "ViT-B-16"),
        (("ViT-B-16", "openia"), "openia"),
        (("local-dir:nowhere", ""), "nowhere"),
        (("ViT-B-16", "openai", "cuda:99"), "cuda:99"),
    ],
)
def test_an_unknown_model_tag_folder_or_device_is_named(arguments, said):
    with pytest.raises(common.Error, match=said):
        common.load_clip(*arguments)


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.02), ("amp", 0.004)])
def test_half_precision_gives_nearly_the_same_features(world, clip, precision, tolerance):
    half = common.load_clip(f"local-dir:{world}/shapes/clip", "", "cpu", precision)
    assert half.half_dtype == {"bf16": torch.bfloat16, "amp": torch.float16}[precision]
    assert half.visual.transformer.resblocks[0].mlp.c_fc.weight.dtype == half.half_dtype
    assert half.ln_final.weight.dtype == half.positional_embedding.dtype == torch.float32
    assert half.fingerprint == clip.fingerprint
    images = common.views(clip, [item[0] for item in toy().train])
    V = (0.02 * torch.randn(1, 4, 128)).requires_grad_()
    rows = torch.randn(2, 128).requires_grad_()
    found = []
    for model in clip, half:
        f = common.encode_image(model, images, lambda i, tokens: rows)
        w = common.encode_prompts(model, common.embed_names(model, NAMES, 4), V)
        assert f.dtype == w.dtype == torch.float32
        found.append([f, w, *gradients(f.sum() + w.sum(), [V, rows])])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < tolerance * b.norm() * (1 + 4 * (b.shape[0] != len(a)))


# --- optimiser and schedule


@pytest.mark.parametrize(
    "lr, warmup, E, values",
    [
        (0.002, 1, 50, {0: 1e-5, 1: 0.002, 2: 0.00199803, 25: 0.00106279, 49: 7.8853e-6}),
        (0.002, 1, 200, {100: 0.00101571, 199: 4.9344e-7}),
        (0.002, 1, 10, {9: 1.90983e-4}),
        (0.01, 10, 60, {0: 1e-5, 9: 1e-5, 10: 0.01, 11: 0.00999315, 59: 8.06647e-4}),
        (0.01, 10, 100, {99: 2.95596e-4}),
        (0.01, 1, 60, {59: 2.739e-5}),
    ],
)
def test_the_schedule_is_dassls(lr, warmup, E, values):
    p = torch.nn.Parameter(torch.zeros(1))
    group = {"params": [p], "lr": lr, "warmup": warmup}
    optimizer, scheduler = common.sgd_cosine([group], 0.5, E)
    for k in range(E):
        found = optimizer.param_groups[0]["lr"]
        cosine = 0.5 * lr * (1 + math.cos(math.pi * (k - warmup) / E))
        assert abs(found - (1e-5 if k < warmup else cosine)) < 1e-9
        assert found == pytest.approx(values.get(k, found), rel=2e-5)
        optimizer.step()
        scheduler.step()


def test_two_steps_are_sgd_with_momentum_and_weight_decay():
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer, _ = common.sgd_cosine([p], 0.1, 10, warmup=0)
    expected, velocity = [2.0, -1.0], [0.0, 0.0]
    for gradient in ([1.0, 3.0], [-2.0, 0.5]):
        common.step((p * torch.tensor(gradient)).sum(), optimizer)
        for i, g in enumerate(gradient):
            velocity[i] = 0.9 * velocity[i] + g + 5e-4 * expected[i]
            expected[i] -= 0.1 * velocity[i]
        assert p.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_training_and_keeps_the_last_good_epoch(clip, bad, tmp_path):
    cfg, prompt = coop.Config(out=str(tmp_path)), torch.nn.Linear(1, 1)
    optimizer, scheduler = common.sgd_cosine(prompt.parameters(), 0.1, 3)
    with pytest.raises(common.Error, match=f"{bad}.*--lr"):
        for epoch in common.training(cfg, clip, [], prompt, optimizer, scheduler, 3):
            good = {name: t.clone() for name, t in prompt.state_dict().items()}
            common.step(prompt(torch.ones(1)).sum() * (bad if epoch else 1.0), optimizer)
    (kept,) = common.run_folder(cfg).glob("*.safetensors")
    kept = common.restore(cfg, clip, path=kept)[0]
    assert all(torch.equal(kept[name], t) for name, t in good.items())


# --- few-shot picks and halves


def numbered(sizes, first, labels=(0, 1, 2)):
    """Items that are numbers, in groups of these sizes."""
    names = iter(range(first, first + sum(sizes)))
    return [(next(names), k, f"c{k}") for k, n in zip(labels, sizes, strict=True) for _ in range(n)]


@pytest.mark.parametrize(
    "seed, train, val",
    [
        (1, [4, 18, 27, 25, 37, 49, 40, 64], [107, 109, 106, 108, 118, 115, 127, 112]),
        (2, [27, 1, 2, 11, 43, 75, 52, 49], [109, 103, 100, 104, 117, 125, 124, 127]),
        (3, [7, 18, 17, 4, 56, 71, 63, 73], [109, 101, 100, 106, 127, 120, 119, 115]),
    ],
)
@pytest.mark.parametrize("labels", [(0, 1, 2), (2, 0, 1)], ids=["sorted", "unsorted"])
def test_few_shot_picks_are_coops(seed, train, val, labels):
    data = common.Dataset(
        "d", numbered([30, 3, 47], 0, labels), numbered([10, 2, 18], 100, labels), [7], "abc", ""
    )
    picked = common.sample_few_shot(data, 4, seed)
    assert [item[0] for item in picked.train] == train[:4] + [30, 31, 32] + train[4:]
    assert [item[0] for item in picked.val] == val[:4] + [110, 111] + val[4:]
    assert picked.test == [7] and common.sample_few_shot(data, 0, seed) == data
    eight = common.sample_few_shot(data, 8, seed)
    assert len(eight.train) == 8 + 3 + 8 and len(eight.val) == 4 + 2 + 4


def test_the_base_half_is_the_larger_and_both_are_relabelled():
    items = [(i, label, f"c{label}") for i, label in enumerate([4, 2, 0, 3, 1, 2])]
    data = common.Dataset("d", items, items[:3], items[3:], ["c0", "c1", "c2", "c3", "c4"], "")
    base, new = common.subset_classes(data, "base"), common.subset_classes(data, "new")
    assert base.classnames == ["c0", "c1", "c2"] and new.classnames == ["c3", "c4"]
    assert base.train == [(1, 2, "c2"), (2, 0, "c0"), (4, 1, "c1"), (5, 2, "c2")]
    assert new.train == [(0, 1, "c4"), (3, 0, "c3")]
    assert [item[0] for item in base.val] == [1, 2] and [item[0] for item in new.test] == [3]


# --- images and the loader


def photo(width, height):
    """A PIL picture with smooth and fine detail, too dull for bicubic to overshoot 8 bits."""
    torch.manual_seed(width)
    coarse = F.interpolate(torch.rand(1, 3, 9, 9), (height, width), mode="bilinear")[0]
    return vision.to_pil_image(0.2 + 0.4 * coarse + 0.2 * torch.rand(3, height, width))


@pytest.mark.parametrize("width, height", [(90, 61), (50, 120), (32, 32), (20, 27)])
def test_views_agree_with_the_pil_pipeline(clip, width, height):
    image, how = photo(width, height), transforms.InterpolationMode.BICUBIC
    end = [transforms.ToTensor(), transforms.Normalize(shapes.MEAN, shapes.STD)]
    test = transforms.Compose([transforms.Resize(32, how), transforms.CenterCrop(32), *end])
    level = 1 / 255 / min(shapes.STD)  # one step of 8 bits
    picture = vision.pil_to_tensor(image)
    assert (common.views(clip, [picture])[0] - test(image)).abs().max() < 1.01 * level
    boxes = [(3, 2, 17, 12), (0, 0, height, width), (5, 1, 8, 14)]
    mirror = [True, False, True]
    found = common.views(clip, [picture] * 3, boxes, mirror)
    for view, box, flip in zip(found, boxes, mirror, strict=True):
        crop = vision.resized_crop(image, *box, [32, 32], how)
        plain = transforms.Compose(end)(vision.hflip(crop) if flip else crop)
        assert (view - plain).abs().max() < 1.01 * level


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_a_picture_is_decoded_as_pil_reads_it(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    photo(20, 10).convert(mode).save(path)
    assert torch.equal(common.decode(path), vision.pil_to_tensor(Image.open(path).convert("RGB")))


def test_a_16_bit_picture_keeps_its_greys(tmp_path):
    Image.new("I;16", (2, 2), 257 * 100).save(tmp_path / "x.png")
    assert common.decode(tmp_path / "x.png").unique().tolist() == [100]


def counted(n):
    """A toy data set whose labels number its items."""
    return toy()._replace(train=[(item[0], i, "") for i, item in enumerate(toy(n).train)])


def test_an_epoch_has_no_image_twice_and_drops_a_short_batch_unless_alone(clip):
    for n, sizes in {10: [10], 32: [32], 40: [32], 100: [32, 32, 32]}.items():
        batches = common.loader(common.Config(), clip, counted(n))
        epochs = [[labels for _, labels in batches(epoch)] for epoch in (0, 1, 0)]
        assert [len(labels) for labels in epochs[0]] == sizes
        orders = [torch.cat(labels).tolist() for labels in epochs]
        assert len(set(orders[0])) == sum(sizes)
        assert orders[0] == orders[2] != orders[1] and orders[0] != sorted(orders[0])


def epoch_of(batches, epoch):
    """{label: view} of an epoch."""
    return {int(y): x for xs, ys in batches(epoch) for x, y in zip(xs, ys, strict=True)}


def test_views_depend_on_seed_and_epoch_and_frozen_features_are_theirs(clip):
    cfg, data = common.Config(batch_size=4), counted(8)
    seen = epoch_of(common.loader(cfg, clip, data), 1)
    again = epoch_of(common.loader(cfg, clip, data), 1)
    features = epoch_of(common.loader(cfg, clip, data, frozen=True), 1)
    later = epoch_of(common.loader(cfg, clip, data), 2)
    other = epoch_of(common.loader(common.Config(batch_size=4, seed=2), clip, data), 1)
    for i, view in seen.items():
        assert torch.equal(view, again[i])
        assert close(features[i], common.unit_features(clip, view[None])[0])
        assert not torch.equal(view, later[i]) and not torch.equal(view, other[i])


def test_repeated_views_come_back_every_so_many_epochs(clip):
    batches = common.loader(common.Config(), clip, counted(8), frozen=True, repeat=2)
    f = [epoch_of(batches, epoch) for epoch in range(4)]
    assert all(torch.equal(f[0][i], f[2][i]) and torch.equal(f[1][i], f[3][i]) for i in range(8))
    assert not any(torch.equal(f[0][i], f[1][i]) for i in range(8))


def test_pictures_beyond_the_memory_budget_are_decoded_anew(world, clip):
    data = common.load_dataset("shapes", world)
    data = data._replace(train=2 * data.train)  # two chunks of decoding
    x, y = (next(common.loader(common.Config(cache_gb=gb), clip, data)(0))[0] for gb in (1, 1e-9))
    assert torch.equal(x, y)


@pytest.mark.parametrize("name, low", [("toy", 0.08), ("shapes", 0.5)])
def test_crops_and_flips_are_those_of_random_resized_crop(clip, monkeypatch, name, low):
    area, ratio, flips = [], [], []

    def views(clip, pictures, boxes, mirror):
        area.extend(h * w / 10000 for _, _, h, w in boxes)
        ratio.extend(w / h for _, _, h, w in boxes)
        flips.extend(mirror)
        return torch.zeros(len(pictures), 3)

    monkeypatch.setattr(common, "views", views)
    square = torch.zeros(3, 100, 100, dtype=torch.uint8)
    data = toy()._replace(name=name, train=[(square, 0, "")] * 1600)
    assert len(list(common.loader(common.Config(), clip, data)(0))) == 50
    assert low - 0.01 < min(area) < low + 0.02 and 0.98 < max(area) <= 1
    draw, ranges = transforms.RandomResizedCrop.get_params, ([low, 1.0], [3 / 4, 4 / 3])
    usual = [math.prod(draw(square, *ranges)[2:]) / 10000 for _ in range(1600)]
    assert sum(area) / 1600 == pytest.approx(sum(usual) / 1600, abs=0.03)
    assert 0.73 < min(ratio) < 0.78 and 1.28 < max(ratio) < 1.38
    assert 0.45 < sum(map(bool, flips)) / 1600 < 0.55


# --- evaluation, options and runs


def test_accuracy_overall_and_per_class_of_known_logits():
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 2], [3, 0, 1], [0, 5, 1], [1, 0, 0]])
    overall, mean = common.evaluate(logits, torch.tensor([0, 0, 0, 1, 2]))
    assert overall == pytest.approx(60) and mean == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)


@pytest.mark.parametrize("method", METHODS)
def test_every_option_is_listed_with_its_default_and_a_note(method, shell):
    code, out, _ = shell(f"{method.__name__}.py", "--help")
    assert code == 0 and method.__doc__.splitlines()[0] in out
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  --", out.split("options:")[1])]
    for field in fields(method.Config):
        entry = next(entry for entry in entries if re.match(rf"{field.name}\b", entry))
        assert entry.endswith(f" [{field.default}]") and len(entry.split()) > 3


def test_the_command_line_fills_the_config():
    assert common.cli(coop.Config, []) == coop.Config()
    given = "--shots 1,2,4 --seed 3,1 --csc --no-download --lr 1e-2 --position front".split()
    cfg = common.cli(coop.Config, given)
    assert (cfg.shots, cfg.seed, cfg.csc, cfg.lr) == ([1, 2, 4], [3, 1], True, 0.01)
    assert cfg.position == "front" and not cfg.download


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--shot 4", "--shot"),
        ("--shots four", "--shots"),
        ("--position back", "--position"),
        ("--dataset shapse", "shapes"),
        ("--dataset caltech101", "caltech-101"),
        ("--transfer nowhere", "nowhere"),
        ("--model ViT-B-61", "ViT-B-16"),
        ("--device cuda:99", "cuda:99"),
        ("--batch_size 0", "--batch_size"),
        ("--lr nan", "--lr"),
        ("--epochs -1", "--epochs"),
        ("--shard 3", "--shard"),
        ("--shard 0/2", "--shard"),
        ("--load nowhere", "nowhere"),
        ("--n_ctx 80", "too long"),
        ("--init of_a", "--init"),
    ],
)
def test_bad_input_ends_in_one_line_that_names_it(shell, arguments, said):
    code, _, err = shell("coop.py", *arguments.split())
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: ") and said in err


def test_a_shell_sees_one_line_and_exit_code_2_even_after_clip_was_loaded(world, tmp_path):
    command = [sys.executable, HERE / "coop.py", "--init", "a photo", "--csc"]
    command += ["--device", "cpu", "--data", world, "--out", tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stderr.startswith("error: --init")
    assert len(ended.stderr.splitlines()) == 1


def test_a_picture_that_cannot_be_read_is_named(shell, tmp_path):
    for part in "train", "test":
        for name in "cat", "dog":
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            photo(20, 20).save(tmp_path / "pets" / part / name / "1.png")
    broken = tmp_path / "pets" / "train" / "dog" / "1.png"
    broken.write_bytes(b"no picture")
    model = f"local-dir:{shapes.write(tmp_path, 'clip')}"
    code, _, err = shell("coop.py", "--dataset", str(tmp_path / "pets"), "--model", model)
    assert code == 2 and str(broken) in err


def test_a_shard_without_a_run_in_it_ends_well(fit):
    fit(coop, shard="2/2")
    assert fit.rows() == []
    fit(coop, seed=[1, 2, 3], shard="2/2")
    assert [row["seed"] for row in fit.rows()] == [2]


INTERRUPTED = {
    coop: {"csc": True},
    dpt: {"guidance": 2},
    upt: {"official": True},
    enprompt: {"enla": False},
    softcpt: {
        "variant": "CATA",
        "class_rate": 0.3,
        "official": True,
        "dataset": "textures,colours",
    },
}


def learned(folder):
    return load_file(next(folder.rglob("prompt.safetensors")))


@pytest.mark.parametrize("method", METHODS)
def test_runs_agree_bit_for_bit_also_when_one_was_interrupted(method, fit, tmp_path):
    options = {"dataset": "textures", "shots": 4, "batch_size": 8, "epochs": 3}
    options |= INTERRUPTED[method]
    first = fit(method, out=str(tmp_path / "a"), **options)
    with interrupted(at=4):
        fit(method, out=str(tmp_path / "b"), **options)
    assert not list((tmp_path / "b").rglob("prompt.safetensors"))
    assert fit(method, out=str(tmp_path / "b"), **options) == first
    a, b = learned(tmp_path / "a"), learned(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not list(tmp_path.rglob("checkpoint*"))
    fit(method, out=str(tmp_path / "c"), seed=2, **options)
    assert not all(torch.equal(a[name], other) for name, other in learned(tmp_path / "c").items())


@pytest.mark.parametrize("method", METHODS)
def test_a_script_records_its_halves_and_its_transfer(method, fit, capsys):
    accuracy = fit(method, classes="base", transfer="shapes_negative", seed=3)
    own = [row for row in fit.rows() if row["evaluated_on"] != "shapes_negative"]
    base, new = ([row for row in own if row["classes"] == half] for half in ("base", "new"))
    assert len(base) == len(new) == (3 if method is softcpt else 1)
    mean = [sum(row["accuracy"] for row in rows) / len(rows) for rows in (base, new)]
    assert accuracy == pytest.approx(mean[0])
    assert fit.rows()[-1]["n_test"] == 80 and base[0]["n_test"] == new[0]["n_test"] == 40
    H = 2 * mean[0] * mean[1] / sum(mean)
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"seed 3: base {mean[0]:.2f}, new {mean[1]:.2f}, H {H:.2f}" in last


def test_a_record_holds_the_fields_of_a_run_and_a_finished_run_is_skipped(fit, monkeypatch):
    accuracy = fit(coop, seed=[1, 2])
    row = fit.rows()[-1]
    known = """method dataset evaluated_on classes shots seed model pretrained official accuracy
        mean_class_accuracy zero_shot n_test train_seconds eval_seconds peak_gpu_mb precision device
        torch open_clip commit config time"""
    assert set(known.split()) <= row.keys() and row["accuracy"] == accuracy
    assert (row["method"], row["seed"], row["config"]["seed"]) == ("coop", 2, 2)
    monkeypatch.setattr(coop, "train", None)
    assert fit(coop, seed=2) == accuracy and len(fit.rows()) == 2
    with pytest.raises(TypeError):
        fit(coop, seed=2, force=True)


def test_a_loaded_run_gives_its_accuracy_and_refuses_other_methods_models_and_sizes(
    fit, tmp_path, shell
):
    accuracy = fit(coop, n_ctx=3, epochs=2)
    folder = str(next(tmp_path.rglob("prompt.safetensors")).parent)
    assert fit(coop, load=folder, epochs=0, force=True) == accuracy
    with pytest.raises(SystemExit) as end:
        fit(dpt, load=folder)
    assert end.value.code == 2
    torch.manual_seed(0)
    other = described(tmp_path)
    code, _, err = shell("coop.py", "--load", folder, "--model", other, "--force")
    assert code == 2 and "other CLIP weights" in err
    code, _, err = shell("coop.py", "--load", folder, "--n_ctx", "5", "--force")
    assert code == 2 and "does not fit" in err
    code, _, err = shell("upt.py", "--load", folder)
    assert code == 2 and "belongs to coop.py" in err


def test_zero_shot_accuracy_is_that_of_the_hand_templates(world, clip, shell):
    data = common.load_dataset("shapes", world)
    f = common.unit_features(clip, common.views(clip, [common.decode(x[0]) for x in data.test]))
    labels = torch.tensor([item[1] for item in data.test])
    for flags, count in ([], 1), (["--ensemble"], 8):
        w = 0
        for template in ["a photo of a {}.", *common.SEVEN][:count]:
            texts = [template.format(c.replace("_", " ")) for c in data.classnames]
            w = w + unit(clip.encode_text(clip.tokenize(texts)))
        expected = 100 * ((f @ unit(w).T).argmax(1) == labels).double().mean().item()
        code, out, _ = shell("common.py", *flags)
        assert code == 0 and f": {expected:.2f} (zero-shot" in out.splitlines()[-1]
