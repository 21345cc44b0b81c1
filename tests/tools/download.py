"""Fetches the images and the split file of a benchmark: whole, or not at all.

    python common.py download caltech101 --data data

The images come from their owners, or, where the owners' link is dead, from a third party's copy.
A repeated command goes on with a broken download. An archive that you put into --data yourself,
under its own name, is taken instead of the address. No address could be tried where this was
written: tests/test_download.py runs this file against a server of its own.

Several processes may fetch the same data set at once, as the jobs of an array do. None waits for
another: each unpacks into a folder of its own, and the first to finish installs what all have.
"""

import argparse
import difflib
import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

import common
from common import BENCHMARKS, Error

CALTECH = "https://data.caltech.edu/records/mzrjq-6wc02/files/"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
BERKELEY = "https://people.eecs.berkeley.edu/~hendrycks/"
HUGGING_FACE = "https://huggingface.co/"
EUROSAT = "datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/"
IMAGENETV2 = "datasets/vaishaal/ImageNetV2/resolve/main/"
SKETCH = "datasets/songweig/imagenet_sketch/resolve/main/data/"

# Copies of the sets whose owners' links are dead, by the authors of PromptKD
COPIES = "https://huggingface.co/zhengli97/prompt_learning_dataset/resolve/"
COPIES += "ceb3112337fb6e1bf71534e355ca5569b63f19a6/"

# CoOp's split files, kept beside the code of Cross-Modal Adaptation
SPLITS = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/"
SPLITS += "ac9077ee4e422f768c9b9109551468605e33ec9a/splits/"


class Source(NamedTuple):
    """An archive's address, the start of its md5 where known, and its folder of the images where
    that has another name than in BENCHMARKS."""

    url: str
    md5: str = ""
    images: str = ""


SOURCES = {
    "caltech101": Source(CALTECH + "caltech-101.zip", "3138e1922a9193bf"),
    "dtd": Source(OXFORD + "dtd/download/dtd-r1.0.1.tar.gz"),
    "eurosat": Source(HUGGING_FACE + EUROSAT + "EuroSAT.zip", "c8fa014336c82ac7"),
    "fgvc_aircraft": Source(OXFORD + "fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"),
    "food101": Source("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "85eeb15f3717b99a"),
    "oxford_flowers": Source(OXFORD + "flowers/102/102flowers.tgz"),
    "oxford_pets": Source(OXFORD + "pets/data/images.tar.gz"),
    "stanford_cars": Source(COPIES + "stanford_cars.zip", images="cars_train"),
    "sun397": Source(COPIES + "sun397.zip"),
    "ucf101": Source(COPIES + "ucf101.zip"),
    "imagenetv2": Source(HUGGING_FACE + IMAGENETV2 + "imagenetv2-matched-frequency.tar.gz"),
    "imagenet_sketch": Source(HUGGING_FACE + SKETCH + "ImageNet-Sketch.zip", images="sketch"),
    "imagenet_a": Source(BERKELEY + "imagenet-a.tar"),
    "imagenet_r": Source(BERKELEY + "imagenet-r.tar"),
}

# The first digits of the split files' git blob ids
BLOBS = {
    "Caltech101": "8be694a80de04a39",
    "DescribableTextures": "8dd197a94b598fa4",
    "EuroSAT": "6bdc847a5d5c49dc",
    "Food101": "39557040ee6501bd",
    "OxfordFlowers": "8d10037b0690b6c6",
    "OxfordPets": "fa821d9f9e7d32fd",
    "StanfordCars": "dcdb8264712e9940",
    "SUN397": "8d5725db8f70bcf0",
    "UCF101": "ea87e3de7b4f6f00",
}

BLOCK = 2**20  # bytes that are read at a time


def main(argv):
    """The command. Raises Error."""
    parser = common.Parser("python common.py download", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dataset", help=" ".join(SOURCES))
    parser.add_argument("--data", default="data", help="folder of the data sets [data]")
    options = parser.parse_args(argv)
    download(options.dataset, Path(options.data))


def download(name, root):
    """Fetches what root lacks of a benchmark. Raises Error."""
    if name == "imagenet":
        raise Error(
            "imagenet needs a login: get it at image-net.org, and lay it out as "
            f"{root / 'imagenet/images'}/train and val, with a folder per WordNet id in each"
        )
    if name not in SOURCES:
        near = ", ".join(difflib.get_close_matches(name, SOURCES, 4, 0.4) or SOURCES)
        raise Error(f"{name!r} is no benchmark; near it: {near}")
    folder, images, split, _ = BENCHMARKS[name]
    if split:
        file = f"split_zhou_{split}.json"
        fetch(SPLITS + file, root / folder / file, git_blob, BLOBS[split])
    source = SOURCES[name]
    home = root / folder / (images or source.images)  # it is there as soon as all images are
    archive = root / source.url.split("/")[-1]
    if not home.is_dir():
        try:
            fetch_images(source, archive, home)
        except Error:
            # Where the images are there, another process was first and has tidied up behind us
            if not home.is_dir():
                raise
        archive.unlink(missing_ok=True)
    # What is still being unpacked is of a process that was killed, or that is too late
    for staging in root.glob(f".{folder}.*"):
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{name} is in {root / folder}")


def fetch_images(source, archive, home):
    """Fetches the archive, unpacks it into a folder of its own, and installs it. Raises Error."""
    if source.url.startswith(COPIES):
        print("the owners' link is dead; this is a third party's copy, for research only")
    fetch(source.url, archive, md5, source.md5)
    if home.is_dir():
        return
    print(f"unpacking {archive}", flush=True)
    try:
        staging = Path(tempfile.mkdtemp(dir=archive.parent, prefix=f".{home.parent.name}."))
        try:
            unpack(archive, staging)
            install(staging, source.images or home.name, archive, home)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as problem:
        raise Error(f"{archive}: {problem}; nothing was installed, repeat to go on") from None


def install(staging, images, archive, home):
    """Moves what was unpacked to its place, the images at last. Raises Error, OSError."""
    found = [path for path in sorted(staging.rglob(images)) if path.is_dir()]
    if not found:
        raise Error(f"{archive} holds no folder {images}; get another and repeat")
    home.parent.mkdir(parents=True, exist_ok=True)
    for entry in found[0].parent.iterdir():
        if entry != found[0]:
            move(entry, home.parent / entry.name)
    move(found[0], home)


def move(entry, target):
    """Renames entry, unless target is there, be it by a quicker process. Raises OSError."""
    try:
        if not target.exists():
            entry.rename(target)
    except OSError:
        if not target.exists():
            raise


# ----------------------------------------------------------------------------------- archives


def unpack(archive, folder):
    """Unpacks an archive, and the archives in it, below folder. Raises Error, having deleted the
    archive, where it is damaged or hostile; OSError for what the disk does."""
    try:
        extract(archive, folder)
        # What a Mac adds has the names of the true files
        shutil.rmtree(folder / "__MACOSX", ignore_errors=True)
        for inner in sorted(folder.rglob("*.tar.gz")):
            extract(inner, inner.parent)
            inner.unlink()
    except Exception as problem:  # zipfile, tarfile and zlib raise many kinds
        if getattr(problem, "errno", None):
            raise
        archive.unlink(missing_ok=True)
        raise Error(f"{archive}: {problem}; it is damaged, so it was deleted; repeat") from None


def extract(archive, folder):
    """Extracts an archive that is whole and of which no entry leaves the folder. Raises many."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            check_zip(file)
            file.extractall(folder)
    else:
        form = "r:" if archive.suffix == ".tar" else "r:gz"
        with tarfile.open(archive, form) as file:
            check_tar(file)
            file.extractall(folder, filter=safe)


def check_zip(file):
    """Reads a zip to its end, against its checksums. Raises zipfile.BadZipFile."""
    for name in file.namelist():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise zipfile.BadZipFile(f"{name} leaves the folder")
    if name := file.testzip():
        raise zipfile.BadZipFile(f"{name} has another checksum")


def check_tar(file):
    """Reads a tar to its end, where gzip keeps its checksum. Raises tarfile.ReadError."""
    file.getmembers()
    # For tarfile a damaged header is the end of the archive; the true end is a block of zeros
    file.fileobj.seek(file.offset)
    end = file.fileobj.read(tarfile.BLOCKSIZE)
    while file.fileobj.read(BLOCK):
        pass
    if end != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it breaks off")


def safe(entry, folder):
    """tarfile's "data" filter, for which links within the folder are safe; here none is."""
    if entry.issym():
        raise tarfile.ReadError(f"{entry.name} is a link")
    return tarfile.data_filter(entry, folder)


# ------------------------------------------------------------------------------------ network


def fetch(url, path, digest, expected):
    """Downloads url to path, unless it is there, through path.part, which a repeated call goes on
    with. digest(path) must start with what is expected. Raises Error."""
    part = Path(f"{path}.part")
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        receive(url, part)
        if path.exists():
            return
        if not digest(part).startswith(expected):
            part.unlink()
            raise Error(f"{url} is not the file expected (checksum), so it was deleted; repeat")
        part.replace(path)
    except (OSError, http.client.HTTPException) as problem:
        if not path.exists():  # else another process was first
            cure = f"repeat to go on, or put the file at {path} yourself"
            raise Error(f"{url}: {problem}; {cure}") from None


def receive(url, part):
    """Writes to part what url holds beyond part's length. Processes that do so at once share the
    file: each puts the same bytes in the same place, with no gap before. Raises OSError."""
    part.touch()
    with open(part, "r+b") as file:
        start = file.seek(0, 2)
        headers = {"Range": f"bytes={start}-"} if start else {}
        request = urllib.request.Request(url, headers=headers)
        try:
            reply = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as problem:
            whole = problem.headers.get("Content-Range") == f"bytes */{start}"
            if problem.code == 416 and not whole:
                part.unlink()  # It is longer than what the server holds
            if not whole:
                raise
            return
        with reply:
            if reply.status != 206:
                start = 0  # The server begins anew
            size = start + int(reply.headers.get("Content-Length") or 0)
            file.seek(start)
            bar = tqdm(None, part.stem, size, initial=start, unit="B", unit_scale=True)
            with bar:
                while block := reply.read(BLOCK):
                    bar.update(file.write(block))
        if file.tell() < size:
            raise OSError("the connection broke")


def md5(path):
    """The sum that the owners of an archive publish."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def git_blob(path):
    """The id under which git keeps a file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
