"""A method's file and common.py work alone in an empty folder, also beside a foreign `tests`."""

import shutil
import subprocess
import sys

import pytest

from tests.conftest import HERE
from tests.fake_benchmarks import put, tiny_clip, tree, write_benchmark

# Runs a script as its command line would, several times in one process, and prints its exit codes
PROGRAM = """
import runpy, sys
script, *commands = sys.argv[1:]
for command in commands:
    sys.argv = [script, *command.split()]
    print(">>>", command, flush=True)
    print(">>>", command, file=sys.stderr, flush=True)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("exit code", end.code)
assert not [name for name in sys.modules if name.split(".")[0] == "tests"]
"""
RUN = "--shots 1 --epochs 1 --device cpu --model local-dir:clip"


def foreign(folder):
    """Another project's package `tests`, which must not be imported."""
    for file in "__init__.py", "tools/__init__.py", "tools/helpers.py":
        put(folder / "tests" / file, b"raise RuntimeError('a foreign package is imported')")


@pytest.mark.parametrize("name, beside", [("coop", None), ("dpt", foreign)])
def test_a_method_and_common_are_enough(name, beside, tmp_path):
    for file in f"{name}.py", "common.py":
        shutil.copy(HERE / file, tmp_path)
    if beside:
        beside(tmp_path)
    tiny_clip(tmp_path / "clip")
    tree(tmp_path, "own/a,b/1.jpg,2.jpg")
    write_benchmark("dtd", tmp_path / "data")
    commands = {
        "--help": f"python {name}.py --dataset caltech101",
        f"--dataset own {RUN}": "own 1 shots seed 1: ",
        f"--dataset own {RUN} --transfer dtd": "own 1 shots seed 1: ",
        f"--dataset dtd {RUN}": "dtd 1 shots seed 1: ",
        f"--dataset eurosat {RUN}": "",
        RUN: "",
    }
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"{name}.py", *commands],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    out, err = (
        dict(zip(commands, text.split(">>> ")[1:], strict=True))
        for text in (ended.stdout, ended.stderr)
    )
    for command, said in commands.items():
        assert said in out[command]
        assert ("exit code 2" in out[command]) == (not said)
    again = f"--dataset own {RUN} --transfer dtd"
    assert "loss" in err[f"--dataset own {RUN}"] and "loss" not in err[again]  # it is finished
    assert len([*tmp_path.rglob("results/dtd.json")]) == 2
    (line,) = err[RUN].splitlines()[1:]
    assert line.startswith("error: ") and "tests/tools/shapes.py" in line
    (line,) = err[f"--dataset eurosat {RUN}"].splitlines()[1:]
    assert "eurosat/2750" in line and "tests.tools" not in line
