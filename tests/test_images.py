"""Pictures: decoding, views against PIL's, random boxes against torchvision's, the loader."""

import math
import os
import random
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms import functional as vision

import common
from tests.conftest import toy

BICUBIC = transforms.InterpolationMode.BICUBIC


SIZES = [(500, 375), (375, 500), (333, 500), (640, 480), (300, 200), (32, 32), (20, 27)]


def photo(width, height):
    """A PIL picture with smooth and fine detail, too dull for bicubic to overshoot 8 bits often."""
    generator = torch.Generator().manual_seed(width + 1000 * height)
    coarse = torch.rand(1, 3, 9, 9, generator=generator)
    smooth = interpolate(coarse, (height, width), mode="bilinear")[0]
    fine = torch.rand(3, height, width, generator=generator)
    return vision.to_pil_image(0.1 + 0.7 * smooth + 0.1 * fine)


def viewer(side):
    """What common.views asks of a Clip, with colours as they are."""
    colours = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    return types.SimpleNamespace(image_size=side, device=torch.device("cpu"), **colours)


def levels(clip, batch):
    """A normalised batch as whole levels of 0 to 255."""
    return (255 * (batch * clip.std + clip.mean)).round().int()


# --- views


def plain_test_view(image, side):
    resize, crop = transforms.Resize(side, BICUBIC), transforms.CenterCrop(side)
    return vision.pil_to_tensor(crop(resize(image))).int()


@pytest.mark.parametrize("side", [32, 224])
def test_test_views_are_pils(side):
    stream = random.Random(0)
    sizes = SIZES + [(stream.randint(67, 600), stream.randint(67, 600)) for _ in range(20)]
    sizes += [(32, 288), (300, 34), (270, 30), (34, 305)]  # up to 9 times as long as wide
    for width, height in sizes:
        image = photo(width, height)
        ours = common.views(viewer(side), [vision.pil_to_tensor(image)])
        plain = plain_test_view(image, side)
        assert torch.equal(levels(viewer(side), ours)[0], plain), image.size


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("width, height", [(1000, 100), (42, 500), (1000, 6), (3, 2001)])
def test_of_a_longer_picture_no_more_than_the_view_needs_is_resized(
    side, width, height, monkeypatch
):
    resize, sizes = common.vision.resize, []

    def watched(image, *more):
        sizes.append(image.size)
        return resize(image, *more)

    monkeypatch.setattr(common.vision, "resize", watched)
    for image in photo(width, height), photo(height, width):
        difference = common.test_view(image, side) - plain_test_view(image, side)
        assert difference.abs().float().mean() < 1, image.size  # half a pixel off: 4
        assert max(sizes[-1]) <= 10 * min(sizes[-1]) and min(sizes[-1]) == min(image.size)


def by_hand(image, side, crop, numbers):
    """A training view by PIL alone, of the box that these numbers give at the first try."""
    share, log_ratio = numbers.uniform(*crop), math.log(4 / 3) * numbers.uniform(-1, 1)
    w = round(math.sqrt(share * image.width * image.height * math.exp(log_ratio)))
    h = round(math.sqrt(share * image.width * image.height / math.exp(log_ratio)))
    left, top = numbers.randint(0, image.width - w), numbers.randint(0, image.height - h)
    view = image.crop((left, top, left + w, top + h)).resize((side, side), Image.Resampling.BICUBIC)
    mirrored = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return vision.pil_to_tensor(mirrored if numbers.random() < 0.5 else view)


@pytest.mark.parametrize("side", [32, 224])
def test_training_views_are_pils(side):
    for width, height in SIZES:
        image = photo(width, height)
        for seed in range(6):
            view = common.train_view(image, side, (0.08, 0.5), random.Random(seed))
            plain = by_hand(image, side, (0.08, 0.5), random.Random(seed))
            assert (view.dtype, view.shape) == (torch.uint8, (3, side, side))
            assert torch.equal(view, plain), (image.size, seed)


def test_views_take_paths_and_tensors(tmp_path):
    image = photo(40, 36)
    image.save(tmp_path / "x.png")
    two = common.views(viewer(32), [tmp_path / "x.png", vision.pil_to_tensor(image)])
    assert two.shape == (2, 3, 32, 32) and torch.equal(*two)


def test_views_are_normalised_as_clip_wants_it(clip):
    picture = torch.full((3, 40, 40), 51, dtype=torch.uint8)
    view = common.views(clip, [picture])[0]
    for c in range(3):
        expected = (51 / 255 - clip.visual.image_mean[c]) / clip.visual.image_std[c]
        assert torch.allclose(view[c], torch.tensor(expected))


# --- decoding


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


def test_a_tensor_is_decoded_as_it_is():
    picture = toy().train[0][0]
    assert torch.equal(vision.pil_to_tensor(common.decode(picture)), picture)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes among files")
def test_a_pipe_is_no_picture_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(common.Error, match="x.png"):
        common.decode(tmp_path / "x.png")


# --- random boxes


@pytest.fixture
def boxes(monkeypatch):
    """The (top, left, height, width) of all boxes that are cut out, which show nothing."""
    found = []

    def cut(image, top, left, height, width, size, interpolation):
        found.append((top, left, height, width))
        return Image.new("RGB", size)

    monkeypatch.setattr(common.vision, "resized_crop", cut)
    return found


def ours(boxes, height, width, crop, n):
    """(n, 4): the boxes of n training views."""
    image, numbers = Image.new("RGB", (width, height)), random.Random(0)
    for _ in range(n):
        common.train_view(image, 8, crop, numbers)
    return np.array(boxes)


def torchvisions(height, width, crop, n):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        draw, image = transforms.RandomResizedCrop.get_params, Image.new("RGB", (width, height))
        return np.array([draw(image, list(crop), [3 / 4, 4 / 3]) for _ in range(n)])


def drawn_alike(a, b):
    """Whether two samples' means and distributions differ by no more than chance: by 4 standard
    errors, and by Kolmogorov and Smirnov's bound for one pair in 10,000."""
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
        assert drawn_alike(what(*found.T), what(*usual.T))


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


def numbered(n):
    """A toy data set whose n labels number its pictures."""
    items = [(picture, i, str(i)) for i, (picture, _, _) in enumerate(toy(n).train)]
    return toy()._replace(train=items, classnames=[name for _, _, name in items])


def epoch_of(cfg, clip, data, epoch):
    """{label: view} of an epoch."""
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


def test_views_depend_on_seed_epoch_and_picture_alone(clip):
    cfg, data = common.Config(batch_size=4, workers=1), numbered(8)
    seen = epoch_of(cfg, clip, data, 1)
    more_threads = epoch_of(common.Config(batch_size=2, workers=8), clip, data, 1)
    with torch.random.fork_rng([]):
        torch.manual_seed(99)  # the global streams take no part
        random.seed(99)
        again = epoch_of(cfg, clip, data, 1)
    later = epoch_of(cfg, clip, data, 2)
    other = epoch_of(common.Config(batch_size=4, seed=2), clip, data, 1)
    for i, view in seen.items():
        assert torch.equal(view, more_threads[i]) and torch.equal(view, again[i])
        assert not torch.equal(view, later[i]) and not torch.equal(view, other[i])
    same = data._replace(train=[(data.train[0][0], i, str(i)) for i in range(8)])
    views = epoch_of(cfg, clip, same, 1)
    assert all(not torch.equal(views[0], views[i]) for i in range(1, 8))  # nor on the content


def test_labels_and_images_go_together(clip):
    pictures = [torch.full((3, 40, 40), 20 * i, dtype=torch.uint8) for i in range(10)]
    data = numbered(10)._replace(train=[(x, i, str(i)) for i, x in enumerate(pictures)])
    for i, view in epoch_of(common.Config(), clip, data, 0).items():
        assert levels(clip, view[None]).unique().tolist() == [20 * i]


def test_a_picture_is_decoded_once_and_beyond_the_memory_in_every_epoch(world, clip, monkeypatch):
    data, decoded = common.load_dataset("shapes", str(world)), []
    decode, lock = common.decode, threading.Lock()

    def counting(picture):
        with lock:
            decoded.append(picture)
        return decode(picture)

    monkeypatch.setattr(common, "decode", counting)
    found = []
    for room in common.KEPT_BYTES, 0:
        monkeypatch.setattr(common, "KEPT_BYTES", room)
        loader = common.Loader(common.Config(), clip, data)
        decoded.clear()
        first = list(loader.epoch(0))
        once = len(decoded)
        assert once >= 32 * len(first)
        found.append(torch.cat([images for images, _ in first]))
        list(loader.epoch(0))
        assert len(decoded) == (once if room else 2 * once)
    assert torch.equal(*found)


def test_a_broken_picture_ends_the_epoch_with_its_name(clip, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    data = toy()._replace(train=[*toy().train, (str(tmp_path / "x.png"), 0, "cat")])
    with pytest.raises(common.Error, match="x.png"):
        list(common.Loader(common.Config(), clip, data).epoch(0))


def test_without_training_images_there_is_no_loader(clip):
    with pytest.raises(common.Error, match="toy has no images"):
        common.Loader(common.Config(), clip, toy()._replace(train=[]))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_that_name_no_class_are_refused(label, clip):
    items = [*toy().train, (toy().train[0][0], label, "dog")]
    with pytest.raises(common.Error, match="toy: labels"):
        common.Loader(common.Config(), clip, toy()._replace(train=items))


def test_half_of_the_views_are_mirrored(clip):
    square = torch.zeros(3, 100, 100, dtype=torch.uint8)
    square[:, :, 50:] = 255
    data = toy()._replace(train=[(square, 0, "cat")], crop=(1.0, 1.0))  # all of it
    loader = common.Loader(common.Config(), clip, data)
    flips = [bool(loader.view(epoch, 0)[0, 0, 0] > 128) for epoch in range(400)]
    assert 160 < sum(flips) < 240


def test_boxes_come_from_the_data_sets_crop(clip, boxes):
    square = torch.zeros(3, 100, 100, dtype=torch.uint8)
    data = toy()._replace(train=[(square, 0, "cat")], crop=(0.3, 0.4))
    loader = common.Loader(common.Config(), clip, data)
    for epoch in range(400):
        loader.view(epoch, 0)
    shares = [h * w / 100**2 for _, _, h, w in boxes]
    assert len(shares) == 400
    assert 0.29 < min(shares) < 0.31 and 0.39 < max(shares) < 0.41


@pytest.mark.parametrize("picture", [torch.rand(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)])
def test_a_tensor_that_is_no_uint8_rgb_picture_is_refused(picture):
    with pytest.raises(common.Error, match="uint8 tensor"):
        common.decode(picture)


def test_views_of_boxes_are_pils_crops_mirrored_where_asked():
    pixels = np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    box = 3, 5, 20, 31  # top, left, height, width
    picture = vision.pil_to_tensor(image)
    ours = common.views(viewer(32), [picture] * 2, [box] * 2, [False, True])
    expected = image.crop((5, 3, 5 + 31, 3 + 20)).resize((32, 32), Image.Resampling.BICUBIC)
    plain = common.normalised(viewer(32), [vision.pil_to_tensor(expected)])[0]
    assert torch.equal(ours[0], plain) and torch.equal(ours[1], plain.flip(-1))
