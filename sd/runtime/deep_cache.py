"""A U-Net that runs its deep stages only at some of the steps (2312.00858)."""

from torch import Tensor

from sd.diffusion import Diffusion


class DeepCache:
    """A U-Net that goes deep only once in `interval` calls (2312.00858, section 3.2): from one step of the sampling to
    the next, what the deep stages make changes little, and it is coarse. Faster, and not quite the same pictures.
    `torch.compile` does not reach it: that has compiled `forward` alone."""

    def __init__(self, unet: Diffusion, interval: int):
        self.unet, self.interval = unet, interval
        self.calls, self.deep = 0, None

    def __call__(self, latents: Tensor, context: Tensor, timesteps: Tensor) -> Tensor:
        """As `Diffusion.forward`."""
        fits = self.deep is not None and len(self.deep) == len(latents)  # guidance can begin and end during a run
        reuse = fits and self.calls % self.interval != 0
        noise, self.deep = self.unet.predict(latents, context, timesteps, self.deep if reuse else None)
        self.calls += 1
        return noise
