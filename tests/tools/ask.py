"""Questions to a finished run, for which no data set need be on disk:

    python common.py predict RUN PICTURES...     the likeliest classes of pictures
    python common.py interpret RUN               the words nearest to what was learned

RUN is the folder of a run's prompt.safetensors. PICTURES are files, and folders that are searched.
"""

import argparse
import json
import sys
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

METHODS = {"coop": coop, "dpt": dpt, "upt": upt, "enprompt": enprompt, "softcpt": softcpt}
SHOWN = 5  # classes per picture
BATCH = 20  # pictures decoded at a time
MOST_ROWS = 100  # pictures, about, on the sheet of attention
NEAREST = 3  # words per vector
TEXT_VECTORS = "ctx", "task_ctx", "class_ctx"  # learnables that stand where words do


class Learned(NamedTuple):
    """A finished run, loaded: its options, the CLIP and data sets it was trained on (their class
    names; no pictures), and what it learned."""

    module: object  # the method's script
    cfg: common.Config
    clip: common.Clip
    sets: list  # of common.Dataset
    prompt: torch.nn.Module


def load(run, device, data):
    """The Learned of a run's folder. Raises Error."""
    tensors, about = common.read_prompt(run)
    method = about.get("method")
    if method not in [*METHODS]:  # a list: what a file tells may have no hash
        raise common.Error(f"{run} is by {method!r}; known are {', '.join(METHODS)}")
    try:
        options = about["config"] | {"device": device, "data": data, "load": str(run)}
        cfg = METHODS[method].Config(**options)
        names = {str(name): list(map(str, kept)) for name, kept in about["classnames"].items()}
        if not names:
            raise ValueError("no class names")
    except (AttributeError, LookupError, TypeError, ValueError) as problem:
        raise common.Error(f"{run} is not of this version ({problem}); train it anew") from None
    clip = common.load_clip(cfg)
    if clip.fingerprint != about["CLIP"]:
        raise common.Error(f"{run} was trained with another CLIP than --model {cfg.model!r} is now")
    sets = []
    for name, classnames in names.items():
        sets.append(common.Dataset(name, [], [], [], classnames, template_of(name)))
    try:
        prompt = untrained(method, cfg, clip, sets)
        prompt.load_state_dict(tensors)
    except (RuntimeError, TypeError) as problem:
        raise common.Error(f"{run} does not fit its own options: {problem}") from None
    return Learned(METHODS[method], cfg, clip, sets, prompt.to(clip.device).eval())


def template_of(name):
    """The hand template of a data set, by its name alone."""
    world = common.drawn_world()
    if name in common.BENCHMARKS:
        return common.BENCHMARKS[name].template
    if world and name in world.TASKS:
        return world.TASKS[name].template
    return common.Dataset._field_defaults["template"]


def untrained(method, cfg, clip, sets):
    """The module of a method's learnables, as before training."""
    classes = sum(len(dataset.classnames) for dataset in sets)
    if method == "coop":
        return coop.PromptLearner(cfg, clip, classes)
    if method == "dpt":
        return dpt.DualPrompt(cfg, clip, classes)
    if method == "upt":
        d_t = clip.token_embedding.weight.shape[1]
        return upt.UnifiedPrompt(cfg, d_t, clip.blocks()[0].ln_1.weight.numel())
    if method == "enprompt":
        return enprompt.ExternalLayer(cfg, clip)
    return softcpt.SoftContext(cfg, clip, len(sets), classes)


def classifier(learned, target):
    """What the method's script makes for a data set: w (K, D), or a function logits(x, f)."""
    module, cfg, clip, sets, prompt = learned
    if module is enprompt:  # whose strengthening feature is that of the training classes
        return enprompt.classifier(cfg, clip, prompt, sets[0], target)
    if module is softcpt:
        return softcpt.classifier(cfg, clip, prompt, tasks_of(cfg, sets), target)
    return module.classifier(cfg, clip, prompt, target)


def tasks_of(cfg, sets):
    """SoftCPT's Tasks, from their class names alone."""
    titles = [title.strip() for title in cfg.tasks.split(",") if title.strip()]
    titles = titles or [softcpt.title_of(dataset.name) for dataset in sets]
    sizes = torch.tensor([len(dataset.classnames) for dataset in sets])
    first = (sizes.cumsum(0) - sizes).tolist()
    column_task = torch.arange(len(sets)).repeat_interleave(sizes)
    return softcpt.Tasks(sets, titles, first, column_task)


def parser_of(command, about):
    """The options that both questions share."""
    parser = common.Parser(f"python common.py {command}", description=about)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--device", default="", help="empty: cuda where there is one, else cpu")
    parser.add_argument("--data", default="data", help="folder of the drawn world's tiny CLIP")
    return parser


@torch.no_grad()
def predict(argv):
    """Prints the SHOWN likeliest classes of each picture. One that cannot be read is named on
    stderr while the others are answered, and the last line says how many. Raises Error."""
    parser = parser_of("predict", predict.__doc__)
    parser.add_argument("pictures", metavar="PICTURES", nargs="+", help="files or folders")
    parser.add_argument("--names", default="", help="class names to choose from: a,b,c")
    parser.add_argument("--json", action="store_true", help="one line of JSON per picture")
    parser.add_argument("--task", default="", help="of SoftCPT: whose classes; else the first's")
    parser.add_argument("--attention", default="", help="of DPT: PNG of where CAVPT looks")
    options = parser.parse_args(argv)
    files = found(options.pictures)
    learned = load(options.run, options.device, options.data)
    target = target_of(learned, options.task, options.names)
    if options.attention and not getattr(learned.prompt, "cavpt", ()):
        raise common.Error("--attention: only a run of dpt.py with --cavpt_layers has CAVPT")
    answer = classifier(learned, target)
    unread, sheet = 0, []
    for start in range(0, len(files), BATCH):
        batch, views = viewed(files[start : start + BATCH], learned.clip.image_size)
        unread += len(files[start : start + BATCH]) - len(batch)
        if not batch:
            continue
        x = common.normalised(learned.clip, views)
        f = common.unit_features(learned.clip, x)
        logits = answer(x, f) if callable(answer) else learned.clip.scale * f @ answer.T
        for file, p in zip(batch, F.softmax(logits.float(), dim=-1), strict=True):
            print_answer(file, p.cpu(), target.classnames, options.json)
        if options.attention and len(sheet) < MOST_ROWS:
            sheet += attention.rows_of(learned, target, x, f, logits)
    if sheet:
        attention.save(sheet, options.attention)
        # Not on stdout, where --json has lines of JSON alone
        common.say(f"{options.attention}: red is where each class's prompt looks", sys.stderr)
    if unread:
        raise common.Error(f"{unread} of {len(files)} pictures could not be read")


def found(places):
    """The files named, and the pictures in and below the folders named. Raises Error."""
    files = []
    for place in places:
        if not Path(place).exists():
            raise common.Error(f"{place}: nothing is there; separate several pictures by spaces")
        if Path(place).is_file():
            files.append(place)
            continue
        below = [str(path) for path in sorted(Path(place).rglob("*")) if is_picture(path, place)]
        if not below:
            raise common.Error(f"{place}: no picture in it or below")
        files += below
    return files


def is_picture(path, folder):
    """Whether a path below a folder is a picture by its name, and neither hidden nor in a hidden
    folder."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in common.IMAGES and path.is_file() and not hidden


def viewed(files, side):
    """The files that can be read, and their test views; the others are named on stderr."""
    readable, views = [], []
    for file in files:
        try:
            views.append(common.test_view(common.decode(file), side))
        except common.Error as problem:
            common.say(f"error: {problem}", sys.stderr)
        else:
            readable.append(file)
    return readable, views


def target_of(learned, task, names):
    """The Dataset whose class names are asked for: given ones, or those learned. Raises Error."""
    chosen = [dataset for dataset in learned.sets if task in ("", dataset.name)]
    if not chosen:
        known = ", ".join(dataset.name for dataset in learned.sets)
        raise common.Error(f"--task {task!r}: this run learned {known}")
    if not names:
        return chosen[0]
    given = [name.strip() for name in names.split(",") if name.strip()]
    if len(given) < 2:
        raise common.Error("--names needs two class names or more: a,b,c")
    for name in given:
        if given.count(name) > 1:
            raise common.Error(f"--names has {name!r} twice")
    return chosen[0]._replace(classnames=given)


def print_answer(file, p, classnames, as_json):
    """Prints one picture's likeliest classes; p (K,): their probabilities."""
    top = p.topk(min(SHOWN, len(p)))
    names = [classnames[k] for k in top.indices]
    values = top.values.tolist()
    if as_json:
        print(json.dumps({"image": file, "classes": names, "probabilities": values}))
    else:
        pairs = [f"{name} {value:.1%}" for name, value in zip(names, values, strict=True)]
        common.say(f"{file}: {', '.join(pairs)}")


@torch.no_grad()
def interpret(argv):
    """Prints the vocabulary's NEAREST words, by Euclidean distance, to each learned text vector
    (CoOp interpret_prompt.py), and the norms of the visual prompts. Raises Error."""
    options = parser_of("interpret", interpret.__doc__).parse_args(argv)
    learned = load(options.run, options.device, options.data)
    text, visual = vectors(learned)
    for name, V in text.items():
        print_nearest(learned.clip, name, V.float())
    for name, P in visual.items():
        norms = P.float().norm(dim=-1).flatten().tolist()
        print(f"norms of {name}: " + " ".join(f"{norm:.3f}" for norm in norms))
    print("Near is not the same as meaning: the vectors are free; CoOp's authors warn likewise.")


def vectors(learned):
    """{name: text vectors (n, d_t)} and {name: visual prompts (P, d)} of what was learned."""
    if learned.module is upt:  # what its towers see: its rows behind the transform
        V, P = learned.prompt()
        return {"text prompts": V[0]}, {"visual prompts": P}
    tensors = learned.prompt.state_dict()
    text, visual = {}, {}
    for name in TEXT_VECTORS:
        for i, rows in enumerate(tensors.get(name, ()), 1):
            text[f"{name} {i}" if len(tensors[name]) > 1 else name] = rows
    for layer, rows in enumerate(tensors["visual"], 1) if "visual" in tensors else ():
        visual[f"visual prompts, layer {layer}"] = rows
    return text, visual


def print_nearest(clip, name, V):
    """A line per vector of V (n, d_t): its norm, and the words next to it with their distances."""
    words = clip.token_embedding.weight.float()
    near = torch.cdist(V, words).topk(NEAREST, largest=False)
    for i, (distances, ids) in enumerate(zip(near.values, near.indices, strict=True)):
        pairs = []
        for distance, word in zip(distances.tolist(), ids.tolist(), strict=True):
            pairs.append(f"{clip.tokenize.decode([word]).strip()} ({distance:.3f})")
        print(f"{name}, vector {i + 1}, norm {V[i].norm():.3f}: {', '.join(pairs)}")
