"""kill -9, shared folders, full disks and foreign files: nothing is lost, and one clear line each.

KILLS=50 python -m pytest -s tests/test_reliability.py -k any_moment     # more kills, and figures
"""

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter, namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import coop
import dpt
import enprompt
import softcpt
import upt
from tests.tools import shapes

KILLS = int(os.environ.get("KILLS", 2))  # of each method, two at a time: an even number
PAIRS = int(os.environ.get("PAIRS", 2))  # of equal commands at once
METHODS = {"coop": coop, "dpt": dpt, "upt": upt, "enprompt": enprompt, "softcpt": softcpt}
MEASURED = ("evaluated_on", "classes", "accuracy", "zero_shot", "mean_class_accuracy", "n_test")

# Children of a server that has imported torch and nothing else: quick to start, free of threads
KIND = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
processes = multiprocessing.get_context(KIND)
processes.set_forkserver_preload(["tests.test_reliability"])


# ---------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A --data folder with few pictures per class."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNTS", {"train": 4, "val": 1, "test": 4})
        for name in "textures", "colours", "clip":
            shapes.write(folder, name)
    return folder


@pytest.fixture
def flags(world):
    """Flags of a short run, with --out OUT to be added."""
    return ["--data", world, "--dataset", "textures", "--shots", 1, "--epochs", 2]


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
    """The one line with which a command ends that must not succeed."""
    code, text = end(start(name, *options, disturb=disturb))
    return one_line(code, text)


def one_line(code, text):
    lines = text.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (code, len(errors), lines[-1:]) == (2, 1, errors), f"{code}: {text}"
    return errors[0]


def result(out):
    """What the runs below out have come to: their rows, but for times, and their tensors."""
    rows, tensors = [], {}
    for path in sorted(out.rglob("results.json")):
        for row in json.loads(path.read_text("utf-8")):
            rows.append([row["method"], row["seed"], *(row[key] for key in MEASURED)])
    for path in sorted(out.rglob("prompt.safetensors")):
        for name, tensor in load_file(path).items():
            tensors[f"{path.relative_to(out)} {name}"] = tensor.tolist()
    return rows, tensors


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
    """The moment-th file that is written finds half of the place that it needs."""
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
    for name in "results.json", "prompt.safetensors", "checkpoint.pt":
        if name in names:
            return f"with {name}"
    return "before the first checkpoint"


@pytest.mark.parametrize("name", METHODS)
def test_a_run_killed_at_any_moment_ends_as_an_undisturbed_one(name, flags, tmp_path):
    if name == "softcpt":
        flags = [*flags, "--dataset", "textures,colours"]
    run(name, *flags, "--out", tmp_path / "first")  # starts what starts the others
    began = time.monotonic()
    run(name, *flags, "--out", tmp_path / "undisturbed")
    seconds = time.monotonic() - began
    wanted = result(tmp_path / "undisturbed")
    assert wanted == result(tmp_path / "first") and wanted[0] and wanted[1]
    rng, stages = random.Random(name), Counter()
    for number in range(0, KILLS, 2):
        outs = [tmp_path / f"kill{number + i}" for i in range(2)]
        disturb = on_write, rng.randint(1, 22), die  # one at one of its writes, one at some time
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
    assert stages["it had ended"] <= kills / 2


def test_finished_runs_are_evaluated_anew_and_force_redoes_them(flags, tmp_path):
    options = [*flags, "--out", tmp_path / "runs"]
    run("coop", *options)
    wanted = result(tmp_path / "runs")
    files = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*.*")}
    for more in [], ["--force"]:
        run("coop", *options, *more)
        assert result(tmp_path / "runs") == wanted
        assert set((tmp_path / "runs").rglob("*.*")) == files.keys()
        changed = {path.name for path in files if path.read_bytes() != files[path]}
        again = {"config.json", "prompt.safetensors"} if more else set()  # it holds the seconds
        assert changed == {"results.json"} | again


def test_an_interrupted_run_is_one_line_and_goes_on(flags, tmp_path):
    run("coop", *flags, "--out", tmp_path / "undisturbed")
    wanted = result(tmp_path / "undisturbed")
    for moment in 3, 8, 12, 20:  # the configuration, two checkpoints, the row
        out = tmp_path / f"out{moment}"
        line = refusal("coop", *flags, "--out", out, disturb=(on_write, moment, interrupt))
        assert "interrupted" in line
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
    assert not list(out.rglob(".*")) and not list(out.rglob("checkpoint.pt"))


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
    assert not list(out.rglob(".*")) and not list(out.rglob("checkpoint.pt"))


def evaluate_within(options):
    """The first evaluation of this process holds a whole other command."""
    measured = common.measured

    def slow(*arguments):
        common.measured = measured
        coop.main(common.cli(coop.Config, options))
        return measured(*arguments)

    common.measured = slow


def test_two_evaluations_of_one_run_at_once_keep_both_rows(flags, tmp_path):
    out = tmp_path / "runs"
    options = [str(option) for option in [*flags, "--out", out]]
    run("coop", *options)
    other = shutil.copytree(flags[1] / "shapes/textures", tmp_path / "other")
    within = [*options, "--device", "cpu", "--transfer", str(other)]
    run("coop", *options, "--transfer", "colours", disturb=(evaluate_within, within))
    targets = {row[2] for row in result(out)[0]}
    assert len(targets) == 3 and {"textures", "colours"} < targets


def test_writers_of_one_file_do_not_meet_in_its_draft(tmp_path):
    path, problems = tmp_path / "file", []

    def write(letter):
        try:
            for _ in range(200):
                common.write(path, letter * 100_000)
                assert len(set(path.read_bytes())) == 1
        except (OSError, AssertionError) as problem:
            problems.append(problem)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not problems and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------- the disk


def test_a_full_disk_is_one_line_and_nothing_is_lost(flags, tmp_path):
    out = tmp_path / "full"
    run("coop", *flags, "--seed", 9, "--out", out)
    other = result(out)
    run("coop", *flags, "--out", tmp_path / "roomy")
    wanted = result(tmp_path / "roomy")
    for moment in 1, 2, 3, 4, 5:  # the configuration, two checkpoints, the prompt, the row
        line = refusal("coop", *flags, "--out", out, disturb=(full_disk, moment))
        assert os.strerror(errno.ENOSPC) in line and str(out) in line
        assert not [path.name for path in out.rglob(".*")]
        rows, tensors = result(out)
        assert rows == other[0] and other[1].items() <= tensors.items()
        run("coop", *flags, "--out", out)
        assert result(out)[1] == wanted[1] | other[1]
        assert wanted[0][0] in result(out)[0]
        (done,) = (path for path in out.rglob("results.json") if "seed9" not in str(path))
        shutil.rmtree(done.parent)


@pytest.mark.parametrize("place", ["data", "runs"])
def test_a_folder_that_cannot_be_written_is_one_line(place, flags, tmp_path):
    options = [*flags, "--data", tmp_path / "data", "--out", tmp_path / "runs"]
    if place == "runs":
        shutil.copytree(flags[1], tmp_path / "data")
    log = tmp_path / "log"
    disturb = (read_only, str(tmp_path / place))
    line = one_line(*end(start("coop", *options, disturb=disturb, log=log)))
    assert os.strerror(errno.EROFS) in line and str(tmp_path / place) in line


def test_a_read_only_data_folder_is_enough(flags, world, tmp_path):
    run("coop", *flags, "--out", tmp_path / "runs", disturb=(read_only, str(world)))


def test_a_file_in_place_of_a_folder_is_one_line(flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file" in refusal("coop", *flags, "--out", tmp_path / "file")
    options = [*flags, "--data", tmp_path / "file", "--out", tmp_path / "x"]
    assert "file" in refusal("coop", *options)
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------------------- foreign files


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The --out folder of a finished run."""
    out = tmp_path_factory.mktemp("finished") / "runs"
    options = ["--data", world, "--dataset", "textures", "--shots", 1, "--epochs", 2]
    run("coop", *options, "--out", out)
    return out


@pytest.fixture
def trained(finished, tmp_path):
    """(--out folder, prompt file, tensors, metadata) of a finished run to be spoilt."""
    out = shutil.copytree(finished, tmp_path / "runs")
    (path,) = out.rglob("prompt.safetensors")
    with safe_open(path, "pt") as file:
        return out, path, load_file(path), json.loads(file.metadata()["about"])


class Bomb:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


BYTES = {
    "empty": b"",
    "random": random.Random(0).randbytes(2000),
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
    "zip": b"PK\3\4" + b"\0" * 100,
}
ABOUTS = {
    "a list": [1],
    "a number": 1,
    "no method": {"method": None},
    "another method": {"method": "dpt"},
    "another CLIP": {"CLIP": "0" * 16},
    "another training set": {"training set": "0" * 32},
    "no training set": {"training set": None},
    "no configuration": {"config": None},
    "a list of options": {"config": [1]},
    "an unknown option": {"config": {"wings": 2}},
}


def spoil(kind, path, tensors, about):
    """Replaces a prompt file by another of some kind."""
    metadata = {"about": json.dumps(about)}
    ((name, tensor),) = tensors.items()
    if kind in BYTES:
        path.write_bytes(BYTES[kind])
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(path.with_name("executed"))))
    elif kind == "pickle of torch":
        torch.save(Bomb(path.with_name("executed")), path)
    elif kind in ABOUTS:
        if isinstance(ABOUTS[kind], dict):
            merged = about | ABOUTS[kind]
            about = {key: value for key, value in merged.items() if value is not None}
        else:
            about = ABOUTS[kind]
        save_file(tensors, path, {"about": json.dumps(about)})
    elif kind == "wrong JSON":
        save_file(tensors, path, {"about": metadata["about"][:-1]})
    elif kind == "no metadata":
        save_file(tensors, path)
    elif kind == "another name":
        save_file({"other": tensor}, path, metadata)
    elif kind == "another shape":
        save_file({name: tensor[..., 1:].contiguous()}, path, metadata)
    elif kind == "another type":
        save_file({name: tensor.bool()}, path, metadata)
    else:
        save_file({name: tensor * torch.nan}, path, metadata)


KINDS = [*BYTES, "cut", "pickle", "pickle of torch", *ABOUTS, "wrong JSON", "no metadata"]
KINDS += ["another name", "another shape", "another type", "NaN"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_prompt_file_is_one_line(kind, trained, flags):
    out, path, tensors, about = trained
    (path.with_name("results.json")).unlink()
    spoil(kind, path, tensors, about)
    spoilt = path.read_bytes()
    load = ["--data", flags[1], "--out", out, "--load", path.parent]
    loading = start("coop", *load)
    if kind != "an unknown option":  # which only --load asks for
        assert str(path.parent) in refusal("coop", *flags, "--out", out)
    assert str(path.parent) in one_line(*end(loading))
    assert path.read_bytes() == spoilt
    assert not list(out.rglob("executed")) and not list(out.rglob("results.json"))


@pytest.mark.parametrize("kind", [*BYTES, "pickle", "pickle of torch"])
def test_a_hostile_checkpoint_is_one_line(kind, trained, flags):
    out, path, tensors, about = trained
    spoil(kind, path, tensors, about)
    path.rename(path.with_name("checkpoint.pt"))
    assert "checkpoint.pt" in refusal("coop", *flags, "--out", out)
    assert not list(out.rglob("executed"))
    run("coop", *flags, "--force", "--out", out)


@pytest.mark.parametrize("content", ['[{"run": "half', "[1]", '[{"mine": 1}]', "\0\0"])
def test_a_foreign_results_file_is_named_and_kept(content, trained, flags):
    out, path, _, _ = trained
    file = path.with_name("results.json")
    file.write_text(content)
    assert str(file) in refusal("coop", *flags, "--out", out)
    assert file.read_text() == content


# ---------------------------------------------------------------------------- changed pictures


@pytest.fixture(scope="module")
def mine(world, tmp_path_factory):
    """(folder of a data set, --out folder, options of a run on it), to be copied."""
    top = tmp_path_factory.mktemp("mine")
    for part in "train", "test":
        for texture in "plain", "dotted":
            source = world / "shapes/textures" / part / texture
            shutil.copytree(source, top / "pictures" / part / texture)
    options = ["--model", f"local-dir:{world}/shapes/clip", "--shots", 0, "--epochs", 2]
    for stage, disturb in ("finished", None), ("half", (on_write, 10, interrupt)):
        out = top / stage
        end(start("coop", *options, "--dataset", top / "pictures", "--out", out, disturb=disturb))
    return top, options


def change(kind, folder):
    if kind == "a new picture":
        shutil.copy(folder / "train/plain/000.png", folder / "train/plain/new.png")
    elif kind == "another picture of the same name":
        shutil.copy(folder / "train/plain/001.png", folder / "train/plain/000.png")
    elif kind == "another label":
        (folder / "train/plain/000.png").rename(folder / "train/dotted/000b.png")
    else:
        for part in "train", "test":
            (folder / part / "plain").rename(folder / part / "smooth")


CHANGES = ["a new picture", "another picture of the same name", "another label", "another class"]


@pytest.mark.parametrize("kind", CHANGES)
def test_training_on_changed_pictures_is_refused_unless_forced(kind, mine):
    top, options = mine
    kept = shutil.copytree(top / "pictures", top / "kept")
    shutil.copytree(top / "finished", top / "finished_kept")
    shutil.copytree(top / "half", top / "half_kept")
    try:
        change(kind, top / "pictures")
        options = [*options, "--dataset", top / "pictures"]
        for stage, name in ("half", "checkpoint.pt"), ("finished", "prompt.safetensors"):
            out = top / stage
            (file,) = out.rglob(name)
            before = file.read_bytes()
            line = refusal("coop", *options, "--out", out)
            assert "with another training set; --force" in line
            assert file.read_bytes() == before
        old = result(out)
        run("coop", *options, "--force", "--out", out)
        assert result(out)[1] != old[1]
        run("coop", *options, "--out", out)  # finished again
    finally:
        for name in "pictures", "finished", "half":
            source = kept if name == "pictures" else top / f"{name}_kept"
            shutil.rmtree(top / name)
            source.rename(top / name)


def test_changed_test_pictures_are_evaluated_anew_with_the_same_prompt(mine, tmp_path):
    top, options = mine
    pictures = shutil.copytree(top / "pictures", tmp_path / "pictures")
    options = [*options, "--dataset", pictures, "--out", tmp_path / "runs"]
    run("coop", *options)
    (prompt,) = (tmp_path / "runs").rglob("prompt.safetensors")
    before = prompt.read_bytes()
    shutil.copy(pictures / "test/plain/000.png", pictures / "test/plain/new.png")
    run("coop", *options)
    (row,) = result(tmp_path / "runs")[0]
    assert row[-1] == 9 and prompt.read_bytes() == before
