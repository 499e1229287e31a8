"""Pickles that attack the program that loads them, assembled from single instructions, and files to put them in.

Every attack tries to create one file, the canary. `attacks(folder)` gives them by name, each as the bytes of a value to
put anywhere in a pickle. `place_accomplices(folder)` writes the files that some attacks load. `in_zip` and `in_legacy`
make a checkpoint of a whole pickle.
"""

import io
import pickle
import zipfile
from pathlib import Path

LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
ONES = b"\0\0\x80\x3f" * 4  # the storage "0" of every file made here: four float32 ones


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def name(module: str, qualified: str) -> bytes:
    """STACK_GLOBAL, which also accepts dotted names."""
    return text(module) + text(qualified) + b"\x93"


def sequence(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + sequence(*arguments) + b"R"


def storage(key: bytes | None = None, count: bytes | None = None, kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return sequence(text("storage"), kind, key or text("0"), text("cpu"), count or number(4), b"N") + b"Q"


def tensor(place: bytes = b"", offset: bytes = b"K\0", size: bytes = b"K\4\x85", stride: bytes = b"K\1\x85") -> bytes:
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return call(function, place or storage(), offset, size, stride, b"\x89", b"ccollections\nOrderedDict\n)R")


def state_dict(**entries: bytes) -> bytes:
    """A whole pickle: {"state_dict": {"honest": a tensor of four ones, ...}}."""
    return b"\x80\x04" + mapping(state_dict=mapping(honest=tensor(), **entries)) + b"."


def in_zip(pickled: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        contents = {"data.pkl": pickled, "byteorder": b"little", "data/0": ONES, "version": b"3\n"} | (records or {})
        for record, data in contents.items():
            archive.writestr(f"archive/{record}", data)
    return buffer.getvalue()


def in_legacy(pickled: bytes) -> bytes:
    head = b"".join(pickle.dumps(value, 2) for value in (LEGACY_MAGIC_NUMBER, 1001, SYSTEM))
    return head + pickled + pickle.dumps(["0"], 2) + (4).to_bytes(8, "little") + ONES


def canary_code(folder: Path) -> str:
    return f"open({str(folder / 'canary')!r}, 'w').close()"


def place_accomplices(folder: Path) -> None:
    (folder / "script.py").write_text(canary_code(folder))
    nested = b"\x80\2" + call(b"cbuiltins\nexec\n", text(canary_code(folder))) + b"."
    (folder / "nested.pt").write_bytes(in_zip(nested))
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': ()}".ljust(117) + b"\n"
    (folder / "nested.npy").write_bytes(b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head + nested)


def attacks(folder: Path) -> dict[str, bytes]:
    """Values to put into a pickle, by name; each tries to create `folder / "canary"`."""
    canary = folder / "canary"
    python = canary_code(folder)
    shell = f"touch {canary}"
    nested = b"\x80\2" + call(b"cbuiltins\nexec\n", text(python)) + b"."
    imported = call(name("builtins", "__import__"), text("os"))
    return {
        "os.system": call(b"cos\nsystem\n", text(shell)),
        "posix.system": call(b"cposix\nsystem\n", text(shell)),
        "builtins.eval": call(b"cbuiltins\neval\n", text(python)),
        "builtins.exec": call(b"cbuiltins\nexec\n", text(python)),
        "builtins.exec, Python 2's name": call(b"c__builtin__\nexec\n", text(python)),
        "builtins.open": call(name("builtins", "open"), text(str(canary)), text("w")),
        "io.FileIO, NEWOBJ": name("io", "FileIO") + sequence(text(str(canary)), text("w")) + b"\x81",
        "subprocess.check_output": call(name("subprocess", "check_output"), sequence(text("touch"), text(str(canary)))),
        "subprocess.Popen, NEWOBJ_EX": name("subprocess", "Popen")
        + sequence(text(shell))
        + mapping(shell=b"\x88")
        + b"\x92",
        "subprocess.getoutput, OBJ": b"(" + name("subprocess", "getoutput") + text(shell) + b"o",
        "os.system, INST": b"(" + text(shell) + b"ios\nsystem\n",
        "os.system, protocol 0": b"cos\nsystem\n(S'" + shell.encode() + b"'\ntR",
        "pty.spawn": call(name("pty", "spawn"), sequence(text("touch"), text(str(canary)))),
        "runpy.run_path": call(name("runpy", "run_path"), text(str(folder / "script.py"))),
        "importlib": call(name("importlib", "import_module"), text("this")),
        "webbrowser.open": call(name("webbrowser", "open"), text("file:///")),
        "numpy's runstring": call(name("numpy.testing._private.utils", "runstring"), text(python), b"}"),
        "torch.load": call(
            name("functools", "partial") + sequence(name("torch", "load")) + mapping(weights_only=b"\x89") + b"\x92",
            text(str(folder / "nested.pt")),
        ),
        "torch.utils.collect_env": call(name("torch.utils.collect_env", "run"), text(shell)),
        "torch's execWrapper": call(name("torch.jit.unsupported_tensor_ops", "execWrapper"), text(python), b"}", b"}"),
        "torch.serialization.load": call(name("torch.serialization", "load"), text(str(folder / "nested.pt"))),
        "torch.jit.load": call(name("torch.jit", "load"), text(str(folder / "nested.pt"))),
        "torch.package": call(name("torch.package", "PackageImporter"), text(str(folder / "nested.pt"))),
        "torch.ops.load_library": call(name("torch", "ops.load_library"), text(str(folder / "nested.pt"))),
        "torch.utils.cpp_extension": call(name("torch.utils.cpp_extension", "load"), text("a"), text("a.cpp")),
        "torch.distributed.rpc": call(name("torch.distributed.rpc.internal", "_run_function"), name("os", "system")),
        "ctypes.CDLL": call(name("ctypes", "CDLL"), text(str(folder / "nested.pt"))),
        "numpy.load": call(name("numpy", "load"), text(str(folder / "nested.npy")), b"N", b"\x88"),
        "numpy.f2py": call(name("numpy.f2py.crackfortran", "myeval"), text(python)),
        "numpy.ctypeslib": call(name("numpy.ctypeslib", "load_library"), text("nested.pt"), text(str(folder))),
        "numpy's array of objects": call(
            name("numpy._core.multiarray", "_reconstruct"), name("numpy", "ndarray"), number(0), b"C\1b"
        )
        + sequence(number(1), number(1), text("O"), b"\x89", b"]" + call(b"cos\nsystem\n", text(shell)) + b"a")
        + b"b",
        "timeit": call(name("timeit", "timeit"), text("pass"), text(python)),
        "cProfile": call(name("cProfile", "runctx"), text(python), b"}", b"}"),
        "code": call(name("code", "interact"), text(""), b"N", b"}"),
        "pydoc": call(name("pydoc", "pipepager"), text(""), text(shell)),
        "torch.hub": call(name("torch.hub", "load"), text(str(folder)), text("model"), text("local")),
        "torch.storage._load_from_bytes": call(
            name("torch.storage", "_load_from_bytes"), b"B" + len(nested).to_bytes(4, "little") + nested
        ),
        "pickle.loads": call(name("pickle", "loads"), b"B" + len(nested).to_bytes(4, "little") + nested),
        "dotted name": call(name("shutil", "os.system"), text(shell)),
        "dotted name under torch": call(name("torch._utils", "sys.modules.__class__")),
        "dotted name on a known function": call(name("torch._utils", "_rebuild_tensor_v2.__globals__.__getitem__")),
        "getattr": call(call(name("builtins", "getattr"), imported, text("system")), text(shell)),
        "operator.methodcaller": call(call(name("operator", "methodcaller"), text("system"), text(shell)), imported),
        "copyreg, EXT1": call(b"\x82\xf0", text(shell)),
        "copyreg, EXT2": call(b"\x83\xf0\0", text(shell)),
        "copyreg, EXT4": call(b"\x84\xf0\0\0\0", text(shell)),
        "copyreg.add_extension": call(name("copyreg", "add_extension"), text("os"), text("system"), number(241)),
        "BUILD on the tensor function": name("torch._utils", "_rebuild_tensor_v2") + mapping(__code__=b"N") + b"b",
        "BUILD on OrderedDict": name("collections", "OrderedDict") + mapping(__init__=name("os", "system")) + b"b",
        "BUILD on a storage class": name("torch", "FloatStorage") + mapping(dtype=name("os", "system")) + b"b",
        "BUILD with slots": call(b"ccollections\nOrderedDict\n") + b"N" + mapping(__class__=b"N") + b"\x86b",
        "__setstate__": name("os", "environ") + mapping(__setstate__=name("os", "system")) + b"b" + text(shell) + b"b",
        "evil class of storage": tensor(storage(kind=name("os", "system"))),
        "evil key of storage": tensor(storage(key=call(b"cos\nsystem\n", text(shell)))),
        "evil storage": tensor(call(b"cos\nsystem\n", text(shell))),
        "evil offset": tensor(offset=call(b"cos\nsystem\n", text(shell))),
        "evil size": tensor(size=call(b"cos\nsystem\n", text(shell))),
        "evil hooks": call(
            b"ctorch._utils\n_rebuild_parameter\n", tensor(), b"\x88", call(b"cos\nsystem\n", text(shell))
        ),
        "persistent id": call(b"cos\nsystem\n", text(shell)) + b"Q",
        "persistent module": sequence(text("module"), name("os", "system"), text("x.py"), text(python)) + b"Q",
        "state dict of another class": call(name("os", "system"), text(shell)) + b"(" + text("key") + b"Nu",
    }


# The attacks that succeed on Python's own unpickler. They show that the canary works.
ARMED = [
    "os.system",
    "posix.system",
    "builtins.exec",
    "builtins.eval",
    "builtins.open",
    "subprocess.check_output",
    "subprocess.getoutput, OBJ",
    "os.system, INST",
    "os.system, protocol 0",
    "runpy.run_path",
    "torch.storage._load_from_bytes",
    "torch.load",
    "torch.utils.collect_env",
    "torch's execWrapper",
    "numpy.load",
    "numpy's array of objects",
    "timeit",
    "cProfile",
    "pydoc",
    "pickle.loads",
    "dotted name",
    "getattr",
    "operator.methodcaller",
    "copyreg, EXT1",
]
