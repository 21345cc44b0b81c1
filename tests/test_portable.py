"""What only some systems have is not used: the project runs where it is missing."""

import subprocess
import sys

from tests.conftest import HERE

# Libraries may use what their system has, so it is hidden after they were imported
PROGRAM = """
import os, sys, warnings
import numpy, open_clip, timm, torch, torchvision, tqdm, safetensors.torch
for module in "fcntl resource pwd grp termios posix".split():
    sys.modules[module] = None
for name in "sysconf fork getuid geteuid getpgid mkfifo nice uname killpg statvfs wait".split():
    delattr(os, name)
warnings.filterwarnings("error", ".encoding. argument not specified", EncodingWarning)
import common, coop, dpt, upt, enprompt, softcpt
from tests.tools import archive, ask, attention, benchmark, download, figures, report, shapes
data, out = sys.argv[1:]
common.cli(coop.Config, ["--shots", "4"])
options = {"dataset": "textures", "shots": 1, "epochs": 1, "data": data, "out": out}
coop.main(coop.Config(device="cpu", transfer="colours", **options))
report.main(["--out", out])
"""


def test_modules_and_calls_of_one_system_may_be_missing(world, tmp_path):
    command = [sys.executable, "-X", "warn_default_encoding", "-c", PROGRAM]
    ended = subprocess.run(
        [*command, str(world), str(tmp_path)],
        cwd=HERE,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "textures 1 shots seed 1" in ended.stdout
