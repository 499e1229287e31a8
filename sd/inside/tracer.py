"""Records what the networks do inside a `with` block: shapes, feature maps, and which pixels attend to which words.

    with Tracer(models, activations=["decoder.levels.0"], attention=True) as trace:
        image = generate("a red house", models=models)
    trace.shapes("diffusion")                     # [("in", (2, 4, 16, 16)), ("down.0", (2, 64, 16, 16)), ...]
    trace.word_map("house", "a red house")        # (128, 128): where the U-Net attended to "house"

It uses forward hooks and changes nothing: the networks compute the same bits with it as without. There is one
exception. Large images, which are usually decoded in strips (`sd.runtime.decode_in_strips`), are decoded whole if
memory allows, and that rounds differently.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention import CrossAttention
from sd.diffusion import SpatialTransformer
from sd.models import Models
from sd.prompts.weights import layout
from sd.runtime.devices import is_compiled
from sd.tokenizer import Tokenizer

NETWORKS = ("clip", "encoder", "diffusion", "decoder")
STAGE = re.compile(r"(layers|levels|down|up)\.\d+|middle|conv_in|conv_out")


@dataclass
class Call:
    """One run of one network."""

    network: str  # one of NETWORKS
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # "in", then every stage's output, in order
    activations: dict[str, Tensor] = field(default_factory=dict)  # copies on the CPU


class Tracer:
    """Records what the networks of `models` do until its `with` block ends.

    `activations` names the modules whose outputs to keep, such as "decoder.levels.0" or "diffusion.middle". Every
    module of a network can be named (see `named_modules`). Outputs are kept for every call, which takes memory.
    `attention` records which tokens of the prompt each position of the latents attends to.

    Raises ValueError for the name of a module that does not exist, and for compiled models.
    """

    def __init__(self, models: Models, activations: Iterable[str] = (), attention: bool = False):
        self.calls: list[Call] = []
        self._tokenizer, self._downscale = models.tokenizer, models.config.vae.downscale
        self._networks: dict[str, nn.Module] = {name: getattr(models, name) for name in NETWORKS}
        if any(map(is_compiled, self._networks.values())):
            raise ValueError("models should be loaded without compiled=True for a Tracer, which needs hooks.")
        self._kept = set(activations)
        known = {f"{name}.{part}" for name, network in self._networks.items() for part, _ in network.named_modules()}
        if unknown := sorted(self._kept - known):
            raise ValueError(
                f"activations should be names like 'diffusion.down.0' or 'decoder.levels.3', not {unknown}."
            )
        self._attention = attention
        self._sizes: dict[str, tuple[int, int]] = {}  # the size of the feature map in each transformer
        self._sums: dict[str, Tensor] = {}  # attention weights (B, h, w, M), summed over calls
        self._counts: dict[str, int] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Tracer:
        for name, network in self._networks.items():
            self._handles.append(network.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True))
            for part, module in network.named_modules():
                if STAGE.fullmatch(part) or f"{name}.{part}" in self._kept:
                    hook = partial(self._record, name, part)
                    self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
                if self._attention and isinstance(module, SpatialTransformer):
                    stage = part.rpartition(".")[0]
                    size, weights = partial(self._record_size, stage), partial(self._record_attention, stage)
                    self._handles.append(module.register_forward_pre_hook(size, with_kwargs=True))
                    self._handles.append(module.cross_attention.register_forward_hook(weights, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def shapes(self, network: str) -> list[tuple[str, tuple[int, ...]]]:
        """The shapes of the input ("in") and of each stage's output in the network's last call: (name, shape), in the
        order of execution.

        If that call ran only some of the stages, as with `DeepCache`, "in" is the input of the first of them. Raises
        ValueError if the network has not run.
        """
        return list(self._last(network).shapes.items())

    def activation(self, name: str) -> Tensor:
        """The last output of the module with this name. Raises ValueError if it was not kept."""
        network, _, part = name.partition(".")
        self._last(network)
        for call in reversed(self.calls):
            if call.network == network and part in call.activations:
                return call.activations[part]
        raise ValueError(f"name should be one of the Tracer's activations, of a module that has run, not {name!r}.")

    @property
    def attention(self) -> dict[str, Tensor]:
        """For every stage with cross-attention, the weight of each of the M tokens at each position.

        float32 (B, h, w, M), on the CPU, averaged over heads and calls. The weights of a position add up to 1. B is the
        U-Net's batch: with guidance, the unconditional rows come first and the prompts' rows last.
        """
        return {stage: (total / self._counts[stage]).cpu() for stage, total in self._sums.items()}

    @property
    def tokens(self) -> int:
        """The number of tokens in the U-Net's context. Raises ValueError if no attention was recorded."""
        if not self._sums:
            raise ValueError("attention should be True when the Tracer is made, and the U-Net should have run since.")
        return next(iter(self._sums.values())).shape[-1]

    def token_map(self, positions: int | list[int], row: int = -1) -> Tensor:
        """Where the U-Net attended to some tokens: float32 (H, W), the size of the image, in [0, 1], on the CPU.

        Position 0 is the start token. The weights of all `positions` are added, each stage's map is enlarged to the
        size of the image, and the maps are averaged (after 2210.04885). `row` is a row of the U-Net's batch; the last
        row is the last prompt's. If the context of a prompt is repeated (see `sd.prompts`), each token has several
        positions, and its weight is the sum of theirs.

        Raises ValueError if no attention was recorded, or a position does not exist.
        """
        positions = [positions] if isinstance(positions, int) else positions
        tokens = self.tokens
        if not positions or not all(0 <= position < tokens for position in positions):
            raise ValueError(f"positions should be from 0 to {tokens - 1}, not {positions}.")
        size = [side * self._downscale for side in self._last("diffusion").shapes["in"][2:]]  # (H, W)
        sums = {stage: total[row].cpu()[:, :, positions].sum(-1) for stage, total in self._sums.items()}  # each (h, w)
        maps = [total / self._counts[stage] for stage, total in sums.items()]
        large = [F.interpolate(one[None, None], size=size, mode="bilinear")[0, 0] for one in maps]  # each (H, W)
        return torch.stack(large).mean(0)

    def word_map(self, word: str, prompt: str, row: int = -1) -> Tensor:
        """`token_map` of a word, or of several consecutive words, added over all places where they stand in `prompt`.

        The map does not depend on the batch: longer prompts beside this one repeat its context, and all repetitions
        count. Raises ValueError if the prompt does not have the word.
        """
        return self.token_map(word_positions(self._tokenizer, word, prompt, self.tokens), row)

    def _last(self, network: str) -> Call:
        for call in reversed(self.calls):
            if call.network == network:
                return call
        ran = sorted({call.network for call in self.calls})
        raise ValueError(f"network should be one that has run, {ran}, not {network!r}.")

    def _begin(self, network: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls.append(Call(network, {"in": _first_shape(module, args, kwargs)}))

    def _record(self, network: str, part: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        # Parts of a network can run without its `forward`, as in `Encoder.moments` and `DeepCache`. Then `_begin` is
        # not called: a call ends when a part runs for the second time, and the input is that of its first stage.
        if not self.calls or self.calls[-1].network != network or part in self.calls[-1].shapes:
            self.calls.append(Call(network))
        call = self.calls[-1]
        if "in" not in call.shapes and STAGE.fullmatch(part):
            call.shapes = {"in": _first_shape(module, args, kwargs), **call.shapes}
        call.shapes[part] = tuple(output.shape)
        if f"{network}.{part}" in self._kept:
            call.activations[part] = output.detach().to("cpu", copy=True)

    def _record_size(self, stage: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._sizes[stage] = _first_shape(module, args, kwargs)[2:]

    def _record_attention(self, stage: str, module: CrossAttention, args: tuple, kwargs: dict, _out: Tensor) -> None:
        new = attention_weights(module, *args, **kwargs).unflatten(1, self._sizes[stage])  # (B, h, w, M)
        total = self._sums.get(stage)
        if total is None or total.shape[1:] != new.shape[1:]:  # another size of image or prompt: start again
            self._sums[stage], self._counts[stage] = new, 1
            return
        # The unconditional rows come first, and steps without guidance lack them: only the other rows are added.
        rows = min(len(total), len(new))
        self._sums[stage] = total[-rows:] + new[-rows:]
        self._counts[stage] += 1


def _first_shape(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, ...]:
    """The shape of the first argument of `module.forward`, whether it was passed by position or by name."""
    arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return tuple(next(iter(arguments.values())).shape)


@torch.no_grad()
def attention_weights(module: CrossAttention, x: Tensor, context: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)), averaged over the heads: x (B, N, C), context (B, M, D) -> float32 (B, N, M).

    The module never stores this matrix. Here it is computed one head at a time, so that only one copy is stored.
    """
    query, key = F.linear(x, module.query.weight), F.linear(context, module.key.weight)  # (B, N, C), (B, M, C)
    query, key = (y.unflatten(-1, (module.heads, -1)).movedim(2, 0) for y in (query, key))  # (heads, B, N, d)
    scale = 1 / math.sqrt(query.shape[-1])
    weights = torch.zeros(*x.shape[:2], context.shape[1], device=x.device)  # (B, N, M)
    for q, k in zip(query, key):
        weights += (q.float() @ k.float().mT * scale).softmax(-1)
    return weights / module.heads


def word_positions(tokenizer: Tokenizer, word: str, prompt: str, total: int | None = None) -> list[int]:
    """All positions of the tokens of `word` in the context that `encode_prompt` makes of `prompt`.

    `total` is the length of the context (a multiple of 77), if it is longer because the context was repeated; the
    repetitions are then included. Raises ValueError if the prompt does not have the word.
    """
    ids, wanted = layout([prompt], tokenizer)[0].flatten().tolist(), tokenizer.encode(word)
    starts = [i for i in range(len(ids)) if wanted and ids[i : i + len(wanted)] == wanted]
    if not starts:
        raise ValueError(f"word should be in the prompt, as a whole word: {word!r} is not in {prompt!r}.")
    repetitions = range(0, max(total or 0, len(ids)), len(ids))  # where each starts
    return [again + start + i for again in repetitions for start in starts for i in range(len(wanted))]


def feature_image(features: Tensor) -> np.ndarray:
    """A feature map (C, h, w) as an image, uint8 (h, w, 3), in which similar features have similar colours.

    Red, green and blue are the first three principal components of the features, each stretched from its 1st to its
    99th percentile. Two or three channels are used as colours directly; one channel is grey.

    Raises ValueError for another shape, or values that are not finite.
    """
    if features.ndim != 3:
        raise ValueError(f"features should be of shape (C, h, w), not {tuple(features.shape)}.")
    if not features.isfinite().all():
        raise ValueError("features should be finite, not NaN or infinity.")
    x = features.detach().float().cpu().flatten(1)  # (C, h w)
    x = x - x.mean(1, keepdim=True)
    if len(x) > 3:
        _, directions = torch.linalg.eigh(x @ x.mT)  # (C, C), by rising variance
        directions = directions[:, -3:].flip(1)  # (C, 3)
        # The sign of a direction is arbitrary: choose it so that the largest component is positive.
        largest = directions.abs().argmax(0, keepdim=True)  # (1, 3)
        x = (directions * directions.gather(0, largest).sign()).mT @ x  # (3, h w)
    low, high = x.quantile(torch.tensor([0.01, 0.99]), dim=1)[:, :, None]  # each (3, 1)
    levels = ((x - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
    image = torch.zeros(3, x.shape[1])
    image[: len(levels)] = levels
    image = levels.expand(3, -1) if len(levels) == 1 else image
    return image.round().byte().unflatten(1, features.shape[1:]).permute(1, 2, 0).contiguous().numpy()  # (h, w, 3)
