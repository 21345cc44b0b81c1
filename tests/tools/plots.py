"""The report's plot: accuracy against shots, and the loss per epoch."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np

import common

COLUMNS = 4  # panels side by side


def plot(rows, file):
    """Draws an accuracy panel per data set, and a loss panel per training set and number of
    shots: means ± 1 std over seeds. rows: the report's Rows. Raises Error."""
    try:
        import matplotlib

        matplotlib.use("Agg")  # to files
        import matplotlib.pyplot as plt
    except ImportError:
        raise common.Error("--plot needs matplotlib: pip install matplotlib") from None
    panels = accuracies(rows) | losses(rows)
    if not panels:
        raise common.Error("--plot: there is no few-shot accuracy and no loss to draw")
    colours = {}  # a line keeps its colour in every panel
    for curves in panels.values():
        for label, *_ in curves:
            colours.setdefault(label, f"C{len(colours) % 10}")
    wide = min(COLUMNS, len(panels))
    high = math.ceil(len(panels) / wide)
    figure, axes = plt.subplots(
        high,
        wide,
        figsize=(3.4 * wide + 3, 2.8 * high),
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        draw(axis, title, curves, colours)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    handles = [plt.Line2D([], [], color=colour) for colour in colours.values()]
    figure.legend(handles, colours, fontsize=7, loc="outside right upper")
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    except ValueError as problem:  # an unknown type of file
        raise common.Error(f"{file}: {problem}") from None
    finally:
        plt.close(figure)


def name_of(setting):
    """A line's name in the legend."""
    return ", ".join(filter(None, [setting.label, setting.model, setting.source]))


def accuracies(rows):
    """{title: [(line, shots, means, stds)]} of few-shot runs and tasks, and zero-shot CLIP,
    whose line is level."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        if row.setting.kind in ("few-shot", "tasks") and row.setting.shots:
            lines = found[f"{row.on}: accuracy (%)"]
            lines[name_of(row.setting)][row.setting.shots].append(row.value)
            lines[f"zero-shot, {row.setting.model}"][row.setting.shots].append(row.zero)
    panels = {}
    for title, lines in found.items():
        panels[title] = []
        for line, by_shots in lines.items():
            shots = sorted(by_shots)
            means = [np.mean(by_shots[k]) for k in shots]
            stds = [np.std(by_shots[k]) for k in shots]
            panels[title].append((line, shots, means, stds))
    return panels


def losses(rows):
    """{title: [(line, epochs, means, stds)]} of all runs that recorded their losses."""
    runs = {}
    for row in rows:
        if row.losses and row.setting.kind != "transfer":
            half = ", base classes" * (row.half != "all")
            shots = row.setting.shots or "all"
            title = f"{row.setting.source or row.on}{half}, {shots} shots: loss"
            runs[title, row.setting, row.seed] = row.losses  # the same in every row of a run
    found = defaultdict(lambda: defaultdict(list))
    for (title, setting, _), values in runs.items():
        found[title][setting].append(values)
    panels = {}
    for title, lines in found.items():
        panels[title] = []
        for setting, seeds in lines.items():
            epochs = min(map(len, seeds))
            table = np.array([values[:epochs] for values in seeds])
            curve = range(1, epochs + 1), table.mean(0), table.std(0)
            panels[title].append((name_of(setting), *curve))
    return panels


def draw(axis, title, curves, colours):
    """Draws one panel."""
    is_loss = title.endswith("loss")
    for line, x, mean, std in curves:
        mean, std = np.array(mean), np.array(std)
        style = ":" if line.startswith("zero-shot") else "-"
        marker = "" if is_loss else "o"
        colour = colours[line]
        axis.plot(x, mean, style, marker=marker, markersize=3, color=colour)
        axis.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2)
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    if is_loss:
        axis.set_xlabel("epoch")
        return
    shots = sorted({k for curve in curves for k in curve[1]})
    axis.set_xscale("log", base=2)
    axis.set_xticks(shots, shots)
    axis.minorticks_off()
    axis.set_xlabel("training images per class")
