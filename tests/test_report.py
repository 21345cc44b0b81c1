"""The tables against numbers by hand, from lines of a results.jsonl written here."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import common
from tests import report


def row(method="coop", on="dtd", seed=1, value=60.0, **other):
    """A record with two metrics 10 apart, and a zero-shot accuracy of 50 (40 per class)."""
    half = other.get("classes", "all")
    run = (
        f"{method}/{other.get('dataset', on).replace('/', '-')}/16shots_seed{seed}"
        + "_classes=base" * (half != "all")
    )
    known = {
        "run": run,
        "method": method,
        "model": "RN50",
        "dataset": on,
        "shots": 16,
        "seed": seed,
    }
    known |= {"evaluated_on": on, "classes": half, "accuracy": value, "zero_shot": 50.0}
    known |= {"mean_class_accuracy": value - 10, "zero_shot_mean_class": 40.0, "train_seconds": 1.0}
    return known | {"config": {"transfer": ""}} | other


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    def tables(*rows, flags=()):
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (tmp_path / "results.jsonl").write_text(text)
        monkeypatch.setattr(sys, "argv", ["common.py", "report", "--out", str(tmp_path), *flags])
        report.main()
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] or line for line in lines]

    return tables


def test_cells_are_mean_std_and_number_of_seeds_with_zero_shot_first(printed):
    lines = printed(row(value=60.0), row(seed=2, value=63.0), row(on="eurosat", value=81.0))
    assert lines[0] == "RN50, 16 shots"
    assert lines[2] == ["method", "dtd", "eurosat", "average"]
    assert lines[4] == ["zero-shot", "50.00", "50.00", "50.00"]
    assert lines[5] == ["coop", "61.50 ± 1.50 (2)", "81.00", "71.25"]


def test_a_repeated_run_counts_once_by_its_last_line(printed):
    assert printed(row(value=60.0), row(value=70.0))[5] == ["coop", "70.00"]


def test_runs_with_other_options_and_methods_are_rows_of_their_own(printed):
    lines = printed(
        row("upt"),
        row(run="coop/dtd/16shots_seed1_csc=True", config={"csc": True, "transfer": ""}),
        row(),
    )
    assert [line[0] for line in lines[4:]] == ["zero-shot", "coop", "coop csc=True", "upt"]


def test_base_and_new_have_std_and_the_harmonic_mean_of_their_means(printed):
    halves = [
        row(classes=half, seed=seed, on=on, value=value + shift)
        for on, shift in (("dtd", 0), ("eurosat", 10))
        for half, values in (("base", (70, 74)), ("new", (50, 54)))
        for seed, value in enumerate(values)
    ]
    lines = printed(*halves)
    assert lines[2] == ["method", "data set", "base", "new", "H"]
    H = 2 * 72 * 52 / (72 + 52)
    assert lines[7] == ["coop", "dtd", "72.00 ± 2.00 (2)", "52.00 ± 2.00 (2)", f"{H:.2f}"]
    assert lines[9] == ["coop", "average", "77.00", "57.00", f"{2 * 77 * 57 / (77 + 57):.2f}"]


def test_base_to_new_and_all_classes_are_two_trainings_beside_each_other(printed):
    half = {"run": "coop/dtd/16shots_seed1_classes=base", "train_seconds": 2.0}
    half["config"] = {"transfer": "eurosat", "classes": "base"}
    whole = {"run": "coop/dtd/16shots_seed1", "config": {"transfer": "eurosat"}}
    lines = printed(
        row(value=60.0, **whole),
        row(on="eurosat", dataset="dtd", value=40.0, **whole),
        row(classes="base", value=80.0, **half),
        row(classes="new", value=80.0, **half),
        row(on="eurosat", dataset="dtd", value=30.0, **half),
    )
    assert ["coop", "60.00"] in lines
    assert ["coop", "dtd", "80.00", "80.00", "80.00"] in lines
    assert ["coop", "40.00"] in lines and ["coop classes=base", "30.00"] in lines


def test_folders_of_one_name_are_columns_of_their_own(printed):
    lines = printed(*(row(on="pets", dataset=f"{where}/pets") for where in "ab"))
    assert lines[2] == ["method", "a/pets", "b/pets", "average"]


def test_a_prompt_trained_again_leaves_none_of_its_old_numbers(printed):
    old = [row(value=60.0), row(on="eurosat", dataset="dtd", config={"transfer": "eurosat"})]
    lines = printed(*old, row(value=70.0, train_seconds=2.0))
    assert lines[2:] == [["method", "dtd"], lines[3], ["zero-shot", "50.00"], ["coop", "70.00"]]


def test_a_line_that_is_no_record_is_named(tmp_path):
    for wrong in {"config": None}, {"accuracy": "high"}, {"evaluated_on": ["dtd"]}, {"run": None}:
        (tmp_path / "results.jsonl").write_text(json.dumps(row() | wrong) + "\n")
        with pytest.raises(common.Error, match="no record"):
            report.read(tmp_path)


def test_a_transferred_prompt_stands_in_a_table_of_its_source(printed):
    moved = row(on="eurosat", dataset="dtd", value=33.0, config={"transfer": "some/eurosat"})
    lines = printed(row(), moved)
    assert "RN50, 16 shots of dtd, evaluated on" in lines
    assert lines[-1] == ["coop", "33.00"] and lines[5] == ["coop", "60.00"]


def test_softcpt_counts_some_data_sets_by_the_mean_of_their_classes_and_says_so(printed):
    lines = printed(*(row("softcpt", on=on) for on in ("caltech101", "dtd")))
    assert lines[4] == ["zero-shot", "40.00", "50.00", "45.00"]
    assert lines[5] == ["softcpt", "50.00", "60.00", "55.00"]
    assert lines[-1].startswith("On caltech101, SoftCPT's cells")


def test_nothing_recorded_is_one_line(tmp_path):
    with pytest.raises(common.Error, match="nothing is recorded"):
        report.read(tmp_path)


def test_the_plot_is_drawn_and_named(printed, tmp_path):
    pytest.importorskip("matplotlib")
    file = str(tmp_path / "accuracy.png")
    few = [row(shots=n, run=f"coop/dtd/{n}shots_seed1", value=50 + n) for n in (1, 4, 16)]
    assert printed(*few, flags=["--plot", file])[-1] == f"drawn: {file}"
    assert np.asarray(Image.open(file)).std() > 0
    assert printed(*few, flags=["--plot", file[:-4]])[-1] == f"drawn: {file}"
    with pytest.raises(SystemExit) as end:
        printed(*few, flags=["--plot", str(tmp_path / "accuracy.xyz")])
    assert end.value.code == 2
