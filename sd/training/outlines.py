"""Outlines of pictures, and scribbles: the images that a ControlNet of the tiny model is trained to follow.

In: pictures. Out: their edges, white lines on black, one pixel wide. A scribble is such an outline as a hand would draw
it: lines that are bent, thick and incomplete.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTHING = 1.0  # of the picture before its edges are found: the standard deviation, in pixels
HIGH, LOW = 0.12, 0.05  # slopes of edges, in levels of [-1, 1] a pixel: of certain ones, and of their weak ends
SURROUNDINGS, FEWEST = (
    15,
    12,
)  # a certain edge has more than 12 pixels of edges in 15 x 15: the outline of a star has not
REACH = 10  # how far weak edges are followed, in pixels
PEN = 1.2  # how soft the lines of a scribble are before they get their width, in pixels
WIDTHS = 1.0, 4.0  # of a scribble's lines, in pixels


def outlines(pictures: Tensor) -> Tensor:
    """The edges of pictures (B, 3, H, W) in [-1, 1] -> (B, 1, H, W), 1 on an edge and 0 elsewhere.

    Canny's method (1986, "A Computational Approach to Edge Detection"): smooth, take the slope, keep it where it is the
    largest across the edge, and keep weak edges only where they touch a strong one. The slope is that of the channel in
    which it is the largest, so that green hills end at a blue sky of the same brightness. Dots such as stars are left
    out: a picture by day has none.
    """
    dx, dy = slopes(smooth(pictures, SMOOTHING))  # (B, 3, H, W) each
    size, channel = torch.hypot(dx, dy).max(dim=1, keepdim=True)  # (B, 1, H, W)
    dx, dy = dx.gather(1, channel), dy.gather(1, channel)
    ridge = is_largest_across(size, dx, dy)
    strong, weak = ridge & (size > HIGH), ridge & (size > LOW)
    around = F.avg_pool2d(strong.float(), SURROUNDINGS, 1, SURROUNDINGS // 2) * SURROUNDINGS**2
    strong &= around > FEWEST
    for _ in range(REACH):  # let the strong edges grow along the weak ones
        strong = thicken(strong.float(), 1).bool() & weak
    return strong.float()


def smooth(pictures: Tensor, sigma: float) -> Tensor:
    """Pictures (B, C, H, W), each channel convolved with a Gaussian of this standard deviation in pixels."""
    radius = math.ceil(3 * sigma)
    x = torch.arange(-radius, radius + 1, dtype=pictures.dtype, device=pictures.device)
    kernel = torch.softmax(-(x**2) / (2 * sigma**2), 0)  # (K,), its sum is 1
    channels = pictures.shape[1]
    row = kernel.expand(channels, 1, 1, -1)  # (C, 1, 1, K)
    x = F.pad(pictures, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, row, groups=channels), row.transpose(2, 3), groups=channels)


def slopes(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (B, C, H, W) -> how much they rise a pixel to the right and down, (B, C, H, W) each (Sobel)."""
    channels = pictures.shape[1]
    kernel = torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([-1.0, 0, 1]) / 8  # (3, 3)
    kernel = kernel.to(pictures).expand(channels, 1, 3, 3)
    x = F.pad(pictures, (1,) * 4, mode="replicate")
    return F.conv2d(x, kernel, groups=channels), F.conv2d(x, kernel.transpose(2, 3), groups=channels)


def is_largest_across(size: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Whether the slope of each pixel is the largest among its neighbours across the edge: (B, 1, H, W) each."""
    direction = (torch.atan2(dy, dx) * 4 / math.pi).round().long() % 4  # of the slope: -, \\, | or /
    x = F.pad(size, (1,) * 4)
    height, width = size.shape[2:]
    result = torch.zeros_like(size, dtype=torch.bool)
    for i, (right, down) in enumerate(((1, 0), (1, 1), (0, 1), (-1, 1))):
        after = x[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]
        before = x[..., 1 - down : 1 - down + height, 1 - right : 1 - right + width]
        result |= (direction == i) & (size > before) & (size >= after)
    return result


def thicken(lines: Tensor, radius: int) -> Tensor:
    """Lines (B, 1, H, W) -> the largest value within a square of this radius in pixels around each pixel."""
    return F.max_pool2d(lines, 2 * radius + 1, stride=1, padding=radius)


def scribbles(lines: Tensor, generator: torch.Generator) -> Tensor:
    """Outlines (B, 1, H, W) as a hand would draw them, at random -> (B, 1, H, W) of 0 and 1.

    Each is bent by up to some 4 pixels, its lines are 1 to 4 pixels wide, and up to half of it is missing.
    """
    count, _, height, width = lines.shape

    def field(channels: int, cells: int) -> Tensor:
        """Smooth random values of about unit variance, (B, channels, H, W), that change over H / cells pixels."""
        noise = torch.randn(count, channels, cells, cells, generator=generator)
        return F.interpolate(noise, (height, width), mode="bicubic", align_corners=True)

    def chance() -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator)

    bend = 2.0 * chance() * field(2, 5) + 0.7 * chance() * field(2, 16)  # in pixels
    grid = F.affine_grid(torch.eye(2, 3).expand(count, -1, -1), lines.shape, align_corners=False)  # (B, H, W, 2)
    grid = grid + bend.permute(0, 2, 3, 1) * torch.tensor([2 / width, 2 / height])
    soft = F.grid_sample(smooth(lines, PEN), grid, align_corners=False)
    # Across a line, the soft one is a normal density. It has the width w where it is above the density at w / 2.
    w = WIDTHS[0] + (WIDTHS[1] - WIDTHS[0]) * (chance() + 0.15 * field(1, 6)).clamp(0, 1)
    drawn = soft > torch.exp(-(w**2) / (8 * PEN**2)) / (PEN * math.sqrt(2 * math.pi))
    gaps = field(1, 7)
    missing = gaps < gaps.flatten(1).quantile(0.5, dim=1)[:, None, None, None] - 1.5 * chance()
    return (drawn & ~missing).float()


def agreement(given: Tensor, found: Tensor, within: int) -> tuple[float, float]:
    """How well the lines `found` in pictures follow the `given` ones, (N, 1, H, W) of 0 and 1 each.

    Returns the share of given lines that have a found one within this many pixels (across, down or diagonally), and the
    share of found lines that have a given one there. Both are 1.0 if there are no lines to look for.
    """

    def near(lines: Tensor, others: Tensor) -> float:
        number = lines.sum().item()
        return (lines * thicken(others, within)).sum().item() / number if number else 1.0

    return near(given, found), near(found, given)
