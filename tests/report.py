"""The tables and the figure of all recorded runs: python common.py report [--plot accuracy.png].

Reads results.jsonl; a repeated run replaces its earlier line. Cells are mean ± std (ddof 0) over
the seeds, from full precision; H of an average is that of the averaged base and new accuracies.
"""

import argparse
import dataclasses
import importlib
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

import common
import softcpt

ORDER = ["coop", "dpt", "upt", "enprompt", "softcpt"]


def read(out):
    """Rows of out/results.jsonl, the last of each run and evaluation, with label and value."""
    path = Path(out, "results.jsonl")
    if not path.exists():
        raise common.Error(f"{path}: nothing is recorded there yet; --out names another folder")
    rows, last = {}, {}
    try:
        for row in common.records(path):
            row["label"] = described(row)
            mean = row["method"] == "softcpt" and softcpt.scored_per_class(row["evaluated_on"])
            row["zero"], row["value"] = (float(row[keys[mean]]) for keys in common.SCORES)
            row["per_class"], row["source"] = mean, Path(row["run"]).parent.name
            loaded = common.run_folder(common.Config(dataset=row["dataset"])).parent.name
            elsewhere = {Path(name).name for name in row["config"]["transfer"].split(",")}
            row["transferred"] = row["evaluated_on"] in elsewhere or loaded != row["source"]
            kind = row["model"], row["label"], row["source"], row["shots"], row["seed"]
            rows[kind, row["evaluated_on"], row["classes"]] = row
            last[row["run"]] = row["train_seconds"]
    except (AttributeError, LookupError, TypeError, ValueError) as problem:
        raise common.Error(f"{path} holds a line that is no record of ours: {problem!r}") from None
    folders = defaultdict(set)  # of one name, which then stand apart by their paths
    for row in rows.values():
        if Path(row["dataset"]).name == row["evaluated_on"]:
            folders[row["evaluated_on"]].add(row["dataset"])
    for row in rows.values():
        if len(folders[row["evaluated_on"]]) > 1 and not row["transferred"]:
            row["evaluated_on"] = row["dataset"]
    return sorted(  # of a run that was trained again, only what its present prompt gave
        (row for row in rows.values() if row["train_seconds"] == last[row["run"]]),
        key=lambda r: (ORDER.index(r["method"]) if r["method"] in ORDER else -1, r["label"]),
    )


def described(row):
    """The method and its options that are not the default, but for those that the tables show."""
    module = "tests.zero_shot" if row["method"] == "zero_shot" else row["method"]
    shown = common.UPKEEP | {"dataset", "shots", "seed", "model"}
    if row["classes"] != "all":  # then the table says base and new
        shown.add("classes")
    words = [row["method"]]
    for field in dataclasses.fields(importlib.import_module(module).Config):
        value = row["config"].get(field.name, field.default)
        if field.name not in shown and value != field.default:
            words.append(f"{field.name}={value}")
    return " ".join(words)


def grouped(rows):
    """{label: {data set: [value per seed]}} with zero-shot CLIP first."""
    table = defaultdict(lambda: defaultdict(list))
    for row in rows:
        table["zero-shot"].setdefault(row["evaluated_on"], [row["zero"]])
        if row["method"] != "zero_shot":
            table[row["label"]][row["evaluated_on"]].append(row["value"])
    return table


def cell(values):
    return (
        f"{np.mean(values):.2f} ± {np.std(values):.2f} ({len(values)})"
        if len(values) > 1
        else f"{values[0]:.2f}"
    )


def markdown(head, rows):
    """A Markdown table as text."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy_table(rows):
    """One row per method, one column per data set and, where a method has all, their average."""
    names = sorted({row["evaluated_on"] for row in rows})
    body = []
    for label, sets in grouped(rows).items():
        cells = [cell(sets[n]) if n in sets else "" for n in names]
        whole = len(names) > 1 and all(n in sets for n in names)
        average = f"{np.mean([np.mean(sets[n]) for n in names]):.2f}" if whole else ""
        body.append([label, *cells] + [average] * (len(names) > 1))
    return markdown(["method", *names] + ["average"] * (len(names) > 1), body)


def base_new_table(rows):
    """Base, new and H, the harmonic mean of their means, of each data set; last the averages."""
    names = sorted({row["evaluated_on"] for row in rows})
    halves = {half: grouped([r for r in rows if r["classes"] == half]) for half in ("base", "new")}
    body = []
    for label in halves["base"]:
        pairs = {n: [halves[half][label][n] for half in halves] for n in names}
        for n in names:
            if all(pairs[n]):
                body.append([label, n, *map(cell, pairs[n]), harmonic(*map(np.mean, pairs[n]))])
        if len(names) > 1 and all(all(pair) for pair in pairs.values()):
            means = [np.mean([np.mean(pair[k]) for pair in pairs.values()]) for k in (0, 1)]
            body.append([label, "average", *(f"{m:.2f}" for m in means), harmonic(*means)])
    return markdown(["method", "data set", "base", "new", "H"], body)


def harmonic(base, new):
    return f"{2 * base * new / max(base + new, 1e-9):.2f}"


def tables(rows):
    """All tables as Markdown, by model and shots: few-shot, base-to-new, transfer by source."""
    text = []  # zero-shot runs have no shots; row 0 of each table stands for them
    kinds = sorted({(r["model"], r["shots"]) for r in rows if r["method"] != "zero_shot"})
    kinds = kinds or sorted({(r["model"], r["shots"]) for r in rows})
    for model, shots in kinds:
        some = [r for r in rows if (r["model"], r["shots"]) == (model, shots)]
        own = [r for r in some if not r["transferred"]]
        if few := [r for r in own if r["classes"] == "all"]:
            text.append(f"{model}, {shots} shots\n\n{accuracy_table(few)}")
        if half := [r for r in own if r["classes"] != "all"]:
            text.append(f"{model}, {shots} shots, base to new\n\n{base_new_table(half)}")
        for source in sorted({r["source"] for r in some if r["transferred"]}):
            moved = [r for r in some if r["transferred"] and r["source"] == source]
            text.append(
                f"{model}, {shots} shots of {source}, evaluated on\n\n{accuracy_table(moved)}"
            )
    if apart := sorted({r["evaluated_on"] for r in rows if r["per_class"]}):
        text.append(
            f"On {', '.join(apart)}, SoftCPT's cells are means over the classes' accuracies; "
            "so are zero-shot CLIP's where SoftCPT stands alone."
        )
    return "\n\n".join(text)


def plot(rows, file):
    """Accuracy against shots: one panel per data set and one for the average, ± 1 std bands."""
    try:
        import matplotlib
    except ImportError:
        raise common.Error("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["classes"] == "all" and not r["transferred"] and r["shots"]]
    if not rows:
        raise common.Error("--plot: no few-shot run is recorded yet")
    names = sorted({r["evaluated_on"] for r in rows})
    labels = list(dict.fromkeys(r["label"] for r in rows))
    reached = defaultdict(set)  # the average needs a run on every data set
    for r in rows:
        reached[r["label"], r["shots"], r["seed"]].add(r["evaluated_on"])
    whole = len(names) > 1 and any(len(sets) == len(names) for sets in reached.values())
    panels = [*names, "average"] if whole else names
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (3.2 * columns + 2.4, 2.8 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, name in zip(axes.flat, panels, strict=False):
        wanted = names if name == "average" else [name]
        zero = [next(r["zero"] for r in rows if r["evaluated_on"] == n) for n in wanted]
        axis.axhline(np.mean(zero), color="black", linestyle=":", label="zero-shot")
        for k, label in enumerate(labels):
            colour = plt.get_cmap("tab20")(k % 20)  # a method keeps its colour in every panel
            points = []
            for shots in sorted({r["shots"] for r in rows if r["label"] == label}):
                seeds = defaultdict(dict)
                for r in rows:
                    if r["label"] == label and r["shots"] == shots:
                        seeds[r["seed"]][r["evaluated_on"]] = r["value"]
                values = [
                    np.mean([s[n] for n in wanted])
                    for s in seeds.values()
                    if s.keys() >= set(wanted)
                ]
                if values:
                    points.append((shots, np.mean(values), np.std(values)))
            if points:
                x, mean, std = np.array(points).T
                axis.plot(x, mean, marker="o", markersize=3, color=colour, label=label)
                axis.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
        ticks = sorted({r["shots"] for r in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[-1, 0].set_xlabel("training images per class")
    shown = {}
    for axis in figure.axes:
        shown |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), fontsize=7, loc="outside right upper")
    try:
        figure.savefig(file, dpi=150)
    except ValueError as problem:  # matplotlib's own kind for an unknown file type
        raise common.Error(f"--plot {file}: {problem}") from None


def main():
    parser = argparse.ArgumentParser("python common.py report", description=__doc__)
    parser.error = lambda message: common.stop(f"{message}; --help lists every option")
    parser.add_argument("--out", default="runs", help="folder of the recorded runs [runs]")
    parser.add_argument("--plot", default="", help="also draw accuracy against shots to this file")
    options = parser.parse_args(sys.argv[2:])
    try:
        rows = read(options.out)
        print(tables(rows))
        if options.plot:
            file = options.plot if Path(options.plot).suffix else f"{options.plot}.png"
            plot(rows, file)
            print(f"\ndrawn: {file}")
    except (common.Error, OSError) as problem:
        common.stop(problem)
