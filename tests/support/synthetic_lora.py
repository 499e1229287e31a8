"""Random LoRA files of every kind. Their names and shapes are those of diffusers' and transformers' own modules."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

FACTORS = ("lora_down.weight", "hada_w1_b", "lokr_w1", "lokr_w1_b", "diff")
NOISE = Callable[..., Tensor]


def layers(unet: nn.Module | None, text_encoder: nn.Module | None, conv: bool = True) -> dict[str, Tensor]:
    """The weight of each linear layer and convolution, {"unet.conv_in": ..., "text_encoder.text_model...": ...}.
    Without `conv`, those of the U-Net's transformers and of the text encoder, as most trainers choose."""
    found = {}
    for prefix, network in (("unet.", unet), ("text_encoder.", text_encoder)):
        for name, module in network.named_modules() if network is not None else ():
            if not isinstance(module, (nn.Linear, nn.Conv2d)) or not (
                conv or "attentions" in name or prefix != "unet."
            ):
                continue
            if prefix != "unet." and not name.startswith("text_model."):  # transformers 5 has no "text_model."
                name = f"text_model.{name}"
            found[prefix + name] = module.weight
    return found


def lora(layers: dict[str, Tensor], kind: str = "lora", alpha: float | None = 2, rank: int = 4, seed: int = 0):
    """The parts of each layer's change, {layer: {part: tensor}}, under kohya's names of parts."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    parts = {name: KINDS[kind](weight, rank, noise) for name, weight in layers.items()}
    for name, each in parts.items():  # the change has the size of usual weights
        factor = next(each[part] for part in FACTORS if part in each)
        factor *= layers[name][0].numel() ** -0.5
    if alpha is not None:
        for each in parts.values():
            each["alpha"] = torch.tensor(float(alpha))
    return parts


def _lora(weight: Tensor, rank: int, noise: NOISE) -> dict[str, Tensor]:
    ones = [1] * (weight.ndim - 2)
    down = noise(rank, *weight.shape[1:])
    return {"lora_up.weight": noise(len(weight), rank, *ones), "lora_down.weight": down}


def _mid(weight: Tensor, rank: int, noise: NOISE) -> dict[str, Tensor]:
    if math.prod(weight.shape[2:]) == 1:
        return _lora(weight, rank, noise)
    parts = {"lora_up.weight": noise(len(weight), rank, 1, 1), "lora_down.weight": noise(rank, weight.shape[1], 1, 1)}
    return parts | {"lora_mid.weight": noise(rank, rank, *weight.shape[2:])}


def _loha(weight: Tensor, rank: int, noise: NOISE) -> dict[str, Tensor]:
    outs, ins = len(weight), math.prod(weight.shape[1:])
    return {
        part: noise(outs, rank) if part.endswith("a") else noise(rank, ins)
        for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    }


def _loha_tucker(weight: Tensor, rank: int, noise: NOISE) -> dict[str, Tensor]:
    if math.prod(weight.shape[2:]) == 1:
        return _loha(weight, rank, noise)
    outs, ins, *kernel = weight.shape
    parts = {"hada_w1_a": noise(rank, outs), "hada_w1_b": noise(rank, ins)}
    parts |= {"hada_w2_a": noise(rank, outs), "hada_w2_b": noise(rank, ins)}
    return parts | {"hada_t1": noise(rank, rank, *kernel), "hada_t2": noise(rank, rank, *kernel)}


def _lokr(weight: Tensor, rank: int, noise: NOISE, first: str = "whole", second: str = "low rank") -> dict[str, Tensor]:
    (outs, ins, *kernel), kernel_size = weight.shape, math.prod(weight.shape[2:])
    a, c = math.gcd(4, outs), math.gcd(4, ins)
    parts = {"lokr_w1": noise(a, c)}
    if first == "low rank":
        parts = {"lokr_w1_a": noise(a, rank), "lokr_w1_b": noise(rank, c)}
    if second == "whole":
        return parts | {"lokr_w2": noise(outs // a, ins // c, *kernel)}
    if second == "tucker" and kernel_size > 1:
        parts |= {"lokr_w2_a": noise(rank, outs // a), "lokr_w2_b": noise(rank, ins // c)}
        return parts | {"lokr_t2": noise(rank, rank, *kernel)}
    return parts | {"lokr_w2_a": noise(outs // a, rank), "lokr_w2_b": noise(rank, ins // c * kernel_size)}


def _full(weight: Tensor, rank: int, noise: NOISE) -> dict[str, Tensor]:
    return {"diff": noise(*weight.shape), "diff_b": noise(len(weight))}


KINDS = {
    "lora": _lora,
    "mid": _mid,
    "loha": _loha,
    "loha tucker": _loha_tucker,
    "lokr": _lokr,
    "lokr whole": lambda *given: _lokr(*given, second="whole"),
    "lokr low rank": lambda *given: _lokr(*given, first="low rank"),
    "lokr first low rank": lambda *given: _lokr(*given, first="low rank", second="whole"),
    "lokr tucker": lambda *given: _lokr(*given, second="tucker"),
    "full": _full,
}


def with_magnitudes(parts: dict[str, dict[str, Tensor]], layers: dict[str, Tensor], axis: int, seed: int = 1):
    """The same with a dora_scale (out, 1, ..) for axis 0, or (1, in, ..) for axis 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, each in parts.items():
        weight = layers[name]
        shape = [length if i == axis else 1 for i, length in enumerate(weight.shape)]
        norms = torch.linalg.vector_norm(weight, dim=[i for i in range(weight.ndim) if i != axis], keepdim=True)
        each["dora_scale"] = norms * (1 + 0.2 * torch.randn(shape, generator=generator))
    return parts


def file_state(parts: dict[str, dict[str, Tensor]], style: str = "kohya") -> dict[str, Tensor]:
    """The tensors of a file: kohya's names, PEFT's, or diffusers' of 2023 ("2023", and "attention" for the first)."""
    return {_key(name, part, style): x for name, each in parts.items() for part, x in each.items()}


def _key(name: str, part: str, style: str) -> str:
    network, path = name.split(".", 1)
    if style == "kohya":
        return f"lora_{'unet' if network == 'unet' else 'te'}_{path.replace('.', '_')}.{part}"
    if style in ("peft", "peft raw"):
        name = f"base_model.model.{path}" if style == "peft raw" else name
        return f"{name}.{part.replace('lora_up', 'lora_B').replace('lora_down', 'lora_A')}"
    if part == "alpha":
        return f"{name}.alpha"
    part = part.replace("lora_", "")  # up.weight, down.weight
    if network == "text_encoder":
        return f"{name}.lora_linear_layer.{part}"
    before, _, last = path.removesuffix(".0").rpartition(".")
    if before.endswith(("attn1", "attn2")):
        return f"{'unet.' if style == '2023' else ''}{before}.processor.{last}_lora.{part}"
    return f"{name}.lora.{part}"
