"""Draws captioned pictures of a thing that the tiny model has never seen, to teach it with train.py.

python scripts/draw_pictures.py windmill --out runs/windmills
python scripts/train.py lora --pictures runs/windmills --word windmill --class lighthouse
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.command_line import Parser, exit_status
from scripts.support.output_files import make_folder

THINGS = ("windmill", "rocket")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("draw_pictures.py", __doc__)
    add = parser.add_argument
    add("thing", choices=THINGS, metavar="THING", help=f"what to draw: {' or '.join(THINGS)}")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder for the pictures")
    add("--count", type=int, default=24, metavar="N", help="number of pictures (24)")
    options = parser.parse_args(arguments)
    if not 1 <= options.count <= 1000:
        parser.error(f"--count should be 1 to 1000, not {options.count}.")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    interrupted = "interrupted; delete the folder and run the same command again."
    return exit_status("draw_pictures.py", lambda: draw(options), interrupted)


def draw(options: argparse.Namespace) -> None:
    from sd.training.world.newcomers import write_pictures

    make_folder("--out", options.out)
    if any(options.out.iterdir()):
        raise ValueError(f"--out should be an empty folder or a new one, and {options.out} has files.")
    write_pictures(options.out, options.thing, options.count)
    print(options.out)


if __name__ == "__main__":
    sys.exit(main())
