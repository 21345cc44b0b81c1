"""Pictures: decoding, views against PIL's, random boxes against torchvision's, the loader."""

import random
import threading
import types

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


@pytest.mark.parametrize("side", [32, 224])
def test_test_views_are_pils(side):
    resize, crop = transforms.Resize(side, BICUBIC), transforms.CenterCrop(side)
    stream = random.Random(0)
    sizes = SIZES + [(stream.randint(32, 600), stream.randint(32, 600)) for _ in range(20)]
    for width, height in sizes:
        image = photo(width, height)
        ours = common.views(viewer(side), [vision.pil_to_tensor(image)])
        plain = vision.pil_to_tensor(crop(resize(image)))
        assert torch.equal(levels(viewer(side), ours)[0], plain.int()), image.size


@pytest.mark.parametrize("side", [32, 224])
def test_training_views_are_pils(side):
    stream, generator = random.Random(0), torch.Generator().manual_seed(0)
    for width, height in SIZES:
        image = photo(width, height)
        boxes = [common.random_box(height, width, (0.08, 1.0), generator) for _ in range(6)]
        mirror = [stream.random() < 0.5 for _ in boxes]
        ours = common.views(viewer(side), [vision.pil_to_tensor(image)] * 6, boxes, mirror)
        for view, box, flip in zip(levels(viewer(side), ours), boxes, mirror, strict=True):
            crop = vision.resized_crop(image, *box, [side, side], BICUBIC)
            plain = vision.pil_to_tensor(vision.hflip(crop) if flip else crop)
            assert torch.equal(view, plain.int()), (image.size, box, flip)


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
    pixels = common.decode(str(tmp_path / f"x{suffix}"))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 4, 5))
    assert (pixels.int() - torch.tensor(rgb)[:, None, None]).abs().max() <= 3


def test_an_animated_gif_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert common.decode(tmp_path / "x.gif")[:, 3, 3].tolist() == [255, 0, 0]


# --- random boxes


@pytest.mark.parametrize("crop", [(0.08, 1.0), (0.5, 1.0)])
@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (32, 32), (224, 300), (90, 31)])
def test_random_boxes_are_torchvisions_number_by_number(height, width, crop):
    picture = torch.empty(3, height, width)
    for seed in range(200):
        torch.manual_seed(seed)
        usual = transforms.RandomResizedCrop.get_params(picture, list(crop), [3 / 4, 4 / 3])
        generator = torch.Generator().manual_seed(seed)
        assert tuple(common.random_box(height, width, crop, generator)) == tuple(usual), seed


@pytest.mark.parametrize("height, width", [(5, 1000), (1000, 5), (1, 1)])
def test_a_very_long_picture_shows_its_centre(height, width):
    usual = transforms.RandomResizedCrop.get_params
    for seed in range(20):
        torch.manual_seed(seed)
        plain = usual(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
        generator = torch.Generator().manual_seed(seed)
        box = common.random_box(height, width, (0.9, 1.0), generator)
        assert tuple(box) == tuple(plain)
        top, left, h, w = box
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
        torch.manual_seed(99)  # the global stream takes no part
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
    with pytest.raises(common.Error, match="toy.*no training images"):
        common.Loader(common.Config(), clip, toy()._replace(train=[]))


def test_half_of_the_views_are_mirrored_and_boxes_come_from_the_data_sets_crop(clip, monkeypatch):
    crops, square = set(), torch.zeros(3, 100, 100, dtype=torch.uint8)
    square[:, :, 50:] = 255

    def whole(height, width, crop, generator):
        crops.add(crop)
        return 0, 0, height, width

    monkeypatch.setattr(common, "random_box", whole)
    data = toy()._replace(train=[(square, 0, "cat")], crop=(0.3, 0.9))
    loader = common.Loader(common.Config(), clip, data)
    flips = [bool(loader.view(epoch, 0)[0, 0, 0] > 128) for epoch in range(400)]
    assert 160 < sum(flips) < 240 and (0.3, 0.9) in crops


@pytest.mark.parametrize("picture", [torch.rand(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)])
def test_a_tensor_that_is_no_uint8_rgb_picture_is_refused(picture):
    with pytest.raises(common.Error, match="uint8 tensor"):
        common.decode(picture)
