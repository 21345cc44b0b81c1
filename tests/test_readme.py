"""README keeps to its length, and what it names is there: files, links, commands, line counts."""

import re
import shlex

import pytest

import common
from tests.conftest import HERE, METHODS

README = (HERE / "README.md").read_text("utf-8")
RESULTS = (HERE / "tests/RESULTS.md").read_text("utf-8")
PAGES = README + RESULTS + "".join(method.__doc__ for method in METHODS.values())
COMMANDS = set(re.findall(r"python (\w+\.py[^`#|\n;)\[]*)", PAGES))
STAND_INS = {
    "METHOD.py": "upt.py",
    "FILE": "upt.py",
    "SEED": "3",
    "$seed": "2",
    "$SLURM_ARRAY_TASK_ID'": "2",
}


def test_it_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 140 and len(README.split()) <= 1100
    prose = [block for block in README.split("\n\n") if block[0] not in "|`"]
    assert max(map(len, prose)) <= 500
    assert len(README[: README.index("python coop.py")].split()) <= 130


@pytest.mark.parametrize("name", METHODS)
def test_the_lines_of_a_method_are_counted(name):
    lines = len((HERE / f"{name}.py").read_text("utf-8").splitlines())
    assert f"`{name}.py` ({lines})" in README


@pytest.mark.parametrize("page, folder", [(README, HERE), (RESULTS, HERE / "tests")])
def test_files_that_are_named_are_there(page, folder):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page) if "://" not in link]
    assert links
    for link in links:
        file, _, heading = link.partition("#")
        there = folder / file if file else HERE / "README.md"
        assert there.is_file(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", there.read_text("utf-8"), re.M)
            assert heading in [title.lower().replace(" ", "-") for title in titles], link
    for name in re.findall(r"`(test_\w+\.py)`", page):
        assert (HERE / "tests" / name).is_file(), name


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_options_of_a_command_exist(command):
    for word, value in STAND_INS.items():
        command = command.replace(word, value)
    script, *typed = shlex.split(command)
    config = common.ZeroShot if script == "common.py" else METHODS[script[:-3]].Config
    assert common.cli(config, typed) != config() or not typed


@pytest.mark.parametrize("name", sorted(set(re.findall(r"python -m tests\.tools\.(\w+)", PAGES))))
def test_a_tool_that_is_named_exists(name):
    assert (HERE / f"tests/tools/{name}.py").is_file()
