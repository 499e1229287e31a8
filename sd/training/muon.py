"""Muon, an optimizer for matrices: momentum, with every update made orthogonal (Jordan et al. 2024; 2502.16982).

An orthogonal update changes all directions of a matrix equally, however large the gradients in each direction are. A
small network then learns from far fewer samples than with AdamW, which matters on two CPU cores. Convolutions are
treated as matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sd.training.precision import product_dtype


class Muon(torch.optim.Optimizer):
    """For parameters of two or more dimensions. Updates are scaled to the size of AdamW's (2502.16982, eq. 4), so that
    both can use the same learning rate."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

        self.map = map  # can be replaced by the map of a thread pool, to update matrices in parallel

    def step(self) -> None:
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            list(self.map(self._update, trained, [group] * len(trained)))

    @torch.no_grad()
    def _update(self, p: nn.Parameter, group: dict) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)  # Nesterov momentum
        p.mul_(1 - group["lr"] * group["weight_decay"])
        size = 0.2 * max(update.shape) ** 0.5
        p.add_(orthogonalise(update).view_as(p), alpha=-group["lr"] * size)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """(m, n) with singular value decomposition U S V^T -> approximately U V^T, by Newton-Schulz iteration.

    Each step maps every singular value x to a x + b x^3 + c x^5. With these coefficients, all but the smallest values
    end between 0.7 and 1.2.
    """
    x = matrix.to(product_dtype(matrix.device))
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    x = x / (torch.linalg.vector_norm(x) + 1e-7)  # now no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)
