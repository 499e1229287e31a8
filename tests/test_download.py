"""The download script, against a server on this machine that misbehaves on demand."""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import download as script
from scripts.download import DownloadError, Weights, download
from tests.misbehaving_server import BODY, WRONG, running


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(script, "CHUNK", 10_000)
    with running() as server:
        yield server


def weights(size: int | None = len(BODY)) -> Weights:
    return Weights("https://example.invalid/model.ckpt", hashlib.sha256(BODY).hexdigest(), size)


def run(server, folder: Path, size: int | None = len(BODY)) -> tuple[str, list[float]]:
    """What the download says, and how long it slept before each new attempt."""
    slept: list[float] = []
    said = download(weights(size), folder, f"http://127.0.0.1:{server.server_port}/model.ckpt", slept.append)
    return said, slept


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    assert f"{have:,} bytes are there from an earlier run" in capsys.readouterr().out


def test_goes_on_after_dropped_connections(server, tmp_path, capsys):
    server.script = ["drop", "hang up", "drop", "drop"]
    _, slept = run(server, tmp_path)
    assert files(tmp_path) == {"model.ckpt": BODY}
    assert server.ranges == [f"bytes={start}-" for start in (0, 102_400, 102_400, 153_600, 179_200)]
    assert slept == [1, 2, 1, 1]  # a connection that brought something starts the count anew
    assert "the connection was dropped; trying again in 1 s." in capsys.readouterr().out


def test_goes_on_after_a_reset_connection(server, tmp_path):
    server.script = ["reset"]
    _, slept = run(server, tmp_path)
    assert files(tmp_path) == {"model.ckpt": BODY}
    assert slept == [1]


@pytest.mark.parametrize(
    "answer, wait",
    [
        ((503, {}), 1),
        ((500, {}), 1),
        ((429, {"Retry-After": "7"}), 7),
        ((503, {"Retry-After": "0"}), 0),
        ((429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), 1),
    ],
)
def test_waits_for_a_busy_server(server, tmp_path, answer, wait):
    server.script = [answer]
    assert run(server, tmp_path)[1] == [wait]
    assert files(tmp_path) == {"model.ckpt": BODY}


def test_gives_up_in_the_end(server, tmp_path):
    server.script = ["drop"] + [(503, {})] * 6
    slept = []
    with pytest.raises(
        DownloadError, match="the server answered 503 Service Unavailable; run this again later, it goes"
    ):
        download(weights(), tmp_path, f"http://127.0.0.1:{server.server_port}/", slept.append)
    assert slept == [1, 2, 4, 8, 16]
    assert files(tmp_path) == {"model.ckpt.part": BODY[:102_400]}


def test_server_that_asks_for_too_long(server, tmp_path):
    server.script = [(429, {"Retry-After": "3600"})]
    with pytest.raises(DownloadError, match="429 Too Many Requests; run this again in 3600 s"):
        run(server, tmp_path)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("size", [len(BODY), None])
@pytest.mark.parametrize("behaviour", ["ignores ranges", "shifted range"])
def test_starts_over_if_the_server_cannot_resume(server, tmp_path, behaviour, size):
    (tmp_path / "model.ckpt.part").write_bytes(b"x" * 70_000)
    server.script = [behaviour]
    run(server, tmp_path, size)
    assert files(tmp_path) == {"model.ckpt": BODY}


def test_server_that_always_starts_over_and_drops(server, tmp_path):
    server.script = ["without length"] * 20
    with pytest.raises(DownloadError, match="the connection was dropped; run this again later"):
        run(server, tmp_path)
    assert len(server.script) == 20 - 6


@pytest.mark.parametrize("size", [len(BODY), None])
@pytest.mark.parametrize("behaviour", ["wrong", "bad start"])
def test_wrong_bytes_are_removed(server, tmp_path, behaviour, size):
    if behaviour == "wrong":
        server.script = ["wrong"]
    else:
        (tmp_path / "model.ckpt.part").write_bytes(WRONG[:70_000])
    with pytest.raises(DownloadError, match=r"has the SHA-256 .* it was removed, so the next run starts from nothing"):
        run(server, tmp_path, size)
    assert files(tmp_path) == {}
    run(server, tmp_path, size)
    assert files(tmp_path) == {"model.ckpt": BODY}


def test_partial_file_that_is_too_long(server, tmp_path):
    (tmp_path / "model.ckpt.part").write_bytes(BODY + b"x")
    with pytest.raises(DownloadError, match="it was removed"):
        run(server, tmp_path)
    (tmp_path / "model.ckpt.part").write_bytes(BODY + b"x")
    run(server, tmp_path, size=None)  # the server knows better: 416, and then from the start
    assert files(tmp_path) == {"model.ckpt": BODY}


@pytest.mark.parametrize(
    "behaviour, message",
    [
        ("short", "offers 204,700 bytes, but the published file has 204,800"),
        ((200, {"Content-Type": "text/html"}), "is a web page, not the file: give the file's own address"),
        ((404, {}), "the server answered 404 Not Found; give the file's present address with --url"),
        ((401, {}), "the server answered 401 Unauthorized; get the file with a browser, logged in"),
        ((403, {}), "the server answered 403 Forbidden; get the file with a browser, logged in"),
        ((400, {}), "the server answered 400 Bad Request"),
        (
            (302, {"Location": "ftp://127.0.0.1/model.ckpt"}),
            "redirects to ftp://127.0.0.1/model.ckpt, which is neither",
        ),
        ((302, {"Location": "file:///etc/passwd"}), "redirects without end: give the file's own address"),
    ],
)
def test_what_no_second_attempt_can_mend(server, tmp_path, behaviour, message):
    (tmp_path / "model.ckpt.part").write_bytes(BODY[:1000])
    server.script = [behaviour]
    with pytest.raises(DownloadError, match=message) as caught:
        run(server, tmp_path)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == {"model.ckpt.part": BODY[:1000]}


def test_redirections(server, tmp_path):
    here = f"http://127.0.0.1:{server.server_port}/"
    server.script = [(302, {"Location": here + "a"}), (307, {"Location": here + "b"}), "ranges"]
    (tmp_path / "model.ckpt.part").write_bytes(BODY[:1000])
    run(server, tmp_path)
    assert files(tmp_path) == {"model.ckpt": BODY}
    assert server.ranges == ["bytes=1000-"] * 3


def test_redirection_in_circles(server, tmp_path):
    server.script = [(302, {"Location": f"http://127.0.0.1:{server.server_port}/"})] * 100
    with pytest.raises(DownloadError, match="redirects without end"):
        run(server, tmp_path)
    assert files(tmp_path) == {}


def test_no_route(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DownloadError, match=r"no connection \(.*refused.*\); run this again later"):
        download(weights(), tmp_path, "http://127.0.0.1:9/", lambda _: None)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("url", ["file:///etc/passwd", "model.ckpt", "ftp://example.org/model.ckpt"])
def test_other_addresses(tmp_path, url):
    with pytest.raises(DownloadError, match="it must start with https:// or http://"):
        download(weights(), tmp_path, url)


def test_file_that_is_there_is_checked(server, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(BODY)
    assert run(server, tmp_path)[0].endswith("model.ckpt is there already, and its SHA-256 is right.")
    (tmp_path / "model.ckpt").write_bytes(WRONG)
    with pytest.raises(DownloadError, match="move it away and run this again"):
        run(server, tmp_path)
    assert files(tmp_path) == {"model.ckpt": WRONG}
    assert server.ranges == []


def test_no_room_is_noticed_before(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(DownloadError, match="has room for 5,000 bytes, but 204,800 are missing: make room"):
        run(server, tmp_path)
    (tmp_path / "model.ckpt.part").write_bytes(BODY[:-5000])
    run(server, tmp_path)
    assert files(tmp_path) == {"model.ckpt": BODY}


@pytest.mark.skipif(script.fcntl is None, reason="no locks on Windows")
def test_one_download_at_a_time(server, tmp_path):
    message = r"Another download into .*model\.ckpt\.part is under way: wait"
    with script.locked(tmp_path / "model.ckpt.part"), pytest.raises(DownloadError, match=message):
        run(server, tmp_path)
    run(server, tmp_path)
    assert files(tmp_path) == {"model.ckpt": BODY}


# The command


@pytest.fixture
def command(server, tmp_path, monkeypatch):
    """Run the script in this process; return its exit status."""
    monkeypatch.setattr(script, "WEIGHTS", {"safetensors": weights()})
    url = f"http://127.0.0.1:{server.server_port}/model.ckpt"
    return lambda *arguments: script.main(["--out", str(tmp_path), "--url", url, *arguments])


def test_command(command, server, tmp_path, capsys):
    assert command() == 0
    assert "model.ckpt is complete, and its SHA-256 is right." in capsys.readouterr().out
    assert command() == 0
    assert "is there already" in capsys.readouterr().out
    (tmp_path / "model.ckpt").unlink()
    server.script = [(404, {})]
    assert command() == 2
    error = capsys.readouterr().err
    assert error.startswith("http://127.0.0.1:")
    assert error.count("\n") == 1


def test_ctrl_c_keeps_what_has_come(command, tmp_path, monkeypatch, capsys):
    def interrupt(self, chunk):
        self.file.write(chunk)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.HashedFile, "append", interrupt)
        assert command() == 130
    assert "the next run goes on from there" in capsys.readouterr().err
    assert files(tmp_path) == {"model.ckpt.part": BODY[:10_000]}
    assert command() == 0
    assert files(tmp_path) == {"model.ckpt": BODY}


def test_full_disk(command, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(script.HashedFile, "append", fail)
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


def test_starts_from_any_folder(tmp_path):
    result = subprocess.run([sys.executable, script.__file__, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    assert "safetensors,ckpt,inpainting" in result.stdout
