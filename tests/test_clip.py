"""The two towers and the prompts, against open_clip's own encoders and CLIP written out."""

import open_clip
import pytest
import torch

import common
from tests.conftest import (
    METHODS,
    NAMES,
    close,
    gradients,
    initial,
    plain_image,
    plain_prompts,
    plain_text,
    toy,
    unit,
    words,
)

CLASSES = [*NAMES, *open_clip.IMAGENET_CLASSNAMES[: 20 - len(NAMES)]]
TASKS = [0] * 3 + [1] * 11 + [2] * 6  # three contexts in a row


@pytest.mark.parametrize(
    "group", [None, TASKS, [1, 0] * 10, range(20)], ids=["one", "tasks", "mixed", "each"]
)
def test_shared_prefixes_give_the_features_and_gradients_of_77_tokens(clip, group):
    torch.manual_seed(0)
    context_of = torch.tensor([0] * 20 if group is None else group)
    ctx = (0.1 * torch.randn(context_of.max() + 1, 5, 128)).requires_grad_()
    names = common.embed_names(clip, CLASSES, 5)
    ours = common.encode_prompts(clip, names, ctx, None if group is None else context_of)
    plain = plain_prompts(clip, CLASSES, ctx[context_of])
    weight = torch.randn_like(plain)
    slopes = [gradients((w * weight).sum(), [ctx])[0] for w in (ours, plain)]
    assert close(ours, plain) and close(*slopes)


def test_untouched_embeddings_give_clips_own_text_features(clip):
    ids = clip.tokenize(["a photo of a cat.", "art of the very large striped star."])
    x, eot = clip.token_embedding(ids), ids.argmax(1)
    assert close(plain_text(clip, x, eot), clip.encode_text(ids))
    for P in 1, 3:  # a prefix for each, of one and of more tokens
        names = common.Names.of(x[:1, :1], x[:, P:], eot - P)
        rest = names.tail, names.own, names.last
        ours = common.encode_text(clip, x[:, :P], *rest, torch.arange(2))
        assert close(ours, clip.encode_text(ids))


@pytest.mark.parametrize("classes", [["cat"], CLASSES, ["very " * 50 + "cat", "dog"]])
def test_names_of_any_length_and_number_give_clips_own_features(clip, classes):
    names = common.embed_names(clip, classes, 0)
    ours = common.encode_prompts(clip, names, names.sos[:, :0])
    ids = clip.tokenize([f"{name.replace('_', ' ')}." for name in classes])
    assert close(ours, clip.encode_text(ids))


def test_tokens_after_eot_do_not_matter(clip):
    names = common.embed_names(clip, NAMES, 2)
    ours = common.encode_prompts(clip, names, words(clip, "a photo"))
    for k, eot in enumerate(names.eot.tolist()):
        names.tail[k, eot + 1 :] = 1e3
    assert torch.equal(common.encode_prompts(clip, names, words(clip, "a photo")), ours)


def test_names_know_their_eot_on_the_cpu_and_their_own_tokens(clip):
    names = common.embed_names(clip, NAMES, 3)
    counts = [len(clip.tokenize.encode(name.replace("_", " "))) for name in NAMES]
    S = max(counts) + 2  # "." and [EOT] follow the name
    assert names.tail.shape == (3, S, 128) and names.eot.device.type == "cpu"
    assert names.eot.tolist() == [count + 1 for count in counts]
    own = [k * S + s for k, count in enumerate(counts) for s in range(count + 2)]
    assert names.own.tolist() == own
    ends = [k * S + count + 1 for k, count in enumerate(counts)]
    assert names.own[names.last].tolist() == ends


def test_a_name_that_ends_in_a_full_stop_keeps_its_tokens(clip):
    names = common.embed_names(clip, ["st."], 4)
    ours = common.encode_prompts(clip, names, words(clip, "a b c d"))
    assert close(ours, clip.encode_text(clip.tokenize(["a b c d st.."])))


def test_a_name_may_fill_the_77_tokens_and_no_more(clip):
    assert common.embed_names(clip, ["cat " * 57 + "cat"], 16).eot.tolist() == [76 - 1 - 16]
    with pytest.raises(common.Error, match="class name 'dog dog.* too long"):
        common.embed_names(clip, ["cat", "dog " * 58 + "dog"], 16)


def test_zero_shot_weights_are_the_unit_features_of_every_template(clip):
    templates = ["a photo of a {}.", "{} texture."]
    w = common.zero_shot_weights(clip, toy(), templates)
    for t, template in enumerate(templates):
        ids = clip.tokenize([template.format(name.replace("_", " ")) for name in NAMES])
        assert close(w[:, t], unit(clip.encode_text(ids)))
    assert torch.equal(common.zero_shot_weights(clip, toy()), w[:, :1])  # the data set's own


def test_without_prompts_the_image_features_are_clips_own(clip, odd, resnet):
    for model in clip, odd, resnet:
        images = torch.rand(3, 3, model.image_size, model.image_size)
        plain = model.encode_image(images)
        assert close(common.encode_image(model, images), plain, 1e-6)
        assert close(common.unit_features(model, images), unit(plain), 1e-6)


@pytest.mark.parametrize(
    "given",
    [{-1: (2, 48)}, {0: (2, 48), 1: (3, 2, 48), 2: (5, 48)}, {-1: (4, 48), 1: (4, 48)}]
    + [{0: (3, 4, 48), 2: (0, 48)}, {1: (2, 48)}],
    ids=["shallow", "deep", "mixed", "dropped", "in one layer"],
)
def test_prompts_are_inserted_kept_replaced_and_removed(odd, given):
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
    slopes = [gradients((x[0] * weight).sum(), rows.values()) for x in (ours, plain)]
    for a, b in zip(*slopes, strict=True):
        assert not b.numel() or close(a, b)


def test_asking_for_patches_leaves_the_features_unchanged(odd):
    images = torch.rand(2, 3, 32, 32)
    f, patches = common.encode_image(odd, images, patches=True)
    plain = plain_image(odd, images, patches=True)
    assert close(f, odd.encode_image(images)) and close(patches, plain[1])


def test_the_hook_gets_the_tokens_that_enter_its_block(odd):
    seen, images = {}, torch.rand(2, 3, 32, 32)
    common.encode_image(odd, images, lambda i, tokens: seen.update({i: tokens}))
    x = odd.visual.ln_pre(seen[-1])
    for i, block in enumerate(odd.visual.transformer.resblocks):
        assert close(seen[i], x)
        x = block(x)


def test_visual_prompts_and_patches_of_a_resnet_are_refused(resnet):
    for name in "dpt", "upt", "enprompt":
        with pytest.raises(common.Error, match="ViT-B-16"):
            initial(METHODS[name], resnet)
    images = torch.rand(1, 3, 64, 64)
    for more in {"prompts": lambda i, tokens: None}, {"patches": True}:
        with pytest.raises(common.Error, match="ViT-B-16"):
            common.encode_image(resnet, images, **more)
