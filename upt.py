"""UPT: one set of prompts, mixed by a small transformer layer, serves both towers of CLIP.

    U    unified prompts, learned  (1, 2M, d_t)     V    text context      (1, M, d_t)    M  n_ctx
    U^   transformed U             (1, 2M, d_t)     P    visual prompts    (M, d_v)       K  classes
    w_i  unit text feature         (K, D)           v    unit image feature (B, D)        s  1 / tau
    Drop  dropout, p = 0.1, also on MHA's weights        n(x) = x / ||x||     g  text encoder

    (1)  S = LN1(U + Drop(MHA(U, U, U)))                        trainers/unified.py:121-123
    (2)  U^ = S + Drop(W_2 Drop(ReLU(W_1 LN2(S) + b_1)) + b_2)  trainers/unified.py:124-126
    (3)  V = U^[:, :M]                                          trainers/unified.py:127    Fig. 1 c
    (4)  P = U^[0, M:] W_v + b_v                                trainers/unified.py:137    Fig. 1 c
    (5)  w_i = n(g([V]_1 ... [V]_M [CLASS]_i .))                trainers/unified.py:147-155,225-232
    (6)  v = n(feature of [CLS ; patches ; P])                  clip/model.py:258-283
    (7)  L = mean over the batch of CE(s <v, w_i>, y)           trainers/unified.py:234-235,299-301

Equation numbers are ours, line numbers the official code's. MHA is nn.MultiheadAttention (biases,
output projection) with one head, over all 2M rows; W_1, W_2 (d_t, d_t); U is initialised from
N(0, 0.02^2). Prompts are built as in coop.py. P gets no positional embedding, joins before ln_pre,
and stays from block to block; v is the class token's feature. There is no dropout at test time.

Zang, Li, Zhou, Huang, Loy, "Unified Vision and Language Prompt Learning", 2022
https://arxiv.org/abs/2210.07225      official code: yuhangzang/UPT, commit 3d1640f (2025), which is
found in the history of the fork pedramyamini2023/UPT

    python upt.py --dataset caltech101 --shots 16
    python upt.py --dataset caltech101 --shots 16 --official

Result on shapes, 16 shots: 58.06 ± 2.96 % (n = 6; python upt.py --seed SEED), zero-shot 49.35;
none on a benchmark yet.

What the official code computes: nn.MultiheadAttention gets (1, 2M, d_t) without batch_first, so it
sees 2M sequences of length 1, every attention weight is 1, and no row reaches another
(trainers/unified.py:83,92-94,121,131); and the layer runs once per tower, with independent dropout
(119-137). Deviations and choices:
 1. Default: attention over all rows, one pass per step, in the official layer (we had no access to
    the paper's full text). --official: no mixing, two passes. The second pass only changes which
    random numbers are drawn: rows do not interact, and no two share a dropout mask.
 2. Learnables are fp32; the official code casts them to fp16 (83-86,95-117). As in that code, U is
    random: the words "a photo of a" only set M = 4 (36,40,58).
 3. Epochs by shots follow CoOp's table, as the names of the official configs suggest. For base to
    new, the official code has 10 on Caltech101 (scripts/unified/base2new_train_caltech-101.sh:11).
 4. --side text or visual: U has M rows, all for that tower; the other tower is CLIP's own (hand
    template, no visual prompts).
 5. The official code calls forward_prompt_shallow (222), which its clip/model.py lacks; we take
    forward_prompt, as the fork does. P follows the patches instead of preceding them; without mask
    or positions the order does not matter.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

EPOCHS = {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}  # by shots, else 200; ImageNet 50


@dataclass
class Config(common.Config):
    n_ctx: int = 4  # M, prompts per tower
    official: bool = False  # follow the official code: no mixing, two passes, independent dropout
    side: Literal["both", "text", "visual"] = "both"  # which tower is prompted
    dropout: float = 0.1  # dropout probability in the transform


class UnifiedPrompt(nn.Module):  # Fig. 1 c
    """U and its transform (official trainers/unified.py)."""

    def __init__(self, cfg, clip):
        """Raises common.Error for invalid options."""
        super().__init__()
        if not cfg.n_ctx or not 0 <= cfg.dropout < 1:
            raise common.Error("--n_ctx must be at least 1, --dropout at least 0 and below 1")
        clip.blocks()  # raises for a ResNet
        d_t, d_v = clip.d_t, clip.d_v
        self.official = cfg.official
        self.n_text = 0 if cfg.side == "visual" else cfg.n_ctx
        n_visual = 0 if cfg.side == "text" else cfg.n_ctx
        self.prompts = nn.Parameter(0.02 * torch.randn(1, self.n_text + n_visual, d_t))  # U
        self.attention = nn.MultiheadAttention(d_t, 1, cfg.dropout, batch_first=not cfg.official)
        self.norm1, self.norm2 = nn.LayerNorm(d_t), nn.LayerNorm(d_t)
        self.linear1, self.linear2 = nn.Linear(d_t, d_t), nn.Linear(d_t, d_t)
        self.visual = nn.Linear(d_t, d_v)
        self.drop = nn.Dropout(cfg.dropout)

    def transform(self):
        """U^ (1, 2M, d_t)."""
        U = self.prompts
        mixed, _ = self.attention(U, U, U, need_weights=False)
        S = self.norm1(U + self.drop(mixed))  # Eq. 1
        hidden = self.drop(F.relu(self.linear1(self.norm2(S))))
        return S + self.drop(self.linear2(hidden))  # Eq. 2

    def forward(self):
        """V (1, M, d_t) and P (M, d_v); no rows for a tower without prompts."""
        U = self.transform()
        again = self.transform() if self.official else U  # one pass per tower
        V = U[:, : self.n_text]  # Eq. 3
        P = self.visual(again[0, self.n_text :])  # Eq. 4
        return V, P


def text_features(clip, names, V, T0):
    """w (K, D) of the context V, or the hand template's T0 if V has no rows."""
    return F.normalize(common.encode_prompts(clip, names, V), dim=-1) if len(V[0]) else T0  # Eq. 5


def image_features(clip, x, P):
    """v (B, D) of images x; P joins before ln_pre and stays."""

    def prompts(i, X):
        return P if i == -1 else None

    v = common.encode_image(clip, x, prompts if len(P) else None)
    return F.normalize(v, dim=-1)  # Eq. 6


def learnables(cfg, clip, data):
    """The UnifiedPrompt at its initial value."""
    torch.manual_seed(cfg.seed)
    return UnifiedPrompt(cfg, clip).to(clip.device)


def train(cfg, clip, data, prompt):
    """Learns U and its transform by cross-entropy."""
    epochs = cfg.epochs or (50 if data.name == "imagenet" else EPOCHS.get(cfg.shots, 200))
    optimizer = common.Optimizer(cfg, clip, prompt.parameters(), epochs)
    images = common.Loader(cfg, clip, data)
    names = common.embed_names(clip, data.classnames, cfg.n_ctx)
    T0 = common.zero_shot_weights(clip, data)[:, 0]  # (K, D)
    prompt.train()

    def loss(x, y):
        V, P = prompt()
        v = image_features(clip, x, P)  # (B, D)
        w = text_features(clip, names, V, T0)  # (K, D)
        return F.cross_entropy(clip.scale * v @ w.T, y)  # Eq. 7

    for epoch in common.resumed(cfg, clip, data, prompt, optimizer):
        for x, y in images.epoch(epoch):
            optimizer.step(loss(x, y))


def classifier(cfg, clip, prompt, data, target):
    """logits(x, f) (B, K) for the class names of target, a common.Dataset."""
    prompt.eval()  # without dropout
    V, P = prompt()
    T0 = common.zero_shot_weights(clip, target)[:, 0]
    w = text_features(clip, common.embed_names(clip, target.classnames, cfg.n_ctx), V, T0)
    return lambda x, f: clip.scale * image_features(clip, x, P) @ w.T


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
