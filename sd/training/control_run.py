"""A run that trains a ControlNet in one folder (control.py): on outlines, on scribbles, or on control images of yours.

In: a finished model, and captioned pictures. Out: the file of the ControlNet.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sd.adapters.controlnet import HINT_SCALE, ControlNet
from sd.adapters.controlnet_files import load_controlnet
from sd.images import image_to_tensor, read_image, to_uint8
from sd.model_loader import TINY_CHECKPOINT, load_models
from sd.models import Models
from sd.runtime.devices import best_device
from sd.runtime.out_of_memory import ADVICE_FOR_TRAINING, explain_out_of_memory
from sd.training import ranks
from sd.training.captions import DataError, read_captions
from sd.training.control import ControlStage, draw_steered, write_controlnet
from sd.training.data import load_folder, load_scenes
from sd.training.loop import Training, TrainingError, load_state, save_atomically
from sd.training.outlines import agreement, outlines, scribbles
from sd.training.recompute import recompute_activations
from sd.training.record import check_result, make_folder, make_record
from sd.training.stages import MIN_IMAGES, train_with_bar, write_grid
from sd.training.text import tokenise
from sd.training.vae import encode_all

log = logging.getLogger(__name__)

OUTLINED = 1 / 2  # share of plain outlines among scribbles, so that a ControlNet follows both
HELD_BACK = 16  # pictures that are not trained on: their images are shown with what is drawn from them


class ControlRun:
    """Trains a ControlNet for a finished model in one folder: `train`, then `write`."""

    def __init__(
        self,
        out: Path,
        checkpoint: Path | None = None,
        kind: str = "outlines",
        pictures: Path | None = None,
        control_images: Path | None = None,
        scenes: int = 3000,
        start: Path | None = None,
        batch_size: int = 8,
        device: str | None = None,
        seed: int = 0,
        save_every: float = 3,
        accumulate: int = 1,
        recompute: bool = False,
    ):
        """Train in the folder `out`, for the model in `checkpoint` (default: the tiny model).

        It learns from the captioned `pictures` in a folder, or else from this number of `scenes` of the toy world.
        `control_images` is a folder with an image of the same name for each picture; any kind of image that is the same
        for what is alike in the pictures, such as edges, poses or depths. Without it, outlines or scribbles are made,
        as `kind` says. `start` is a ControlNet to train further. `save_every` is in minutes. `accumulate` and
        `recompute` save memory: see `Training` and `recompute_activations`.

        Raises what `load_models` and `load_controlnet` raise, ValueError if the model or the images cannot be used or
        if `out` is the folder of another run, OSError if `out` cannot be written.
        """
        checkpoint = checkpoint or TINY_CHECKPOINT
        self.out, self.seed, self.save_every, self.batch_size = out, seed, save_every, batch_size
        self.kind, self.given = kind, None
        self.accumulate, self.recompute = accumulate, recompute
        if control_images and not pictures:
            raise TrainingError("--control-images should be given with --pictures, the folder of what they belong to.")
        self.models = load_models(checkpoint, best_device(device), torch.float32, tuned=False)
        _check_model(self.models, checkpoint)
        self.start = start and load_controlnet(start, self.models)
        if self.start and (self.start.global_pool or self.start.inpaints):
            raise TrainingError(f"{start} is a ControlNet of the kind shuffle or inpaint, which is not trained here.")
        size = self.models.config.image_size
        self.record = make_record(scenes, pictures, seed, checkpoint, self.models)
        if self.record["pictures"] < MIN_IMAGES:
            what = "pictures" if pictures else "scenes"
            raise TrainingError(f"The number of {what} should be at least {MIN_IMAGES}, not {self.record['pictures']}.")
        if control_images:
            self.given = read_control_images(control_images, pictures, size)
            if (self.given == self.given[:, :, :1, :1]).all():
                raise TrainingError("The control images should have something in them, but each is of one colour.")
        self._describe(control_images)
        make_folder(out, pictures, self.record)
        check_result(out / "control.safetensors", out / "control.state")
        self.images = load_folder(pictures, out, size) if pictures else load_scenes(out, scenes, size)

    def _describe(self, control_images: Path | None) -> None:
        """Add to the record what the ControlNet is steered by, and what it starts from."""
        digest = hashlib.sha256(f"{self.record['sha256']} {self.batch_size}".encode())
        if self.given is None:
            self.record["about"] += f", with {self.kind}"
            digest.update(self.kind.encode())
        else:
            self.record["about"] += f", with the images of {control_images}"
            digest.update(self.given.numpy())
        if self.start:
            self.record["about"] += f", from {self.start.source}"
            for tensor in self.start.state_dict().values():
                digest.update(tensor.float().cpu().contiguous().numpy())
        self.record["sha256"] = digest.hexdigest()

    @explain_out_of_memory(ADVICE_FOR_TRAINING)
    def train(self, minutes: float, steps: int | None = None) -> None:
        """Train for about `minutes`, or for `steps`; or resume. Raises TrainingError if it cannot start or continue,
        OutOfMemory, OSError if its files cannot be written."""
        if self.given is None:
            self.lines = self._outlines()
        latents = self._latents()
        self.held_back = min(HELD_BACK, -(-len(self.images) // 10))
        count = len(self.images) - self.held_back
        tokens = tokenise(self.images, self.models.tokenizer)[:count]
        latents = tuple(part[:count] for part in latents)
        torch.manual_seed(self.seed)
        stage = ControlStage(self.models, latents, tokens, self._hints, self.start, self.batch_size)
        if self.recompute:
            recompute_activations(stage.networks)
            recompute_activations(self.models.diffusion)
        device = self.models.device
        training = Training(stage, self.out, device, minutes, steps, self.seed, self.record, self.accumulate)
        train_with_bar(training, self.save_every, self._show)

    def _outlines(self) -> Tensor:
        """The outlines of all pictures: bool (N, 1, H, W). Raises TrainingError if none of them has any."""
        batches = tqdm(torch.arange(len(self.images)).split(32), "finding outlines", leave=False)
        lines = torch.cat([outlines(self.images.batch(part)).bool() for part in batches])
        if not lines.any():
            raise TrainingError("The pictures should have outlines, but each is of one colour.")
        return lines

    def _hints(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Indices of pictures (B,) -> the images to steer by, (B, 3, H, W) in [0, 1]."""
        if self.given is not None:
            return self.given[indices].float() / 255
        lines = self.lines[indices].float()  # (B, 1, H, W)
        if self.kind == "scribbles":
            plain = torch.rand(len(lines), 1, 1, 1, generator=generator) < OUTLINED
            lines = torch.where(plain, lines, scribbles(lines, generator))
        return lines.expand(-1, 3, -1, -1)

    def _latents(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of all pictures, saved for the next time."""
        path = self.out / "latents.state"
        if path.exists() and (known := load_state(path))["record"]["sha256"] == self.record["sha256"]:
            return known["means"], known["stds"]
        means, stds = encode_all(self.models.encoder, self.images, self.models.device, shared=True)
        if ranks.rank() == 0:
            save_atomically({"record": self.record, "means": means, "stds": stds}, path)
        return means, stds

    def _show(self, training: Training) -> str:
        """Write a grid: images of pictures that were held back, and below each what is drawn from it with the caption.
        Returns a line for the log."""
        indices = torch.arange(len(self.images))[-self.held_back :][:8]
        hints = self._hints(indices, torch.Generator().manual_seed(0))
        prompts = [self.images.captions[i][0] for i in indices.tolist()]
        drawn = draw_steered(self.models, training.average["control"], hints, prompts)
        write_grid(self.out / "control.png", torch.cat([2 * hints - 1, drawn]), columns=len(indices))
        line = f"control, step {training.step}: see {self.out / 'control.png'}"
        if self.given is None:
            share, _ = agreement(hints[:, :1], outlines(drawn), within=2)
            line += f"; {share:.0%} of the lines are within 2 pixels of an edge of the picture"
        return line

    def write(self) -> Path:
        """Write what was trained to `out`/control.safetensors. Returns the path."""
        network = ControlNet(self.models.config.unet)
        average = load_state(self.out / "control.state")["average"]
        network.load_state_dict({key.removeprefix("control."): tensor for key, tensor in average.items()})
        path = self.out / "control.safetensors"
        write_controlnet(path, network, self.models)
        return path


def read_control_images(folder: Path, pictures: Path, size: int) -> Tensor:
    """The control image of each captioned picture, cropped and resized as the pictures are: uint8 (N, 3, size, size).

    A control image has its picture's name; its suffix may be another. Raises DataError for one that is missing, cannot
    be read or has another shape than its picture.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: choose one with a control image for each picture.")
    by_stem = {path.stem: path for path in sorted(folder.iterdir()) if path.is_file()}
    images = []
    for name in read_captions(pictures):
        path = folder / name if (folder / name).is_file() else by_stem.get(Path(name).stem)
        if path is None:
            raise DataError(f"There is no control image for {pictures / name}: {folder} should have one of its name.")
        try:
            image, shape = read_image(path, behind="black"), read_image(pictures / name).size
        except (ValueError, OSError) as error:
            raise DataError(str(error)) from error
        if abs(image.width * shape[1] - image.height * shape[0]) > 0.02 * image.width * shape[1]:
            width, height = shape
            raise DataError(
                f"{path} should have the shape of its picture, {width} x {height} pixels or as many times that, not "
                f"{image.width} x {image.height}."
            )
        images.append(to_uint8(image_to_tensor(image, size, size)))
    return torch.cat(images)


def _check_model(models: Models, checkpoint: Path) -> None:
    """Raise TrainingError unless a ControlNet can be trained for a model."""
    if models.config.unet.inpaints:
        raise TrainingError(f"{checkpoint} is an inpainting model: train on the one that it was made from.")
    if models.config.sampling.cfg_scale <= 1:
        raise TrainingError(f"{checkpoint} draws in a few steps: train on the model that it was made from.")
    if models.config.vae.downscale != HINT_SCALE:
        raise TrainingError(
            f"The autoencoder of {checkpoint} should have {HINT_SCALE} pixels to a latent, not "
            f"{models.config.vae.downscale}."
        )
