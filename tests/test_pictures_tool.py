"""The README's pictures: the drawing of the methods, the contact sheet, DPT's attention."""

import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import coop
import dpt
from tests.tools import pictures, shapes

SVG = "{http://www.w3.org/2000/svg}"


def texts():
    """(words, left, top, right, bottom) of each text of the drawing, generously measured."""
    font = ImageFont.load_default(13)
    found = []
    for text in ET.fromstring(pictures.methods()).iter(f"{SVG}text"):
        x, y = float(text.get("x")), float(text.get("y"))
        wide = 1.2 * font.getlength(text.text)  # DejaVu Sans, the widest of the usual ones
        left = x - wide / 2 if "middle" in text.get("class") else x
        found.append((text.text, left, y - 10, left + wide, y + 3))
    return found


def luminance(colour):
    """WCAG's relative luminance of #rrggbb."""
    levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_the_drawing_names_all_methods_and_links_to_what_it_holds():
    root = ET.fromstring(pictures.methods())
    names = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "name"]
    assert names == ["CLIP", "CoOp", "DPT", "UPT", "SoftCPT", "EnPrompt"]
    ids = {element.get("id") for element in root.iter(f"{SVG}marker")}
    links = set(re.findall(r"url\(#(\w+)\)", pictures.methods()))
    assert links and links <= ids
    classes = {element.get("class") for element in root.iter(f"{SVG}g")}
    assert classes == ids == {name.lower() for name in names}


def test_texts_lie_inside_the_drawing_and_apart():
    found = texts()
    assert len(found) > 50
    for words, left, top, right, bottom in found:
        assert 0 <= left and right <= pictures.WIDE, words
        assert 0 <= top and bottom <= pictures.HIGH, words
    for one, other in itertools.combinations(found, 2):
        across = min(one[3], other[3]) - max(one[1], other[1])
        down = min(one[4], other[4]) - max(one[2], other[2])
        assert across <= 0 or down <= 0, (one[0], other[0])


def test_colours_can_be_read_on_both_pages():
    colours = dict(re.findall(r"\.(\w+) { color: (#\w+) }\n", pictures.methods()))
    dark = re.search(r"dark\) { g\.clip, marker\.clip { color: (#\w+) }", pictures.methods())[1]
    assert len(colours) == 6
    assert contrast(dark, "#0d1117") > 4
    for name, colour in colours.items():
        assert contrast(colour, "#ffffff") > 4, name
        assert name == "clip" or contrast(colour, "#0d1117") > 4, name


def test_the_drawing_in_the_repository_is_the_scripts():
    assert (pictures.FOLDER / "methods.svg").read_text("utf-8") == pictures.methods()


def test_the_sheet_has_a_row_for_each_task_and_its_pictures(monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"train": 3})
    sheet = np.asarray(pictures.sheet())
    assert sheet.shape == (42 + 5 * 70, 132 + 10 * 70, 3)
    tasks = ["shapes_clean", "shapes", "shapes_negative", "shapes_blurred", "shapes_grey"]
    columns = {0: "plain_circle", 3: "checkered_star", 9: "striped_hourglass"}
    for i, task in enumerate(tasks):
        drawn = {name: pixels for _, name, pixels in shapes.pictures(task)}
        assert (sheet[42 + 70 * i : 106 + 70 * i, :132] < 128).any()  # the row's label
        for j, name in columns.items():
            place = sheet[42 + 70 * i :, 132 + 70 * j :][:64, :64]
            for down, across in itertools.product([0, 1], [0, 1]):
                assert (place[down::2, across::2] == drawn[name][0]).all(), (task, name)


def test_a_saved_picture_is_near_the_drawn_one(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    noise[:20] = 255
    pictures.save(Image.fromarray(noise), tmp_path / "noise.png")
    saved = np.asarray(Image.open(tmp_path / "noise.png")).astype(int)
    assert (saved[:20] == 255).all()
    assert 2 <= np.abs(saved - noise)[20:].max() <= 4


def test_attention_is_red_where_the_class_aware_prompts_look(fit, world, tmp_path, monkeypatch):
    fit(dpt)
    (prompt,) = tmp_path.rglob("prompt.safetensors")
    encode = dpt.encode

    def fixed(clip, prompt, images, T, top):
        v, layer_logits, maps = encode(clip, prompt, images, T, top)
        A = torch.zeros_like(maps[-1])
        A[..., 16] = 1.0  # 0 is the class token; 1 to 16 the patches, the last at the lower right
        return v, layer_logits, [A]

    monkeypatch.setattr(dpt, "encode", fixed)
    strip = np.asarray(pictures.looks(prompt.parent, str(world))).astype(int)
    assert strip.shape == (148, 4 * 216, 3)
    for i in range(4):
        over = strip[:104, 216 * i + 105 :][:, :104]
        redness = over[..., 0] - over[..., 1:].mean(-1)
        assert redness[90:, 90:].mean() > 60
        assert np.abs(redness[:60, :60]).max() < 2  # the rest is grey
        assert (strip[104:, 216 * i :][:, :208] < 128).any()  # the names


def test_a_run_without_class_aware_prompts_is_refused(fit, world, tmp_path, monkeypatch, capsys):
    fit(coop)
    (prompt,) = tmp_path.rglob("prompt.safetensors")
    monkeypatch.setattr(pictures, "FOLDER", tmp_path / "pictures")
    monkeypatch.setattr(shapes, "COUNTS", {"train": 1})
    with pytest.raises(SystemExit) as end:
        pictures.main("--attention", str(prompt.parent), "--data", str(world))
    assert end.value.code == 2
    assert "only a run of dpt.py" in capsys.readouterr().err
    assert {file.name for file in pictures.FOLDER.iterdir()} == {"methods.svg", "shapes.png"}
