"""The section of a report on the ControlNets at work: their images, and what they added to the U-Net, as pictures."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from sd.adapters.control import Control
from sd.inside.recording import Recording, Residuals
from sd.inside.report.pictures import encode
from sd.inside.tracer import feature_image

TEXT = """A ControlNet is a copy of the U&#8209;Net’s left half that also reads an image. At every step it adds a map to
  each of the connections from left to right, and to the middle. These are some of its maps at one step: similar
  features have similar colours."""


def control_section(recording: Recording, budget: int) -> str:
    """The section as HTML, with `budget` bytes of images, or nothing if no ControlNet was at work."""
    if not recording.control:
        return ""
    shown = []  # (heading, caption, image, whether it is drawn in pixels)
    for control, residuals in zip(recording.control, recording.residuals):
        shown += _pictures(control, residuals)
    uris, _ = encode([image for *_, image, _ in shown], budget)
    figures = "".join(
        f'<figure class="pixels"><img{" class=pixels" * pixels} src="{uri}" width="{image.shape[1]}" '
        f'height="{image.shape[0]}" alt="{escape(heading)}: {escape(caption)}">'
        f"<figcaption><b><bdi>{escape(heading)}</bdi></b>{escape(caption)}</figcaption></figure>\n"
        for (heading, caption, image, pixels), uri in zip(shown, uris)
    )
    return (
        f'<section aria-labelledby="control">\n  <h2 id="control">What the ControlNet added</h2>\n'
        f'  <p class="text">{TEXT}</p>\n  <div class="panels three">\n{figures}  </div>\n</section>\n'
    )


def _pictures(control: Control, residuals: Residuals | None) -> list[tuple[str, str, np.ndarray, bool]]:
    """The heading, caption and image of each picture: the control image, then a residual of each size."""
    name = Path(control.path).name if control.path else "A ControlNet"
    share = f"its image; strength {control.strength:g}, from {control.start:.0%} to {control.end:.0%} of the steps"
    share += ", guess mode" * bool(control.guess_mode)
    if residuals is None:
        share += "; it was at work in none"
    pictures = [(name, share, np.asarray(control.image), False)]
    if residuals is None:
        return pictures
    *skips, middle = residuals.maps
    firsts = {each.shape[2:]: i for i, each in reversed(list(enumerate(skips)))}
    for i in sorted(firsts.values()):
        channels, rows, columns = skips[i].shape[1:]
        caption = f"for down.{i}: {channels} channels, {columns} × {rows}, step {residuals.moment.index + 1}"
        pictures.append(("Residual", caption, feature_image(skips[i][0]), True))
    caption = f"for the middle: {middle.shape[1]} channels, step {residuals.moment.index + 1}"
    return [*pictures, ("Residual", caption, feature_image(middle[0]), True)]
