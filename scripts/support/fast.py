"""--fast: the tiny model draws in four steps, with a LoRA that was distilled from it (`sd.training.distillation`)."""

from __future__ import annotations

import argparse

SETTINGS = {"sampler": "lcm", "steps": 4, "cfg_scale": 1.0}
FLAGS = "--sampler lcm --steps 4 --cfg-scale 1"


def use_fast(options: argparse.Namespace) -> None:
    """Adds the LoRA to those of --lora, and fills in its settings, except those that other flags give.

    Raises ValueError if the LoRA is for another model than that of --checkpoint, or missing.
    """
    if not options.fast:
        return
    from sd.files import DATA

    path = DATA / "tiny-lcm.safetensors"
    if options.checkpoint:
        raise ValueError(
            f"--fast should be used without --checkpoint: its LoRA is the tiny model's. For another model, give one "
            f"that was made for few steps, such as an LCM-LoRA: --lora FILE {FLAGS}."
        )
    if not path.is_file():
        raise ValueError(f"--fast needs {path}, which is missing: `git checkout data/{path.name}` brings it back.")
    options.lora = [str(path), *(options.lora or [])]
    for name, value in SETTINGS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.negative and options.cfg_scale == 1:
        raise ValueError("--negative should be used without --fast, which draws without guidance.")
