"""The project's numbers against those of the official codes (tests/reference/README.md).

    python -m pytest -s tests/test_reference.py      # prints a line of differences for each method

The numbers compared are train's own: it starts from the official parameters, gets the official
batch, and its intermediate results are recorded. An array's difference is the largest one between
our element and the official one, divided by the largest official element.
"""

import contextlib
import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import common
import coop
import dpt
import softcpt
import upt
from tests.conftest import rehearse

FOLDER = Path(__file__).with_name("reference")
TOLERANCE = {"values": 1e-5, "gradients": 1e-3, "rates": 1e-9}
NotCompared = namedtuple("NotCompared", "name reason")
NOT_COMPARED = (
    NotCompared("label_matrix", "The official form of the labels: our losses take columns."),
)
NOT_COMPARED_NAMES = {array.name for array in NOT_COMPARED}

# Where the official codes have the learnables that we name as on the left.
DPT_NAMES = {
    "ctx": "prompt_learner.ctx",
    "visual": "ctx_learner.ctx",
    "cavpt.0.ctx": "extractor.ctx",
    "cavpt.0.meta.weight": "extractor.meta_nets.0.weight",
    "cavpt.0.meta.bias": "extractor.meta_nets.0.bias",
    "cavpt.0.key.weight": "extractor.attns.0.kmlp.weight",
    "cavpt.0.query.weight": "extractor.attns.0.qmlp.weight",
    "cavpt.0.value.weight": "extractor.attns.0.vmlp.weight",
    "cavpt.0.norm_a.weight": "extractor.lns.0.weight",
    "cavpt.0.norm_a.bias": "extractor.lns.0.bias",
    "cavpt.0.classify.weight": "extractor.classfiers.0.weight",
    "cavpt.0.norm_b.weight": "extractor.lns2.0.weight",
    "cavpt.0.norm_b.bias": "extractor.lns2.0.bias",
}
VLP_NAMES = {name: DPT_NAMES[name] for name in ("ctx", "visual")}
UPT_NAMES = {
    "prompts": "uni_ctx",
    "attention.in_proj_weight": "self_attn.in_proj_weight",
    "attention.in_proj_bias": "self_attn.in_proj_bias",
    "attention.out_proj.weight": "self_attn.out_proj.weight",
    "attention.out_proj.bias": "self_attn.out_proj.bias",
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "linear1.weight": "linear1.weight",
    "linear1.bias": "linear1.bias",
    "linear2.weight": "linear2.weight",
    "linear2.bias": "linear2.bias",
    "visual.weight": "mlp.weight",
    "visual.bias": "mlp.bias",
}


# Adapters: all that depends on the project's interface, apart from names of options.

Call = namedtuple("Call", "arguments result")

# What method.train did with a prompt: steps and rates of the rehearsal. The prompt has the values
# that it started from, unless the run was a moving one.
Run = namedtuple("Run", "method cfg prompt steps rates")


def load_clip(folder):
    return common.load_clip(common.Config(model=f"local-dir:{folder}", device="cpu"))


def logit_scale(clip):
    return clip.scale


def dataset(classnames, name="reference"):
    """A data set without images, because the batches are brought."""
    return common.Dataset(name, [], [], classnames, "a photo of a {}.")


def joined(parts, titles):
    """SoftCPT's Tasks of lists of class names."""
    sets = [dataset(names, title) for names, title in zip(parts, titles, strict=True)]
    sizes = torch.tensor([len(names) for names in parts])
    first = (sizes.cumsum(0) - sizes).tolist()
    return softcpt.Tasks(sets, titles, first, torch.arange(len(parts)).repeat_interleave(sizes))


def embedded(clip, classnames, n_ctx):
    """The embeddings of [SOS] (1, 1, d), and of the tokens from the class name on (K, S, d)."""
    names = common.embed_names(clip, classnames, n_ctx)
    return names.sos, names.tail


def hand_features(clip, classnames):
    """(K, D) features, before normalisation, of "a photo of a {}."."""
    names = common.embed_names(clip, classnames, 0, "a photo of a {}.")
    no_context = torch.zeros(1, 0, clip.d_t)
    return common.encode_prompts(clip, names, no_context)


def hand_classifier(clip, classnames):
    """(K, D) unit features that the methods compare an image with."""
    return common.zero_shot_weights(clip, dataset(classnames))[:, 0]


def run(method, clip, data, batches, start=None, met=(0,), moving=False, **options):
    """Runs method.train on the same batches in each of the epochs met; returns the Run.

    batches: pairs of images and labels. start: values by the names of our learnables; None keeps
    the initial ones.
    """
    cfg = method.Config(**options)
    prompt = method.learnables(cfg, clip, data)
    if start is not None:
        own = prompt.state_dict()
        prompt.load_state_dict({name: start[name].reshape(own[name].shape) for name in start})
    steps, rates = rehearse(method, cfg, clip, data, prompt, batches, met, moving)
    return Run(method, cfg, prompt, steps, torch.tensor(rates, dtype=torch.float64))


@torch.no_grad()
def logits_of(found, clip, data, images):
    """The logits of a Run's prompt, as evaluated."""
    predict = found.method.classifier(found.cfg, clip, found.prompt, data, data)
    f = common.unit_features(clip, images)
    return predict(images, f) if callable(predict) else logit_scale(clip) * f @ predict.T


def softcpt_options(variant):
    """The options of an official variant. Its name says its class part, then its task part."""
    contexts = {"A": "shared", "S": "specific"}
    class_context = "none" if variant[0] == "N" else contexts[variant[1]]
    return {
        "class_context": class_context,
        "task_context": contexts[variant[3]],
        "n_ctx": 4,
        "task_n_ctx": 4,
        "class_n_ctx": 4,
        "official": True,
    }


def context_of(call):
    """The context that a call of common.encode_prompts was given."""
    return call.arguments[2]


@contextlib.contextmanager
def recorded(owner, name):
    """The calls of the function owner.name in the body, oldest first."""
    calls, function = [], getattr(owner, name)

    def call(*arguments, **options):
        calls.append(Call(arguments, function(*arguments, **options)))
        return calls[-1].result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


# Comparing.


def arrays(file):
    """The arrays of a file of figures as tensors, texts left out."""
    with np.load(FOLDER / file) as stored:
        numeric = [name for name in stored.files if stored[name].dtype.kind != "U"]
        return {name: torch.from_numpy(stored[name]) for name in numeric}


class Figures:
    """The arrays of one file, and how far ours are from them."""

    def __init__(self, method, file):
        self.method, self.arrays = method, arrays(file)
        self.differences = {}  # kind: {name: difference}
        self.seen = set()

    def given(self, name):
        """An array that our code starts from."""
        self.seen.add(name)
        return self.arrays[name]

    def compare(self, name, ours, kind="values", largest=None):
        """Notes how far ours is from an array. Only axes of size one may differ in place."""
        self.seen.add(name)
        theirs = self.arrays[name].double()
        ours = torch.as_tensor(ours).detach().double()
        assert [n for n in ours.shape if n > 1] == [n for n in theirs.shape if n > 1], name
        difference = (ours.reshape(theirs.shape) - theirs).abs().max()
        largest = theirs.abs().max() if largest is None else largest
        self.differences.setdefault(kind, {})[name] = (difference / largest).item()

    def compare_integers(self, name, ours):
        """Like compare, but exact: one wrong token or class must not pass as a small error."""
        assert torch.equal(self.arrays[name].long(), torch.as_tensor(ours).long()), name
        self.compare(name, ours)

    def finish(self):
        """Prints the line of the method. Fails with every array that differs or was forgotten."""
        count = sum(map(len, self.differences.values()))
        largest = [f"{max(d.values()):.1e} ({kind})" for kind, d in self.differences.items()]
        print(f"\n{self.method}: {count} arrays, largest difference {', '.join(largest)}")
        failed = {
            name: difference
            for kind, differences in self.differences.items()
            for name, difference in differences.items()
            if not difference <= TOLERANCE[kind]
        }
        assert not failed
        assert self.arrays.keys() - self.seen - NOT_COMPARED_NAMES == set()


def unit(features):
    return F.normalize(features, dim=-1)


def parameters(figures, prefix, names):
    """The official learnables by our names."""
    return {ours: figures.given(prefix + theirs) for ours, theirs in names.items()}


def compare_gradients(figures, prefix, step, names):
    for ours, theirs in names.items():
        figures.compare(prefix + theirs, step.gradients[ours], "gradients")


def placeholder_ids(clip, classnames, words):
    """The token ids of prompts that begin with words."""
    return clip.tokenize([f"{words} {name.replace('_', ' ')}." for name in classnames])


def tower_inputs(clip, found, data, images):
    """What a Run's prompt gives each block of the image tower, and what it gives ln_post."""
    visual, inputs = clip.visual, []
    layers = [block.ln_1 for block in visual.transformer.resblocks] + [visual.ln_post]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, arguments: inputs.append(arguments[0]))
        for layer in layers
    ]
    predict = found.method.classifier(found.cfg, clip, found.prompt, data, data)
    f = common.unit_features(clip, images)
    inputs.clear()  # The frozen tower's
    with torch.no_grad():
        predict(images, f)
    for hook in hooks:
        hook.remove()
    return inputs[:-1], inputs[-1]


def compare_tower(figures, prefix, clip, found, data, images):
    """The sequence length of each block, and the class token after it."""
    inputs, last = tower_inputs(clip, found, data, images)
    figures.compare_integers(prefix + "seq_len_per_layer", [x.shape[1] for x in inputs])
    outputs = [*inputs[1:], last]  # The blocks change the class token, prompts leave it alone.
    figures.compare(prefix + "cls_after_layer", torch.stack([x[:, 0] for x in outputs]))
    return inputs


# What all comparisons start from.


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The CLIP that the official codes ran with."""
    folder = tmp_path_factory.mktemp("clip")
    weights = {name: tensor.float() for name, tensor in arrays("tiny_clip.npz").items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    vision = {"image_size": 32, "patch_size": 8, "layers": 4, "width": 128, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "layers": 4, "width": 128, "heads": 2}
    model = {"embed_dim": 128, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    config = json.dumps({"model_cfg": model, "preprocess_cfg": {}})
    (folder / "open_clip_config.json").write_text(config)
    return load_clip(folder)


@pytest.fixture(scope="module")
def classnames():
    with np.load(FOLDER / "inputs.npz") as stored:
        return stored["classnames"].tolist()


@pytest.fixture(scope="module")
def batch():
    """(images, labels)."""
    inputs = arrays("inputs.npz")
    return inputs["images"], inputs["labels"]


# The methods.


def test_plain_clip(clip, classnames, batch):
    figures = Figures("plain CLIP", "base.npz")
    images, labels = batch
    tokens = placeholder_ids(clip, classnames, "a photo of a")
    text = hand_features(clip, classnames)
    image = common.encode_image(clip, images)
    classifier = hand_classifier(clip, classnames)
    logits = logit_scale(clip) * common.unit_features(clip, images) @ classifier.T
    figures.compare_integers("tokens", tokens)
    figures.compare("logit_scale_exp", logit_scale(clip))
    figures.compare("text_features", text)
    figures.compare("image_features", image)
    figures.compare("logits", logits)
    figures.compare("loss", F.cross_entropy(logits, labels))
    figures.finish()


COOP_CASES = {
    "rand_n4_end_uni/": {"n_ctx": 4},
    "rand_n4_front_csc/": {"n_ctx": 4, "position": "front", "csc": True},
    "rand_n16_middle_uni/": {"n_ctx": 16, "position": "middle"},
    "init_n4_end_uni/": {"init": "a photo of a"},
}


def test_coop(clip, classnames, batch):
    figures = Figures("CoOp", "coop.npz")
    data = dataset(classnames)
    for case, options in COOP_CASES.items():
        words = options.get("init") or " ".join("X" * options["n_ctx"])
        start = None if "init" in options else {"ctx": figures.given(case + "ctx")}
        with recorded(common, "encode_prompts") as encoded:
            found = run(coop, clip, data, [batch], start, **options)
        if start is None:
            figures.compare(case + "ctx", found.prompt.ctx)
        figures.compare_integers(case + "tokens", placeholder_ids(clip, classnames, words))
        figures.compare(case + "text_features", encoded[-1].result)
        figures.compare(case + "logits", logits_of(found, clip, data, batch[0]))
        figures.compare(case + "loss", found.steps[0].loss)
        figures.compare(case + "grad_ctx", found.steps[0].gradients["ctx"], "gradients")
    case = "rand_n4_end_uni/"
    embeddings = prompt_embeddings(clip, classnames, figures.given(case + "ctx"), 20)
    figures.compare(case + "prompt_embeddings_first20", embeddings)
    figures.finish()


def prompt_embeddings(clip, classnames, ctx, length):
    """(K, length, d) [SOS] V <name>. [EOS], and what pads it after the longest."""
    sos, tail = embedded(clip, classnames, len(ctx))
    count = len(classnames)
    prompts = torch.cat([sos.expand(count, -1, -1), ctx.expand(count, -1, -1), tail], 1)
    padding = clip.token_embedding(torch.zeros(count, length - prompts.shape[1], dtype=torch.long))
    return torch.cat([prompts, padding], 1)


def test_schedule(clip, classnames, batch):
    figures, data = Figures("schedule", "sched.npz"), dataset(classnames)
    text = run(coop, clip, data, [], met=range(200), shots=16).rates[:, 0]
    visual = run(dpt, clip, data, [], met=range(100), shots=16).rates[:, 1]
    figures.compare("sched_lr0.002_ep200_warm1/lr", text, "rates")
    figures.compare("sched_lr0.01_ep100_warm10/lr", visual, "rates")
    images, labels = batch
    batches = [(images[pick], labels[pick]) for pick in figures.given("traj_lr0.5/batches")]
    start = {"ctx": figures.given("traj_lr0.5/ctx")[0]}
    options = {"n_ctx": 4, "lr": 0.5, "epochs": 4}
    found = run(coop, clip, data, batches, start, met=range(4), moving=True, **options)
    contexts = [*(step.before["ctx"] for step in found.steps), found.prompt.ctx]
    losses = [step.loss for step in found.steps]
    figures.compare("traj_lr0.5/lr", found.rates[:, 0].repeat_interleave(len(batches)), "rates")
    figures.compare("traj_lr0.5/loss", torch.stack(losses))
    figures.compare("traj_lr0.5/ctx", torch.stack(contexts))
    figures.finish()


DPT_OPTIONS = {"n_ctx": 4, "n_visual": 5, "top_k": 3, "alpha": 0.3, "guidance": 30}
GUIDED, LATER = 0, 30  # Epochs on either side of the end of the guidance.


def test_dpt(clip, classnames, batch):
    figures = Figures("DPT", "dpt.npz")
    compare_cavpt(figures, clip, classnames, batch)
    compare_vlp(figures, clip, classnames, batch)
    figures.finish()


def compare_cavpt(figures, clip, classnames, batch):
    """The whole of DPT, with CAVPT in the last layer."""
    data, (images, labels), case = dataset(classnames), batch, "dpt_bl4_cpn3/"
    start = parameters(figures, "dpt_bl4/param/", DPT_NAMES)

    def run_in(epoch, labels=labels, **options):
        options = DPT_OPTIONS | options
        return run(dpt, clip, data, [(images, labels)], start, met=[epoch], **options)

    for phase, epoch in ("phase1", GUIDED), ("phase2", LATER):
        figures.compare(f"{case}loss_{phase}_alpha0", run_in(epoch, alpha=0.0).steps[0].loss)
        full = run_in(epoch).steps[0]
        figures.compare(f"{case}loss_{phase}", full.loss)
        compare_gradients(figures, f"{case}grad_{phase}/", full, DPT_NAMES)
    never = figures.given(case + "labels_never_selected")
    figures.compare(case + "loss_phase2_never_selected", run_in(LATER, never).steps[0].loss)

    with recorded(dpt, "cavpt_loss") as losses, recorded(common, "encode_prompts") as encoded:
        with recorded(dpt.ClassAware, "forward") as aware:
            full = run_in(LATER)
    layer_logits, top, _ = losses[0].arguments
    class_prompts, _, attention = aware[0].result
    figures.compare_integers(case + "indices", top)
    figures.compare(case + "text_features", encoded[-1].result)
    # The official code stacks (layers, K, B, ...), we have (B, K, ...) for each layer.
    figures.compare(case + "layer_logits", torch.stack(layer_logits).transpose(1, 2))
    figures.compare(case + "class_prompts.0", class_prompts.transpose(0, 1))
    figures.compare(case + "attn_map.0", attention)
    figures.compare(case + "zs_text_features", hand_classifier(clip, classnames))
    figures.compare(case + "zs_image_features", common.unit_features(clip, images))
    compare_dpt_logits(figures, case, clip, data, images, full, encoded[-1].result)
    compare_tower(figures, case, clip, full, data, images)


def compare_dpt_logits(figures, case, clip, data, images, found, text):
    """The logits of the prompted towers, and of each of them against the other frozen one."""
    frozen, scale = common.unit_features(clip, images), logit_scale(clip)
    with recorded(common, "encode_image") as encoded:
        figures.compare(case + "logits", logits_of(found, clip, data, images))
    prompted = unit(encoded[-1].result)
    hand = hand_classifier(clip, data.classnames)
    figures.compare(case + "logits1", scale * frozen @ unit(text).T)
    figures.compare(case + "logits2", scale * prompted @ hand.T)
    return encoded[-1].result


def compare_vlp(figures, clip, classnames, batch):
    """DPT without a CAVPT layer."""
    data, options = dataset(classnames), DPT_OPTIONS | {"cavpt_layers": 0}
    start = parameters(figures, "vlp/param/", VLP_NAMES)
    for phase, epoch in ("phase1", GUIDED), ("phase2", LATER):
        with recorded(common, "encode_prompts") as encoded:
            found = run(dpt, clip, data, [batch], start, met=[epoch], **options)
        figures.compare(f"vlp/loss_{phase}", found.steps[0].loss)
        compare_gradients(figures, f"vlp/grad_{phase}/", found.steps[0], VLP_NAMES)
    text = encoded[-1].result
    image = compare_dpt_logits(figures, "vlp/", clip, data, batch[0], found, text)
    figures.compare("vlp/image_features", image)


def test_upt(clip, classnames, batch):
    figures, data = Figures("UPT", "upt.npz"), dataset(classnames)
    start = parameters(figures, "upt/param/", UPT_NAMES)
    M, patches = 4, 16

    def run_as(official):
        with recorded(upt.UnifiedPrompt, "forward") as prompts:
            options = {"n_ctx": M, "dropout": 0.0, "official": official}
            found = run(upt, clip, data, [batch], start, **options)
        return found, prompts[0].result

    def compare_run(case, found, prompts):
        figures.compare(case + "text_prompt", prompts[0])
        figures.compare(case + "visual_prompt", prompts[1])
        figures.compare(case + "logits", logits_of(found, clip, data, batch[0]))
        figures.compare(case + "loss", found.steps[0].loss)

    with recorded(common, "encode_prompts") as text, recorded(common, "encode_image") as image:
        official, prompts = run_as(official=True)
    compare_run("upt/", official, prompts)
    tokens = placeholder_ids(clip, classnames, "a photo of a")
    figures.compare_integers("upt/tokens", tokens)
    figures.compare("upt/text_features", text[-1].result)
    figures.compare("upt/image_features", image[-1].result)
    compare_gradients(figures, "upt/grad/", official.steps[0], UPT_NAMES)
    inputs = compare_tower(figures, "upt/", clip, official, data, batch[0])
    # The official code has its prompts before the patches, we have them after.
    first, rows, last = inputs[0][0].split([1, patches, M])
    figures.compare("upt/layer1_input_image0", torch.cat([first, last, rows]))

    mixing, prompts = run_as(official=False)
    case = "upt_paperattn_NOT_OFFICIAL/"
    compare_run(case, mixing, prompts)
    gradients = mixing.steps[0].gradients
    attention = gradients["attention.in_proj_weight"]
    figures.compare(case + "grad_uni_ctx", gradients["prompts"], "gradients")
    figures.compare(case + "grad_in_proj_weight", attention, "gradients")
    figures.finish()


# For each variant the official names of the learnables, by ours.
SOFTCPT_CASES = {
    "NATA": {
        "task_ctx": "task_prompt_learner.ctx_4x128",
        "meta.weight": "prompt_gen.proj_128x512",
    },
    "CATA": {
        "task_ctx": "task_prompt_learner.ctx_4x128",
        "class_ctx": "class_prompt_learner.ctx_4x128",
        "meta.weight": "prompt_gen.proj_256x512",
    },
    "CSTS": {
        "task_ctx": "task_prompt_learner.ctx_3x4x128",
        "class_ctx": "class_prompt_learner.ctx_12x4x128",
        "meta.weight": "prompt_gen.proj_256x512",
    },
}


def test_softcpt(clip, classnames, batch):
    figures = Figures("SoftCPT", "softcpt.npz")
    with np.load(FOLDER / "inputs.npz") as stored:
        titles = stored["tasknames"].tolist()
        names = [classnames[i] for i in stored["task_class_index"]]
        parts = np.split(np.array(names), stored["task_sizes"].cumsum()[:-1])
    tasks = joined([part.tolist() for part in parts], titles)
    images, labels = batch[0], figures.given("label_column")
    others = figures.given("label_task") != 1

    for variant, learnables in SOFTCPT_CASES.items():
        options = softcpt_options(variant)
        start = parameters(figures, "param/", learnables)
        start["meta.weight"] = start["meta.weight"].T  # Official: multiplied from the right.

        with recorded(common, "encode_prompts") as encoded, recorded(softcpt, "task_loss") as loss:
            whole = run(softcpt, clip, tasks, [(images, labels)], start, **options)
        case, step = variant + "/", whole.steps[0]
        compare_contexts(figures, case, encoded, parts)
        figures.compare(case + "logits", loss[0].arguments[0])
        figures.compare(case + "loss", step.loss)
        figures.compare_integers(case + "optimizer_steps_per_iteration", step.times)
        compare_softcpt_gradients(figures, case, step.gradients)
        rest = [(images[others], labels[others])]
        rest = run(softcpt, clip, tasks, rest, start, **options)
        figures.compare(case + "loss_without_task1", rest.steps[0].loss)
        if f"lr_{variant}/lr" in figures.arrays:
            rates = run(softcpt, clip, tasks, [], start, met=range(50), **options).rates
            figures.compare(f"lr_{variant}/lr", rates[:, 0], "rates")
    figures.finish()


def compare_contexts(figures, case, encoded, parts):
    """What goes into the meta-network, what comes out, and the class features that follow."""
    # Encoded are the task names, then the class names where a variant has them, then the prompts.
    tasks, *classes, last = encoded
    meta_inputs = tasks.result
    if classes:
        sizes = torch.tensor([len(part) for part in parts])
        meta_inputs = torch.cat([classes[0].result, tasks.result.repeat_interleave(sizes, 0)], 1)
    figures.compare(case + "prompt_gen_input", meta_inputs)
    figures.compare(case + "contexts", context_of(last))
    figures.compare(case + "text_features", last.result)


def compare_softcpt_gradients(figures, case, gradients):
    context = gradients["task_ctx"]
    figures.compare(case + "grad/task_prompt_learner.ctx", context, "gradients")
    weight = gradients["meta.weight"].T
    every, rows = "", weight
    if "class_ctx" in gradients:
        context = gradients["class_ctx"]
        figures.compare(case + "grad/class_prompt_learner.ctx", context, "gradients")
        every, rows = "[::8]", weight[::8]
    figures.compare(f"{case}grad/prompt_gen.proj{every}", rows, "gradients")
    norm = weight.norm()
    figures.compare(case + "gradnorm/prompt_gen.proj", norm, "gradients")
    # LayerNorm removes the mean of a token, so the exact sum is 0 and the figure is rounding alone.
    figures.compare(case + "gradsum/prompt_gen.proj", weight.sum(), "gradients", largest=norm)
