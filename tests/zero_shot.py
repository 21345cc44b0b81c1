"""Zero-shot CLIP, row 0 of every table: python common.py --dataset caltech101 [--ensemble]."""

from dataclasses import dataclass

import torch.nn.functional as F

import common


@dataclass
class Config(common.Config):
    shots: int = 0  # nothing is trained
    ensemble: bool = False  # mean over CoOp's seven templates and the data set's own


def train(cfg, clip, data):
    """Nothing to learn (CoOp trainers/zsclip.py, ZeroshotCLIP and ZeroshotCLIP2)."""

    def predictor(dataset):
        templates = [dataset.template, *(common.SEVEN if cfg.ensemble else ())]
        w = common.zero_shot_weights(clip, dataset, templates)  # (K, T, D)
        w = F.normalize(w.mean(1), dim=-1)
        return lambda f, x: clip.logit_scale.exp() * f @ w.T

    return None, predictor


def main():
    common.run(common.cli(Config), train, images=False)
