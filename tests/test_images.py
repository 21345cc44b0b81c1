"""Images: decoding, parity with the official transforms, random boxes, the loader."""

import io
import random
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms import functional as vision

import common
import softcpt
from tests.conftest import toy

BICUBIC = transforms.InterpolationMode.BICUBIC
SIZES = [(500, 375), (375, 500), (333, 500), (640, 480), (300, 200), (32, 32), (20, 27)]
REAL = Path(__file__).parents[2] / "shared" / "gpu" / "data"


def photo(width, height):
    """A PIL image with smooth and fine detail."""
    generator = torch.Generator().manual_seed(width + 1000 * height)
    coarse = torch.rand(1, 3, 9, 9, generator=generator)
    smooth = interpolate(coarse, (height, width), mode="bilinear")[0]
    fine = torch.rand(3, height, width, generator=generator)
    return vision.to_pil_image(0.1 + 0.7 * smooth + 0.1 * fine)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Paths of JPEGs: 200 of the real ones, where they are, else some made here."""
    if REAL.is_dir():
        real = sorted(REAL.rglob("*.jpg"))
        return real[:: len(real) // 200][:200]
    folder, numbers = tmp_path_factory.mktemp("photos"), random.Random(0)
    sizes = SIZES + [(numbers.randint(67, 600), numbers.randint(67, 600)) for _ in range(20)]
    for size in sizes:
        photo(*size).save(folder / "{}_{}.jpg".format(*size), quality=95)
    return sorted(folder.iterdir())


# --- parity with the official transforms


@pytest.mark.parametrize("side", [32, 224])
def test_test_images_equal_the_official_transforms(side, photos):
    official = transforms.Compose([transforms.Resize(side, BICUBIC), transforms.CenterCrop(side)])
    for path in photos:
        ours = common.preprocess(common.decode(path), side)
        theirs = vision.pil_to_tensor(official(Image.open(path).convert("RGB")))
        assert ours.dtype == torch.uint8 and torch.equal(ours, theirs), path


@pytest.mark.parametrize("side", [32, 224])
def test_training_images_equal_the_official_transforms_of_their_boxes(side, photos, monkeypatch):
    boxes, resized_crop = [], common.vision.resized_crop

    def noted(image, *box_and_more):
        boxes.append(box_and_more[:4])
        return resized_crop(image, *box_and_more)

    monkeypatch.setattr(common.vision, "resized_crop", noted)
    monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", lambda *_: boxes[-1])
    official, mirrored = transforms.RandomResizedCrop(side, interpolation=BICUBIC), []
    for seed, path in enumerate(photos):
        ours = common.augment(common.decode(path), side, (0.08, 1.0), random.Random(seed))
        theirs = vision.pil_to_tensor(official(Image.open(path).convert("RGB")))
        mirrored.append(not torch.equal(ours, theirs))
        assert torch.equal(ours, theirs.flip(-1) if mirrored[-1] else theirs), path
    assert 0.25 < np.mean(mirrored) < 0.75


def test_images_are_normalised_as_clip_wants_it(clip):
    (x,) = common.normalize(clip, [torch.full((3, 40, 40), 51, dtype=torch.uint8)])
    for c in range(3):
        expected = (51 / 255 - clip.visual.image_mean[c]) / clip.visual.image_std[c]
        assert torch.allclose(x[c], torch.tensor(expected))


# --- decoding

FORMATS = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
}


def encoded(form, exif=b"", **options):
    """The bytes of a 24 x 16 image whose corners differ."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8], pixels[:8, 16:], pixels[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    options = FORMATS[form] | options | ({"exif": exif} if exif else {})
    Image.fromarray(pixels).save(file := io.BytesIO(), form, **options)
    return file.getvalue()


TURNED = {  # by the EXIF tag: what a viewer shows of rows and columns (EXIF 2.3, 4.6.4 A)
    1: lambda x: x,
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.transpose(1, 2).flip(2),
    7: lambda x: x.transpose(1, 2).flip(1, 2),
    8: lambda x: x.transpose(1, 2).flip(1),
}


@pytest.mark.parametrize("form", FORMATS)
def test_images_are_turned_as_their_exif_tag_says(form, tmp_path):
    def decoded(exif=b""):
        (tmp_path / "x").write_bytes(encoded(form, exif))
        return vision.pil_to_tensor(common.decode(tmp_path / "x"))

    stored = decoded()
    plain = Image.open(io.BytesIO(encoded(form))).convert("RGB")
    assert torch.equal(stored, vision.pil_to_tensor(plain))
    for tag, turned in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        assert torch.equal(decoded(exif), turned(stored)), tag
    for unknown in 0, 9:
        exif[0x0112] = unknown
        assert torch.equal(decoded(exif), stored), unknown


def exif_block(*entries):
    """An EXIF block of entries (tag, type, value)."""
    rows = b"".join(struct.pack("<HHI4s", tag, kind, 1, value) for tag, kind, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4)


SIX = (0x0112, 3, b"\6\0\0\0")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif, size",
    [
        (b"Exif\0\0garbage", (24, 16)),
        (exif_block(SIX)[:-10], (24, 16)),
        (exif_block(SIX, (0x0100, 9, b"\xff" * 4)), (16, 24)),  # a negative width
        (exif_block(SIX, (0x0100, 11, b"\0\0\x80\x3f")), (16, 24)),  # a width of 1.0
    ],
    ids="no_block cut_off negative_width width_of_1.0".split(),
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_leaves_an_image_readable(exif, size, form, tmp_path):
    (tmp_path / "x").write_bytes(encoded(form, exif))
    assert common.decode(tmp_path / "x").size == size


@pytest.mark.parametrize(
    "suffix, mode, colour, rgb",
    [
        (".jpg", "CMYK", (0, 255, 255, 0), (254, 0, 0)),
        (".png", "P", 1, (10, 200, 30)),
        (".png", "I;16", 32896, (128, 128, 128)),
        (".png", "1", 1, (255, 255, 255)),
        (".png", "RGBA", (1, 2, 3, 0), (1, 2, 3)),
        (".png", "LA", (77, 9), (77, 77, 77)),
        (".tif", "F", 90.0, (90, 90, 90)),
        (".webp", "RGB", (0, 0, 255), (0, 0, 255)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(suffix, mode, colour, rgb, tmp_path):
    image = Image.new(mode, (5, 4), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / f"x{suffix}")
    decoded = common.decode(str(tmp_path / f"x{suffix}"))
    assert (decoded.mode, decoded.size) == ("RGB", (5, 4))
    pixels = vision.pil_to_tensor(decoded)
    assert (pixels.int() - torch.tensor(rgb)[:, None, None]).abs().max() <= 3


def test_an_animated_gif_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert common.decode(tmp_path / "x.gif").getpixel((3, 3)) == (255, 0, 0)


def huge_png():
    """A few bytes that claim 60,000 x 60,000 pixels."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(bytes(999)))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", huge_png(), huge_png()[:50], encoded("JPEG")[:-99], encoded("PNG")[:-40]],
    ids="empty text huge half_png truncated_jpeg truncated_png".split(),
)
def test_an_image_that_cannot_be_read_is_named(content, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(common.Error, match="x.jpg"):
        common.decode(tmp_path / "x.jpg")


# --- random boxes


@pytest.fixture
def boxes(monkeypatch):
    """The (top, left, height, width) of all crops; the crops themselves are blank."""
    found = []

    def cut(image, top, left, height, width, size, interpolation):
        found.append((top, left, height, width))
        return Image.new("RGB", size)

    monkeypatch.setattr(common.vision, "resized_crop", cut)
    return found


def ours(boxes, height, width, crop, n):
    """(n, 4): the boxes of n augmented images."""
    image, numbers = Image.new("RGB", (width, height)), random.Random(0)
    for _ in range(n):
        common.augment(image, 8, crop, numbers)
    return np.array(boxes)


def torchvisions(height, width, crop, n):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        sample, image = transforms.RandomResizedCrop.get_params, Image.new("RGB", (width, height))
        return np.array([sample(image, list(crop), [3 / 4, 4 / 3]) for _ in range(n)])


def alike(a, b):
    """Whether two samples' means differ by at most 4 standard errors, and their distributions by
    at most the Kolmogorov-Smirnov bound that one pair in 10,000 exceeds by chance."""
    n, at = len(a), np.concatenate([a, b])
    shares = [np.searchsorted(np.sort(x), at, side="right") / n for x in (a, b)]
    means = abs(a.mean() - b.mean()) <= 4 * np.sqrt((a.var() + b.var()) / n)
    return means and abs(shares[0] - shares[1]).max() < 2.23 * np.sqrt(2 / n)


@pytest.mark.parametrize("crop", [(0.08, 1.0), (0.5, 1.0)])
@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (32, 32), (224, 300), (90, 31)])
def test_random_boxes_are_spread_as_torchvisions(height, width, crop, boxes):
    setting = height, width, crop, 4000
    found, usual = ours(boxes, *setting), torchvisions(*setting)
    top, left, h, w = found.T
    assert min(top.min(), left.min()) >= 0 and min(h.min(), w.min()) > 0
    assert (top + h).max() <= height and (left + w).max() <= width
    for what in (
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: np.log(w / h),
        lambda top, left, h, w: (top + 0.5) / (height - h + 1),  # among the places that it has
        lambda top, left, h, w: (left + 0.5) / (width - w + 1),
    ):
        assert alike(what(*found.T), what(*usual.T))


@pytest.mark.parametrize(
    "height, width", [(5, 1000), (1000, 5), (1, 1), (31, 90), (302, 100), (7, 11), (99, 99)]
)
def test_where_no_box_fits_the_centre_is_shown(height, width, boxes):
    setting = height, width, (1.0, 1.0), 20
    found, usual = ours(boxes, *setting), torchvisions(*setting)
    assert len(np.unique(usual, axis=0)) == 1 and (found == usual).all()
    top, left, h, w = found[0]
    assert top >= 0 and left >= 0 and top + h <= height and left + w <= width and h * w > 0


# --- the loader


def saved(path, pixels):
    """The path of an image with these pixels (height, width, 3)."""
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return str(path)


def numbered(n):
    """A toy data set whose n labels number its images."""
    names = [str(i) for i in range(n)]
    train = [(path, i, names[i]) for i, (path, *_) in enumerate(toy(n).train)]
    return toy()._replace(train=train, classnames=names)


def epoch_of(cfg, clip, data, epoch):
    """{label: image} of an epoch."""
    batches = common.Loader(cfg, clip, data).epoch(epoch)
    return {int(y): x for xs, ys in batches for x, y in zip(xs, ys, strict=True)}


@pytest.mark.parametrize(
    "n, sizes", [(10, [10]), (32, [32]), (40, [32]), (100, [32, 32, 32]), (1, [1])]
)
def test_an_epoch_has_no_image_twice_and_drops_a_short_batch_unless_alone(clip, n, sizes):
    loader = common.Loader(common.Config(), clip, numbered(n))
    epochs = [[labels for _, labels in loader.epoch(epoch)] for epoch in (0, 1, 0)]
    assert [len(labels) for labels in epochs[0]] == sizes == [len(b) for b in loader.order(0)]
    orders = [torch.cat(labels).tolist() for labels in epochs]
    assert orders[0] == [i for batch in loader.order(0) for i in batch]
    assert len(set(orders[0])) == sum(sizes) and orders[0] == orders[2]
    if n > 1:
        assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_labels_and_images_of_a_batch_go_together(clip, tmp_path):
    items = [
        (saved(tmp_path / f"{i}.png", np.full((40, 40, 3), 20 * i)), i, str(i)) for i in range(10)
    ]
    data = numbered(10)._replace(train=items)
    for i, x in epoch_of(common.Config(), clip, data, 0).items():
        levels = 255 * (x * clip.std + clip.mean)[0]
        assert levels.round().unique().tolist() == [20 * i]


def test_augmented_images_depend_on_seed_epoch_and_image_alone(clip):
    cfg, data = common.Config(batch_size=4, workers=1), numbered(8)
    seen = epoch_of(cfg, clip, data, 1)
    more_threads = epoch_of(common.Config(batch_size=2, workers=8), clip, data, 1)
    with torch.random.fork_rng([]):
        torch.manual_seed(99)  # the global streams take no part
        random.seed(99)
        again = epoch_of(cfg, clip, data, 1)
    later = epoch_of(cfg, clip, data, 2)
    other = epoch_of(common.Config(batch_size=4, seed=2), clip, data, 1)
    for i, x in seen.items():
        assert torch.equal(x, more_threads[i]) and torch.equal(x, again[i])
        assert not torch.equal(x, later[i]) and not torch.equal(x, other[i])
    same = data._replace(train=[(data.train[0][0], i, str(i)) for i in range(8)])
    twins = epoch_of(cfg, clip, same, 1)
    assert all(not torch.equal(twins[0], twins[i]) for i in range(1, 8))  # nor on the content


def test_the_order_and_dropout_have_seeds_of_their_own(clip, tmp_path):
    cfg, data = common.Config(batch_size=100, epochs=3, out=str(tmp_path)), numbered(100)
    prompt = torch.nn.Linear(1, 1)
    optimizer = common.Optimizer(cfg, clip, prompt.parameters(), 3)
    loader, orders = common.Loader(cfg, clip, data), []
    for epoch in common.resumed(cfg, clip, data, prompt, optimizer):
        orders += [torch.randperm(100).tolist(), loader.order(epoch)[0]]
        optimizer.step(prompt(torch.ones(1)).sum())
    assert len({*map(tuple, orders)}) == 6


def test_an_image_is_decoded_once_and_beyond_the_cache_in_every_epoch(clip, monkeypatch):
    data, decoded, decode, lock = numbered(32), [], common.decode, threading.Lock()

    def counting(path):
        with lock:
            decoded.append(path)
        return decode(path)

    monkeypatch.setattr(common, "decode", counting)
    epochs = []
    for room, times in (common.CACHE_BYTES, 1), (0, 2):
        monkeypatch.setattr(common, "CACHE_BYTES", room)
        decoded.clear()
        loader = common.Loader(common.Config(), clip, data)
        epochs += [torch.cat([x for x, _ in loader.epoch(0)]) for _ in range(2)]
        assert len(decoded) == times * 32
    assert all(torch.equal(epochs[0], epoch) for epoch in epochs)


def test_a_broken_image_ends_the_epoch_with_its_name(clip, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    data = toy()._replace(train=[*toy().train, (str(tmp_path / "x.png"), 0, "cat")])
    with pytest.raises(common.Error, match="x.png"):
        list(common.Loader(common.Config(), clip, data).epoch(0))


def test_half_of_the_augmented_images_are_mirrored(clip, tmp_path):
    pixels = np.zeros((100, 100, 3))
    pixels[:, 50:] = 255
    item = (saved(tmp_path / "x.png", pixels), 0, "cat")
    data = toy()._replace(train=[item], crop=(1.0, 1.0))  # all of it
    loader = common.Loader(common.Config(), clip, data)
    flips = [bool(loader.augmented(epoch, 0)[0, 0, 0] > 128) for epoch in range(400)]
    assert 160 < sum(flips) < 240


def shares_of(loader, i, boxes):
    """Shares of the area of image i, which is 40 x 36, that 400 epochs show."""
    boxes.clear()
    for epoch in range(400):
        loader.augmented(epoch, i)
    return [h * w / (40 * 36) for _, _, h, w in boxes]


def test_boxes_come_from_the_data_sets_crop(clip, boxes):
    loader = common.Loader(common.Config(), clip, toy()._replace(crop=(0.3, 0.4)))
    shares = shares_of(loader, 0, boxes)
    assert len(shares) == 400
    assert 0.28 < min(shares) < 0.32 and 0.38 < max(shares) < 0.42


def test_each_task_of_softcpt_keeps_its_own_crop(clip, boxes, monkeypatch):
    loaders, Loader = [], common.Loader
    monkeypatch.setattr(common, "Loader", lambda *a: loaders.append(Loader(*a)) or loaders[0])
    monkeypatch.setattr(common, "resumed", lambda *_: [])
    crops = {"a": (0.3, 0.4), "b": (0.7, 0.8)}
    sets = [toy()._replace(name=name, crop=crop) for name, crop in crops.items()]
    cfg = softcpt.Config(dataset="a,b")
    tasks = softcpt.tasks_of(cfg, sets)
    softcpt.train(cfg, clip, tasks, softcpt.learnables(cfg, clip, tasks))
    for i, (least, most) in (0, crops["a"]), (5, crops["a"]), (6, crops["b"]), (11, crops["b"]):
        shares = shares_of(loaders[0], i, boxes)
        assert least - 0.02 < min(shares) and max(shares) < most + 0.02
