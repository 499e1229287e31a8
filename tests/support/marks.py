"""A mark for some of a test's parameters."""

import pytest


def slow(*values):
    """Parameters with which a test runs only with `--slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)
