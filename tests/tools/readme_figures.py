"""Makes two figures in .github/pictures/, methods.svg and shapes.png.

python -m tests.tools.readme_figures
"""

import argparse
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import common
from tests.tools import shapes

FOLDER = Path(__file__).parents[2] / ".github" / "pictures"

# ------------------------------------------------------------------------------------ methods.svg

# The colours can be read on a white and on a dark page
LEGEND = """
#59636e CLIP     frozen, like everything that is dashed; 12 blocks per tower, as in ViT-B
#2f7fd0 CoOp     learns the context V before the class name
#c4620a DPT      learns V, image prompts P and, by CAVPT, prompts Q for the likely classes
#9a5fd0 UPT      learns U and a small transformer, which make V and image prompts P
#12856a SoftCPT  learns U and a meta-network W, which make the context S of a task
#d0457a EnPrompt learns EnLa on text features and image prompts P and F (reconstruction)
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
ARROWHEAD = """
<marker id="NAME" class="NAME" markerWidth="6" markerHeight="6" refX="4" refY="3" orient="auto">
<path d="M0 0 L6 3 L0 6 Z"/></marker>"""
SVG = 'xmlns="http://www.w3.org/2000/svg" width="860" height="752" viewBox="0 0 860 752"'
BLOCKS, DEPTH = 12, 9  # blocks of a tower of ViT-B; those with prompts in EnPrompt


def text(x, y, words, kind="middle"):
    """Lines of words, the first on the base line y. Kinds: middle (of x), left, name (bold)."""
    rows = ""
    for i, row in enumerate(words.splitlines()):
        rows += f'<text x="{x}" y="{y + 16 * i}" class="{kind}">{escape(row)}</text>\n'
    return rows


def box(x, y, width, height, words="", kind=""):
    """A box with lines of words in its middle. Kinds: dashed, solid."""
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    base = y + (height + 25) // 2 - 8 * len(words.splitlines())
    return f'<rect {place} rx="3" class="{kind}"/>\n{text(x + width // 2, base, words)}'


def tokens(x, y, words):
    """A row of tokens, "word:width,..."; the first at x, y. The usual width is 24."""
    parts = ""
    for token in words.split(","):
        word, _, width = token.partition(":")
        width = int(width or 24)
        parts += box(x, y, width, 24, word)
        x += width + 4
    return parts


def line(path, head=""):
    return f'<path d="{path}"{head}/>\n'


def arrow(path):
    return line(path, ' marker-end="url(#NAME)"')


def level(block):
    """The y of the middle of block 1 ... BLOCKS, from below; 0: of the box before the blocks."""
    return 211 + 19 * (BLOCKS - block)


def prompts(start, end, x, block):
    """Two small tokens, the first at x, on a line to a block of the image tower."""
    y = level(block)
    small = [box(left, y - 4, 9, 9, "", "solid") for left in (x, x + 12)]
    return line(f"M{start} {y} H{end}") + "".join(small)


def tower(x, name, first):
    """The blocks of a frozen tower, and what comes before them."""
    parts = [box(x, 174, 140, 281), text(x + 70, 193, name, "name middle")]
    for i in range(BLOCKS + 1):
        parts.append(box(x + 10, level(i) - 7, 120, 15, str(i or first)))
    return "".join(parts)


def draw_clip():
    """The frozen towers, from the tokens to the logits, and the line from the contexts."""
    parts = [tokens(119, 474, "SOS:40,V,V,…,V,[CLASS]:60,.,EOT:40"), arrow("M262 474 V458")]
    parts += [tower(192, "text tower", "+ positions"), arrow("M232 174 V127")]
    parts += [box(202, 80, 120, 44, "text features\nw of the classes")]
    parts += [tokens(538, 474, "CLS:36"), tokens(634, 474, ",,,")]
    parts += [text(688, 517, "patches"), arrow("M640 474 V458")]
    parts += [tower(570, "image tower", "LN"), arrow("M602 174 V127")]
    parts += [box(568, 80, 68, 44, "patch\nfeatures"), arrow("M680 174 V127")]
    parts += [box(644, 80, 72, 44, "image\nfeature f"), arrow("M680 80 V29 H554")]
    parts += [box(351, 14, 200, 30, "logits = cos(f, w) / τ"), arrow("M262 80 V29 H348")]
    return [*parts, line("M152 514 H399"), arrow("M217 514 V501")]


def draw_dpt():
    last = level(BLOCKS)
    parts = [line("M267 526 V515"), box(246, 526, 42, 36, "DPT\nV")]
    parts += [box(388, 186, 126, 64, "CAVPT:\nprompts Q for\nthese classes")]
    parts += [text(459, 132, "features of the\nlikeliest classes", "left")]
    parts += [arrow("M322 110 H451 V183")]
    parts += [arrow(f"M514 {last} H577"), text(545, last - 7, "Q")]
    parts += [arrow(f"M580 {last + 19} H517"), text(542, last + 36, "tokens")]
    parts += [prompts(729, 700, 720, i) for i in range(1, BLOCKS)]
    return [*parts, text(752, 312, "P, new in\neach of the\nlayers 1–11", "left")]


def draw_upt():
    parts = [line("M399 526 V515"), box(378, 526, 42, 36, "UPT\nV")]
    parts += [tokens(436, 584, "U,U,…,U"), arrow("M490 584 V565")]
    parts += [box(442, 526, 96, 36, "small\ntransformer"), arrow("M442 544 H423")]
    return [*parts, arrow("M538 544 H604 V501"), tokens(578, 474, "P,P")]


def draw_softcpt():
    parts = [line("M152 526 V515"), box(118, 526, 68, 36, "SoftCPT\nS")]
    parts += [tokens(16, 204, "U,U,task name:84"), arrow("M87 228 V251")]
    parts += [box(24, 254, 126, 44, "the same\ntext tower", "dashed"), arrow("M87 298 V341")]
    parts += [text(95, 324, "task feature", "left")]
    return [*parts, box(24, 344, 126, 30, "meta-network W"), arrow("M87 374 V544 H115")]


def draw_enprompt():
    parts = [line("M333 526 V515"), box(294, 526, 78, 36, "EnPrompt\nwords", "dashed")]
    parts += [box(248, 138, 72, 23, "EnLa"), arrow("M284 174 V164"), arrow("M284 138 V127")]
    parts += [line("M322 86 H376 M526 86 H568"), box(376, 71, 150, 30, "optimal transport")]
    parts += [arrow("M322 118 H360 V360 H385"), text(368, 322, "s, mean of w", "left")]
    parts += [box(388, 338, 126, 44, "prompts P + F s,\nF and P per layer")]
    parts += [line(f"M514 360 H537 M537 {level(DEPTH)} V{level(0)}")]
    return [*parts, *(prompts(537, 580, 547, i) for i in [0, *range(2, DEPTH + 1)])]


def methods():
    """The figure of all five methods, with its legend, as SVG."""
    colours, heads, groups = "", "", ""
    coop = [line("M216 526 V515"), box(192, 526, 48, 36, "CoOp\nV")]
    parts = [draw_clip(), coop, draw_dpt(), draw_upt(), draw_softcpt(), draw_enprompt()]
    for i, row in enumerate(LEGEND.strip().splitlines()):
        colour, title, words = row.split(maxsplit=2)
        name, y = title.lower(), 640 + 20 * i
        own = [*parts[i], box(64, y - 11, 12, 12, "", "solid"), text(86, y, title, "name")]
        colours += f".{name} {{ color: {colour} }}\n"
        heads += ARROWHEAD.replace("NAME", name)
        groups += f'<g class="{name}">\n{"".join(own)}</g>\n'.replace("NAME", name)
        groups += f'<g class="clip">\n{text(168, y, words, "left")}</g>\n'
    title = "<title>What five methods of prompt tuning learn, and where it enters CLIP</title>"
    top = f"{title}\n<style>{colours}{STYLE}</style>\n<defs>{heads}</defs>\n"
    return f"<svg {SVG}>\n{top}{groups}</svg>\n"


SHIFTS = {  # tasks of shapes.py, a row each
    "shapes_clean": "no shift",
    "shapes": "pale, dark, grainy",
    "shapes_negative": "negative",
    "shapes_blurred": "blurred",
    "shapes_grey": "grey",
}
LEFT, TOP, SIDE, STEP = 132, 42, 64, 70  # pixels; STEP from one image to the next


def sheet():
    """The contact sheet: a row per task, a column per shape, with the four textures in turn."""
    names = [f"{shapes.TEXTURES[i % 4]}_{shape}" for i, shape in enumerate(shapes.SHAPES)]
    size = LEFT + STEP * len(names), TOP + STEP * len(SHIFTS)
    page = Image.new("RGB", size, "white")
    for j, name in enumerate(names):
        write(page, LEFT + STEP * j + SIDE / 2, 4, name.replace("_", "\n"))
    for i, (task, shift) in enumerate(SHIFTS.items()):
        y = TOP + STEP * i
        write(page, LEFT / 2, y + SIDE / 2 - 17, f"{task}\n{shift}")
        first = {name: x[0] for part, name, x in shapes.images(task) if part == "train"}
        for j, name in enumerate(names):
            image = Image.fromarray(first[name])
            page.paste(image.resize((SIDE, SIDE), Image.NEAREST), (LEFT + STEP * j, y))
    return page


def write(page, x, y, words):
    """Writes lines of words around x, from y downwards."""
    font = ImageFont.load_default(13)
    ImageDraw.Draw(page).text((x, y), words, "black", font, "ma", align="center")


def main(argv=None):
    argparse.ArgumentParser("readme_figures", description=__doc__).parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "methods.svg").write_text(methods(), encoding="utf-8")
    sheet().save(FOLDER / "shapes.png")


if __name__ == "__main__":
    common.script(main)
