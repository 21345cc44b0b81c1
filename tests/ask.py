"""Questions to a trained prompt: --predict, --names, --interpret. Nothing here moves a number."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

import common

SHOWN = 5  # classes per image
NEAREST = 3  # words per vector


def ask(cfg, known, images, clip, prompt, predictor):
    """Answers cfg.predict or cfg.interpret for a loaded run.

    known: the data sets (or tasks) it was trained on, as names; images: whether the predictor looks
    at pictures. Prints the answers and returns them. Raises Error.
    """
    prompt.eval()
    return (
        interpret(clip, prompt) if cfg.interpret else predict(cfg, known, images, clip, predictor)
    )


def predict(cfg, known, images, clip, predictor):
    """Prints the SHOWN most probable classes of each image; a list of dicts."""
    task = getattr(cfg, "task", "")
    chosen = [d for d in known if not task or d.name == task]
    if not chosen:
        raise common.Error(f"--task {task!r}: this run learned {', '.join(d.name for d in known)}")
    dataset = chosen[0]
    if cfg.names:
        names = [name.strip() for name in cfg.names.split(",") if name.strip()]
        dataset = dataset._replace(classnames=names)
    if len(dataset.classnames) < 2:
        raise common.Error("--names needs at least two class names, separated by commas")
    files = []
    for place in cfg.predict.split(","):
        found = [f"{place}/{name}" for name in common.listed(Path(place))]
        if not found and not Path(place).is_file():
            raise common.Error(f"--predict {place}: no image there")
        files += found or [place]
    items = [(file, 0, "") for file in files]
    logits = common.classify(cfg, clip, items, predictor(dataset), images)
    answers = []
    for file, p in zip(files, F.softmax(logits, dim=-1), strict=True):
        top = p.topk(min(SHOWN, len(p)))
        names = [dataset.classnames[k] for k in top.indices]
        answers.append({"image": file, "classes": names, "probabilities": top.values.tolist()})
        pairs = [f"{n} {v:.1%}" for n, v in zip(names, top.values.tolist(), strict=True)]
        print(json.dumps(answers[-1]) if cfg.json else f"{file}: {', '.join(pairs)}")
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
            words = [clip.tokenize.decoder[k].replace("</w>", "") for k in ids]
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
