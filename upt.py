"""UPT: one set of prompts, mixed by a small transformer layer, serves both towers of CLIP.

    S  = LN1(U + Drop(MHA(U, U, U)))                        attention over all 2M rows, one head
    U^ = S + Drop(W2 Drop(ReLU(W1 LN2(S) + b1)) + b2)
    V  = U^[:, :M]                                          text context (Fig. 1 c, U_t)
    P  = U^[0, M:] W_v + b_v                                visual prompts (Fig. 1 c, U_v)
    w_i = n(g([V]_1 ... [V]_M [CLASS]_i .))                 n(x) = x / ||x||, g: text encoder
    v  = n(feature of [CLS ; patches ; P])                  P: no positions, joined before ln_pre,
                                                            kept from block to block
    L  = mean over the batch of CE(s <v, w_i>)              s = 1 / tau, frozen

    U    unified prompts, learned  (1, 2M, d_t)     V    text context    (1, M, d_t)    v    (B, D)
    U^   transformed U             (1, 2M, d_t)     P    visual prompts  (M, d)         w_i  (K, D)
    M    n_ctx      W1, W2  (d_t, d_t)      Drop  p = 0.1, on MHA's weights too; U from N(0, 0.02^2)

Zang, Li, Zhou, Huang, Loy, "Unified Vision and Language Prompt Learning", 2022
https://arxiv.org/abs/2210.07225      official code: yuhangzang/UPT, commit 3d1640f (2025)

    python upt.py --dataset caltech101 --shots 16
    python upt.py --dataset caltech101 --shots 16 --official

Result on shapes, 16 shots: 60.18 ± 2.75 % (n = 3; python upt.py --seed SEED), 6 minutes each,
zero-shot 49.35; none on a benchmark yet.

What the release computes: nn.MultiheadAttention is given (1, 2M, d_t) without batch_first, so it
sees 2M sequences of length 1, every attention weight is 1, and no row reaches another; and the
layer runs once per tower, with independent dropout. Deviations and choices:
 1. Default: attention over all rows, one pass per step, in the release's layer (the paper's text
    was not at hand). --official: no mixing, two passes.
 2. Learnables in fp32; the release casts them to fp16. As there, U starts random: its words "a
    photo of a" only set M = 4.
 3. Epochs follow CoOp's table by shots, inferred from the release's config names; its Caltech101
    base-to-new used 10.
 4. --side text or visual: U has M rows, all for that tower; the other is CLIP's own (the data set's
    hand template, no visual prompts).
 5. The release calls forward_prompt_shallow, which its clip/model.py lacks; we take forward_prompt,
    as the fork pedramyamini2023/UPT does. P behind the patches, not before: no mask tells.
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
    official: bool = False  # the release: no mixing, two passes with independent dropout
    side: Literal["both", "text", "visual"] = "both"  # which tower is prompted
    dropout: float = 0.1  # in the transform


class UnifiedPrompt(nn.Module):  # Fig. 1 c
    """U and its transform (official trainers/unified.py); the equations stand at the top."""

    def __init__(self, cfg, d_t, d):
        """d_t, d: widths of the text and the image tower. Raises common.Error."""
        super().__init__()
        if not cfg.n_ctx or not 0 <= cfg.dropout < 1:
            raise common.Error("--n_ctx must be at least 1, --dropout at least 0 and below 1")
        self.official = cfg.official
        self.n_text = 0 if cfg.side == "visual" else cfg.n_ctx
        n_visual = 0 if cfg.side == "text" else cfg.n_ctx
        self.prompts = nn.Parameter(0.02 * torch.randn(1, self.n_text + n_visual, d_t))  # U
        self.attention = nn.MultiheadAttention(d_t, 1, cfg.dropout, batch_first=not cfg.official)
        self.norm1, self.norm2 = nn.LayerNorm(d_t), nn.LayerNorm(d_t)
        self.linear1, self.linear2 = nn.Linear(d_t, d_t), nn.Linear(d_t, d_t)
        self.visual = nn.Linear(d_t, d)
        self.drop = nn.Dropout(cfg.dropout)

    def transform(self):
        """U^ (1, 2M, d_t)."""
        U = self.prompts
        S = self.norm1(U + self.drop(self.attention(U, U, U, need_weights=False)[0]))
        hidden = self.drop(F.relu(self.linear1(self.norm2(S))))
        return S + self.drop(self.linear2(hidden))

    def forward(self):
        """Text context V (1, M, d_t) and visual prompts P (M, d); of an unprompted tower 0 rows."""
        U = self.transform()
        again = self.transform() if self.official else U  # the release runs it once per tower
        return U[:, : self.n_text], self.visual(again[0, self.n_text :])


def image_features(clip, x, P):
    """v (B, D) of images x; P joins before ln_pre and stays."""

    def prompts(i, tokens):
        return P if i == -1 else None

    return F.normalize(common.encode_image(clip, x, prompts if len(P) else None), dim=-1)


def text_features(clip, names, V, T0):
    """w (K, D) of the context V, or of the hand template T0 where V has no rows."""
    return F.normalize(common.encode_prompts(clip, names, V), dim=-1) if V.shape[1] else T0


def train(cfg, clip, data, prompt):
    """Learns U and its transform by cross-entropy."""
    epochs = cfg.epochs or (50 if data.name == "imagenet" else EPOCHS.get(cfg.shots, 200))
    optimizer = common.Optimizer(cfg, clip, prompt.parameters(), epochs)
    images = common.Loader(cfg, clip, data)
    names = common.embed_names(clip, data.classnames, cfg.n_ctx)
    T0 = common.zero_shot_weights(clip, data)[:, 0]
    prompt.train()
    for epoch in common.resumed(cfg, clip, data, prompt, optimizer):
        for x, y in images.epoch(epoch):
            V, P = prompt()
            v = image_features(clip, x, P)  # (B, D)
            w = text_features(clip, names, V, T0)  # (K, D)
            optimizer.step(F.cross_entropy(clip.scale * v @ w.T, y))


def classifier(cfg, clip, prompt, target):
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
    torch.manual_seed(cfg.seed)
    d_t, d = clip.token_embedding.weight.shape[1], clip.blocks()[0].ln_1.weight.numel()
    prompt = UnifiedPrompt(cfg, d_t, d).to(clip.device)
    train(cfg, clip, data, prompt)
    return common.evaluate(cfg, clip, data, partial(classifier, cfg, clip, prompt))


if __name__ == "__main__":
    common.script(lambda: main(common.cli(Config)))
