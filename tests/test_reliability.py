"""kill -9, shared folders, full disks and foreign files: nothing is lost, and one clear line each.

KILLS=50 python -m pytest -s tests/test_reliability.py -k any_moment     # more kills, and figures
"""

import collections
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import coop
from tests import report
from tests.conftest import interrupted, toy
from tests.miniatures import (
    child,
    killed_at,
    picture,
    records,
    refusal,
    run_coop,
    tiny_clip,
    watched,
)

KILLS = int(os.environ.get("KILLS", 4))
VOLATILE = ("train_seconds", "eval_seconds", "time", "peak_gpu_mb", "commit")


@pytest.fixture
def flags(world):
    """Flags of a short run on the shapes world, with --out OUT to be added."""
    return ["--data", world, "--shots", 1, "--epochs", 6, "--batch_size", 8]


def prompts(out):
    return {p.parent.name: load_file(p) for p in sorted(Path(out).rglob("prompt.safetensors"))}


def result(out):
    """All that the runs below out have come to, but for times and the name of out."""
    rows = [{k: v for k, v in row.items() if k not in VOLATILE} for row in records(out)]
    tensors = {
        (run, name): tensor.tolist()
        for run, state in prompts(out).items()
        for name, tensor in state.items()
    }
    return json.loads(json.dumps(rows).replace(str(out), "OUT")), tensors


def stage(out):
    """How far a killed run had come, by what it left below out."""
    names = {path.name for path in out.rglob("*")} if out.exists() else ()
    found = [
        n for n in ("checkpoint.safetensors", "prompt.safetensors", "results.jsonl") if n in names
    ]
    return "after " + found[-1].split(".")[0] if found else "before the first checkpoint"


def padded(flags, out, size):
    """Makes one run below out, pads its record by size characters, and returns that."""
    run_coop(*flags, "--epochs", 1, "--seed", 99, "--out", out)
    (row,) = records(out)
    row["config"]["padding"] = "x" * size
    (out / "results.jsonl").write_text(json.dumps(row) + "\n")
    return row


def test_a_run_killed_at_any_moment_ends_as_an_undisturbed_one(flags, tmp_path):
    def command(name):
        return [*flags, "--out", tmp_path / name]

    writes, rng, stages = [], random.Random(5), collections.Counter()
    with watched(writes.append):
        run_coop(*command("undisturbed"))
    wanted = result(tmp_path / "undisturbed")
    child(os.getcwd).join()  # starts what starts the others
    start, process = time.time(), child(run_coop, *command("timed"))
    process.join()
    seconds = time.time() - start
    assert (process.exitcode, result(tmp_path / "timed")) == (0, wanted)  # process or not: the same
    for kill in range(KILLS):
        out = tmp_path / f"kill{kill}"
        if kill % 2:  # at one of its writes
            code = killed_at(rng.randint(1, len(writes)), run_coop, *command(out.name))
        else:  # at any time
            process = child(run_coop, *command(out.name))
            time.sleep(rng.uniform(0.2, 1) * seconds)
            process.kill()
            process.join()
            code = process.exitcode
        stages[stage(out) if code == -signal.SIGKILL else "it had ended"] += 1
        assert not (out / "results.jsonl").exists() or len(records(out)) == 1
        run_coop(*command(out.name))
        assert result(out) == wanted
    print(f"\n{KILLS} kills, {KILLS} identical results; killed: {dict(stages)}")
    assert stages["it had ended"] < KILLS / 2


def test_a_killed_grid_is_completed_without_redoing_what_was_finished(flags, tmp_path):
    def command(name):
        return [*flags, "--seed", "1,2,3", "--out", tmp_path / name]

    writes, out = [], tmp_path / "killed"
    with watched(writes.append):
        run_coop(*command("undisturbed"))
    assert killed_at(len(writes) * 6 // 10, run_coop, *command("killed")) == -signal.SIGKILL
    finished, again = list(prompts(out)), []
    assert 0 < len(finished) < 3 and records(out)
    with watched(again.append):
        run_coop(*command("killed"))
    assert result(out) == result(tmp_path / "undisturbed")
    assert not [path for path in again for run in finished if f"/{run}/" in path]
    assert 0 < len(again) < len(writes)


def test_processes_that_share_a_folder_lose_nothing(flags, tmp_path):
    some = [["--seed", f"{p}1,{p}2,{p}3,{p}4"] for p in (1, 2, 2)]  # two do the same work
    filler = padded(flags, tmp_path, 2_000_000)  # slow to read and write
    logs = [tmp_path / f"log{i}" for i in range(len(some))]
    crowd = [
        child(run_coop, *flags, "--epochs", 1, *seeds, "--out", tmp_path, log=log)
        for seeds, log in zip(some, logs, strict=True)
    ]
    for process, log in zip(crowd, logs, strict=True):
        process.join()
        assert process.exitcode == 0, log.read_text()
    rows = records(tmp_path)
    assert rows[0] == filler
    assert {row["seed"] for row in rows[1:]} == {11, 12, 13, 14, 21, 22, 23, 24}
    assert len(prompts(tmp_path)) == 9


def test_finished_runs_are_skipped_and_force_redoes_them(flags, tmp_path):
    command, again = [*flags, "--out", tmp_path], []
    first, wanted = run_coop(*command), result(tmp_path)
    with watched(again.append):
        assert run_coop(*command) == first
    assert again == [] and result(tmp_path) == wanted
    with watched(again.append):
        assert run_coop(*command, "--force") == first
    assert any("prompt.safetensors" in path for path in again)
    assert prompts(tmp_path).keys() == {run for run, _ in wanted[1]}
    assert result(tmp_path)[0][-1]["accuracy"] == wanted[0][0]["accuracy"]


def test_shards_divide_the_grid(flags, tmp_path):
    grid = [*flags, "--epochs", 1, "--seed", "1,2,3,4,5", "--out", tmp_path]
    run_coop(*grid, "--shard", "1/2")
    assert [row["seed"] for row in records(tmp_path)] == [1, 3, 5]
    run_coop(*grid, "--shard", "2/2")
    assert [row["seed"] for row in records(tmp_path)] == [1, 3, 5, 2, 4]


# ---------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("size", [10, 2_500, 90_000])  # the configuration, a checkpoint, the record
def test_a_full_disk_is_one_line_and_nothing_is_lost(size, flags, tmp_path, capsys):
    run_coop(*flags, "--out", tmp_path / "roomy")
    out, wanted = tmp_path / "full", records(tmp_path / "roomy")[0]["accuracy"]
    other = padded(flags, out, 100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        line = refusal(capsys, run_coop, *flags, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in line  # what the limit says in place of "No space left on device"
    assert records(out) == [other]
    assert run_coop(*flags, "--out", out) == wanted
    assert records(out)[0] == other and len(records(out)) == 2
    assert not [path.name for path in out.rglob(".*")]


def read_only(folder):
    def refuse(path):
        if path.startswith(str(folder)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    return watched(refuse)


def test_a_read_only_data_folder_is_enough(flags, tmp_path, world):
    with read_only(world):
        run_coop(*flags, "--out", tmp_path)
    assert len(records(tmp_path)) == 1


@pytest.mark.parametrize("place", ["data", "runs"])
def test_a_folder_that_cannot_be_written_is_one_line(place, flags, tmp_path, capsys):
    shutil.copytree(flags[1], tmp_path / "data", dirs_exist_ok=True)
    if place == "data":
        shutil.rmtree(tmp_path / "data/shapes/shapes")  # it would have to be drawn
    with read_only(tmp_path / place):
        places = ["--data", tmp_path / "data", "--out", tmp_path / "runs"]
        line = refusal(capsys, run_coop, *flags, *places)
    assert "Read-only" in line and str(tmp_path / place) in line


def test_a_file_in_place_of_a_folder_is_one_line(flags, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "file" in refusal(capsys, run_coop, *flags, "--out", tmp_path / "file")
    assert "file" in refusal(capsys, run_coop, "--data", tmp_path / "file", "--out", tmp_path / "x")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("line", ['{"run": "half', "[]", '{"mine": 1}', "\0\0"])
def test_a_results_file_with_a_foreign_line_is_named_and_kept(line, flags, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    assert str(path) in refusal(capsys, run_coop, *flags, "--epochs", 1, "--out", tmp_path)
    with pytest.raises(common.Error, match="no record"):
        report.read(tmp_path)
    assert path.read_text() == line + "\n"


# ---------------------------------------------------------------------------- prompt files


@pytest.fixture
def trained(flags, tmp_path):
    """(folder, tensors, metadata) of a finished run below tmp_path / "runs"."""
    run_coop(*flags, "--epochs", 1, "--out", tmp_path / "runs")
    (path,) = (tmp_path / "runs").rglob("prompt.safetensors")
    with safe_open(path, "pt") as file:
        return path.parent, load_file(path), json.loads(file.metadata()["json"])


def test_a_loaded_prompt_gives_the_result_of_its_training(trained, flags, tmp_path):
    folder, _, meta = trained
    with read_only(tmp_path / "runs"):
        accuracy = run_coop("--data", flags[1], "--load", folder, "--out", tmp_path / "new")
    (old,), (new,) = records(tmp_path / "runs"), records(tmp_path / "new")
    assert accuracy == old["accuracy"] == new["accuracy"] and old["n_test"] == new["n_test"]
    assert not list((tmp_path / "new").rglob("*.safetensors"))


BYTES = {
    "empty": b"",
    "random": random.Random(0).randbytes(2000),
    "pickle": pickle.dumps({"ctx": [1.0]}),
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
    "zip": b"PK\3\4" + b"\0" * 100,
}
CHANGES = {
    "no metadata": None,
    "metadata of another kind": [1],
    "no method": {"method": None},
    "another method": {"method": "dpt"},
    "other weights": {"fingerprint": "0" * 16},
    "no configuration": {"config": {}},
    "data sets of another kind": {"data": [["x"]]},
}


@pytest.mark.parametrize("kind", [*BYTES, *CHANGES, "cut", "shape", "name", "absent"])
def test_a_hostile_prompt_file_is_one_line(kind, trained, flags, tmp_path, capsys):
    folder, tensors, meta = trained
    path, changes = folder / "prompt.safetensors", CHANGES.get(kind, {})
    (name,) = tensors
    if kind in BYTES:
        path.write_bytes(BYTES[kind])
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif kind == "absent":
        path.unlink()
    else:
        tensor = tensors[name]
        tensor = {"shape": tensor[..., 1:].contiguous(), "type": tensor.bool()}.get(kind, tensor)
        meta = changes if kind == "metadata of another kind" else meta | (changes or {})
        metadata = {"json": json.dumps({k: v for k, v in meta.items() if v is not None})
                    if isinstance(meta, dict) else json.dumps(meta)}  # fmt: skip
        save_file(
            {"other" if kind == "name" else name: tensor},
            path,
            None if changes is None else metadata,
        )
    command = ["--data", flags[1], "--load", folder, "--out", tmp_path / "new"]
    assert str(path) in refusal(capsys, run_coop, *command)
    assert not (tmp_path / "new/results.jsonl").exists()


def test_a_prompt_of_another_clip_is_refused(trained, flags, tmp_path, capsys):
    folder, _, _ = trained
    clip = tiny_clip(tmp_path / "clip")
    command = ["--data", flags[1], "--load", folder, "--out", tmp_path / "new", "--model", clip]
    assert "weights" in refusal(capsys, run_coop, *command)


def test_a_broken_checkpoint_is_one_line(flags, tmp_path, capsys):
    run_coop(*flags, "--out", tmp_path)
    (path,) = tmp_path.rglob("prompt.safetensors")
    (tmp_path / "results.jsonl").unlink()
    path.write_bytes(BYTES["random"])
    assert str(path) in refusal(capsys, run_coop, *flags, "--out", tmp_path)
    path.rename(path.with_name("checkpoint.safetensors"))
    assert "checkpoint.safetensors" in refusal(capsys, run_coop, *flags, "--out", tmp_path)


# ---------------------------------------------------------------------------- two copied files


def test_two_files_copied_to_an_empty_folder_train_on_a_folder_of_images(tmp_path):
    here = Path(common.__file__).parent
    for file in "coop.py", "common.py":
        shutil.copy(here / file, tmp_path)
    for label, c in enumerate(["a cat", "dog"]):
        for i in range(4):
            picture(tmp_path / "my images" / c / f"{i}.png", label)
    command = ["coop.py", "--dataset", "my images", "--model", tiny_clip(tmp_path / "clip")]
    command += ["--shots", "1", "--epochs", "1", "--device", "cpu"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    (row,) = records(tmp_path / "runs")
    assert f"{row['accuracy']:.2f} (zero-shot" in done.stdout.splitlines()[-1]
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {
        *("coop.py", "common.py", "my images", "clip", "runs")
    }


def test_a_question_without_a_run_is_one_line(flags, tmp_path, capsys):
    for question in ["--predict", "x.png"], ["--interpret"]:
        assert "no finished run" in refusal(capsys, run_coop, *flags, *question, "--out", tmp_path)


def test_names_that_differ_only_in_signs_have_folders_of_their_own():
    folders = {common.run_folder(coop.Config(init=i)) for i in ("a b", "a-b", "a b.", "a_b")}
    assert len(folders) == 4


def test_a_loaded_run_is_recorded_as_the_run_itself(flags, tmp_path):
    run_coop(*flags, "--epochs", 1, "--out", tmp_path)
    folder = next(tmp_path.rglob("prompt.safetensors")).parent
    run_coop(*flags, "--load", folder, "--out", tmp_path, "--force")
    assert len({row["run"] for row in records(tmp_path)}) == 1


# ---------------------------------------------------------------------------- changed data


@pytest.fixture
def mine(tmp_path):
    """(folder, flags) of a run on class folders with train/ and test/, two images in each."""
    for part in "train", "test":
        for label, c in enumerate(["cat", "dog"]):
            for i in range(2):
                picture(tmp_path / "mine" / part / c / f"{i}.png", label)
    flags = ["--dataset", tmp_path / "mine", "--model", tiny_clip(tmp_path / "clip")]
    return tmp_path / "mine", [*flags, "--shots", 0, "--out", tmp_path / "runs"]


def change(kind, folder):
    if kind == "a new photograph":
        picture(folder / "train/cat/new.png", 0)
    elif kind == "another photograph of the same name":
        picture(folder / "train/cat/0.png", 0, (20, 20))
    elif kind == "another name of a file":
        (folder / "train/cat/0.png").rename(folder / "train/cat/other.png")
    elif kind == "another label":
        (folder / "train/cat/0.png").rename(folder / "train/dog/0b.png")
    else:
        for part in "train", "test":
            (folder / part / "cat").rename(folder / part / "caterpillar")


CHANGED = ["a new photograph", "another photograph of the same name", "another name of a file"]
CHANGED += ["another label", "another class name"]


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("stage", ["finished", "checkpoint"])
def test_training_on_changed_data_is_refused_unless_forced(kind, stage, mine, tmp_path, capsys):
    folder, flags = mine
    run_coop(*flags)
    (file,) = (tmp_path / "runs").rglob("prompt.safetensors")
    before = file.read_bytes()
    if stage == "checkpoint":
        file = file.rename(file.with_name("checkpoint.safetensors"))
        (tmp_path / "runs/results.jsonl").unlink()
    change(kind, folder)
    line = refusal(capsys, run_coop, *flags)
    assert "other images or class names" in line and "--force" in line
    assert file.read_bytes() == before
    run_coop(*flags, "--force")
    count = len(records(tmp_path / "runs"))
    run_coop(*flags)  # finished again
    assert len(records(tmp_path / "runs")) == count
    assert len(report.read(tmp_path / "runs")) == 1


def test_changed_test_images_are_evaluated_anew_with_the_same_prompt(
    mine, tmp_path, monkeypatch, capsys
):
    folder, flags = mine
    run_coop(*flags)
    before = prompts(tmp_path / "runs")
    picture(folder / "test/dog/new.png", 1)
    run_coop(*flags)
    assert [row["n_test"] for row in records(tmp_path / "runs")] == [4, 5]
    monkeypatch.setattr(coop, "train", None)  # and is then finished again
    run_coop(*flags)
    assert str(prompts(tmp_path / "runs")) == str(before)
    assert "finished before" in capsys.readouterr().out


def test_data_copied_elsewhere_is_the_same_data(mine, tmp_path, monkeypatch):
    folder, flags = mine
    monkeypatch.chdir(tmp_path)
    flags[1] = "mine"
    run_coop(*flags)
    (tmp_path / "other").mkdir()
    shutil.copytree(folder, tmp_path / "other/mine")
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setattr(coop, "train", None)
    run_coop(*flags)


def test_force_takes_back_what_the_old_prompt_was_worth_elsewhere(flags, world, tmp_path):
    elsewhere = ["--transfer", "shapes_negative"]
    run_coop(*flags, *elsewhere, "--out", tmp_path)
    run_coop(*flags, "--force", "--out", tmp_path)
    assert [row["evaluated_on"] for row in report.read(tmp_path)] == ["shapes"]
    run_coop(*flags, *elsewhere, "--out", tmp_path)
    rows = report.read(tmp_path)
    assert sorted(row["evaluated_on"] for row in rows) == ["shapes", "shapes_negative"]


def test_a_forced_run_that_fails_or_is_cut_short_leaves_no_old_number(mine, tmp_path, capsys):
    folder, flags = mine
    run_coop(*flags, "--epochs", 3)
    (file,) = (tmp_path / "runs").rglob("prompt.safetensors")
    (folder / "test/cat/1.png").rename(folder / "away.png")
    (folder / "test/cat/1.png").symlink_to("nowhere")
    assert "1.png" in refusal(capsys, run_coop, *flags, "--epochs", 3, "--force")
    assert file.exists()
    (folder / "away.png").replace(folder / "test/cat/1.png")
    with interrupted(at=2):
        run_coop(*flags, "--epochs", 3, "--force")
    assert not file.exists()
    run_coop(*flags, "--epochs", 3)
    assert file.exists()
    seconds = [row["train_seconds"] for row in records(tmp_path / "runs")]
    assert len(seconds) == 2 and seconds[0] != seconds[1]


def test_force_trains_anew_in_place_of_a_broken_prompt_file(flags, tmp_path):
    wanted = run_coop(*flags, "--out", tmp_path)
    (file,) = tmp_path.rglob("prompt.safetensors")
    file.write_bytes(BYTES["random"])
    assert run_coop(*flags, "--force", "--out", tmp_path) == wanted


def test_a_loaded_run_keeps_its_shots_and_seed(flags, tmp_path):
    run_coop(*flags, "--epochs", 1, "--out", tmp_path)
    folder = next(tmp_path.rglob("prompt.safetensors")).parent
    run_coop("--data", flags[1], "--load", folder, "--shots", 2, "--seed", 5, "--out", tmp_path)
    (row,) = records(tmp_path)
    assert (row["shots"], row["seed"]) == (1, 1)
    run_coop("--data", flags[1], "--load", folder, "--dataset", "textures", "--out", tmp_path)
    rows = report.read(tmp_path)
    assert {row["evaluated_on"]: row["transferred"] for row in rows} == {
        "shapes": False,
        "textures": True,
    }


def test_other_tensors_from_python_do_not_get_the_old_prompt(clip, tmp_path):
    cfg = coop.Config(dataset="toy", epochs=1, n_ctx=2, out=str(tmp_path))
    data = toy()
    first, _ = coop.train(cfg, clip, data)
    again, _ = coop.train(cfg, clip, data)
    assert first.ctx.equal(again.ctx)
    other = [(picture.clone(), *label) for picture, *label in data.train]
    other[0][0][:, 20, 20] += 1  # in the middle, where print(tensor) would not show it
    with pytest.raises(common.Error, match="other images"):
        coop.train(cfg, clip, data._replace(train=other))


def test_another_label_set_keeps_the_clip_of_the_loaded_run(flags, mine, tmp_path):
    run_coop(*flags, "--out", tmp_path / "shapes")
    (file,) = (tmp_path / "shapes").rglob("prompt.safetensors")
    command = ["--data", flags[1], "--out", tmp_path / "new", "--dataset", mine[0]]
    run_coop(*command, "--load", file.parent)
    assert records(tmp_path / "new")[0]["model"].endswith("shapes/clip")
