"""Synthetic data sets and a tiny CLIP that is pretrained for them, so that nothing is downloaded.

Every image is 32 x 32 pixels and shows one of 10 shapes in one of 4 textures and 8 colours. The
tiny CLIP is OpenAI's architecture made small, pretrained on captions of such images. Its weights,
tiny_clip.safetensors beside this file, took 41 minutes of pretraining on two CPU cores and reach
99.8 % zero-shot accuracy on new images. To repeat the pretraining and overwrite the weights:

    python -m tests.tools.shapes

In comments, B is the number of images.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import random
import shutil
import sys
import uuid
import zlib
from collections import namedtuple
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save
from tqdm import tqdm

SHAPES = "circle square triangle star cross heart ring moon arrow hourglass".split()
TEXTURES = "plain striped dotted checkered".split()
COLOURS = {
    "red": (0.85, 0.1, 0.1),
    "orange": (1.0, 0.5, 0.0),
    "yellow": (0.95, 0.9, 0.1),
    "green": (0.1, 0.7, 0.15),
    "cyan": (0.1, 0.85, 0.9),
    "blue": (0.1, 0.2, 0.9),
    "purple": (0.6, 0.1, 0.8),
    "white": (1.0, 1.0, 1.0),
}
WORDS = [SHAPES, TEXTURES, list(COLOURS)]

SIZE = 32  # pixels
MODEL = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 128, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
}
MEAN = open_clip.OPENAI_DATASET_MEAN
STD = open_clip.OPENAI_DATASET_STD
WEIGHTS = Path(__file__).with_name("tiny_clip.safetensors")
SOURCE = Path(__file__).read_bytes()  # read when the code is: the file may change later
STAMP = ".rendered"  # hidden file in each folder, see _stamp

# Share of the area that a training crop shows: at the papers' minimum, 8 %, no shape is visible
CROP = (0.5, 1.0)


# ----------------------------------------------------------------------------------------- tasks

# The attributes that a class fixes; the others, None, vary from image to image
Look = namedtuple("Look", "shape texture colour", defaults=[None, None, None])

# classes: {name: Look}. template: of the prompt. shift and variety: keywords of shift() and
# render(). seed_of: the task whose random numbers render the images, by default the task itself.
Task = namedtuple("Task", "classes template shift variety seed_of", defaults=[{}, None])

TEXTURED_SHAPES = {f"{t}_{s}": Look(shape=s, texture=t) for s in SHAPES for t in TEXTURES}
OUTLINES = {s: Look(shape=s) for s in SHAPES}
RED_SHAPES = {s: Look(s, "plain", "red") for s in SHAPES}
PLAIN_RINGS = {c: Look("ring", "plain", c) for c in COLOURS}
WORDY_RINGS = {f"grainy_{c}_plain_ring": look for c, look in PLAIN_RINGS.items()}

PHOTO = "a photo of a {}."
PHOTO_OF_THING = "a photo of a {} thing."
CAMERA = {"colour": 0.5, "gamma": 1.2, "grain": 0.2}
PALE_CAMERA = {"colour": 0.3, "gamma": 1.2, "grain": 0.2}
ANY_TILT = {"tilt": 180.0, "spread": 1.8}

TASKS = {
    "shapes": Task(TEXTURED_SHAPES, PHOTO, CAMERA),
    "shapes_clean": Task(TEXTURED_SHAPES, PHOTO, {}),
    "shapes_negative": Task(TEXTURED_SHAPES, PHOTO, {"negative": True}),
    "shapes_blurred": Task(TEXTURED_SHAPES, PHOTO, {"blur": 5}),
    "shapes_grey": Task(TEXTURED_SHAPES, PHOTO, {"colour": 0.0}),
    "textures": Task({t: Look(texture=t) for t in TEXTURES}, PHOTO_OF_THING, CAMERA),
    "colours": Task({c: Look(colour=c) for c in COLOURS}, PHOTO_OF_THING, CAMERA),
    # For tests/tools/study.py. In shapes_steady the images of a class vary less
    "shapes_varied": Task(OUTLINES, PHOTO, CAMERA, ANY_TILT),
    "shapes_steady": Task(RED_SHAPES, PHOTO, CAMERA, ANY_TILT, seed_of="shapes_varied"),
    # The same images twice. The names in rings_close share words, so their text features are closer
    "rings_far": Task(PLAIN_RINGS, PHOTO, PALE_CAMERA),
    "rings_close": Task(WORDY_RINGS, PHOTO, PALE_CAMERA, seed_of="rings_far"),
}
COUNTS = {"train": 20, "val": 4, "test": 50}  # images per class


def write(root, name):
    """The folder of a task, or of "clip", the tiny CLIP, below root. Writes it through a temporary
    folder, unless this version of the code has done so before and no file is missing."""
    folder = Path(root) / "shapes" / name
    if _is_current(folder, name):
        return folder
    work = "writing the tiny CLIP" if name == "clip" else f"rendering the synthetic data set {name}"
    print(f"{work} in {folder} ...", file=sys.stderr, flush=True)
    draft = folder.with_name(f".{name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        if name == "clip":
            _write_clip(draft)
        else:
            _write_task(draft, name)
        (draft / STAMP).write_text(_stamp(draft, name), "utf-8")
        _replace(folder, draft, name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _stamp(folder, name):
    """The stamp that a folder should have: a hash of code and weights, and its number of files."""
    weights = WEIGHTS.read_bytes() if name == "clip" else b""
    files = [path for path in folder.rglob("[!.]*") if path.is_file()]
    return f"{hashlib.sha256(SOURCE + weights).hexdigest()} {len(files)}"


def _is_current(folder, name):
    try:
        return (folder / STAMP).read_text("utf-8") == _stamp(folder, name)
    except FileNotFoundError:
        return False


def _replace(folder, draft, name):
    """Puts draft in the place of folder, unless another process has just done so."""
    old = f"{draft}.old"
    if not _is_current(folder, name):
        with contextlib.suppress(FileNotFoundError):
            folder.rename(old)
    try:
        draft.rename(folder)
    except OSError:
        if not _is_current(folder, name):
            raise
    shutil.rmtree(old, ignore_errors=True)


def _write_task(folder, name):
    for part, class_name, pixels in images(name):
        class_folder = folder / part / class_name
        class_folder.mkdir(parents=True)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(class_folder / f"{i:03d}.png")


def _write_clip(folder):
    """Writes an open_clip local-dir model. Embeddings of tokens that no caption has are random: the
    weights file lacks them."""
    state = {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}
    embedding = 0.02 * torch.randn(49408, 128, generator=torch.Generator().manual_seed(0))
    embedding[caption_tokens()] = state["token_embedding.weight"]
    state["token_embedding.weight"] = embedding
    # Not save_file, which does not report a full disk as an OSError
    (folder / "open_clip_model.safetensors").write_bytes(save(state))
    config = {"model_cfg": MODEL, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), "utf-8")


def images(name):
    """Renders a task: yields (part, class name, pixels), pixels uint8 (B, 32, 32, 3), by class."""
    task = TASKS[name]
    seed = zlib.crc32((task.seed_of or name).encode())
    generator = torch.Generator().manual_seed(seed)
    for part, count in COUNTS.items():
        for class_name, look in task.classes.items():
            # Sample even what the class fixes, so that later random numbers are always the same
            attributes = random_attributes(count, generator)
            for attribute, words, fixed in zip(attributes, WORDS, look, strict=True):
                if fixed:
                    attribute.fill_(words.index(fixed))
            x = render(*attributes, generator, **task.variety)
            x = shift(x, generator, **task.shift)
            pixels = (255 * x).round().byte().permute(0, 2, 3, 1)
            yield part, class_name, pixels.numpy()


def random_attributes(count, generator):
    """Indices of shapes, textures and colours, each (count,)."""
    return [torch.randint(len(words), (count,), generator=generator) for words in WORDS]


def render(shape, texture, colour, generator, tilt=25.0, spread=1.0):
    """Renders images (B, 3, 32, 32) in 0..1; place, size, tilt, shades and background are random.
    shape, texture, colour: (B,) indices. tilt: degrees either way. spread: of place and size."""
    B = len(shape)

    def uniform(low, high, channels=1):
        numbers = torch.rand(B, channels, 1, 1, generator=generator)
        return low + (high - low) * numbers

    # Twice the resolution: averaging 2 x 2 pixels at the end makes the edges soft
    axis = (torch.arange(2 * SIZE) + 0.5) / SIZE - 1
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    centre = spread * uniform(-0.18, 0.18, 2)
    size = 0.78 + spread * uniform(-0.13, 0.13)
    angle = uniform(-1, 1) * math.radians(tilt)

    # The shape's own frame, u to its right and v up, in which it fills about -1..1
    x = right - centre[:, :1]  # (B, 1, 64, 64)
    y = -down - centre[:, 1:]
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    u, v = cos * x + sin * y, cos * y - sin * x
    everyone = torch.arange(B)
    body = _bodies(u, v)[shape, everyone].float()
    # The texture starts anywhere: stripes are not always at the same places of a shape
    mark_u, mark_v = u + uniform(-1, 1), v + uniform(-1, 1)
    marks = _marks(mark_u, mark_v, period=uniform(0.5, 0.7))[texture, everyone].float()

    ink = torch.tensor(list(COLOURS.values()))[colour][:, :, None, None]
    ink = ink * uniform(0.8, 1.0) + uniform(-0.06, 0.06, 3)
    dark_ink = ink * uniform(0.1, 0.35)
    grey = uniform(0.15, 0.55) + uniform(-0.07, 0.07, 3)
    slope = uniform(-0.12, 0.12, 2)
    ground = grey + (slope[:, :1] * x + slope[:, 1:] * y)
    painted = ink * (1 - marks) + dark_ink * marks
    image = F.avg_pool2d(body * painted + (1 - body) * ground, 2)
    noise = torch.randn(image.shape, generator=generator)
    return (image + 0.02 * noise).clamp(0, 1)


def _bodies(u, v):
    """Where each of the SHAPES is, (10, ...) booleans; u to the right and v up, about -1..1."""
    r = (u**2 + v**2).sqrt()
    across, along = u.abs(), v.abs()
    far, near = torch.maximum(across, along), torch.minimum(across, along)
    circle, square = r < 0.85, far < 0.75
    triangle = (v > -0.7) & (across < (0.95 - v) * 0.55)
    star = _star(r, angle=torch.atan2(u, v))
    cross = (near < 0.28) & (far < 0.9)
    # The curve (x² + y² - 1)³ = x² y³ is a heart; here slightly lifted
    heart_u, heart_v = 1.25 * u, 1.25 * v
    heart = (heart_u**2 + (heart_v - 0.1) ** 2 - 1) ** 3 < heart_u**2 * heart_v**3
    ring = (r < 0.95) & (r > 0.5)
    # A disc less the disc that covers its right side
    moon = (r < 0.95) & ((u - 0.45) ** 2 + v**2 > 0.55)
    shaft = (across < 0.26) & (along < 0.9) & (v < 0.2)
    head = (v >= 0.05) & (across < (0.95 - v) * 0.9)
    arrow = shaft | head
    hourglass = (across < 0.85 * along + 0.1) & (along < 0.85)
    return torch.stack([circle, square, triangle, star, cross, heart, ring, moon, arrow, hourglass])


def _star(r, angle):
    """A star of five tips: ten copies of one wedge, each the mirror image of the next. Folded onto
    that wedge, a point is inside if it is on the centre's side of the edge from tip to notch."""
    half = math.pi / 5  # the angle between a tip and a notch
    from_notch = (torch.remainder(angle, 2 * half) - half).abs()
    from_tip = half - from_notch
    x, y = r * torch.cos(from_tip), r * torch.sin(from_tip)
    tip_x = 1  # on the axis: its y is 0
    notch_x, notch_y = 0.42 * math.cos(half), 0.42 * math.sin(half)
    return (x - tip_x) * notch_y - y * (notch_x - tip_x) < 0


def _marks(u, v, period):
    """Where each of the TEXTURES has its dark ink, (4, ...) booleans."""
    a, b = 2 * math.pi * u / period, 2 * math.pi * v / period
    plain = torch.zeros_like(u, dtype=torch.bool)
    striped = torch.sin(b) > 0
    dotted = torch.cos(a) + torch.cos(b) > 0.75
    checkered = torch.sin(0.75 * a) * torch.sin(0.75 * b) > 0
    return torch.stack([plain, striped, dotted, checkered])


def shift(images, generator, colour=1.0, gamma=1.0, blur=1, grain=0.0, negative=False):
    """Applies a shift, absent from pretraining, to images (B, 3, 32, 32) in 0..1."""
    grey = images.mean(1, keepdim=True)
    images = (grey + colour * (images - grey)) ** gamma
    if negative:
        images = 1 - images
    border = blur // 2
    framed = F.pad(images, (border, border, border, border), mode="replicate")
    images = F.avg_pool2d(framed, blur, 1)
    noise = torch.randn(images.shape, generator=generator)
    return (images + grain * noise).clamp(0, 1)


TEMPLATES = """{}
a {}.
a photo of a {}.
a photo of the {}.
itap of a {}.
a bad photo of the {}.
a origami {}.
a photo of the large {}.
a {} in a video game.
art of the {}.
a photo of the small {}.
a drawing of a {}.
this is a {}.
a picture of one {}.
there is a {} in the picture.
a small picture that shows a {}.""".splitlines()

FILLERS = """classification of objects by their shape texture colour kind form pattern surface
pictures drawings general fine grained simple images photos things tasks recognise tell which what
is the of a an in on at with without and or for from to this that these old new good bad big small
large little bright dark low high first last one two three many some any other same long short left
right up down near far open closed soft hard fast slow early late clean noisy blurred inverted paper
wall table window door house street city field river sea sky day night summer winter hand eye face
man woman child animal plant tree flower stone water fire air light sound word name number line
point page book story music art work game play make take give find see look show hold keep turn move
run stand there here very more most quite just also only then now again type sort image picture
photo view scene""".split()

NOUNS = ["thing", "object", "shape", "one"]  # of a caption that does not say the shape
STYLES = ["clear", "blurry", "faded", "grainy"]  # of the whole image; no caption says "clear"


def caption(attributes, fillers, rng):
    """One caption, and which of the four attributes it says, as bools.

    attributes: indices of shape, texture, colour and style. fillers: how many random words to put
    around the name, so that the text tower sees class names at every position that they can take
    after a learned context.
    """
    shape, texture, colour, style = attributes
    says_shape = rng.random() < 0.88
    says_texture = rng.random() < 0.75
    says_colour = rng.random() < 0.5
    if not (says_shape or says_texture or says_colour):
        says_shape = says_texture = True
    says_style = style > 0 and rng.random() < 0.6

    names = [STYLES[style], list(COLOURS)[colour], TEXTURES[texture], SHAPES[shape]]
    words = [*itertools.compress(names, [says_style, says_colour, says_texture, says_shape])]
    if not says_shape:
        noun = rng.choice(NOUNS)
        # Some captions have no noun: a class name may be just "red"
        if rng.random() >= 0.3:
            words.append(noun)
    says = [says_shape, says_texture, says_colour, says_style]
    return _sentence(" ".join(words), fillers, rng), says


def _sentence(name, fillers, rng):
    if fillers == 0 or rng.random() >= 0.9:
        return rng.choice(TEMPLATES).format(name)
    context = rng.choices(FILLERS, k=fillers)
    position = fillers
    if rng.random() >= 0.7:
        position = rng.randint(0, fillers)
    return " ".join([*context[:position], name, *context[position:]]) + "."


def caption_tokens():
    """Sorted ids of all tokens that a caption can hold; the weights file has only their rows."""
    texts = [*TEMPLATES, *FILLERS, *NOUNS, *SHAPES, *TEXTURES, *COLOURS, *STYLES]
    texts += ["X", "shapes textures colours"]  # the placeholder of a context, SoftCPT's task names
    return open_clip.get_tokenizer("ViT-B-32")(texts).unique()


def pretrain(steps, seed=0, batch=256, lr=1e-3):
    """Pretrains contrastively; a caption is a positive for every image that it describes."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    vocabulary = caption_tokens()
    text_cfg = {**MODEL["text_cfg"], "vocab_size": len(vocabulary)}
    clip = open_clip.CLIP(**{**MODEL, "text_cfg": text_cfg})
    clip.logit_scale.requires_grad_(False)
    learned = [p for p in clip.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.ndim > 1]
    vectors = [p for p in learned if p.ndim < 2]
    optimizer = torch.optim.AdamW(vectors, lr, weight_decay=0)
    optimizer.add_param_group({"params": matrices, "weight_decay": 0.05})
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.08)
    for step in tqdm(range(steps), "pretraining"):
        images, captions, true = _captioned(batch, rng, generator)
        tokens = to_rows(captions, vocabulary)
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast as fp32
            f = clip.encode_image(normalised(images))
            w = encode_text(clip, tokens)
        f, w = F.normalize(f.float(), dim=-1), F.normalize(w.float(), dim=-1)
        scale = _logit_scale(step, steps)
        loss = _contrastive_loss(f, w, true, scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
    clip.logit_scale.fill_(math.log(scale))
    weights = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    WEIGHTS.write_bytes(save(weights))
    print(f"{steps} steps: zero-shot {100 * accuracy(clip, vocabulary):.1f} %")


def _captioned(batch, rng, generator):
    """Images (B, 3, 32, 32), as many captions, and a mask of the true pairs (B images, B)."""
    chosen = random_attributes(batch, generator)
    # Index 0, a clear image, is the most frequent: all numbers below 1 round down to it
    style = torch.rand(batch, generator=generator) * 6.5 - 2.5
    style = style.clamp(min=0).long()
    images = zoom(render(*chosen, generator), generator)
    images = distort(images, style, generator)
    attributes = torch.stack([*chosen, style], 1)  # (B, 4)
    fillers = rng.choice([0, rng.randint(1, 22)])  # one number for the whole batch
    pairs = [caption(row, fillers, rng) for row in attributes.tolist()]
    captions = [text for text, _ in pairs]
    says = torch.tensor([said for _, said in pairs])  # (B, 4)
    same = attributes[:, None] == attributes[None]  # (B images, B captions, 4)
    true = (same | ~says[None]).all(-1)
    return images, captions, true


def _logit_scale(step, steps):
    """Rises linearly from CLIP's initial 1/0.07 to its final 100 in the first two thirds of the
    steps. If learned, it would settle near 27, too low for the papers' learning rates."""
    progress = min(1, step / (steps * 2 / 3))
    return 1 / 0.07 + (100 - 1 / 0.07) * progress


def _contrastive_loss(f, w, true, scale):
    """CLIP's loss for features f, w (B, D). An image's target weight is shared equally among its
    true captions, as marked in true (B images, B captions), and vice versa."""
    of_images, of_captions = true.float(), true.float().T
    image_loss = F.cross_entropy(scale * f @ w.T, of_images / of_images.sum(1, keepdim=True))
    caption_loss = F.cross_entropy(scale * w @ f.T, of_captions / of_captions.sum(1, keepdim=True))
    return (image_loss + caption_loss) / 2


def zoom(images, generator):
    """Crops half of the images, to 25 to 100 % of the area, and mirrors half, as training does."""
    B = len(images)
    side = (0.25 + 0.75 * torch.rand(B, generator=generator)).sqrt()
    whole = torch.rand(B, generator=generator) < 0.5
    side[whole] = 1
    aspect = 0.87 + 0.28 * torch.rand(B, generator=generator)
    aspect[side == 1] = 1
    sides = torch.stack([side * aspect, side / aspect], 1).clamp(max=1)  # (B, 2): width, height
    offset = (1 - sides) * (2 * torch.rand(B, 2, generator=generator) - 1)
    mirrored = torch.rand(B, generator=generator) < 0.5
    theta = torch.zeros(B, 2, 3)  # the affine maps from the crop to the image
    theta[:, 0, 0] = torch.where(mirrored, -sides[:, 0], sides[:, 0])
    theta[:, 1, 1] = sides[:, 1]
    theta[:, :, 2] = offset
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    crops = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return crops.clamp(0, 1)


def distort(images, style, generator):
    """Applies the STYLES that captions name, mildly; style (B,) 0 leaves an image unchanged."""
    B = len(images)
    strength = torch.rand(B, 1, 1, 1, generator=generator)
    framed = F.pad(images, (1, 1, 1, 1), mode="replicate")
    blurry = F.avg_pool2d(framed, 3, 1)
    grey = 0.3 + 0.4 * torch.rand(B, 1, 1, 1, generator=generator)
    faded = grey + (0.35 + 0.35 * strength) * (images - grey)
    noise = torch.randn(images.shape, generator=generator)
    grainy = images + (0.06 + 0.08 * strength) * noise
    versions = torch.stack([images, blurry, faded, grainy])
    return versions[style, torch.arange(B)].clamp(0, 1)


def normalised(images):
    mean, std = torch.tensor([MEAN, STD])[..., None, None]
    return (images - mean) / std


def to_rows(texts, vocabulary):
    """Tokens of texts (B, 77), numbered by their place in the vocabulary."""
    tokens = open_clip.get_tokenizer("ViT-B-32")(texts)
    return torch.searchsorted(vocabulary, tokens)


def encode_text(clip, tokens):
    """clip.encode_text without the positions after the longest text."""
    end = tokens.argmax(1)  # the end-of-text token has the highest number
    length = end.max() + 1
    x = clip.token_embedding(tokens[:, :length]) + clip.positional_embedding[:length]
    x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
    x = clip.ln_final(x)[torch.arange(len(x)), end]
    return x @ clip.text_projection


@torch.no_grad()
def accuracy(clip, vocabulary, count=2000):
    """Zero-shot accuracy over the 40 classes of shape and texture on new images."""
    generator = torch.Generator().manual_seed(1234)
    shape, texture, colour = random_attributes(count, generator)
    images = render(shape, texture, colour, generator)
    f = clip.encode_image(normalised(images))
    names = [name.replace("_", " ") for name in TEXTURED_SHAPES]
    w = encode_text(clip, to_rows([PHOTO.format(name) for name in names], vocabulary))
    predicted = (f @ F.normalize(w, dim=-1).T).argmax(1)
    label = shape * len(TEXTURES) + texture  # the order of TEXTURED_SHAPES
    return (predicted == label).float().mean().item()


def main(argv=None):
    """Repeats the pretraining of the tiny CLIP and overwrites its weights."""
    parser = argparse.ArgumentParser("python -m tests.tools.shapes", description=main.__doc__)
    parser.add_argument("--steps", type=int, default=7000, help="steps of pretraining [7000]")
    steps = parser.parse_args(argv).steps
    if steps < 1:
        parser.error(f"--steps {steps}: must be at least 1")
    pretrain(steps)


if __name__ == "__main__":
    main()
