"""What only some systems have is not used: the project runs where it is missing."""

import subprocess
import sys

from tests.conftest import HERE

# Libraries may use what their system has, so it is hidden after they were imported
PROGRAM = """
import importlib, os, pathlib, sys, warnings
import numpy, open_clip, timm, torch, torchvision, tqdm, safetensors.torch
for module in "fcntl resource pwd grp termios posix".split():
    sys.modules[module] = None
for name in "sysconf fork getuid geteuid getpgid mkfifo nice uname killpg statvfs wait".split():
    delattr(os, name)
warnings.filterwarnings("error", ".encoding. argument not specified", EncodingWarning)
import common, coop, dpt, upt, enprompt, softcpt
for path in pathlib.Path("tests/tools").glob("[!_]*.py"):
    importlib.import_module(f"tests.tools.{path.stem}")
data, out = sys.argv[1:]
options = ["--dataset", "textures", "--shots", "1", "--epochs", "1", "--transfer", "colours"]
options += ["--data", data, "--out", out, "--device", "cpu"]
coop.main(common.cli(coop.Config, options))
sys.modules["tests.tools.report"].main(["--out", out])
"""


def test_modules_and_calls_of_one_system_may_be_missing(rendered, tmp_path):
    ended = subprocess.run(
        [
            sys.executable,
            "-X",
            "warn_default_encoding",
            "-c",
            PROGRAM,
            str(rendered),
            str(tmp_path),
        ],
        cwd=HERE,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "textures 1 shots seed 1" in ended.stdout
