"""Runs the code that reads files on many hostile files, and reports what happened, as JSON.

    python -m tests.support.fuzzer FOLDER FIRST files=1000 models=30 pictures=200

`files` are those of `mutations.case` for the checkpoint reader, `models` those of `model_mutations.model_case` for
`load_models`, `loras` those of `lora_mutations.lora_case` for `with_loras`, `pictures` those of
`picture_mutations.case`, read as images and as masks, `embeddings` those of
`synthetic_embeddings.case`. It runs in a separate process, so that a crash, a hang or a gigabyte of memory does not end
the tests that look for them.
"""

import collections
import contextlib
import faulthandler
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from sd.adapters.textual_inversion import read_embedding
from sd.checkpoints.files import read_state_dict
from sd.files import DATA
from sd.images import read_image, read_mask
from sd.model_loader import load_models
from sd.models import Models
from tests.support import lora_mutations, model_mutations, mutations, picture_mutations, synthetic_embeddings
from tests.support.auditing import watching

ADDRESS_SPACE = 8 << 30  # bytes: a bug found here should not take all memory of the machine
BASE = "base.safetensors"  # the model for LoRAs
HANG = 60  # seconds for one case, after which the process ends with a traceback
EXPECTED = [("open", str(DATA / "merges.txt")), ("ctypes.dlopen", None)]  # by the tokenizer; by Python itself


def read(path: Path) -> None:
    """Read a checkpoint, and the first and last number of every tensor."""
    for tensor in read_state_dict(path).values():
        size, stride = tensor.size(), tensor.stride()
        end = tensor.storage_offset() + 1 + sum((n - 1) * step for n, step in zip(size, stride))
        if tensor.numel():
            assert end * tensor.element_size() <= tensor.untyped_storage().nbytes(), "a tensor beyond its storage"
            tensor[(0,) * tensor.ndim].item(), tensor[(-1,) * tensor.ndim].item()


def load(path: Path) -> None:
    models = load_models(path, "cpu", torch.float32)
    assert not any(p.is_meta for p in models.diffusion.parameters()), "a weight that was never loaded"


def wear(path: Path) -> None:
    """Put a LoRA into the weights of a model; what plain ones change is computed a second time."""
    models = base_models(path.parent)
    worn = models.with_loras([(path, 0.5)])
    for network, module in worn.change.__self__.changed:
        for name, weight in getattr(worn, network).get_submodule(module).named_parameters():
            before = getattr(models, network).get_submodule(module).get_parameter(name)
            assert weight.shape == before.shape
            assert weight.isfinite().all(), "a weight that is not finite"
    for layer, change in lora_mutations.plain_changes(path):
        before, after = (getattr(each, layer.network).get_submodule(layer.module).weight for each in (models, worn))
        rows = slice(layer.first_row, layer.first_row + layer.shape[0])
        expected = before[rows] + 0.5 * change.reshape(layer.shape)
        assert torch.allclose(after[rows], expected, rtol=1e-4, atol=1e-4), "a weight with other numbers"


@cache
def base_models(folder: Path) -> Models:
    (folder / BASE).write_bytes(lora_mutations.base())
    return load_models(folder / BASE, "cpu", torch.float32)


def look(path: Path) -> None:
    image, mask = read_image(path), read_mask(path, 24, 16)
    assert image.mode == "RGB"
    assert mask.shape == (1, 1, 24, 16)
    assert 0 <= mask.min() <= mask.max() <= 1


def embed(path: Path) -> None:
    embedding = read_embedding(path)
    assert embedding.words
    assert embedding.vectors.ndim == 2
    assert embedding.vectors.isfinite().all()


KINDS = {
    "files": (mutations.case, read),
    "models": (model_mutations.model_case, load),
    "loras": (lora_mutations.lora_case, wear),
    "pictures": (picture_mutations.case, look),
    "embeddings": (synthetic_embeddings.case, embed),
}


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def attempt(action: Callable[[Path], None], path: Path) -> tuple[str, float]:
    """ "loaded", "refused" or what went wrong; and the seconds of processor time."""
    faulthandler.dump_traceback_later(HANG, exit=True)
    start = time.process_time()
    with watching() as events:
        try:
            action(path)
            outcome = "loaded"
        except ValueError as error:
            message = str(error)
            clear = message.startswith(str(path)) and (
                message.count("\n") == 0 or "does not fit the network" in message
            )
            outcome = "refused" if clear else f"an unclear {type(error).__name__}: {message:.300}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error!s:.300}"
    seconds = time.process_time() - start
    faulthandler.cancel_dump_traceback_later()
    expected = (*EXPECTED, ("open", str(path)), ("open", str(path.with_name(BASE))))
    events = [event for event in events if event not in expected]
    return (f"it did {events!s:.300}" if events else outcome), seconds


def warm_up(path: Path, loras: int) -> None:
    """Import everything that the cases will need."""
    Image.init()
    assert b"ok".decode("cp437") == b"ok".decode("utf-8-sig")  # names in archives; texts
    honest = [*mutations.seeds().values(), *picture_mutations.seeds().values(), model_mutations.model_case(0)[1]]
    honest += synthetic_embeddings.seeds()
    cases = [(content, action) for content in honest for action in (read, load, look, embed)]
    for content, action in cases + [(lora_mutations.lora_case(number)[1], wear) for number in range(loras)]:
        path.write_bytes(content)
        with contextlib.suppress(ValueError):
            action(path)


def cases(first: int, counts: dict[str, int]) -> Iterator[tuple[str, bytes, Callable[[Path], None]]]:
    """The name of every case, its bytes, and what to do with them."""
    for what, count in counts.items():
        make, action = KINDS[what]
        for number in range(first, first + count):
            kind, content = make(number)
            yield f"{kind} {number}", content, action


def main(folder: Path, first: int, counts: dict[str, int]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("ignore")  # from Pillow, and from zipfile, which makes hostile archives here
    path = folder / "case.ckpt"
    warm_up(path, loras=12 if "loras" in counts else 0)
    before, outcomes, wrong, slowest = peak_memory(), collections.Counter(), {}, (0.0, "")
    for name, content, action in cases(first, counts):
        path.write_bytes(content)
        outcome, seconds = attempt(action, path)
        slowest = max(slowest, (seconds, name))
        if outcome in ("loaded", "refused"):
            outcomes[f"{name.split()[0]} {outcome}"] += 1
        else:
            wrong[name] = outcome
    grown = peak_memory() - before
    json.dump({"outcomes": outcomes, "wrong": wrong, "slowest": slowest, "memory": grown}, sys.stdout)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pairs = (argument.split("=") for argument in sys.argv[3:])
    main(Path(sys.argv[1]), int(sys.argv[2]), {what: int(count) for what, count in pairs})
