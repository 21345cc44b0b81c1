"""The README's figures: the methods, the contact sheet."""

import xml.etree.ElementTree as ET

import numpy as np

from tests.tools import readme_figures, shapes

LEARNABLES = {"coop": "V", "dpt": "V P Q", "upt": "V P U", "softcpt": "S U W"}
LEARNABLES |= {"enprompt": "EnLa P F"}


def test_the_committed_figure_names_all_methods_and_learnables():
    svg = (readme_figures.FOLDER / "methods.svg").read_text("utf-8")
    assert svg == readme_figures.methods()
    groups = [group for group in ET.fromstring(svg) if group.tag.endswith("}g")]
    for method, learnables in LEARNABLES.items():
        own = [" ".join(group.itertext()) for group in groups if group.get("class") == method]
        assert set(learnables.split()) <= set(" ".join(own).replace(",", " ").split()), method


def test_the_sheet_has_a_row_of_images_for_each_task(monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", {"train": 1})
    monkeypatch.setattr(readme_figures, "SHIFTS", {"shapes_clean": "", "shapes": "pale"})
    sheet = np.asarray(readme_figures.sheet())
    for i, task in enumerate(readme_figures.SHIFTS):
        images = {name: pixels[0] for _, name, pixels in shapes.images(task)}
        for j, name in (0, "plain_circle"), (9, "striped_hourglass"):
            place = sheet[42 + 70 * i :, 132 + 70 * j :][:64, :64]
            assert (place[::2, ::2] == images[name]).all(), (task, name)
