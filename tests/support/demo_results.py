"""The files that a run of the demo left in the current folder."""

from pathlib import Path

from PIL import Image


def names() -> list[str]:
    """The names of all files."""
    return sorted(path.name for path in Path().iterdir())


def prompt_and_seed(name: str) -> tuple[str, int]:
    """The prompt and seed of an image, from its metadata."""
    with Image.open(name) as picture:
        lines = picture.text["parameters"].split("\n")
    return lines[0], int(lines[-1].split("Seed: ")[1].split(",")[0])
