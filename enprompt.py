"""EnPrompt, A RECONSTRUCTION: an external layer on frozen text features, fused visual prompts, OT.

Cui, Yang, Wu, Xiao, Tian, "Advancing Prompt Learning through an External Layer", ACM MM 2024,
https://arxiv.org/abs/2407.19674. No code was released and the paper's equations were not at hand.
Public is the caption of Figure 2: "Our method freezes the textual embeddings and learn an External
Layer (EnLa) on top of it. Optimal transport is introduced to align [...] visual and textual
modalities apart from the conventional cross entropy (CE) loss. The textual and visual encoders are
connected through a strengthening feature. This feature and the learnable visual prompt are fused
and utilized for deep prompting of the visual encoder." All else is ours, and no result is claimed:

    python enprompt.py --dataset caltech101 --shots 16 [--batch_size 32]

 1. e_kn (K, N, D): frozen unit features of N = 8 templates (the data set's and CoOp's seven),
    because with one template the transport plan is uniform and its term empty.
 2. EnLa: w_kn = n(e + W e + b), w_k = n(mean_n w_kn); shared by all classes, so that it acts on
    new ones; residual and zero at first, so that training starts at zero-shot CLIP.
 3. Strengthening feature s = n(mean_k w_k) of the training classes, kept for other label sets,
    because the visual branch was trained with it (--strengthening target: each set's own).
 4. P~_i = P_i + F_i s (M, d): a sum, the simplest fusion. P~_0 joins before ln_pre, P~_i replaces
    it before block i, and after the last they stay.
 5. L = CE + lambda L_OT, transport between patches and the true class's templates with the plan
    detached (--ot all: cross-entropy over every class's transport distance instead).
 6. ImageNet, the source of transfer: 3 layers, 5 epochs. Base-to-new: 20 epochs. Else 9 and 50.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import common


@dataclass
class Config(common.Config):
    lr: float = 2.5e-3  # of SGD, cosine
    batch_size: int = 4  # images per step
    enla: bool = True  # learn the external layer
    n_visual: int = 4  # M, visual prompts per layer
    depth: int = 9  # J, layers with prompts of their own (ImageNet: 3)
    strengthening: Literal["train", "target", "none"] = "train"  # classes that s is the mean of
    ot: Literal["true", "all", "none"] = "true"  # transport to the true class, to all, or none
    ot_weight: float = 1.0  # lambda
    epsilon: float = 0.1  # entropic regularisation of the transport
    iterations: int = 100  # of Sinkhorn at most
    tolerance: float = 1e-4  # Sinkhorn stops when the marginals are off by less (sum over rows)


class ExternalLayer(nn.Module):
    """The learnables: EnLa's W and b, visual prompts P_0 ... P_J-1 and their fusion maps F_i."""

    def __init__(self, cfg, D, d, depth):
        super().__init__()
        self.enla = nn.Linear(D, D).requires_grad_(cfg.enla)
        nn.init.zeros_(self.enla.weight)
        nn.init.zeros_(self.enla.bias)
        self.visual = nn.Parameter(0.02 * torch.randn(depth, cfg.n_visual, d))
        fused = cfg.strengthening != "none"
        self.fuse = nn.ModuleList(nn.Linear(D, d, bias=False) for _ in range(depth if fused else 0))

    def forward(self, e):
        """Frozen e (K, N, D) -> adapted w_kn (K, N, D) and classifier w_k (K, D), both unit."""
        w = F.normalize(e + self.enla(e), dim=-1)
        return w, F.normalize(w.mean(1), dim=-1)

    def prompts(self, s):
        """P~ (J, M, d): visual prompts, each layer's shifted by its map of s (D,)."""
        shift = [F_i(s) for F_i in self.fuse]
        return self.visual + torch.stack(shift)[:, None] if shift else self.visual

    def visual_rows(self):
        return self.visual.flatten(0, 1)


def sinkhorn(C, epsilon, iterations, tolerance=0.0):
    """Entropic transport plan (..., m, n) of cost C (..., m, n) between uniform marginals.
    In the log domain and fp32, where exp(-C / epsilon) would underflow (Cuturi 2013; Peyre and
    Cuturi 2019, Sec. 4.4). Stops early when the row sums are within tolerance of 1/m (summed)."""
    C = C.detach().float()
    m, n = C.shape[-2:]
    A = -C / epsilon
    u, v = torch.zeros_like(C[..., :1]), torch.zeros_like(C[..., :1, :])
    for _ in range(iterations):
        u = -torch.logsumexp(A + v, -1, keepdim=True) - torch.log(C.new_tensor(m))
        v = -torch.logsumexp(A + u, -2, keepdim=True) - torch.log(C.new_tensor(n))
        if tolerance and ((A + u + v).exp().sum(-1) - 1 / m).abs().sum(-1).max() < tolerance:
            break
    return (A + u + v).exp()


def transport(patches, w, cfg):
    """Distance <T, C> (B, K) of patches (B, L, D) to templates w (B or 1, K, N, D); T is fixed."""
    C = 1 - patches[:, None] @ w.transpose(-1, -2)  # (B, K, L, N)
    T = sinkhorn(C, cfg.epsilon, cfg.iterations, cfg.tolerance)
    return (T * C).sum((-1, -2))


def train(cfg, clip, data):
    """Learns EnLa and the prompts from data.train; returns them and predictor(dataset), which gives
    logits (B, K) of (unit frozen features f (B, D), images). Raises common.Error."""
    torch.manual_seed(cfg.seed)
    if not hasattr(clip.visual, "transformer"):
        raise common.Error(f"--model {cfg.model}: EnPrompt prompts a ViT; try ViT-B-16")
    d, D = clip.visual.proj.shape
    if not cfg.depth or not cfg.epsilon:
        raise common.Error(
            "--depth and --epsilon must be above 0; --n_visual 0 removes the prompts"
        )
    source = data.name == "imagenet" and cfg.classes == "all"  # of transfer
    depth = min(3 if source else cfg.depth, len(clip.visual.transformer.resblocks))
    prompt = ExternalLayer(cfg, D, d, depth).to(clip.logit_scale.device)
    epochs = cfg.epochs or (5 if source else 20 if cfg.classes == "base" else 50)
    learned = [p for p in prompt.parameters() if p.requires_grad]
    optimizer, scheduler = common.sgd_cosine(learned, cfg.lr, epochs)
    batches = common.loader(cfg, clip, data)
    scale = clip.logit_scale.exp()

    def templates(dataset):
        """e (K, N, D), frozen: computed once per label set."""
        return common.zero_shot_weights(clip, dataset, [dataset.template, *common.SEVEN])

    def features(images, w_k, patches=False):
        """Unit features (B, D) and patches (B, L, D); s is the mean of the classifiers w_k."""
        P = prompt.prompts(F.normalize(w_k.mean(0), dim=-1))  # (J, M, d)

        def rows(i, tokens):
            return P[max(i, 0)] if i != 0 and i < depth else None  # -1: P_0; 0: it stays; P_i

        if not patches:
            return F.normalize(common.encode_image(clip, images, rows), dim=-1), None
        g, l = common.encode_image(clip, images, rows, patches)
        return F.normalize(g, dim=-1), F.normalize(l, dim=-1)

    e = templates(data)
    for epoch in common.training(cfg, clip, data, prompt, optimizer, scheduler, epochs):
        for images, y in batches(epoch):
            w, w_k = prompt(e)  # (K, N, D), (K, D)
            g, l = features(images, w_k, cfg.ot != "none")
            loss = F.cross_entropy(scale * g @ w_k.T, y)
            if cfg.ot == "true":
                loss = loss + cfg.ot_weight * transport(l, w[y][:, None], cfg).mean()
            elif cfg.ot == "all":
                near = scale * (1 - transport(l, w[None], cfg))  # (B, K)
                loss = loss + cfg.ot_weight * F.cross_entropy(near, y)
            common.step(loss, optimizer)
        scheduler.step()

    def predictor(dataset):
        with torch.no_grad():
            w_k = prompt(templates(dataset))[1]
            kept = prompt(e)[1] if cfg.strengthening == "train" else w_k
        return lambda f, images: scale * features(images, kept)[0] @ w_k.T

    return prompt, predictor


def main(cfg):
    """Trains and evaluates the grid of cfg; the last accuracy in percent."""
    return common.run(cfg, train)


if __name__ == "__main__":
    main(common.cli(Config))
