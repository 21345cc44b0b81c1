"""SoftCPT: contexts from task names, the task-masked loss, class sampling, the release's repeated
steps, and the score over tasks."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import softcpt
from tests.conftest import (
    NAMES,
    gradients,
    new_prompt,
    plain_prompts,
    rehearse,
    schedule,
    toy,
    unit,
)

TINY = {"n_ctx": 3, "task_n_ctx": 2, "class_n_ctx": 1}
OTHER = ["red", "blue"]
TITLES = ["toy classification", "colours classification"]
NATA, NATS = {}, {"task_context": "specific"}
CATA, CATS = {"class_context": "shared"}, {"class_context": "shared", "task_context": "specific"}
CSTA = {"class_context": "specific"}
CSTS = {"class_context": "specific", "task_context": "specific"}
MT, CA = {"baseline": "one context"}, {"baseline": "one per task"}
COLUMN_TASK = torch.tensor([0, 0, 0, 1, 1])


def two():
    """Tasks of three and two classes."""
    train = [(picture, y % 2, OTHER[y % 2]) for picture, y, _ in toy(5).train]
    second = common.Dataset("colours", train, [], train, OTHER, "a photo of a {} thing.")
    return softcpt.Tasks([toy(), second], TITLES, [0, 3], COLUMN_TASK)


def start(clip, **options):
    """(Config, SoftContext at its start) for two()."""
    cfg = softcpt.Config(**TINY | options)
    return cfg, new_prompt(softcpt, cfg, clip, two())


def by_hand(clip, prompt):
    """(5, D) features of the classes of both tasks written out."""
    of, names = COLUMN_TASK, NAMES + OTHER
    if hasattr(prompt, "ctx"):
        V = prompt.ctx[of] if len(prompt.ctx) > 1 else prompt.ctx.expand(5, -1, -1)
        return plain_prompts(clip, names, V)
    f_t = plain_prompts(clip, TITLES, prompt.task_ctx.expand(2, -1, -1))
    x = f_t[of]
    if hasattr(prompt, "class_ctx"):
        f_c = plain_prompts(clip, names, prompt.class_ctx.expand(5, -1, -1))
        x = torch.cat([f_c, x], 1)  # the class comes first
    V = (x @ prompt.meta.weight.T).reshape(5, TINY["n_ctx"], -1)
    return plain_prompts(clip, names, V)


def masked_sum(logits, labels, column_task):
    """Cross-entropy of every row over its own task's columns, summed, one row at a time."""
    total = 0
    for row, label in zip(logits, labels, strict=True):
        own = column_task == column_task[label]
        total = total + row[own].exp().sum().log() - row[label]
    return total


@pytest.mark.parametrize("options", [NATA, NATS, CATA, CATS, CSTA, CSTS, MT, CA], ids=str)
def test_every_variant_is_the_equations_by_hand(odd, options):
    cfg, prompt = start(odd, **options)
    (step,), _ = rehearse(softcpt, cfg, odd, two(), prompt)
    w = unit(by_hand(odd, prompt))
    for task, own in zip(two().sets, (slice(0, 3), slice(3, 5)), strict=True):
        found = softcpt.classifier(cfg, odd, prompt, two(), task)
        assert torch.allclose(found, w[own], atol=1e-5)
    images, labels = next(common.Loader(cfg, odd, two().union()).epoch(0))
    logits = odd.logit_scale.exp() * unit(odd.encode_image(images)) @ w.T
    expected = masked_sum(logits, labels, COLUMN_TASK) / 11
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    parameters = dict(prompt.named_parameters())
    for name, b in zip(parameters, gradients(expected, list(parameters.values())), strict=True):
        a = step.gradients[name]
        assert b.abs().max() > 0 and torch.allclose(a, b, atol=1e-3 * b.abs().max().item()), name
    assert all(p.grad is None and not p.requires_grad for p in odd.parameters())


def test_a_baseline_has_no_class_context_and_samples_no_classes(odd, monkeypatch):
    monkeypatch.setattr(softcpt, "sample_classes", None)
    cfg, prompt = start(odd, **MT | CATA, class_rate=0.5)
    (step,), _ = rehearse(softcpt, cfg, odd, two(), prompt)
    assert step.gradients.keys() == {"ctx"}


def test_the_loss_of_a_mixed_batch_by_hand():
    logits = torch.tensor([[1.0, 2, 3, 9, 9], [8.0, 8, 8, 1, 0], [0.0, 1, 0, 5, 5]])
    logits.requires_grad_()
    loss = softcpt.task_loss(logits, torch.tensor([0, 4, 1]), COLUMN_TASK)
    rows = [([1, 2, 3], 0), ([1, 0], 1), ([0, 1, 0], 1)]
    expected = sum(math.log(sum(map(math.exp, row))) - row[k] for row, k in rows) / 3
    assert loss.item() == pytest.approx(expected)
    gradient = gradients(loss, [logits])[0]
    foreign = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]).bool()
    assert not gradient[foreign].any() and gradient[~foreign].all()


def test_class_sampling_keeps_the_batchs_classes_and_a_share_of_each_tasks_others():
    of = torch.tensor([0] * 10 + [1] * 7 + [2] * 3)
    labels, seen = torch.tensor([2, 2, 5, 12]), set()
    for seed in range(30):
        torch.manual_seed(seed)
        columns = softcpt.sample_classes(labels, of, 0.3)
        chosen = set(columns.tolist())
        assert columns.tolist() == sorted(chosen) and {2, 5, 12} <= chosen
        counts = of[columns].bincount().tolist()
        assert counts == [2 + math.ceil(0.3 * 8), 1 + math.ceil(0.3 * 6), math.ceil(0.3 * 3)]
        seen |= chosen
    assert seen == set(range(20))
    assert softcpt.sample_classes(labels, of, 1.0).tolist() == list(range(20))


@pytest.mark.parametrize(
    "options, rate",
    [({"dataset": "general10"}, 0.1), ({"dataset": "general10", "class_rate": 0.5}, 0.5)]
    + [({"class_rate": 0.5}, 0.5), ({}, None), ({"dataset": "general10", "class_rate": 1.0}, None)],
    ids=str,
)
def test_general10_samples_a_tenth_of_the_other_classes_unless_told(
    odd, monkeypatch, options, rate
):
    asked, sample = [], softcpt.sample_classes

    def sample_classes(labels, column_task, rate):
        assert labels.device == column_task.device == torch.device("cpu")  # the host
        asked.append(rate)
        return sample(labels, column_task, rate)

    monkeypatch.setattr(softcpt, "sample_classes", sample_classes)
    cfg, prompt = start(odd, **CATA | options)
    rehearse(softcpt, cfg, odd, two(), prompt)
    assert asked == ([rate] if rate else [])
    asked.clear()
    cfg, prompt = start(odd, **NATA | options)  # without V all classes are encoded
    rehearse(softcpt, cfg, odd, two(), prompt)
    assert asked == []


@pytest.mark.parametrize("options", [CATA, CSTA, CSTS], ids=str)
def test_a_step_with_sampled_classes_is_the_loss_over_their_columns(odd, monkeypatch, options):
    columns, tasks = torch.tensor([1, 2, 3, 4]), two()
    train = [item for item in tasks.sets[0].train if item[1] > 0]
    tasks.sets[0] = tasks.sets[0]._replace(train=train)
    monkeypatch.setattr(softcpt, "sample_classes", lambda labels, of, rate: columns)
    cfg, prompt = start(odd, class_rate=0.5, **options)
    (step,), _ = rehearse(softcpt, cfg, odd, tasks, prompt)
    images, labels = next(common.Loader(cfg, odd, tasks.union()).epoch(0))
    w = unit(by_hand(odd, prompt))[columns]
    logits = odd.logit_scale.exp() * unit(odd.encode_image(images)) @ w.T
    expected = masked_sum(logits, labels - 1, COLUMN_TASK[columns]) / len(labels)
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("times", [1, 3, 4])
def test_repeated_steps_are_sgd_steps_with_one_gradient(odd, times):
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    q = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    groups = [{"params": [p], "warmup": 0}]
    optimizer = common.Optimizer(softcpt.Config(lr=0.1), odd, groups, 10, times)
    plain = torch.optim.SGD([q], 0.1, momentum=0.9, weight_decay=5e-4)
    for k in range(3):
        optimizer.step(((k + 1) * p**3).sum())
        plain.zero_grad()
        ((k + 1) * q**3).sum().backward()
        for _ in range(times):
            plain.step()
        assert torch.allclose(p, q, rtol=1e-6)


@pytest.mark.parametrize(
    "options, official, times",
    [(NATA, True, 3), (NATS, True, 3), (CATA, True, 4), (CSTS, True, 4)]
    + [(NATA, False, 1), (CATA, False, 1), (MT, True, 1), (CA, True, 1)],
    ids=str,
)
def test_official_repeats_steps_and_schedule(odd, options, official, times):
    cfg, prompt = start(odd, official=official, **options)
    (step,), _ = rehearse(softcpt, cfg, odd, two(), prompt)
    assert step.times == times
    found = [rates[0] for rates in schedule(softcpt, odd, two(), official=official, **options)]
    assert len(found) == 50 and found[0] == 1e-5
    for e in range(1, 50):
        expected = 0.001 * (1 + math.cos(math.pi * (times * e - 1) / 50))
        assert found[e] == pytest.approx(expected, abs=1e-9)
    printed = {3: {1: 0.001992, 8: 0.001125, 12: 4.1e-4, 16: 1.8e-5, 25: 9.4e-4, 49: 3.1e-5}}
    for e, value in printed.get(times, {}).items():
        assert found[e] == pytest.approx(value, rel=0.05)
    assert times != 4 or found[49] == pytest.approx(0.00195, rel=0.01)
    assert len(schedule(softcpt, odd, two(), epochs=4, **options)) == 4


@pytest.mark.parametrize(
    "options, m, count",
    [(NATA, 8, 8_392_704), (NATA, 4, 1024 * 8192 + 4 * 512), (NATS, 8, 8_421_376)]
    + [(CATA, 4, 2048 * 8192 + 8 * 512), (CSTS, 4, 2048 * 8192 + (8 + 208) * 4 * 512)]
    + [(MT, 4, 16 * 512), (CA, 4, 8 * 16 * 512)],
    ids=str,
)
def test_parameter_counts_are_those_of_rn50(options, m, count):
    cfg = softcpt.Config(task_n_ctx=m, **options)
    with torch.device("meta"):
        clip = SimpleNamespace(text_projection=torch.empty(512, 1024))
        prompt = softcpt.SoftContext(cfg, clip, 8, 208)
    assert sum(p.numel() for p in prompt.parameters()) == count
    assert "meta.bias" not in prompt.state_dict()


def test_initial_values_are_small_normal_noise(odd):
    _, prompt = start(odd, n_ctx=20, task_n_ctx=60, class_n_ctx=60, **CSTS)
    for table in prompt.parameters():
        assert table.std().item() == pytest.approx(0.02, rel=0.1)


def test_batches_mix_the_tasks_and_a_label_is_a_column(odd):
    union = two().union()
    labels = [y for _, y, _ in union.train]
    assert labels == [0, 1, 2, 0, 1, 2, 3, 4, 3, 3, 4]
    assert [union.classnames[y] for y in labels[:3]] == NAMES
    assert [union.classnames[y] for y in labels[6:8]] == OTHER
    (order,) = common.Loader(softcpt.Config(batch_size=11), odd, union).order(0)
    tasks = [labels[i] > 2 for i in order]
    assert tasks != sorted(tasks) and sum(tasks) == 5


def test_a_task_meets_new_ones_by_their_names(odd):
    new = toy()._replace(name="birds", classnames=["owl", "tit"])
    for options in NATA, CATA:
        cfg, prompt = start(odd, **options)
        x = plain_prompts(odd, ["birds classification"] * 2, prompt.task_ctx.expand(2, -1, -1))
        if options is CATA:
            f_c = plain_prompts(odd, ["owl", "tit"], prompt.class_ctx.expand(2, -1, -1))
            x = torch.cat([f_c, x], 1)
        V = (x @ prompt.meta.weight.T).reshape(2, 3, 32)
        expected = unit(plain_prompts(odd, ["owl", "tit"], V))
        found = softcpt.classifier(cfg, odd, prompt, two(), new)
        assert torch.allclose(found, expected, atol=1e-5)
    for options in NATS, CSTA, CA:
        cfg, prompt = start(odd, **options)
        with pytest.raises(common.Error, match="specific"):
            softcpt.classifier(cfg, odd, prompt, two(), new)


def test_new_classes_of_a_task_learned_keep_its_own_context(odd):
    cfg, prompt = start(odd, **NATS)
    new = two().sets[1]._replace(classnames=["owl", "tit"])
    f_t = plain_prompts(odd, TITLES[1:], prompt.task_ctx[1:])
    V = (f_t @ prompt.meta.weight.T).reshape(1, 3, 32).expand(2, -1, -1)
    found = softcpt.classifier(cfg, odd, prompt, two(), new)
    assert torch.allclose(found, unit(plain_prompts(odd, ["owl", "tit"], V)), atol=1e-5)
    cfg, prompt = start(odd, **CA)
    found = softcpt.classifier(cfg, odd, prompt, two(), new)
    expected = plain_prompts(odd, ["owl", "tit"], prompt.ctx[1].expand(2, -1, -1))
    assert torch.allclose(found, unit(expected), atol=1e-5)


def test_the_score_is_the_mean_over_tasks_of_each_tasks_metric(
    fit, world, tmp_path, monkeypatch, capsys
):
    shutil.copytree(world / "shapes" / "textures", tmp_path / "lopsided")
    for name in "plain", "striped", "dotted":
        (tmp_path / "lopsided" / "test" / name / "000.png").unlink()
    lopsided = str(tmp_path / "lopsided")
    monkeypatch.setattr(softcpt, "PER_CLASS", [lopsided])
    score = fit(softcpt, dataset=f"textures,colours,{lopsided}", n_ctx=1, epochs=2)
    rows = {row["evaluated_on"]: row for row in fit.rows()}
    overall, mean = rows[lopsided]["accuracy"], rows[lopsided]["mean_class_accuracy"]
    assert overall != mean
    expected = (rows["textures"]["accuracy"] + rows["colours"]["accuracy"] + mean) / 3
    assert f": {expected:.2f} (zero-shot" in capsys.readouterr().out.splitlines()[-1]
    assert score == pytest.approx(expected)


def test_the_released_tasks_are_scored_by_their_metrics():
    assert softcpt.PER_CLASS == ["caltech101", "fgvc_aircraft", "oxford_flowers", "oxford_pets"]
    order = "caltech101 dtd eurosat fgvc_aircraft food101 oxford_flowers oxford_pets stanford_cars"
    assert list(softcpt.GENERAL10) == [*order.split(), "sun397", "ucf101"]


@pytest.mark.parametrize(
    "tasks, titles",
    [("", ["textures classification", "colours classification"])]
    + [("surface type, hue ", ["surface type", "hue"])],
)
def test_task_names_come_from_the_option_or_the_data_set(world, tasks, titles):
    cfg = softcpt.Config(dataset="textures,colours", tasks=tasks, data=str(world), shots=1)
    found = softcpt.load_tasks(cfg)
    assert found.titles == titles and found.first == [0, 4]
    assert found.column_task.tolist() == [0] * 4 + [1] * 8
    assert [len(d.train) for d in found.sets] == [4, 8]  # one picture of a class


def test_a_released_task_has_its_name_and_a_folder_its_last_part():
    assert softcpt.title_of("dtd") == "texture classification"
    assert softcpt.title_of("a/my_birds") == "my birds classification"


@pytest.mark.parametrize(
    "options, said",
    [
        ("--dataset textures,textures", "textures"),
        ("--dataset textures,nowhere", "nowhere"),
        ("--tasks one,two", "--tasks"),
        ("--task_context specific --transfer shapes_negative --dataset textures,colours", "specif"),
        ("--class_context specific --classes base --dataset textures,colours", "specific"),
    ],
)
def test_tasks_that_cannot_be_learned_end_in_one_line(shell, options, said):
    code, _, err = shell("softcpt.py", "--shots", "1", "--epochs", "1", *options.split())
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and said in last and "Traceback" not in err


def test_a_task_of_one_class_is_named(shell, world, tmp_path):
    for part in "train/plain", "test/plain":
        shutil.copytree(world / "shapes/textures" / part, tmp_path / "single" / part)
    code, _, err = shell("softcpt.py", "--dataset", f"textures,{tmp_path / 'single'}")
    assert code == 2 and "single" in err and "at least two" in err


@pytest.mark.parametrize("options", [CATA, MT, {**CATA, "class_rate": 0.5}], ids=str)
def test_its_options_run(fit, options):
    assert fit(softcpt, dataset="textures,colours", n_ctx=2, **options) > 0


def test_fashion20_counts_by_the_mean_over_its_classes(fit, world, tmp_path):
    shown = Path(world, "shapes")
    fashion = shutil.copytree(shown / "textures", tmp_path / "fashion20_textures")
    other = shutil.copytree(shown / "colours", tmp_path / "colours")
    for folder in fashion, other:  # a class with half of the pictures of the others
        first = sorted(path for path in (folder / "test").iterdir() if path.is_dir())[0]
        sorted(first.iterdir())[0].unlink()
    model = f"local-dir:{shown}/clip"
    accuracy = fit(softcpt, dataset=f"{fashion},{other}", model=model)
    rows = {row["evaluated_on"]: row for row in fit.rows()}
    expected = rows[str(fashion)]["mean_class_accuracy"] + rows[str(other)]["accuracy"]
    assert accuracy == pytest.approx(expected / 2)
    assert rows[str(fashion)]["mean_class_accuracy"] != rows[str(fashion)]["accuracy"]
