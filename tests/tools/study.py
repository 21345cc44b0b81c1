"""UPT's study (Fig. 1 d, e): gains of text and of image prompts, and two variances per data set.

    python upt.py --dataset shapes_steady --side text --epochs 50    # and the other sets and side
    python -m tests.tools.study

The paper's claims: text prompts gain less where image features vary more within a class, image
prompts where text features vary less between classes. Each of two pairs of synthetic data sets
differs in one of these variances, mean squared distances of CLIP's unit features: of test images
from their class's mean, and of class names, in the hand template, from the mean of all of them.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import common
import upt

SETS = "shapes_steady shapes_varied rings_close rings_far".split()
NOT_SHOWN = {*common.NOT_LEARNED, "dataset", "seed"}


@torch.no_grad()
def variances(clip, data):
    """[variance of the test images within classes, of the texts between classes]."""
    images = [common.preprocess(common.decode(item[0]), clip.image_size) for item in data.test]
    f = common.unit_features(clip, common.normalize(clip, images))
    y = torch.tensor([label for _, label, _ in data.test])
    means = torch.stack([f[y == k].mean(0) for k in range(len(data.classnames))])
    w = common.zero_shot_weights(clip, data)[:, 0]
    differences = f - means[y], w - w.mean(0)
    return [d.square().sum(1).mean().item() for d in differences]


def gains(out):
    """{(data set, options): {seed: gain over zero-shot CLIP}} of the runs of upt.py below out."""
    usual, found = vars(upt.Config()), defaultdict(dict)
    for path in Path(out).rglob("results/*.json"):
        row = json.loads(path.read_text("utf-8"))
        config, on = row["config"], row["evaluated_on"]
        if (row["method"], row["classes"], on) == ("upt", "all", config["dataset"]):
            changed = sorted(config.items() - usual.items())
            options = " ".join(f"--{k} {v}" for k, v in changed if k not in NOT_SHOWN)
            found[on, options][config["seed"]] = row["accuracy"] - row["zero_shot"]
    return found


def main(argv=None):
    """Prints the variances, and the gain of the runs over zero-shot CLIP, as Markdown."""
    parser = argparse.ArgumentParser("python -m tests.tools.study", description=main.__doc__)
    parser.add_argument("--out", default="runs", help="folder of the runs [runs]")
    parser.add_argument("--data", default="data", help="folder of the data sets [data]")
    options = parser.parse_args(argv)
    clip = common.load_clip(common.Config(dataset=SETS[0], data=options.data))
    print("| data set | variance of images | variance of texts |\n|---|--:|--:|")
    for name in SETS:
        both = variances(clip, common.load_dataset(name, options.data))
        print("| {} | {:.4f} | {:.4f} |".format(name, *both))
    print("\n| data set | upt.py | runs | gain |\n|---|---|--:|--:|")
    for (name, typed), values in sorted(gains(options.out).items()):
        gain = np.array([*values.values()])
        print(f"| {name} | {typed} | {len(gain)} | {gain.mean():.2f} ± {gain.std():.2f} |")


if __name__ == "__main__":
    common.script(main)
