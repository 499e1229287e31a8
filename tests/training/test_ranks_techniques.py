"""scripts/train.py under torchrun: every technique writes the file of one process, also in parts and recomputed."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import draw_pictures, train
from sd.checkpoints.files import read_checkpoint

pytestmark = pytest.mark.slow

FLAGS = {
    "lora": ["--pictures", "PICTURES", "--word", "windmill", "--class", "house", "--prior", "0", "--batch", "4"],
    "inversion": ["--pictures", "PICTURES", "--word", "windmill", "--batch", "4"],
    "control": ["--scenes", "16", "--batch", "4"],
    "full": ["--folder", "PICTURES", "--batch", "4"],
    "full --sharded": ["--folder", "PICTURES", "--batch", "4", "--sharded"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windmills")
    assert draw_pictures.main(["windmill", "--out", str(folder)]) == 0
    return folder


def arguments(name, pictures, out):
    flags = [str(pictures) if flag == "PICTURES" else flag for flag in FLAGS[name]]
    return [name.split()[0], *flags, "--steps", "2", "--device", "cpu", "--out", str(out)]


def trained(folder):
    [path] = folder.glob("*.safetensors")
    return read_checkpoint(path).state


@pytest.mark.parametrize("name", FLAGS)
def test_two_ranks_write_the_file_of_one_process(name, pictures, tmp_path):
    alone = [flag for flag in arguments(name, pictures, tmp_path / "one") if flag != "--sharded"]
    assert train.main(alone) == 0
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    program += [str(Path(train.__file__)), *arguments(name, pictures, tmp_path / "two")]
    done = subprocess.run([*program, "--accumulate", "2", "--recompute"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all((one[key].float() - two[key].float()).abs().max() < 2e-3 for key in one)
