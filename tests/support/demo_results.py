"""What a run of the demo left in the current folder."""

from pathlib import Path

from PIL import Image


def names() -> list[str]:
    """Of all files."""
    return sorted(path.name for path in Path().iterdir())


def prompt_and_seed(name: str) -> tuple[str, int]:
    """What one picture was made of, as it says itself."""
    with Image.open(name) as picture:
        lines = picture.text["parameters"].split("\n")
    return lines[0], int(lines[-1].split("Seed: ")[1].split(",")[0])
