"""Fetches the benchmark data sets: split files, and with --download the images.

From the owners' addresses where they work, else a third party's copies. No address could be tried
where this was written: tests/test_download.py runs it against a server on 127.0.0.1.
"""

import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from common import TABLE, Error

# Archives: the owners' addresses where they work, else a third party's copies; md5 where known.
SOURCES = """
caltech101      https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip 3138e1922a9193bf
dtd             vgg:dtd/download/dtd-r1.0.1.tar.gz
eurosat         eurosat:EuroSAT.zip                                                c8fa014336c82ac7
fgvc_aircraft   vgg:fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz
food101         http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz                  85eeb15f3717b99a
oxford_flowers  vgg:flowers/102/102flowers.tgz
oxford_pets     vgg:pets/data/images.tar.gz
stanford_cars   copies:stanford_cars.zip
sun397          copies:sun397.zip
ucf101          copies:ucf101.zip
imagenetv2      hf:datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz
imagenet_sketch hf:datasets/songweig/imagenet_sketch/resolve/main/data/ImageNet-Sketch.zip
imagenet_a      https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar
imagenet_r      https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar
"""
SOURCES = {row.split()[0]: row.split()[1:] for row in SOURCES.strip().splitlines()}
HOSTS = {
    "vgg": "https://www.robots.ox.ac.uk/~vgg/data/",
    "hf": "https://huggingface.co/",
    "eurosat": "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
    "c877bcd43f099cd0196738f714544e355477f3fd/",
    "copies": "https://huggingface.co/zhengli97/prompt_learning_dataset/resolve/"
    "ceb3112337fb6e1bf71534e355ca5569b63f19a6/",
    "splits": "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/"
    "ac9077ee4e422f768c9b9109551468605e33ec9a/splits/",
}


def download(name, root):
    """Fetches the images of TABLE's data set where root lacks them: whole, or not at all.

    The archive is unpacked beside its place, so that no half data set is ever seen, and a repeated
    command goes on with a broken download. Raises Error for whatever the network, the archive or
    the disk does.
    """
    if name not in SOURCES:
        return
    folder, images = Path(root, TABLE[name][0]), TABLE[name][1]
    marker = {"stanford_cars": "cars_train", "imagenet_sketch": "sketch"}.get(name, images)
    home = folder / (images if marker == "sketch" else marker)
    address, *md5 = SOURCES[name]
    host, _, path = address.partition(":")
    archive, staging = Path(root, path.rsplit("/")[-1]), Path(root, f".{name}.unpacking")
    shutil.rmtree(staging, ignore_errors=True)  # of a killed process
    if home.is_dir():
        return
    if host == "copies":
        print(f"{name}: its owners' link is dead; this is a third party's copy, for research only")
    fetch(HOSTS[host] + path if host in HOSTS else address, archive, *md5)
    try:
        print(f"unpacking {archive}", flush=True)
        unpack(archive, staging)
        found = next((p for p in sorted(staging.rglob(marker)) if p.is_dir()), None)
        if not found:
            raise Error(f"{archive} holds no folder {marker}; delete it and repeat")
        folder.mkdir(exist_ok=True)
        for entry in sorted(found.parent.iterdir(), key=lambda p: p == found):  # images at last
            target = home if entry == found else folder / entry.name
            if not target.exists():
                entry.rename(target)
        archive.unlink()
    except OSError as problem:
        raise Error(f"{name}: {problem}; nothing was installed, repeat to go on") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def unpack(archive, folder):
    """Unpacks archive, and the archives in it, below folder, which no entry can leave: shutil skips
    such names in a zip and refuses them, and links that leave, in a tar. Raises Error."""
    try:
        extract(archive, folder)
        shutil.rmtree(folder / "__MACOSX", ignore_errors=True)  # a Mac's shadows of the same names
        for inner in [p for p in folder.rglob("*") if p.name.endswith((".tar.gz", ".tgz"))]:
            extract(inner, inner.parent)
            inner.unlink()
    except Exception as problem:  # zipfile, tarfile, zlib and the disk raise many kinds
        cure = "repeat" if getattr(problem, "errno", None) else "delete it and repeat"
        raise Error(f"{archive}: {problem}; nothing was installed, {cure}") from None


def extract(archive, folder):
    shutil.unpack_archive(
        archive, folder, **({} if archive.suffix == ".zip" else {"filter": "data"})
    )


def fetch_split(path, blob):
    """Downloads an official split file and checks it against its git blob id. Raises Error."""
    fetch(HOSTS["splits"] + path.name, path, blob)


def fetch(url, path, checksum=""):
    """Downloads url to path unless it is there, through path.part, which a repeated call continues.

    checksum: the first 16 digits of the md5, or of the git blob id for a split file. Raises Error.
    """
    part = Path(f"{path}.part")
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        start = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(request, timeout=60) as reply:
            start = start if reply.status == 206 else 0
            size = start + int(reply.headers.get("Content-Length") or 0)
            bar = tqdm(desc=path.name, total=size, initial=start, unit="B", unit_scale=True)
            with open(part, "ab" if start else "wb") as file, bar:
                while block := reply.read(1 << 20):
                    bar.update(file.write(block))
        if part.stat().st_size < size:
            raise OSError("the connection broke")
    except urllib.error.HTTPError as problem:
        if problem.headers.get("Content-Range") != f"bytes */{start}":  # else part is whole
            if problem.code == 416:
                part.unlink()
            raise Error(f"{url}: {problem}; repeat, or put the file at {path} yourself") from None
    except (OSError, http.client.HTTPException) as problem:
        raise Error(f"{url}: {problem}; repeat to go on, or put it at {path} yourself") from None
    split = path.suffix == ".json"
    digest = hashlib.sha1(b"blob %d\0" % part.stat().st_size) if split else hashlib.md5()
    with open(part, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if not digest.hexdigest().startswith(checksum):
        part.unlink()
        raise Error(f"{url}: not the file expected (checksum), so it was deleted; repeat")
    part.replace(path)
