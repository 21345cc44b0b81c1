"""Users' mistakes: each ends in one line that says what is wrong, before an epoch is trained.

A row is what is typed after `python`, a regular expression for the line, and what is prepared in
the working folder: patterns of tests.fake_benchmarks.tree; -PATH deletes a file; @NAME writes a
miniature benchmark below data, @NAME:600 its first 600 class folders, @NAME/val:600 those of val/.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch

import common
import softcpt
from tests import fake_benchmarks
from tests.fake_benchmarks import put, tree, wordnet_classes, write_benchmark

FOLDERS = """
coop.py --dataset own | own holds 2 files and no class folders; .*own/<class>/ | own/1.jpg,2.jpg
coop.py --dataset own | own holds .* no class folders | own/.hidden/1.jpg
coop.py --dataset own | own .*train.*rename val | own/train,val/a,b/1.jpg
coop.py --dataset own | own .*train.* test | own/train/a,b/1.jpg
coop.py --dataset own | own .*test | own/test/a,b/1.jpg
coop.py --dataset own | own .*train.* test | own/train/a,b/1.jpg own/test/1.jpg
coop.py --dataset own | own: .* class 'Test' | own/Train,Test/a,b/1.jpg
coop.py --dataset own | own: at least two classes .*'cat' | own/cat/1.jpg,2.jpg
coop.py --dataset own | own: at least two classes .*'cat' | own/train,test/cat/1.jpg
coop.py --dataset own | own: no test images for class 'b' | own/a/1.jpg,2.jpg own/b/1.jpg
coop.py --dataset own | own: no .*images for class 'b' | own/a/1.jpg,2.jpg own/b/1.txt
coop.py --dataset own | own: no test images for class 'b' | own/train/a,b/1.jpg own/test/a/1.jpg
coop.py --dataset own | no training images for class 'b' | own/train/a/1.jpg own/test/a,b/1.jpg
coop.py --dataset my_photos | 'my_photos'.* folder
coop.py --dataset= | ''.* folder
coop.py --dataset shapse | 'shapse'.*'shapes'
coop.py --dataset caltech11 | 'caltech11'.*'caltech101'
coop.py --dataset colours | \\./colours | colours/a,b/1.jpg,2.jpg
coop.py --dataset dtd | \\./dtd | dtd/a,b/1.jpg,2.jpg
coop.py --transfer colours | \\./colours | colours/a,b/1.jpg,2.jpg
softcpt.py --dataset textures,colours | \\./colours | colours/a,b/1.jpg,2.jpg
coop.py --dataset own | own: 1 .* own/b/2.jpg | own/a/1.jpg,2.jpg own/b/1.jpg own/b/2.jpg=
coop.py --dataset own | own/test/b/1.jpg | own/train/a,b/1.jpg own/test/a/1.jpg own/test/b/1.jpg=
coop.py --dataset own | cannot read .*own/train/ | own/test/a,b/1.jpg own/train/a,b/1.jpg=text
coop.py --dataset own | class name '猫é.* is too long | own/a,LONG/1.jpg,2.jpg
"""
BENCHMARKS = """
coop.py --dataset dtd --data data | no folder data/dtd/images; .*download dtd --data .?data.?$
coop.py --dataset food101 --data 'my data' | .*download food101 --data .my data.$
coop.py --dataset imagenet --data nowhere | nowhere/imagenet/images
coop.py --dataset dtd --data data | SPLIT is .*damaged; .*download dtd | data/dtd/images/a/1.jpg
coop.py --dataset dtd --data data | SPLIT is .*damaged; .*download dtd | @dtd SPLIT=
coop.py --dataset dtd --data data | SPLIT is .*damaged; .*download dtd | @dtd SPLIT={"train":[
coop.py --dataset dtd --data data | SPLIT is missing or damaged | @dtd SPLIT={"train":[]}
coop.py --dataset fgvc_aircraft --data data | variants.txt | data/fgvc_aircraft/images/1.jpg
coop.py --dataset fgvc_aircraft --data data | download fgvc_aircraft | @fgvc_aircraft TRAIN=0034001
coop.py --dataset dtd --data data | dtd: 1 .*images .*/IMAGE | @dtd -data/dtd/images/IMAGE
coop.py --dataset dtd --data data | dtd: 1 .*images .*/IMAGE | @dtd data/dtd/images/IMAGE=
coop.py --dataset imagenet --data data | val holds 3 files and no class | VAL/1.JPEG,2.JPEG,3.JPEG
coop.py --dataset imagenet --data data | val .*998 of 1000 .*n01484850 | @imagenet/val:2
coop.py --dataset imagenet --data data | training .*'hook' | @imagenet/val:1000 @imagenet/train:600
coop.py --dataset imagenet --data data | imagenet .*training images | @imagenet/val:1000
coop.py --dataset own --transfer imagenetv2 --data data | 100 of 1000 .* 0 | OWN V2
coop.py --dataset own --transfer imagenet_sketch --data data | 995 of | OWN @imagenet_sketch:5
coop.py --dataset own --transfer imagenet_a --data data | 1 of 200 .*n12267677 | OWN @imagenet_a:199
common.py --dataset imagenet_r --data data | 199 of 200 .*n01484850 | @imagenet_r:1
coop.py --dataset imagenetv2 --data data | imagenetv2 .*training images | @imagenetv2
coop.py --dataset imagenet_a --data data | imagenet_a .*training images | @imagenet_a
softcpt.py --dataset own,imagenet_r --data data | imagenet_r .*training | OWN @imagenet_r
"""
EARLY = """
coop.py --transfer food101 | food-101/images; .*download food101
coop.py --transfer shapes_gray | 'shapes_gray'.*shapes_grey
coop.py --transfer textures,,nowhere | 'nowhere'
common.py --transfer nowhere | 'nowhere'
dpt.py --transfer shapes,own | own: 1 .* own/b/2 | own/a/1.jpg,2.jpg own/b/1.jpg own/b/2.jpg=
coop.py --dataset own --transfer dtd --data data | dtd: .*IMAGE | OWN @dtd -data/dtd/images/IMAGE
coop.py --transfer own | class name '猫é.* is too long | own/a,LONG/1.jpg,2.jpg
dpt.py --transfer own | class name '猫é.* is too long | own/a,LONG/1.jpg,2.jpg
upt.py --transfer own | class name '猫é.* is too long | own/a,LONG/1.jpg,2.jpg
enprompt.py --transfer own | class name '猫é.* is too long | own/a,LONG/1.jpg,2.jpg
softcpt.py --transfer own | class name '猫é.* is too long | own/a,LONG/1.jpg,2.jpg
coop.py --dataset own --classes base | class name '猫é.* is too long | own/a,b,c,LONG/1.jpg,2.jpg
coop.py --csc --classes base | --csc
coop.py --csc --transfer colours | --csc.*colours
softcpt.py --class_context specific --classes base | specific .* textures
softcpt.py --class_context specific --transfer colours | specific .* colours
softcpt.py --task_context specific --transfer colours | specific .* colours
softcpt.py --baseline 'one per task' --transfer colours | specific .* colours
softcpt.py --dataset textures,textures | --dataset .* twice
softcpt.py --dataset textures,colours --tasks a | --tasks
softcpt.py --dataset textures --tasks a,b | --tasks
softcpt.py --dataset general10 --data nowhere | nowhere/caltech-101
softcpt.py --dataset textures,own | 'own'
coop.py --dataset own --classes base | --classes base: own | OWN
coop.py --dataset own --classes base | --classes base: own | own/a,b,c/1.jpg,2.jpg
softcpt.py --dataset textures,own --classes base | --classes base: own | OWN
softcpt.py --official --precision amp | --official .*--precision fp32
"""
OPTIONS = """
coop.py --shots -2 | --shots -2: must be at least 0
coop.py --lr nan | --lr nan: must be at least 0
coop.py --epochs -1 | --epochs -1: must be at least 0
upt.py --dropout -0.5 | --dropout -0.5: must be at least 0
dpt.py --top_k -1 | --top_k -1: must be at least 0
coop.py --batch_size 0 | --batch_size 0: must be at least 1
coop.py --workers 0 | --workers 0: must be at least 1
coop.py --shots four | --shots: .*four
coop.py --epochs 1.5 | --epochs: .*1.5
coop.py --what 3 | unrecognized arguments: --what 3
coop.py --top_k 3 | unrecognized arguments: --top_k 3
coop.py predict | unrecognized arguments: predict
coop.py --csc 3 | unrecognized arguments: 3
coop.py --position back | --position: .*back.*end.*middle.*front
coop.py --classes new | --classes: .*new.*all.*base
coop.py --pretrained w.pt | --pretrained w.pt
coop.py --pretrained laion2b_e16 | --pretrained laion2b_e16
dpt.py --pretrained /nowhere/w.pt --model local-dir:CLIP | --pretrained /nowhere/w.pt
upt.py --pretrained= --model local-dir:CLIP | --pretrained
enprompt.py --pretrained w.pt --model hf-hub:timm/x | --pretrained w.pt
coop.py --model ViT-B-61 | --model ViT-B-61: .*ViT-B-16
coop.py --model local-dir:nowhere | --model local-dir:nowhere
coop.py --device cuda:99 | --device cuda:99
coop.py --device gpu | --device gpu
enprompt.py --enla none --n_visual 0 | nothing to learn
enprompt.py --enla none --n_visual 0 --no-strengthening | nothing to learn
coop.py --n_ctx 0 | nothing to learn
dpt.py --n_ctx 0 --n_visual 0 --cavpt_layers 0 | nothing to learn
softcpt.py --n_ctx 0 | nothing to learn
softcpt.py --n_ctx 0 --baseline 'one context' | nothing to learn
upt.py --n_ctx 0 | --n_ctx
upt.py --dropout 1 | --dropout
enprompt.py --epsilon 0 | --epsilon
enprompt.py --iterations 0 | --iterations
coop.py --n_ctx 80 | too long .*80 context vectors
coop.py --init of_a | --init 'of_a'
coop.py --init a --csc | --init 'a'
coop.py --init a --n_ctx 8 | --n_ctx 8: --init sets it to 1
dpt.py --cavpt_layers 2 | --cavpt_layers 2: .* 1
dpt.py --n_ctx 0 | --cavpt_layers 1: .*--n_ctx
dpt.py --top_k 0 | --cavpt_layers 1: .*--top_k
dpt.py --model local-dir:RESNET | visual prompts need a ViT
upt.py --model local-dir:RESNET | visual prompts need a ViT
enprompt.py --model local-dir:RESNET | visual prompts need a ViT
"""
NUMBERS = ",".join(f"{i:03d}" for i in range(1000))
WORDS = {
    "SPLIT": "data/dtd/split_zhou_DescribableTextures.json",
    "TRAIN": "data/fgvc_aircraft/images_variant_train.txt",
    "IMAGE": "banded/banded_0015.jpg",  # for testing
    "VAL": "data/imagenet/images/val",
    "V2": f"data/{fake_benchmarks.WORDNET['imagenetv2'][0]}/{NUMBERS}/1.JPEG",
    "OWN": "own/a,b/1.jpg,2.jpg",
    "LONG": "猫é" * 40,  # more than 77 tokens, fewer than 255 bytes
}


def prepare(word):
    """Does what one word of a row's last column says."""
    name, _, count = word[1:].partition(":")
    if word.startswith("-"):
        Path(word[1:]).unlink()
    elif word.startswith("@") and count:
        name, _, part = name.partition("/")
        for key in [*wordnet_classes(name)][: int(count)]:
            put(Path("data", fake_benchmarks.WORDNET[name][0], part, key, "1.JPEG"))
    elif word.startswith("@"):
        write_benchmark(name, Path("data"))
    else:
        tree(Path(), word)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a CLIP and of one whose image tower is a ResNet, by their words in the rows."""
    folder = tmp_path_factory.mktemp("models")
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 32}
    fake_benchmarks.tiny_clip(folder / "clip")
    fake_benchmarks.tiny_clip(folder / "resnet", **resnet)
    return {"CLIP": str(folder / "clip"), "RESNET": str(folder / "resnet")}


def complaints(err):
    """The lines of stderr but for those of progress bars."""
    lines = err.replace("\x1b[A", "\n").replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and not re.search(r"\d+%\|.*\[", line)]


@pytest.fixture
def refused(shell, models, tmp_path, monkeypatch):
    """refused(typed): the one line with which a command ends before it trains an epoch."""
    monkeypatch.chdir(tmp_path)

    def refused(typed):
        for word, path in models.items():
            typed = typed.replace(word, path)
        script, *words = shlex.split(typed)
        usual = ["--dataset", "textures", "--shots", "1", "--out", "runs"]
        if script != "common.py":
            usual += ["--epochs", "1"]
        if not {"--model", "--pretrained"} & {*words}:
            usual += ["--model", f"local-dir:{models['CLIP']}"]
        code, _, err = shell(script, *usual, *words)
        (line,) = complaints(err)
        assert code == 2 and re.match(r"(\w+\.py: )?error: ", line) and len(line) <= 300
        assert not [*Path("runs").rglob("checkpoint.pt")]
        return line

    return refused


ROWS = (FOLDERS + BENCHMARKS + EARLY + OPTIONS).strip().replace("\n\n", "\n").splitlines()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split(" | ")[0])
def test_a_mistake_ends_in_one_line_before_an_epoch_is_trained(row, refused):
    for word, meaning in WORDS.items():
        row = row.replace(word, meaning)
    typed, said, *prepared = row.split(" | ")
    for word in " ".join(prepared).split():
        prepare(word)
    line = refused(typed)
    assert re.search(said, line), line


@pytest.mark.parametrize(
    "problem, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "--batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (KeyboardInterrupt(), "without --force"),
    ],
)
def test_an_end_in_the_first_step_is_one_line(problem, said, refused, monkeypatch):
    def step(*_):
        raise problem

    monkeypatch.setattr(common.Optimizer, "step", step)
    assert said in refused("coop.py")


@pytest.mark.parametrize(
    "typed, said",
    [
        ("own", "own: 2 classes (a, b), 4 training and 2 test images"),
        ("own --shots 1", "own: 2 classes (a, b), 2 training and 2 test images"),
        ("dtd", "dtd: 3 classes (banded, blotchy, braided), 6 training and 6 test images"),
        ("own --transfer dtd", "dtd: 3 classes (banded, blotchy, braided), 6 training and 6 test"),
        ("own,dtd", "own: 2 classes (a, b), 4 training and 2 test images"),
        ("own,dtd", "dtd: 3 classes (banded, blotchy, braided), 6 training and 6 test images"),
        ("abcd --classes base", "abcd: 4 classes (a, b, c, d), 8 training and 4 test images"),
        ("textures", "textures (synthetic): 4 classes (checkered, dotted, plain, striped), 64"),
        ("own --transfer textures", "textures (synthetic): 4 classes (checkered, dotted, plain, s"),
        ("./colours", "./colours: 2 classes (c, d), 4 training and 2 test images"),
        ("digits", "digits: 3 classes (0, 1, 2), 6 training and 3 test images"),
        ("digits", " letter"),
        ("own --transfer digits", " letter"),
    ],
)
def test_what_is_read_is_shown(typed, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = "own/a,b", "abcd/a,b,c,d", "colours/c,d", "digits/0,1,2"
    tree(Path(), *(f"{folder}/1.jpg,2.jpg,3.jpg" for folder in folders))
    write_benchmark("dtd", Path("data"))
    softcpt.load_tasks(common.cli(softcpt.Config, ["--dataset", *typed.split()]))
    lines = capsys.readouterr().out.splitlines()
    assert any(said in line for line in lines), lines
