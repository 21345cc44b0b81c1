"""Accuracies measured again by open_clip and torchvision alone: their image transform, 77 tokens
per class, prompts inserted by hand, the folder read here. Only what was learned is ours."""

import math
import re
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

import common
import coop
import upt


@pytest.fixture(scope="module")
def model(rendered):
    """open_clip's own model, read by open_clip."""
    return open_clip.create_model(f"local-dir:{rendered}/shapes/clip").eval().requires_grad_(False)


def read(folder, model):
    """Images (B, 3, 32, 32), labels (B,) and class names of a folder of class folders."""
    side = model.visual.image_size[0]
    prepare = transforms.Compose(
        [
            transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(model.visual.image_mean, model.visual.image_std),
        ]
    )
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    pairs = [(file, y) for y, c in enumerate(names) for file in sorted((folder / c).iterdir())]
    images = torch.stack([prepare(Image.open(file).convert("RGB")) for file, _ in pairs])
    return images, torch.tensor([y for _, y in pairs]), [c.replace("_", " ") for c in names]


def text_features(model, names, ctx):
    """Unit features of "[SOS] V name. [EOT]" for one context V (M, d)."""
    ids = open_clip.tokenize([" ".join(["X"] * len(ctx)) + f" {c}." for c in names])  # (K, 77)
    x = model.token_embedding(ids)
    x[:, 1 : 1 + len(ctx)] = ctx
    x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)]
    return F.normalize(x @ model.text_projection, dim=-1)


def image_features(model, images, P):
    """Unit features with prompts P (M, d) behind the class token."""
    visual = model.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.expand(len(x), 1, -1)
    x = torch.cat([cls, x], 1) + visual.positional_embedding
    x = torch.cat([x[:, :1], P.expand(len(x), -1, -1), x[:, 1:]], 1)
    x = visual.ln_post(visual.transformer(visual.ln_pre(x))[:, 0])
    return F.normalize(x @ visual.proj, dim=-1)


def upt_prompts(p):
    """V and P of UPT's learnables: a transformer layer of one head over all prompts."""
    U = p["prompts"][0]  # (2M, d_t)
    d = U.shape[1]
    q, k, v = F.linear(U, p["attention.in_proj_weight"], p["attention.in_proj_bias"]).chunk(3, 1)
    seen = (q @ k.T / math.sqrt(d)).softmax(1) @ v
    mixed = F.linear(seen, p["attention.out_proj.weight"], p["attention.out_proj.bias"])
    S = F.layer_norm(U + mixed, [d], p["norm1.weight"], p["norm1.bias"])
    hidden = F.layer_norm(S, [d], p["norm2.weight"], p["norm2.bias"])
    hidden = F.relu(F.linear(hidden, p["linear1.weight"], p["linear1.bias"]))
    U = S + F.linear(hidden, p["linear2.weight"], p["linear2.bias"])
    V, P = U.chunk(2)
    return V, F.linear(P, p["visual.weight"], p["visual.bias"])


@pytest.mark.parametrize("method", [coop, upt], ids=["coop", "upt"])
def test_no_prediction_differs_from_an_independent_evaluation(
    method, fit, rendered, clip, model, tmp_path, capsys
):
    fit(method, epochs=3, shots=4)
    printed = capsys.readouterr().out.splitlines()[-1]
    (path,) = tmp_path.rglob("checkpoint.pt")
    p = torch.load(path, weights_only=True)["prompt"]
    images, labels, names = read(rendered / "shapes/shapes/test", model)
    V, P = (p["ctx"][0], images.new_zeros(0, 128)) if method is coop else upt_prompts(p)
    f, w = image_features(model, images, P), text_features(model, names, V)
    logits = model.logit_scale.exp() * f @ w.T  # (B, K)
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-4
    assert clear.sum() > 70

    cfg = method.Config(shots=4, data=str(rendered))
    data = common.few_shot(cfg)
    prompt = method.learnables(cfg, clip, data)
    prompt.load_state_dict(p)
    shown = [common.preprocess(common.decode(image), 32) for image, _, _ in data.test]
    x = common.normalize(clip, shown)
    with torch.no_grad():
        predict = method.classifier(cfg, clip, prompt, data, data)
        f = common.unit_features(clip, x)
        ours = predict(x, f) if callable(predict) else f @ predict.T
    assert torch.equal(ours.argmax(1)[clear], logits.argmax(1)[clear])
    accuracy = 100 * (logits.argmax(1) == labels).double().mean()
    assert re.search(rf": {accuracy:.2f} \(", printed)
