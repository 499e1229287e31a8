"""The bytes of a pickle -> the values that it describes, without importing or calling anything that it names.

A pickle is a program for a small machine with a stack of values and a memo, which keeps values for later. Most
instructions push a number, a text or an empty container, or move the top of the stack into the container below it.
Three instructions make pickles dangerous. GLOBAL imports a module that the file names and pushes something from it.
REDUCE calls whatever lies on the stack. BUILD sets the attributes of an object. So reading a stranger's pickle with
Python's own `pickle` runs a stranger's program.

This machine only takes notes. GLOBAL pushes `Global("os", "system")`, which is two strings. REDUCE pushes
`Call(that, arguments)`, and nothing is called. BUILD drops its state. The calls and references with which torch.save
describes tensors become a `TensorNote`; an OrderedDict and a ParameterDict become a dict. torch_save.py makes tensors
of the notes.

It supports the instructions that Python 3 writes in pickle protocols 2 to 5, and refuses all others. In a dictionary it
keeps only entries whose keys are text of a sensible length, as all keys of a state dict are. Other keys can crash or
stall the reader when they are looked up: a tuple nested a million deep, a million numbers with equal hashes, the same
ten million letters again and again.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Real checkpoints stay far below these limits. Without limits, a small file could keep the reader busy for hours.
MAX_PICKLE_BYTES = 64 << 20  # Stable Diffusion 1.5 has 0.2 MB; a trainer's log can be longer
FREE_INSTRUCTIONS = 500_000  # Stable Diffusion 1.5 has 36,000, and four times that with its optimizer's state
MAX_INSTRUCTIONS = 2_000_000  # of a file of 8 MB or more; a log of a million losses has a million
MAX_NAME = 1000  # characters in a tensor's name; the longest in Stable Diffusion has 100
MAX_NUMBER = 1 << 48  # bytes, elements, or the length of one dimension

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.int8,  # the numbers behind quantized tensors, which are not read
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "UntypedStorage": torch.uint8,  # bytes, for the dtypes below
}
NEWER_DTYPES = {
    name: getattr(torch, name)
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
}


class UnpicklingError(ValueError):
    """The bytes are not a pickle, or not one that a checkpoint would contain."""


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function, not the class or function itself."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """An object that Python's pickle would have made with `function(*arguments)`."""

    function: Any
    arguments: Any


@dataclass(frozen=True, slots=True)
class StorageNote:
    """A reference to data outside the pickle: `count` numbers, 0 to MAX_NUMBER, which the file stores under `key`."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, slots=True)
class TensorNote:
    """A view of a storage; offset and strides count elements. None of the values has been checked."""

    storage: StorageNote
    offset: Any
    size: Any
    stride: Any
    dtype: torch.dtype


class Unpickler:
    """Reads pickles that follow one another in `data`, each at most MAX_PICKLE_BYTES long.

    `data` is bytes, or anything that is indexed, sliced and searched like bytes, such as a mapped file. A larger file,
    of `file_size` bytes, may have more instructions: a compressed pickle of few bytes never runs for long. `position`
    is the first byte after the last pickle read. `storages` holds every storage that the pickles referred to, by key.
    """

    def __init__(self, data: Any, file_size: int) -> None:
        self.data = data
        self.position = 0
        self.storages: dict[str, StorageNote] = {}
        self.limit = min(max(FREE_INSTRUCTIONS, file_size // 4), MAX_INSTRUCTIONS)
        self.budget = iter(range(self.limit))  # for all pickles together

    def load(self) -> Any:
        """The value of the next pickle. Raises UnpicklingError, or another ValueError for text that is not UTF-8."""
        self.end = min(len(self.data), self.position + MAX_PICKLE_BYTES)
        self.stack: list[Any] = []
        self.push, self.pop = self.stack.append, self.stack.pop
        self.marks: list[int] = []  # the height of the stack at each open MARK
        self.memo: dict[int, Any] = {}
        try:
            for _ in self.budget:
                code = self.read(1)
                if code == pickle.STOP:
                    return self.pop()
                instruction = INSTRUCTIONS.get(code)
                if instruction is None:
                    raise UnpicklingError(f"the pickle has an instruction, {code!r}, that no checkpoint contains")
                instruction(self)
        except IndexError:
            raise UnpicklingError("the pickle takes a value from an empty stack") from None
        raise UnpicklingError(f"the pickle has more than {self.limit:,} instructions, the limit of this reader")

    def read(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > self.end:
            raise UnpicklingError(f"the pickle is cut off, or longer than {MAX_PICKLE_BYTES:,} bytes")
        return self.data[start : self.position]

    def read_number(self, width: int) -> int:
        return int.from_bytes(self.read(width), "little")

    def read_line(self) -> str:
        newline = self.data.find(b"\n", self.position, self.end)
        length = (self.end if newline < 0 else newline) - self.position
        return self.read(length + 1)[:-1].decode()

    def pop_mark(self) -> list[Any]:
        """Take everything above the last MARK off the stack."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def discard(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def push_tuple(self, count: int) -> None:
        start = len(self.stack) - count
        if start < 0:
            raise IndexError
        self.stack[start:] = [tuple(self.stack[start:])]

    def extend(self, items: list[Any]) -> None:
        """Add items to the list on top of the stack. A collection of another class is a note and stays unchanged."""
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Add entries, given as key, value, key, value, to the dictionary on top of the stack."""
        if type(self.stack[-1]) is dict:
            entries = zip(items[::2], items[1::2])
            self.stack[-1].update((key, value) for key, value in entries if _is_name(key))

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise UnpicklingError("the pickle recalls a value that it never stored")
        self.push(self.memo[index])

    def push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise UnpicklingError("the pickle names a class with something that is not text")
        self.push(Global(module, name))

    def push_call(self, arguments: Any) -> None:
        """REDUCE and similar: pop a function and push a note of its call. For tensors, push a TensorNote."""
        function = self.pop()
        match function, arguments:
            case Global("collections", "OrderedDict"), ():
                self.push({})  # its entries follow, by SETITEMS
            case (
                Global("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2"),
                (StorageNote() as storage, offset, size, stride, *_),
            ):
                self.push(TensorNote(storage, offset, size, stride, storage.dtype))
            case (
                Global("torch._utils", "_rebuild_tensor_v3"),
                (StorageNote() as storage, offset, size, stride, _, _, Global("torch", dtype), *_),
            ) if dtype in NEWER_DTYPES:
                self.push(TensorNote(storage, offset, size, stride, NEWER_DTYPES[dtype]))
            case (
                Global("torch._tensor", "_rebuild_from_type_v2"),  # a tensor with attributes, which are dropped
                (
                    Global("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor_v3") as rebuild,
                    Global("torch", "Tensor"),
                    arguments,
                    *_,
                ),
            ):
                self.push(rebuild)
                self.push_call(arguments)
            case (
                Global("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"),
                (TensorNote() as tensor, *_),
            ):
                self.push(tensor)
            case _:
                self.push(Call(function, arguments))

    def build(self) -> None:
        """BUILD: pop the state of an object. A ParameterDict becomes the dictionary in its state."""
        match self.pop(), self.stack[-1]:
            case {"_parameters": dict() as parameters}, Call(Global("torch.nn.modules.container", "ParameterDict"), ()):
                self.stack[-1] = parameters

    def push_reference(self) -> None:
        """BINPERSID: a reference to something outside the pickle; torch uses it for the storages of tensors."""
        match reference := self.pop():
            case ("storage", Global("torch" | "torch.storage", name), key, _, count, *_) if (
                name in STORAGE_DTYPES and _is_name(key) and type(count) is int and 0 <= count < MAX_NUMBER
            ):
                note = StorageNote(key, STORAGE_DTYPES[name], count)
                if self.storages.setdefault(key, note) != note:
                    raise UnpicklingError("the pickle describes one storage in two ways")
                self.push(note)
            case ("module", Global() as name, *_):  # a class of torch.nn, in the old format, beside its source code
                self.push(name)
            case _:
                self.push(Call(Global("pickle", "persistent_load"), reference))


def _is_name(value: Any) -> bool:
    return type(value) is str and len(value) <= MAX_NAME


Instruction = Callable[[Unpickler], None]


def _number(layout: str) -> Instruction:
    """Push a number of fixed width, in the notation of `struct`."""
    number = struct.Struct(layout)
    return lambda machine: machine.push(number.unpack(machine.read(number.size))[0])


def _sized(width: int, decode: Callable[[bytes], Any]) -> Instruction:
    """Push a value that follows its own length, a number of `width` bytes."""
    return lambda machine: machine.push(decode(machine.read(machine.read_number(width))))


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


INSTRUCTIONS: dict[bytes, Instruction] = {
    # numbers, text and bytes
    pickle.NONE: lambda machine: machine.push(None),
    pickle.NEWTRUE: lambda machine: machine.push(True),
    pickle.NEWFALSE: lambda machine: machine.push(False),
    pickle.BININT1: _number("<B"),
    pickle.BININT2: _number("<H"),
    pickle.BININT: _number("<i"),
    pickle.BINFLOAT: _number(">d"),
    pickle.LONG1: _sized(1, _integer),
    pickle.LONG4: _sized(4, _integer),
    pickle.SHORT_BINUNICODE: _sized(1, _text),
    pickle.BINUNICODE: _sized(4, _text),
    pickle.BINUNICODE8: _sized(8, _text),
    pickle.SHORT_BINBYTES: _sized(1, bytes),
    pickle.BINBYTES: _sized(4, bytes),
    pickle.BINBYTES8: _sized(8, bytes),
    pickle.BYTEARRAY8: _sized(8, bytes),
    # containers
    pickle.EMPTY_TUPLE: lambda machine: machine.push(()),
    pickle.TUPLE: lambda machine: machine.push(tuple(machine.pop_mark())),
    pickle.TUPLE1: lambda machine: machine.push_tuple(1),
    pickle.TUPLE2: lambda machine: machine.push_tuple(2),
    pickle.TUPLE3: lambda machine: machine.push_tuple(3),
    pickle.EMPTY_LIST: lambda machine: machine.push([]),
    pickle.APPEND: lambda machine: machine.extend([machine.pop()]),
    pickle.APPENDS: lambda machine: machine.extend(machine.pop_mark()),
    pickle.EMPTY_DICT: lambda machine: machine.push({}),
    pickle.SETITEM: lambda machine: machine.update([machine.pop(), machine.pop()][::-1]),
    pickle.SETITEMS: lambda machine: machine.update(machine.pop_mark()),
    pickle.EMPTY_SET: lambda machine: machine.push(Call(Global("builtins", "set"), ())),
    pickle.ADDITEMS: lambda machine: machine.extend(machine.pop_mark()),
    pickle.FROZENSET: lambda machine: machine.push(Call(Global("builtins", "frozenset"), machine.pop_mark())),
    # names, calls, attributes and references: kept as notes, or dropped
    pickle.GLOBAL: lambda machine: machine.push_global(machine.read_line(), machine.read_line()),
    pickle.STACK_GLOBAL: lambda machine: machine.push_global(*[machine.pop(), machine.pop()][::-1]),
    pickle.REDUCE: lambda machine: machine.push_call(machine.pop()),
    pickle.NEWOBJ: lambda machine: machine.push_call(machine.pop()),
    pickle.NEWOBJ_EX: lambda machine: machine.push_call((machine.pop(), machine.pop())),
    pickle.BUILD: lambda machine: machine.build(),
    pickle.BINPERSID: lambda machine: machine.push_reference(),
    # the stack and the memo
    pickle.MARK: lambda machine: machine.marks.append(len(machine.stack)),
    pickle.POP: lambda machine: machine.discard(),
    pickle.POP_MARK: lambda machine: machine.pop_mark(),
    pickle.MEMOIZE: lambda machine: machine.remember(len(machine.memo)),
    pickle.BINPUT: lambda machine: machine.remember(machine.read_number(1)),
    pickle.LONG_BINPUT: lambda machine: machine.remember(machine.read_number(4)),
    pickle.BINGET: lambda machine: machine.recall(machine.read_number(1)),
    pickle.LONG_BINGET: lambda machine: machine.recall(machine.read_number(4)),
    pickle.PROTO: lambda machine: machine.read(1),
    pickle.FRAME: lambda machine: machine.read(8),
}
