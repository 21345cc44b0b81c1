"""The report's cells, and its table of published numbers, published.json, beside ours."""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

FEW_SHOT, TASKS, HALVES, TRANSFER = "few-shot", "tasks", "base to new", "transfer"  # kinds of rows
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text("utf-8"))
# Options that papers leave open: runs with these values are compared with the same numbers
OPEN = {"official": True, "task_n_ctx": 8}
# SoftCPT's suites (RS-8's members are not public): number of tasks, names in those of the folders
SUITES = {
    "general10": (10, "general10"),
    "plant6": (6, "fruit_veg|kaggle_flower|kaggle_mushroom|kaggle_veg|PlantSeedling|PlantVillage"),
    "fashion20": (20, "fashion20"),
}


HEAD = "published as,backbone,shots,protocol,data set,our run,published,ours,difference,source"


def averaged(parts):
    """The mean over dicts {seed: accuracy}, for the seeds that all of them have."""
    shared = set.intersection(*map(set, parts))
    return {seed: np.mean([part[seed] for part in parts]) for seed in sorted(shared)}


def harmonic(base, new):
    """H of the means of two {seed: accuracy}, over the seeds in both; None if there are none."""
    shared = base.keys() & new.keys()
    if not shared:
        return None
    b = np.mean([base[seed] for seed in shared])
    n = np.mean([new[seed] for seed in shared])
    return 2 * b * n / max(b + n, 1e-9)


def cell(found, rows=()):
    """A {seed: accuracy} as text, with a † if its rows disagree on a fact."""
    numbers = [*found.values()]
    text = f"{np.mean(numbers):.2f}" if numbers else ""
    if len(numbers) > 1:
        text += f" ± {np.std(numbers):.2f} ({len(numbers)})"
    if differences(rows):
        text += " †"
    return text


def differences(rows):
    """{name: {seed: value}} of the facts in which seeds of one mean differ."""
    found = {}
    for name in rows[0].facts if rows else ():
        by_seed = {row.seed: row.facts[name] for row in rows}
        if len(set(by_seed.values())) > 1:
            found[name] = by_seed
    return found


def markdown(head, lines):
    """A Markdown table as text."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    table = [head, rule, *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def protocols(row):
    """The published protocols that a row belongs to; for tasks of a suite, the suite's name."""
    kind, source = row.setting.kind, row.setting.source
    if kind == FEW_SHOT:
        return ["few-shot", "from imagenet"] if row.on == "imagenet" else ["few-shot"]
    if kind == HALVES:
        return [] if source else [row.half]
    if kind == TRANSFER:
        return ["from imagenet"] if source == "imagenet" else []
    tasks = source.split(",")
    for suite, (count, known) in SUITES.items():
        if source == suite or len(tasks) == count and all(re.search(known, task) for task in tasks):
            return [suite]
    return []


def ours_of(rows):
    """{Setting whose kind is a protocol: {data set or mean: {seed: accuracy}}}; H has one value."""
    found = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        for protocol in protocols(row):
            source = row.setting.source if protocol in SUITES else ""
            setting = row.setting._replace(kind=protocol, source=source)
            found[setting][row.on][row.seed] = row.value
    for setting, sets in [*found.items()]:
        means = PUBLISHED["means"]
        if setting.kind in SUITES:
            complete = len(sets) == SUITES[setting.kind][0]
            means = {setting.kind: [*sets]} if complete else {}
        for title, names in means.items():
            if sets.keys() >= set(names):
                sets[title] = averaged([sets[name] for name in names])
    for setting, sets in [*found.items()]:
        if setting.kind != "base":
            continue
        new = found.get(setting._replace(kind="new"), {})
        for name in sets.keys() & new.keys():
            H = harmonic(sets[name], new[name])
            if H is not None:
                found[setting._replace(kind="H")][name] = {"of means": H}
    return found


def is_same(number, setting):
    """Whether a published number is of a run's setting."""
    method, options = PUBLISHED["methods"][number["method"]]
    if number["method"] == "CoOp" and number["protocol"] != "few-shot":  # CoCoOp's protocols
        options = options | {"init": "a photo of a"}
    protocol = number["dataset"] if number["protocol"] == "suite" else number["protocol"]
    wanted = method, options, number["backbone"], number["shots"], protocol
    own = {name: value for name, value in setting.options if OPEN.get(name) != value}
    model = setting.model.removesuffix("-quickgelu")
    return wanted == (setting.method, own, model, setting.shots, setting.kind)


def line_of(number, setting, found):
    """The cells of a published number and of ours."""
    values = [*found.values()]
    gap = np.mean(values) - number["value"]
    far = len(values) > 1 and abs(gap) > 2 * np.std(values)
    published = f"{number['value']:.2f}"
    if number["std"] is not None:
        published += f" ± {number['std']:.2f}"
    return [
        number["method"],
        number["backbone"],
        str(number["shots"]),
        number["protocol"],
        number["dataset"],
        setting.label,
        published,
        cell(found),
        f"{gap:+.2f} *" if far else f"{gap:+.2f}",
        number["source"],
    ]


def comparison(rows):
    """Published numbers beside ours of the same setting, as Markdown; "" where there are none."""
    ours, lines, sources = ours_of(rows), [], {}
    for entry in PUBLISHED["numbers"]:
        number = dict(zip(PUBLISHED["columns"], entry, strict=True))
        for setting, sets in ours.items():
            found = sets.get(number["dataset"])
            if not found or not is_same(number, setting):
                continue
            lines.append(line_of(number, setting, found))
            source = number["source"]
            sources[source] = PUBLISHED["sources"][source]
    if not lines:
        return ""
    notes = ["*: differs by more than two of our standard deviations, over at least two seeds."]
    notes += [f"{name}: {text}." for name, text in sources.items()]
    return "\n".join([markdown(HEAD.split(","), lines), "", *notes])
