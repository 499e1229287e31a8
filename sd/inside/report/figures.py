"""The drawings of a report as SVG text: the noise schedule, and the U-Net to scale. style.css sets their colours."""

from __future__ import annotations

from html import escape
from itertools import groupby

CURVE_POINTS = 100
WIDTH, HEIGHT, GAP = 960, 170, 6  # the U-Net in pixels: width of all blocks, height of the highest, gap between two
SKIP, FOOT = 9, 44  # distance of two skip connections, and space for the labels below

Shapes = list[tuple[str, tuple[int, ...]]]


def schedule_svg(alphas_cumprod: list[float]) -> str:
    """The curves of sqrt(a_t), the factor of the image, and sqrt(1 - a_t), that of the noise. Noise is on the left.

    The drawing is 100 wide and 100 high, and style.css stretches it: x is 100 (1 - t / T), y is 100 (1 - factor).
    """
    last = len(alphas_cumprod) - 1
    visited = sorted({round(i * last / CURVE_POINTS) for i in range(CURVE_POINTS + 1)}, reverse=True)

    def path(variances: list[float]) -> str:
        points = ((100 * (1 - t / last), 100 * (1 - variances[t] ** 0.5)) for t in visited)
        return "M" + " L".join(f"{x:.2f},{y:.2f}" for x, y in points)

    image, noise = path(alphas_cumprod), path([1 - a_t for a_t in alphas_cumprod])
    return (
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="area" d="{image} L100,100 L0,100 Z"/>'
        f'<path class="noise" d="{noise}"/><path class="signal" d="{image}"/></svg>'
    )


def unet_svg(shapes: Shapes, reading: set[str]) -> str:
    """The U-Net as blocks, one for each stage: as wide as its channels, as high as its maps, skip connections above.

    `shapes` comes from `Tracer.shapes`; `reading` names the stages with cross-attention.
    """
    sizes = {name: shape[1:] for name, shape in shapes}  # (C, h, w)
    skips = sum(name.startswith("down.") for name in sizes)
    top = SKIP * (skips + 2)
    middle = top + HEIGHT / 2
    room = WIDTH - GAP * (len(sizes) - 1)
    wide, high = room / sum(c for c, _, _ in sizes.values()), HEIGHT / max(h for _, h, _ in sizes.values())
    blocks, places, x = [], {}, 0.0
    for name, (channels, rows, columns) in sizes.items():
        width, height = max(channels * wide, 1.5), max(rows * high, 2)
        places[name] = x, width, middle - height / 2
        kind = "block reads" if name in reading else "block"
        title = f"{name}: {channels} channels, height {rows}, width {columns}"
        blocks.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{middle - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'rx="1.5"><title>{escape(title)}</title></rect>'
        )
        x += width + GAP
    lines = [_skip(places[f"down.{i}"], places[f"up.{skips - 1 - i}"], SKIP * (i + 1)) for i in range(skips)]
    return (
        f'<svg viewBox="-2 0 {x - GAP + 4:.0f} {top + HEIGHT + FOOT}" role="img" aria-labelledby="unet-title">'
        '<title id="unet-title">The U-Net as blocks from left to right: narrow and high, then wide and flat, then '
        f"narrow and high again, with {skips} skip connections above. The table below has all shapes.</title>"
        f"{''.join(lines)}{''.join(blocks)}{_labels(sizes, places, top + HEIGHT)}</svg>"
    )


def _skip(start: tuple[float, float, float], end: tuple[float, float, float], y: float) -> str:
    """A line at height y from the top of one block to the top of another."""
    (x1, width1, top1), (x2, width2, top2) = start, end
    x1, x2, bend = x1 + width1 / 2, x2 + width2 / 2, 5
    return (
        f'<path class="skip" d="M{x1:.1f},{top1 - 2:.1f} V{y + bend:.1f} Q{x1:.1f},{y:.1f} {x1 + bend:.1f},{y:.1f} '
        f'H{x2 - bend:.1f} Q{x2:.1f},{y:.1f} {x2:.1f},{y + bend:.1f} V{top2 - 2:.1f}"/>'
    )


def _labels(sizes: dict[str, tuple[int, ...]], places: dict[str, tuple[float, float, float]], y: float) -> str:
    """The labels below the blocks: the number of channels where it changes, and the sizes of the maps."""
    texts = []
    for (rows, columns), stages in groupby(sizes.items(), key=lambda stage: stage[1][1:]):
        names = [name for name, _ in stages]
        left, right = places[names[0]][0], sum(places[names[-1]][:2])
        texts.append(f'<path class="bracket" d="M{left:.1f},{y + 22} H{right:.1f}"/>')
        texts.append(f'<text x="{(left + right) / 2:.1f}" y="{y + 38}">{columns} × {rows}</text>')
        for channels, same in groupby(names, key=lambda name: sizes[name][0]):
            same = list(same)
            centre = (places[same[0]][0] + sum(places[same[-1]][:2])) / 2
            texts.append(f'<text class="channels" x="{centre:.1f}" y="{y + 14}">{channels}</text>')
    return "".join(texts)
