"""Predicts with a finished run of any method. RUN is its folder; no training images are needed.

    python -m tests.tools.predict RUN IMAGES...        likeliest classes of files and folders
    python -m tests.tools.predict RUN FOLDER           accuracy on all images FOLDER/<class>/*.jpg
    python -m tests.tools.predict RUN --dataset NAME   accuracy on a data set's test images
    python -m tests.tools.predict RUN --interpret      words nearest to the learned contexts

Per-class accuracies and the most confused pairs follow the accuracy. If the run knows all of
FOLDER's classes, images are classified among all of the run's classes, else among FOLDER's. With
--names, folders are searched for unlabelled images.
"""

import argparse
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.tools import attention

METHODS = {
    "coop": coop,
    "dpt": dpt,
    "upt": upt,
    "enprompt": enprompt,
    "softcpt": softcpt,
}
NEAREST = 3  # words per context vector
PAIRS = 10  # confused pairs
CONTEXTS = "ctx", "task_ctx", "class_ctx"  # learnables that stand where words do
OVERRIDES = "model", "pretrained", "data", "device"  # options that may differ from the run's


class Run(NamedTuple):
    """A finished run: options, CLIP, the method's module; data, the Dataset trained on, without
    images (SoftCPT: Tasks); sets, a list of its Datasets; prompt, the learnables in eval mode."""

    cfg: common.Config
    clip: common.Clip
    method: object
    data: object
    sets: list
    prompt: torch.nn.Module


def load_run(run, **overrides):
    """Loads the Run in a folder; overrides: options to replace the run's. Raises Error."""
    path = Path(run, "checkpoint.pt")
    if not path.is_file():
        raise common.Error(f"{run} is not a run: it has no checkpoint.pt")
    state = common.read_checkpoint(path)
    identity, trained = state["run"], state["trained"]
    name, epochs = identity["method"], identity["number of epochs"]
    if name not in METHODS:
        raise common.Error(f"{run} was trained by {name}, not by one of our methods")
    if state["epoch"] < epochs:
        raise common.Error(f"{run} is not finished: it has fewer than {epochs} epochs; resume it")
    method = METHODS[name]
    if others := vars(method.Config()).keys() ^ state["config"].keys():
        raise common.Error(f"{run} is of a version with another --{', --'.join(sorted(others))}")
    cfg = method.Config(**state["config"] | overrides)
    clip = common.load_clip(cfg)
    now = common.provenance(common.source_file(cfg), clip.precision, clip.device.type)
    if trained["source"] != now["source"]:
        earlier = f"other code: {name}.py at commit {trained['commit']}"
        print(f"{run} was trained by {earlier}", file=sys.stderr)
    if clip.fingerprint != identity["CLIP"]:
        now = f"--model {cfg.model!r} --pretrained {cfg.pretrained!r}"
        raise common.Error(f"{run} was trained with another CLIP than that of {now}")
    templates, sets = identity["templates"], []
    for dataset, names in identity["class names"].items():
        sets.append(common.Dataset(dataset, [], [], names, templates[dataset]))
    data = softcpt.tasks_of(cfg, sets) if method is softcpt else sets[0]
    prompt = method.learnables(cfg, clip, data)
    prompt.load_state_dict(state["prompt"])
    return Run(
        cfg,
        clip,
        method,
        data,
        sets,
        prompt.eval(),
    )


def question(run, options):
    """([(file, label or None, ...)], the Dataset whose classes are asked for). Raises Error."""
    if options.dataset:
        target = common.load_dataset(options.dataset, run.cfg.data)
        return target.test, target
    target = task_of(run, options.task)
    folders = {} if options.names or options.images[1:] else class_folders(options.images[0])
    if not folders:
        names = options.names.split(",") if options.names else target.classnames
        items = []
        for place in options.images:
            items += [(str(file), None) for file in images_of(Path(place))]
        return items, renamed(run, target, names)
    if not {*map(plain, folders)} <= {*map(plain, target.classnames)}:
        target = renamed(run, target, folders)
    items, names = [], [*map(plain, target.classnames)]
    for name, files in folders.items():
        items += [(str(file), names.index(plain(name))) for file in files]
    return items, target


def plain(name):
    """A class name as CLIP reads it."""
    return name.replace("_", " ")


def task_of(run, task):
    """The Dataset trained on; for SoftCPT the one named task, or the first. Raises Error."""
    for dataset in run.sets:
        if task in ("", dataset.name):
            return dataset
    known = ", ".join(dataset.name for dataset in run.sets)
    raise common.Error(f"--task {task}: this run was trained on {known}")


def renamed(run, target, names):
    """The target with these class names. Raises Error."""
    names = [name.strip() for name in names]
    if len(names) < 2 or len(set(names)) < len(names):
        raise common.Error("at least two different class names are needed")
    if sorted(names) == sorted(target.classnames):
        return target
    if getattr(run.cfg, "csc", False) or getattr(run.cfg, "class_context", "") == "specific":
        raise common.Error("the contexts of this run belong to its own classes")
    return target._replace(classnames=names)


def class_folders(place):
    """{class folder: its images} of a folder, or {} if it holds images itself; if it holds train/
    and test/, those of test/."""
    inside = common.listed(Path(place))
    folders = {path.name: path for path in inside if path.is_dir()}
    if {"train", "test"} <= folders.keys():
        return class_folders(folders["test"])
    if any(path.suffix.lower() in common.IMAGES for path in inside):
        return {}
    return {name: images_of(folder) for name, folder in folders.items()}


def images_of(place):
    """[place]; for a folder, the images in and below it, without hidden ones. Raises Error."""
    if not place.is_dir():
        return [place]
    images = []
    for path in sorted(place.rglob("*")):
        hidden = path.name.startswith(".")
        if path.is_file() and path.suffix.lower() in common.IMAGES and not hidden:
            images.append(path)
    if not images:
        raise common.Error(f"{place} holds no images")
    return images


@torch.no_grad()
def predict(run, options):
    """Prints what the run predicts for the images that are asked about. Raises Error."""
    items, target = question(run, options)
    if options.attention and not getattr(run.prompt, "cavpt", ()):
        raise common.Error("--attention needs a run of dpt.py with --cavpt_layers above 0")
    classifier = run.method.classifier(run.cfg, run.clip, run.prompt, run.data, target)
    batches = [items[i : i + common.TEST_BATCH] for i in range(0, len(items), common.TEST_BATCH)]
    pairs, sheet = [], []
    for read in common.prefetch(run.cfg.workers, lambda item: readable(run, item), batches):
        good = [*filter(None, read)]
        if not good:
            continue
        x = common.normalize(run.clip, [image for _, image in good])
        f = common.unit_features(run.clip, x)
        if callable(classifier):
            logits = classifier(x, f)
        else:
            logits = run.clip.scale * f @ classifier.T
        for (item, _), p in zip(good, F.softmax(logits, -1).cpu(), strict=True):
            print_image(item, p, target.classnames, options)
            pairs.append((item[1], int(p.argmax())))
        if options.attention:
            sheet += attention.rows_of(run, target, x, f, logits)
    if pairs and pairs[0][0] is not None:
        print_accuracy(pairs, target.classnames, sys.stderr if options.json else sys.stdout)
    if sheet:
        attention.save(sheet, options.attention)
        print(f"{options.attention}: {attention.MEANING}", file=sys.stderr)
    count = len(items) - len(pairs)
    if count:
        raise common.Error(f"{count} of {len(items)} images could not be read")


def readable(run, item):
    """(item, its preprocessed image); None, and a line on stderr, if it cannot be read."""
    try:
        return item, common.preprocess(common.decode(item[0]), run.clip.image_size)
    except common.Error as problem:
        print(f"error: {problem}", file=sys.stderr)


def print_image(item, p, classnames, options):
    """Prints the likeliest classes of an image; for a labelled one, only with --json."""
    file, label = item[:2]
    top = p.topk(min(options.top, len(p)))
    names = [classnames[k] for k in top.indices]
    if options.json:
        line = {"image": file}
        if label is not None:
            line |= {"true": classnames[label], "predicted": names[0]}
        print(json.dumps(line | {"classes": names, "probabilities": top.values.tolist()}))
    elif label is None:
        pairs = zip(names, top.values, strict=True)
        print(f"{file}: " + ", ".join(f"{name} {value:.1%}" for name, value in pairs))


def print_accuracy(pairs, names, stream):
    """Prints accuracies and the most confused pairs; pairs: (label, predicted) of each image."""
    y, predicted = torch.tensor(pairs).T
    right = y == predicted
    K = len(names)
    total = y.bincount(minlength=K)
    share = 100 * y[right].bincount(minlength=K) / total
    say = partial(print, file=stream)
    say(f"accuracy {100 * right.double().mean():.2f} on {len(pairs)} images")
    say(f"mean over classes {share.nanmean():.2f} ({K} classes to choose from)")
    for name, percent, n in zip(names, share, total, strict=True):
        if n:
            say(f"  {percent:6.2f} on {n} of {name}")
    wrong = Counter((i, j) for i, j in pairs if i != j)
    for (i, j), n in wrong.most_common(PAIRS):
        say(f"  {n} of {total[i]} {names[i]} taken for {names[j]}")


@torch.no_grad()
def interpret(run):
    """Prints the vocabulary's NEAREST words, by Euclidean distance, to each context vector (CoOp's
    interpret_prompt.py)."""
    words = run.clip.token_embedding.weight.float()
    contexts = run.prompt.state_dict()
    if run.method is upt:  # what its text tower sees
        contexts["ctx"] = run.prompt()[0]
    for name in CONTEXTS:
        for row, V in enumerate(contexts.get(name, [])):
            nearest = torch.cdist(V, words).topk(NEAREST, largest=False).indices
            for i, ids in enumerate(nearest.tolist()):
                found = [run.clip.tokenize.decode([word]).strip() for word in ids]
                print(f"{name} {row + 1}, vector {i + 1}: {', '.join(found)}")
    print("CoOp's authors warn that a near word need not be what a vector means.")


def main(argv=None):
    parser = argparse.ArgumentParser("python -m tests.tools.predict", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a finished run")
    add("images", metavar="IMAGES", nargs="*", help="files or folders")
    add("--dataset", default="", help="data set, or folder split like one, to evaluate on")
    add("--interpret", action="store_true", help="print the words nearest to the contexts")
    add("--json", action="store_true", help="print one line of JSON per image")
    add("--top", type=int, default=5, help="number of classes printed per image [5]")
    add("--names", default="", help="class names to choose from: a,b,c")
    add("--task", default="", help="SoftCPT: task whose context and classes to use [the first]")
    add("--attention", default="", help="DPT: PNG file for CAVPT's attention maps")
    add("--device", default="", help="default: cuda if available, else cpu")
    for name in "model", "pretrained", "data":
        add(f"--{name}", default=argparse.SUPPRESS, help="default: the run's own")
    options = parser.parse_intermixed_args(argv)
    if bool(options.images) + bool(options.dataset) + options.interpret != 1:
        raise common.Error("one of IMAGES, --dataset NAME and --interpret is needed")
    if not options.images and (options.names or options.task or options.attention):
        raise common.Error("--names, --task and --attention are for IMAGES")
    given = {name: vars(options)[name] for name in OVERRIDES if name in options}
    run = load_run(options.run, **given)
    if options.interpret:
        interpret(run)
    else:
        predict(run, options)


if __name__ == "__main__":
    common.script(main)
