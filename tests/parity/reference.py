"""The reference networks. Tests that import this module are skipped if diffusers or transformers is not installed."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts.benchmarks.reference_networks import text_encoder, unet, vae  # noqa: F401
