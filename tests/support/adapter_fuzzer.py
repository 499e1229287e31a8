"""Runs the loaders of ControlNets and tiny autoencoders on damaged and hostile files, and reports what happened.

    python -m tests.support.adapter_fuzzer FOLDER FIRST controls=1000 tiny=100

It is `tests.support.fuzzer` with these two kinds of files, in a process of its own.
"""

import contextlib
import functools
import io
import os
import random
import sys
from pathlib import Path

import torch

from sd.adapters.controlnet_files import load_controlnet
from sd.adapters.tiny_autoencoder import load_tiny_autoencoder
from sd.checkpoints.checkpoint import CheckpointError
from tests.support import fuzzer, mutations
from tests.support.control import cldm_state, random_controlnet
from tests.support.model_mutations import NANO, change_tensor
from tests.support.synthetic import random_models
from tests.support.tiny_autoencoders import diffusers_state, published, random_tiny_autoencoder

MARKS = ["difference", "lora_controlnet", "control_model.label_emb.0.0.weight", "scaled_fp8", "adapter.body.0.w"]


@functools.cache
def models():
    return random_models(NANO)


@functools.cache
def honest(kind: str) -> list[dict[str, torch.Tensor]]:
    """Small honest files of a kind, in each layout."""
    if kind == "controls":
        net = random_controlnet(NANO.unet)
        return [cldm_state(net), cldm_state(net, ""), cldm_state(net, kernels=False)]
    networks = random_tiny_autoencoder()
    states = [published(networks)["decoder"], diffusers_state(networks)]
    return [{key: tensor.half() for key, tensor in state.items()} for state in states]


def case(kind: str, number: int) -> tuple[str, bytes]:
    """The kind and the bytes of one file; equal numbers give equal files."""
    rng = random.Random(number)
    state = dict(rng.choice(honest(kind)))
    change = rng.choice(["tensors", "tensors", "keys", "marks", "bytes", "nothing"])
    for key in rng.sample(list(state), rng.choice([1, 1, 2, 30])):
        if change == "tensors":
            state[key] = change_tensor(state[key], rng)
        elif change == "keys":
            tensor = state.pop(key)
            if rng.random() < 0.7:
                names = [key + ".x", "x." + key, key.upper(), "module." + key, key + ".scale_weight"]
                state[rng.choice(names)] = tensor
    if change == "marks":
        state[rng.choice(MARKS)] = torch.ones(rng.choice([(), (1,), (2, 2)]))
    buffer = io.BytesIO()
    torch.save(rng.choice([state, {"state_dict": state}]), buffer)
    data = buffer.getvalue()
    if change == "bytes":
        middle = data.find(b"PK\3\4", 100)  # after the pickle, which describes the tensors
        data = mutations.mutate(data[:middle], rng) + data[middle:]
    return kind, data


@contextlib.contextmanager
def plain_errors():
    """Without the argument's name in front of an error, which then begins with the path as the fuzzer expects."""
    try:
        yield
    except CheckpointError as error:
        raise ValueError(str(error).partition(": ")[2]) from None


def steer(path: Path) -> None:
    """Load a ControlNet."""
    with plain_errors():
        net = load_controlnet(path, models())
    assert not any(parameter.is_meta for parameter in net.parameters()), "a weight that was never loaded"


def decode(path: Path) -> None:
    """Load a tiny autoencoder."""
    with plain_errors():
        networks = load_tiny_autoencoder(path, "cpu", torch.float32)
    assert "decoder" in networks
    assert not any(p.is_meta for network in networks.values() for p in network.parameters())


def warm_up(path: Path, loras: int) -> None:
    """Import everything that the cases will need."""
    assert b"ok".decode("cp437") == b"ok".decode("utf-8-sig")
    for what, (make, action) in fuzzer.KINDS.items():
        for content in [*mutations.seeds().values(), *(make(number)[1] for number in range(8))]:
            path.write_bytes(content)
            with contextlib.suppress(ValueError):
                action(path)
        assert what in ("controls", "tiny")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    fuzzer.KINDS = {
        "controls": (functools.partial(case, "controls"), steer),
        "tiny": (functools.partial(case, "tiny"), decode),
    }
    fuzzer.warm_up = warm_up
    pairs = (argument.split("=") for argument in sys.argv[3:])
    fuzzer.main(Path(sys.argv[1]), int(sys.argv[2]), {what: int(count) for what, count in pairs})
