"""For the tests: miniatures of the fifteen benchmarks, in their layouts, and a one-layer CLIP."""

import functools
import io
import itertools
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

# Benchmark: folder of the images, split file, {class name: file, with {part} and {n}}
SPLIT = {
    "caltech101": (
        "caltech-101/101_ObjectCategories",
        "split_zhou_Caltech101.json",
        {c.lower().rstrip("s"): c + "/image_{n:04d}.jpg" for c in ("Faces", "Leopards", "anchor")},
    ),
    "dtd": (
        "dtd/images",
        "split_zhou_DescribableTextures.json",
        {c: f"{c}/{c}_{{n:04d}}.jpg" for c in ("banded", "blotchy", "braided")},
    ),
    "eurosat": (
        "eurosat/2750",
        "split_zhou_EuroSAT.json",
        {
            "Annual Crop Land": "AnnualCrop/AnnualCrop_{n}.jpg",
            "Highway or Road": "Highway/Highway_{n}.jpg",
            "Sea or Lake": "SeaLake/SeaLake_{n}.jpg",
        },
    ),
    "food101": (
        "food-101/images",
        "split_zhou_Food101.json",
        {c: c + "/{n}005649.jpg" for c in ("apple_pie", "baby_back_ribs", "waffles")},
    ),
    "oxford_flowers": (
        "oxford_flowers/jpg",
        "split_zhou_OxfordFlowers.json",
        dict.fromkeys(("pink primrose", "pink dahlia", "bird of paradise"), "image_{n:05d}.jpg"),
    ),
    "oxford_pets": (
        "oxford_pets/images",
        "split_zhou_OxfordPets.json",
        {c.lower(): c + "_{n}.jpg" for c in ("Abyssinian", "american_bulldog", "pug")},
    ),
    "stanford_cars": (
        "stanford_cars",
        "split_zhou_StanfordCars.json",
        dict.fromkeys(
            ("2000 AM General Hummer SUV", "2012 Audi TTS Coupe", "1991 Volkswagen Golf"),
            "cars_{part}/{n:05d}.jpg",
        ),
    ),
    "sun397": (
        "sun397/SUN397",
        "split_zhou_SUN397.json",
        {
            "abbey": "a/abbey/sun_{n:04d}.jpg",
            "indoor apse": "a/apse/indoor/sun_{n:04d}.jpg",
            "outdoor volleyball court": "v/volleyball_court/outdoor/sun_{n:04d}.jpg",
        },
    ),
    "ucf101": (
        "ucf101/UCF-101-midframes",
        "split_zhou_UCF101.json",
        {
            "Apply_Eye_Makeup": "Apply_Eye_Makeup/v_ApplyEyeMakeup_g{n:02d}_c01.jpg",
            "Tai_Chi": "Tai_Chi/v_TaiChi_g{n:02d}_c01.jpg",
            "Yo_Yo": "Yo_Yo/v_YoYo_g{n:02d}_c01.jpg",
        },
    ),
}
# ImageNet and its variants: folder of the parts, parts
WORDNET = {
    "imagenet": ("imagenet/images", ("train", "val")),
    "imagenetv2": ("imagenetv2/imagenetv2-matched-frequency-format-val", ("",)),
    "imagenet_sketch": ("imagenet-sketch/images", ("",)),
    "imagenet_a": ("imagenet-adversarial/imagenet-a", ("",)),
    "imagenet_r": ("imagenet-rendition/imagenet-r", ("",)),
}
TEST_ONLY = [*WORDNET][1:]
VARIANTS = ["707-320", "Boeing 717", "F-A 18", "MD-80"]
COUNTS = {"train": 2, "val": 1, "test": 2}  # images per class


@functools.cache
def encoded(form, label=0, size=(40, 34)):
    """The bytes of an image whose colour tells the label."""
    noise = np.random.default_rng(label).integers(0, 60, (*size[::-1], 3))
    Image.fromarray((noise + 60 * (label % 3)).astype(np.uint8)).save(file := io.BytesIO(), form)
    return file.getvalue()


def put(path, content=None, label=0):
    """Writes bytes to path, by default those of an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    forms = {".png": "PNG", ".bmp": "BMP"}
    path.write_bytes(encoded(forms.get(path.suffix, "JPEG"), label) if content is None else content)


def tree(folder, *patterns):
    """Writes files below folder: "train,test/a,b/1.jpg" stands for four images, "a/x.txt=word" for
    a file that holds a word."""
    for pattern in patterns:
        pattern, equals, text = pattern.partition("=")
        for parts in itertools.product(*(part.split(",") for part in pattern.split("/"))):
            put(Path(folder, *parts), text.encode() if equals else None)
    return folder


def wordnet_classes(name):
    """{class folder: class name} of ImageNet or a variant, in the order of its labels."""
    keys = ImageNetInfo().label_names()
    titles = dict(zip(keys, open_clip.IMAGENET_CLASSNAMES, strict=True))
    if name == "imagenetv2":
        return {str(label): title for label, title in enumerate(titles.values())}
    if name in ("imagenet_a", "imagenet_r"):
        keys = files("timm.data._info").joinpath(f"{name}_synsets.txt").read_text().split()
    return {key: titles[key] for key in sorted(keys)}


def write_benchmark(name, root):
    """Writes the benchmark below root as its owners lay it out; {part: its items in order}."""
    if name == "fgvc_aircraft":
        return write_aircraft(root)
    if name in WORDNET:
        return write_wordnet(name, root)
    images, split, classes = SPLIT[name]
    items, number = {part: [] for part in COUNTS}, itertools.count(1)
    for part, count in COUNTS.items():
        for label, (c, file) in reversed(list(enumerate(classes.items()))):  # not in label order
            for n in itertools.islice(number, count):
                path = file.format(part="test" if part == "test" else "train", n=n)
                put(root / images / path, label=label)
                items[part].append([path, label, c])
    (root / images.split("/")[0] / split).write_text(json.dumps(items), "utf-8")
    return {
        part: [(f"{root / images}/{path}", label, c) for path, label, c in rows]
        for part, rows in items.items()
    }


def write_wordnet(name, root):
    images, parts = WORDNET[name]
    items = {"train": [], "test": []}
    for part in parts:
        for label, (folder, c) in enumerate(wordnet_classes(name).items()):
            path = root / images / part / folder / f"{folder}_1.JPEG"
            put(path, label=label % 3)
            items["train" if part == "train" else "test"].append((str(path), label, c))
        put(path.with_name(f"._{path.name}"), b"\0")  # as macOS leaves behind
        put(root / images / part / "README.txt", b"about these images")
    return items


def write_aircraft(root):
    folder, number = root / "fgvc_aircraft", itertools.count(34001)
    items = {part: [] for part in COUNTS}
    for part, count in COUNTS.items():
        for label in 2, 0, 3, 1:
            for n in itertools.islice(number, count):
                put(folder / f"images/{n:07d}.jpg", label=label)
                items[part].append((f"{folder}/images/{n:07d}.jpg", label, VARIANTS[label]))
        lines = [f"{Path(path).stem} {c}\n" for path, _, c in items[part]]
        (folder / f"images_variant_{part}.txt").write_text("".join(lines), "utf-8")
    (folder / "variants.txt").write_text("\n".join(VARIANTS) + "\n", "utf-8")
    return items


def tiny_clip(folder, **vision):
    """Writes an open_clip local-dir model of one layer and random weights; returns its name."""
    folder.mkdir()
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {
        "image_size": 32,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 16,
    } | vision
    model = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        state = open_clip.model.CLIP(**model).state_dict()
    save_file(state, folder / "open_clip_model.safetensors")
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), "utf-8")
    return f"local-dir:{folder}"
