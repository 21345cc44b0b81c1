"""CoOp: learn the context words of the prompt, keep CLIP frozen.

Zhou, Yang, Loy, Liu, "Learning to Prompt for Vision-Language Models", IJCV 2022
https://arxiv.org/abs/2109.01134      official code: github.com/KaiyangZhou/CoOp, commit ff61507

    python coop.py --dataset caltech101 --shots 16
    python coop.py --model ViT-B-16 --init "a photo of a" --classes base --dataset caltech101

    f    unit image feature    (B, D)        V   context vectors   (1 or K, M, d)
    w_i  unit text feature     (K, D)        K   classes           M   n_ctx

Deviations from the official code:
 1. V is kept in fp32 and CLIP may run under autocast; the release updates V in fp16 without loss
    scaling, where steps below 8e-6 are lost.
 2. The views of an epoch are encoded before its steps (the frozen image branch does not depend on
    V): the same numbers in another order. --views N > 0 reuses N epochs of views: not the paper's.
 3. --init with a word of several tokens, or with --csc, is refused; the release misplaces the words
    of the one and ignores --csc in the other.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

EPOCHS = {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}  # by shots, else 200 (COOP.md); ImageNet 50


@dataclass
class Config(common.Config):
    model: str = "RN50"  # the paper's main backbone; shapes has its own
    n_ctx: int = 16  # M, context vectors
    csc: bool = False  # class-specific contexts: one V per class
    position: Literal["end", "middle", "front"] = "end"  # of the class name
    init: str = ""  # words to start V from ("a photo of a"; sets M); "" = N(0, 0.02^2)
    views: int = 0  # epochs of augmented views to encode and reuse; 0 = new views every epoch


class PromptLearner(nn.Module):
    """t_i = [V]_1 ... [V]_M [CLASS]_i with V shared or one per class."""

    def __init__(self, ctx):
        super().__init__()
        self.ctx = nn.Parameter(ctx)  # (1 or K, M, d)

    def words(self):
        return self.ctx.flatten(0, 1)


def initial_context(cfg, clip, K):
    """(1 or K, M, d): the embeddings of cfg.init, or normal noise."""
    if not cfg.init:
        rows, d = K if cfg.csc else 1, clip.token_embedding.weight.shape[1]
        return (0.02 * torch.randn(rows, cfg.n_ctx, d)).to(clip.logit_scale.device)
    ids = clip.tokenize.encode(cfg.init)
    if cfg.csc or len(ids) != len(cfg.init.split()):
        raise common.Error(f"--init {cfg.init!r}: needs one token per word, and no --csc")
    return clip.token_embedding.weight[ids][None].float()


def train(cfg, clip, data):
    """Learns V from data.train; returns it and predictor(dataset), which gives logits(f, x) (B, K)
    of unit image features f (B, D). Raises common.Error for options that cannot be."""
    torch.manual_seed(cfg.seed)
    if cfg.csc and (cfg.transfer or cfg.classes == "base"):
        raise common.Error("--csc serves its own classes: no --transfer, no --classes base")
    prompt = PromptLearner(initial_context(cfg, clip, len(data.classnames)))
    M = prompt.ctx.shape[1]
    epochs = cfg.epochs or (50 if data.name == "imagenet" else EPOCHS.get(cfg.shots, 200))
    optimizer, scheduler = common.sgd_cosine(prompt.parameters(), cfg.lr, epochs)
    batches = common.loader(cfg, clip, data, frozen=True, repeat=cfg.views)
    scale = clip.logit_scale.exp()

    def weights(names):
        rows = torch.arange(len(names.tail), device=names.tail.device)
        group = rows if cfg.csc else None  # class i has context i
        w = common.encode_prompts(clip, names, prompt.ctx, group, cfg.position)
        return F.normalize(w, dim=-1)  # (K, D)

    names = common.embed_names(clip, data.classnames, M)
    for epoch in common.training(cfg, clip, data, prompt, optimizer, scheduler, epochs):
        for f, labels in batches(epoch):
            logits = scale * f @ weights(names).T  # (B, K), cos(f, w_i) / tau
            common.step(F.cross_entropy(logits, labels), optimizer)
        scheduler.step()

    def predictor(dataset):
        if cfg.csc and dataset.classnames != data.classnames:
            raise common.Error(f"--csc contexts belong to their classes, not to {dataset.name}'s")
        with torch.no_grad():
            w = weights(common.embed_names(clip, dataset.classnames, M))
        return lambda f, x: scale * f @ w.T

    return prompt, predictor


def main(cfg):
    """Trains and evaluates the grid of cfg; the last accuracy in percent."""
    return common.run(cfg, train, images=False)


if __name__ == "__main__":
    main(common.cli(Config))
