"""The download script, with a local server that misbehaves on demand."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import download as script
from scripts.download import DownloadError, download
from scripts.support import transfer
from tests.support.misbehaving_server import BODY, WRONG, files, run, weights


@pytest.mark.parametrize("size", [len(BODY), None])
def test_downloads(server, tmp_path, size):
    folder = tmp_path / "new" / "folder"
    said, slept = run(server, folder, size)
    assert said == f"{folder / 'model.ckpt'} is complete, and its SHA-256 is right."
    assert files(folder) == {"model.ckpt": BODY}
    assert slept == []


@pytest.mark.parametrize("size", [len(BODY), None])
@pytest.mark.parametrize("have", [1, 70_000, len(BODY) - 1, len(BODY)])
def test_resumes_what_an_earlier_run_left(server, tmp_path, have, size, capsys):
    (tmp_path / "model.ckpt.part").write_bytes(BODY[:have])
    run(server, tmp_path, size)
    assert files(tmp_path) == {"model.ckpt": BODY}
    assert server.ranges == ([] if have == size else [f"bytes={have}-"])
    assert f"{have:,} bytes of an earlier run" in capsys.readouterr().out


@pytest.mark.parametrize("size", [len(BODY), None])
def test_wrong_bytes_are_removed(server, tmp_path, size):
    server.script = ["wrong"]
    with pytest.raises(
        DownloadError, match=r"has SHA-256 .* it was deleted, so the next run starts from the beginning"
    ):
        run(server, tmp_path, size)
    assert files(tmp_path) == {}
    run(server, tmp_path, size)
    assert files(tmp_path) == {"model.ckpt": BODY}


@pytest.mark.parametrize("size", [len(BODY), None])
@pytest.mark.parametrize("part", [WRONG[:70_000], WRONG, BODY + b"x"], ids=["other beginning", "all wrong", "too long"])
def test_a_part_of_another_file_is_dropped(server, tmp_path, part, size):
    (tmp_path / "model.ckpt.part").write_bytes(part)
    run(server, tmp_path, size)
    assert files(tmp_path) == {"model.ckpt": BODY}


def test_wrong_bytes_are_downloaded_twice_at_most(server, tmp_path, capsys):
    (tmp_path / "model.ckpt.part").write_bytes(WRONG[:70_000])
    server.script = ["wrong"] * 5
    with pytest.raises(DownloadError, match="it was deleted, so the next run starts from the beginning"):
        run(server, tmp_path)
    assert len(server.script) == 3
    assert "are not the beginning of this file: starting again" in capsys.readouterr().out
    assert files(tmp_path) == {}


@pytest.mark.parametrize("url", ["file:///etc/passwd", "model.ckpt", "ftp://example.org/model.ckpt"])
def test_other_addresses(tmp_path, url):
    with pytest.raises(DownloadError, match="it should start with https:// or http://"):
        download(weights(), tmp_path, url)


def test_an_existing_file_is_checked(server, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(BODY)
    assert run(server, tmp_path)[0].endswith("model.ckpt already exists, and its SHA-256 is right.")
    (tmp_path / "model.ckpt").write_bytes(WRONG)
    with pytest.raises(DownloadError, match="move it away and run this again"):
        run(server, tmp_path)
    assert files(tmp_path) == {"model.ckpt": WRONG}
    assert server.ranges == []


@pytest.mark.skipif(script.fcntl is None, reason="no locks on Windows")
def test_one_download_at_a_time(server, tmp_path):
    message = r"Another download into .*model\.ckpt\.part is running: wait"
    with script.locked(tmp_path / "model.ckpt.part"), pytest.raises(DownloadError, match=message):
        run(server, tmp_path)
    run(server, tmp_path)
    assert files(tmp_path) == {"model.ckpt": BODY}


def test_without_locks_a_file_is_closed_before_it_is_renamed_or_removed(server, tmp_path, monkeypatch):
    """As Windows requires."""
    opened = []
    monkeypatch.setattr(script, "fcntl", None)

    def remembering(*args):
        opened.append(open(*args))  # noqa: SIM115
        return opened[-1]

    monkeypatch.setattr(script, "open", remembering, raising=False)
    replace, unlink = os.replace, Path.unlink
    monkeypatch.setattr(script.os, "replace", lambda *paths: opened[-1].closed and replace(*paths))
    monkeypatch.setattr(Path, "unlink", lambda path, **options: opened[-1].closed and unlink(path, **options))
    with script.locked(tmp_path / "model.ckpt.part"):
        pass
    assert files(tmp_path) == {}
    run(server, tmp_path)
    assert files(tmp_path) == {"model.ckpt": BODY}


@pytest.mark.skipif(script.fcntl is None, reason="no locks on Windows")
@pytest.mark.parametrize("ended", ["renamed", "removed"])
def test_another_download_that_ends_while_this_one_begins(server, tmp_path, monkeypatch, ended):
    """It gives the file its final name after we have opened it and before we lock it. We must not change it then."""
    part, lock = tmp_path / "model.ckpt.part", script.fcntl.flock
    part.write_bytes(BODY)

    def late(file, operation):
        part.rename(tmp_path / "model.ckpt") if ended == "renamed" else part.unlink()
        lock(file, operation)

    with monkeypatch.context() as patch:
        patch.setattr(script.fcntl, "flock", late)
        with pytest.raises(DownloadError, match="has just ended: run this again"):
            run(server, tmp_path, size=None)
    assert files(tmp_path) == ({"model.ckpt": BODY} if ended == "renamed" else {})


# The command


@pytest.fixture
def command(server, tmp_path, monkeypatch):
    """Runs the script in this process and returns its exit status."""
    monkeypatch.setattr(script, "WEIGHTS", {"safetensors": weights()})
    url = f"http://127.0.0.1:{server.server_port}/model.ckpt"
    return lambda *arguments: script.main(["--out", str(tmp_path), "--url", url, *arguments])


def test_command(command, server, tmp_path, capsys):
    assert command() == 0
    assert "model.ckpt is complete, and its SHA-256 is right." in capsys.readouterr().out
    assert command() == 0
    assert "already exists" in capsys.readouterr().out
    (tmp_path / "model.ckpt").unlink()
    server.script = [(404, {})]
    assert command() == 2
    error = capsys.readouterr().err
    assert error.startswith("download.py: http://127.0.0.1:")
    assert error.count("\n") == 1


def test_ctrl_c_keeps_what_has_arrived(command, tmp_path, monkeypatch, capsys):
    def interrupt(self, chunk):
        self.file.write(chunk)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer.HashedFile, "append", interrupt)
        assert command() == 130
    assert "the next run resumes the download" in capsys.readouterr().err
    assert files(tmp_path) == {"model.ckpt.part": BODY[:10_000]}
    assert command() == 0
    assert files(tmp_path) == {"model.ckpt": BODY}


def test_full_disk(command, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transfer.HashedFile, "append", fail)
    assert command() == 2
    assert "cannot be written to (No space left on device)." in capsys.readouterr().err
    assert files(tmp_path) == {}


def test_folder_that_is_a_file(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command("--out", str(tmp_path / "file")) == 2
    assert "file cannot be written to (" in capsys.readouterr().err


def test_published_files_are_named_after_their_address():
    names = [entry.name for entry in script.WEIGHTS.values()]
    assert names == ["v1-5-pruned-emaonly.safetensors", "v1-5-pruned-emaonly.ckpt", "sd-v1-5-inpainting.ckpt"]
    assert all(re.fullmatch("[0-9a-f]{64}", entry.sha256) for entry in script.WEIGHTS.values())


def test_runs_from_any_folder(tmp_path):
    result = subprocess.run([sys.executable, script.__file__, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    assert "safetensors,ckpt,inpainting" in result.stdout


def test_a_mistyped_option_is_one_line(capsys):
    with pytest.raises(SystemExit):
        script.main(["--uot"])
    assert capsys.readouterr().err == "download.py: unrecognized arguments: --uot\n"
