"""The report's cells, and its table of published numbers, published.json, beside ours."""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

FEW_SHOT, TASKS, HALVES, TRANSFER = "few-shot", "tasks", "base to new", "transfer"  # kinds of rows
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text("utf-8"))
# Options that papers leave open, so that a run with them stands beside the same numbers
OPEN = {"official": True, "task_n_ctx": 8}
# SoftCPT's suites: number of tasks, and names that those of the folders contain. RS-8's members are
# not public
SUITES = {
    "general10": (10, "general10"),
    "plant6": (6, "fruit_veg|kaggle_flower|kaggle_mushroom|kaggle_veg|PlantSeedling|PlantVillage"),
    "fashion20": (20, "fashion20"),
}


def averaged(parts):
    """The mean over dicts {seed: accuracy}, for the seeds that all of them have."""
    shared = set.intersection(*map(set, parts))
    return {seed: np.mean([part[seed] for part in parts]) for seed in sorted(shared)}


def harmonic(base, new):
    """H of the means of two {seed: accuracy} over the seeds that both have; None without."""
    shared = base.keys() & new.keys()
    if not shared:
        return None
    b, n = (np.mean([part[seed] for seed in shared]) for part in (base, new))
    return 2 * b * n / max(b + n, 1e-9)


def cell(found, rows=()):
    """The text of a {seed: accuracy}; rows: those it is of, for the mark of a note."""
    numbers = [*found.values()]
    text = "".join(f"{number:.2f}" for number in numbers)
    if len(numbers) > 1:
        text = f"{np.mean(numbers):.2f} ± {np.std(numbers):.2f} ({len(numbers)})"
    return text + " †" * bool(differences(rows))


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
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def protocols(row):
    """The published protocols that a row belongs to; a suite's name stands for that of its mean."""
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
        new = found.get(setting._replace(kind="new"), {})
        if setting.kind == "base" and new:
            for name in sets.keys() & new.keys():
                H = harmonic(sets[name], new[name])
                found[setting._replace(kind="H")][name] = {} if H is None else {"of means": H}
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


def comparison(rows):
    """Published numbers beside ours of the same setting, as Markdown; "" where there are none."""
    ours, lines, sources = ours_of(rows), [], {}
    for entry in PUBLISHED["numbers"]:
        number = dict(zip(PUBLISHED["columns"], entry, strict=True))
        for setting, sets in ours.items():
            found = sets.get(number["dataset"])
            if not found or not is_same(number, setting):
                continue
            gap = np.mean([*found.values()]) - number["value"]
            far = len(found) > 1 and abs(gap) > 2 * np.std([*found.values()])
            std = "" if number["std"] is None else f" ± {number['std']:.2f}"
            line = [str(value) for value in entry[:5]] + [setting.label]
            line += [f"{number['value']:.2f}{std}", cell(found), f"{gap:+.2f}" + " *" * bool(far)]
            lines.append([*line, number["source"]])
            sources[number["source"]] = PUBLISHED["sources"][number["source"]]
    if not lines:
        return ""
    notes = ["*: more than two std of ours, over two seeds or more."]
    notes += [f"{name}: {text}." for name, text in sources.items()]
    head = ["published as", "backbone", "shots", "protocol", "data set"]
    head += ["our run", "published", "ours", "difference", "source"]
    return "\n".join([markdown(head, lines), "", *notes])
