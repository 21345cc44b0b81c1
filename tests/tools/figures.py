"""The report's figures, drawn with matplotlib, which is imported when a figure is asked for."""

import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np

import common
from tests.tools import published

COLUMNS = 4  # panels side by side
GREY = "0.65"
DOTTED = [":", (0, (1, 4)), (0, (5, 5))]  # of zero-shot CLIP, by backbone


def pyplot():
    """matplotlib.pyplot, drawing to files alone. Raises Error."""
    try:
        import matplotlib
    except ImportError:
        raise common.Error("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure, file):
    """Writes a figure in the format that its file's name asks for. Raises Error."""
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    except ValueError as problem:  # matplotlib's own kind for an unknown file type
        raise common.Error(f"{file}: {problem}") from None
    finally:
        pyplot().close(figure)


def plot(runs, file):
    """Accuracy against shots, ± 1 std over seeds: a panel per data set and, where a run has all of
    them, one of the average. Raises Error."""
    plt = pyplot()
    few = [run for run in runs if run.classes == "all" and not run.transferred and run.shots]
    if not few:
        raise common.Error("--plot: no few-shot run is recorded yet")
    names = sorted({run.on for run in few})
    panels = [[name] for name in names]
    if len(names) > 1 and any(curve(few, line, names) for line in lines_of(few)):
        panels.append(names)
    wide = min(COLUMNS, len(panels))
    high = -(-len(panels) // wide)
    size = 3.2 * wide + 3, 2.8 * high
    figure, axes = plt.subplots(high, wide, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        draw_panel(axis, few, panel)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[-1, 0].set_xlabel("training images per class")
    legend = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        legend.update(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), fontsize=7, loc="outside right upper")
    save(figure, file)


def lines_of(runs):
    """The (label, model) of each line, in the order of the tables."""
    return list(dict.fromkeys((run.label, run.model) for run in runs))


def curve(runs, line, names):
    """Points (shots, mean, std) of one line, over the seeds that have all data sets named."""
    found = defaultdict(dict)  # (shots, seed) -> {data set: value}
    for run in runs:
        if (run.label, run.model) == line and run.on in names:
            found[run.shots, run.seed][run.on] = run.value
    means = defaultdict(list)
    for (shots, _), values in found.items():
        if len(values) == len(names):
            means[shots].append(np.mean(list(values.values())))
    return [(shots, np.mean(means[shots]), np.std(means[shots])) for shots in sorted(means)]


def draw_panel(axis, runs, names):
    """One data set, or the average of several."""
    draw_zero_shot(axis, runs, names)
    for k, line in enumerate(lines_of(runs)):
        points = curve(runs, line, names)
        if points:
            # A line keeps its colour in every panel
            draw_curve(axis, points, f"C{k % 10}", ["-", "--", "-."][k // 10 % 3], ", ".join(line))
    ticks = sorted({run.shots for run in runs})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    axis.set_title("average" if names[1:] else names[0], fontsize=9)
    axis.grid(alpha=0.3)


def draw_curve(axis, points, colour, style, label):
    """Mean accuracies with a band of ± 1 std."""
    shots, mean, std = np.array(points).T
    axis.plot(shots, mean, style, marker="o", markersize=3, color=colour, label=label)
    axis.fill_between(shots, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)


def draw_zero_shot(axis, runs, names):
    """A level line of zero-shot CLIP per backbone that has all the data sets."""
    backbones = sorted({run.model for run in runs})
    for backbone, style in zip(backbones, itertools.cycle(DOTTED), strict=False):
        zero = {}
        for run in runs:
            if run.model == backbone and run.on in names:
                zero.setdefault(run.on, run.zero)  # not SoftCPT's, which come last
        if len(zero) == len(names):
            height = np.mean(list(zero.values()))
            label = f"zero-shot, {backbone}"
            axis.axhline(height, color="black", linestyle=style, label=label)


PANELS = {
    "text": ("text prompts alone", "variance of images within a class"),
    "visual": ("visual prompts alone", "variance of texts between classes"),
}


def study(points, file):
    """UPT's Fig. 1 (d, e) for the runs at hand, over the paper's own points in grey. Raises
    Error."""
    plt = pyplot()
    if not points:
        raise common.Error("--study: no run of upt.py with --side text or visual is recorded yet")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, (side, (title, variance)) in zip(axes, PANELS.items(), strict=True):
        x, y = zip(*published.figure_1(side), strict=True)
        axis.scatter(x, y, marker="x", color=GREY, label="UPT, Fig. 1 (read off, ± 0.2)")
        own = [point for point in points if point.side == side]
        for k, run in enumerate(dict.fromkeys(point.run for point in own)):
            draw_points(axis, [point for point in own if point.run == run], f"C{k}", run)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(title)
        axis.set_xlabel(variance)
        axis.set_ylabel("gain over zero-shot CLIP (points)")
        axis.grid(alpha=0.3)
        axis.margins(0.15)  # room for the names
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    save(figure, file)


def draw_points(axis, points, colour, label):
    """The points of one setting, ± 1 std over seeds, each with the name of its data set."""
    x = [point.variance for point in points]
    y = [np.mean(point.gains) for point in points]
    error = [np.std(point.gains) for point in points]
    axis.errorbar(x, y, error, fmt="o", color=colour, capsize=2, label=label)
    for point, height in zip(points, y, strict=True):
        at = point.variance, height
        axis.annotate(point.dataset, at, (5, 4), textcoords="offset points", fontsize=7)
