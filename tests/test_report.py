"""The report's tables against numbers by hand, from rows written here."""

import json

import numpy as np
import pytest
from PIL import Image

import common
import coop
import softcpt
from tests.conftest import METHODS
from tests.tools import plots, published, report


@pytest.fixture
def written(tmp_path):
    """written(...) writes a row of results below tmp_path, 10 points less over classes and with
    zero-shot CLIP at 50 (40); other keywords are options. folder: the run's, by default its own."""

    def write(method="coop", on="dtd", value=60.0, half="all", folder="", facts=(), **options):
        made = METHODS[method].Config(**{"dataset": on, "device": "cpu"} | options)
        row = {"method": method, "config": vars(made), "evaluated_on": on, "classes": half}
        row |= {"accuracy": value, "mean_class_accuracy": value - 10}
        row |= {"zero_shot": 50.0, "mean_class_zero_shot": 40.0}
        row |= {"n_test": 100, "n_train": 16, "activation": "QuickGELU"}
        code = {"source": "c0de", "precision": "fp32"}
        row |= {"trained": code | {"losses": [2.0, 1.0]} | dict(facts), "evaluated": code}
        run = tmp_path / (folder or common.run_folder(made).relative_to("runs"))
        path = run / "results" / f"{common.file_name(on)}-{half}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row))
        return path

    return write


@pytest.fixture
def printed(tmp_path, capsys):
    """printed(...) runs the report: its lines, those of tables as lists of cells."""

    def tables(*flags):
        capsys.readouterr()
        report.main(["--out", str(tmp_path), *flags])
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] or line for line in lines]

    return tables


def test_cells_are_mean_std_and_number_of_seeds_with_zero_shot_first(written, printed):
    written(value=60.0)
    written(value=63.0, seed=2)
    written(on="eurosat", value=81.0)
    lines = printed()
    assert lines[0] == "RN50, 16 shots"
    assert lines[2] == ["method", "dtd", "eurosat", "average"]
    assert lines[4] == ["zero-shot", "50.00", "50.00", "50.00"]
    assert lines[5] == ["coop", "61.50 ± 1.50 (2)", "81.00", "70.50"]  # of seed 1, which has both


def test_the_records_that_zero_shot_clip_writes_are_read(rendered, printed, tmp_path):
    where = {"dataset": "textures", "data": str(rendered), "out": str(tmp_path), "device": "cpu"}
    one = common.zero_shot(common.ZeroShot(**where))
    eight = common.zero_shot(common.ZeroShot(ensemble=True, **where))
    lines = printed()
    assert lines[4] == ["zero-shot", f"{one:.2f}"]
    assert lines[5] == ["zero_shot ensemble=True", f"{eight:.2f}"]


def test_a_method_that_lacks_a_data_set_has_no_average(written, printed):
    written()
    written(on="eurosat")
    written("softcpt")
    assert printed()[6] == ["softcpt", "60.00", "", ""]


def test_options_come_from_the_rows_config_whatever_the_folder_is_called(written, printed):
    written(value=60.0)
    written(value=70.0, n_ctx=4, folder="16shots_seed1_copy")
    written(value=80.0, n_ctx=4, seed=2, folder="my best run")
    assert printed()[5:7] == [["coop", "60.00"], ["coop n_ctx=4", "75.00 ± 5.00 (2)"]]


def test_an_option_that_a_row_lacks_is_shown(written, printed):
    path = written(value=70.0, seed=2)
    row = json.loads(path.read_text())
    del row["config"]["csc"]
    path.write_text(json.dumps(row | {"config": row["config"] | {"width": 3}}))
    written(value=60.0)
    assert printed()[5:7] == [["coop", "60.00"], ["coop csc=? width=3", "70.00"]]


def test_a_copied_folder_counts_once_and_the_latest_row_wins(written, printed, capsys):
    written(value=60.0)
    written(value=60.0, folder="copy of it")
    assert printed()[5] == ["coop", "60.00"]
    path = written(value=62.0, folder="trained again")
    assert printed()[5] == ["coop", "62.00"]
    report.read(path.parents[2])
    assert f"{path} replaces an earlier row" in capsys.readouterr().err


def test_a_base_runs_transfer_is_no_few_shot_result(written, printed):
    written(value=64.5)
    for half in "base", "new":
        written(on="eurosat", value=80.0, half=half, classes="base", transfer="dtd")
    written(on="dtd", value=37.5, dataset="eurosat", classes="base", transfer="dtd")
    lines = printed()
    assert lines[5] == ["coop", "64.50"]
    start = lines.index("RN50, 16 shots of eurosat, base classes, transferred to")
    assert lines[start + 5] == ["coop", "37.50"]


@pytest.mark.parametrize("transfer", ["dtd,some/food", "dtd, some/food"])
def test_a_transferred_prompt_stands_in_a_table_of_its_source(written, printed, transfer):
    for on in "eurosat", "dtd", "some/food":
        written(on=on, value=33.0, dataset="eurosat", transfer=transfer)
    lines = printed()
    assert lines[2] == ["method", "eurosat"]
    start = lines.index("RN50, 16 shots of eurosat, transferred to")
    assert lines[start + 2] == ["method", "dtd", "some/food", "average"]


def test_lists_of_tasks_are_not_seeds(written, printed):
    for on, value in ("dtd", 60.0), ("eurosat", 70.0):
        written("softcpt", on, value, dataset="dtd,eurosat")
        written("softcpt", on, value + 4, dataset="dtd,eurosat", seed=2)
        written("softcpt", on, 10.0, dataset="eurosat,dtd", seed=3)
    lines = printed()
    start = lines.index("RN50, 16 shots of each of dtd,eurosat")
    numbers = ["62.00 ± 2.00 (2)", "72.00 ± 2.00 (2)", "67.00 ± 2.00 (2)"]
    assert lines[start + 5] == ["softcpt", *numbers]
    start = lines.index("RN50, 16 shots of each of eurosat,dtd")
    assert lines[start + 5] == ["softcpt", "10.00", "10.00", "10.00"]


@pytest.mark.parametrize("name", ["source", "precision"])
def test_a_mean_over_other_code_or_precision_is_marked(written, printed, name):
    written(value=60.0, facts={name: "this"})
    written(value=60.0, facts={name: "that"}, seed=2)
    lines = printed()
    assert lines[5] == ["coop", "60.00 ± 0.00 (2) †"]
    fact = {"source": "code"}.get(name, name)
    assert lines[7] == f"† coop, dtd: the seeds differ in {fact}: seed 1 this, seed 2 that."


def test_base_and_new_have_std_and_the_harmonic_mean_of_their_means(written, printed):
    for on, shift in ("dtd", 0), ("eurosat", 10):
        for seed, base, new in (1, 70, 50), (2, 74, 54):
            written(on=on, value=base + shift, half="base", classes="base", seed=seed)
            written(on=on, value=new + shift, half="new", classes="base", seed=seed)
    lines = printed()
    assert lines[0] == "RN50, 16 shots, base to new"
    assert lines[2] == ["method", "data set", "base", "new", "H"]
    H = 2 * 72 * 52 / (72 + 52)
    assert lines[4] == ["coop", "dtd", "72.00 ± 2.00 (2)", "52.00 ± 2.00 (2)", f"{H:.2f}"]
    H = 2 * 77 * 57 / (77 + 57)
    average = ["77.00 ± 2.00 (2)", "57.00 ± 2.00 (2)", f"{H:.2f}"]
    assert lines[6] == ["coop", "average", *average]


def test_softcpt_counts_some_data_sets_by_the_mean_of_their_classes_and_says_so(written, printed):
    source = "caltech101,dtd,fashion20/1"
    for on in source.split(","):
        written("softcpt", on, dataset=source)
    lines = printed()
    assert lines[5] == ["softcpt", "50.00", "60.00", "50.00", "53.33"]
    assert lines[-1].startswith("On caltech101, fashion20/1, SoftCPT's cells")


def test_models_are_those_of_the_scripts(written):
    for name, method in METHODS.items():
        for dataset, model in ("dtd", method.Config.usual_model), ("shapes,dtd", "tiny CLIP"):
            config = vars(method.Config(dataset=dataset))
            assert report.setting_of(name, config, "dtd", "all").model == model
    slash = vars(coop.Config(model="ViT-B/16"))
    assert report.setting_of("coop", slash, "dtd", "all").model == "ViT-B-16"


def test_real_rows_are_read(fit, tmp_path, printed):
    fit(coop, dataset="textures", transfer="colours")
    lines = printed()
    accuracy, moved = (f"{row['accuracy']:.2f}" for row in fit.rows())
    assert lines[0] == "tiny CLIP, 1 shots"
    assert lines[5] == ["coop epochs=1", accuracy]
    assert lines[-1] == ["coop epochs=1", moved]


def test_a_file_that_is_no_row_is_named_and_left_out(written, tmp_path, capsys):
    path = written()
    row = json.loads(path.read_text())
    foreign = {"broken": "{", "number": "7", "high": json.dumps(row | {"accuracy": "high"})}
    for name, text in foreign.items():
        (path.parent / f"{name}.json").write_text(text)
    assert len(report.read(tmp_path)) == 1
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == len(foreign)
    assert all(str(path.parent / f"{name}.json") in errors for name in foreign)
    with pytest.raises(common.Error, match="no results"):
        report.read(tmp_path / "absent")


def test_json_has_every_mean(written, tmp_path, capsys):
    written(value=60.0)
    written(value=62.0, seed=2)
    report.main(["--out", str(tmp_path), "--json"])
    (mean,) = json.loads(capsys.readouterr().out)
    assert (mean["method"], mean["evaluated_on"], mean["seeds"]) == ("coop", "dtd", [1, 2])
    assert (mean["mean"], mean["std"], mean["zero_shot"]) == (61.0, 1.0, 50.0)


# ------------------------------------------------------------------------- published numbers


def beside(lines):
    start = lines.index("Published numbers and runs of the same setting")
    return [line for line in lines[start:] if isinstance(line, list)][2:]


def test_published_value_ours_and_difference_stand_beside_each_other(written, printed):
    written(value=63.0)
    written(value=64.0, seed=2)
    written(on="eurosat", value=81.0)
    lines = printed()
    assert beside(lines) == [
        ["CoOp", "RN50", "16", "few-shot", "dtd", "coop"]
        + ["63.58", "63.50 ± 0.50 (2)", "-0.08", "L2"],
        ["CoOp", "RN50", "16", "few-shot", "eurosat", "coop", "83.53", "81.00", "-2.53", "L2"],
    ]
    assert lines[-1].startswith("L2: LoGoPrompt")


def test_a_difference_of_more_than_two_std_is_marked(written, printed):
    for seed, shift in (1, -0.5), (2, 0.5):
        written(seed=seed, value=63.58 + 0.9 + shift)
        written(on="eurosat", seed=seed, value=83.53 - 1.1 + shift)
    assert [line[8] for line in beside(printed())] == ["+0.90", "-1.10 *"]


def test_a_run_of_another_setting_stands_beside_nothing(written, printed):
    written(model="ViT-B-32")
    written(shots=8)
    written(n_ctx=4)
    written("dpt")
    for half in "base", "new":  # published are those of four vectors that start from words
        written(half=half, classes="base", model="ViT-B-16")
    written(on="dtd", dataset="imagenet", classes="base", model="ViT-B-16", init="a photo of a")
    assert "Published numbers and runs of the same setting" not in printed()


def test_base_to_new_and_its_init_stand_beside_the_published_numbers(written, printed):
    setting = {"model": "ViT-B-16-quickgelu", "init": "a photo of a", "classes": "base"}
    written(value=80.0, half="base", **setting)
    written(value=40.0, half="new", **setting)
    differences = {line[3]: line[8] for line in beside(printed())}
    assert differences == {"base": "+0.56", "new": "-1.18", "H": f"{3200 / 60 - 54.24:+.2f}"}


def test_means_need_all_their_data_sets(written, tmp_path):
    names = published.PUBLISHED["means"]["four variants"]
    setting = {"dataset": "imagenet", "model": "ViT-B-16", "init": "a photo of a"}
    paths = [written(on=on, value=50.0 + k, **setting) for k, on in enumerate(names)]
    written(on="imagenet", **setting)
    ours = {line[4]: line[7] for line in beside_rows(report.read(tmp_path))}
    assert (ours["four variants"], ours["imagenet"]) == ("51.50", "60.00")
    paths[-1].unlink()
    ours = {line[4]: line[7] for line in beside_rows(report.read(tmp_path))}
    assert "four variants" not in ours and "imagenet_a" in ours


def beside_rows(rows):
    lines = published.comparison(rows).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]


def test_a_suites_score_is_the_mean_over_its_tasks_and_needs_them_all(written, tmp_path):
    for on in softcpt.GENERAL10:
        path = written("softcpt", on, 70.0, dataset="general10")
    (line,) = beside_rows(report.read(tmp_path))[2:]
    assert line[:5] == ["SoftCPT-NATA", "RN50", "16", "suite", "general10"]
    assert line[7] == "66.00"
    path.unlink()
    assert not beside_rows(report.read(tmp_path))


def test_the_published_table_is_sound():
    table = published.PUBLISHED
    rows = [tuple(row) for row in table["numbers"]]
    values = {row[:5]: row[5] for row in rows}
    assert len(rows) == len(values) == 184
    for method, *_, value, std, source in rows:
        assert method in table["methods"] and source in table["sources"]
        assert 0 < value < 100 and (std is None or 0 < std < 3)
    few = [value for key, value in values.items() if key[0] == "CoOp" and key[3] == "few-shot"]
    assert np.mean(few[:-1]) == pytest.approx(few[-1], abs=0.02)
    for method, *setting, protocol, name in list(values):
        if protocol == "H":
            base, new = ({1: values[method, *setting, half, name]} for half in ("base", "new"))
            H = values[method, *setting, "H", name]
            assert H == pytest.approx(published.harmonic(base, new), abs=0.02)
    names = table["means"]["four variants"]
    targets = [values["CoOp", "ViT-B-16", 16, "from imagenet", name] for name in names]
    assert np.mean(targets) == pytest.approx(59.28, abs=0.01)


# ---------------------------------------------------------------------------------- the plot


def test_curves_are_means_over_seeds(written, tmp_path):
    written(value=60.0, facts={"losses": [3.0, 1.0]})
    written(value=70.0, facts={"losses": [1.0, 1.0]}, seed=2)
    written(value=50.0, shots=4)
    rows = report.read(tmp_path)
    ours, zero = plots.accuracies(rows)["dtd: accuracy (%)"]
    assert ours == ("coop, RN50", [4, 16], [50.0, 65.0], [0.0, 5.0])
    assert zero[2] == [50.0, 50.0]
    few, more = plots.losses(rows).items()
    assert (few[0], more[0]) == ("dtd, 4 shots: loss", "dtd, 16 shots: loss")
    ((_, epochs, mean, std),) = more[1]
    assert ([*epochs], mean.tolist(), std.tolist()) == ([1, 2], [2.0, 1.0], [1.0, 0.0])


def test_a_plot_is_drawn_or_refused_in_one_line(written, printed, tmp_path, monkeypatch):
    written()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "matplotlib", None)
        with pytest.raises(common.Error, match="pip install matplotlib"):
            printed("--plot", "accuracy.png")
    pytest.importorskip("matplotlib")
    file = tmp_path / "new folder" / "plot.png"
    printed("--plot", str(file))
    assert np.asarray(Image.open(file)).std() > 0
    with pytest.raises(common.Error, match="plot.xyz"):
        printed("--plot", str(tmp_path / "plot.xyz"))
