"""The report's tables against numbers by hand, from results.json files written here."""

import json

import numpy as np
import pytest
from PIL import Image

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.tools import beside, figures, published, report


def record(method="coop", on="dtd", seed=1, value=60.0, config=None, **other):
    """A row of a results.json: two metrics 10 apart, zero-shot 50 (per class 40)."""
    row = {
        "method": method,
        "dataset": other.get("dataset", on),
        "evaluated_on": on,
        "classes": "all",
        "shots": 16,
        "seed": seed,
        "model": "",
        "accuracy": value,
        "mean_class_accuracy": value - 10,
        "zero_shot": 50.0,
        "mean_class_zero_shot": 40.0,
        "intra_class_variance": 0.2,
        "inter_class_variance": 0.1,
    }
    row |= other
    return row | {"config": {"transfer": "", "model": row["model"], **(config or {})}}


@pytest.fixture
def written(tmp_path):
    """written(row, ..., folder=NAME) writes rows below tmp_path as one run's results.json."""

    def write(*rows, folder="", options=""):
        row = rows[0]
        name = folder or f"{row['shots']}shots_seed{row['seed']}{options}"
        path = tmp_path / row["method"] / row["dataset"].replace("/", "%2F") / name / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
        return path

    return write


@pytest.fixture
def printed(tmp_path, capsys):
    """printed(...) runs the report: its lines, those of tables as lists of cells."""

    def tables(*flags):
        report.main(["--out", str(tmp_path), *flags])
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] or line for line in lines]

    return tables


def test_cells_are_mean_std_and_number_of_seeds_with_zero_shot_first(written, printed):
    written(record(value=60.0))
    written(record(seed=2, value=63.0))
    written(record(on="eurosat", value=81.0))
    lines = printed()
    assert lines[0] == "RN50, 16 shots"
    assert lines[2] == ["method", "dtd", "eurosat", "average"]
    assert lines[4] == ["zero-shot", "50.00", "50.00", "50.00"]
    assert lines[5] == ["coop", "61.50 ± 1.50 (2)", "81.00", "71.25"]


def test_a_method_that_lacks_a_data_set_has_no_average(written, printed):
    written(record())
    written(record(on="eurosat"))
    written(record("softcpt"))
    assert printed()[6] == ["softcpt", "60.00", "", ""]


def test_a_task_that_was_learned_is_not_transferred_to(written, tmp_path):
    written(record("softcpt", dataset="dtd,eurosat", config={"transfer": "dtd,food101"}))
    assert not report.read(tmp_path)[0].transferred


def test_options_come_from_the_folders_name(written, printed):
    config = {"n_ctx": 16, "task_n_ctx": 8, "baseline": "", "classes": "all"}
    written(record("softcpt", config=config), options="_task_n_ctx=8")
    written(record("softcpt", config=config | {"task_n_ctx": 4}))
    named = [line[0] for line in printed()[4:6]]
    labels = [line[0] for line in printed()[5:7]]
    assert named == ["zero-shot", "softcpt"]
    assert labels == ["softcpt", "softcpt task_n_ctx=8"]


def test_a_name_that_was_cut_says_all_options(written, printed):
    config = {"init": "a", "csc": False, "workers": 3}
    written(record(config=config), folder="x" * 150 + "0123456789abcdef")
    assert printed()[5][0] == "coop init=a csc=False"


def test_common_names_and_cuts_folders_as_the_report_reads_them():
    cfg = coop.Config(n_ctx=4, init="a photo of a", classes="base", model="ViT-B-16")
    folder = common.run_folder(cfg).name
    label = report.label_of("coop", vars(cfg), folder, transferred=False)
    assert label == "coop n_ctx=4 init=a photo of a"
    assert "classes=base" in report.label_of("coop", vars(cfg), folder, transferred=True)
    long = common.run_folder(coop.Config(init="word " * 50)).name
    assert report.CUT.fullmatch(long)


def test_the_papers_backbones_are_those_of_the_scripts():
    for method in coop, dpt, upt, enprompt, softcpt:
        name = method.__name__
        assert report.own_model(name, "dtd") == method.Config.usual_model
        assert report.own_model(name, "shapes,dtd") == "tiny CLIP"


def test_a_repeated_run_counts_once(written, printed):
    written(record(value=60.0), folder="16shots_seed1")
    written(record(value=60.0), folder="copy of 16shots_seed1")
    assert printed()[5] == ["coop", "60.00"]


def test_base_and_new_have_std_and_the_harmonic_mean_of_their_means(written, printed):
    for on, shift in ("dtd", 0), ("eurosat", 10):
        for seed, base, new in (1, 70, 50), (2, 74, 54):
            written(
                record(on=on, seed=seed, value=base + shift, classes="base"),
                record(on=on, seed=seed, value=new + shift, classes="new"),
            )
    lines = printed()
    assert lines[2] == ["method", "data set", "base", "new", "H"]
    H = 2 * 72 * 52 / (72 + 52)
    assert lines[7] == ["coop", "dtd", "72.00 ± 2.00 (2)", "52.00 ± 2.00 (2)", f"{H:.2f}"]
    H = 2 * 77 * 57 / (77 + 57)
    assert lines[9] == ["coop", "average", "77.00", "57.00", f"{H:.2f}"]


def test_a_transferred_prompt_stands_in_a_table_of_its_source(written, printed):
    config = {"transfer": "some/eurosat"}
    moved = record(on="some/eurosat", dataset="dtd", value=33.0, config=config)
    written(record(config=config), moved)
    lines = printed()
    assert lines[5] == ["coop", "60.00"]
    assert "RN50, 16 shots of dtd, evaluated on" in lines
    assert ["coop", "33.00"] in lines


def test_softcpt_counts_some_data_sets_by_the_mean_of_their_classes_and_says_so(written, printed):
    source = "caltech101,dtd,fashion20/1"
    written(*(record("softcpt", on=on, dataset=source) for on in source.split(",")))
    lines = printed()
    assert lines[5] == ["softcpt", "50.00", "60.00", "50.00", "53.33"]
    assert lines[-1].startswith("On caltech101, fashion20/1, SoftCPT's cells")


def test_a_file_that_is_no_record_is_named_and_left_out(written, printed, tmp_path, capsys):
    written(record())
    foreign = {"broken": "{", "number": "7", "list": "[1]", "config": '[{"config": null}]'}
    foreign["null"] = json.dumps([record(config={"transfer": None})])
    foreign["object"] = json.dumps({"a": 1})
    foreign["high"] = json.dumps([record() | {"accuracy": "high"}])
    for name, text in foreign.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    runs = report.read(tmp_path)
    errors = capsys.readouterr().err.splitlines()
    assert len(runs) == 1
    assert len(errors) == len(foreign)
    for name in foreign:
        assert any(str(tmp_path / name / "results.json") in line for line in errors)


def test_nothing_recorded_is_an_error(tmp_path):
    with pytest.raises(common.Error, match="no results.json"):
        report.read(tmp_path)


# ------------------------------------------------------------------------- the published numbers


def beside_table(lines):
    start = lines.index("Published numbers and runs of the same setting")
    return [line for line in lines[start:] if isinstance(line, list)][2:]


def test_published_value_ours_and_difference_stand_beside_each_other(written, printed):
    written(record(value=63.0))
    written(record(seed=2, value=64.0))
    written(record(on="eurosat", value=81.0))
    lines = printed()
    assert beside_table(lines) == [
        ["CoOp", "RN50", "16", "few-shot", "dtd", "coop"]
        + ["63.58", "63.50 ± 0.50 (2)", "-0.08", "L2"],
        ["CoOp", "RN50", "16", "few-shot", "eurosat", "coop", "83.53", "81.00", "-2.53", "L2"],
    ]
    assert lines[-1].startswith("L2: LoGoPrompt")


def test_a_difference_of_more_than_two_std_is_marked(written, printed):
    for seed, shift in (1, -0.5), (2, 0.5):
        written(record(seed=seed, value=63.58 + 0.9 + shift))
        written(record(on="eurosat", seed=seed, value=83.53 - 1.1 + shift))
    assert [line[8] for line in beside_table(printed())] == ["+0.90", "-1.10 *"]


def test_a_run_of_another_setting_stands_beside_nothing(written, printed):
    written(record(model="ViT-B-32"))
    written(record(shots=8))
    written(record(config={"n_ctx": 4}), options="_n_ctx=4")
    written(record("dpt"))
    base, new = (record(model="ViT-B-16", classes=half) for half in ("base", "new"))
    written(base, new)  # published are those of four vectors that start from words
    assert "Published numbers and runs of the same setting" not in printed()


def test_base_to_new_and_its_init_stand_beside_the_published_numbers(written, printed):
    config = {"init": "a photo of a"}
    setting = {"model": "ViT-B-16-quickgelu", "config": config}
    written(
        record(value=80.0, classes="base", **setting),
        record(value=40.0, classes="new", **setting),
        options="_init=a photo of a",
    )
    differences = {line[3]: line[8] for line in beside_table(printed())}
    assert differences == {"base": "+0.56", "new": "-1.18", "H": f"{3200 / 60 - 54.24:+.2f}"}


def test_means_need_all_their_data_sets(written):
    targets = published.MEANS["four variants"].split()
    config = {"transfer": ",".join(targets)}
    rows = [record(on="imagenet", model="ViT-B-16", config=config)]
    for k, name in enumerate(targets):
        transferred = {"dataset": "imagenet", "model": "ViT-B-16", "config": config}
        rows.append(record(on=name, value=50.0 + k, **transferred))
    path = written(*rows)
    setting = beside.Setting("coop", "ViT-B-16", 16, "from imagenet")
    found = beside.settings(report.read(path.parent))
    assert found[setting]["four variants"] == {1: 51.5}
    assert found[setting]["imagenet"] == {1: 60.0}
    path = written(*rows[:-1])
    assert "four variants" not in beside.settings(report.read(path.parent))[setting]


def test_a_suites_score_is_the_mean_over_its_tasks_and_needs_them_all(written):
    tasks = list(softcpt.GENERAL10)
    rows = [record("softcpt", on=on, dataset="general10", value=70.0) for on in tasks]
    path = written(*rows)
    setting = beside.Setting("softcpt", "RN50", 16, "general10")
    assert beside.settings(report.read(path.parent))[setting]["general10"] == {1: 66.0}
    assert "SoftCPT-NATA" in beside.comparison(report.read(path.parent))
    path = written(*rows[:-1])
    assert "general10" not in beside.settings(report.read(path.parent))[setting]


def test_the_published_table_is_sound():
    rows = published.published()
    assert len(rows) == len({row[:5] for row in rows})
    for row in rows:
        assert row.method in published.LABELS and row.source in published.SOURCES
        assert 0 < row.value < 100
    values = {row[:5]: row.value for row in rows}
    few = [value for key, value in values.items() if key[0] == "CoOp" and key[3] == "few-shot"]
    assert np.mean(few[:-1]) == pytest.approx(few[-1], abs=0.02)
    for method, *setting, protocol, name in list(values):
        if protocol == "H":
            base, new = (values[method, *setting, half, name] for half in ("base", "new"))
            assert values[method, *setting, "H", name] == pytest.approx(
                report.harmonic(base, new), abs=0.02
            )
    targets = [
        values["CoOp", "ViT-B-16", 16, "from imagenet", name]
        for name in published.MEANS["four variants"].split()
    ]
    assert np.mean(targets) == pytest.approx(59.28, abs=0.01)


# ------------------------------------------------------------------------------------ the figures


def test_upts_study_has_each_gain_at_its_own_variance(written, printed):
    for side in "text", "visual":
        for seed, value in (1, 52.0), (2, 54.0):
            config = {"side": side}
            options = f"_side={side}"
            written(record("upt", seed=seed, value=value, config=config), options=options)
    lines = printed()
    table = lines[lines.index("UPT's study") + 4 :]
    gain = "3.00 ± 1.00 (2)"
    run = "upt side={}, ViT-B-16, 16 shots"
    assert table[0] == [run.format("text"), "dtd", "0.200 within classes", gain]
    assert table[1] == [run.format("visual"), "dtd", "0.100 between classes", gain]


def test_the_papers_points_are_read_by_side():
    assert published.figure_1("text")[0] == (0.204, 8.8)
    assert published.figure_1("visual")[8] == (0.146, 9.4)
    assert len(published.figure_1("text")) == 11


def test_a_curve_is_over_the_seeds_that_have_all_data_sets(written, tmp_path):
    written(record(value=60.0))
    written(record(on="eurosat", value=80.0))
    written(record(seed=2, value=99.0))
    runs = report.read(tmp_path)
    assert figures.curve(runs, ("coop", "RN50"), ["dtd", "eurosat"]) == [(16, 70.0, 0.0)]
    assert figures.curve(runs, ("coop", "RN50"), ["dtd"]) == [(16, 79.5, 19.5)]


def test_figures_are_drawn_and_named(written, printed, tmp_path):
    pytest.importorskip("matplotlib")
    for shots in 1, 4, 16:
        written(record(shots=shots, value=50.0 + shots))
    with pytest.raises(common.Error, match="--side text"):
        printed("--study", str(tmp_path / "study.png"))
    written(record("upt", config={"side": "text"}), options="_side=text")
    for flag in "--plot", "--study":
        file = str(tmp_path / "new folder" / f"{flag[2:]}.png")
        assert printed(flag, file)[-1] == f"drawn: {file}"
        assert np.asarray(Image.open(file)).std() > 0
    with pytest.raises(common.Error, match="accuracy.xyz"):
        printed("--plot", str(tmp_path / "accuracy.xyz"))


def test_without_matplotlib_a_figure_is_refused_in_one_line(written, printed, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    written(record())
    with pytest.raises(common.Error, match="pip install matplotlib"):
        printed("--plot", "accuracy.png")
