"""SoftCPT: contexts from task names, the task-masked loss, class sampling, the release's repeated
steps, and the score over tasks."""

import copy
import math
import shutil

import pytest
import torch

import common
import softcpt
from tests.conftest import NAMES, gradients, plain_prompts, rates, rehearsed, toy, unit, untrained

VARIANTS = ["NATA", "NATS", "CATA", "CSTA", "CATS", "CSTS"]
TINY = {"n_ctx": 3, "task_n_ctx": 2, "class_n_ctx": 1}
OTHER = ["red", "blue"]


def two():
    """Two tasks of three and two classes."""
    first, second = toy(), toy(5)
    train = [(picture, y % 2, OTHER[y % 2]) for picture, y, _ in second.train]
    return [first, second._replace(name="colours", train=train, test=train, classnames=OTHER)]


def by_hand(clip, prompt, variant):
    """(5, D) features of the classes of both tasks written out."""
    of = torch.tensor([0, 0, 0, 1, 1])
    if variant in ("MT", "CA"):
        V = prompt.ctx[of] if variant == "CA" else prompt.ctx.expand(5, -1, -1)
        return plain_prompts(clip, NAMES + OTHER, V)
    titles = ["toy classification", "colours classification"]
    f_t = plain_prompts(clip, titles, prompt.task_ctx.expand(2, -1, -1))
    x = f_t[of]
    if variant[0] == "C":
        f_c = plain_prompts(clip, NAMES + OTHER, prompt.class_ctx.expand(5, -1, -1))
        x = torch.cat([f_c, x], 1)  # the class comes first
    V = (x @ prompt.meta.weight.T).reshape(5, TINY["n_ctx"], -1)
    return plain_prompts(clip, NAMES + OTHER, V)


def test_general10_samples_a_tenth_of_the_other_classes_and_lists_none(odd, monkeypatch):
    asked = []
    whole = lambda labels, of, rate: asked.append(rate) or torch.arange(len(of))  # noqa: E731
    monkeypatch.setattr(softcpt, "sample_classes", whole)
    for dataset, rate, expected in (
        ("general10", 0.0, 0.1),
        ("general10", 0.5, 0.5),
        ("a,b", 0.0, 1),
    ):
        options = {"variant": "CATA", "dataset": dataset, "class_rate": rate, "epochs": 1, **TINY}
        rehearsed(softcpt, odd, two(), **options)
        assert asked == [expected] * (expected < 1)
        asked.clear()


@pytest.mark.parametrize("variant", [*VARIANTS, "MT", "CA"])
def test_every_variant_is_the_equations_by_hand(odd, variant):
    losses, prompt = rehearsed(softcpt, odd, two(), variant=variant, epochs=1, **TINY)
    T, s = by_hand(odd, prompt, variant), odd.logit_scale.exp()
    f, own = unit(torch.randn(4, 24)), [slice(0, 3), slice(3, 5)]
    _, predictor = untrained(softcpt, odd, two(), variant=variant, **TINY)
    for task, data in enumerate(two()):  # and a test image meets its own task's classes only
        expected = s * f @ unit(T[own[task]]).T
        assert torch.allclose(predictor(data)(f, None), expected, atol=2e-3)
    union = toy()._replace(train=two()[0].train + [(p, y + 3, c) for p, y, c in two()[1].train])
    f, y = next(common.loader(softcpt.Config(), odd, union, frozen=True)(0))
    total = 0
    for task in 0, 1:  # as in the release: summed over each task's own columns, then divided by B
        mine = (y >= 3) == bool(task)
        logits = (s * f[mine] @ unit(T[own[task]]).T).log_softmax(1)
        total = total - sum(row[k - 3 * task] for row, k in zip(logits, y[mine], strict=True))
    assert len(losses) == 1 and losses[0].item() == pytest.approx(total.item() / 11, rel=1e-4)
    pairs = [gradients(loss, list(prompt.parameters())) for loss in (losses[0], total / 11)]
    for a, b in zip(*pairs, strict=True):
        assert b.abs().max() > 0 and torch.allclose(a, b, atol=1e-3 * b.abs().max().item())


def test_the_loss_of_a_mixed_batch_by_hand():
    logits = torch.tensor([[1.0, 2, 3, 9, 9], [8.0, 8, 8, 1, 0], [0.0, 1, 0, 5, 5]])
    logits.requires_grad_()
    labels, of = torch.tensor([0, 4, 1]), torch.tensor([0, 0, 0, 1, 1])
    loss = softcpt.task_loss(logits, labels, of)
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


def test_a_step_with_sampled_classes_is_the_loss_over_their_columns(odd, monkeypatch):
    columns = torch.tensor([0, 1, 2, 4])
    data = two()
    data[1] = data[1]._replace(train=[item for item in data[1].train if item[1] == 1])
    monkeypatch.setattr(softcpt, "sample_classes", lambda labels, of, rate: columns)
    options = {"variant": "CSTA", "epochs": 1, "class_rate": 0.5, **TINY}
    losses, prompt = rehearsed(softcpt, odd, data, **options)
    T, s = by_hand(odd, prompt, "CSTA"), odd.logit_scale.exp()
    union = toy()._replace(train=data[0].train + [(p, y + 3, c) for p, y, c in data[1].train])
    f, y = next(common.loader(softcpt.Config(), odd, union, frozen=True)(0))
    logits = (s * f @ unit(T[:3]).T)[y < 3]
    expected = torch.nn.functional.cross_entropy(logits, y[y < 3], reduction="sum") / len(y)
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-4)  # one column: no loss


@pytest.mark.parametrize("times", [1, 3, 4])
def test_repeated_steps_are_sgd_steps_with_one_gradient(times):
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    q = copy.deepcopy(p)
    optimizer, _ = common.sgd_cosine([p], 0.1, 10, warmup=0)
    plain = torch.optim.SGD([q], 0.1, momentum=0.9, weight_decay=5e-4)
    for k in range(3):
        common.step(((k + 1) * p**3).sum(), optimizer, times)
        plain.zero_grad()
        ((k + 1) * q**3).sum().backward()
        for _ in range(times):
            plain.step()
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "variant, official, times",
    [("NATA", True, 3), ("NATS", True, 3), ("CATA", True, 4), ("CSTS", True, 4)]
    + [("NATA", False, 1), ("MT", True, 1), ("CA", True, 1)],
)
def test_official_repeats_steps_and_schedule(odd, monkeypatch, variant, official, times):
    options, seen = {"variant": variant, "official": official, **TINY}, []

    def step(loss, optimizer, times=1):
        seen.append(times)
        optimizer.step()  # without gradients: moves nothing

    rate = [r[0] for r in rates(softcpt, odd, two(), **options)]
    assert len(rate) == 50 and rate[0] == 1e-5
    for e in range(1, 50):
        expected = 0.001 * (1 + math.cos(math.pi * (times * e - 1) / 50))
        assert rate[e] == pytest.approx(expected, abs=1e-9)
    printed = {3: {1: 0.001992, 8: 0.001125, 12: 4.1e-4, 16: 1.8e-5, 25: 9.4e-4, 49: 3.1e-5}}
    for e, value in printed.get(times, {}).items():
        assert rate[e] == pytest.approx(value, rel=0.05)
    assert times != 4 or rate[49] == pytest.approx(0.00195, rel=0.01)
    monkeypatch.setattr(common, "training", lambda *args: range(1))
    monkeypatch.setattr(common, "step", step)
    softcpt.train(softcpt.Config(**options), odd, two())
    assert set(seen) == {times}


@pytest.mark.parametrize(
    "variant, m, count",
    [("NATA", 8, 8_392_704), ("NATA", 4, 1024 * 8192 + 4 * 512), ("NATS", 8, 8_421_376)]
    + [("CATA", 4, 2048 * 8192 + 8 * 512), ("CSTS", 4, 2048 * 8192 + (8 + 208) * 4 * 512)]
    + [("MT", 4, 16 * 512), ("CA", 4, 8 * 16 * 512)],
)
def test_parameter_counts_are_those_of_rn50(variant, m, count):
    cfg = softcpt.Config(variant=variant, task_n_ctx=m)
    with torch.device("meta"):
        prompt = softcpt.SoftContext(cfg, 512, 1024, 8, 208)
    assert sum(p.numel() for p in prompt.parameters()) == count
    assert "meta.bias" not in prompt.state_dict()


def test_initial_values_are_small_normal_noise(odd):
    prompt, _ = untrained(softcpt, odd, two(), variant="CSTS", n_ctx=20, task_n_ctx=60)
    for table in prompt.meta.weight, prompt.task_ctx:
        assert table.std().item() == pytest.approx(0.02, rel=0.1)


def test_batches_mix_the_tasks_and_a_task_meets_new_ones_by_name(odd, monkeypatch):
    seen, plain = [], softcpt.task_loss

    def task_loss(logits, labels, column_task):
        seen.append(column_task[labels])
        return plain(logits, labels, column_task)

    monkeypatch.setattr(softcpt, "task_loss", task_loss)
    rehearsed(softcpt, odd, two(), epochs=1, batch_size=11, **TINY)
    assert seen[0].bincount().tolist() == [6, 5] and seen[0].tolist() != sorted(seen[0].tolist())
    prompt, predictor = untrained(softcpt, odd, two(), **TINY)
    new = toy()._replace(name="birds", classnames=["owl", "tit"])
    f_t = plain_prompts(odd, ["birds classification"], prompt.task_ctx)
    V = (f_t @ prompt.meta.weight.T).reshape(1, 3, 32).expand(2, -1, -1)
    f = unit(torch.randn(4, 24))
    expected = odd.logit_scale.exp() * f @ unit(plain_prompts(odd, ["owl", "tit"], V)).T
    assert torch.allclose(predictor(new)(f, None), expected, atol=2e-3)
    for variant in "NATS", "CSTA", "CA":
        with pytest.raises(common.Error, match=variant):
            untrained(softcpt, odd, two(), variant=variant, **TINY)[1](new)


def test_the_score_is_the_mean_over_tasks_of_each_tasks_metric(
    fit, world, tmp_path, monkeypatch, capsys
):
    shutil.copytree(world / "shapes" / "textures", tmp_path / "lopsided")
    for name in "plain", "striped", "dotted":
        (tmp_path / "lopsided" / "test" / name / "000.png").unlink()
    monkeypatch.setattr(softcpt, "PER_CLASS", ["lopsided"])
    score = fit(softcpt, dataset=f"textures,colours,{tmp_path / 'lopsided'}", n_ctx=1, epochs=2)
    rows = {row["evaluated_on"]: row for row in fit.rows()}
    overall, mean = rows["lopsided"]["accuracy"], rows["lopsided"]["mean_class_accuracy"]
    assert overall != mean
    expected = (rows["textures"]["accuracy"] + rows["colours"]["accuracy"] + mean) / 3
    assert f": {expected:.2f} (zero-shot" in capsys.readouterr().out.splitlines()[-1]
    assert score == pytest.approx(expected)


def test_the_released_tasks_are_scored_by_their_metrics():
    names = [*softcpt.GENERAL10, "fashion20 hat style"]
    mean = {"caltech101", "fgvc_aircraft", "oxford_flowers", "oxford_pets", "fashion20 hat style"}
    assert {name for name in names if softcpt.scored_per_class(name)} == mean
    order = "caltech101 dtd eurosat fgvc_aircraft food101 oxford_flowers oxford_pets stanford_cars"
    assert softcpt.GENERAL10 == [*order.split(), "sun397", "ucf101"]


def test_task_names_come_from_the_option_a_file_or_the_data_set(tmp_path):
    (tmp_path / "names.txt").write_text("bird species\n\nboat type\n")
    for tasks in "bird species, boat type", str(tmp_path / "names.txt"):
        cfg = softcpt.Config(tasks=tasks)
        assert softcpt.task_titles(cfg, ["a", "b"]) == ["bird species", "boat type"]
    titles = softcpt.task_titles(softcpt.Config(), ["dtd", "my_birds"])
    assert titles == ["texture classification", "my birds classification"]


@pytest.mark.parametrize(
    "options, said",
    [
        ("--dataset textures,textures", "textures"),
        ("--dataset textures,nowhere", "nowhere"),
        ("--tasks one,two", "--tasks"),
        ("--variant NATS --transfer shapes_negative --dataset textures,colours", "NATS"),
    ],
)
def test_tasks_that_cannot_be_learned_end_in_one_line(shell, options, said):
    code, _, err = shell("softcpt.py", "--epochs", "1", *options.split())
    lines = [line for line in err.splitlines() if "epoch/s" not in line and line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_a_task_of_one_class_is_named(shell, world, tmp_path):
    for part in "train/plain", "test/plain":
        shutil.copytree(world / "shapes/textures" / part, tmp_path / "single" / part)
    code, _, err = shell("softcpt.py", "--dataset", f"textures,{tmp_path / 'single'}")
    assert code == 2 and "single" in err and "two classes" in err
