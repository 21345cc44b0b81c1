"""UPT: one set of prompts, mixed by a small transformer layer, serves both towers of CLIP.

Zang, Li, Zhou, Huang, Loy, "Unified Vision and Language Prompt Learning", 2022
https://arxiv.org/abs/2210.07225      official code: yuhangzang/UPT, commit 3d1640f (2025)

    python upt.py --dataset caltech101 --shots 16
    python upt.py --dataset caltech101 --shots 16 --official

    U    unified prompts  (2M, d_t)     U^   transformed U     (2M, d_t)     M    n_ctx
    V    text context     (1, M, d_t)   P    visual prompts    (M, d)

What the paper describes: text and visual prompts that interact through self-attention over all 2M
rows. What the release computes: nn.MultiheadAttention is given (1, 2M, d_t) without batch_first,
so it sees 2M sequences of length 1, every attention weight is 1, and no row reaches another; and
the layer runs once per tower, with independent dropout. Deviations and choices:
 1. Default: attention over all rows, one pass per step, in the release's layer (the paper, as
    recalled, places the norms differently). --official: no mixing, two passes.
 2. Learnables in fp32; the release casts them to fp16. As there, U starts random: its words "a
    photo of a" only count the rows.
 3. Epochs follow CoOp's table by shots, inferred from the release's config names; its Caltech101
    base-to-new used 10.
 4. --deep, ours: M visual rows for every layer, replaced before each block, after ln_pre.
 5. --side text or visual leaves the other tower as CLIP's (hand template, no visual prompts).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

EPOCHS = {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}  # by number of shots; ImageNet: 50


@dataclass
class Config(common.Config):
    n_ctx: int = 4  # M, prompts per tower
    official: bool = False  # the release: no mixing, two passes with independent dropout
    deep: bool = False  # visual prompts in every layer
    side: Literal["both", "text", "visual"] = "both"  # which tower is prompted
    dropout: float = 0.1  # in the transform


class UnifiedPrompt(nn.Module):
    """S = LN1(U + Drop(MHA(U, U, U)));  U^ = S + Drop(W2 Drop(ReLU(W1 LN2(S)))).
    Text prompts are U^'s first M rows as they are, visual prompts a linear map of the rest."""

    def __init__(self, cfg, d_t, d, layers):
        super().__init__()
        self.n_text = cfg.n_ctx * (cfg.side != "visual")
        n_visual = cfg.n_ctx * (cfg.side != "text") * (layers if cfg.deep else 1)
        self.shape = (n_visual // cfg.n_ctx, cfg.n_ctx, d)  # layers (0 where side is text), M, d
        self.official = cfg.official
        self.prompts = nn.Parameter(0.02 * torch.randn(1, self.n_text + n_visual, d_t))
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
        """Text context (1, M, d_t) and visual prompts (1 or layers, M, d)."""
        U = self.transform()
        rows = self.transform() if self.official else U  # the release runs it again
        P = self.visual(rows[0, self.n_text :])  # rows ordered (M, layers), as in the release
        layers, M, d = self.shape
        return U[:, : self.n_text], P.reshape(M, layers, d).transpose(0, 1)

    def words(self):
        return self()[0][0]

    def visual_rows(self):
        return self()[1].flatten(0, 1)


def train(cfg, clip, data):
    """Learns U and its transform from data.train; returns them and predictor(dataset), which gives
    logits (B, K) of (unit frozen features f (B, D), images). Raises common.Error."""
    torch.manual_seed(cfg.seed)
    if not hasattr(clip.visual, "transformer"):
        raise common.Error(f"--model {cfg.model}: UPT prompts a ViT; try ViT-B-16")
    if not cfg.n_ctx or cfg.dropout >= 1:
        raise common.Error("--n_ctx must be at least 1 and --dropout below 1")
    d_t, d = clip.token_embedding.weight.shape[1], clip.visual.proj.shape[0]
    prompt = UnifiedPrompt(cfg, d_t, d, len(clip.visual.transformer.resblocks))
    prompt.to(clip.logit_scale.device)
    epochs = cfg.epochs or (50 if data.name == "imagenet" else EPOCHS.get(cfg.shots, 200))
    optimizer, scheduler = common.sgd_cosine(prompt.parameters(), cfg.lr, epochs)
    batches = common.loader(cfg, clip, data)
    s = clip.logit_scale.exp()

    def features(images, P):
        """Unit image features (B, D): P joins before ln_pre and stays; deep P_i before block i."""

        def prompts(i, tokens):
            joins = i >= 0 if cfg.deep else i == -1
            return P[max(i, 0)] if joins else None

        x = common.encode_image(clip, images, prompts if len(P) else None)
        return F.normalize(x, dim=-1)

    def weights(names, V, T0):
        """Unit text features (K, D): of the context V, or of the hand template without one."""
        return F.normalize(common.encode_prompts(clip, names, V), dim=-1) if V.shape[1] else T0

    def label_set(dataset):
        names = common.embed_names(clip, dataset.classnames, cfg.n_ctx)
        return names, common.zero_shot_weights(clip, dataset)[:, 0]

    names, T0 = label_set(data)
    for epoch in common.training(cfg, clip, data, prompt, optimizer, scheduler, epochs):
        prompt.train()
        for images, labels in batches(epoch):
            V, P = prompt()
            logits = s * features(images, P) @ weights(names, V, T0).T  # (B, K)
            common.step(F.cross_entropy(logits, labels), optimizer)
        scheduler.step()

    def predictor(dataset):
        with torch.no_grad():
            V, P = prompt.eval()()  # without dropout
            names, T0 = label_set(dataset)
            w = weights(names, V, T0)
        return lambda f, images: s * features(images, P) @ w.T

    return prompt, predictor


def main(cfg):
    """Trains and evaluates the grid of cfg; the last accuracy in percent."""
    return common.run(cfg, train)


if __name__ == "__main__":
    main(common.cli(Config))
