"""Where DPT's class-aware prompts look: the sheet of `predict RUN IMAGES --attention FILE`."""

import math

from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import to_pil_image

import common
import dpt

SHOWN = 3  # classes per image
SIDE, MARGIN = 224, 16  # pixels of a cell, and of the line of text above it
RED = 255, 32, 0
STRENGTH = 0.7  # of the red where the attention is greatest
MEANING = f"""\
red is where the prompts of the {SHOWN} top predicted classes look; "no prompt": only classes \
selected by frozen CLIP get a prompt, and this one was not selected"""


def rows_of(run, target, x, f, logits):
    """Returns a row of (text, image) cells for each image of a batch: the image alone, then a copy
    per likeliest class with, in red, the last layer's attention from its prompt to the patches.

    run: predict's Run; x (B, 3, H, W): normalised images, f (B, D): their frozen features, logits
    (B, K).
    """
    T0 = common.zero_shot_weights(run.clip, target)[:, 0]
    T = run.prompt.text(
        run.clip, common.embed_names(run.clip, target.classnames, run.cfg.n_ctx), T0
    )
    top = dpt.selected(run.cfg, f, T0)  # (B, k)
    A = dpt.encode(run.clip, run.prompt, x, T, top)[2][-1].cpu()  # (B, k, 1+N+R)
    A = A[..., 1 : A.shape[-1] - run.cfg.cavpt_ctx]  # (B, k, N)
    pixels = (x * run.clip.std + run.clip.mean).clamp(0, 1).cpu()
    likeliest = logits.topk(min(SHOWN, logits.shape[1])).indices.tolist()
    rows = []
    for i, selected in enumerate(top.tolist()):
        image = resized(to_pil_image(pixels[i]))
        cells = [("", image)]
        for k in likeliest[i]:
            name = target.classnames[k].replace("_", " ")
            if k in selected:
                cells.append((name, overlaid(image, A[i, selected.index(k)])))
            else:
                cells.append((f"{name}: no prompt", image))
        rows.append(cells)
    return rows


def resized(image):
    """The image, as large as a cell."""
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def overlaid(image, heat):
    """The image with heat overlaid in red; heat (N,): one number per patch of a square grid."""
    side = math.isqrt(len(heat))
    share = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    mask = resized(to_pil_image(STRENGTH * share.view(1, side, side)))
    return Image.composite(Image.new("RGB", image.size, RED), image, mask)


def save(rows, file):
    """Writes the rows as one PNG, a text above each image."""
    height = SIDE + MARGIN
    sheet = Image.new("RGB", ((1 + SHOWN) * SIDE, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, cells in enumerate(rows):
        for column, (text, image) in enumerate(cells):
            left, top = column * SIDE, row * height
            draw.text((left + 4, top + 2), text, "black")
            sheet.paste(image, (left, top + MARGIN))
    sheet.save(file, "PNG")
