"""Published numbers, each with its source, for the report to print beside our runs.

Only what a paper's text or an official figure prints as digits; nothing read off a plot's axis but
FIGURE_1, and nothing recalled. Of UPT and EnPrompt no comparable number was found.
"""

import re
from typing import NamedTuple

LOGOPROMPT = "LoGoPrompt (ICCV 2023, https://arxiv.org/abs/2309.01155), "

SOURCES = {
    "L1": LOGOPROMPT + "Table 1, as text; of DPT their own run",
    "L2": LOGOPROMPT + "Table 2, as text",
    "L3": LOGOPROMPT + "Table 3, as text; of DPT their own run",
    "R": "the mean over the four targets, as RMAdapter and others print it (LoGoPrompt's own mean, "
    "61.72, counts ImageNet too)",
    "E": "the same digits in the texts of eight papers, ProText (arXiv 2401.02418) among them (one "
    "prints DTD as 41.90)",
    "F": "official figure of results, kding1225/softcpt, figure/results.png; std over seeds",
}

# Names in the papers -> our labels
LABELS = {
    "CoOp": "coop",
    "DPT": "dpt",
    "SoftCPT-NATA": "softcpt",
    "SoftCPT-NATS": "softcpt task_context=specific",
    "CoOp-MT": "softcpt baseline=one context",
    "CoOp-CA": "softcpt baseline=one per task",
}
# In base-to-new and transfer, CoCoOp's protocols, CoOp has four vectors that start from words
FROM_WORDS = " init=a photo of a"

# Options with which a run is set beside the same numbers, because the papers leave them open
ALSO = " official=True", " task_n_ctx=8"

# Means that are published, and what they are over
MEANS = {
    "ten data sets": "caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft "
    "sun397 dtd eurosat ucf101",
    "four variants": "imagenetv2 imagenet_sketch imagenet_a imagenet_r",
}
MEANS["average"] = "imagenet " + MEANS["ten data sets"]


class Published(NamedTuple):
    """One published accuracy in percent; std None where it is not known."""

    method: str
    backbone: str
    shots: int
    protocol: str
    dataset: str
    value: float
    std: float | None
    source: str


def published():
    """The rows of TABLE."""
    rows = []
    for line in TABLE.strip().splitlines():
        method, backbone, shots, protocol, dataset, value, std, source = re.split(" {2,}", line)
        deviation = None if std == "-" else float(std)
        number = float(value), deviation, source
        rows.append(Published(method, backbone, int(shots), protocol, dataset, *number))
    return rows


def same(row, label):
    """Whether a run with our label is of a published row's method and options."""
    for option in ALSO:
        label = label.replace(option, "")
    from_words = row.method == "CoOp" and row.protocol != "few-shot"
    return label == LABELS[row.method] + (FROM_WORDS if from_words else "")


# UPT, Fig. 1 (d, e), read off the plot (within 0.2 points): its caption names neither shots nor
# backbone. Gain over zero-shot CLIP of text prompts, at the intra-class variance; of visual
# prompts, at the inter-class variance. Of oxford_pets and stanford_cars the visual gains may be
# exchanged: their labels overlap
FIGURE_1 = """
oxford_flowers   8.8  .204   0.7  .113
sun397           6.3  .216   4.2  .177
dtd              5.0  .242   1.0  .187
ucf101           4.6  .206   4.3  .155
imagenet         2.4  .218   1.5  .154
fgvc_aircraft    2.2  .186   3.1  .136
oxford_pets      2.0  .243   1.3  .115
stanford_cars    1.8  .199   1.4  .107
eurosat          1.0  .217   9.4  .146
caltech101      -0.8  .222   0.1  .147
food101         -3.3  .241  -1.8  .140
"""


def figure_1(side):
    """Points (variance, gain) of the paper's figure, side "text" or "visual"."""
    points = []
    for line in FIGURE_1.strip().splitlines():
        _, text, intra, visual, inter = line.split()
        point = (intra, text) if side == "text" else (inter, visual)
        points.append((float(point[0]), float(point[1])))
    return points


# Protocols: few-shot, all classes; base, new and H, their harmonic mean, after training on the base
# classes; from imagenet: trained there, evaluated on the data set; suite: SoftCPT's mean over
# tasks. Left out: DPT's H on oxford_flowers, which does not follow from its halves, and the
# mean of H that contains it
TABLE = """
CoOp          RN50      16  few-shot       imagenet         62.95  -     L2
CoOp          RN50      16  few-shot       caltech101       91.83  -     L2
CoOp          RN50      16  few-shot       oxford_pets      87.01  -     L2
CoOp          RN50      16  few-shot       stanford_cars    73.36  -     L2
CoOp          RN50      16  few-shot       oxford_flowers   94.51  -     L2
CoOp          RN50      16  few-shot       food101          74.67  -     L2
CoOp          RN50      16  few-shot       fgvc_aircraft    31.26  -     L2
CoOp          RN50      16  few-shot       sun397           69.26  -     L2
CoOp          RN50      16  few-shot       dtd              63.58  -     L2
CoOp          RN50      16  few-shot       eurosat          83.53  -     L2
CoOp          RN50      16  few-shot       ucf101           75.71  -     L2
CoOp          RN50      16  few-shot       average          73.42  -     L2
CoOp          ViT-B-16  16  base           imagenet         76.47  -     L1
CoOp          ViT-B-16  16  new            imagenet         67.88  -     L1
CoOp          ViT-B-16  16  H              imagenet         71.92  -     L1
CoOp          ViT-B-16  16  base           caltech101       98.00  -     L1
CoOp          ViT-B-16  16  new            caltech101       89.81  -     L1
CoOp          ViT-B-16  16  H              caltech101       93.73  -     L1
CoOp          ViT-B-16  16  base           oxford_pets      93.67  -     L1
CoOp          ViT-B-16  16  new            oxford_pets      95.29  -     L1
CoOp          ViT-B-16  16  H              oxford_pets      94.47  -     L1
CoOp          ViT-B-16  16  base           stanford_cars    78.12  -     L1
CoOp          ViT-B-16  16  new            stanford_cars    60.40  -     L1
CoOp          ViT-B-16  16  H              stanford_cars    68.13  -     L1
CoOp          ViT-B-16  16  base           oxford_flowers   97.60  -     L1
CoOp          ViT-B-16  16  new            oxford_flowers   59.67  -     L1
CoOp          ViT-B-16  16  H              oxford_flowers   74.06  -     L1
CoOp          ViT-B-16  16  base           food101          88.33  -     L1
CoOp          ViT-B-16  16  new            food101          82.26  -     L1
CoOp          ViT-B-16  16  H              food101          85.19  -     L1
CoOp          ViT-B-16  16  base           fgvc_aircraft    40.44  -     L1
CoOp          ViT-B-16  16  new            fgvc_aircraft    22.30  -     L1
CoOp          ViT-B-16  16  H              fgvc_aircraft    28.75  -     L1
CoOp          ViT-B-16  16  base           sun397           80.60  -     L1
CoOp          ViT-B-16  16  new            sun397           65.89  -     L1
CoOp          ViT-B-16  16  H              sun397           72.51  -     L1
CoOp          ViT-B-16  16  base           dtd              79.44  -     L1
CoOp          ViT-B-16  16  new            dtd              41.18  -     L1
CoOp          ViT-B-16  16  H              dtd              54.24  -     L1
CoOp          ViT-B-16  16  base           eurosat          92.19  -     L1
CoOp          ViT-B-16  16  new            eurosat          54.74  -     L1
CoOp          ViT-B-16  16  H              eurosat          68.69  -     L1
CoOp          ViT-B-16  16  base           ucf101           84.69  -     L1
CoOp          ViT-B-16  16  new            ucf101           56.05  -     L1
CoOp          ViT-B-16  16  H              ucf101           67.46  -     L1
CoOp          ViT-B-16  16  base           average          82.69  -     L1
CoOp          ViT-B-16  16  new            average          63.22  -     L1
CoOp          ViT-B-16  16  H              average          71.66  -     L1
DPT           ViT-B-16  16  base           imagenet         75.15  -     L1
DPT           ViT-B-16  16  new            imagenet         25.43  -     L1
DPT           ViT-B-16  16  H              imagenet         38.00  -     L1
DPT           ViT-B-16  16  base           caltech101       97.79  -     L1
DPT           ViT-B-16  16  new            caltech101       45.21  -     L1
DPT           ViT-B-16  16  H              caltech101       61.83  -     L1
DPT           ViT-B-16  16  base           oxford_pets      95.11  -     L1
DPT           ViT-B-16  16  new            oxford_pets      54.55  -     L1
DPT           ViT-B-16  16  H              oxford_pets      69.33  -     L1
DPT           ViT-B-16  16  base           stanford_cars    73.65  -     L1
DPT           ViT-B-16  16  new            stanford_cars    34.35  -     L1
DPT           ViT-B-16  16  H              stanford_cars    46.84  -     L1
DPT           ViT-B-16  16  base           oxford_flowers   95.20  -     L1
DPT           ViT-B-16  16  new            oxford_flowers   17.22  -     L1
DPT           ViT-B-16  16  base           food101          88.87  -     L1
DPT           ViT-B-16  16  new            food101          26.81  -     L1
DPT           ViT-B-16  16  H              food101          41.19  -     L1
DPT           ViT-B-16  16  base           fgvc_aircraft    34.27  -     L1
DPT           ViT-B-16  16  new            fgvc_aircraft    2.24   -     L1
DPT           ViT-B-16  16  H              fgvc_aircraft    4.20   -     L1
DPT           ViT-B-16  16  base           sun397           80.42  -     L1
DPT           ViT-B-16  16  new            sun397           25.22  -     L1
DPT           ViT-B-16  16  H              sun397           38.39  -     L1
DPT           ViT-B-16  16  base           dtd              79.53  -     L1
DPT           ViT-B-16  16  new            dtd              25.54  -     L1
DPT           ViT-B-16  16  H              dtd              38.66  -     L1
DPT           ViT-B-16  16  base           eurosat          93.07  -     L1
DPT           ViT-B-16  16  new            eurosat          28.61  -     L1
DPT           ViT-B-16  16  H              eurosat          43.76  -     L1
DPT           ViT-B-16  16  base           ucf101           81.09  -     L1
DPT           ViT-B-16  16  new            ucf101           36.35  -     L1
DPT           ViT-B-16  16  H              ucf101           50.19  -     L1
DPT           ViT-B-16  16  base           average          81.29  -     L1
DPT           ViT-B-16  16  new            average          29.23  -     L1
CoOp          ViT-B-16  16  from imagenet  imagenet         71.51  -     E
CoOp          ViT-B-16  16  from imagenet  caltech101       93.70  -     E
CoOp          ViT-B-16  16  from imagenet  oxford_pets      89.14  -     E
CoOp          ViT-B-16  16  from imagenet  stanford_cars    64.51  -     E
CoOp          ViT-B-16  16  from imagenet  oxford_flowers   68.71  -     E
CoOp          ViT-B-16  16  from imagenet  food101          85.30  -     E
CoOp          ViT-B-16  16  from imagenet  fgvc_aircraft    18.47  -     E
CoOp          ViT-B-16  16  from imagenet  sun397           64.15  -     E
CoOp          ViT-B-16  16  from imagenet  dtd              41.92  -     E
CoOp          ViT-B-16  16  from imagenet  eurosat          46.39  -     E
CoOp          ViT-B-16  16  from imagenet  ucf101           66.55  -     E
CoOp          ViT-B-16  16  from imagenet  ten data sets    63.88  -     E
CoOp          ViT-B-16  16  from imagenet  imagenetv2       64.20  -     L3
CoOp          ViT-B-16  16  from imagenet  imagenet_sketch  47.99  -     L3
CoOp          ViT-B-16  16  from imagenet  imagenet_a       49.71  -     L3
CoOp          ViT-B-16  16  from imagenet  imagenet_r       75.21  -     L3
CoOp          ViT-B-16  16  from imagenet  four variants    59.28  -     R
DPT           ViT-B-16  16  from imagenet  imagenet         69.95  -     L3
DPT           ViT-B-16  16  from imagenet  imagenetv2       15.93  -     L3
DPT           ViT-B-16  16  from imagenet  imagenet_sketch  13.41  -     L3
DPT           ViT-B-16  16  from imagenet  imagenet_a       9.10   -     L3
DPT           ViT-B-16  16  from imagenet  imagenet_r       32.34  -     L3
SoftCPT-NATA  RN50      1   suite          general10        59.47  0.76  F
SoftCPT-NATA  RN50      2   suite          general10        63.18  0.39  F
SoftCPT-NATA  RN50      4   suite          general10        67.65  0.53  F
SoftCPT-NATA  RN50      8   suite          general10        71.15  0.07  F
SoftCPT-NATA  RN50      16  suite          general10        74.17  0.21  F
SoftCPT-NATA  RN50      1   suite          plant6           54.94  2.33  F
SoftCPT-NATA  RN50      2   suite          plant6           61.58  1.57  F
SoftCPT-NATA  RN50      4   suite          plant6           68.72  1.53  F
SoftCPT-NATA  RN50      8   suite          plant6           74.75  0.22  F
SoftCPT-NATA  RN50      16  suite          plant6           78.42  0.27  F
SoftCPT-NATA  RN50      1   suite          rs8              64.44  0.43  F
SoftCPT-NATA  RN50      2   suite          rs8              72.13  1.02  F
SoftCPT-NATA  RN50      4   suite          rs8              78.16  0.28  F
SoftCPT-NATA  RN50      8   suite          rs8              82.97  0.88  F
SoftCPT-NATA  RN50      16  suite          rs8              86.61  0.17  F
SoftCPT-NATA  RN50      1   suite          fashion20        55.90  0.98  F
SoftCPT-NATA  RN50      2   suite          fashion20        56.07  1.17  F
SoftCPT-NATA  RN50      4   suite          fashion20        62.26  0.26  F
SoftCPT-NATA  RN50      8   suite          fashion20        67.34  0.38  F
SoftCPT-NATA  RN50      16  suite          fashion20        72.18  0.19  F
SoftCPT-NATS  RN50      1   suite          general10        59.23  0.45  F
SoftCPT-NATS  RN50      2   suite          general10        62.70  0.21  F
SoftCPT-NATS  RN50      4   suite          general10        67.67  0.29  F
SoftCPT-NATS  RN50      8   suite          general10        71.10  0.06  F
SoftCPT-NATS  RN50      16  suite          general10        74.51  0.15  F
SoftCPT-NATS  RN50      1   suite          plant6           52.28  -     F
SoftCPT-NATS  RN50      2   suite          plant6           61.64  -     F
SoftCPT-NATS  RN50      4   suite          plant6           68.28  -     F
SoftCPT-NATS  RN50      8   suite          plant6           74.34  -     F
SoftCPT-NATS  RN50      16  suite          plant6           79.11  -     F
SoftCPT-NATS  RN50      1   suite          rs8              62.26  -     F
SoftCPT-NATS  RN50      2   suite          rs8              70.52  -     F
SoftCPT-NATS  RN50      4   suite          rs8              77.77  -     F
SoftCPT-NATS  RN50      8   suite          rs8              83.01  -     F
SoftCPT-NATS  RN50      16  suite          rs8              86.99  -     F
SoftCPT-NATS  RN50      1   suite          fashion20        49.49  -     F
SoftCPT-NATS  RN50      2   suite          fashion20        55.60  -     F
SoftCPT-NATS  RN50      4   suite          fashion20        60.29  -     F
SoftCPT-NATS  RN50      8   suite          fashion20        67.47  -     F
SoftCPT-NATS  RN50      16  suite          fashion20        71.57  -     F
CoOp-MT       RN50      1   suite          general10        58.35  0.73  F
CoOp-MT       RN50      2   suite          general10        60.86  0.13  F
CoOp-MT       RN50      4   suite          general10        63.04  0.43  F
CoOp-MT       RN50      8   suite          general10        66.06  0.48  F
CoOp-MT       RN50      16  suite          general10        68.83  0.51  F
CoOp-MT       RN50      1   suite          plant6           53.14  -     F
CoOp-MT       RN50      2   suite          plant6           59.08  -     F
CoOp-MT       RN50      4   suite          plant6           63.37  -     F
CoOp-MT       RN50      8   suite          plant6           69.95  -     F
CoOp-MT       RN50      16  suite          plant6           73.94  -     F
CoOp-MT       RN50      1   suite          rs8              62.44  -     F
CoOp-MT       RN50      2   suite          rs8              70.39  -     F
CoOp-MT       RN50      4   suite          rs8              74.74  -     F
CoOp-MT       RN50      8   suite          rs8              79.41  -     F
CoOp-MT       RN50      16  suite          rs8              83.62  -     F
CoOp-MT       RN50      1   suite          fashion20        49.60  -     F
CoOp-MT       RN50      2   suite          fashion20        57.01  -     F
CoOp-MT       RN50      4   suite          fashion20        59.30  -     F
CoOp-MT       RN50      8   suite          fashion20        66.15  -     F
CoOp-MT       RN50      16  suite          fashion20        70.69  -     F
CoOp-CA       RN50      1   suite          general10        59.51  0.81  F
CoOp-CA       RN50      2   suite          general10        61.83  0.72  F
CoOp-CA       RN50      4   suite          general10        66.22  0.58  F
CoOp-CA       RN50      8   suite          general10        70.39  0.34  F
CoOp-CA       RN50      16  suite          general10        73.98  0.17  F
CoOp-CA       RN50      1   suite          plant6           50.39  -     F
CoOp-CA       RN50      2   suite          plant6           56.40  -     F
CoOp-CA       RN50      4   suite          plant6           62.09  -     F
CoOp-CA       RN50      8   suite          plant6           68.81  -     F
CoOp-CA       RN50      16  suite          plant6           75.27  -     F
CoOp-CA       RN50      1   suite          rs8              59.39  -     F
CoOp-CA       RN50      2   suite          rs8              66.55  -     F
CoOp-CA       RN50      4   suite          rs8              74.18  -     F
CoOp-CA       RN50      8   suite          rs8              80.82  -     F
CoOp-CA       RN50      16  suite          rs8              85.22  -     F
CoOp-CA       RN50      1   suite          fashion20        50.50  -     F
CoOp-CA       RN50      2   suite          fashion20        55.57  -     F
CoOp-CA       RN50      4   suite          fashion20        60.00  -     F
CoOp-CA       RN50      8   suite          fashion20        64.55  -     F
CoOp-CA       RN50      16  suite          fashion20        69.12  -     F
"""
