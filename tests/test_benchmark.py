"""The benchmark runs, and its plain path computes what ours does."""

import open_clip
import pytest

import common
from tests.tools import benchmark


@pytest.fixture
def table(monkeypatch, capsys):
    """table(option, ...) is the benchmark's table for a narrow CLIP: {row: {column: cell}}."""
    clip = common.Clip(benchmark.narrow(2), open_clip.get_tokenizer("ViT-B-32"))
    monkeypatch.setattr(common, "load_clip", lambda cfg: clip)

    def table(*options):
        benchmark.main(options)
        first, _, *lines = capsys.readouterr().out.splitlines()
        assert "fp32" in first
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}

    return table


def test_every_row_is_printed_with_small_differences(table):
    rows = table("--classes", "4", "--images", "12")
    assert [name.split(",")[0] for name in rows] == list(benchmark.METHODS)
    for name, row in rows.items():
        assert float(row["losses differ by"]) < 1e-4 and float(row["gradients by"]) < 1e-4
        assert float(row["ratio"]) > 0
        assert int(row["launches"]) > 100
        if "enprompt" not in name:  # which encodes no text
            assert float(row["plain MB"]) > float(row["ours MB"]) > 0


def test_the_plain_path_in_chunks_computes_the_same(table, monkeypatch):
    monkeypatch.setattr(benchmark, "CHUNK", 2)
    (row,) = table("--rows", "coop", "--classes", "5", "--images", "12").values()
    assert row["plain MB"] == "" and row["ours MB"]
    assert float(row["losses differ by"]) < 1e-4 and float(row["gradients by"]) < 1e-4


def test_an_unknown_row_is_refused():
    with pytest.raises(common.Error, match="--rows views"):
        benchmark.main(["--rows", "coop,views"])
