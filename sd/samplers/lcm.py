"""LCM: the sampler of "Latent consistency models" (2310.04378), for U-Nets that were distilled to need 2 to 8 steps.

In: x_t and the U-Net's output for it. Out: x at the next timestep, with fresh noise.
"""

import numpy as np
from torch import Tensor

from sd.noise import draw_noise
from sd.sampler import Sampler

DISTILLED_STEPS = 50  # the teacher's, whose timesteps are the only ones that the U-Net was distilled at
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10


def boundary_scalings(timestep: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """c_skip and c_out of the consistency function: 1 and 0 at timestep 0, where the latents are the image already."""
    t = TIMESTEP_SCALING * timestep
    return SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2), t / (t**2 + SIGMA_DATA**2) ** 0.5


class LCMSampler(Sampler):
    """Multistep consistency sampling: each step predicts the whole image, and noises it again for a better prediction.

    A run has at most 50 steps. Its timesteps do not depend on `schedule.timestep_spacing`.
    """

    default_steps = 4
    max_steps = DISTILLED_STEPS

    def distilled(self, strength: float = 1) -> np.ndarray:
        """The timesteps (m,) at which the U-Net was distilled, noisiest first: 999, 979, ..., 19 (2310.04378, section
        4.3). With a strength below 1, the last 50 strength of them, and at least one."""
        total = self.schedule.num_training_steps
        count = min(DISTILLED_STEPS, total)
        timesteps = np.arange(count, 0, -1) * (total // count) - 1
        return timesteps[count - max(1, int(count * strength + 1e-4)) :]  # 50 * 0.58 is 28.999999999999996

    def choose_timesteps(self, n: int, strength: float = 1) -> np.ndarray:
        """n of `distilled`, evenly chosen; all of them if there are fewer."""
        timesteps = self.distilled(strength)
        n, m = min(n, len(timesteps)), len(timesteps)
        return timesteps[np.arange(n) * m // n].astype(float)

    def set_strength(self, strength: float) -> None:
        """Leaves out the noisiest of the 50 timesteps, but no step: four steps at strength 0.5 start at timestep 499.
        Raises ValueError unless 0 < strength <= 1."""
        super().set_strength(strength)
        self.visit(self.choose_timesteps(self.steps, strength))
        self.skipped = len(self.distilled()) - len(self.distilled(strength))

    def take_step(self, i: int, latents: Tensor, output: Tensor) -> Tensor:
        """x_t -> x_{t'} = sqrt(a_t') f + sqrt(1 - a_t') z,    z ~ N(0, I),    f = c_skip x_t + c_out x_0

        f is the consistency function (2310.04378, section 4.1). It is the result of the last step.
        """
        denoised, _ = self.x0_and_noise(self.alpha_bar[i], latents, output)
        c_skip, c_out = boundary_scalings(self.timesteps[i].item())
        image = c_skip * latents + c_out * denoised
        a_next = self.alpha_bar[i + 1]
        if a_next == 1:
            return image
        noise = draw_noise(latents.shape, self.generator).to(latents.device)
        return a_next.sqrt() * image + (1 - a_next).sqrt() * noise
