"""Errors say what a file is if it is not a checkpoint, and every damaged file ends in an error."""

import io
import json
import math
import os
import pickle
import tarfile
import zipfile

import pytest
import torch

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.files import read_checkpoint
from sd.model_loader import load_models
from tests.support.malicious_pickles import (
    call,
    in_legacy,
    in_zip,
    mapping,
    name,
    number,
    sequence,
    state_dict,
    storage,
    tensor,
    text,
)


def tar_file() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.ckpt"))
    return buffer.getvalue()


def plain_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    return buffer.getvalue()


def safetensors(header: dict | str, data: bytes = bytes(8)) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), begin=0, end=8) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = json.dumps(entry())
BAD_FILES = {
    "empty": (b"", "is empty; download it again"),
    "zip without end": (in_zip(state_dict())[:-30], "truncated: a zip archive without its table"),
    "zip of something else": (plain_zip(), "zip archive that torch.save did not write"),
    "two pickles": (in_zip(state_dict(), {"b/data.pkl": state_dict()}), "zip archive that torch.save did not write"),
    "big-endian zip": (in_zip(state_dict(), {"byteorder": b"big"}), "big-endian machine"),
    "big-endian legacy": (
        in_legacy(state_dict()).replace(b"endianq\x02\x88", b"endianq\x02\x89"),
        "big-endian machine",
    ),
    "missing storage": (in_zip(state_dict()).replace(b"archive/data/0", b"archive/data/1"), "storage .* is missing"),
    "legacy cut in storage": (in_legacy(state_dict())[:-1], "is truncated"),
    "legacy cut in pickle": (in_legacy(state_dict())[:200], "the pickle is cut off"),
    "no tensors": (in_zip(pickle.dumps({"epoch": 3}, 2)), "has no tensors by name"),
    "list of tensors": (in_zip(pickle.dumps([1, 2], 2)), "has no tensors by name"),
    "other pickle": (pickle.dumps({"weights": [1, 2]}), "a Python pickle that torch.save did not write"),
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", r"a web page \(HTML\)"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 42\n", "git-lfs pointer; run"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(50), "a JPEG image"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "a gzip archive; unpack it first"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), "a 7z archive; unpack it first"),
    "AppleDouble": (b"\0\5\x16\7\0\2" + bytes(50), "a hidden file of macOS; give the file of the same name without"),
    "rar": (b"Rar!\x1a\x07\x01\0" + bytes(50), "a rar archive; unpack it first"),
    "tar": (tar_file(), "a tar archive; unpack it first"),
    "JSON": (b'{"weight_map": {"a": "model-00001.safetensors"}}', "a JSON file; give"),
    "text": ("größer\n".encode() * 9, "a text file; give"),
    "noise": (bytes(range(50)), "not a checkpoint: neither"),
    "one byte": (b"\0", "not a checkpoint: neither"),
    "cut in header": (safetensors({"a": entry()})[:30], "truncated: its header alone has"),
    "cut in data": (safetensors({"a": entry()})[:-1], "truncated: it has 7 bytes of tensors instead of 8"),
    "data too long": (safetensors({"a": entry()}) + b"x", "damaged: it has 9 bytes"),
    "absurd header": (b"\xff" * 8 + b"{}", "header is too long, 18,446,744,073,709,551,615 bytes"),
    "no JSON": (safetensors("{oops"), "is damaged"),
    "no UTF-8": (b"\x03" + bytes(7) + b'{"\xff', "is damaged"),
    "no entries": (safetensors({"__metadata__": {}}, b""), "a safetensors file without tensors"),
    "metadata of text": (safetensors({"__metadata__": "x", "a": entry()}), "its __metadata__ is not a dict from text"),
    "twice": (safetensors(f'{{"a":{ONE},"a":{ONE}}}'), "a name twice"),
    "NaN": (safetensors({"a": entry() | {"more": math.nan}}), "has the number NaN"),
    "infinity": (safetensors({"a": entry() | {"more": -math.inf}}), "has the number -Infinity"),
    "huge integer": (safetensors({"a": entry() | {"more": 10**400}}), "has the number 10000000000000000000"),
    "huge number": (safetensors(f'{{"a":{ONE[:-1]},"more":1e999}}}}'), "has the number 1e999"),
    "half a character": (safetensors({"a": entry(), "__metadata__": {"b": "\ud800"}}), "surrogates not allowed"),
    "overlap": (safetensors({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)), "begins at byte 4 instead of 8"),
    "gap": (safetensors({"a": entry(begin=4, end=12)}, bytes(12)), "begins at byte 4 instead of 0"),
    "beyond": (safetensors({"a": entry(shape=(4,), end=16)}), "truncated: it has 8 bytes of tensors instead of 16"),
    "unknown dtype": (safetensors({"a": entry("F9")}), "has 'a' in dtype 'F9'; known are F64, F32"),
    "size and shape": (safetensors({"a": entry(shape=(3,))}), "more or fewer bytes than its shape needs"),
    "overflow": (safetensors({"a": entry(shape=(2**32, 2**32), end=0)}, b""), "more or fewer bytes"),
    "negative shape": (safetensors({"a": entry(shape=(-1, -2))}), "impossible shape or place"),
    "huge shape": (safetensors({"a": entry(shape=(2**70, 0), end=0)}, b""), "impossible shape or place"),
    "boolean shape": (safetensors({"a": entry(shape=(True, 2))}), "impossible shape or place"),
    "fractional shape": (safetensors({"a": entry(shape=(2.0,))}), "impossible shape or place"),
    "negative offset": (safetensors({"a": entry(begin=-8, end=0)}), "impossible shape or place"),
    "backwards": (safetensors({"a": entry(begin=8, end=0)}), "more or fewer bytes"),
    "many dimensions": (safetensors({"a": entry(shape=(1,) * 99 + (2,))}), "impossible shape or place"),
    "a hundred thousand dimensions": (safetensors({"a": entry(shape=(2**47,) * 100_000)}), "impossible shape or place"),
    "entry of text": (safetensors({"a": "F32"}), "header lacks dtype, shape or data_offsets of 'a'"),
    "entry in part": (safetensors({"a": {"dtype": "F32"}}), "header lacks dtype, shape or data_offsets of 'a'"),
    "many entries": (
        safetensors({f"{i}": entry(shape=(0,), end=0) for i in range(20_001)}, b""),
        "has more than 20,000 entries",
    ),
    "a name without end": (safetensors({"a" * 1001: entry()}), "a tensor with a name of 1,001 characters"),
    "deep header": (safetensors('{"a":' * 100_000), "is damaged"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_errors_say_what_a_bad_file_is(tmp_path, kind):
    content, message = BAD_FILES[kind]
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path} ")
    assert str(caught.value).count("\n") == 0
    assert str(caught.value).endswith(".")


def test_a_path_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at .*absent.ckpt"):
        read_checkpoint(tmp_path / "absent.ckpt")


def test_a_textual_inversion(tmp_path):
    vector = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.zeros(1, 768))})
    path = tmp_path / "cat.pt"
    for value in (vector, {"*": torch.zeros(1, 768)}):
        torch.save({"string_to_token": {"*": 265}, "string_to_param": value}, path)
        with pytest.raises(CheckpointError, match=r"is a textual inversion embedding; give a .*Stable"):
            load_models(path)


def test_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder; give the path of a .ckpt or .safetensors file"):
        read_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_checkpoint(tmp_path / "pipe")


def test_an_invalid_path():
    with pytest.raises(CheckpointError, match="null"):
        read_checkpoint("a\0b")


@pytest.mark.parametrize("error", [PermissionError, KeyboardInterrupt])
def test_errors_that_are_passed_on(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    (tmp_path / "a.ckpt").write_bytes(in_zip(state_dict()))
    monkeypatch.setattr("sd.checkpoints.files._read", fail)
    with pytest.raises(error):
        read_checkpoint(tmp_path / "a.ckpt")


ZIP_BOMBS = {
    "more than fits into a file": (zipfile.ZIP_DEFLATED, 40 << 20),
    "another method than deflate": (zipfile.ZIP_BZIP2, 1 << 20),
    "method than deflate": (zipfile.ZIP_LZMA, 1 << 20),
}


@pytest.mark.parametrize("message", ZIP_BOMBS)
def test_zip_bombs_are_refused(tmp_path, message):
    compression, size = ZIP_BOMBS[message]
    path = tmp_path / "bomb.ckpt"
    path.write_bytes(in_zip(state_dict(), {"data/0": bytes(size)}, compression))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_encrypted_records_are_refused(tmp_path):
    honest = in_zip(state_dict())
    flags = honest.rindex(b"archive/data/0") - 46 + 8
    (tmp_path / "a.ckpt").write_bytes(honest[:flags] + b"\1\0" + honest[flags + 2 :])
    with pytest.raises(CheckpointError, match="is an encrypted zip archive; unpack it first"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_zip_sizes_are_checked(tmp_path):
    path = tmp_path / "evil.ckpt"
    honest = in_zip(state_dict())
    for record in ("data/0", "data.pkl"):
        entry = honest.rindex(f"archive/{record}".encode()) - 46  # in the directory at the end
        path.write_bytes(honest[: entry + 20] + b"\xff\xff\xff\x7f" * 2 + honest[entry + 28 :])
        with pytest.raises(CheckpointError, match="more than fits into a file"):
            read_checkpoint(path)
    path.write_bytes(in_zip(bytes(65 << 20), {"noise": os.urandom(3 << 20)}, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="has 68,157,440 bytes of 'archive/data.pkl'; the limit .* is 67,108,864"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_names_and_places_are_checked(tmp_path):
    path = tmp_path / "evil.ckpt"
    honest = in_zip(state_dict())
    first, last = honest.index(b"archive/data/0"), honest.rindex(b"archive/data/0")
    elsewhere = last - 46 + 42  # where the directory says the record begins
    buffer = io.BytesIO(honest)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/data/0", bytes(16))
    files = {
        "has a name twice": buffer.getvalue(),
        "lacks 'archive/data/0' in the place": honest[:first] + b"archive/data/1" + honest[first + 14 :],
        "lacks 'archive/data/0' in the place ": honest[:elsewhere] + b"\1" + honest[elsewhere + 1 :],
        "'archive/data.pkl' .* has the wrong size or checksum": honest.replace(b"honest", b"hornet"),
        "table of contents .* is absurdly long": in_zip(state_dict(), {f"{i:0200}": b"" for i in range(9000)}),
    }
    for message, content in files.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message.strip()):
            read_checkpoint(path)


HUGE = number(2**63)
EVIL_TENSORS = {
    "negative offset": tensor(offset=number(-1)),
    "offset beyond": tensor(offset=number(1)),
    "huge offset": tensor(offset=HUGE),
    "offset that is a float": tensor(offset=b"G" + bytes(8)),
    "boolean offset": tensor(offset=b"\x89"),
    "negative size": tensor(size=sequence(number(-4))),
    "size beyond": tensor(size=sequence(number(5))),
    "huge size": tensor(size=sequence(HUGE)),
    "sizes that overflow to nothing": tensor(
        size=sequence(number(2**32), number(2**32)), stride=sequence(*[b"K\0"] * 2)
    ),
    "a size of zero beside a huge one": tensor(size=sequence(b"K\0", number(2**40)), stride=sequence(*[b"K\1"] * 2)),
    "boolean size": tensor(size=sequence(b"\x88")),
    "size of text": tensor(size=sequence(text("4"))),
    "size in a list": tensor(size=b"](K\4e"),
    "no size": tensor(size=b"N"),
    "negative stride": tensor(stride=sequence(number(-1))),
    "stride beyond": tensor(stride=sequence(number(2))),
    "huge stride": tensor(stride=sequence(HUGE)),
    "fewer strides than sizes": tensor(stride=b")"),
    "a thousand dimensions": tensor(size=sequence(*[b"K\1"] * 1000), stride=sequence(*[b"K\1"] * 1000)),
    "a stride of zero, repeated": tensor(size=sequence(number(2**40)), stride=sequence(b"K\0")),
    "storage larger than its record": tensor(storage(count=number(5))),
    "storage of negative size": tensor(storage(count=number(-4))),
    "storage of huge size": tensor(storage(count=HUGE)),
    "storage of boolean size": tensor(storage(count=b"\x88"), size=b")", stride=b")"),
    "unknown storage": tensor(storage(key=text("7"))),
    "storage outside of the folder": tensor(storage(key=text("../data.pkl"))),
    "storage of no dtype": tensor(storage(kind=name("torch", "float32"))),
    "storage of another module": tensor(storage(kind=name("os", "FloatStorage"))),
    "sparse": call(name("torch._utils", "_rebuild_sparse_tensor"), b"N", b"N"),
    "arguments missing": call(name("torch._utils", "_rebuild_tensor_v2"), storage()),
}


@pytest.mark.parametrize("wrap", [in_zip, in_legacy])
@pytest.mark.parametrize("evil_tensor", EVIL_TENSORS)
def test_impossible_tensors_are_refused(tmp_path, evil_tensor, wrap):
    path = tmp_path / "evil.ckpt"
    path.write_bytes(wrap(b"\x80\x04" + mapping(evil=EVIL_TENSORS[evil_tensor]) + b"."))
    with pytest.raises(CheckpointError, match=r"is damaged|of an unsupported kind"):
        read_checkpoint(path)
