"""The download script, with the real client against a server on this computer."""

import hashlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scripts import download as script
from sd.checkpoints.hub import NAME
from tests import ROOT
from tests.support.hub_client import Done, run_code, settings
from tests.support.hub_server import COMMIT, Repository, serve
from tests.support.marks import slow

pytest.importorskip("huggingface_hub")

BODY = bytes(range(256)) * 800  # 204,800 bytes
SHA256 = hashlib.sha256(BODY).hexdigest()
NETWORKS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
FOLDER = {
    f"{network}/{file}": file.encode()
    for network, stem in NETWORKS.items()
    for file in ("config.json", f"{stem}.safetensors")
}
REPOSITORIES = {
    "owner/file": Repository({"model.ckpt": BODY, "other.ckpt": BODY}),
    "owner/folder": Repository(FOLDER),
    "owner/vae": Repository({"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"vae"}),
    "owner/gated": Repository(FOLDER, gated=True),
}
COMMAND = f'sh {shlex.quote(str(ROOT / "scripts/demo.sh"))} "a cat" --checkpoint'


@pytest.fixture(scope="module")
def server():
    with serve(REPOSITORIES) as running:
        yield running


def run(server, folder: Path, *commands: str, sha256: str = SHA256, before: str = "", **environment: str) -> Done:
    """Runs commands of the script in `folder`. What it calls sd1.5 is owner/file:model.ckpt, and goes into data/."""
    server.downloads.clear()
    code = (
        "import sys\nfrom pathlib import Path\nfrom scripts import download as script\n"
        f"script.MODELS['sd1.5'] = script.Model('owner/file:model.ckpt', folder=Path('data'), sha256={sha256!r})\n"
        f"{before}\nfor command in {commands!r}:\n"
        "    status = script.main(command.split())\n    if status: sys.exit(status)"
    )
    return run_code(code, settings(server, folder / "hub", **environment), folder)


def files(folder: Path) -> list[str]:
    """The files of a folder, without those that the client notes things in."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if ".cache" not in path.parts and "hub" not in path.parts)


def test_stable_diffusion_goes_into_data_and_is_checked(server, tmp_path):
    done = run(server, tmp_path, "", "safetensors")
    assert (done.status, files(tmp_path)) == (0, ["data/model.ckpt"])
    assert (tmp_path / "data/model.ckpt").read_bytes() == BODY
    assert server.downloads == ["owner/file/model.ckpt"]
    assert done.out.splitlines() == [
        "data/model.ckpt is complete, and its SHA-256 is right.",
        f"{COMMAND} data/model.ckpt",
        "data/model.ckpt already exists, and its SHA-256 is right.",
        f"{COMMAND} data/model.ckpt",
    ]
    # What somebody else put there is not replaced.
    (tmp_path / "data/model.ckpt").write_bytes(b"mine")
    done = run(server, tmp_path, "")
    wrong = f"data/model.ckpt (4 bytes) has SHA-256 {hashlib.sha256(b'mine').hexdigest()}, but the published file has"
    assert (done.status, done.err.splitlines()[-1]) == (
        2,
        f"download.py: {wrong} {SHA256}: move it away and run this again.",
    )
    assert (tmp_path / "data/model.ckpt").read_bytes() == b"mine"
    assert server.downloads == []


@pytest.mark.parametrize("name", ["sd1.5", slow("owner/file:model.ckpt")])
def test_a_file_with_a_wrong_sha256_is_removed(server, tmp_path, name):
    done = run(server, tmp_path, f"{name} --out here", sha256="0" * 64)
    assert done.status == 2
    assert done.err.splitlines()[-1].endswith(f"the published file has {'0' * 64}: it was deleted; run this again.")
    assert done.out == ""
    assert files(tmp_path) == []


@pytest.mark.slow
def test_a_file_of_the_cache_with_a_wrong_sha256_is_removed(server, tmp_path):
    before = "import dataclasses\nscript.MODELS['x'] = dataclasses.replace(script.MODELS['sd1.5'], folder=None)"
    assert run(server, tmp_path, "x", before=before, sha256="0" * 64).status == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == len(BODY)]


def test_names_of_the_hub_go_into_its_cache_or_elsewhere(server, tmp_path):
    names = "owner/folder owner/vae owner/file@main:other.ckpt"
    done = run(server, tmp_path, names, f"{names} --out my/models")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == f"hub/hub/models--owner--folder/snapshots/{COMMIT} is complete."
    assert lines[1::2] == [
        f"{COMMAND} owner/folder",
        f"{COMMAND} data/v1-5-pruned-emaonly.safetensors --vae owner/vae",
        f"{COMMAND} owner/file@main:other.ckpt",
        f"{COMMAND} my/models/folder",
        f"{COMMAND} data/v1-5-pruned-emaonly.safetensors --vae my/models/vae",
        f"{COMMAND} my/models/other.ckpt",
    ]
    assert len(server.downloads) == len(set(server.downloads)), "the folder is copied from the cache"
    assert {name for name in files(tmp_path) if "folder" in name} == {f"my/models/folder/{name}" for name in FOLDER}
    assert files(tmp_path / "my/models/vae") == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert run(server, tmp_path, names, HF_HUB_OFFLINE="1").out.splitlines() == lines[:6]
    # A file or a folder that is there is neither replaced nor changed, except a folder that this client made.
    (tmp_path / "my/models/other.ckpt").write_bytes(b"mine")
    (tmp_path / "your/folder").mkdir(parents=True)
    assert run(server, tmp_path, "owner/folder --out my/models").status == 0
    for command, path in (
        ("owner/file:other.ckpt --out my/models", "my/models/other.ckpt"),
        ("owner/folder --out your", "your/folder"),
    ):
        done = run(server, tmp_path, command)
        assert done.status == 2
        sentence = f"{path} already exists: move it away to fetch it again, or choose another folder."
        assert done.err == f"download.py: {sentence}\n"
    assert (tmp_path / "my/models/other.ckpt").read_bytes() == b"mine"
    assert list((tmp_path / "your/folder").iterdir()) == []


ERRORS = {
    "sd1.5 sd3": r"NAME should be one of sd1\.5, .*vae, or one of the hub, such as owner/name, not 'sd3'\.",
    "owner/none": "owner/none is neither .* nor a public model at http://.*",
    "owner/file:none.ckpt": r".*no such file: give one of its files, such as owner/file:model\.ckpt or .*",
    "owner/gated": r"owner/gated is a model whose terms must be accepted first: .* HF_TOKEN .*",
    "owner/file:model.ckpt --out file": r"owner/.* could not be saved \(.*\): it goes to file\.",
}


@pytest.mark.parametrize("arguments", [first if first == "sd1.5 sd3" else slow(first) for first in ERRORS])
def test_errors_are_one_sentence(server, tmp_path, arguments):
    (tmp_path / "file").touch()
    done = run(server, tmp_path, arguments)
    assert (done.status, done.out) == (2, "")
    assert re.fullmatch(f"download.py: {ERRORS[arguments]}\n", done.err)
    assert files(tmp_path) == ["file"]
    assert server.downloads == []


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": "1"}, slow({"HF_ENDPOINT": "http://127.0.0.1:9"})],
)
def test_without_a_network(server, tmp_path, environment):
    done = run(server, tmp_path, "sd1.5", **environment)
    remedy = f"{environment.get('HF_ENDPOINT', server.url)} cannot be reached: check the network, and HF_HUB_OFFLINE."
    assert done.status == 2
    assert done.err.endswith(f"download.py: owner/file:model.ckpt is not in data, and {remedy}\n")


def test_the_package_is_named_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit):
        script.main([])
    sentence = "this Python lacks huggingface_hub: run `sh scripts/download.sh`, which installs it into .venv."
    assert capsys.readouterr().err == f"download.py: {sentence}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["owner/folder", "owner/file:model.ckpt --out here"])
def test_ctrl_c_stops_at_once_and_the_next_run_goes_on(tmp_path, name):
    stall = threading.Event()
    large = FOLDER | {"vae/diffusion_pytorch_model.safetensors": BODY}
    repositories = {"owner/file": Repository({"model.ckpt": BODY}), "owner/folder": Repository(large)}
    with serve(repositories, cut_after=50_000, stall=stall) as server:
        command = [sys.executable, ROOT / "scripts/download.py", *name.split()]
        environment = settings(server, tmp_path / "hub")
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        while not any("model.ckpt" in file or "vae/diffusion" in file for file in server.downloads):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=10)[1]
        assert process.returncode == 130
        assert error.endswith("download.py: interrupted; complete files stay, and the next run fetches the others.\n")
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == BODY]
        stall.set()
        before = set(server.downloads)
        assert run(server, tmp_path, name).status == 0
        assert len(before & set(server.downloads)) == 1, "only the file under way is fetched again"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a Linux tmpfs")
def test_a_full_disk_is_seen_before_the_download(server, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr}")
    try:
        done = run(server, tmp_path, "sd1.5 --out disk")
        assert done.status == 2
        start = f"download.py: owner/file:model.ckpt could not be fetched from {server.url}: Not enough free disk space"
        assert done.err.startswith(start)
        assert done.err.count("\n") == 1
        assert server.downloads == []
        assert files(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_list(capsys):
    assert script.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for short, row in script.MODELS.items():
        assert f"{short:18}{row.use}\n{'':18}{row.size}; {row.licence}\n{'':18}{row.name}\n" in printed
        assert all((row.size, row.licence, row.use, NAME.fullmatch(row.name), "{}" in row.options))
        assert row.sha256 is None or re.fullmatch("[0-9a-f]{64}", row.sha256)
    assert set(script.FORMER_NAMES.values()) < set(script.MODELS)


def test_runs_from_any_folder(tmp_path):
    result = subprocess.run([sys.executable, script.__file__, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    assert "--list" in result.stdout


def test_a_mistyped_option_is_one_line(capsys):
    with pytest.raises(SystemExit):
        script.main(["--uot"])
    assert capsys.readouterr().err == "download.py: unrecognized arguments: --uot\n"
