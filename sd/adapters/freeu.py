"""FreeU: other weights for the two halves that meet on the U-Net's way up (2309.11497).

A stage on the way up reads two maps side by side: x, from the stage below it, and h, the map that was kept on the way
down. x carries what the image is about, h mostly fine detail. FreeU makes half of the channels of x larger, and the
lowest frequencies of h smaller (eq. 3 and 5, in the form of diffusers), in the two coarsest levels:

    x'_i = b x_i  for i < C / 2            h'_i = IFFT(FFT(h_i) s),  with s where |frequency| is lowest, 1 elsewhere

It has no weights and needs no training. Usual values b1, b2, s1, s2: 1.5, 1.6, 0.9, 0.2 for SD 1.5 and 1.4, 1.6, 0.9,
0.2 for SD 2.1 (https://github.com/ChenyangSi/FreeU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import get_ident

import torch
from torch import Tensor

from sd.diffusion import Diffusion


class FreeU:
    """A U-Net with FreeU: `call` is the U-Net, or what runs it. Its weights and its code do not change."""

    def __init__(self, unet: Diffusion, factors: Sequence[float], call: Callable[..., Tensor]):
        self.unet, self.call = unet, call
        b1, b2, s1, s2 = map(float, factors)
        stages = unet.config.blocks_per_level + 1  # of a level
        self.factors = [(b1, s1)] * stages + [(b2, s2)] * stages  # of the first stages on the way up

    def __call__(self, *arguments) -> Tensor:
        """As `Diffusion.forward`."""
        with ExitStack() as hooks:
            for stage, kept, (b, s) in zip(self.unet.up, reversed(self.unet.skip_widths), self.factors):
                hooks.callback(stage.register_forward_pre_hook(_change(kept, b, s)).remove)
            return self.call(*arguments)


def _change(kept: int, b: float, s: float) -> Callable:
    """A hook that changes what a stage reads in this thread. `kept` is the number of channels of the kept map."""
    thread = get_ident()

    def hook(_stage, arguments: tuple) -> tuple | None:
        if get_ident() != thread:  # another image is drawn with the same U-Net at the same time
            return None
        maps, *others = arguments
        x, h = maps.split([maps.shape[1] - kept, kept], dim=1)
        half = x.shape[1] // 2
        return torch.cat([b * x[:, :half], x[:, half:], scale_low_frequencies(h, s)], dim=1), *others

    return hook


def scale_low_frequencies(h: Tensor, s: float) -> Tensor:
    """Maps (B, C, h, w) with the four lowest coefficients of their Fourier transform, of frequencies -1 and 0 in each
    direction, times `s`. Computed in float32."""
    factors = torch.ones(h.shape[2:], device=h.device)  # (h, w): frequencies 0, 1, 2, ..., -2, -1
    for row in (-1, 0):
        factors[row, [-1, 0]] = s
    return torch.fft.ifft2(torch.fft.fft2(h.float()) * factors).real.to(h.dtype)
