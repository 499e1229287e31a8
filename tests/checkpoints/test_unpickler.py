"""Nothing in a pickle runs, plain values are read as Python reads them, and hostile pickles soon end in an error."""

import contextlib
import copyreg
import functools
import pickle
import sys
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.files import read_checkpoint, read_state_dict
from sd.checkpoints.unpickler import Call, Global, Unpickler, UnpicklingError
from tests.support import malicious_pickles as evil
from tests.support.auditing import watching
from tests.support.malicious_pickles import in_legacy, in_zip, mapping, number, state_dict, tensor, text

WRAPPERS = {"zip": in_zip, "legacy": in_legacy}


def watched(path: Path) -> tuple[torch.Tensor | None, list]:
    """Read a file -> its honest tensor, or None after a CheckpointError, and everything suspicious that happened."""
    honest = None
    with watching() as seen, contextlib.suppress(CheckpointError):
        honest = read_state_dict(path).get("honest")
    return honest, [event for event in seen if event != ("open", str(path))]


@pytest.fixture
def attack_folder(tmp_path):
    """A folder with the files that attacks use, one extension code registered, and the reader's imports done."""
    evil.place_accomplices(tmp_path)
    copyreg.add_extension("os", "system", 0xF0)
    for wrap in WRAPPERS.values():
        (tmp_path / "warm_up").write_bytes(wrap(state_dict()))
        assert torch.equal(read_state_dict(tmp_path / "warm_up")["honest"], torch.ones(4))
    yield tmp_path
    copyreg.remove_extension("os", "system", 0xF0)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("attack", evil.attacks(Path("nowhere")))
def test_attacks_do_nothing(attack_folder, attack, wrapper):
    value = evil.attacks(attack_folder)[attack]
    path = attack_folder / "evil.ckpt"
    modules, environment = set(sys.modules), len(copyreg._inverted_registry)
    for pickled in (state_dict(evil=value), b"\x80\x02" + value + b"0" + state_dict()[2:], b"\x80\x02" + value + b"."):
        path.write_bytes(WRAPPERS[wrapper](pickled))
        honest, seen = watched(path)
        assert honest is None or torch.equal(honest, torch.ones(4))
        assert seen == []
    assert set(sys.modules) == modules
    assert len(copyreg._inverted_registry) == environment
    assert not (attack_folder / "canary").exists()


@pytest.mark.parametrize("attack", evil.ARMED)
def test_attacks_work_on_pythons_own_unpickler(attack_folder, attack):
    """So the test above can fail."""
    with contextlib.suppress(Exception):  # some fail after the attack
        pickle.loads(b"\x80\x04" + evil.attacks(attack_folder)[attack] + b".")
    assert (attack_folder / "canary").exists()


def test_watching_sees_what_runs(attack_folder):
    with watching() as seen:
        pickle.loads(b"\x80\x02" + evil.attacks(attack_folder)["os.system"] + b".")
    assert {"pickle.find_class", "os.system"} <= {event[0] for event in seen}


def test_most_attacks_load_around_the_placeholder(attack_folder):
    loaded = 0
    for value in evil.attacks(attack_folder).values():
        (attack_folder / "evil.ckpt").write_bytes(in_zip(state_dict(evil=value)))
        loaded += watched(attack_folder / "evil.ckpt")[0] is not None
    assert loaded >= 30


VALUES = [
    *(None, True, False, 0, 255, 256, 65536, -1, 2**31, -(2**31), 2**100, -(2**2000), 0.1, float("inf")),
    *("", "cat", "x" * 300, "größer", "\ud800", b"", b"bytes" * 100, bytearray(b"abc")),
    *((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], [1, [2, [3]]], {}, {"a": 1}, {"a": {"b": [1, 2]}, "c": ()}),
    *(OrderedDict(), OrderedDict(a=1, b=2), [list(range(2500)), {str(i): i for i in range(2500)}]),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
def test_plain_values_are_read_as_python_reads_them(value, protocol):
    if protocol < {bytes: 3, bytearray: 5}.get(type(value), 2):
        pytest.skip("written as a call")
    unpickler = Unpickler(pickle.dumps(value, protocol) + pickle.dumps("next", protocol), 1 << 20)
    assert unpickler.load() == value
    assert unpickler.load() == "next"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_shared_and_cyclic_values_keep_their_identity(protocol):
    shared = ["shared"]
    value = {"a": shared, "b": shared, "many": [[i] for i in range(300)]}
    value["self"] = value
    recursive = ([],)
    recursive[0].append(recursive)
    value["recursive"] = recursive
    loaded = Unpickler(pickle.dumps(value, protocol), 1 << 20).load()
    assert loaded["a"] is loaded["b"]
    assert loaded["self"] is loaded
    assert loaded["recursive"][0][0] is loaded["recursive"]
    assert loaded["many"][299] == [299]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_become_notes_and_foreign_keys_are_dropped(protocol):
    value = {
        "set": {1, 2},
        "frozen": frozenset([3]),
        "path": Path("a"),
        "class": OrderedDict,
        5: "five",
        (1,): 1,
        int: 2,
    }
    loaded = Unpickler(pickle.dumps(value, protocol), 1 << 20).load()
    assert list(loaded) == ["set", "frozen", "path", "class"]
    assert all(isinstance(loaded[key], Call) for key in ("set", "frozen", "path"))
    assert loaded["class"] == Global("collections", "OrderedDict")


MALFORMED = {
    "cut off": b"\x80\x02X\xff\xff",
    "from an empty stack": b"\x80\x02.",
    "a value from an empty": b"\x80\x02N\x85\x86.",
    "value from an empty stack": b"\x80\x02Nt.",
    "never stored": b"\x80\x02h\x05.",
    "instruction, b'S'": b"\x80\x02S'text'\n.",
    "instruction, b'\\x82'": b"\x80\x02\x82\xf0.",
    "not text": b"\x80\x04K\1K\2\x93.",
    "instructions": b"\x80\x02" + b"N0" * 250_001 + b"N.",
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_pickles_are_refused(message):
    with pytest.raises(UnpicklingError, match=message.replace("\\", "\\\\")):
        Unpickler(MALFORMED[message], 1 << 20).load()


def test_a_pickle_longer_than_allowed_is_refused(monkeypatch):
    monkeypatch.setattr("sd.checkpoints.unpickler.MAX_PICKLE_BYTES", 500)
    with pytest.raises(UnpicklingError, match="longer than 500 bytes"):
        Unpickler(pickle.dumps("x" * 1000), 1 << 20).load()


@pytest.mark.slow
def test_a_larger_file_may_have_more_instructions():
    """A trainer's log: a list of 300,000 losses. A small file, which may be compressed, never runs for that long."""
    log = pickle.dumps([[] for _ in range(300_000)], 2)
    assert len(Unpickler(log, 4 << 20).load()) == 300_000
    with pytest.raises(UnpicklingError, match="more than 500,000 instructions, the limit of this reader"):
        Unpickler(log, 10_000).load()


def same_storages(key: bytes, count: bytes) -> bytes:
    """A pickle that refers to one storage 50,000 times, with two keys and counts that are equal but not identical."""
    reference = b"(" + text("storage") + b"ctorch\nFloatStorage\n"
    two = [reference + key + b"N" + count + b"t" + b"q%c" % i for i in (0, 1)]
    return b"\x80\2" + b"".join(two) + b"h\0Q0h\1Q0" * 25_000 + b"."


@functools.cache
def bombs() -> dict[str, bytes]:
    """Pickles that crash, stall or fill the memory of a careless reader."""
    big = 2**61 - 1  # integers that are equal modulo this number have equal hashes
    levels = [b"]q%c(h%ch%ce0" % (i + 1, i, i) for i in range(60)]  # each a list that holds the previous one twice
    doubled = b"]q\x000" + b"".join(levels) + b"h\x3c"
    deep_and_wide = b"]" * 900 + b"(" + b"K\0" * 100_000 + b"e" + b"a" * 899
    nested_parameter = b"ctorch._utils\n_rebuild_parameter\n(" * 3000 + tensor() + b"\x89NtR" * 3000
    long = "x" * (3 << 20)
    many = b"".join(text(f"{i:x}") + b"h\1" for i in range(120_000))
    return {
        "a deep tuple as a key": state_dict()[:-1] + b"}" + b")" + b"\x85" * 400_000 + b"Ns0.",
        "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "deep calls": b"\x80\x02cos\nsystem\n" + b")R" * 100_000 + b".",
        "keys of equal hash": b"\x80\x02}(" + b"".join(number(big * i) + b"N" for i in range(60_000)) + b"u.",
        "a huge memo index": b"\x80\x02Nr\xff\xff\xff\xff.",
        "a huge text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "huge bytes": b"\x80\x04\x8e\x00\x00\x00\x00\x10\x00\x00\x00.",
        "a huge bytearray": b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00.",
        "a huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
        "a config that doubles": b"\x80\x02" + mapping(sd_config=mapping(a=doubled), honest=tensor()) + b".",
        "a config in itself": b"\x80\x02}q\1(" + text("sd_config") + b"h\1" + text("honest") + tensor() + b"u.",
        "a slow config": b"\x80\x02" + mapping(sd_config=mapping(a=deep_and_wide), honest=tensor()) + b".",
        "a deep config": b"\x80\x02" + mapping(sd_config=mapping(a=b"]" * 5000 + b"a" * 4999), honest=tensor()) + b".",
        "parameters in parameters": state_dict(evil=nested_parameter),
        "one long key, again and again": b"\x80\x02"
        + text(long)
        + b"q\0"
        + text(long)
        + b"q\1}"
        + b"h\0Nsh\1Ns" * 80_000
        + b".",
        "one long storage key, again and again": same_storages(text(long), number(4)),
        "one huge count, again and again": same_storages(
            text("0"), b"\x8b" + (3 << 20).to_bytes(4, "little") + b"\1" * (3 << 20)
        ),
        "many tensors": b"\x80\x02" + tensor() + b"q\1}(" + many + b"u.",
    }


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("bomb", bombs())
def test_bombs_do_no_harm(tmp_path, bomb, wrapper):
    path = tmp_path / "bomb.ckpt"
    path.write_bytes(WRAPPERS[wrapper](bombs()[bomb]))
    start = time.process_time()
    with contextlib.suppress(CheckpointError):
        assert read_checkpoint(path).config is None
    assert time.process_time() - start < 5


def test_too_many_tensors_are_refused(tmp_path):
    (tmp_path / "bomb.ckpt").write_bytes(in_zip(bombs()["many tensors"]))
    with pytest.raises(CheckpointError, match="has more than 20,000 entries"):
        read_checkpoint(tmp_path / "bomb.ckpt")
