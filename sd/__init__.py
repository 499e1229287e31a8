"""Stable Diffusion 1.5 from scratch. `load_models` and `generate` are enough to use it; each module is one part."""

from sd.model_loader import load_models
from sd.pipeline import generate

__all__ = ["generate", "load_models"]
