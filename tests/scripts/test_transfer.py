"""Downloads from a local server that misbehaves on demand: temporary failures are retried, others are reported."""

import errno
import shutil
import socket
import ssl

import pytest

from scripts.download import DownloadError, download
from scripts.support import transfer
from tests.support.misbehaving_server import BODY, files, run, weights


def test_resumes_after_dropped_connections(server, tmp_path, capsys):
    server.script = ["drop", "hang up", "drop", "drop"]
    _, slept = run(server, tmp_path)
    assert files(tmp_path) == {"model.ckpt": BODY}
    assert server.ranges == [f"bytes={start}-" for start in (0, 102_400, 102_400, 153_600, 179_200)]
    assert slept == [1, 2, 1, 1]  # new bytes start the count again
    assert "the connection was dropped; trying again in 1 s." in capsys.readouterr().out


def test_resumes_after_a_reset_connection(server, tmp_path):
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


def test_gives_up_after_six_attempts(server, tmp_path):
    server.script = ["drop"] + [(503, {})] * 6
    slept = []
    with pytest.raises(
        DownloadError, match="the server answered 503 Service Unavailable; run this again later to resume."
    ):
        download(weights(), tmp_path, f"http://127.0.0.1:{server.server_port}/", slept.append)
    assert slept == [1, 2, 4, 8, 16]
    assert files(tmp_path) == {"model.ckpt.part": BODY[:102_400]}


def test_a_server_that_asks_for_a_long_wait(server, tmp_path):
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


def test_a_server_that_always_starts_over_and_drops(server, tmp_path):
    server.script = ["without length"] * 20
    with pytest.raises(DownloadError, match="the connection was dropped; run this again later"):
        run(server, tmp_path)
    assert len(server.script) == 20 - 6


@pytest.mark.parametrize(
    "behaviour, message",
    [
        ("short", "offers 204,700 bytes, but the published file has 204,800"),
        ((200, {"Content-Type": "text/html"}), "is a web page, not the file: give the file's own address"),
        ((404, {}), "the server answered 404 Not Found; give the file's current address with --url"),
        ((401, {}), "the server answered 401 Unauthorized; log in and get it with a browser"),
        ((403, {}), "the server answered 403 Forbidden; log in and get it with a browser"),
        ((400, {}), "the server answered 400 Bad Request"),
        (
            (302, {"Location": "ftp://127.0.0.1/model.ckpt"}),
            "redirects to ftp://127.0.0.1/model.ckpt, which is neither",
        ),
        ((302, {"Location": "file:///etc/passwd"}), "redirects in a loop: give the file's own address"),
    ],
)
def test_errors_that_are_not_retried(server, tmp_path, behaviour, message):
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
    with pytest.raises(DownloadError, match="redirects in a loop"):
        run(server, tmp_path)
    assert files(tmp_path) == {}


def test_nobody_listens(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DownloadError, match=r"no connection \(.*refused.*\); run this again later"):
        download(weights(), tmp_path, "http://127.0.0.1:9/", lambda _: None)
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "Network is unreachable"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "No route to host"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (TimeoutError("timed out"), "timed out"),
    ],
)
def test_no_route(tmp_path, monkeypatch, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    monkeypatch.setenv("no_proxy", "*")
    slept = []
    with pytest.raises(DownloadError, match=rf"no connection \(.*{reason}\); run this again later to resume"):
        download(weights(), tmp_path, "https://example.invalid/model.ckpt", slept.append)
    assert slept == [1, 2, 4, 8, 16]
    assert files(tmp_path) == {}


def test_a_certificate_that_cannot_be_trusted(tmp_path, monkeypatch):
    """Is not retried."""

    def fail(*_, **__):
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_message = "certificate has expired"
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    monkeypatch.setenv("no_proxy", "*")
    slept = []
    with pytest.raises(
        DownloadError, match=r"cannot be trusted \(certificate has expired\); check this computer's clock"
    ):
        download(weights(), tmp_path, "https://example.invalid/model.ckpt", slept.append)
    assert slept == []


def test_a_server_that_stops_in_the_middle(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.3)
    server.script = ["stall"]
    _, slept = run(server, tmp_path)
    assert slept == [1]
    assert files(tmp_path) == {"model.ckpt": BODY}
    assert "the connection was dropped (timed out); trying again in 1 s." in capsys.readouterr().out


def test_a_server_that_does_not_speak_http(server, tmp_path):
    server.script = ["no HTTP"] * 9
    with pytest.raises(DownloadError, match=r"no connection \(SSH-2.0-OpenSSH_9.6.*\); run this again later"):
        run(server, tmp_path)
    assert len(server.script) == 9 - 6


@pytest.mark.parametrize("size", [len(BODY), None])
def test_a_file_without_end(server, tmp_path, monkeypatch, size):
    monkeypatch.setattr(transfer, "LARGEST", 10 * len(BODY))
    server.script = ["endless"]
    if size is None:
        with pytest.raises(DownloadError, match="bytes without stating the file's size"):
            run(server, tmp_path, size)
        (tmp_path / "model.ckpt.part").unlink()
    else:
        with pytest.raises(DownloadError, match="it was deleted"):  # more bytes than there should be
            run(server, tmp_path, size)
    assert files(tmp_path) == {}


def test_a_full_disk_is_noticed_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(DownloadError, match="has 5,000 bytes free, but 204,800 are needed: free some space"):
        run(server, tmp_path)
    (tmp_path / "model.ckpt.part").write_bytes(BODY[:-5000])
    run(server, tmp_path)
    assert files(tmp_path) == {"model.ckpt": BODY}
