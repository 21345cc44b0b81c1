"""The docstrings' equations, the code's tags and tests/AUDIT.md agree; wrong claims stay out."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.conftest import HERE, METHODS

AUDIT = (HERE / "tests" / "AUDIT.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (\S+)\.py\n(.*?)(?=^## |\Z)", AUDIT, re.M | re.S))
WRONG = [  # false claims that we once made about the official codes
    r"NaN ends (its|the) training",
    r"undefined (when|where|if) no true class",
    r"eight templates on ImageNet|on ImageNet,? (it has )?eight templates",
    r"(100|batch\w*)\W[^.]{0,40}\bas in Dassl",
    r"misplaces (the|such) words(?! in (front|middle) and (front|middle))",
    r"(folders|classes)( are)? (taken )?in classnames\.txt('s)? order",
    r"Dassl 0\.6(\.\w)? fork",
    r"leaf with <disease> disease",
    r"yuhangzang/UPT,? (at )?commit 3d1640f(?!.{0,80}pedramyamini2023)",
    r"hold up where a class varies",
]


def source(name):
    return (HERE / f"{name}.py").read_text("utf-8")


def equations(name):
    """The text of each numbered equation of a method's docstring, in order of their numbers."""
    doc = ast.get_docstring(ast.parse(source(name)), clean=False)
    lines = doc[doc.index("    (1)") :].splitlines()
    blank, found = False, []
    for line in lines:  # an equation continues on lines that are indented further
        if number := re.match(r" {4}\((\d+)\) ", line):
            found.append([int(number[1]), line])
        elif line.startswith(" " * 9) and not blank:
            found[-1][1] += line
        blank = not line.strip() or not line.startswith(" ")
    return found


def tags(name):
    """The numbers of the equations in the comments behind code."""
    found, code = [], set()
    for token in tokenize.generate_tokens(io.StringIO(source(name)).readline):
        row, kind = token.start[0], token.type
        if kind == tokenize.COMMENT and (tag := re.search(r"Eq\. (\d+(?:, \d+)*)", token.string)):
            assert row in code, f"{name}.py:{row} has no code"
            found += map(int, tag[1].split(", "))
        elif kind != tokenize.NL:
            code.add(row)
    return found


def names(tree, prefix=""):
    """Functions, classes and constants of a module, of its classes and of its functions."""
    for node in ast.iter_child_nodes(tree):
        found = [getattr(node, "name", None), getattr(getattr(node, "target", None), "id", None)]
        found += [getattr(target, "id", None) for target in getattr(node, "targets", [])]
        yield from (prefix + name for name in found if name)
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield from names(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("name", METHODS)
def test_each_equation_has_its_tag_its_official_lines_and_its_row(name):
    numbers = [number for number, _ in equations(name)]
    assert numbers == [*range(1, len(numbers) + 1)] and numbers
    assert {*tags(name)} == {*numbers}
    for number, text in equations(name):
        place = r"\b(caption|abstract|ours)\b" if name == "enprompt" else r"\d+-\d+|\d{3}|:\d+"
        assert re.search(place, text), f"{name}.py ({number}) does not say where it is from"
    rows = re.findall(r"^\| \((\d+)\) .*`tests/test_\w+\.py::test_", SECTIONS[name], re.M)
    assert [*map(int, rows)] == numbers


def test_each_function_and_test_in_the_audit_exists():
    known = {*METHODS, "common"}
    assert SECTIONS.keys() == known
    there = {f"{m}.{name}" for m in known for name in names(ast.parse(source(m)))}
    named = set(re.findall(rf"`((?:{'|'.join(known)})\.(?!py\b)[\w.]+)`", AUDIT))
    assert named - there == set() and len(named) > 50
    tests = {path.name: path.read_text("utf-8") for path in (HERE / "tests").glob("test_*.py")}
    named = set(re.findall(r"tests/(test_\w+\.py)::(\w+)", AUDIT))
    there = {(file, name) for file, text in tests.items() for name in names(ast.parse(text))}
    assert named - there == set() and len(named) > 50
    for row in re.findall(r"^\| (?!equation|official|finding|---).*", AUDIT, re.M):
        assert row.count(" | ") in (2, 3, 4), row


@pytest.mark.parametrize("claim", WRONG)
def test_no_wrong_claim_is_made(claim):
    pages = [*HERE.glob("*.*"), *Path(HERE, "tests").rglob("*.*")]
    for page in pages:
        if page.suffix in (".py", ".md") and page != Path(__file__):
            text = " ".join(page.read_text("utf-8").split())
            assert not (found := re.search(claim, text)), f"{page}: {found[0]}"
