"""SoftCPT: contexts from task names, the task-masked loss, class sampling, the official repeated
steps, and the score over tasks."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import common
import softcpt
from tests import conftest
from tests.conftest import (
    NAMES,
    close,
    gradients,
    match_gradients,
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
    train = [(image, y % 2, OTHER[y % 2]) for image, y, _ in toy(5).train]
    second = common.Dataset("colours", train, train, OTHER, "a photo of a {} thing.")
    return softcpt.tasks_of(softcpt.Config(), [toy(), second])


def initial(clip, **options):
    """(Config, SoftContext at its initial value) for two()."""
    return conftest.initial(softcpt, clip, two(), **TINY | options)


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
    cfg, prompt = initial(odd, **options)
    (step,), _ = rehearse(softcpt, cfg, odd, two(), prompt)
    w = unit(by_hand(odd, prompt))
    for task, own in zip(two().sets, (slice(0, 3), slice(3, 5)), strict=True):
        found = softcpt.classifier(cfg, odd, prompt, two(), task)
        assert torch.allclose(found, w[own], atol=1e-5)
    images, labels = next(common.Loader(cfg, odd, two().union()).epoch(0))
    logits = odd.logit_scale.exp() * unit(odd.encode_image(images)) @ w.T
    expected = masked_sum(logits, labels, COLUMN_TASK) / 11
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    match_gradients(step, expected, prompt)
    assert all(p.grad is None and not p.requires_grad for p in odd.parameters())


def test_a_baseline_has_no_class_context_and_samples_no_classes(odd, monkeypatch):
    monkeypatch.setattr(softcpt, "sample_classes", None)
    cfg, prompt = initial(odd, **MT | CATA, class_rate=0.5)
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


def test_class_sampling_keeps_the_batchs_classes_and_a_share_of_the_others():
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
        assert labels.device == column_task.device == torch.device("cpu")
        asked.append(rate)
        return sample(labels, column_task, rate)

    monkeypatch.setattr(softcpt, "sample_classes", sample_classes)
    cfg, prompt = initial(odd, **CATA | options)
    rehearse(softcpt, cfg, odd, two(), prompt)
    assert asked == ([rate] if rate else [])
    asked.clear()
    cfg, prompt = initial(odd, **NATA | options)  # without V all classes are encoded
    rehearse(softcpt, cfg, odd, two(), prompt)
    assert asked == []


@pytest.mark.parametrize("options", [CATA, CSTA, CSTS], ids=str)
def test_a_step_with_sampled_classes_is_the_loss_over_their_columns(odd, monkeypatch, options):
    columns, tasks = torch.tensor([1, 2, 3, 4]), two()
    train = [item for item in tasks.sets[0].train if item[1] > 0]
    tasks.sets[0] = tasks.sets[0]._replace(train=train)
    monkeypatch.setattr(softcpt, "sample_classes", lambda labels, of, rate: columns)
    cfg, prompt = initial(odd, class_rate=0.5, **options)
    (step,), _ = rehearse(softcpt, cfg, odd, tasks, prompt)
    images, labels = next(common.Loader(cfg, odd, tasks.union()).epoch(0))
    w = unit(by_hand(odd, prompt))[columns]
    logits = odd.logit_scale.exp() * unit(odd.encode_image(images)) @ w.T
    expected = masked_sum(logits, labels - 1, COLUMN_TASK[columns]) / len(labels)
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("columns", [[4, 1, 0], [3], [1, 1, 4], range(5)], ids=str)
@pytest.mark.parametrize("options", [NATS, CATA, CSTS], ids=str)
def test_selected_words_give_the_features_of_their_columns(odd, options, columns):
    (cfg, prompt), columns = initial(odd, **options), torch.tensor(columns)
    words = softcpt.words_of(cfg, odd, NAMES + OTHER, TITLES, COLUMN_TASK)
    some = words.select(columns)
    assert close(prompt(odd, some), prompt(odd, words)[columns])
    assert some.names.tail.shape[1] == words.names.eot[columns].max() + 1  # none longer than needed


def test_official_steps_are_three_of_sgd_with_one_gradient(odd):
    cfg, prompt = initial(odd, official=True)
    steps, rates = rehearse(softcpt, cfg, odd, two(), prompt, epochs=[0, 1], moving=True)
    names, values = zip(*steps[0].before.items(), strict=True)
    sgd = torch.optim.SGD(values, momentum=0.9, weight_decay=5e-4)
    for step, (rate,) in zip(steps, rates, strict=True):
        sgd.param_groups[0]["lr"] = rate
        for name, p in zip(names, values, strict=True):
            p.grad = step.gradients[name]
        for _ in range(3):
            sgd.step()
    for name, p in zip(names, values, strict=True):
        assert torch.allclose(prompt.get_parameter(name), p, rtol=1e-6)


def test_official_steps_are_refused_where_the_loss_is_scaled(odd):
    cfg, prompt = initial(odd, official=True)
    with pytest.raises(common.Error, match="--precision fp32"):
        softcpt.train(cfg, SimpleNamespace(half=torch.float16), two(), prompt)


@pytest.mark.parametrize(
    "options, official, times",
    [(NATA, True, 3), (NATS, True, 3), (CATA, True, 4), (CSTS, True, 4)]
    + [(NATA, False, 1), (CATA, False, 1), (MT, True, 1), (CA, True, 1)],
    ids=str,
)
def test_official_repeats_steps_and_schedule(odd, options, official, times):
    cfg, prompt = initial(odd, official=official, **options)
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
        prompt = softcpt.SoftContext(cfg, SimpleNamespace(d_t=512, D=1024), 8, 208)
    assert sum(p.numel() for p in prompt.parameters()) == count
    assert "meta.bias" not in prompt.state_dict()


def test_initial_values_are_small_normal_noise(odd):
    _, prompt = initial(odd, n_ctx=20, task_n_ctx=60, class_n_ctx=60, **CSTS)
    for table in prompt.parameters():
        assert table.std().item() == pytest.approx(0.02, rel=0.1)


def test_labels_of_the_second_task_begin_at_its_first_column():
    tasks, union = two(), two().union()
    labels = [y for _, y, _ in union.train]
    assert labels == [0, 1, 2, 0, 1, 2, 3, 4, 3, 3, 4]
    assert tasks.first == [0, 3] and torch.equal(tasks.column_task, COLUMN_TASK)
    assert all(union.classnames[y] == name for _, y, name in union.train)


def test_batches_mix_the_tasks(odd):
    union = two().union()
    labels = [y for _, y, _ in union.train]
    (order,) = common.Loader(softcpt.Config(batch_size=11), odd, union).order(0)
    tasks = [labels[i] > 2 for i in order]
    assert tasks != sorted(tasks) and sum(tasks) == 5


def test_an_unknown_task_has_the_context_of_its_name(odd):
    new = toy()._replace(name="birds", classnames=["owl", "tit"])
    for options in NATA, CATA:
        cfg, prompt = initial(odd, **options)
        x = plain_prompts(odd, ["birds classification"] * 2, prompt.task_ctx.expand(2, -1, -1))
        if options is CATA:
            f_c = plain_prompts(odd, ["owl", "tit"], prompt.class_ctx.expand(2, -1, -1))
            x = torch.cat([f_c, x], 1)
        V = (x @ prompt.meta.weight.T).reshape(2, 3, 32)
        expected = unit(plain_prompts(odd, ["owl", "tit"], V))
        found = softcpt.classifier(cfg, odd, prompt, two(), new)
        assert torch.allclose(found, expected, atol=1e-5)


def test_new_classes_of_a_known_task_have_its_context(odd):
    cfg, prompt = initial(odd, **NATS)
    new = two().sets[1]._replace(classnames=["owl", "tit"])
    f_t = plain_prompts(odd, TITLES[1:], prompt.task_ctx[1:])
    V = (f_t @ prompt.meta.weight.T).reshape(1, 3, 32).expand(2, -1, -1)
    found = softcpt.classifier(cfg, odd, prompt, two(), new)
    assert torch.allclose(found, unit(plain_prompts(odd, ["owl", "tit"], V)), atol=1e-5)
    cfg, prompt = initial(odd, **CA)
    found = softcpt.classifier(cfg, odd, prompt, two(), new)
    expected = plain_prompts(odd, ["owl", "tit"], prompt.ctx[1].expand(2, -1, -1))
    assert torch.allclose(found, unit(expected), atol=1e-5)


@pytest.mark.parametrize("name", ["fashion20_textures", "oxford_pets"])
def test_the_score_is_the_mean_over_tasks_of_each_tasks_metric(
    fit, rendered, tmp_path, monkeypatch, capsys, name
):
    folder = shutil.copytree(rendered / "shapes" / "textures", tmp_path / name)
    for texture in "plain", "striped", "dotted":
        (folder / "test" / texture / "000.png").unlink()
    if name in softcpt.PER_CLASS:
        monkeypatch.setattr(softcpt, "PER_CLASS", [str(folder)])
    score = fit(softcpt, dataset=f"textures,colours,{folder}", n_ctx=1, epochs=2)
    rows = {row["evaluated_on"]: row for row in fit.rows()}
    overall, mean = rows[str(folder)]["accuracy"], rows[str(folder)]["mean_class_accuracy"]
    assert overall != mean
    expected = (rows["textures"]["accuracy"] + rows["colours"]["accuracy"] + mean) / 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert f": {expected:.2f} (zero-shot" in last and "mean over classes" in last
    assert score == pytest.approx(expected)


def test_the_official_tasks_their_names_and_those_scored_by_class():
    assert softcpt.PER_CLASS == ["caltech101", "fgvc_aircraft", "oxford_flowers", "oxford_pets"]
    order = "caltech101 dtd eurosat fgvc_aircraft food101 oxford_flowers oxford_pets stanford_cars"
    assert list(softcpt.GENERAL10) == [*order.split(), "sun397", "ucf101"]
    assert softcpt.title_of("dtd") == "texture classification"
    assert softcpt.title_of("a/my_birds") == "my birds classification"


@pytest.mark.parametrize(
    "tasks, titles",
    [("", ["textures classification", "colours classification"])]
    + [("surface type, hue ", ["surface type", "hue"])],
)
def test_task_names_come_from_the_option_or_the_data_set(rendered, tasks, titles):
    cfg = softcpt.Config(dataset="textures,colours", tasks=tasks, data=str(rendered), shots=1)
    found = softcpt.load_tasks(cfg)
    assert found.titles == titles and found.first == [0, 4]
    assert found.column_task.tolist() == [0] * 4 + [1] * 8
    assert [len(d.train) for d in found.sets] == [4, 8]  # one image of a class


@pytest.mark.parametrize(
    "options, said",
    [
        ({"dataset": "textures,textures"}, "textures"),
        ({"dataset": "textures,nowhere"}, "nowhere"),
        ({"tasks": "one,two,three"}, "--tasks"),
        ({"task_context": "specific", "transfer": "shapes_negative"}, "specific"),
        ({"class_context": "specific", "classes": "base"}, "specific"),
        ({"baseline": "one per task", "transfer": "shapes_negative"}, "specific"),
    ],
    ids=str,
)
def test_tasks_that_cannot_be_learned_are_refused_before_training(fit, monkeypatch, options, said):
    monkeypatch.setattr(softcpt, "train", None)
    with pytest.raises(common.Error, match=said):
        fit(softcpt, **{"dataset": "textures,colours"} | options)


@pytest.mark.parametrize("options", [CATA, MT, {**CATA, "class_rate": 0.5}], ids=str)
def test_its_options_run(fit, options):
    assert fit(softcpt, dataset="textures,colours", n_ctx=2, **options) > 0
