"""The report's cells, and its table of published numbers beside runs of the same setting."""

import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from tests.tools import published

HEAD = ["published as", "backbone", "shots", "protocol", "data set"]
HEAD += ["our run", "published", "ours", "difference", "source"]

# SoftCPT's suites and their numbers of tasks. RS-8's members are not public; what stands in the
# names of the others' folders tells them
SUITES = {"general10": 10, "plant6": 6, "fashion20": 20}
FOLDERS = {
    "plant6": "fruit_veg|kaggle_flower|kaggle_mushroom|kaggle_veg|PlantSeedling|PlantVillage",
    "fashion20": "fashion20",
}


def cell(values):
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values):.2f} ({len(values)})"


def harmonic(base, new):
    return 2 * base * new / max(base + new, 1e-9)


def markdown(head, lines):
    """A Markdown table as text."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


class Setting(NamedTuple):
    """What a run must have in common with a published number, beside the data set."""

    label: str
    backbone: str
    shots: int
    protocol: str


def settings(runs):
    """{Setting: {data set: {seed: accuracy}}} of all that the runs give."""
    found = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        for protocol in protocols(run):
            backbone = run.model.removesuffix("-quickgelu")
            setting = Setting(run.label, backbone, run.shots, protocol)
            found[setting][run.on][run.seed] = run.value
    for setting, sets in list(found.items()):
        suite = setting.protocol
        if suite not in SUITES:
            sets.update(means(sets))
        elif len(sets) == SUITES[suite]:  # else its evaluation was cut short
            sets[suite] = averaged(sets.values())
    for setting, base in list(found.items()):
        new = found.get(setting._replace(protocol="new"), {})
        if setting.protocol == "base" and new:
            found[setting._replace(protocol="H")] = halves_joined(base, new)
    return found


def protocols(run):
    """The protocols that a run belongs to; a suite's name stands for its score's."""
    if run.classes != "all":
        return [run.classes]
    if run.transferred:
        return ["from imagenet"] if run.source == "imagenet" else []
    suite = suite_of(run.source)
    if suite:
        return [suite]
    return ["few-shot", "from imagenet"] if run.source == "imagenet" else ["few-shot"]


def suite_of(source):
    """The suite that --dataset names or lists, else ""."""
    tasks = source.split(",")
    for suite, known in FOLDERS.items():
        if len(tasks) == SUITES[suite] and all(re.search(known, task) for task in tasks):
            return suite
    return source if source in SUITES else ""


def means(sets):
    """The means over data sets of which some are published, where they are all there."""
    found = {}
    for title, members in published.MEANS.items():
        names = members.split()
        if all(name in sets for name in names):
            found[title] = averaged([sets[name] for name in names])
    return found


def averaged(parts):
    """The mean over dicts {seed: accuracy}, for the seeds that all of them have."""
    shared = set.intersection(*map(set, parts))
    return {seed: np.mean([part[seed] for part in parts]) for seed in shared}


def halves_joined(base, new):
    """H of the means over seeds, as papers print it, of the data sets and seeds that have both."""
    found = {}
    for name in base.keys() & new.keys():
        seeds = base[name].keys() & new[name].keys()
        if seeds:
            halves = [np.mean([half[name][seed] for seed in seeds]) for half in (base, new)]
            found[name] = {"of the means": harmonic(*halves)}
    return found


def comparison(runs):
    """Published numbers beside ours of the same setting, as Markdown; "" where there are none."""
    ours = settings(runs)
    lines, used = [], {}
    for row in published.published():
        for setting, sets in ours.items():
            values = list(sets.get(row.dataset, {}).values())
            if values and fits(row, setting):
                lines.append(line(row, setting, values))
                used[row.source] = f"{row.source}: {published.SOURCES[row.source]}."
    if not lines:
        return ""
    note = "*: more than two std of ours, over two seeds or more."
    return "\n".join([markdown(HEAD, lines), "", note, *used.values()])


def fits(row, setting):
    """Whether a published number is of a run's setting."""
    protocol = row.dataset if row.protocol == "suite" else row.protocol
    wanted = row.backbone, row.shots, protocol
    return wanted == setting[1:] and published.same(row, setting.label)


def line(row, setting, values):
    """A line of the table; the difference is ours less the published value."""
    std = "" if row.std is None else f" ± {row.std:.2f}"
    gap = np.mean(values) - row.value
    mark = " *" if len(values) > 1 and abs(gap) > 2 * np.std(values) else ""
    cells = [row.method, row.backbone, str(row.shots), row.protocol, row.dataset, setting.label]
    cells += [f"{row.value:.2f}{std}", cell(values), f"{gap:+.2f}{mark}", row.source]
    return cells
