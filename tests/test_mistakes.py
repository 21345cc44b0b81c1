"""Odd inputs by the hundred: each one works, or ends in one line that names what is at fault.

A Row is a command line, what its one line must name, and the files that it meets. Every row runs in
this process, in a folder of its own that is also its working folder: "runs" and "data" in it may be
written, and nothing else. RUN stands there for the folder of a finished run, HALTED of one begun.
"""

import functools
import glob
import inspect
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
from typing import NamedTuple, get_args

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

import common
import coop
from tests.conftest import interrupted
from tests.miniatures import confined, miniature, tiny_clip, tree
from tests.test_loading import Code
from tests.tools.ask import METHODS

ESC, CUT, RAW, LONG = "\x1b[31m", "a\nb", "\udcff", "x" * 300  # RAW: a byte that is not UTF-8
ODD = {ESC: "[31m", CUT: "b", RAW: "udcff", LONG: "xxx"}  # and what is left of them in a line
SECONDS = 10  # that an input may take


class Row(NamedTuple):
    said: object  # what the line names; None: it works; a tuple: it works, or the line names one
    command: str  # a method, or "" for common.py
    argv: object  # a list, or its words as one text
    files: dict = {}  # {path: bytes, or a function that makes something there}
    tree: str = ""  # a folder of the world, copied here first


def bytes_of(write, *arguments, **options):
    """What write(*arguments, file) writes."""
    write(*arguments, file := io.BytesIO(), **options)
    return file.getvalue()


def encoded(form, mode="RGB", size=(9, 7), frames=1, **options):
    options |= {"append_images": [Image.new(mode, size, 1)], "save_all": True} if frames > 1 else {}
    return bytes_of(Image.new(mode, size).save, format=form, **options)


pickled = functools.partial(bytes_of, torch.save)


def edited(change):
    """A file that is there, with what change makes of its bytes."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def piped(path):
    """A pipe in place of a file: who reads it waits."""
    path.unlink()
    os.mkfifo(path)


def replaced(keys, value, thing):
    """thing, a tree of dicts, with another value behind the keys."""
    functools.reduce(lambda tree, key: tree[key], keys[:-1], thing)[keys[-1]] = value
    return thing


def in_json(change, *arguments):
    """change(*arguments, thing), of the thing that the bytes of a JSON file hold."""
    return lambda text: json.dumps(change(*arguments, json.loads(text))).encode()


def retold(tensors=lambda t: t, about=lambda about: about):
    """A prompt.safetensors with other tensors, or that tells something else about them."""

    def change(whole):
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        told = json.dumps(about(json.loads(header["__metadata__"]["about"])))
        return save(tensors(load(whole)), {"about": told})

    return edited(change)


PNG, JPEG = encoded("PNG"), encoded("JPEG", size=(64, 64))
FOUR = [f"{part}/{c}/1.png" for part in ("train", "test") for c in "ab"]
DEEP = b"[" * 99999  # deeper than Python reads
JSONS = [b"", b"x", b"null", b"3", b'"x"', b"{}", b"[1]", b"[[]]", b"[{}]", DEEP, b"\xff"]
JSONS += [b'[{"evaluated_on": [], "classes": {}}]', b"9" * 9999]


def options():
    """Every option: wrong types, and numbers that a run can hardly bear."""
    wrong = {int: ["x", "1.5", "-2"], float: ["x", "nan"], bool: ["x"]}
    hard = {int: ["0", "999", str(10**30)], float: ["inf"]}
    for method, module in METHODS.items():
        names = common.comments(module.Config)
        for name in names | (common.comments(common.Config) if method == "coop" else {}):
            field, flag = module.Config.__dataclass_fields__[name], f"--{name}"
            for value in wrong.get(field.type, ["x", ESC] if get_args(field.type) else []):
                yield Row(flag, method, [f"{flag}={value}"])
            if name not in ("epochs", "iterations"):  # which only do what they are told
                for value in hard.get(field.type, []):
                    said = flag, f"with {value} context", "diverged", "nothing to learn"
                    yield Row(said, method, [flag, value])
    # Spellings of a number and of what is no option, then the options that take any text
    for value in ["", "0x10", "1 2", "²", "--", "1\n2", "猫", "9" * 5000, RAW, ESC, "٣", "1_0"]:
        yield Row(("--shots",), "coop", ["--shots", value])
        yield Row("--help", "coop", ["--csc", value or "3"])
    plain = {name: name for name in ["../x", "C:", "/dev/null", "imagenet", "猫"]}
    for name, said in (plain | ODD | {"x" * 5000: "xxx"}).items():
        yield Row(said, "coop", [f"--dataset={name}", "--data=data"])
        yield Row(said, "", [f"--transfer={name}", "--data=data"])
        yield Row(said, "softcpt", [f"--dataset={name},x", "--data=data"])
        yield Row(f"{said}/prompt.safetensors", "coop", ["--load", name])
        for flag, more in ("--model", ""), ("--device", ""), ("--model", "local-dir:"):
            yield Row(flag, "coop", [f"{flag}={more}{name}"])
    for name in ".", ",", "shapes,", "Shapes", "dtd", "general10":
        yield Row(name, "coop", [f"--dataset={name}", "--data=data"])
    for name in " ", *ODD, "a " * 100, "{}", "<start_of_text>":
        yield Row(("--init", "nothing to learn"), "coop", [f"--init={name}"])
        yield Row(("--tasks", ODD.get(name, "a")), "softcpt", [f"--tasks={name}"])
    for name in ESC, CUT, RAW, "a/../b", "猫":
        yield Row(None, "coop", [f"--out=runs/{name}"])
    for file, argv in ("data", "--dataset textures --data data"), ("runs", ""), ("runs/coop", ""):
        yield Row(file, "coop", argv, {file: b""})


def data_sets():
    """Folders of class folders, pictures, benchmarks."""
    two, ask, names = ["a/1.png", "a/2.png"], "--dataset own", "_ {} é猫 -x ' a,b \u202e \\".split()
    lacking = [["x.txt"], ["1.png"], two, ["a/1.png", "b/1.png"], [*two, "b/x.txt"], FOUR[:2]]
    lacking += [[*two, ".b/1.png", ".b/2.png"], ["train/a/1.png", "test/b/1.png"], [*two, "b"]]
    lacking += [[*two, "b/.1.png"], [*two, "b/c/1.png"], FOUR[:3], FOUR[1:], ["train", "test"]]
    for files in lacking:
        yield Row("own", "coop", ask, {f"own/{file}": PNG for file in files})
    for name in [*names, ESC, CUT, RAW, "x" * 255, " "]:
        files = {f"own/{p}/{c}/1.png": PNG for p in ("train", "test") for c in ("b", name)}
        yield Row(("class name 'xxx",), "coop", ask, files)
    for name in "o,n", ESC, CUT, RAW, "é猫 ", "{}", "x" * 200:
        yield Row(None, "coop", ["--dataset", name], {f"{name}/{file}": PNG for file in FOUR})
    # Pictures, to train on and to test on: those that work, and those that cannot be read
    kinds = "TIFF I;16,PNG I;16,PNG P,PNG LA,PNG RGBA,JPEG CMYK,TIFF CMYK,PNG 1,TIFF 1,TIFF F,BMP L"
    good = [encoded(*kind.split()) for kind in f"{kinds},TIFF LAB,PPM L,WEBP RGBA".split(",")]
    good += [encoded(form, frames=2) for form in ("GIF", "PNG", "WEBP", "TIFF")]
    good += [encoded("PNG", size=size) for size in ((1, 1), (1, 3000), (3000, 1))]
    good += [encoded("PNG", "P", transparency=0), PNG + b"more", JPEG]
    bad = [b"", b"hello", PNG[:20], PNG[:-30], JPEG[:-99], JPEG[:30], encoded("BMP")[:-9]]
    bad += [PNG[:16] + b"\0\0\xff\xff" * 2 + PNG[24:], PNG[:16] + bytes(8) + PNG[24:], os.mkdir]
    bad += [os.mkfifo, lambda path: path.symlink_to("no"), lambda path: path.symlink_to(path.name)]
    for content in good:
        files = {f"own/{part}/{c}/x.jpg": content for part in ("train", "test") for c in "ab"}
        yield Row(None, "coop", "--dataset own", files)
    for part, content in itertools.product(["train", "test"], bad):
        files = {f"own/{file}": PNG for file in FOUR if file != f"{part}/b/1.png"}
        yield Row("x.jpg", "coop", "--dataset own", files | {f"own/{part}/b/x.jpg": content})
    # Split files and lists of benchmarks
    ask, split = "--data data --dataset dtd", "data/dtd/split_zhou_DescribableTextures.json"
    row, parts = [good := "banded/banded_0005.jpg", 0, "a"], common.PARTS
    rows = [[row], [[]], [row[:2]], [[*row, 0]], [0], None, 0, {}, {"a": 0}, "x", [[row]], []]
    for y in 10**9, -1, "x", "0", None, [], math.inf, math.nan, 10**30:
        rows.append([row, [good, y, "b"]])
    texts = [({part: [row]}, "dtd") for part in parts]
    texts += [(dict.fromkeys(parts, lists), "dtd") for lists in rows]
    for name in "missing.jpg", "", ESC, CUT, "\0", "\ud800", LONG, "..", None, 3, {}:
        texts.append((dict.fromkeys(parts, [row, [name, 1, "b"]]), "data/dtd/images/"))
        texts.append((dict.fromkeys(parts, [row, [good, 1, name]]), ("class name 'xxx",)))
    contents = [(json.dumps(text).encode(), said) for text, said in texts]
    for content, said in [(content, "dtd") for content in JSONS] + contents:
        yield Row(said, "coop", ask, {split: content}, "data/dtd")
    yield Row("dtd", "coop", ask, {split: piped}, "data/dtd")
    for content in b"", b"\n\n", b"x", b"0034001", b"0034001 nothing", b"\xff", b" 707-320":
        for file in "variants.txt", "images_variant_train.txt":
            files, tree = {f"data/fgvc_aircraft/{file}": content}, "data/fgvc_aircraft"
            yield Row("aircraft", "coop", f"{ask} --dataset fgvc_aircraft", files, tree)


def weights():
    """Weights files, and folders of a model."""
    whole, ask = "clip/open_clip_model.safetensors", "--model ViT-B-16 --pretrained w.pt"

    def prefixed(state, prefix="module."):
        return {prefix + name: tensor for name, tensor in state.items()}

    good = [pickled, lambda s: pickled({"state_dict": prefixed(s), "epoch": 3})]
    good += [lambda s: pickled({"state_dict": s}), lambda s: pickled(prefixed(s))]
    plain = [b"", b"hello", b"PK\3\4", DEEP, PNG, b"cos\nsystem\n(S'mkdir made'\ntR."]
    plain += [pickled(x) for x in (Code("made"), [], 3, {}, {"state_dict": 3}, {1: 2})]
    bad = [lambda s, x=x: x for x in plain]
    bad += [lambda s: pickled(s | {"more": Code("made")}), lambda s: pickled(s)[:-99], save]
    for odd in torch.ones(3), torch.full((32, 16), math.nan), "x", None, torch.ones(()), {}:
        bad.append(lambda s, x=odd: pickled(s | {"text_projection": x}))
    bad += [lambda s: pickled(prefixed(s, "model.")), lambda s: pickled(dict([*s.items()][1:]))]
    for said, change in [(None, change) for change in good] + [("w.pt", change) for change in bad]:

        def content(path, f=change):
            path.write_bytes(f(load((path.parent / whole).read_bytes())))

        yield Row(said, "coop", ask, {"w.pt": content}, "clip")
    odd = {"preprocess_cfg": [3], "model_cfg": [3, {}], "model_cfg text_cfg": [None, [], {}]}
    odd |= {"preprocess_cfg mean": [3, "x", [1, 2], [1, 2, math.nan], ["a", "b", "c"]]}
    odd |= {"preprocess_cfg std": [0, -1, "x", [0, 1, 1], [1, 1, math.nan]]}
    for key in "embed_dim", "vision_cfg image_size", "vision_cfg width", "text_cfg vocab_size":
        odd[f"model_cfg {key}"] = [0, -1, "x", 10**30]
    contents = [b"[]", b"", b"x", b"null", DEEP]
    for keys, values in odd.items():
        contents += [edited(in_json(replaced, keys.split(), value)) for value in values]
    files = [{"clip/open_clip_config.json": content} for content in contents]
    for file in [*files, {whole: b"{}"}, {whole: b""}, {whole: os.remove}]:
        yield Row("local-dir:clip", "coop", "--model local-dir:clip", file, "clip")


def runs():
    """Runs that are read again."""
    read, predict, tree = ("coop", "--load RUN"), ("", "predict RUN x.png"), "runs/coop"
    bad = [edited(lambda whole, n=n: whole[:n]) for n in (0, 4, 99, -1)]
    bad += [b"hello", b"\xff" * 99, b"\2" + bytes(7) + b"{}", pickled(Code("made")), PNG]
    for f in torch.Tensor.int, torch.Tensor.half, torch.sum, lambda x: x * math.nan:
        bad.append(retold(lambda t, f=f: {"ctx": f(t["ctx"])}))
    bad += [retold(lambda t: {}), retold(lambda t: t | {"more": t["ctx"] + 1})]
    bad += [retold(about=lambda about, x=x: x) for x in (None, 3, [], {}, "x")]
    for content in [*bad, save({"ctx": torch.ones(1, 16, 32)})]:
        for command, argv in ("coop", ""), ("", "interpret RUN"):
            yield Row("runs/coop", command, argv, {"RUN/prompt.safetensors": content}, tree)
    keys = "method,CLIP,training set,train_seconds,classnames,config,more".split(",")
    fields = [("config", field) for field in coop.Config.__dataclass_fields__ if field != "model"]
    for path in [*[(key,) for key in keys], *fields, ("classnames", "own")]:
        for value in "x", []:
            change = retold(about=functools.partial(replaced, path, value))
            for command, argv in read, predict:
                files = {"RUN/prompt.safetensors": change, "x.png": PNG}
                said = f"--{path[-1]}", "runs/coop", "no data set or folder 'x'"
                yield Row(said, command, argv, files, tree)
    for file, command, argv in ("results.json", *read), ("prompt.safetensors", *predict):
        yield Row(file, command, argv, {f"RUN/{file}": piped, "x.png": PNG}, tree)
    yield Row("runs", "", "report", {"runs/x/results.json": os.mkfifo})
    for content in JSONS:
        yield Row(("results.json",), *read, {"RUN/results.json": content}, tree)
        yield Row("runs", "", "report", {"runs/x/results.json": content})
    for key in "config method evaluated_on dataset model shots seed classes accuracy".split():
        for value in None, 3, [], ESC, RAW:
            twice = edited(in_json(lambda rows, k=key, v=value: [*rows, rows[0] | {k: v}]))
            yield Row(("runs",), "", "report", {"RUN/results.json": twice}, tree)
    bad = [b"", b"hello", b"PK\3\4", DEEP, PNG, edited(lambda x: x[:99]), edited(lambda x: x[:-9])]
    bad += [pickled(x) for x in (Code("made"), [], {}, 3, None, {"epoch": 1})]
    for key in "epoch", "about", "prompt", "optimizer", "optimizer sgd", "about CLIP", "prompt ctx":
        for change in [functools.partial(replaced, key.split(), x) for x in (None, -1)]:
            bad.append(edited(lambda b, f=change: pickled(f(torch.load(io.BytesIO(b))))))
    for content in bad:
        yield Row(("runs/coop",), "coop", "--epochs 2", {"HALTED/checkpoint.pt": content}, tree)


def tools():
    """What common.py runs by a name."""
    run, files = "runs/coop", {"x.png": PNG, "pipe": os.mkfifo, "empty": os.mkdir, "t/x.txt": b""}
    for name in *ODD, "../x", "caltech", "shapes-":
        said = ODD.get(name, name)
        yield Row(said, "", ["download", name])
        yield Row(said, "", [name])
    asked = {"download": "dataset", "download dtd --data data": "data", "predict RUN": "PICTURES"}
    asked |= {"shapes --steps x": "--steps", "benchmark --layers x": "--layers", "interpret": "RUN"}
    for argv, said in (asked | {"benchmark --rows x": "--rows"}).items():
        yield Row(said, "", argv, files | {"data": b""}, run)
    for name in *ODD, "nowhere", "pipe", "empty", "t":
        yield Row(ODD.get(name, name), "", ["predict", "RUN", "x.png", name], files, run)
        yield Row("prompt.safetensors", "", ["interpret", name], files, run)
    for names in "a", "a,", ",", " ", "a,a", "a, a", "\n,b", "a,b,b":
        yield Row("--names", "", ["predict", "RUN", "x.png", "--names", names], files, run)
    for name in *ODD, "é", "{}", "猫 " * 99, ".":
        said, argv = (ODD.get(name, name[:9]),), ["predict", "RUN", "x.png", "--names", f"{name},b"]
        yield Row(said, "", argv, files, run)
    for argv in "--task x", "--attention a.png", "--device x", "--task \x1b[31m":
        yield Row(argv.split()[0], "", f"predict RUN x.png {argv}", files, run)
    for file in "runs/no/a.png", "runs", "runs/x/a", f"runs/{LONG}.png":
        argv, there = f"predict RUN x.png --attention {file}", {"x.png": PNG, "runs/x": b""}
        yield Row(file[:60], "", argv, there, "runs/dpt")


ROWS = [row for rows in (options, data_sets, weights, runs, tools) for row in rows()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of what rows share: a tiny CLIP, pictures, two benchmarks and runs."""
    place = tmp_path_factory.mktemp("world")
    tree(place / "own", FOUR)
    for name in "dtd", "fgvc_aircraft":
        miniature(name, place / "data")
    usual = ["--model", tiny_clip(place / "clip"), "--dataset", f"{place}/own", "--shots", "1"]
    usual += ["--out", f"{place}/runs", "--epochs"]
    for method in METHODS.values():
        method.main(common.cli(method.Config, [*usual, "1"]))
    with interrupted(at=2):
        coop.main(common.cli(coop.Config, [*usual, "2"]))
    sizes = json.loads((place / "clip/open_clip_config.json").read_text())["model_cfg"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16", sizes)
        # Each row is spared two tenths of a second: a script's source, and CLIP's words, again
        for module, name in (inspect, "getsource"), (open_clip.factory, "SimpleTokenizer"):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield place


def ended(command, argv):
    """The exit code of a command line."""
    try:
        if command:
            main, config = METHODS[command].main, METHODS[command].Config
            common.script(lambda: main(common.cli(config, argv)))
        else:
            common.main(*argv)
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ascii(row.argv)[:80])
def test_an_odd_input_works_or_ends_in_one_line_that_names_it(row, world, tmp_path, monkeypatch):
    def here(word):
        return word.replace("RUN", folders[0]).replace("HALTED", folders[1])

    def listing():  # what stands beside runs and data, and the hidden files anywhere: drafts
        paths = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        return [p for p in paths if p.parts[0] not in ("runs", "data") or p.name.startswith(".")]

    monkeypatch.chdir(tmp_path)
    if row.tree:
        shutil.copytree(world / row.tree, row.tree)
    named = [glob.glob(f"runs/*/*/1shots_seed1_epochs={epochs}_*") for epochs in (1, 2)]
    folders = [found[0] if found else "none" for found in named]
    for name, content in row.files.items():
        path = tmp_path / here(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content(path) if callable(content) else path.write_bytes(content)
    before, words = listing(), row.argv.split() if isinstance(row.argv, str) else row.argv
    usual = ["--device", "cpu", "--workers", "2"]
    if "--load" not in words:  # which brings its own
        usual += ["--model", f"local-dir:{world}/clip", "--dataset", f"{world}/own"]
        usual += ["--epochs", "1", "--shots", "1"]
    argv = [*([] if {*words[:1]} & {*common.TOOLS} else usual), *map(here, words)]
    shown = [io.TextIOWrapper(io.BytesIO(), "utf-8", e) for e in ("strict", "backslashreplace")]
    for name, value in zip(
        "argv stdout stderr".split(), [["common.py", *argv], *shown], strict=True
    ):
        monkeypatch.setattr(sys, name, value)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it takes too long"))
    signal.alarm(SECONDS)
    try:
        with confined(tmp_path / "runs", tmp_path / "data"):
            code = ended(row.command, argv)
    finally:
        signal.alarm(0)
    out, err = (file.flush() or file.buffer.getvalue().decode() for file in shown)
    lines = err.replace("\r", "\n").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (code, errors) in ((0, []), (2, lines[-1:])), f"{row.argv}: {code} {lines}"
    if code:
        names = [row.said] if isinstance(row.said, str) else row.said or ()
        assert any(name in errors[0] for name in names), f"{row.argv}: {errors}, not {row.said}"
    else:
        assert not isinstance(row.said, str), f"{row.argv} should be refused, for {row.said}"
    raw = [c for c in out + err if (c < " " or "\x7f" <= c < "\xa0") and c not in "\r\n"]
    assert not raw, f"{row.argv} prints {raw}"
    assert listing() == before
