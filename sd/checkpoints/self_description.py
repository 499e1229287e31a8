"""What a checkpoint file says of itself: what its U-Net predicts, the size of its images, its noise schedule.

Tensors cannot show these: a U-Net that predicts v has the same shapes as one that predicts noise. All places where
trainers say it are read here. The first one that says something counts:

- the empty tensors `v_pred`, and `ztsnr` for zero-terminal SNR (2305.08891), as ComfyUI writes them
- the metadata of a safetensors file: `modelspec.prediction_type` or `modelspec.predict_key`, `modelspec.architecture`
  and `modelspec.resolution` (https://github.com/Stability-AI/ModelSpec)
- the line `parameterization: v` in MODEL.yaml beside MODEL.ckpt or MODEL.safetensors, from the original training code
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from sd.config import ModelConfig, TextConfig
from sd.runtime import warn

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # tensors without elements, which mark a model
MARKS = (V_PREDICTION, ZERO_SNR)
PREDICTION_NAMES = {"v": "v_prediction", "vpred": "v_prediction", "vprediction": "v_prediction"}
PREDICTION_NAMES |= {"eps": "epsilon", "epsilon": "epsilon"}
YAML_LINE = re.compile(r"""^\s*parameterization\s*:\s*["']?(\w+)["']?\s*(?:\#.*)?$""", re.MULTILINE)
MAX_YAML_CHARACTERS = 1 << 20
MAX_IMAGE_SIZE = 8192


def described(
    config: ModelConfig, keys: Collection[str], metadata: dict[str, str] | None = None, yaml: str = ""
) -> ModelConfig:
    """The configuration with all that the file says: the names of its tensors, its metadata, the text of its yaml.

    A file with the mark of zero-terminal SNR that says nothing of its prediction predicts v: from noise alone, noise
    cannot be predicted (2305.08891, section 3.1).
    """
    metadata = metadata or {}
    zero_snr = config.schedule.rescale_betas_zero_snr or ZERO_SNR in keys
    default = "v_prediction" if zero_snr else config.schedule.prediction_type
    prediction = prediction_said(keys, metadata, yaml) or default
    schedule = replace(config.schedule, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    return replace(config, schedule=schedule, image_size=_image_size(metadata, config))


def yaml_beside(path: Path) -> str:
    """The text of MODEL.yaml for MODEL.ckpt or MODEL.safetensors, or nothing if there is no such file."""
    beside = path.with_suffix(".yaml")
    if beside == path or not beside.is_file():
        return ""
    with open(beside, encoding="utf-8-sig", errors="replace") as file:
        return file.read(MAX_YAML_CHARACTERS)


def warn_of_unnamed_words(vectors: int) -> None:
    """Says that a text encoder has vectors of added words that nothing names."""
    more = vectors - TextConfig.vocab_size
    warn(f"The text encoder has {more} added words, but no tokenizer names them: none is used.")


def prediction_said(keys: Collection[str], metadata: dict[str, str], yaml: str) -> str | None:
    """What the U-Net predicts, in our words, or None if nothing says it."""
    if V_PREDICTION in keys:
        return "v_prediction"
    said = [metadata.get("modelspec.prediction_type"), metadata.get("modelspec.predict_key")]
    if metadata.get("modelspec.architecture", "").endswith("-768-v"):
        said.append("v")
    said += YAML_LINE.findall(yaml)  # by hand, without a yaml library: no other line counts
    for word in filter(None, said):
        if name := PREDICTION_NAMES.get(re.sub("[-_ ]", "", word.lower())):
            return name
        warn(f"The file says that its U-Net predicts {word!r:.40}; only epsilon and v are supported.")
    return None


def _image_size(metadata: dict[str, str], config: ModelConfig) -> int:
    """The side of square images of a possible size, or else the size in the configuration."""
    sides = re.fullmatch(r"(\d{2,4})x\1", metadata.get("modelspec.resolution", "").lower().replace(" ", ""))
    side = int(sides[1]) if sides else 0
    return side if side and side % config.vae.downscale == 0 and side <= MAX_IMAGE_SIZE else config.image_size
