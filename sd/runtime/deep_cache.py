"""DeepCache (2312.00858, section 3.2): run the U-Net's deep stages only once every few steps.

The output of the deep stages is coarse, and changes little from one step to the next. All stages but the first and the
last only serve to make one feature map, the input of the last stage. That map is kept and reused. This is faster, and
changes the images slightly.
"""

from __future__ import annotations

from threading import get_ident

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.diffusion import Diffusion


class DeepCache:
    """A U-Net that runs all its stages in one of `interval` calls, and only the first and last stage in the others.

    It bypasses what `torch.compile` has compiled. The residuals of a ControlNet reach the deep stages when these run,
    and the first stage at every call.
    """

    def __init__(self, unet: Diffusion, interval: int):
        self.unet, self.interval = unet, interval
        self.calls = 0
        self.deep: Tensor | None = None  # (B, 320, h, w): what the last stage starts from
        self.controlled = False  # whether residuals went into it

    def __call__(
        self,
        latents: Tensor,
        context: Tensor,
        timesteps: Tensor,
        residuals: list[Tensor] | None = None,
        scales: Tensor | None = None,
    ) -> Tensor:
        """As `Diffusion.forward`."""
        # Guidance and control can begin and end during a run.
        fits = self.deep is not None and len(self.deep) == len(latents) and self.controlled == (residuals is not None)
        reuse = fits and self.calls % self.interval != 0
        run = self._first_and_last_stage if reuse else self._all_stages
        noise = run(latents, context, timesteps, residuals, scales)
        self.calls += 1
        self.controlled = residuals is not None
        return noise

    def _all_stages(self, *arguments) -> Tensor:
        """The whole U-Net; keeps the input of its last stage."""
        thread = get_ident()

        def keep(_stage, args: tuple) -> None:
            if get_ident() == thread:  # another image may be drawn with the same U-Net at the same time
                self.deep = args[0][:, : -self.unet.config.channels[0]]  # without the first stage's map beside it

        handle = self.unet.up[-1].register_forward_pre_hook(keep)
        try:
            return self.unet.forward(*arguments)  # a compiled `__call__` ignores new hooks
        finally:
            handle.remove()

    def _first_and_last_stage(
        self,
        latents: Tensor,
        context: Tensor,
        timesteps: Tensor,
        residuals: list[Tensor] | None,
        scales: Tensor | None,
    ) -> Tensor:
        """The kept map takes the place of all stages between the first and the last."""
        unet = self.unet
        time = unet.embed_time(timesteps, latents.dtype, scales)  # (B, 1280)
        first = unet.down[0](latents, time, context)  # (B, 320, h, w)
        first = first if residuals is None else first + residuals[0]
        x = unet.up[-1](torch.cat([self.deep, first], dim=1), time, context)  # (B, 320, h, w)
        return unet.conv_out(F.silu(unet.norm_out(x)))  # (B, 4, h, w)
