"""The command line's complaints, and the folder that a run is kept in."""

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.conftest import HERE


def folder(**options):
    return common.run_folder(coop.Config(**options))


@pytest.mark.parametrize("method", [coop, dpt, upt, enprompt, softcpt])
def test_no_number_may_be_below_its_least(method):
    for field in dataclasses.fields(method.Config):
        if field.type in (int, float):
            with pytest.raises(common.Error, match=f"--{field.name} "):
                method.Config(**{field.name: -2})
    for name in "batch_size", "workers":
        with pytest.raises(common.Error, match=f"--{name} .* 1"):
            method.Config(**{name: 0})


def test_a_shell_sees_one_line_and_exit_code_2():
    typed = [sys.executable, HERE / "coop.py", "--shots", "-2"]
    ended = subprocess.run(typed, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: --shots -2: must be at least 0\n"


def test_help_holds_the_docstring_and_every_option(shell):
    code, out, _ = shell("upt.py", "--help")
    assert code == 0 and upt.__doc__ in out
    text = " ".join(out.split())
    for field in dataclasses.fields(upt.Config):
        assert f"--{field.name}" in text and f"[{field.default}]" in text
    assert "initial learning rate (SGD, cosine schedule) [0.002]" in text
    assert "in the transform [0.1]" in text


@pytest.mark.parametrize(
    "problem, said",
    [
        (common.Error("a\nb"), "error: a b"),
        (OSError(2, "No such file", "x.jpg"), "x.jpg"),
        (MemoryError(), "--batch_size"),
    ],
)
def test_a_script_ends_in_one_line(problem, said, capsys):
    def main():
        raise problem

    with pytest.raises(SystemExit) as end:
        common.script(main)
    line = capsys.readouterr().err
    assert end.value.code == 2 and said in line and line.count("\n") == 1


def test_a_script_prints_what_a_console_lacks_by_its_number(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "cp1252", newline="\n")
    monkeypatch.setattr(sys, "stdout", console)
    common.script(lambda: print("é 猫", flush=True))
    assert console.buffer.getvalue() == rb"%c \u732b" % 0xE9 + b"\n"


@pytest.mark.parametrize("problem", [ZeroDivisionError(), RuntimeError("illegal memory access")])
def test_a_bug_keeps_its_traceback(problem):
    def main():
        raise problem

    with pytest.raises(type(problem)):
        common.script(main)


def test_a_script_gives_what_its_main_gives():
    assert common.script(lambda: 42.0) == 42


def test_every_option_that_changes_a_learnable_changes_the_folder():
    different = [{}, {"n_ctx": 4}, {"n_ctx": 44}, {"csc": True}, {"init": "a b"}, {"init": "a-b"}]
    different += [{"init": "a_b"}, {"init": "a/b"}, {"seed": 2}, {"shots": 1}, {"lr": 0.1}]
    different += [{"dataset": "textures"}, {"classes": "base"}, {"model": "RN50"}, {"epochs": 3}]
    different += [{"model": "local-dir:a"}, {"model": "local-dir/a"}, {"precision": "bf16"}]
    different += [{"dataset": "a/b"}, {"dataset": "a-b"}, {"dataset": "a\\b"}, {"pretrained": ""}]
    different += [{"init": "a" * 300}, {"init": "a" * 301}, {"init": "a" * 300 + "b"}]
    folders = [folder(**options) for options in different]
    assert len({str(place).lower() for place in folders}) == len(different)
    assert common.run_folder(upt.Config()) != folder()


def test_other_options_do_not_change_the_folder():
    same = {"transfer": "textures", "device": "cpu", "data": "x", "workers": 1, "force": True}
    assert folder(**same) == folder() == Path("runs", "coop", "shapes", "16shots_seed1")


@pytest.mark.parametrize("text", ["../../x", "/etc/x", 'a:b*?"<>|', "é猫 🦊", "猫" * 99])
def test_a_folders_name_stays_below_out_and_any_disk_takes_it(text, tmp_path):
    for options in {"dataset": text}, {"init": text}, {"model": text}:
        place = folder(out=str(tmp_path), **options)
        parts = place.relative_to(tmp_path).parts
        assert len(parts) == 3 and ".." not in parts and parts[0] == "coop"
        assert all(len(part.encode()) < 256 for part in parts)
        assert not any(letter in part for part in parts for letter in '<>:"/\\|?*')
        place.mkdir(parents=True)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    common.write(path, b"first")
    assert path.read_bytes() == b"first" and len(list(path.parent.iterdir())) == 1

    def full(self, target):
        raise OSError("disk is full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="full"):
        common.write(path, b"second")
    assert path.read_bytes() == b"first" and len(list(path.parent.iterdir())) == 1


DEFAULTS = {
    coop: {"n_ctx": 16, "position": "end", "usual_model": "RN50"},
    dpt: {"n_ctx": 16, "n_visual": 10, "cavpt_layers": 1, "cavpt_ctx": 10, "top_k": 10}
    | {"guidance": 30, "alpha": 0.3, "beta": 0.1, "visual_lr": 0.01, "usual_model": "ViT-B-32"},
    upt: {"n_ctx": 4, "dropout": 0.1, "side": "both", "usual_model": "ViT-B-16"},
    softcpt: {"n_ctx": 16, "task_n_ctx": 4, "class_n_ctx": 4, "usual_model": "RN50"},
    enprompt: {"n_visual": 4, "ot_weight": 1.0, "epsilon": 0.1, "usual_model": "ViT-B-16"},
}


@pytest.mark.parametrize("method", DEFAULTS)
def test_the_defaults_are_those_of_the_official_commands(method):
    cfg = method.Config()
    assert {name: getattr(cfg, name) for name in DEFAULTS[method]} == DEFAULTS[method]
