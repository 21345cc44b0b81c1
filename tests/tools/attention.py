"""Where DPT's class-aware prompts look: a picture for python common.py predict --attention."""

import math

from PIL import Image, ImageDraw

import common
import dpt

DRAWN = 3  # classes per picture
PIXELS, MARGIN = 224, 16  # of a cell of the sheet, and of the line of text above it
RED = 255, 32, 0
STRENGTH = 0.7  # of the red where the attention is greatest


def rows_of(learned, target, x, f, logits):
    """Rows of cells (text, picture), one row a picture of the batch: itself, then, over it in red,
    the last layer's attention of the prompts of its likeliest classes among CAVPT's.

    x (B, 3, side, side): normalised images, f (B, D): their frozen features, logits (B, C).
    """
    top = dpt.selected(learned.cfg, f, zero_shot(learned, target))  # (B, K)
    A = attention(learned, target, x, top).cpu()  # (B, K, N)
    scores = logits.gather(1, top).cpu()  # (B, K)
    best = scores.topk(min(DRAWN, scores.shape[1])).indices  # (B, DRAWN)
    rows = []
    for i, photo in enumerate(photos(learned.clip, x)):
        cells = [("", photo)]
        for k in best[i]:
            name = target.classnames[top[i, k]].replace("_", " ")
            cells.append((name, overlaid(photo, A[i, k])))
        rows.append(cells)
    return rows


def zero_shot(learned, target):
    """T0 (C, D), the hand template's text features."""
    return common.zero_shot_weights(learned.clip, target)[:, 0]


def attention(learned, target, x, top):
    """A (B, K, N) of the last class-aware layer, from each class's prompt to the patches."""
    cfg, clip, prompt = learned.cfg, learned.clip, learned.prompt
    names = common.embed_names(clip, target.classnames, cfg.n_ctx)
    T = prompt.text(clip, names, zero_shot(learned, target))
    _, _, maps = dpt.encode(clip, prompt, x, T, top)
    patches = maps[-1].shape[-1] - cfg.cavpt_ctx  # behind them stand CAVPT's own rows
    return maps[-1][..., 1:patches]  # without the class token


def photos(clip, x):
    """The images as PIL's, as large as a cell."""
    pixels = 255 * (x * clip.std + clip.mean).clamp(0, 1)
    pixels = pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [resized(Image.fromarray(image)) for image in pixels]


def resized(image):
    """The image, as large as a cell."""
    return image.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)


def overlaid(photo, heat):
    """The photo, the redder the hotter; heat (N,): one number per patch of a square."""
    side = math.isqrt(len(heat))
    low, high = heat.min(), heat.max()
    share = (heat - low) / (high - low).clamp(min=1e-12)
    mask = (255 * STRENGTH * share).byte().view(side, side)
    red = Image.new("RGB", photo.size, RED)
    return Image.composite(red, photo, resized(Image.fromarray(mask.numpy())))


def save(rows, file):
    """Writes the rows as one PNG, a text above each picture."""
    high = PIXELS + MARGIN
    size = (1 + DRAWN) * PIXELS, len(rows) * high
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, cells in enumerate(rows):
        for column, (text, picture) in enumerate(cells):
            left, top = column * PIXELS, row * high
            draw.text((left + 4, top + 2), text, "black")
            sheet.paste(picture, (left, top + MARGIN))
    sheet.save(file, "PNG")
