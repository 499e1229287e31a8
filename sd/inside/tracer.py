"""A window into the networks while they run: shapes, feature maps, and which pixels look at which words.

In: `Models`, and what is done with them inside a `with` block. Out: a `Call` for each run of a network, and attention
maps.

    with Tracer(models, activations=["decoder.levels.0"], attention=True) as trace:
        image = generate("a red house", models=models)
    trace.shapes("diffusion")                     # [("in", (2, 4, 16, 16)), ("down.0", (2, 64, 16, 16)), ...]
    trace.word_map("house", "a red house")        # (128, 128): where the U-Net looked at "house"

It listens through forward hooks and changes nothing: the networks compute the same bits with it as without. With one
exception: large pictures, which are otherwise decoded in strips (`sd.runtime.decode_in_strips`), are decoded whole if
memory allows, which rounds differently.
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
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # "in", then every stage, in order of execution
    activations: dict[str, Tensor] = field(default_factory=dict)  # copies on the CPU


class Tracer:
    """Records what the networks of `models` do until its `with` block ends.

    `activations` names the modules whose outputs to keep, such as "decoder.levels.0" or "diffusion.middle"; every
    module of a network has a name (`named_modules`). They are kept for every call, so mind the memory. `attention`
    records what each pixel of the latents attends to in the prompt.

    Raises ValueError for a name that no module has, and for models that were compiled.
    """

    def __init__(self, models: Models, activations: Iterable[str] = (), attention: bool = False):
        self.calls: list[Call] = []
        self._tokenizer, self._downscale = models.tokenizer, models.config.vae.downscale
        self._networks: dict[str, nn.Module] = {name: getattr(models, name) for name in NETWORKS}
        if any(map(is_compiled, self._networks.values())):
            raise ValueError("models should be loaded without compiled=True for a Tracer: it could hear nothing.")
        self._kept = set(activations)
        known = {f"{name}.{part}" for name, network in self._networks.items() for part, _ in network.named_modules()}
        if unknown := sorted(self._kept - known):
            raise ValueError(
                f"activations should be names like 'diffusion.down.0' or 'decoder.levels.3', not {unknown}."
            )
        self._attention = attention
        self._sizes: dict[str, tuple[int, int]] = {}  # of the feature map in each transformer
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
        """What went into the network ("in") and came out of each stage, in its last call: (name, shape), in order.

        That call may be of a few stages only, as with a `DeepCache`; "in" is then what went into the first of them.
        Raises ValueError if the network has not run.
        """
        return list(self._last(network).shapes.items())

    def activation(self, name: str) -> Tensor:
        """The output of the module of that name when it last ran. Raises ValueError if it was not kept."""
        network, _, part = name.partition(".")
        self._last(network)
        for call in reversed(self.calls):
            if call.network == network and part in call.activations:
                return call.activations[part]
        raise ValueError(f"name should be among the Tracer's activations and have run, and {name!r} is not.")

    @property
    def attention(self) -> dict[str, Tensor]:
        """For every stage with cross-attention, the share of each of M tokens in what each position reads.

        float32 (B, h, w, M), on the CPU, averaged over heads and over calls; each position's shares add up to 1. B is
        the number of rows of the U-Net's batch: with guidance the unconditional ones come first, the prompts' last.
        """
        return {stage: (total / self._counts[stage]).cpu() for stage, total in self._sums.items()}

    @property
    def tokens(self) -> int:
        """How long the context was that the U-Net read. Raises ValueError if no attention was recorded."""
        if not self._sums:
            raise ValueError("attention should be True when the Tracer is made, and the U-Net should have run since.")
        return next(iter(self._sums.values())).shape[-1]

    def token_map(self, positions: int | list[int], row: int = -1) -> Tensor:
        """Where the U-Net looked at some tokens: float32 (H, W), the size of the picture, in [0, 1], on the CPU.

        Position 0 is the start token. The shares of all `positions` are added, then averaged over the stages, each map
        enlarged to the picture (after 2210.04885). `row` is a row of the U-Net's batch; the last is the last prompt's.
        Where the context of a prompt is repeated (see `sd.prompts`), so are its tokens: each has several positions, and
        its share is the sum of theirs.

        Raises ValueError if no attention was recorded, or there is no such token.
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
        """`token_map` of a word, or of several in a row, wherever `prompt` has them. Raises ValueError if nowhere.

        It is the same for a prompt alone and in a batch with longer ones, which have its context repeated.
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
        # Parts of a network can also be run without the whole, as `Encoder.moments` and `DeepCache` do, so that nothing
        # announces the call: it has each part once, and its first stage says what went in.
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
        if total is None or total.shape[1:] != new.shape[1:]:  # another size of picture or of prompt: begin again
            self._sums[stage], self._counts[stage] = new, 1
            return
        # Steps without guidance have no unconditional rows, which come first: the rows that are always there count.
        rows = min(len(total), len(new))
        self._sums[stage] = total[-rows:] + new[-rows:]
        self._counts[stage] += 1


def _first_shape(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, ...]:
    """The shape of the first argument that `module.forward` takes, however it was given."""
    arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return tuple(next(iter(arguments.values())).shape)


@torch.no_grad()
def attention_weights(module: CrossAttention, x: Tensor, context: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)), averaged over the heads: x (B, N, C), context (B, M, D) -> float32 (B, N, M).

    The module itself never holds this matrix. It is made here one head at a time, so that it is held only once.
    """
    query, key = F.linear(x, module.query.weight), F.linear(context, module.key.weight)  # (B, N, C), (B, M, C)
    query, key = (y.unflatten(-1, (module.heads, -1)).movedim(2, 0) for y in (query, key))  # (heads, B, N, d)
    scale = 1 / math.sqrt(query.shape[-1])
    weights = torch.zeros(*x.shape[:2], context.shape[1], device=x.device)  # (B, N, M)
    for q, k in zip(query, key):
        weights += (q.float() @ k.float().mT * scale).softmax(-1)
    return weights / module.heads


def word_positions(tokenizer: Tokenizer, word: str, prompt: str, total: int | None = None) -> list[int]:
    """The positions in the context of `prompt`, as `encode_prompt` makes it, of the tokens of `word`, every time.

    `total` is the length of that context, 77 k, where it is repeated; its repetitions count too then. Raises ValueError
    if the prompt does not have the word.
    """
    ids, wanted = layout([prompt], tokenizer)[0].flatten().tolist(), tokenizer.encode(word)
    starts = [i for i in range(len(ids)) if wanted and ids[i : i + len(wanted)] == wanted]
    if not starts:
        raise ValueError(f"word should be in the prompt, as a whole word: {word!r} is not in {prompt!r}.")
    repetitions = range(0, max(total or 0, len(ids)), len(ids))  # where each begins
    return [again + start + i for again in repetitions for start in starts for i in range(len(wanted))]


def feature_image(features: Tensor) -> np.ndarray:
    """A feature map (C, h, w) as a picture, uint8 (h, w, 3), in which alike features have alike colours.

    Red, green and blue are the three directions in which the features vary most (their principal components), each
    stretched from its 1st to its 99th percentile. Up to three channels are shown as they are; one channel is grey.

    Raises ValueError for another shape, or values that are not finite.
    """
    if features.ndim != 3 or not features.isfinite().all():
        shape = tuple(features.shape)
        raise ValueError(f"features should be of shape (C, h, w) and finite: these are {shape}, or not finite.")
    x = features.detach().float().cpu().flatten(1)  # (C, h w)
    x = x - x.mean(1, keepdim=True)
    if len(x) > 3:
        _, directions = torch.linalg.eigh(x @ x.mT)  # (C, C), by rising variance
        directions = directions[:, -3:].flip(1)  # (C, 3)
        # A direction has no sign: its largest part shall be positive.
        largest = directions.abs().argmax(0, keepdim=True)  # (1, 3)
        x = (directions * directions.gather(0, largest).sign()).mT @ x  # (3, h w)
    low, high = x.quantile(torch.tensor([0.01, 0.99]), dim=1)[:, :, None]  # each (3, 1)
    levels = ((x - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
    picture = torch.zeros(3, x.shape[1])
    picture[: len(levels)] = levels
    picture = levels.expand(3, -1) if len(levels) == 1 else picture
    return picture.round().byte().unflatten(1, features.shape[1:]).permute(1, 2, 0).contiguous().numpy()  # (h, w, 3)
