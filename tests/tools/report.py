"""Tables of all recorded runs, and published numbers beside those of the same setting.

    python -m tests.tools.report --out runs
    python -m tests.tools.report --plot FILE    accuracy against shots, loss per epoch (matplotlib)

A row's cell follows from its config, not from where its file lies. A cell is mean ± std (ddof 0)
over seeds, with their number in parentheses. H is computed from the means.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.tools import plots, published
from tests.tools.published import (
    FEW_SHOT,
    HALVES,
    TASKS,
    TRANSFER,
    averaged,
    cell,
    differences,
    harmonic,
    markdown,
)

CONFIGS = {
    "zero_shot": common.ZeroShot,  # in the tables' order
    "coop": coop.Config,
    "dpt": dpt.Config,
    "upt": upt.Config,
    "enprompt": enprompt.Config,
    "softcpt": softcpt.Config,
}
IN_TITLES = {"dataset", "shots", "model", "classes", "seed"}  # options that a label leaves out


class Setting(NamedTuple):
    """What all runs in a table line have in common, apart from the data set."""

    model: str
    shots: int
    kind: str
    source: str  # what was trained on; few-shot and base to new: "" for a single data set
    method: str
    options: tuple  # (name, value) pairs that are not the method's default

    @property
    def label(self):
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options)])


class Row(NamedTuple):
    """One evaluation of one run."""

    setting: Setting
    on: str  # the data set evaluated on
    half: str  # of its classes: all, base or new
    seed: int
    value: float
    zero: float  # zero-shot CLIP's
    per_class: bool  # whether these are means over the classes' accuracies
    facts: dict  # what seeds of one mean should share
    losses: list


def read(out):
    """The Rows below a folder, the latest for equal options and seeds. Files that are not rows are
    named on stderr. Raises Error."""
    latest = {}
    paths = sorted(Path(out).rglob("results/*.json"), key=lambda path: path.stat().st_mtime)
    for path in paths:
        try:
            row = row_of(json.loads(path.read_text("utf-8")))
        except Exception as problem:  # a foreign file may hold anything
            print(f"skipped {path}: not a row of results ({problem!r})", file=sys.stderr)
            continue
        key = row.setting, row.on, row.half, row.seed
        if key in latest and latest[key].value != row.value:
            print(f"{path} replaces an earlier row of the same options and seed", file=sys.stderr)
        latest[key] = row
    if not latest:
        raise common.Error(f"{out} holds no results; set --out to the folder of the runs")
    return sorted(latest.values(), key=lambda row: (place(row.setting), row.seed))


def place(setting):
    """Where a setting stands among the others."""
    methods = [*CONFIGS]
    at = methods.index(setting.method) if setting.method in methods else len(methods)
    kind = (FEW_SHOT, TASKS, HALVES, TRANSFER).index(setting.kind)
    return setting.model, setting.shots, kind, setting.source, at, setting.label


def row_of(row):
    """The Row of a JSON object. Raises some built-in error if it is not one of ours."""
    config, method, on = row["config"], row["method"], row["evaluated_on"]
    per_class = method == "softcpt" and (on in softcpt.PER_CLASS or "fashion20" in on)
    kind = "mean_class_" if per_class else ""
    trained = row["evaluated"] | row["trained"]  # zero-shot CLIP's has no code of its own
    facts = {"code": trained["source"], "precision": trained["precision"]}
    facts |= {"evaluating code": row["evaluated"]["source"]}
    facts |= {"evaluating precision": row["evaluated"]["precision"]}
    facts |= {name: row[name] for name in ("activation", "n_train", "n_test")}
    value, zero = float(row[kind + "accuracy"]), float(row[kind + "zero_shot"])
    losses = [float(loss) for loss in trained.get("losses", [])]
    setting = setting_of(method, config, on, row["classes"])
    seed = int(config["seed"])
    return Row(setting, on, row["classes"], seed, value, zero, per_class, facts, losses)


def setting_of(method, config, on, half):
    """The Setting of a run evaluated on a data set, or a half of its classes."""
    usual = CONFIGS.get(method, common.Config)
    names = dict.fromkeys([*vars(usual()), *config])  # an option may have gone or be new
    options = []
    for name in names:
        value = config.get(name, "?")
        default = getattr(usual, name, None)
        if name not in IN_TITLES.union(common.NOT_LEARNED) and value != default:
            options.append((name, value))
    dataset, base = config["dataset"], config["classes"] == "base"
    tasks = list(softcpt.GENERAL10) if dataset == "general10" else dataset.split(",")
    source = dataset if len(tasks) > 1 else ""
    if half != "all":
        kind = HALVES
    elif on in tasks and not base:
        kind = TASKS if source else FEW_SHOT
    else:
        kind, source = TRANSFER, dataset + ", base classes" * base
    model = config["model"].replace("/", "-" if ":" not in config["model"] else "/")
    if not model:
        model = "tiny CLIP" if tasks[0] in common.SYNTHETIC else usual.usual_model
    return Setting(model, config["shots"], kind, source, method, tuple(options))


def grouped(rows, key):
    """{key of a row: the rows that share it}, in their order."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def values(rows):
    return {row.seed: row.value for row in rows}


def notes(rows):
    """Lines below a table: what the seeds of its means differ in, and SoftCPT's kind of mean."""
    lines = []
    for (setting, on, half), cells in grouped(
        rows, lambda row: (row.setting, row.on, row.half)
    ).items():
        for name, by_seed in differences(cells).items():
            seeds = ", ".join(f"seed {seed} {value}" for seed, value in by_seed.items())
            part = "" if half == "all" else f" ({half})"
            lines.append(f"† {setting.label}, {on}{part}: the seeds differ in {name}: {seeds}.")
    apart = ", ".join(sorted({row.on for row in rows if row.per_class}))
    if apart:
        lines.append(f"On {apart}, SoftCPT's cells are means over the classes' accuracies.")
    return "".join(f"\n\n{line}" for line in lines)


def accuracy_table(rows):
    """A line per method; a column per data set and, if there are several, their average."""
    columns = dict(sorted(grouped(rows, lambda row: row.on).items()))
    last = ["average"] if len(columns) > 1 else []
    zeros = [sorted({f"{row.zero:.2f}" for row in column}) for column in columns.values()]
    lines = [["zero-shot", *map(" / ".join, zeros)]]  # all that there are, if they differ
    if last:
        mean = np.mean([np.mean([row.zero for row in column]) for column in columns.values()])
        lines[0].append(f"{mean:.2f}")
    for setting, members in grouped(rows, lambda row: row.setting).items():
        if setting.label == "zero_shot":
            continue
        cells = grouped(members, lambda row: row.on)
        parts = [values(cells[name]) for name in columns]
        texts = [cell(values(cells[name]), cells[name]) for name in columns]
        lines.append([setting.label, *texts, *([cell(averaged(parts))] if last else [])])
    return markdown(["method", *columns, *last], lines)


def halves_table(rows):
    """Base, new and H of each data set; last the averages."""
    names, lines = sorted({row.on for row in rows}), []
    for setting, members in grouped(rows, lambda row: row.setting).items():
        cells = grouped(members, lambda row: (row.on, row.half))
        pairs = []
        for name in names:
            base, new = cells[name, "base"], cells[name, "new"]
            pairs.append([values(base), values(new)])
            if base or new:
                texts = cell(values(base), base), cell(values(new), new)
                lines.append([setting.label, name, *texts, h_text(*pairs[-1])])
        if len(names) > 1:
            means = [averaged(half) for half in zip(*pairs, strict=True)]
            lines.append([setting.label, "average", *map(cell, means), h_text(*means)])
    return markdown(["method", "data set", "base", "new", "H"], lines)


def h_text(base, new):
    H = harmonic(base, new)
    return "" if H is None else f"{H:.2f}"


def tables(rows):
    """All tables as Markdown, one per model, number of shots, kind and source."""
    texts = []
    for (model, shots, kind, source), some in grouped(rows, lambda row: row.setting[:4]).items():
        title = f"{model}, {shots} shots" if shots else f"{model}, all training images or none"
        title += {
            FEW_SHOT: "",
            TASKS: f" of each of {source}",
            HALVES: f" of {source}, base to new" if source else ", base to new",
        }.get(kind, f" of {source}, transferred to")
        table = halves_table(some) if kind == HALVES else accuracy_table(some)
        texts.append(f"{title}\n\n{table}{notes(some)}")
    return "\n\n".join(texts)


def as_json(rows):
    """A list of objects, one per mean."""
    objects = []
    for (setting, on, half), cells in grouped(
        rows, lambda row: (row.setting, row.on, row.half)
    ).items():
        found = [*values(cells).values()]
        line = setting._asdict() | {"options": dict(setting.options)}
        line |= {"evaluated_on": on, "classes": half, "seeds": [row.seed for row in cells]}
        line |= {"mean": np.mean(found), "std": np.std(found), "zero_shot": cells[0].zero}
        objects.append(line | {"over_classes": cells[0].per_class, "differ": differences(cells)})
    return json.dumps(objects, indent=1)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m tests.tools.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", default="runs", help="folder of the runs [runs]")
    parser.add_argument("--plot", default="", help="file for a plot of accuracies and losses")
    parser.add_argument("--json", action="store_true", help="print the means as JSON")
    options = parser.parse_args(argv)
    rows = read(options.out)
    if options.plot:
        plots.plot(rows, options.plot)
    if options.json:
        print(as_json(rows))
        return
    print(tables(rows))
    beside = published.comparison(rows)
    if beside:
        print(f"\nPublished numbers and runs of the same setting\n\n{beside}")


if __name__ == "__main__":
    common.script(main)
