"""CoOp: learn the context words of the prompt, keep CLIP frozen.

    V    context vectors, learned  (1 or K, M, d_t)     K  classes           M  n_ctx
    w_i  unit text feature         (K, D)               g  text encoder      D  joint width
    f    unit image feature        (B, D)               tau  CLIP's temperature, frozen

    (1)  t_i = [V]_1 ... [V]_M [CLASS]_i .                      trainers/coop.py:126-134   Fig. 2
    (2)  or [V]_1 ... [V]_h [CLASS]_i [V]_h+1 ... [V]_M .       trainers/coop.py:136-157
         h = floor(M/2) with --position middle, 0 with front    trainers/coop.py:159-177
    (3)  w_i = g(t_i) / ||g(t_i)||                              trainers/coop.py:198-203
    (4)  f = image feature / ||image feature||                  trainers/coop.py:196,202
    (5)  logits_i = <w_i, f> / tau                              trainers/coop.py:205-206
    (6)  L = mean over the batch of -log softmax(logits)_y      trainers/coop.py:271-274

Equation numbers are ours, line numbers the official code's. g encodes "[SOS] V name. [EOT]" and
returns the feature at [EOT]. Underscores in names become spaces; V gets positional embeddings, as
words do. All classes share one V or, with --csc, each has its own. V is initialised from
N(0, 0.02^2) or from words.

Zhou, Yang, Loy, Liu, "Learning to Prompt for Vision-Language Models", IJCV 130(9), 2022
https://arxiv.org/abs/2109.01134      official code: github.com/KaiyangZhou/CoOp, commit ff61507

    python coop.py --dataset caltech101 --shots 16
    python coop.py --model ViT-B-16 --init "a photo of a" --classes base --dataset caltech101

Result on shapes, 16 shots: 65.83 ± 0.99 % (n = 6; python coop.py --seed SEED), 4 minutes each,
zero-shot 49.35; none on a benchmark yet.

Deviations from the official code:
 1. V is fp32 and CLIP may run under autocast; the official code updates V in fp16 without loss
    scaling, where steps below 8e-6 are lost (trainers/coop.py:66,86-96,250).
 2. If the tokeniser joins a name's final punctuation to the dot ("what?."), front and middle put V
    between the two; the official code puts it after the joint token (99-100).
 3. --init refuses words of several tokens. The official code misplaces them with front and middle;
    with end, it does not learn their surplus tokens (75-79,110). --init with --csc is refused too;
    the official code ignores --csc in that case (72-80).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

EPOCHS = {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}  # by shots, else 200 (COOP.md); ImageNet 50


@dataclass
class Config(common.Config):
    n_ctx: int = 16  # M, context vectors
    csc: bool = False  # class-specific contexts: one V per class
    position: Literal["end", "middle", "front"] = "end"  # where the class name goes in the prompt
    init: str = ""  # words that initialise V ("a photo of a"; sets M); "" = N(0, 0.02^2)

    usual_model: ClassVar[str] = "RN50"


class PromptLearner(nn.Module):
    """V, shared by all classes (unified context) or one per class (class-specific context)."""

    def __init__(self, cfg, clip, K):
        """Raises common.Error for options that contradict each other."""
        super().__init__()
        ctx = 0.02 * torch.randn(K if cfg.csc else 1, cfg.n_ctx, clip.d_t)
        if cfg.init:
            ids = clip.tokenize.encode(cfg.init)
            if cfg.csc or len(ids) != len(cfg.init.split()):
                raise common.Error(f"--init {cfg.init!r} needs one token per word, and no --csc")
            if cfg.n_ctx not in (Config.n_ctx, len(ids)):
                raise common.Error(f"--n_ctx {cfg.n_ctx}: --init sets it to {len(ids)}")
            ctx = clip.token_embedding.weight[ids][None].float()
        self.csc, self.ctx = cfg.csc, nn.Parameter(ctx)  # (1 or K, M, d_t)
        M = ctx.shape[1]
        self.before = {"end": M, "middle": M // 2, "front": 0}[cfg.position]  # Eq. 1, 2
        self.after = M - self.before

    def embed(self, clip, classnames):
        """The Names of classnames, each followed by one "X" per vector in the rest of V, and the
        positions of these words in Names.tail (K, after)."""
        names = common.embed_names(clip, classnames, self.before, "{}" + " X" * self.after + ".")
        dot = names.eot[:, None] - 1
        return names, common.to_device(dot - self.after + torch.arange(self.after), clip.device)

    def forward(self, clip, names, places):
        """w (K, D), the unit text features of the classes that embed() embedded."""
        before, after = self.ctx[:, : self.before], self.ctx[:, self.before :]
        K, _, d_t = names.tail.shape
        if self.after:
            index = places[..., None].expand(-1, -1, d_t)
            tail = names.tail.scatter(1, index, after.expand(K, -1, -1))  # Eq. 2
            names = names._replace(tail=tail)
        each = torch.arange(K, device=clip.device) if self.csc else None
        w = common.encode_prompts(clip, names, before, each)  # Eq. 1
        return F.normalize(w, dim=-1)  # Eq. 3


def learnables(cfg, clip, data):
    """The PromptLearner at its initial value, for the class names of data."""
    torch.manual_seed(cfg.seed)
    return PromptLearner(cfg, clip, len(data.classnames)).to(clip.device)


def train(cfg, clip, data, prompt):
    """Learns V by cross-entropy."""
    epochs = cfg.epochs or (50 if data.name == "imagenet" else EPOCHS.get(cfg.shots, 200))
    optimizer = common.Optimizer(cfg, clip, prompt.parameters(), epochs)
    images = common.Loader(cfg, clip, data)
    names, places = prompt.embed(clip, data.classnames)

    def loss(x, y):
        f = common.unit_features(clip, x)  # Eq. 4, (B, D)
        w = prompt(clip, names, places)  # (K, D)
        logits = clip.scale * f @ w.T  # Eq. 5, (B, K)
        return F.cross_entropy(logits, y)  # Eq. 6

    for epoch in common.resumed(cfg, clip, data, prompt, optimizer):
        for x, y in images.epoch(epoch):
            optimizer.step(loss(x, y))


def classifier(cfg, clip, prompt, data, target):
    """w (K, D) of the class names of target, a common.Dataset; data: the one trained on. Raises
    common.Error."""
    if cfg.csc and target.classnames != data.classnames:
        raise common.Error(f"--csc: no contexts were learned for {target.name}'s classes")
    return prompt(clip, *prompt.embed(clip, target.classnames))


def main(cfg):
    """Trains, evaluates and records; returns the accuracy in percent."""
    data = common.few_shot(cfg)
    clip = common.load_clip(cfg)
    prompt = learnables(cfg, clip, data)
    ours = partial(classifier, cfg, clip, prompt, data)
    common.check_targets(data, ours)
    train(cfg, clip, data, prompt)
    return common.evaluate(cfg, clip, data, ours)


if __name__ == "__main__":
    common.script(lambda: main(common.cli(Config)))
