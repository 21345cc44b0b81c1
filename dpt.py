"""DPT: prompts in both towers, the last visual ones made for the classes the image may show.

    V    text context, learned     (1, M, d_t)     K    classes   k    top_k, at most K   M  n_ctx
    P_l  visual prompts, learned   (P, d_v)        X    image tokens (B, 1+N, d_v)   R  ctx rows
    T    text prompt features      (K, D)          T0   hand template's, unit        (K, D)
    v    prompted image feature    (B, D)          z    frozen image feature, unit   (B, D)
    ctx  learned rows among CAVPT's keys, (R, d_v) for all images       B, N, D, d_t, d_v: common.py
    g  text encoder     s  1 / tau, frozen     n(x) = x / ||x||     sg  detached (no gradient)

Text side, and the "Zero-Shot CLIP Selector" of Fig. 2 (lines of trainers/DPT.py):

    (1)  T_i = g([V]_1 ... [V]_M [CLASS]_i .)                              157-170,545-547   Fig. 2
    (2)  w = n(T)                                                          549
    (3)  T0_i = n(g(hand template of class i))                             504-518
    (4)  z = n(image feature of frozen CLIP)                               534-536
    (5)  top = the k classes i with the largest <z, T0_i>                  538-541           Fig. 2

Image side; (7) to (13) are CAVPT. The last --cavpt_layers blocks (1 by default) are class-aware,
each with its own ctx, W, b and LN; every block before them has its own P_l:

    (6)  X = Block_l([X ; P_l]), the P_l rows dropped; P_0 after ln_pre    431-445,484-489   Fig. 2
    (7)  G = T[top]                                   (B, k, D)            551
    (8)  H = G W_m + b_m                              (B, k, d_v)          393
    (9)  S = [sg(X) ; ctx]                            (B, 1+N+R, d_v)      389,394
    (10) A = softmax(H W_q (S W_k)^T / sqrt(32))      (B, k, 1+N+R)        342-348
         over the 1+N+R tokens
    (11) O = A S W_v                                  (B, k, d_v)          349-350
    (12) layer logits = LN_a(O) W_c                   (B, k, K)            398-401
    (13) Q = LN_b(O + H)                              (B, k, d_v)          396,402           Fig. 3
    (14) X = Block_l([X ; Q]), the Q rows dropped                          447-463           Fig. 2
    (15) v = n(image feature so prompted)                                  490-496,552

Loss; (17) in the first `guidance` epochs, (18) in the later ones:

    (16) L_ca = mean over layers, and over those images with y in top, of
                CE(layer logits of y's row, y); 0 if there is no such image        665-685
    (17) L = CE(s <z, w>, y) + CE(s <v, T0>, y) + beta CE(s <v, w>, y) + alpha L_ca
                                                                           553-558,660-661,685
    (18) L = CE(s <v, w>, y) + alpha L_ca                                  553-554,662-663,685

Equation numbers are ours. W_q and W_k are (d_v, 32), one head; they, W_v and W_c have no bias.
Prompts are built as in coop.py. The prediction is s <v, w> and does not use W_c; for other
class names, T, T0 and top are recomputed. V, P_l and ctx are initialised from N(0, 0.02^2).

Xing, Wu, Cheng, Zhang, Liang, Wang, Zhang, "Dual Modality Prompt Tuning for Vision-Language
Pre-Trained Model", IEEE Transactions on Multimedia 2023, doi 10.1109/TMM.2023.3291588
https://arxiv.org/abs/2208.08340      official code: github.com/fanrena/DPT, commit 11fef90

    python dpt.py --dataset caltech101 --shots 16
    python -m tests.tools.predict RUN photo.jpg --attention map.png     # where CAVPT looks

Result on shapes, 16 shots: 68.59 ± 1.31 % (n = 15; python dpt.py --seed SEED), 4 to 7 minutes each,
zero-shot 49.35; none on a benchmark yet.

Limit cases: --cavpt_layers 0 is the official VLP (VPT-deep + CoOp + guidance; trainers/VLP.py);
adding --n_ctx 0 (T = T0, no V) --guidance 0 gives VPT-deep (plain cross-entropy).
Deviations from the official code, and its quirks that we keep:
 1. CAVPT is fp32 and the full loss works in every precision; the official code is fp16 only
    (374-376,428,647-654).
 2. If no image's true class is selected, (16) is 0. The official code skips the term (684), so
    LN_a and W_c get no gradient; ours get a zero one, so weight decay and momentum still act.
 3. Kept: the query T is neither normalised nor detached (547,551), the key X is detached (389); a
    class-aware layer has no ordinary prompts among its tokens (451-461), as in Fig. 2
    (--visual_prompts_in_cavpt: [X ; P_l ; Q]). --cavpt_ctx sets the number of ctx
    rows, 10 there (384); Fig. 2 shows them as that layer's visual prompts.
 4. alpha is .3 as in train_single.sh:46, not 1 as in train.py:133; beta is .1 (661). ImageNet's 20
    epochs are unverified.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

EPOCHS = {1: 60}  # by shots, else 100; ImageNet 20


@dataclass
class Config(common.Config):
    n_ctx: int = 16  # M, text context vectors; 0 = the hand template
    n_visual: int = 10  # P, visual prompts per layer
    cavpt_layers: int = 1  # number of last layers with class-aware prompts
    cavpt_ctx: int = 10  # R, learned rows among CAVPT's keys
    top_k: int = 10  # k, classes for which CAVPT makes prompts (at most K)
    visual_prompts_in_cavpt: bool = False  # ordinary prompts in the class-aware layers too
    guidance: int = 30  # number of initial epochs guided by frozen CLIP
    alpha: float = 0.3  # weight of the CAVPT loss
    beta: float = 0.1  # weight of the joint loss during guidance
    visual_lr: float = 1e-2  # initial learning rate of visual prompts and CAVPT
    visual_warmup: int = 0  # visual warm-up epochs (rate 1e-5); 0 = official: 10, ImageNet 1

    usual_model: ClassVar[str] = "ViT-B-32"


class ClassAware(nn.Module):  # Fig. 3
    """CAVPT of one layer: prompts for the top classes from their text features and the image
    tokens (official trainers/DPT.py, class CAVPT)."""

    def __init__(self, D, d_v, K, n_ctx, inner=32):
        super().__init__()
        self.meta = nn.Linear(D, d_v)
        self.query, self.key = nn.Linear(d_v, inner, bias=False), nn.Linear(d_v, inner, bias=False)
        self.value = nn.Linear(d_v, d_v, bias=False)
        self.norm_a, self.norm_b = nn.LayerNorm(d_v), nn.LayerNorm(d_v)
        self.classify = nn.Linear(d_v, K, bias=False)
        self.ctx = nn.Parameter(0.02 * torch.randn(n_ctx, d_v))

    def forward(self, G, X):
        """Q (B, k, d_v), layer logits (B, k, K) and A (B, k, 1+N+R) of G (B, k, D) and X."""
        H = self.meta(G)  # Eq. 8
        S = torch.cat([X.detach(), self.ctx.expand(len(X), -1, -1)], 1)  # Eq. 9
        A = self.query(H) @ self.key(S).transpose(1, 2) / math.sqrt(self.key.out_features)
        A = A.softmax(-1)  # Eq. 10
        O = self.value(A @ S)  # Eq. 11
        logits = self.classify(self.norm_a(O))  # Eq. 12
        return self.norm_b(O + H), logits, A  # Eq. 13


class DualPrompt(nn.Module):
    """The learnables: text context V, visual prompts P_l, and a CAVPT per class-aware layer."""

    def __init__(self, cfg, clip, K):
        """Raises common.Error for invalid options."""
        super().__init__()
        L, last = len(clip.blocks()), cfg.cavpt_layers
        if last > L or last and 0 in (cfg.n_ctx, cfg.top_k):
            needs = f"must be at most {L} and needs --n_ctx > 0 and --top_k > 0"
            raise common.Error(f"--cavpt_layers {last}: {needs}")
        plain = L if cfg.visual_prompts_in_cavpt else L - last
        self.ctx = nn.Parameter(0.02 * torch.randn(1, cfg.n_ctx, clip.d_t))
        self.visual = nn.Parameter(0.02 * torch.randn(plain, cfg.n_visual, clip.d_v))
        aware = [ClassAware(clip.D, clip.d_v, K, cfg.cavpt_ctx) for _ in range(last)]
        self.cavpt = nn.ModuleList(aware)

    def text(self, clip, names, T0):
        """T (K, D), not normalised; without a context the hand template's T0."""
        return common.encode_prompts(clip, names, self.ctx) if len(self.ctx[0]) else T0  # Eq. 1


def selected(cfg, z, T0):
    """top (B, k): the classes that frozen CLIP finds most likely."""
    return (z @ T0.T).topk(min(cfg.top_k, len(T0))).indices  # Eq. 5


def encode(clip, prompt, images, T, top):  # Fig. 2
    """v (B, D), and two lists: the logits (B, k, K) and A of each class-aware layer. T (K, D):
    text prompt features, not normalised; top (B, k): the selected classes."""
    first = len(clip.blocks()) - len(prompt.cavpt)  # first class-aware layer
    plain = prompt.visual.unbind()  # unbind once: indexing per layer costs two kernels in backward
    layer_logits, maps = [], []

    def prompts(l, X):
        if l < 0:
            return None
        if l < first:
            return plain[l]  # Eq. 6
        G = F.embedding(top, T)  # Eq. 7; embedding sums gradients of repeated rows in fixed order
        Q, logits, A = prompt.cavpt[l - first](G, X)
        layer_logits.append(logits)
        maps.append(A)
        if l < len(plain):  # --visual_prompts_in_cavpt
            Q = torch.cat([plain[l].expand(len(X), -1, -1), Q], 1)
        return Q  # Eq. 14

    v = F.normalize(common.encode_image(clip, images, prompts), dim=-1)  # Eq. 15
    return v, layer_logits, maps


def cavpt_loss(layer_logits, top, labels):
    """L_ca: cross-entropy of the true class's own prompt, averaged over layers and over images
    with y in top; 0 if there are none. layer_logits: [(B, k, K)], top (B, k), labels y (B,)."""
    true = top == labels[:, None]  # (B, k), at most one per image
    y = labels[:, None].expand_as(top)
    total = 0
    for logits in layer_logits:
        rows = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")  # (B, k)
        total = total + torch.where(true, rows, 0).sum() / true.sum().clamp(min=1)
    return total / max(1, len(layer_logits))  # Eq. 16


def learnables(cfg, clip, data):
    """The DualPrompt at its initial value, for the class names of data."""
    torch.manual_seed(cfg.seed)
    return DualPrompt(cfg, clip, len(data.classnames)).to(clip.device)


def optimizer_of(cfg, clip, data, prompt):
    """The Optimizer: text context and image branch have rates and warm-ups of their own."""
    epochs, warmup = (20, 1) if data.name == "imagenet" else (EPOCHS.get(cfg.shots, 100), 10)
    image_branch = {"params": [prompt.visual, *prompt.cavpt.parameters()]}
    image_branch |= {"lr": cfg.visual_lr, "warmup": cfg.visual_warmup or warmup}
    groups = [{"params": [prompt.ctx]}, image_branch]
    return common.Optimizer(cfg, clip, groups, cfg.epochs or epochs)


def train(cfg, clip, data, prompt):
    """Learns V, P_l and CAVPT, guided by frozen CLIP at first."""
    optimizer = optimizer_of(cfg, clip, data, prompt)
    images = common.Loader(cfg, clip, data)
    names = common.embed_names(clip, data.classnames, cfg.n_ctx)
    T0 = common.zero_shot_weights(clip, data)[:, 0]  # Eq. 3
    s, missed = clip.scale, 0

    def loss(x, y, z, top, guided):
        T = prompt.text(clip, names, T0)  # (K, D)
        w = F.normalize(T, dim=-1)  # Eq. 2
        v, layer_logits, _ = encode(clip, prompt, x, T, top)
        joint = F.cross_entropy(s * v @ w.T, y)
        L_ca = cavpt_loss(layer_logits, top, y)
        if guided:  # each branch against the frozen features of the other
            text_only = F.cross_entropy(s * z @ w.T, y)
            image_only = F.cross_entropy(s * v @ T0.T, y)
            return text_only + image_only + cfg.beta * joint + cfg.alpha * L_ca  # Eq. 17
        return joint + cfg.alpha * L_ca  # Eq. 18

    for epoch in common.resumed(cfg, clip, data, prompt, optimizer):
        for x, y in images.epoch(epoch):
            z = common.unit_features(clip, x)  # Eq. 4, (B, D)
            top = selected(cfg, z, T0)  # (B, k)
            missed = missed + ~(top == y[:, None]).any()
            optimizer.step(loss(x, y, z, top, epoch < cfg.guidance))
    if missed and cfg.cavpt_layers:
        print(
            f"in {missed} steps no image had its true class among the top {cfg.top_k}: L_ca was 0"
        )


def classifier(cfg, clip, prompt, data, target):
    """logits(x, z) (B, K) for the class names of target, a common.Dataset."""
    T0 = common.zero_shot_weights(clip, target)[:, 0]
    T = prompt.text(clip, common.embed_names(clip, target.classnames, cfg.n_ctx), T0)

    def logits(x, z):
        v, _, _ = encode(clip, prompt, x, T, selected(cfg, z, T0))
        return clip.scale * v @ F.normalize(T, dim=-1).T

    return logits


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
