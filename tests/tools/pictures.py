"""The pictures of the README's front page, written into .github/pictures/:

    python -m tests.tools.pictures                    methods.svg and shapes.png
    python -m tests.tools.pictures --attention RUN    attention.png too; RUN: folder of a DPT run

methods.svg     CLIP's towers and where each method's learnables enter them; from this file alone,
                after the equations at the top of each method's script
shapes.png      ten classes of the drawn world, without and under its shifts; from shapes.py
attention.png   where DPT's class-aware prompts look on four test pictures; from RUN's
                prompt.safetensors and the test pictures of its data set
"""

import argparse
import itertools
import sys
from html import escape
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import common
import dpt
from tests.tools import ask, attention, shapes

FOLDER = Path(__file__).parents[2] / ".github" / "pictures"

# ------------------------------------------------------------------------------------ methods.svg

# Colours have a contrast of 4 and more with GitHub's white page and, but CLIP's, with its dark one
LEGEND = """
#59636e CLIP     frozen, like all that is dashed; 12 blocks a tower, as in ViT-B
#2f7fd0 CoOp     context vectors V before the class name, learned themselves
#c4620a DPT      V, prompts P in plain image layers, class-aware prompts Q in the last
#9a5fd0 UPT      one set U through a small transformer, split into V and image prompts P
#12856a SoftCPT  a meta-network W makes S from the task name, read behind learned U
#d0457a EnPrompt reconstruction: a linear layer (EnLa) on text features; their mean s shifts P
"""
STYLE = """
text { font: 13px "Segoe UI", Helvetica, Arial, sans-serif; fill: currentColor }
.name { font-weight: bold } .middle { text-anchor: middle }
rect { stroke: currentColor; fill: currentColor; fill-opacity: 0.1 }
.solid { fill-opacity: 1 } .dashed { stroke-dasharray: 5 3 }
path { stroke: currentColor; stroke-width: 1.5; fill: none }
marker path { stroke: none; fill: currentColor }
@media (prefers-color-scheme: dark) { g.clip, marker.clip { color: #9198a1 } }
"""
WIDE, HIGH = 860, 752
BLOCKS, DEPTH = 12, 9  # of a tower of ViT-B; those with prompts in EnPrompt


def element(tag, content="", **attributes):
    """One element of SVG. In an attribute's name _ stands for -, and a last _ for nothing."""
    pairs = [f' {name.strip("_").replace("_", "-")}="{v}"' for name, v in attributes.items()]
    return f"<{tag}{''.join(pairs)}>{content}</{tag}>"


def group(name, *parts):
    """Parts in the colour of CLIP or of a method, the heads of their arrows too."""
    content = "\n".join(["", *parts, ""]).replace("#head", f"#{name}")
    return element("g", content, class_=name)


def label(place, words, kind=""):
    """Lines of words, the first on the base line "x y". Kinds: middle (around x), name (bold)."""
    x, y = map(int, place.split())
    rows = []
    for i, row in enumerate(words.splitlines()):
        rows.append(element("text", escape(row), x=x, y=y + 16 * i, class_=kind))
    return "\n".join(rows)


def box(place, words="", kind=""):
    """A box at "x y width height", lines of words in its middle. Kinds: dashed, solid."""
    x, y, wide, high = map(int, place.split())
    base = y + (high + 25) // 2 - 8 * len(words.splitlines())
    frame = element("rect", x=x, y=y, width=wide, height=high, rx=3, class_=kind)
    return frame + label(f"{x + wide // 2} {base}", words, "middle")


def cells(place, *words):
    """A row of tokens, the first at "x y width"."""
    x, y, wide = map(int, place.split())
    step = wide + 4
    return "\n".join(box(f"{x + i * step} {y} {wide} 24", word) for i, word in enumerate(words))


def line(path):
    """Along an SVG path."""
    return element("path", d=path)


def arrow(path):
    """A line with a head at its end."""
    return element("path", d=path, marker_end="url(#head)")


def height(i):
    """The middle of block i = 1 ... BLOCKS, counted from below; 0: of what is before them."""
    return 211 + 19 * (BLOCKS - i)


def prompts(start, end, x, i):
    """Two small tokens, the first at x, on a line to block i of the image tower."""
    y = height(i)
    tokens = [box(f"{left} {y - 4} 9 9", "", "solid") for left in (x, x + 12)]
    return "\n".join([line(f"M{start} {y} H{end}"), *tokens])


def tower(x, name, first):
    """The blocks of a frozen tower, and what is first, before them."""
    parts = [box(f"{x} 174 140 281"), label(f"{x + 70} 193", name, "name middle")]
    for i, words in enumerate([first, *range(1, BLOCKS + 1)]):
        parts.append(box(f"{x + 10} {height(i) - 7} 120 15", str(words)))
    return "\n".join(parts)


def draw_clip():
    """The frozen towers, from the tokens to the logits."""
    text = [cells("119 474 40", "SOS"), cells("163 474 24", "V", "V", "…", "V")]
    text += [cells("275 474 60", "[CLASS]"), cells("339 474 24", "."), cells("367 474 40", "EOS")]
    text += [arrow("M262 474 V458"), tower(192, "text tower", "+ positions")]
    text += [arrow("M232 174 V127"), box("202 80 120 44", "text features\nw of the classes")]
    image = [cells("538 474 36", "CLS"), cells("634 474 24", "", "", "", "")]
    image += [label("688 517", "patches", "middle"), arrow("M640 474 V458")]
    image += [tower(570, "image tower", "LN"), arrow("M602 174 V127")]
    image += [box("568 80 68 44", "patch\nfeatures"), arrow("M680 80 V29 H554")]
    image += [arrow("M680 174 V127"), box("644 80 72 44", "image\nfeature f")]
    logits = [arrow("M262 80 V29 H348"), box("351 14 200 30", "logits = cos(f, w) / τ")]
    return group("clip", *text, *image, *logits)


def draw_contexts():
    """What each method has in the place of V, before the class name."""
    return [
        group("clip", line("M152 514 H399"), arrow("M217 514 V501")),
        group("softcpt", line("M152 526 V515"), box("118 526 68 36", "SoftCPT\nS")),
        group("coop", line("M216 526 V515"), box("192 526 48 36", "CoOp\nV")),
        group("dpt", line("M267 526 V515"), box("246 526 42 36", "DPT\nV")),
        group("enprompt", line("M333 526 V515"), box("294 526 78 36", "EnPrompt\nwords", "dashed")),
        group("upt", line("M399 526 V515"), box("378 526 42 36", "UPT\nV")),
    ]


def draw_dpt():
    """DPT: prompts in each plain image layer, class-aware ones in the last."""
    last, before = height(BLOCKS), height(BLOCKS - 1)
    parts = [box("388 186 126 64", "CAVPT:\nprompts Q for\nthese classes")]
    parts += [arrow("M322 110 H451 V183"), label("459 132", "features of the\nlikeliest classes")]
    parts += [arrow(f"M514 {last} H577"), label(f"545 {last - 7}", "Q", "middle")]
    parts += [arrow(f"M580 {before} H517"), label(f"542 {before + 17}", "tokens", "middle")]
    parts += [prompts(729, 700, 720, i) for i in range(1, BLOCKS)]
    parts += [label("752 312", f"P, new in\neach of the\nlayers 1–{BLOCKS - 1}")]
    return group("dpt", *parts)


def draw_upt():
    """UPT: one set, through a small transformer, to both towers."""
    parts = [cells("436 584 24", "U", "U", "…", "U"), arrow("M490 584 V565")]
    parts += [box("442 526 96 36", "small\ntransformer"), arrow("M442 544 H423")]
    parts += [arrow("M538 544 H604 V501"), cells("578 474 24", "P", "P")]
    return group("upt", *parts)


def draw_softcpt():
    """SoftCPT: the name of the task, read by the text tower, makes the context."""
    parts = [cells("16 204 24", "U", "U"), cells("72 204 84", "task name")]
    parts += [arrow("M87 228 V251"), box("24 254 126 44", "the same\ntext tower", "dashed")]
    parts += [arrow("M87 298 V341"), label("95 324", "task feature")]
    parts += [box("24 344 126 30", "meta-network W"), arrow("M87 374 V544 H115")]
    return group("softcpt", *parts)


def draw_enprompt():
    """EnPrompt: a layer on the text features, whose mean shifts the image prompts; transport."""
    parts = [arrow("M284 174 V164"), box("248 138 72 23", "EnLa"), arrow("M284 138 V127")]
    parts += [box("376 71 150 30", "optimal transport"), line("M322 86 H376 M526 86 H568")]
    parts += [arrow("M322 118 H360 V360 H385"), label("368 322", "s, mean of w")]
    parts += [box("388 338 126 44", "prompts P + F s,\nF and P by layer")]
    parts += [line(f"M514 360 H537 M537 {height(DEPTH)} V{height(0)}")]
    parts += [prompts(537, 580, 547, i) for i in [0, *range(2, DEPTH + 1)]]
    return group("enprompt", *parts)


def methods():
    """The drawing of all five methods, with its legend: the text of an SVG file."""
    colours, heads = "", ""
    parts = [draw_clip(), *draw_contexts(), draw_dpt(), draw_upt(), draw_softcpt(), draw_enprompt()]
    for i, row in enumerate(LEGEND.strip().split("\n")):
        colour, name, words = row.split(maxsplit=2)
        key, y = name.lower(), 640 + 20 * i
        colours += f".{key} {{ color: {colour} }}\n"
        size = {"markerWidth": 6, "markerHeight": 6, "refX": 4, "refY": 3, "orient": "auto"}
        heads += element("marker", line("M0 0 L6 3 L0 6 Z"), id=key, class_=key, **size)
        swatch = box(f"64 {y - 11} 12 12", "", "solid")
        parts.append(group(key, swatch, label(f"86 {y}", name, "name")))
        parts.append(group("clip", label(f"168 {y}", words)))
    top = [element("title", "Where five methods of prompt tuning enter CLIP")]
    top += [element("style", colours + STYLE), element("defs", heads)]
    space = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDE} {HIGH}"}
    return element("svg", "\n".join([*top, *parts]), width=WIDE, height=HIGH, **space)


# ------------------------------------------------------------------------------------- shapes.png

TASKS = {  # of shapes.py, a row each, and their shifts in words
    "shapes_clean": "no shift",
    "shapes": "pale, dark, grainy",
    "shapes_negative": "negative",
    "shapes_blurred": "blurred",
    "shapes_grey": "grey",
}
# The ten shapes, with the four textures in turn
NAMES = [f"{shapes.TEXTURES[i % 4]}_{shape}" for i, shape in enumerate(shapes.SHAPES)]
SIDE = 2 * shapes.SIZE  # of a picture on the sheet
LEFT, TOP, STEP = 132, 42, SIDE + 6  # place of the first picture, and from one to the next


def firsts(task):
    """{class name: its first training picture, uint8 (32, 32, 3)} of a task of shapes.py."""
    drawn = itertools.takewhile(lambda item: item[0] == "train", shapes.pictures(task))
    return {name: pixels[0] for _, name, pixels in drawn}


def sheet():
    """The contact sheet: a row for each of TASKS, a column for each class of NAMES."""
    image = Image.new("RGB", (LEFT + STEP * len(NAMES), TOP + STEP * len(TASKS)), "white")
    for j, name in enumerate(NAMES):
        write(image, LEFT + STEP * j + SIDE / 2, 4, name.replace("_", "\n"))
    for i, (task, shift) in enumerate(TASKS.items()):
        y = TOP + STEP * i
        write(image, LEFT / 2, y + SIDE / 2 - 17, f"{task}\n{shift}")
        pixels = firsts(task)
        for j, name in enumerate(NAMES):
            picture = Image.fromarray(pixels[name]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            image.paste(picture, (LEFT + STEP * j, y))
    return image


def write(image, x, y, words):
    """Writes lines of words around x, from y downwards."""
    font = ImageFont.load_default(13)
    ImageDraw.Draw(image).text((x, y), words, "black", font, "ma", align="center")


def save(image, file):
    """Writes a PNG, its levels rounded to multiples of 8: unseen, and a third less to load."""
    image.point(lambda level: min(255, 8 * round(level / 8))).save(file, optimize=True)


# ---------------------------------------------------------------------------------- attention.png

COUNT, PLACE = 4, 104  # test pictures, spread over the data set; the side of each on the sheet


@torch.no_grad()
def looks(run, data):
    """Test pictures of a DPT run, their maps beside them, names below; a PIL image. A map is of the
    prompt of the class predicted, as far as that is among CAVPT's top classes. Raises Error."""
    learned = ask.load(run, "", data)
    if not getattr(learned.prompt, "cavpt", ()):
        raise common.Error(f"{run}: only a run of dpt.py with --cavpt_layers has CAVPT")
    target = learned.sets[0]
    test = common.load_dataset(target.name, data).test
    test = [test[(i + 1) * len(test) // (COUNT + 1)] for i in range(COUNT)]
    x = common.views(learned.clip, [picture for picture, _, _ in test])
    f = common.unit_features(learned.clip, x)
    logits = ask.classifier(learned, target)(x, f)
    top = dpt.selected(learned.cfg, f, attention.zero_shot(learned, target))
    A = attention.attention(learned, target, x, top)  # (B, K, N)
    best = logits.gather(1, top).argmax(1)
    image = Image.new("RGB", (COUNT * (2 * PLACE + 8), PLACE + 44), "white")
    for i, photo in enumerate(attention.photos(learned.clip, x)):
        left = i * (2 * PLACE + 8)
        over = attention.overlaid(photo.convert("L").convert("RGB"), A[i, best[i]].cpu())
        image.paste(photo.resize((PLACE, PLACE)), (left, 0))
        image.paste(over.resize((PLACE, PLACE)), (left + PLACE + 1, 0))
        words = f"predicted: {target.classnames[logits[i].argmax()]}\ntrue: {test[i][2]}"
        write(image, left + PLACE, PLACE + 6, words.replace("_", " "))
    return image


def main(*argv):
    """Draws the pictures of the README's front page."""
    parser = argparse.ArgumentParser("python -m tests.tools.pictures", description=main.__doc__)
    parser.add_argument("--attention", metavar="RUN", default="", help="folder of a DPT run")
    parser.add_argument("--data", default="data", help="folder of RUN's data set")
    options = parser.parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "methods.svg").write_text(methods(), encoding="utf-8")
    save(sheet(), FOLDER / "shapes.png")
    try:
        if options.attention:
            save(looks(options.attention, options.data), FOLDER / "attention.png")
    except common.Error as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main(*sys.argv[1:])
