"""The benchmark runs, and its plain path computes what ours does."""

import re

import pytest
import torch

import common
from tests.tools import benchmark, shapes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The shapes world's CLIP, as a --model."""
    return f"local-dir:{shapes.write(tmp_path_factory.mktemp('data'), 'clip')}"


def test_every_row_is_printed_with_small_differences_and_no_wait(tiny, capsys):
    sizes = ["--layers", "2", "--classes", "4", "--count_classes", "4", "--images", "12"]
    benchmark.main(["--model", tiny, *sizes])
    first, *lines = capsys.readouterr().out.splitlines()
    assert "fp32" in first
    assert [re.split("[ ,]", line)[0] for line in lines] == benchmark.ROWS.split(",")
    for line in lines:
        differences = re.findall(r"\d\.\de[-+]\d+", line)
        assert len(differences) == 2
        assert max(map(float, differences)) < 1e-3
        assert float(re.search(r"ratio ([\d.]+)", line)[1]) > 0
    for line in lines[1:]:
        assert re.search(r"[1-9]\d+ launches, 0 waits", line)


def test_chunks_of_the_plain_text_tower_have_the_same_gradient(tiny, monkeypatch):
    clip = common.load_clip(tiny, "", "cpu", "fp32")
    names = common.embed_names(clip, benchmark.NAMES[:5], 3)
    ctx = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = []
    for chunk in 2, 100:
        monkeypatch.setattr(benchmark, "CHUNK", chunk)
        with benchmark.swapped(benchmark.PLAIN):
            w = common.encode_prompts(clip, names, ctx)
        results.append([w, *torch.autograd.grad(w.square().sum(), ctx)])
    assert results[0][0].grad_fn.name() == "ChunkedBackward" != results[1][0].grad_fn.name()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_an_unknown_row_is_refused():
    with pytest.raises(common.Error, match="views"):
        benchmark.main(["--rows", "coop,views"])
