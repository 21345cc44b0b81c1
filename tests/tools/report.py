"""Tables and figures of all recorded runs: python common.py report [--plot FILE] [--study FILE].

Reads every results.json below --out. Cells are mean ± std (ddof 0) over the seeds, from full
precision, with their number in brackets; H of an average is that of the averaged base and new
accuracies. Beside runs in the setting of a published number stands that number (beside.py).
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

import common
import softcpt
from tests.tools import beside, figures
from tests.tools.beside import cell, harmonic, markdown

ORDER = "zero_shot coop dpt upt enprompt softcpt".split()  # of the tables' lines
BACKBONES = {"coop": "RN50", "softcpt": "RN50", "dpt": "ViT-B-32"}  # of --model "", else ViT-B-16
CUT = re.compile(".{150}[0-9a-f]{16}")  # what common.run_folder makes of a long name
IN_TABLES = {"dataset", "shots", "seed", "model"}  # options that need not stand in a label too


class Run(NamedTuple):
    """One row of a results.json, as the tables need it."""

    method: str
    label: str  # the method and its options that are not the default
    model: str
    source: str  # the data set, or comma list of tasks, trained on
    on: str  # the data set evaluated on
    classes: str
    shots: int
    seed: int
    value: float
    zero: float  # zero-shot CLIP's value
    per_class: bool  # whether these are means over the classes' accuracies
    transferred: bool
    side: str  # of UPT
    variances: dict  # of UPT's study: {"text": within classes, "visual": between them}


def read(out):
    """The Runs below a folder, of repeated ones the latest. A file that is no record of ours is
    named on stderr. Raises Error where there is none."""
    latest = {}
    for path in sorted(Path(out).rglob("results.json"), key=lambda path: path.stat().st_mtime):
        try:
            rows = json.loads(common.regular(path).read_text("utf-8"))
            runs = [run_of(row, path.parent.name) for row in rows]
        except Exception as problem:  # what a foreign file holds is of any kind
            common.say(f"left out: {path} is no record of ours ({problem!r})", sys.stderr)
            continue
        for run in runs:
            setting = run.label, run.model, run.source, run.on, run.classes, run.shots, run.seed
            latest[setting] = run
    if not latest:
        raise common.Error(f"{out}: no results.json in it or below; --out names another folder")
    return sorted(latest.values(), key=lambda run: (place(run.method), run.label))


def place(method):
    """Where a method stands in the tables; unknown ones come last."""
    return ORDER.index(method) if method in ORDER else len(ORDER)


def run_of(row, folder):
    """The Run of a row in a run's folder. Raises some built-in error for what is no row of ours."""
    config, method, on = row["config"], row["method"], row["evaluated_on"]
    transferred = on in config["transfer"].split(",") and on not in row["dataset"].split(",")
    per_class = method == "softcpt" and (on in softcpt.PER_CLASS or "fashion20" in on)
    kind = "mean_class_" if per_class else ""
    value, zero = (float(row[kind + key]) for key in ("accuracy", "zero_shot"))
    text, visual = (float(row[f"{where}_class_variance"]) for where in ("intra", "inter"))
    words = method, on, row["dataset"], row["classes"], row["model"]
    if not all(isinstance(word, str) for word in words):
        raise TypeError("a name that is no text")
    return Run(
        method,
        label_of(method, config, folder, transferred),
        row["model"] or own_model(method, row["dataset"]),
        row["dataset"],
        on,
        row["classes"],
        int(row["shots"]),
        int(row["seed"]),
        value,
        zero,
        per_class,
        transferred,
        str(config.get("side", "")),
        {"text": text, "visual": visual},
    )


def own_model(method, dataset):
    """What --model "" stands for."""
    world = common.drawn_world()
    if world and dataset.split(",")[0] in world.TASKS:
        return "tiny CLIP"
    return BACKBONES.get(method, "ViT-B-16")


def label_of(method, config, folder, transferred):
    """The method and the options in its folder's name; of a name that was cut, all of them."""
    named = set(config) - set(common.NOT_LEARNED)
    if not CUT.fullmatch(folder):
        named = {option_before(part, config) for part in folder.split("=")[:-1]}
    if not transferred:
        named.discard("classes")  # then the table says base and new
    words = [method]
    for name, value in config.items():
        if name in named - IN_TABLES:
            words.append(f"{name}={value}")
    return " ".join(words)


def option_before(part, config):
    """The option whose name ends a part of a folder's name: n_ctx of "16shots_seed1_n_ctx"."""
    fitting = [name for name in config if part.endswith(f"_{name}")]
    return max(fitting, key=len, default="")


def grouped(runs):
    """{label: {data set: [value per seed]}} with zero-shot CLIP first."""
    table = {"zero-shot": {run.on: [run.zero] for run in reversed(runs)}}
    for run in runs:
        if run.label != "zero_shot":
            values = table.setdefault(run.label, {})
            values.setdefault(run.on, []).append(run.value)
    return table


def accuracy_table(runs):
    """One line per method, one column per data set and, where a method has all, their average."""
    names = sorted({run.on for run in runs})
    several = len(names) > 1
    lines = []
    for label, values in grouped(runs).items():
        cells = [cell(values[name]) if name in values else "" for name in names]
        average = ""
        if values.keys() >= set(names):
            average = f"{np.mean([np.mean(values[name]) for name in names]):.2f}"
        lines.append([label, *cells, average] if several else [label, *cells])
    return markdown(["method", *names, "average"] if several else ["method", *names], lines)


def base_new_table(runs):
    """Base, new and H, the harmonic mean of their means, of each data set; last the averages."""
    base = grouped([run for run in runs if run.classes == "base"])
    new = grouped([run for run in runs if run.classes == "new"])
    names = sorted({run.on for run in runs})
    lines = []
    for label, values in base.items():
        others = new.get(label, {})
        both = [name for name in names if name in values and name in others]
        means = []
        for name in both:
            pair = values[name], others[name]
            means.append([np.mean(half) for half in pair])
            lines.append([label, name, *map(cell, pair), f"{harmonic(*means[-1]):.2f}"])
        if both == names and len(names) > 1:
            b, n = np.mean(means, 0)
            lines.append([label, "average", f"{b:.2f}", f"{n:.2f}", f"{harmonic(b, n):.2f}"])
    return markdown(["method", "data set", "base", "new", "H"], lines)


def tables(runs):
    """All tables as Markdown, by model and shots: few-shot, base-to-new, transfer by source."""
    text = []
    for model, shots in sorted({(run.model, run.shots) for run in runs}):
        some = [run for run in runs if (run.model, run.shots) == (model, shots)]
        title = f"{model}, {shots} shots" if shots else f"{model}, all training images or none"
        own = [run for run in some if not run.transferred]
        whole = [run for run in own if run.classes == "all"]
        halves = [run for run in own if run.classes != "all"]
        if whole:
            text.append(f"{title}\n\n{accuracy_table(whole)}")
        if halves:
            text.append(f"{title}, base to new\n\n{base_new_table(halves)}")
        for source in sorted({run.source for run in some if run.transferred}):
            moved = [run for run in some if run.transferred and run.source == source]
            text.append(f"{title} of {source}, evaluated on\n\n{accuracy_table(moved)}")
    apart = sorted({run.on for run in runs if run.per_class})
    if apart:
        text.append(
            f"On {', '.join(apart)}, SoftCPT's cells are means over the classes' accuracies; "
            "so are zero-shot CLIP's where SoftCPT stands alone."
        )
    return "\n\n".join(text)


class Point(NamedTuple):
    """Of UPT's study: what prompts of one tower gain over zero-shot CLIP on a data set."""

    side: str
    run: str
    dataset: str
    variance: float
    gains: list  # one per seed


def study(runs):
    """The Points of UPT's study."""
    groups = defaultdict(list)
    for run in runs:
        if run.side in run.variances and run.classes == "all" and not run.transferred:
            setting = f"{run.label}, {run.model}, {run.shots} shots"
            groups[run.side, setting, run.on].append(run)
    points = []
    for setting, members in sorted(groups.items()):
        variance = np.mean([run.variances[run.side] for run in members])
        points.append(Point(*setting, variance, [run.value - run.zero for run in members]))
    return points


def study_table(points):
    lines = []
    for point in points:
        kind = "within classes" if point.side == "text" else "between classes"
        variance = f"{point.variance:.3f} {kind}"
        lines.append([point.run, point.dataset, variance, cell(point.gains)])
    return markdown(["run", "data set", "variance", "gain over zero-shot"], lines)


def show(text):
    """Prints text, what its lines cannot show being escaped."""
    for line in text.split("\n"):
        common.say(line)


def main(argv):
    """Prints the tables; draws what is asked for. Raises Error."""
    parser = common.Parser("python common.py report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", default="runs", help="folder of the recorded runs [runs]")
    parser.add_argument("--plot", default="", help="draw accuracy against shots to this file")
    parser.add_argument("--study", default="", help="draw UPT's gains against variances")
    options = parser.parse_args(argv)
    runs = read(options.out)
    show(tables(runs))
    comparison = beside.comparison(runs)
    if comparison:
        show(f"\nPublished numbers and runs of the same setting\n\n{comparison}")
    points = study(runs)
    if points:
        show(f"\nUPT's study\n\n{study_table(points)}")
    if options.plot:
        figures.plot(runs, options.plot)
        show(f"\ndrawn: {options.plot}")
    if options.study:
        figures.study(points, options.study)
        show(f"\ndrawn: {options.study}")
