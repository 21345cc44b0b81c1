"""kill -9, shared folders and full disks: nothing is lost, and one clear line each.

KILLS=50 python -m pytest -s tests/test_reliability.py -k any_moment     # more kills, and figures
DISKS=10 PAIRS=20 python -m pytest tests/test_reliability.py     # more full disks, equal commands
"""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import common
from tests.conftest import METHODS
from tests.tools import shapes

KILLS = int(os.environ.get("KILLS", 2))  # of each method, two at a time: an even number
PAIRS = int(os.environ.get("PAIRS", 2))  # of equal commands at once
DISKS = int(os.environ.get("DISKS", 3))  # that fill up at another write of one run
MEASURED = ("evaluated_on", "classes", "accuracy", "zero_shot", "mean_class_accuracy", "n_test")

# Children of a server that has imported torch and nothing else: quick to start, free of threads
KIND = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
processes = multiprocessing.get_context(KIND)
processes.set_forkserver_preload(["tests.test_reliability"])


# ---------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A --data folder with few images per class."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNTS", {"train": 4, "val": 1, "test": 4})
        for name in "textures", "colours", "clip":
            shapes.write(folder, name)
    return folder


@pytest.fixture
def flags(rendered):
    """Flags of a short run, with --out OUT to be added."""
    return ["--data", rendered, "--dataset", "textures", "--shots", 1, "--epochs", 2]


Child = namedtuple("Child", "process log")
Ended = namedtuple("Ended", "code text")


def start(name, *options, disturb=None, log=None):
    """Starts a method's command in a process of its own, disturbed by disturb = (function, ...)."""
    options = [str(option) for option in options]
    log = log or Path(options[options.index("--out") + 1] + f".log{time.monotonic_ns()}")
    process = processes.Process(target=command, args=(name, options, disturb, str(log)))
    process.start()
    return Child(process, log)


def command(name, options, disturb, log):
    """What the command line does, in this process, with its output in the file log."""
    torch.set_num_threads(1)  # with more, this small work would wait for a busy machine's cores
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's "&" has ignored
    method = METHODS[name]
    sys.stdout = sys.stderr = open(log, "w", buffering=1, encoding="utf-8")
    if disturb:
        function, *arguments = disturb
        function(*arguments)
    least = ["--device", "cpu", "--workers", "2"]
    common.script(lambda: method.main(common.cli(method.Config, [*least, *options])))


def end(child):
    child.process.join()
    return Ended(child.process.exitcode, child.log.read_text("utf-8").replace("\r", "\n"))


def run(name, *options, disturb=None):
    """A command that must succeed: the text that it printed."""
    code, text = end(start(name, *options, disturb=disturb))
    assert code == 0 and "error: " not in text, text
    return text


def refusal(name, *options, disturb=None):
    """The one error line of a command that must fail."""
    code, text = end(start(name, *options, disturb=disturb))
    return one_line(code, text)


def one_line(code, text):
    lines = text.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (code, len(errors), lines[-1:]) == (2, 1, errors), f"{code}: {text}"
    return errors[0]


def result(out):
    """What the runs below out have come to: their rows, but for times, and what they learned."""
    rows, learned = [], {}
    for path in sorted(out.rglob("results/*.json")):
        row = json.loads(path.read_text("utf-8"))
        trained = row["trained"]
        rows.append([row["method"], trained["losses"], *(row[key] for key in MEASURED)])
    for path in sorted(out.rglob("checkpoint.pt")):
        for name, tensor in common.read_checkpoint(path)["prompt"].items():
            learned[f"{path.relative_to(out)} {name}"] = tensor.tolist()
    return rows, learned


# ---------------------------------------------------------------------------- disturbances


def on_write(moment, act):
    """Calls act before the moment-th change of this process to a file of a run."""
    count = 0

    def watch(event, arguments):
        nonlocal count
        if event == "open":
            path, mode, _ = arguments
            changes = isinstance(mode, str) and "r" not in mode
        else:
            path, changes = arguments[0], event in ("os.rename", "os.remove", "os.mkdir")
        if changes and isinstance(path, str | os.PathLike) and "shots" in os.fspath(path):
            count += 1
            if count == moment:
                act()

    sys.addaudithook(watch)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


def full_disk(moment):
    """Fills the disk halfway through the moment-th write of a file."""
    write_bytes, count = Path.write_bytes, 0

    def write_half(path, content):
        nonlocal count
        count += 1
        if count != moment:
            return write_bytes(path, content)
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    Path.write_bytes = write_half


def read_only(folder):
    """Nothing below folder can be changed by this process."""

    def watch(event, arguments):
        paths = [arg for arg in arguments if isinstance(arg, str | os.PathLike)]
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if event == "open":
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes and paths and os.fspath(paths[0]).startswith(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(paths[0]))

    sys.addaudithook(watch)


# ---------------------------------------------------------------------------- kill -9


def stage(out):
    """How far a killed run had come, by what it left below out."""
    names = {path.name for path in out.rglob("*")} if out.exists() else ()
    if "results" in names:
        return "with a row or its folder"
    return "with a checkpoint" if "checkpoint.pt" in names else "before the first checkpoint"


@pytest.mark.parametrize("name", METHODS)
def test_a_run_killed_at_any_moment_ends_as_an_undisturbed_one(name, flags, tmp_path):
    writes = 13  # with one test set; another adds a file: mkdir, open, rename, remove
    if name == "softcpt":
        flags, writes = [*flags, "--dataset", "textures,colours"], 17
    run(name, *flags, "--out", tmp_path / "first")  # starts what starts the others
    began = time.monotonic()
    run(name, *flags, "--out", tmp_path / "undisturbed")
    seconds = time.monotonic() - began
    wanted = result(tmp_path / "undisturbed")
    assert wanted == result(tmp_path / "first") and wanted[0] and wanted[1]
    rng, stages = random.Random(name), Counter()
    for number in range(0, KILLS, 2):
        outs = [tmp_path / f"kill{number + i}" for i in range(2)]
        disturb = on_write, rng.randint(1, writes), die  # one at a write, one at some time
        first = start(name, *flags, "--out", outs[0], disturb=disturb)
        second = start(name, *flags, "--out", outs[1])
        time.sleep(rng.uniform(0.2, 1) * seconds)
        second.process.kill()
        for child, out in zip((first, second), outs, strict=True):
            code, _ = end(child)
            stages[stage(out) if code == -signal.SIGKILL else "it had ended"] += 1
        again = [start(name, *flags, "--out", out) for out in outs]
        for child, out in zip(again, outs, strict=True):
            code, text = end(child)
            assert code == 0 and "error: " not in text, text
            assert result(out) == wanted
    kills = stages.total()
    print(f"\n{name}: {kills} kills, {kills} identical results; killed {dict(stages)}")
    assert stages["it had ended"] <= kills / 2  # no kill at a write came too late


def test_an_interrupted_run_is_one_line_and_resumes(flags, tmp_path):
    run("coop", *flags, "--out", tmp_path / "undisturbed")
    wanted = result(tmp_path / "undisturbed")
    for moment in 3, 8, 13:  # two checkpoints, the row
        out = tmp_path / f"out{moment}"
        line = refusal("coop", *flags, "--out", out, disturb=(on_write, moment, interrupt))
        assert "interrupted" in line and "without --force" in line
        assert not [path.name for path in out.rglob(".*")]  # no draft
        run("coop", *flags, "--out", out)
        assert result(out) == wanted


@pytest.mark.skipif(KIND == "spawn", reason="Windows has no SIGINT for one process")
def test_ctrl_c_in_training_is_one_line(flags, tmp_path):
    out = tmp_path / "runs"
    child = start("coop", *flags, "--epochs", 100_000, "--out", out)
    deadline = time.monotonic() + 120
    while not list(out.rglob("checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.process.pid, signal.SIGINT)
    assert "interrupted" in one_line(*end(child))
    (checkpoint,) = out.rglob("checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] > 0


# ---------------------------------------------------------------------------- many processes


def test_processes_that_share_a_folder_lose_nothing(flags, tmp_path):
    out, alone = tmp_path / "runs", tmp_path / "alone"
    seeds = [1, 1, 1, 2, 3]
    for seed in set(seeds):
        run("coop", *flags, "--seed", seed, "--out", alone)
    crowd = [start("coop", *flags, "--seed", seed, "--out", out) for seed in seeds]
    for child in crowd:
        code, text = end(child)
        assert code == 0 and "Traceback" not in text, text
    assert result(out) == result(alone)
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("pair", range(PAIRS))
def test_two_equal_commands_at_once_end_as_one_alone(pair, flags, tmp_path):
    name = [*METHODS][pair % len(METHODS)]
    if name == "softcpt":
        flags = [*flags, "--dataset", "textures,colours"]
    out, alone = tmp_path / "runs", tmp_path / "alone"
    run(name, *flags, "--out", alone)
    first = start(name, *flags, "--out", out)
    time.sleep(random.Random(pair).uniform(0, 2))  # of the three that one needs
    second = start(name, *flags, "--out", out)
    for child in first, second:
        code, text = end(child)
        assert code == 0 and "error: " not in text and "Traceback" not in text, text
    assert result(out) == result(alone)
    assert not list(out.rglob(".*"))


def test_six_evaluations_of_one_run_at_once_keep_every_row(flags, tmp_path):
    out = tmp_path / "runs"
    run("coop", *flags, "--out", out)
    others = [shutil.copytree(flags[1] / "shapes/textures", tmp_path / f"set{i}") for i in range(6)]
    crowd = [start("coop", *flags, "--out", out, "--transfer", other) for other in others]
    for child in crowd:
        code, text = end(child)
        assert code == 0 and "Traceback" not in text, text
    found = {row[2] for row in result(out)[0]}
    assert found == {"textures", *map(str, others)}


def test_writers_of_one_file_do_not_meet_in_its_draft(tmp_path):
    path = tmp_path / "file"

    def write(letter):
        for _ in range(200):
            common.write(path, letter * 100_000)
            assert len(set(path.read_bytes())) == 1

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, [b"a", b"b"]))
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------- the disk


def test_a_full_disk_is_one_line_and_nothing_is_lost(flags, tmp_path):
    out, flags = tmp_path / "full", [*flags, "--epochs", DISKS - 1]
    run("coop", *flags, "--seed", 9, "--out", out)
    other = result(out)
    run("coop", *flags, "--out", tmp_path / "roomy")
    wanted = result(tmp_path / "roomy")
    for moment in range(1, DISKS + 1):  # the checkpoints, the row
        code, text = end(start("coop", *flags, "--out", out, disturb=(full_disk, moment)))
        line = one_line(code, text)
        assert os.strerror(errno.ENOSPC) in line and str(out) in line
        assert (": 75.00 (zero-shot" in text) == (moment == DISKS)  # printed before it is written
        assert not [path.name for path in out.rglob(".*")]
        rows, learned = result(out)
        assert rows == other[0] and other[1].items() <= learned.items()
        run("coop", *flags, "--out", out)
        assert result(out)[1] == wanted[1] | other[1]
        assert wanted[0][0] in result(out)[0]
        (done,) = (path for path in out.rglob("checkpoint.pt") if "seed9" not in str(path))
        shutil.rmtree(done.parent)


def test_a_run_in_a_read_only_folder_prints_its_numbers_and_then_one_line(flags, tmp_path):
    out = tmp_path / "runs"
    text = run("coop", *flags, "--out", out)
    (number,) = [line for line in text.splitlines() if line.startswith("  textures")]
    log = tmp_path / "log"
    code, text = end(start("coop", *flags, "--out", out, disturb=(read_only, str(out)), log=log))
    assert os.strerror(errno.EROFS) in one_line(code, text)
    assert number in text.splitlines()


@pytest.mark.parametrize("place", ["data", "runs"])
def test_a_folder_that_cannot_be_written_is_one_line(place, flags, tmp_path):
    options = [*flags, "--data", tmp_path / "data", "--out", tmp_path / "runs"]
    if place == "runs":
        shutil.copytree(flags[1], tmp_path / "data")
    log = tmp_path / "log"
    disturb = (read_only, str(tmp_path / place))
    line = one_line(*end(start("coop", *options, disturb=disturb, log=log)))
    assert os.strerror(errno.EROFS) in line and str(tmp_path / place) in line


def test_a_read_only_data_folder_is_enough(flags, rendered, tmp_path):
    run("coop", *flags, "--out", tmp_path / "runs", disturb=(read_only, str(rendered)))


def test_a_file_in_place_of_a_folder_is_one_line(flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file" in refusal("coop", *flags, "--out", tmp_path / "file")
    options = [*flags, "--data", tmp_path / "file", "--out", tmp_path / "x"]
    assert "file" in refusal("coop", *options)
    assert (tmp_path / "file").read_text() == "mine"
