"""Running the networks: devices, memory, speed, and outputs that are not finite. Here: how all of `sd` warns."""

import sys
import warnings

INSIDE = {"sd", "torch", "tqdm", "contextlib"}  # packages through which a call runs to where it warns


def warn(message: str) -> None:
    """`warnings.warn`, which then names the line that called into `sd`, however deep inside the cause is."""
    frame, level = sys._getframe(1), 2  # whoever called this function
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
