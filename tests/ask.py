"""Questions to a trained prompt: --predict, --names, --interpret. Nothing here moves a number."""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import common

SHOWN = 5  # classes per image
NEAREST = 3  # words per vector


def ask(cfg, clip, train, known, images, tasks):
    """Answers cfg.predict or cfg.interpret for a finished run, which train(cfg, clip, data) loads.

    known: the data sets it was trained on, as names; images: whether its predictor looks at
    pictures; tasks: whether train takes them all. Prints the answers, returns them. Raises Error.
    """
    if bool(cfg.interpret) == bool(cfg.predict) or cfg.interpret and (cfg.names or cfg.json):
        raise common.Error("--names and --json go with --predict; --interpret stands alone")
    files = found([cfg.predict] if isinstance(cfg.predict, str) else cfg.predict)
    prompt, predictor = train(cfg, clip, known if tasks else known[0])
    prompt.eval()
    if cfg.interpret:
        return interpret(clip, prompt)
    return predict(cfg, clip, predictor, labels(cfg, known), files, images)


def found(places):
    """The image files named, and those in and below the folders named. Raises Error for neither."""
    files = []
    for place in filter(None, places):
        below = sorted(
            path
            for path in Path(place).rglob("*")
            if path.suffix.lower() in common.IMAGES
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(place).parts)
        )
        if not Path(place).exists():
            raise common.Error(f"--predict {place}: nothing is there; separate several by spaces")
        if not below and not Path(place).is_file():
            raise common.Error(f"--predict {place}: no image in it or below")
        files += [str(path) for path in below] or [place]
    return files


def labels(cfg, known):
    """The data set whose class names are asked for: --names, or those learned. Raises Error."""
    task = getattr(cfg, "task", "")
    chosen = [d for d in known if not task or d.name == task]
    if not chosen:
        raise common.Error(f"--task {task!r}: this run learned {', '.join(d.name for d in known)}")
    given = [name.strip() for name in cfg.names.split(",") if name.strip()]
    if twice := {name for name in given if given.count(name) > 1}:
        raise common.Error(f"--names has {min(twice)!r} twice")
    names = given if cfg.names else chosen[0].classnames
    if len(names) < 2:
        raise common.Error("nothing to choose from: --names needs two class names or more, a,b,c")
    return chosen[0]._replace(classnames=names)


def predict(cfg, clip, predictor, dataset, files, images):
    """Prints the SHOWN most probable classes of each image; a list of dicts. An image that cannot
    be read is named on stderr while the others are answered, and the last line says how many."""
    readable = []
    for file in files:
        try:
            common.decode(file)
            readable.append((file, 0, ""))
        except common.Error as problem:
            print(f"error: {problem}", file=sys.stderr)
    answers = []
    if readable:
        logits = common.classify(cfg, clip, readable, predictor(dataset), images)
        for (file, *_), p in zip(readable, F.softmax(logits, dim=-1), strict=True):
            top = p.topk(min(SHOWN, len(p)))
            names = [dataset.classnames[k] for k in top.indices]
            answers.append({"image": file, "classes": names, "probabilities": top.values.tolist()})
            pairs = [f"{n} {v:.1%}" for n, v in zip(names, top.values.tolist(), strict=True)]
            print(json.dumps(answers[-1]) if cfg.json else f"{file}: {', '.join(pairs)}")
    if bad := len(files) - len(readable):
        raise common.Error(f"{bad} of {len(files)} images could not be read")
    return answers


@torch.no_grad()
def interpret(clip, prompt):
    """Prints the NEAREST vocabulary words, by Euclidean distance, of each learned text vector
    (CoOp interpret_prompt.py) and the norms of visual rows; the words as a list of lists."""
    if not hasattr(prompt, "words") and not hasattr(prompt, "visual_rows"):
        raise common.Error("this method learns no vectors to interpret")
    answers = []
    if hasattr(prompt, "words"):
        vectors = prompt.words().float()  # (n, d)
        near = torch.cdist(vectors, clip.token_embedding.weight.float()).topk(
            NEAREST, largest=False
        )
        for i, (distances, ids) in enumerate(zip(*(t.tolist() for t in near), strict=True)):
            words = [clip.tokenize.decode([k]).strip() for k in ids]
            answers.append(words)
            pairs = [f"{word} ({d:.3f})" for word, d in zip(words, distances, strict=True)]
            print(f"text vector {i + 1}, norm {vectors[i].norm():.3f}: {', '.join(pairs)}")
    if hasattr(prompt, "visual_rows"):
        norms = prompt.visual_rows().float().norm(dim=-1).tolist()
        print("norms of the visual rows: " + " ".join(f"{n:.3f}" for n in norms))
    print(
        "Near is not the same as meaning: the vectors are free, and CoOp's authors warn likewise."
    )
    return answers
