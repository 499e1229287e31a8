"""Stable Diffusion 1.5 from scratch: `load_models`, `generate`, and every part of them in a module of its own."""

from sd.model_loader import load_models
from sd.pipeline import generate

__all__ = ["generate", "load_models"]
