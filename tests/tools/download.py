"""Downloads the images and the split file of a benchmark: whole, or not at all.

    python -m tests.tools.download caltech101 --data data

An archive in --data, under its own name, is used instead of its URL. The URLs are untested.
"""

import argparse
import contextlib
import difflib
import hashlib
import re
import shutil
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from filelock import FileLock
from huggingface_hub import hf_hub_download
from torchvision.datasets.utils import check_md5, download_url

import common

OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
BERKELEY = "https://people.eecs.berkeley.edu/~hendrycks/"
HUB = "https://huggingface.co/"
V2 = HUB + "datasets/vaishaal/ImageNetV2/resolve/main/"
SKETCH = HUB + "datasets/songweig/imagenet_sketch/resolve/main/data/"
# Third parties' copies
TORCHGEO = HUB + "datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/"
PROMPTKD = HUB + "zhengli97/prompt_learning_dataset/resolve/"
PROMPTKD += "ceb3112337fb6e1bf71534e355ca5569b63f19a6/"
# CoOp's split files, beside the code of Cross-Modal Adaptation
SPLITS = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/"
SPLITS += "ac9077ee4e422f768c9b9109551468605e33ec9a/splits/"

ARCHIVES = {
    "caltech101": "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
    "dtd": OXFORD + "dtd/download/dtd-r1.0.1.tar.gz",
    "eurosat": TORCHGEO + "EuroSAT.zip",
    "fgvc_aircraft": OXFORD + "fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
    "food101": "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
    "oxford_flowers": OXFORD + "flowers/102/102flowers.tgz",
    "oxford_pets": OXFORD + "pets/data/images.tar.gz",
    "stanford_cars": PROMPTKD + "stanford_cars.zip",
    "sun397": PROMPTKD + "sun397.zip",
    "ucf101": PROMPTKD + "ucf101.zip",
    "imagenetv2": V2 + "imagenetv2-matched-frequency.tar.gz",
    "imagenet_sketch": SKETCH + "ImageNet-Sketch.zip",
    "imagenet_a": BERKELEY + "imagenet-a.tar",
    "imagenet_r": BERKELEY + "imagenet-r.tar",
}
# The images' folder in the archive, where it is not that of common.BENCHMARKS
INSIDE = {"stanford_cars": "cars_train", "imagenet_sketch": "sketch"}

# An archive's md5, where known; a split file's git blob id
CHECKSUMS = {
    "caltech-101.zip": "3138e1922a9193bfa496528edbbc45d0",
    "EuroSAT.zip": "c8fa014336c82ac7804f0398fcb19387",
    "food-101.tar.gz": "85eeb15f3717b99a5da872d97d918f87",
    "split_zhou_Caltech101.json": "8be694a80de04a39fb159c462bea9696aa47ccf1",
    "split_zhou_DescribableTextures.json": "8dd197a94b598fa44ee3c9e35c486dd017ab00a7",
    "split_zhou_EuroSAT.json": "6bdc847a5d5c49dcc78e8cb8707b87198cbfa5a4",
    "split_zhou_Food101.json": "39557040ee6501bd32aa8b5dfd75f7941a32f0a7",
    "split_zhou_OxfordFlowers.json": "8d10037b0690b6c65e307a354b039efb0f42404c",
    "split_zhou_OxfordPets.json": "fa821d9f9e7d32fdf3640bf74fa7491ed04f37da",
    "split_zhou_StanfordCars.json": "dcdb8264712e9940e74cfb0f06ddb8f9cc239b81",
    "split_zhou_SUN397.json": "8d5725db8f70bcf02245665304f863e68f96a24c",
    "split_zhou_UCF101.json": "ea87e3de7b4f6f00fdd77618e34a23508b4c5590",
}


def main(argv=None):
    parser = argparse.ArgumentParser("python -m tests.tools.download", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", help=", ".join(ARCHIVES))
    parser.add_argument("--data", default="data", help="folder of the data sets [data]")
    options = parser.parse_args(argv)
    download(options.name, Path(options.data))


def download(name, root):
    """Downloads the parts of a benchmark that root lacks. Raises Error, OSError."""
    if name == "imagenet":
        raise common.Error(
            "imagenet needs a login: get it at image-net.org, and lay it out as "
            f"{root / 'imagenet/images'}/train and val, with a folder per WordNet id in each"
        )
    if name not in ARCHIVES:
        near = ", ".join(difflib.get_close_matches(name, ARCHIVES, 4, 0.4) or ARCHIVES)
        raise common.Error(f"no data set {name!r} to download; similar: {near}")
    if not hasattr(tarfile, "data_filter"):
        raise common.Error("unpacking archives safely needs Python 3.11.4 or later (3.10: 3.10.12)")
    folder, images, title, _ = common.BENCHMARKS[name]
    target, temporary = root / folder, root / f".{folder}.partial"
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder}.lock"):  # another process may do the same
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed one
        temporary.mkdir()
        try:
            if title:
                split = target / f"split_zhou_{title}.json"
                with explained(SPLITS + split.name, split):
                    fetch(SPLITS + split.name, split, temporary).replace(split)
            home = target / (images or INSIDE[name])
            if home.is_dir():
                print(f"the images are in {home}; to download them again, delete that folder")
            else:
                get_images(ARCHIVES[name], home, INSIDE.get(name, images), temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    print(f"{name} is in {target}")


def get_images(url, home, inside, temporary):
    """Unpacks url's archive and moves its content into place, the folder of images last."""
    place = home.parent.parent / url.split("/")[-1]
    with explained(url, place):
        archive = fetch(url, place, temporary)
        print(f"unpacking {archive.name}", flush=True)
        unpacked = temporary / "unpacked"
        unpack(archive, unpacked)
        shutil.rmtree(unpacked / "__MACOSX", ignore_errors=True)  # it repeats the names
        for inner in list(unpacked.rglob("*.tar.gz")):
            unpack(inner, inner.parent)
            inner.unlink()
        # Windows also finds sun397 for SUN397
        found = [path for path in unpacked.rglob(inside) if path.name == inside]
        if not found:
            raise ValueError(f"it holds no folder {inside}")
        for entry in found[0].parent.iterdir():
            goal = home.parent / entry.name
            if entry != found[0] and not goal.exists():
                entry.rename(goal)
        found[0].rename(home)


@contextlib.contextmanager
def explained(url, place):
    """Turns any exception raised inside into an Error that says what to do."""
    try:
        yield
    except Exception as problem:
        text = " ".join(str(problem).split())[:300].rstrip(".") or type(problem).__name__
        if place.is_file():
            raise common.Error(f"{place}: {text}; replace it") from None
        cure = f"run the command again, or put the file at {place}"
        raise common.Error(f"{url}: {text}; {cure}") from None


def fetch(url, place, temporary):
    """The path of a file with the right checksum: place, or else downloaded from url."""
    if place.is_file():
        if is_right(place):
            return place
        print(f"{place}: wrong checksum; downloading it again", flush=True)
    if url.startswith((TORCHGEO, PROMPTKD)):
        print(f"{url} is a third party's copy: the owners' link is broken, but their terms apply")
    if hub := re.fullmatch(HUB + "(?:(dataset)s/)?(.+)/resolve/(.+?)/(.+)", url):
        kind, repo, revision, file = hub.groups()
        hf_hub_download(repo, file, repo_type=kind, revision=revision, local_dir=temporary)
    else:
        file = place.name
        download_url(url, temporary, file)
    if not is_right(temporary / file):
        raise ValueError("wrong checksum")
    return temporary / file


def is_right(path):
    """Whether a file has the right checksum; an archive without a known one passes."""
    known = CHECKSUMS.get(path.name)
    if path.suffix != ".json":
        return not known or check_md5(path, known)
    content = path.read_bytes()
    return known == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def unpack(archive, folder):
    """Unpacks an archive, letting nothing land outside the folder. Raises many kinds."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            for path in map(PurePosixPath, file.namelist()):
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"{path} leaves the folder")
            file.extractall(folder)
        return
    with tarfile.open(archive) as file:
        file.extractall(folder, filter=data_without_links)
        # tarfile takes a damaged header for the end; the true end is a block of zeros
        file.fileobj.seek(file.offset)
        if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError("it breaks off")
        while file.fileobj.read(2**20):  # gzip's checksum is compared at its end
            pass


def data_without_links(member, folder):
    """tarfile's data filter, but without symbolic links, which can fool it (CVE-2025-4517)."""
    if member.issym():
        raise ValueError(f"{member.name} is a symbolic link")
    return tarfile.data_filter(member, folder)


if __name__ == "__main__":
    common.script(main)
