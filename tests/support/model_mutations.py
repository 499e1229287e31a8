"""Checkpoint files with a whole model in which something is wrong: a tensor, a name, the configuration, a few bytes.

`model_case(number)` gives a kind, "model", and the bytes of one; equal numbers give equal files. Most of them get past
the reader, so that they test the loader.
"""

import io
import random
from functools import cache

import torch

from sd.config import ModelConfig
from tests.support.mutations import NUMBERS, VALUES, mutate
from tests.support.synthetic import random_state

NANO = ModelConfig.from_dict(
    {
        "text": {"vocab_size": 40, "width": 16, "layers": 1, "heads": 2},
        "vae": {"channels": [8, 8], "blocks_per_level": 1, "groups": 4},
        "unet": {"channels": [8, 16], "attention": [True, False], "blocks_per_level": 1, "heads": 2, "groups": 4}
        | {"context_width": 16},
        "image_size": 64,
    }
)
nano_state = cache(lambda: random_state(NANO))


def change_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Another dtype, shape or stride. The loader should accept some of them."""
    changes = [lambda t: t.double(), lambda t: t.long(), lambda t: t.bool(), lambda t: t.half(), lambda t: t[None]]
    changes += [lambda t: t[..., None, None], lambda t: t.flatten(), lambda t: t.flatten(1) if t.ndim > 1 else t[:0]]
    changes += [lambda t: t.flatten()[:1].expand(t.shape), lambda t: t.mT if t.ndim > 1 else t[::2], lambda t: t[:0]]
    changes += [lambda t: t + torch.nan, lambda t: t.new_zeros(()), lambda t: t.new_zeros((1,) * 12)]
    return rng.choice(changes)(tensor)


def change_config(config: dict, rng: random.Random) -> dict:
    part = rng.choice([*config, "more"])
    value = rng.choice(
        [*VALUES, *NUMBERS, [rng.choice(NUMBERS)], [8] * rng.choice([1, 3, 9, 9000]), [True, 1], "cosine"]
    )
    if config.get(part) and isinstance(config[part], dict) and rng.random() < 0.9:
        return config | {part: config[part] | {rng.choice(list(config[part])): value}}
    return config | {part: value}


def model_case(number: int) -> tuple[str, bytes]:
    rng = random.Random(number)
    state, config = dict(nano_state()), NANO.to_dict()
    change = rng.choice(["tensors", "tensors", "keys", "config", "config", "bytes", "nothing"])
    for key in rng.sample(list(state), rng.choice([1, 1, 2, 30])):
        if change == "tensors":
            state[key] = change_tensor(state[key], rng)
        elif change == "keys":
            tensor = state.pop(key)
            if rng.random() < 0.7:
                state[rng.choice([key + ".x", "x." + key, key.upper(), "model_ema." + key, "lora_" + key])] = tensor
    for _ in range(rng.choice([1, 1, 3]) if change == "config" else 0):
        config = change_config(config, rng)
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "sd_config": rng.choice([config] * 9 + [None])}, buffer)
    data = buffer.getvalue()
    if change != "bytes":
        return "model", data
    middle = data.find(b"PK\3\4", 100)  # after the pickle, which describes the tensors
    return "model", mutate(data[:middle], rng) + data[middle:]
