"""For the tests: miniatures of the fifteen data sets in their layout, a CLIP, a watched disk,
killed processes."""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

import common
import coop

# Data set: folder of the images, official split file, {class name: file, with {part} and {n}}.
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
        dict.fromkeys(
            ("pink primrose", "pink-yellow dahlia", "bird of paradise"), "image_{n:05d}.jpg"
        ),
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
# Data set: folder of the class folders, parts, {class folder: class name} in the order of labels.
WNIDS = {
    "imagenet": (
        "imagenet/images",
        ("train", "val"),
        {
            "n01440764": "tench",
            "n02007558": "flamingo",
            "n02119022": "red fox",
            "n04008634": "missile",
        },
    ),
    "imagenetv2": (
        "imagenetv2/imagenetv2-matched-frequency-format-val",
        ("",),
        {"0": "tench", "2": "great white shark", "10": "brambling", "999": "toilet paper"},
    ),
    "imagenet_sketch": (
        "imagenet-sketch/images",
        ("",),
        {"n01440764": "tench", "n01443537": "goldfish", "n15075141": "toilet paper"},
    ),
    "imagenet_a": (
        "imagenet-adversarial/imagenet-a",
        ("",),
        {"n01498041": "stingray", "n02007558": "flamingo", "n12144580": "corn"},
    ),
    "imagenet_r": (
        "imagenet-rendition/imagenet-r",
        ("",),
        {
            "n01443537": "goldfish",
            "n02129165": "lion",
            "n07873807": "pizza",
            "n09472597": "volcano",
        },
    ),
}
TEST_ONLY = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
COUNTS = {"train": 2, "val": 1, "test": 2}  # images per class


def picture(path, label=0, size=(40, 34)):
    """Draws an image whose colour tells the label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(label).integers(0, 60, (*size[::-1], 3))
    Image.fromarray((noise + 60 * (label % 3)).astype(np.uint8)).save(path)


def tree(folder, files, label=0):
    """Draws images at these paths below folder; other files hold a few words."""
    for file in files:
        if Path(file).suffix in (".png", ".jpg", ".JPG", ".bmp"):
            picture(folder / file, label)
        else:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("no image")
    return folder


def miniature(name, root):
    """Writes the data set below root as its owners lay it out; {part: its items in order}."""
    if name == "fgvc_aircraft":
        return aircraft(root)
    items = {"train": [], "val": [], "test": []}
    if name in WNIDS:
        images, parts, classes = WNIDS[name]
        for part in parts:
            for label, (folder, c) in enumerate(classes.items()):
                for n in 3, 1, 2:
                    path = root / images / part / folder / f"{folder}_{n}.JPEG"
                    picture(path, label)
                    items["train" if part == "train" else "test"].append((str(path), label, c))
                (root / images / part / folder / ".DS_Store").write_bytes(b"\0")
            (root / images / part / "README.txt").write_text("about these images")
            (root / images / part / ".hidden").mkdir()
        return {
            part: sorted(rows, key=lambda row: (row[1], row[0])) for part, rows in items.items()
        }
    images, split, classes = SPLIT[name]
    number = itertools.count(1)
    for part, count in COUNTS.items():
        for label, (c, file) in reversed(list(enumerate(classes.items()))):  # not in label order
            for n in itertools.islice(number, count):
                path = file.format(part="test" if part == "test" else "train", n=n)
                picture(root / images / path, label)
                items[part].append([path, label, c])
    folder = root / images.split("/")[0]
    (folder / split).write_text(json.dumps(items))
    return {
        part: [(f"{root / images}/{path}", label, c) for path, label, c in rows]
        for part, rows in items.items()
    }


def aircraft(root):
    folder, variants = root / "fgvc_aircraft", ["707-320", "Boeing 717", "F-A 18", "MD-80"]
    items, number = {"train": [], "val": [], "test": []}, itertools.count(34001)
    for part, count in COUNTS.items():
        for label in 2, 0, 3, 1:
            for n in itertools.islice(number, count):
                picture(folder / f"images/{n:07d}.jpg", label)
                items[part].append((f"{folder}/images/{n:07d}.jpg", label, variants[label]))
        lines = [f"{Path(path).stem} {c}\n" for path, _, c in items[part]]
        (folder / f"images_variant_{part}.txt").write_text("".join(lines))
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    return items


def tiny_clip(folder):
    """Writes an open_clip local-dir model of one layer and random weights; returns its name."""
    folder.mkdir()
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    model = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        state = open_clip.model.CLIP(**model).state_dict()
    save_file(state, folder / "open_clip_model.safetensors")
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def run_coop(*flags):
    """coop.py with these flags, one epoch and the least work, in this process: its accuracy."""
    least = "--epochs 1 --n_ctx 2 --workers 2 --device cpu --pretrained".split()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, this small work would wait for a busy machine's cores
    try:
        return coop.main(common.cli(coop.Config, [*least, "", *map(str, flags)]))
    finally:
        torch.set_num_threads(threads)


def records(out):
    """The rows of all results.json below out."""
    files = sorted(Path(out).rglob("results.json"))
    return [row for file in files for row in json.loads(file.read_text("utf-8"))]


def one_line(capsys, end):
    """The line on stderr of a program that ended with the SystemExit end, exit code 2."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (end.code, len(errors), lines[-1:]) == (2, 1, errors), f"{end.code}: {lines}"
    return errors[0]


def refusal(capsys, command, *arguments):
    """The one line with which command(*arguments), run as a script, ends; exit code 2."""
    capsys.readouterr()
    try:
        common.script(lambda: command(*arguments))
    except SystemExit as end:
        return one_line(capsys, end)
    raise AssertionError("it was not refused")


# ---------------------------------------------------------------------------- a watched disk

_watchers = []


def _audit(event, arguments):
    """Calls every watcher with the path that this process is about to write, rename or remove."""
    if not _watchers:
        return
    paths = []
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, mode, flags = arguments
        if set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            paths = [path]
    elif event in ("os.rename", "os.link", "os.symlink"):
        paths = arguments[:2]
    elif event in ("os.mkdir", "os.rmdir", "os.remove", "os.chmod", "shutil.rmtree"):
        paths = arguments[:1] if arguments[-1] in (-1, None) else []  # else of a folder seen before
    for path in map(os.path.abspath, map(os.fsdecode, paths)):
        if not path.startswith("/dev/") and "__pycache__" not in path:
            for watcher in _watchers:
                watcher(path)


sys.addaudithook(_audit)


@contextmanager
def watched(watcher):
    """Calls watcher(path) before each write of this process; what it raises, the write raises."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def confined(*folders):
    """Fails at the end if anything was written outside of folders."""
    strays = []

    def note(path):
        if not any(path == str(f) or path.startswith(f"{f}/") for f in folders):
            strays.append(path)

    with watched(note):
        yield
    assert not strays, f"written outside: {strays}"


# ---------------------------------------------------------------------------- killed processes

processes = multiprocessing.get_context("spawn")
if "forkserver" in multiprocessing.get_all_start_methods():  # its children have imported torch
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.miniatures"])
tqdm.set_lock(threading.RLock())  # its own one children share, and one is killed within it


def child(command, *arguments, log=os.devnull):
    """Starts command(*arguments) in a process of its own, which prints to the file log."""
    process = processes.Process(target=_child, args=(str(log), command, arguments))
    process.start()
    return process


def _child(log, command, arguments):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        command(*arguments)


def killed_at(n, command, *arguments):
    """command(*arguments) in a process that is killed by its n-th write, or ends before."""
    process = child(_killed_at, n, command, arguments)
    process.join()
    return process.exitcode


def _killed_at(n, command, arguments):
    count = itertools.count(1)

    def die(path):
        if next(count) == n:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    with watched(die):
        command(*arguments)
