"""LoRA files -> what they change in the networks of a model. Everything is checked here, before anything is changed."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sd.adapters.lora import Change, Parts, check_shapes
from sd.adapters.lora_names import Layer, layer_names, split_key
from sd.adapters.other_files import what_it_is
from sd.adapters.textual_inversion import Embedding, checked_embedding
from sd.checkpoints.checkpoint import Checkpoint, CheckpointError, parse_config
from sd.checkpoints.files import read_checkpoint
from sd.checkpoints.folder_files import read_json
from sd.config import ModelConfig
from sd.models import empty_networks

IN_FOLDERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # what diffusers and PEFT write
MAX_STRENGTH = 100
MAX_LISTED = 3  # names that an error lists of each kind of problem
MAX_NAME = 80  # characters of a name in an error

HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
FIRST, SECOND = {"lokr_w1_a", "lokr_w1_b"}, {"lokr_w2_a", "lokr_w2_b"}
# The tensors that make a kind, and those that may be added.
KINDS = [{"up", "down"}, {"up", "down", "mid"}, HADA, HADA | {"hada_t1", "hada_t2"}, {"diff"}]
KINDS += [first | second for first in ({"lokr_w1"}, FIRST) for second in ({"lokr_w2"}, SECOND, SECOND | {"lokr_t2"})]
ADDED = {"alpha", "dora_scale", "magnitude", "diff_b"}

# Kinds that do not load, by the ends of their keys.
OTHER_KINDS = {
    "an orthogonal adapter (OFT)": r"\.(b?oft_\w+|rescale)(\.\w+)*$",
    "GLoRA": r"\.(a1|a2|b1|b2|bm)\.weight$",
    "T-LoRA": r"\.(lambda_layer|[pq]_layer\.weight)$",
    "IA3": r"\.(on_input|ia3_\w+)(\.\w+)*$",
    "AdaLoRA": r"\.lora_E(\.\w+)*$",
    "VeRA": r"\bvera_\w+(\.\w+)*$",
    "in cloneofsimo's format, whose tensors have numbers for names": r"^\w+:\d+:(up|down)$",
}
# The vectors of a word in a file with a LoRA, as the AUTOMATIC1111 web UI reads them: bundle_emb.NAME.string_to_param.*
BUNDLED = "bundle_emb."
BUNDLED_WORD = re.compile(rf"{re.escape(BUNDLED)}(?P<word>.+)\.(string_to_param\.\*|emb_params)")
# LoRAs for other models, by the beginnings of their keys, and by how wide a context they read.
OTHER_MODELS = {
    "Stable Diffusion XL": r"lora_te2_|text_encoder_2\.",
    "a transformer, such as FLUX or Stable Diffusion 3": r"(lora_|base_model\.model\.)?transformer[._]"
    r"|lora_unet_(double|single|joint)_blocks_|diffusion_model\.",
}
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
# Which layers read the context in the U-Net, and which have the text encoder's width.
READS_CONTEXT, HAS_TEXT_WIDTH = re.compile(r"attn2[._]to_k$"), re.compile(r"mlp[._]fc1$")

Given = str | os.PathLike | Sequence  # a path, (path, strength), or (path, in the U-Net, in the text encoder)
Changes = dict[tuple[str, str], list[Change]]  # of each module, such as ("diffusion", "down.1.1.proj_in")


class Lora(NamedTuple):
    """A LoRA file, and its strengths in the two networks."""

    path: Path
    unet: float = 1.0
    text: float = 1.0

    @property
    def label(self) -> str:
        """The file's name with its strengths."""
        both = f"{self.unet:g} in the U-Net, {self.text:g} in the text encoder"
        return f"{self.path.name} ({self.unet:g})" if self.unet == self.text else f"{self.path.name} ({both})"


def as_lora(given: Given) -> Lora:
    """A path, (path, strength) or (path, in the U-Net, in the text encoder) -> a `Lora`."""
    path, *strengths = given if isinstance(given, (tuple, list)) else [given]
    if not isinstance(path, (str, os.PathLike)) or len(strengths) > 2:
        raise TypeError(f"A LoRA should be a path, (path, strength) or (path, unet, text), not {given!r:.80}.")
    for strength in strengths:
        if isinstance(strength, bool) or not isinstance(strength, numbers.Real) or not abs(strength) <= MAX_STRENGTH:
            allowed = f"a number from -{MAX_STRENGTH} to {MAX_STRENGTH}; 0.5 to 1 is usual"
            raise ValueError(f"The strength of {path} should be {allowed}, not {strength!r:.80}.")
    first, last = (float(strengths[0]), float(strengths[-1])) if strengths else (1.0, 1.0)
    return Lora(Path(path), first, last)


def read_loras(
    loras: Iterable[Lora], config: ModelConfig, networks: dict[str, nn.Module]
) -> tuple[Changes, list[Embedding]]:
    """What these files change in the networks, {"clip": ..., "diffusion": ...}, which may be on the meta device; and
    the words that are bundled with them, whatever the strength.

    Raises what `read_lora` raises.
    """
    changes: Changes = {}
    words: dict[Path, list[Embedding]] = {}
    names = None
    for lora in loras:
        names = names or layer_names(networks, config.unet)
        layers, words[lora.path] = read_lora(lora.path, names, config)
        for layer, parts in layers.items():
            strength = lora.text if layer.network == "clip" else lora.unet
            if strength != 0:
                changes.setdefault((layer.network, layer.module), []).append(Change(layer, parts, strength, lora.path))
    return changes, [word for of_file in words.values() for word in of_file]


def check_loras(loras: Iterable[Given], config: ModelConfig) -> None:
    """Raises what `load_models` would raise for these LoRAs and a model of this configuration."""
    if loras := [as_lora(lora) for lora in loras]:
        read_loras(loras, config, empty_networks(config))


def read_lora(path: Path, names: dict[str, Layer], config: ModelConfig) -> tuple[dict[Layer, Parts], list[Embedding]]:
    """The tensors of a LoRA file, by layer and by part, which are views of the mapped file; and its bundled words.

    Raises CheckpointError, in one sentence, if the file is something else, does not fit the model, or has NaN; and what
    `read_checkpoint` raises.
    """
    if path.is_dir():
        inside = next((file.name for file in map(path.joinpath, IN_FOLDERS) if file.is_file()), "")
        raise CheckpointError(
            f"{path} should be a LoRA file, not a folder" + f": give {path / inside}" * bool(inside) + "."
        )
    try:
        checkpoint = read_checkpoint(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no LoRA file at {path}.") from None
    bundled = {key: tensor for key, tensor in checkpoint.state.items() if key.startswith(BUNDLED)}
    keys = {key: split_key(key) for key in checkpoint.state if key not in bundled}
    if bundled and not keys:
        raise CheckpointError(f"{path} should be a LoRA, but it has only embeddings: {_listed(bundled)}.")
    _check_kind(path, keys, checkpoint.state, config)
    found: dict[Layer, Parts] = {}
    problems: dict[str, list[str]] = {}
    for key in keys:
        tensor = checkpoint.state[key]
        name, part = keys[key] or (key, None)
        layer = names.get(name)
        if part is None or layer is None:
            problem = "unknown tensors" if part is None else "unknown modules"
            problems.setdefault(problem, []).append(name)
        elif part in found.setdefault(layer, {}):
            problems.setdefault("twice, under two names", []).append(key)
        elif problem := _numbers_problem(part, tensor):
            problems.setdefault(problem, []).append(key)
        else:
            found[layer][part] = tensor
    for key, kind in checkpoint.unreadable.items():
        problems.setdefault(kind, []).append(key)
    if not problems:
        for layer, parts in found.items():
            if problem := _shapes_problem(layer, parts):
                problems.setdefault(problem, []).append(layer.path)
    if problems:
        texts = "; ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items())
        raise CheckpointError(f"{path} does not fit this model: {texts}.")
    _add_alphas(found, path, checkpoint)
    return found, [_bundled_word(path, key, tensor, config) for key, tensor in bundled.items()]


def _bundled_word(path: Path, key: str, tensor: Tensor, config: ModelConfig) -> Embedding:
    """A word whose vectors are in a LoRA's file. Raises CheckpointError unless they fit the model."""
    match = BUNDLED_WORD.fullmatch(key)
    if match is None:
        raise CheckpointError(f"{path} has an embedding with an unknown name: {_listed([key])}.")
    embedding = checked_embedding(path, [match["word"]], tensor)
    if (width := embedding.vectors.shape[1]) != config.text.width:
        found = f"{_listed([key])} with {width}"
        raise CheckpointError(f"{path} should have vectors of {config.text.width} numbers for this model, not {found}.")
    return embedding


def _check_kind(path: Path, keys: dict[str, tuple[str, str] | None], state: Parts, config: ModelConfig) -> None:
    """Raises CheckpointError, which says what the file is, for another kind of file and for a LoRA of another model."""
    others = [key for key, split in keys.items() if split is None]
    for kind, pattern in OTHER_KINDS.items():
        if any(re.search(pattern, key) for key in others):
            raise CheckpointError(f"{path} should be LoRA, LoCon, LoHa, LoKr, DoRA or whole differences, not {kind}.")
    if len(others) == len(keys):
        what = what_it_is(keys)
        if what is None or what.startswith("is a LoRA"):
            what = f"has only tensors with unknown names: {_listed(keys)}"
        raise CheckpointError(f"{path} should be a LoRA, but it {what}.")
    other = next((model for model, names in OTHER_MODELS.items() if any(re.match(names, key) for key in keys)), None)
    for pattern, own in ((READS_CONTEXT, config.unet.context_width), (HAS_TEXT_WIDTH, config.text.width)):
        for key, split in keys.items():
            read_wide = split is not None and split[1] in ("down", "hada_w1_b", "diff") and pattern.search(split[0])
            if other is None and read_wide and state[key].ndim >= 2 and (width := state[key].shape[1]) != own:
                other = FAMILIES.get(width, f"a model whose text encoder is {width} wide")
    if other is not None:
        own = FAMILIES.get(config.unet.context_width, f"this model, whose context is {config.unet.context_width} wide")
        raise CheckpointError(f"{path} should be a LoRA for {own}, not for {other}.")


def _numbers_problem(part: str, tensor: Tensor) -> str:
    """What is wrong with the numbers of a tensor, or nothing."""
    if tensor.is_complex() or not (tensor.is_floating_point() or part == "alpha"):
        return "not floating point"
    return "" if tensor.float().isfinite().all() else "NaN or infinity"


def _shapes_problem(layer: Layer, parts: Parts) -> str:
    """What is wrong with the tensors of a layer, or nothing."""
    kind = {*parts} - ADDED
    if kind not in KINDS and (kind or {*parts} != {"diff_b"}):
        return "tensors missing, or of two kinds"
    if not all(part.numel() for part in parts.values()) or ("alpha" in parts and parts["alpha"].numel() != 1):
        return "an empty tensor, or several alphas"
    if "diff_b" in parts and not (layer.has_bias and parts["diff_b"].numel() == layer.shape[0]):
        return "a bias that the model lacks, or of another shape"
    try:
        if kind:
            check_shapes(parts, layer.shape)
    except (ValueError, RuntimeError, IndexError, TypeError):  # what torch raises for shapes and axes
        return "another shape or rank"
    return ""


def _listed(names: Iterable[str]) -> str:
    """The first few of many names, and how many more there are, without repetitions."""
    names = list(dict.fromkeys(names))
    shown = ", ".join(" ".join(name.split())[:MAX_NAME] for name in names[:MAX_LISTED])
    return shown + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


def _add_alphas(found: dict[Layer, Parts], path: Path, checkpoint: Checkpoint) -> None:
    """Adds the alphas of files that have them in another place: the JSON that diffusers writes into the metadata, or
    PEFT's adapter_config.json beside adapter_model.safetensors. Without any alpha, the scale is 1."""
    settings, beside = {}, path.with_name("adapter_config.json")
    if "lora_adapter_metadata" in checkpoint.metadata:
        settings = parse_config(checkpoint.metadata["lora_adapter_metadata"]) or {}
    elif path.stem == "adapter_model" and beside.is_file():
        values = read_json(beside).items()
        settings = {f"{network}.{name}": value for network in ("unet", "text_encoder") for name, value in values}
    for layer, parts in found.items():
        network = "text_encoder" if layer.network == "clip" else "unet"
        alpha = settings.get(f"{network}.lora_alpha")
        patterns = settings.get(f"{network}.alpha_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if f".{layer.path}".endswith(f".{pattern}"):
                alpha = value
        if alpha is None or "alpha" in parts or "down" not in parts:
            continue
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise CheckpointError(f"{path}: lora_alpha of {layer.path} should be a number, not {alpha!r:.80}.")
        rank = len(parts["down"])
        stabilised = settings.get(f"{network}.use_rslora") is True  # alpha / sqrt(r) (2312.03732)
        parts["alpha"] = torch.tensor(alpha * rank**0.5 if stabilised else alpha, dtype=torch.float32)
