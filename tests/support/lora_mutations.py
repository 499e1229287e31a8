"""LoRA files for a very small model in which something is wrong: a tensor, a name, the metadata, a few bytes.

`lora_case(number)` gives a kind, "lora", and the bytes of one; equal numbers give equal files. `base` is the model's
file, and `plain_changes` computes what the plainest kind of LoRA changes.
"""

import io
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from sd.adapters.lora_names import Layer, layer_names, split_key
from sd.checkpoints.files import read_checkpoint
from sd.models import empty_networks
from tests.support.model_mutations import NANO, change_tensor, nano_state
from tests.support.mutations import NUMBERS, VALUES, mutate
from tests.support.synthetic_lora import KINDS, file_state, lora, with_magnitudes

ENDINGS = ["lora_up.weight", "lora_B.weight", "alpha", "dora_scale", "diff", "diff_b", "lora_mid.weight", "oft_blocks"]
ENDINGS += ["hada_w1_a", "lokr_w1", "lokr_t2", "w_norm", "x", ""]


def base() -> bytes:
    return save(nano_state(), {"sd_config": json.dumps(NANO.to_dict())})


@cache
def layers() -> dict[str, torch.Tensor]:
    """Some of the model's layers, under diffusers' names, with weights of their shapes."""
    found = set(names().values())
    prefixes = {"diffusion": "unet", "clip": "text_encoder"}
    generator = torch.Generator().manual_seed(0)
    return {
        f"{prefixes[layer.network]}.{layer.path}": torch.randn(layer.shape, generator=generator)
        for layer in sorted(found, key=lambda layer: layer.path)
        if len(layer.shape) > 1
    }


def change_alpha(alpha: torch.Tensor, rng: random.Random) -> torch.Tensor:
    changes = [
        alpha.long(),
        alpha.bool(),
        alpha + torch.nan,
        alpha[None],
        alpha.expand(3),
        alpha * 1e38,
        alpha[None][:0],
    ]
    return rng.choice(changes)


def lora_case(number: int) -> tuple[str, bytes]:
    rng = random.Random(number)
    some = {name: layers()[name] for name in rng.sample([*layers()], rng.choice([1, 3, 10]))}
    parts = lora(some, rng.choice([*KINDS]), rng.choice([None, 1.0, 0.0, -3.0]), rng.choice([1, 2, 5]), number)
    if rng.random() < 0.2:
        parts = with_magnitudes(parts, some, rng.randrange(2))
    styles = ["kohya"] * 3 + ["peft", "2023"] * all("lora_up.weight" in each for each in parts.values())
    state, metadata = file_state(parts, rng.choice(styles)), {}
    change = rng.choice(["tensors", "tensors", "keys", "keys", "metadata", "bytes", "nothing"])
    for key in rng.sample([*state], min(len(state), rng.choice([1, 1, 2, 5]))):
        if change == "tensors":
            state[key] = change_alpha(state[key], rng) if state[key].ndim == 0 else change_tensor(state[key], rng)
        elif change == "keys":
            tensor, other = state.pop(key), rng.choice([*state, key])
            ending = f"{key.split('.')[0]}.{rng.choice(ENDINGS)}"
            state[rng.choice([ending, other, key + ".x", "x." + key, key.upper(), key.replace("0", "1")])] = tensor
    if change == "metadata":
        names = ["unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora", "text_encoder.lora_alpha", "r"]
        value = rng.choice([*VALUES[:-2], *NUMBERS[:9], {"to_q": 3}, {"(a+)+$": 1}, {"": rng.choice(VALUES[:9])}])
        text = json.dumps({rng.choice(names): value, rng.choice(names): rng.choice(NUMBERS)})
        metadata = {"lora_adapter_metadata": rng.choice([text, text, text[:-1], "[" * 50_000])}
    if rng.random() < 0.7 or change == "metadata":
        data = save({key: tensor.contiguous() for key, tensor in state.items()}, metadata)
    else:
        buffer = io.BytesIO()
        torch.save(rng.choice([state, {"state_dict": state}]), buffer)
        data = buffer.getvalue()
    return "lora", mutate(data, rng) if change == "bytes" else data


def plain_changes(path: Path) -> Iterator[tuple[Layer, torch.Tensor]]:
    """The layers of a file that have only up, down and perhaps alpha, and the change of each at strength 1."""
    checkpoint, found = read_checkpoint(path), {}
    for key, tensor in checkpoint.state.items():
        name, part = split_key(key)
        found.setdefault(names()[name], {})[part] = tensor.double()
    for layer, parts in found.items() if not checkpoint.metadata else ():
        if {*parts} - {"alpha"} == {"up", "down"}:
            up, down, alpha = parts["up"].flatten(1), parts["down"].flatten(1), parts.get("alpha")
            change = sum(torch.outer(up[:, i], down[i]) for i in range(len(down)))
            yield layer, (change if alpha is None else change * alpha.item() / len(down)).float()


@cache
def names() -> dict[str, Layer]:
    return layer_names(empty_networks(NANO), NANO.unet)
