"""A training run: all stages in one folder, each using the results of the stages before it.

Each stage writes a state file and, except for the text encoder, a grid of sample images. The result is `tiny.ckpt`, in
the layout of the published Stable Diffusion checkpoints.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sd.checkpoints.files import write_checkpoint
from sd.clip import CLIP
from sd.config import TINY, ModelConfig
from sd.decoder import Decoder
from sd.diffusion import Diffusion
from sd.encoder import Encoder
from sd.images import tensor_to_array, write_png
from sd.model_converter import to_compvis
from sd.model_loader import load_models
from sd.models import Models
from sd.runtime.devices import best_device
from sd.runtime.out_of_memory import ADVICE_FOR_TRAINING, explain_out_of_memory
from sd.tokenizer import Tokenizer
from sd.training import ranks
from sd.training.data import CaptionedImages, load_folder, load_scenes
from sd.training.diffusion import DiffusionStage
from sd.training.loop import Progress, Stage, Training, TrainingError, load_state, save_atomically
from sd.training.recompute import recompute_activations
from sd.training.record import check_result, make_folder, make_record
from sd.training.samples import decode, draw_latents
from sd.training.text import CaptionEncoder, TextStage, retrieval, silence_unknown_tokens, tokenise
from sd.training.vae import DecoderStage, VAEStage, encode_all, normalise_latents, psnr, reconstruct

log = logging.getLogger(__name__)

HELD_BACK = 64  # images that no stage trains on: the test set, for samples and progress figures
MIN_IMAGES = 8


class TrainingRun:
    """Trains all stages in one folder: `train` trains one stage, `write_checkpoint` saves the finished model."""

    def __init__(
        self,
        out: Path,
        folder: Path | None = None,
        scenes: int = 20000,
        device: str | None = None,
        seed: int = 0,
        save_every: float = 3,
        config: ModelConfig = TINY,
        start: Path | None = None,
        accumulate: int = 1,
        recompute: bool = False,
    ):
        """Train in the folder `out`, on the images in `folder` or, if that is None, on this number of `scenes`.

        `save_every` is in minutes. `start` is the checkpoint of a finished model: stages `text`, `diffusion` and
        `decoder` then train its networks further, all but its encoder. `accumulate` and `recompute` save memory: see
        `Training` and `recompute_activations`.

        Raises FileNotFoundError or CheckpointError if `start` cannot be read, ValueError if the images cannot be used
        or if `out` is their folder or that of another run, OSError if `out` cannot be written.
        """
        self.out, self.seed, self.save_every = out, seed, save_every
        self.accumulate, self.recompute = accumulate, recompute
        self.in_pairs = folder is None  # neighbouring scenes differ only in where their colours or things are
        self.device = best_device(device)
        self.start = start and load_models(start, "cpu", torch.float32, tuned=False)
        if self.start and self.start.config.unet.inpaints:  # its U-Net also takes a mask and a masked image
            raise TrainingError(
                f"{start} is an inpainting model, which cannot be trained further: choose another --start."
            )
        self.config = self.start.config if self.start else config
        self.tokenizer = self.start.tokenizer if self.start else Tokenizer()
        self.record = make_record(scenes, folder, seed, start, self.start)
        if self.record["pictures"] < MIN_IMAGES:
            raise TrainingError(
                f"The number of training images should be at least {MIN_IMAGES}, not {self.record['pictures']}."
            )
        make_folder(out, folder, self.record)
        check_result(out / "tiny.ckpt", out / "diffusion.state")
        size = self.config.image_size
        images = load_folder(folder, out, size) if folder else load_scenes(out, scenes, size)
        held_back = min(HELD_BACK, -(-len(images) // 10))
        split = len(images) - held_back
        self.train_set = CaptionedImages(images.pixels[:split], images.captions[:split])
        self.test_set = CaptionedImages(images.pixels[split:], images.captions[split:])

    @explain_out_of_memory(ADVICE_FOR_TRAINING)
    def train(self, name: str, minutes: float, steps: int | None = None) -> None:
        """Train stage `name` (vae, text, diffusion or decoder) for about `minutes`, or for `steps`; or resume it.

        Raises TrainingError if it cannot start or continue, OutOfMemory, OSError if its files cannot be written.
        """
        if self.start and name == "vae":  # other latents would be of no use to its U-Net
            raise TrainingError("With a start model, the stage should be text, diffusion or decoder, not vae.")
        stage = self._stage(name)
        if self.recompute:
            recompute_activations(stage.networks)
        training = Training(stage, self.out, self.device, minutes, steps, self.seed, self.record, self.accumulate)
        show = {"text": self._show_text, "diffusion": self._show_diffusion}.get(name, self._show_vae)
        train_with_bar(training, self.save_every, show)

    def _stage(self, name: str) -> Stage:
        """An untrained stage. It depends only on the seed and on the files of earlier stages."""
        # This comes before the seed is set: it may build networks, which draws random numbers, and how many depends on
        # whether the latents are saved already.
        unet_inputs = self._unet_inputs() if name == "diffusion" else ()
        torch.manual_seed(self.seed)
        if name == "vae":
            return VAEStage(self.config.vae, self.train_set)
        if name == "text":
            start = self.start and self.start.clip
            return TextStage(self.config.text, self.train_set, self.tokens, in_pairs=self.in_pairs, start=start)
        if name == "decoder":
            encoder, decoder = self._plain_vae()
            whole_images = VAEStage(self.config.vae, self.train_set, crop=self.config.image_size)
            return DecoderStage(whole_images, encoder.to(self.device), decoder)
        return DiffusionStage(self.config.unet, self.config.schedule, *unet_inputs, self.start and self.start.diffusion)

    def _unet_inputs(self) -> tuple[tuple[Tensor, Tensor], list[Tensor], Tensor, CLIP]:
        """What the U-Net is trained with: latents, tokens, the tokens of the empty caption, the text encoder."""
        clip = self.clip.to(self.device)
        return self._latents(), self.tokens, self.tokenizer([""]), clip

    @cached_property
    def tokens(self) -> list[Tensor]:
        """The captions as token ids: for each training image int32 (number of captions, 77)."""
        return tokenise(self.train_set, self.tokenizer)

    @cached_property
    def test_tokens(self) -> list[Tensor]:
        """The captions of the test images as token ids, like `tokens`."""
        return tokenise(self.test_set, self.tokenizer)

    @cached_property
    def vae(self) -> tuple[Encoder, Decoder]:
        """The trained autoencoder that makes the U-Net's latents. Loaded once, when it is first needed."""
        return self._finished_vae()

    def _finished_vae(self) -> tuple[Encoder, Decoder]:
        """The trained autoencoder, with the decoder of the last stage if there is one, and latents of unit variance."""
        encoder, decoder = self._plain_vae()
        if (self.out / "decoder.state").exists():
            decoder.load_state_dict(_part(load_state(self.out / "decoder.state")["average"], "decoder"))
        if self.start:  # its latents have unit variance already
            return encoder.eval().requires_grad_(False), decoder.eval().requires_grad_(False)
        sample = CaptionedImages(self.train_set.pixels[:1000], self.train_set.captions[:1000])
        means = encode_all(encoder.to(self.device), sample, self.device)[0].float()
        mean, std = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
        normalise_latents(encoder.cpu(), decoder, mean, std)
        return encoder.eval().requires_grad_(False), decoder.eval().requires_grad_(False)

    def _plain_vae(self) -> tuple[Encoder, Decoder]:
        """The autoencoder of stage 1: before its latents are normalised, and with its first decoder. Or that of the
        start model."""
        if self.start:
            return copy.deepcopy((self.start.encoder, self.start.decoder))
        average = load_state(self.out / "vae.state")["average"]
        encoder, decoder = Encoder(self.config.vae), Decoder(self.config.vae)
        encoder.load_state_dict(_part(average, "encoder"))
        decoder.load_state_dict(_part(average, "decoder"))
        return encoder, decoder

    @cached_property
    def clip(self) -> CLIP:
        """The trained text encoder, frozen: that of stage `text`, or without one, of the start model."""
        if self.start and not (self.out / "text.state").exists():
            return self.start.clip
        average = load_state(self.out / "text.state")["average"]
        clip = CLIP(self.config.text)
        clip.load_state_dict(_part(average, "captions.clip"))
        if not self.start:  # its unknown tokens are silent already, and it knows words that no caption here has
            silence_unknown_tokens(clip, self.tokens)
        return clip.eval().requires_grad_(False)

    def _latents(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of all training images, saved for the next time."""
        path = self.out / "latents.state"
        source = 0 if self.start else (self.out / "vae.state").stat().st_mtime_ns  # the record knows the start model
        if path.exists():
            known = load_state(path)
            if known["source"] == source and known.get("record") == self.record:
                return known["means"], known["stds"]
        means, stds = encode_all(self.vae[0].to(self.device), self.train_set, self.device, shared=True)
        if ranks.rank() == 0:
            save_atomically({"source": source, "record": self.record, "means": means, "stds": stds}, path)
        return means, stds

    def _show_vae(self, training: Training) -> str:
        """Write a grid of test images, each next to its reconstruction. Returns a line for the log."""
        encoder = training.average["encoder"] if training.stage.name == "vae" else training.stage.encoder
        images = self.test_set.batch(torch.arange(min(16, len(self.test_set)))).to(self.device)
        copies = reconstruct(encoder, training.average["decoder"], images)
        name = training.stage.name
        write_grid(self.out / f"{name}.png", torch.stack([images, copies], dim=1).flatten(0, 1))
        return f"{name}, step {training.step}: {psnr(images, copies).mean():.2f} dB on test images"

    @torch.no_grad()
    def _show_text(self, training: Training) -> str:
        """Measure how often a test image is matched with its own caption. Returns a line for the log."""
        captions: CaptionEncoder = training.average["captions"]
        tokens = torch.stack([choices[0] for choices in self.test_tokens]).long().to(self.device)
        images = self.test_set.batch(torch.arange(len(self.test_set))).to(self.device)
        share = retrieval(training.average["pictures"](images), captions(tokens))
        return f"text, step {training.step}: {share:.0%} of {len(tokens)} test images are matched with their caption"

    def _show_diffusion(self, training: Training) -> str:
        """Write a grid of generated images, with captions of test images as prompts. Returns a line for the log."""
        models = self._models(training.average["diffusion"])
        prompts = [max(choices, key=len) for choices in self.test_set.captions[:16]]
        latents = draw_latents(models, prompts, "ddpm", steps=20, cfg_scale=5.0)
        write_grid(self.out / "diffusion.png", decode(models, latents))
        lines = "".join(f"{' '.join(prompt.split())}\n" for prompt in prompts)
        (self.out / "diffusion.txt").write_text(lines, encoding="utf-8")
        return f"diffusion, step {training.step}: see {self.out / 'diffusion.png'}"

    def _models(self, unet: Diffusion) -> Models:
        """All networks, to generate images with this U-Net."""
        encoder, decoder = (network.to(self.device) for network in self.vae)
        clip = self.clip.to(self.device)
        return Models(clip, encoder, decoder, unet.eval(), self.tokenizer, self.config, self.device)

    @property
    def complete(self) -> bool:
        """Whether there is a state of every network that `write_checkpoint` needs."""
        needed = ("diffusion",) if self.start else ("vae", "text", "diffusion")
        return all((self.out / f"{name}.state").exists() for name in needed)

    def write_checkpoint(self) -> Path:
        """Write the trained networks to `out`/tiny.ckpt, in float16, for `load_models`. Returns the path.

        What the U-Net predicts is written as it was trained, whatever this run's configuration says.
        """
        trained, unet = load_state(self.out / "diffusion.state"), Diffusion(self.config.unet)
        unet.load_state_dict(_part(trained["average"], "diffusion"))
        schedule = replace(self.config.schedule, prediction_type=trained["config"]["predicts"])
        encoder, decoder = self._finished_vae()  # not self.vae: the decoder may be newer
        models = SimpleNamespace(clip=self.clip, encoder=encoder, decoder=decoder, diffusion=unet)
        state = {k: t.half() if t.is_floating_point() else t for k, t in to_compvis(models).items()}
        path = self.out / "tiny.ckpt"
        write_checkpoint(path, state, replace(self.config, schedule=schedule).to_dict())
        return path


def train_with_bar(training: Training, save_every: float, show: Callable[[Training], str]) -> None:
    """Train until all steps are done, with a progress bar. Every `save_every` minutes the state is saved, and what
    `show` returns is logged. Raises what `Training.run` raises."""
    if training.done:
        log.info("Stage %s is finished, after %d steps.", training.stage.name, training.step)
    options = {"desc": training.stage.name, "mininterval": 1, "disable": ranks.rank() > 0}
    with tqdm(total=training.total, initial=training.step, **options) as bar:

        def report(progress: Progress) -> None:
            bar.total = progress.total
            bar.set_postfix(
                {"loss": f"{progress.loss:.4f}", "samples/s": f"{progress.samples_per_second:.0f}"}, refresh=False
            )
            bar.update()

        training.run(report, 60 * save_every, lambda: log.info(show(training)))


def write_grid(path: Path, images: Tensor | np.ndarray, columns: int = 8) -> None:
    """Write images, (N, 3, H, W) in [-1, 1] or uint8 (N, H, W, 3), in rows of `columns`."""
    arrays = tensor_to_array(images) if isinstance(images, Tensor) else images
    height, width = arrays.shape[1:3]
    rows = -(-len(arrays) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, array in enumerate(arrays):
        sheet.paste(Image.fromarray(array), (i % columns * width, i // columns * height))
    write_png(path, sheet, overwrite=True)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose keys start with `prefix` and a dot, without these."""
    return {key.removeprefix(f"{prefix}."): t for key, t in state.items() if key.startswith(f"{prefix}.")}
