"""Searches for files that break the checkpoint reader, guided by which of its lines each file reaches.

    python tests/support/fuzz_checkpoint.py [FOLDER] [options of libFuzzer, such as -max_total_time=600]

It needs the package atheris (pip install atheris), and runs until it finds something or is stopped. FOLDER keeps the
inputs that reached new lines, for the next run. The first byte of an input says what the rest is: 0 a whole file, 1 a
pickle in an archive, 2 a pickle in the old format, 3 a safetensors header. Any result but tensors or a CheckpointError
ends the run, and so does an input that takes over ten seconds or 1.5 GB. The file crash-... then holds the input.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("fuzz_checkpoint.py: the package atheris is missing: `pip install atheris`.")

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(
    include=[
        "sd.checkpoints.checkpoint",
        "sd.checkpoints.files",
        "sd.checkpoints.safetensors",
        "sd.checkpoints.torch_save",
        "sd.checkpoints.unpickler",
        "sd.checkpoints.zip_archive",
    ]
):
    from sd.checkpoints.checkpoint import CheckpointError
    from sd.checkpoints.files import read_checkpoint

from tests.support import malicious_pickles as evil
from tests.support import mutations
from tests.support.auditing import watching

LIMITS = ["-timeout=10", "-rss_limit_mb=1536", "-max_len=65536"]  # torch alone takes 300 MB


def in_safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(16)


WRAPPERS = [bytes, evil.in_zip, evil.in_legacy, in_safetensors]


def beginnings() -> list[bytes]:
    """The first inputs: honest files, pickles and headers, attacks, and a text."""
    files = [b"\0" + content for content in (*mutations.seeds().values(), b"a text")]
    pickles = [evil.state_dict(), *(evil.state_dict(evil=value) for value in evil.attacks(Path("nowhere")).values())]
    header = mutations.seeds()["safetensors"]
    end = 8 + int.from_bytes(header[:8], "little")
    return files + [kind + pickled for pickled in pickles for kind in (b"\1", b"\2")] + [b"\3" + header[8:end]]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        corpus = Path(folders[0]) if folders else Path(temporary) / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(beginnings()):
            (corpus / f"beginning-{number}").write_bytes(content)
        path = Path(temporary) / "input.ckpt"

        def attempt(data: bytes) -> None:
            path.write_bytes(WRAPPERS[data[0] % len(WRAPPERS)](data[1:]) if data else b"")
            with watching() as events, contextlib.suppress(CheckpointError):
                read_checkpoint(path)
            wrong = [event for event in events if event != ("open", str(path))]
            assert not wrong or not begun, f"it did {wrong}"

        begun = False
        for content in beginnings():  # here the reader may still import what it needs
            attempt(content)
        begun = True
        options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
        atheris.Setup([sys.argv[0], str(corpus), *LIMITS, *options], attempt)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
