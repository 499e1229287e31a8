"""LoRA, a change of low rank to the weights of a model (2106.09685), and its relatives.

In: a weight W (out, in), or (out, in, k, k) of a convolution, and the tensors of a file. Out: the changed weight,

    W' = W + s (alpha / r) B A        B (out, r), A (r, in), with r far smaller than both        (section 4.1)

for a strength s. W' takes the place of W, so a step costs no more than before. Several LoRAs add their changes. All are
computed from the checkpoint's own W, so their order changes nothing but the rounding of float32. A negative s removes
what the LoRA adds. The sum is rounded once, to the dtype of the run.

`lora_files` reads the files, `lora_names` finds the layer of each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd.adapters.lora_names import Layer

Parts = dict[str, Tensor]  # the tensors of one layer in a file, under the names of `lora_names.split_key`


@dataclass(frozen=True)
class Change:
    """What one file changes in one layer, and with which strength."""

    layer: Layer
    parts: Parts
    strength: float
    path: Path  # for errors


def merge(weights: dict[str, Tensor], changes: Iterable[Change]) -> dict[str, Tensor]:
    """The weight and bias of a module, {"weight": ..., "bias": ...}, with all changes, as new tensors in float32."""
    merged = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}
    for change in changes:
        layer, parts, s = change.layer, change.parts, change.strength
        rows = slice(layer.first_row, layer.first_row + layer.shape[0])  # of queries, keys and values: a third
        if parts.keys() - {"diff_b"}:
            merged["weight"][rows].add_(delta(parts, weights["weight"][rows].float()), alpha=s)
        if "diff_b" in parts:
            merged["bias"][rows].add_(parts["diff_b"].to(merged["bias"]).flatten(), alpha=s)
    return merged


def delta(parts: Parts, weight: Tensor) -> Tensor:
    """What is added to a float32 weight at strength 1, of its shape. Raises an error if the shapes do not fit."""
    parts = {name: part.to(weight).contiguous() for name, part in parts.items()}  # kron refuses transposed ones
    rank, product = _product(parts)
    if rank is not None and "alpha" in parts:
        product.mul_(parts["alpha"].reshape(()) / rank)  # (alpha / r) B A
    change = _in_shape(product, weight.shape)
    return dora(parts, weight, change) if "magnitude" in parts or "dora_scale" in parts else change


def check_shapes(parts: Parts, shape: Sequence[int]) -> None:
    """Raises an error unless the change fits a weight of this shape. The formulas run without numbers."""
    empty = {name: torch.empty(part.shape, device="meta") for name, part in parts.items()}
    if parts.keys() - {"alpha", "diff_b"} == {"up", "down"}:
        # The usual kind is checked by hand: to multiply without numbers, torch imports its compiler, for seconds.
        up, down = empty["up"].flatten(1), empty["down"].flatten(1)
        if up.shape[1] != len(down):
            raise ValueError("B and A should have one rank.")
        _in_shape(torch.empty(len(up), *parts["down"].shape[1:], device="meta"), shape)
    else:
        delta(empty, torch.empty(shape, device="meta"))


def _product(parts: Parts) -> tuple[int | None, Tensor]:
    """The rank r, and B A or what another kind has in its place. The rank is None where alpha has no effect."""
    if "up" in parts:
        return lora(parts)
    if "hada_w1_a" in parts:
        return loha(parts)
    if "diff" in parts:
        return None, parts["diff"]  # the whole change, of full rank
    return lokr(parts)


def lora(p: Parts) -> tuple[int, Tensor]:
    """B A (2106.09685, eq. 3). For a k x k convolution, A has the kernel: B (out, r, 1, 1), A (r, in, k, k). Or the
    kernel is between the two, in `mid`."""
    up, down = p["up"], p["down"]  # B, A
    if "mid" in p:
        return len(down), _tucker(p["mid"], up.flatten(1), down.flatten(1))
    return len(down), (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])  # (out, in, k, k)


def loha(p: Parts) -> tuple[int, Tensor]:
    """(B1 A1) * (B2 A2), elementwise: two products of rank r make one of up to r^2 (2108.06098, prop. 1)."""
    one, two = (_factor(p[f"hada_w{i}_a"], p[f"hada_w{i}_b"], p.get(f"hada_t{i}")) for i in "12")  # (out, in k k)
    if one.shape != two.shape:
        raise ValueError("Both products should have one shape.")
    return len(p["hada_w1_b"]), one * two


def lokr(p: Parts) -> tuple[int | None, Tensor]:
    """The Kronecker product of two matrices, each whole or of low rank, B A (2309.14859, section 3)."""
    rank = next((len(p[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in p), None)
    one = p["lokr_w1"] if "lokr_w1" in p else _factor(p["lokr_w1_a"], p["lokr_w1_b"])  # (a, c)
    two = p["lokr_w2"] if "lokr_w2" in p else _factor(p["lokr_w2_a"], p["lokr_w2_b"], p.get("lokr_t2"))  # (b, d, k, k)
    if one.ndim != 2:
        raise ValueError("The first factor should be a matrix.")
    return rank, torch.kron(one, two.flatten(1))  # (a b, c d k k) = (out, in k k)


def _factor(b: Tensor, a: Tensor, core: Tensor | None = None) -> Tensor:
    """B A, with B (out, r) and A (r, in k k). In Tucker's form, with a core, B is (r, out) and A (r, in)."""
    return b @ a if core is None else _tucker(core, b.mT, a)


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Tucker's form of a kernel: core (r, r, k, k), B (out, r), A (r, in) -> (out, in, k, k)."""
    if core.shape[:2] != (up.shape[1], len(down)):  # einsum would repeat an axis of length 1
        raise ValueError("The core should have the rank of its neighbours.")
    return torch.einsum("ijkl,pi,jr->prkl", core, up, down)


def dora(p: Parts, weight: Tensor, change: Tensor) -> Tensor:
    """m V / |V| - W with V = W + B A (2402.09353, eq. 5): m has the length of each row, V / |V| its direction.

    A row has the weights of one output, as in PEFT. In the paper, and in files with m (1, in), it is each column, with
    the weights of one input. At strength s the result is W' = W + s (m V / |V| - W), as in ComfyUI. Other programs
    differ at strengths other than 1.
    """
    v = weight + change
    if "magnitude" in p:  # (out,) or (1, out, 1, 1), from PEFT
        axis, m = 0, p["magnitude"]
    else:
        m = p["dora_scale"]  # (out, 1, ..) or (1, in, ..), from LyCORIS
        axis = 0 if len(m) == m.numel() == v.shape[0] else 1
    if v.ndim < 2 or m.numel() != v.shape[axis]:
        raise ValueError("A magnitude should have one number for each output, or for each input.")
    m = m.reshape([-1 if i == axis else 1 for i in range(v.ndim)])
    norm = torch.linalg.vector_norm(v, dim=[i for i in range(v.ndim) if i != axis], keepdim=True)
    return m * v / norm.clamp_min(torch.finfo(v.dtype).tiny) - weight


def _in_shape(product: Tensor, shape: Sequence[int]) -> Tensor:
    """The product in the shape of a weight. Files have some linear layers as 1x1 convolutions, or the reverse."""
    if _fits(product, shape):
        return product.reshape(shape)
    # In an inpainting U-Net, an ordinary LoRA changes the first four of nine input channels.
    ordinary = (shape[0], 4, *shape[2:])
    if tuple(shape[1:]) != (9, 3, 3) or not _fits(product, ordinary):
        raise ValueError("The product should have the shape of the weight.")
    mask_channels = product.new_zeros(shape[0], 5, *shape[2:])
    return torch.cat([product.reshape(ordinary), mask_channels], dim=1)


def _fits(product: Tensor, shape: Sequence[int]) -> bool:
    """Whether the product has this shape, up to a 1x1 kernel, or is (out, in k k)."""
    sizes = [tuple(size[:2]) if tuple(size[2:]) == (1, 1) else tuple(size) for size in (product.shape, shape)]
    return sizes[0] == sizes[1] or sizes[0] == (shape[0], math.prod(shape[1:]))
