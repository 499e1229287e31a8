"""The tests; README.md says which block is where."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the repository
