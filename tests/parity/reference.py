"""The reference networks that ours must agree with; tests are skipped where their libraries are not installed."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts.benchmarks.reference_networks import text_encoder, unet, vae  # noqa: F401
