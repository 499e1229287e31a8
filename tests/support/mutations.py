"""Damaged and hostile checkpoint files, made from small honest ones.

`case(number)` gives the kind and the bytes of one file; equal numbers give equal files.
"""

import io
import json
import pickle
import pickletools
import random
import zipfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from tests.support import malicious_pickles as evil

# Numbers at which sizes and offsets change their meaning: signs, widths of integers, and our own limits.
NUMBERS = [-(2**63), -(2**31), -8, -1, 0, 1, 2, 3, 4, 5, 8, 127, 255, 4096, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
NUMBERS += [2**47, 2**48 - 1, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400]
NAMES = ["archive/data/0", "archive/data.pkl", "archive/data/../data.pkl", "../../../etc/passwd", "/etc/passwd"]
NAMES += [
    "archive\\data\\1",
    "C:\\data.pkl",
    "archive/data/0\0.txt",
    "archive/data/",
    "x/data.pkl",
    "data.pkl",
    " ",
    "ä" * 99,
]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "BOOL", "F8_E4M3", "C64", "f32", "", "F32\0", "U128"]
STORAGES = ["FloatStorage", "HalfStorage", "LongStorage", "ByteStorage", "ComplexFloatStorage", "nn", "_C", ""]
VALUES = [
    None,
    True,
    False,
    " ",
    "F32",
    [],
    {},
    [[]],
    {"a": 1},
    -1,
    0,
    1.5,
    float("nan"),
    float("inf"),
    "\ud800",
    10**30,
]
OPCODES = [opcode for opcode in pickletools.opcodes if opcode.name != "STOP"]


@cache
def seeds() -> dict[str, bytes]:
    """Small honest files of each format."""
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half(), "c": torch.arange(3)}
    files = {"safetensors": save(state, {"sd_config": "{}"})}
    for kind, new in [("zip", True), ("legacy", False)]:
        buffer = io.BytesIO()
        value = {"state_dict": state, "sd_config": {"a": [1]}, "epoch": 3}
        torch.save(value, buffer, _use_new_zipfile_serialization=new)
        files[kind] = buffer.getvalue()
    packed = evil.in_zip(evil.state_dict(), {}, zipfile.ZIP_DEFLATED)
    return files | {"protocol 4": evil.in_zip(evil.state_dict()), "deflated": packed}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, insert, repeat, remove or truncate bytes at random places, once or a few times."""
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, length = rng.randrange(len(data)), rng.choice([1, 1, 2, 4, 8, 64])
        number = (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")[: rng.choice([2, 4, 8])]
        new = rng.choice([rng.randbytes(length), b"\xff" * length, bytes(length), data[:length], number])
        start = rng.randrange(len(data))
        data = rng.choice(
            [
                data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
                data[:at] + new + data[at + len(new) :],
                data[:at] + new + data[at:],
                data[:at] + data[start : start + length] + data[at:],
                data[:at] + data[at + length :] or data,
                data[: max(at, 1)],
            ]
        )
    return data


def any_seed(rng: random.Random) -> bytes:
    return rng.choice(list(seeds().values()))


def damaged(rng: random.Random) -> bytes:
    return mutate(any_seed(rng), rng)


def spliced(rng: random.Random) -> bytes:
    """The beginning of one file and the end of another, cut at random places or where a part begins."""

    def cut(data: bytes) -> int:
        places = [data.find(mark) for mark in (b"PK\1\2", b"PK\5\6", b"\x80\2", b'"a"', b"ctorch", b"}")]
        return rng.choice([rng.randrange(len(data)), *(place for place in places if place >= 0)])

    first, second = any_seed(rng), any_seed(rng)
    return first[: cut(first)] + second[cut(second) :]


def wrapped(pickled: bytes, rng: random.Random) -> bytes:
    return rng.choice([evil.in_zip, evil.in_legacy])(pickled)


def archive(rng: random.Random) -> bytes:
    """A zip archive with hostile names, repeated, missing or inflating records, and wrong numbers in its tables."""
    records = {"archive/data.pkl": evil.state_dict(), "archive/byteorder": b"little", "archive/data/0": evil.ONES}
    records = list(records.items())
    for _ in range(rng.randrange(4)):
        content = rng.choice([evil.state_dict(), evil.ONES, b"", b"big", bytes(rng.choice([100, 1 << 16, 1 << 22]))])
        records.insert(rng.randrange(len(records) + 1), (rng.choice(NAMES), content))
    if rng.random() < 0.2:
        records.pop(rng.randrange(len(records)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in records:
            method = rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED] * 2 + [zipfile.ZIP_BZIP2])
            file.writestr(name, content, method)
        file.comment = rng.choice([b"", b"PK\5\6", bytes(100)])
    data = bytearray(buffer.getvalue())
    for _ in range(rng.randrange(3)):
        mark, fields = rng.choice([(b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22)])
        at = data.find(mark, rng.randrange(len(data))) + rng.randrange(4, fields)
        data[at : at + 4] = (rng.choice(NUMBERS) % 2**32).to_bytes(4, "little")
    return bytes(data)


def program(rng: random.Random) -> bytes:
    """A pickle of random instructions, including ones that Python no longer writes."""
    pickled = b"\x80\4" + rng.choice([b"", evil.tensor() + b"q\0", b"}q\0", b"]q\0"])
    for _ in range(rng.choice([3, 20, 200])):
        opcode = rng.choice(OPCODES)
        pickled += opcode.code.encode("latin-1")
        if opcode.arg is None:
            continue
        if opcode.arg.n >= 0:
            pickled += rng.choice([bytes(8), b"\1" + bytes(7), rng.randbytes(8)])[: opcode.arg.n]
        elif opcode.arg.n == pickletools.UP_TO_NEWLINE:
            pickled += rng.choice(
                [b"os\nsystem\n", b"torch._utils\n_rebuild_tensor_v2\n", b"collections\nOrderedDict\n", b"7\n"]
            )
        else:
            width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(opcode.arg.n, 4)
            pickled += rng.choice([3, 3, 3, 200]).to_bytes(width, "little") + b"abc"
    return wrapped(pickled + b".", rng)


def number(rng: random.Random) -> bytes:
    return evil.number(rng.choice(NUMBERS) if rng.random() < 0.7 else rng.randrange(6))


def tensors(rng: random.Random) -> bytes:
    """Well-formed tensors with wrong dtypes, sizes, strides, offsets, keys and counts."""

    def some(*honest: bytes) -> bytes:
        return (
            evil.sequence(*(number(rng) for _ in range(rng.choice([0, 1, 1, 2, 5, 17, 70]))))
            if rng.random() < 0.5
            else honest[0]
        )

    def tensor() -> bytes:
        kind = f"ctorch\n{rng.choice(STORAGES)}\n".encode()
        key = evil.text(rng.choice(["0", "0", "0", "1", "../data.pkl", "0" * 2000]))
        place = evil.storage(key, rng.choice([evil.number(4), evil.number(2), number(rng)]), kind)
        offset = rng.choice([evil.number(0), number(rng)])
        return evil.tensor(rng.choice([b"", place]), offset, some(b"K\4\x85"), some(b"K\1\x85"))

    return wrapped(evil.state_dict(**{f"t{i}": tensor() for i in range(rng.randrange(1, 4))}), rng)


def nested(rng: random.Random) -> bytes:
    """Containers that are deep, contain themselves, or double at every level, anywhere in a checkpoint."""
    depth = rng.choice([5, 100, 3000, 60_000])
    value = rng.choice(
        [
            b"]" * depth + b"a" * (depth - 1),
            b")" + b"\x85" * depth,
            b"}q\x07" + evil.text("state_dict") + b"h\7s",
            b"]q\7h\7a",
            b"cos\nsystem\n" + b")R" * depth,
            b")q\0" + b"h\0h\0\x86q\0" * 60,
            b"]" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) if i else b"q\0" for i in range(40)),
        ]
    )
    inside = {rng.choice(["config", "x", "honest"]): value}
    top = evil.mapping(state_dict=rng.choice([evil.mapping(honest=evil.tensor()), value]), **inside)
    return wrapped(b"\x80\4" + rng.choice([top, evil.mapping(**inside), value]) + b".", rng)


def attack(rng: random.Random) -> bytes:
    """One of the malicious pickles, whole or damaged."""
    value = rng.choice(list(evil.attacks(Path("nowhere")).values()))
    pickled = rng.choice([evil.state_dict(evil=value), b"\x80\2" + value + b"0" + evil.state_dict()[2:]])
    return wrapped(rng.choice([pickled, mutate(pickled, rng)]), rng)


def header(rng: random.Random) -> bytes:
    """A safetensors file with a wrong header that is still JSON, or almost."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    tree = {"__metadata__": {"format": "pt"}, "a": dict(entry), "b": entry | {"data_offsets": [8, 16]}}
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(list(tree))
        field = rng.choice(["dtype", "shape", "data_offsets", "more"])
        numbers = [rng.choice(NUMBERS) for _ in range(rng.choice([1, 2, 2, 20, 5000]))]
        value = rng.choice([rng.choice(DTYPES), numbers, rng.choice(VALUES), "x" * rng.choice([10, 10**6])])
        if rng.random() < 0.6 and isinstance(tree[name], dict):
            tree[name] = tree[name] | {field: value}
        else:
            tree[rng.choice([name, "c", "", "x" * 2000])] = rng.choice([value, entry, tree["a"]])
    text = json.dumps(tree)
    if rng.random() < 0.3:
        depth = rng.choice([10, 900, 50_000])
        text = rng.choice(
            [text + "x", text[:-1], text[:-1] + ',"a":{}}', " " * 9 + text, '{"a":' + "[" * depth, text * 2]
        )
    data, claimed = text.encode("utf-8", "surrogatepass"), rng.choice([len(text)] * 6 + [0, 2**31, 2**63])
    return claimed.to_bytes(8, "little") + data + bytes(rng.choice([16] * 6 + [0, 15, 17, 4000]))


def legacy(rng: random.Random) -> bytes:
    """The five pickles of the old format, some exchanged, and storages with a wrong size."""
    parts = [pickle.dumps(value, 2) for value in (evil.LEGACY_MAGIC_NUMBER, 1001, evil.SYSTEM)]
    parts += [evil.state_dict(), pickle.dumps(["0"], 2)]
    others = [
        *parts,
        *(pickle.dumps(value, 2) for value in (["0", "0"], ["1"], [0], "0", 7, {}, [[]], ["0"] * 9000, None)),
    ]
    for _ in range(rng.randrange(3)):
        parts[rng.randrange(1, 5)] = rng.choice(others)
    count = rng.choice([4, 4, rng.choice(NUMBERS)]) % 2**64
    return b"".join(parts) + count.to_bytes(8, "little") + evil.ONES[: rng.choice([16, 16, 15, 0])]


KINDS = [damaged, damaged, damaged, spliced, archive, program, tensors, nested, attack, header, header, legacy]


def case(number: int) -> tuple[str, bytes]:
    make = KINDS[number % len(KINDS)]
    return make.__name__, make(random.Random(number))
