"""Small embedding files in every layout that people share, and damaged ones for the fuzzer.

`case(number)` gives the kind and the bytes of one damaged file; equal numbers give equal files.
"""

import io
import random
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from tests.support.model_mutations import change_tensor
from tests.support.mutations import VALUES, mutate

LAYOUTS = ("web ui", "parameter dict", "by token", "emb_params", "tensor")
TOKEN = "<my-cat>"
KEYS = [
    "*",
    "emb_params",
    TOKEN,
    "",
    "clip_l",
    "clip_g",
    "<",
    "<\ud800>",
    "<" + "a" * 2000 + ">",
    "../x",
    "string_to_param",
]


def vectors(count: int = 3, width: int = 32, seed: int = 0) -> Tensor:
    """Like rows of a table of token embeddings, (count, width)."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.3


def layout(name: str, tensor: Tensor) -> object:
    """What a file of this layout holds: a dictionary, or the tensor."""
    if name == "web ui":
        more = {"name": "other", "step": 1499, "sd_checkpoint": "81761151", "sd_checkpoint_name": "v1-5"}
        return {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}} | more
    if name == "parameter dict":  # the paper's own code
        parameters = nn.ParameterDict({"*": nn.Parameter(tensor, requires_grad=False)})
        return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}
    if name == "by token":  # diffusers; one vector is stored without an axis for their number
        return {TOKEN: tensor[0] if tensor.ndim and len(tensor) == 1 else tensor}
    return {"emb_params": tensor} if name == "emb_params" else tensor


def saved(content: object, kind: str = "zip") -> bytes:
    """The bytes of a "safetensors" file, or of torch's "zip" or "legacy" format."""
    if kind == "safetensors":
        return save(content)
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


def write(path: Path, name: str, tensor: Tensor | None = None, kind: str | None = None) -> Path:
    """Writes an embedding file, in the format of its suffix unless `kind` says another."""
    kind = kind or ("safetensors" if path.suffix == ".safetensors" else "zip")
    path.write_bytes(saved(layout(name, vectors() if tensor is None else tensor), kind))
    return path


@cache
def seeds() -> list[bytes]:
    """Small honest files of each layout and format."""
    tensor = vectors(2, 8)
    files = [saved(layout(name, tensor), kind) for name in LAYOUTS for kind in ("zip", "legacy")]
    return files + [saved(layout(name, tensor), "safetensors") for name in ("by token", "emb_params")]


def damaged(rng: random.Random) -> bytes:
    return mutate(rng.choice(seeds()), rng)


def odd(rng: random.Random) -> bytes:
    """A file that is whole, with tensors, names or values that do not belong there."""
    tensor = vectors(rng.choice([1, 2, 75, 76]), rng.choice([1, 8, 768]))
    if rng.random() < 0.7:
        tensor = change_tensor(tensor, rng)
    content = layout(rng.choice(LAYOUTS), tensor)
    if isinstance(content, dict) and rng.random() < 0.6:
        for _ in range(rng.choice([1, 1, 3])):
            inner = content.get("string_to_param")
            place = rng.choice([content, inner]) if isinstance(inner, dict) else content
            place[rng.choice([*KEYS, *place])] = rng.choice([tensor, {"*": tensor}, *VALUES])
    return saved(content, rng.choice(["zip", "legacy"]))


def case(number: int) -> tuple[str, bytes]:
    make = (damaged, odd)[number % 2]
    return f"embedding-{make.__name__}", make(random.Random(number))
