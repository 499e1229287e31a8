"""A folder in which a model comes to be: the three stages in order, each building on the file of the one before.

In: the folder, and what to train on; or a finished model too, whose U-Net then learns further. Out: a state file and a
sample grid of each stage, and in the end `tiny.ckpt`, in the layout of the published Stable Diffusion checkpoints.
"""

from __future__ import annotations

import logging
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
from sd.pipeline import decode_latents, denoise, encode_prompt, get_latents
from sd.runtime.devices import best_device
from sd.samplers import SAMPLERS
from sd.tokenizer import Tokenizer
from sd.training.data import Pictures, load_folder, load_scenes
from sd.training.diffusion import DiffusionStage
from sd.training.loop import Progress, Stage, Training, TrainingError, load_state, save_atomically
from sd.training.record import check_folder, make_record
from sd.training.text import CaptionEncoder, TextStage, retrieval, silence_unknown_tokens, tokenise
from sd.training.vae import DecoderStage, VAEStage, encode_all, normalise_latents, psnr, reconstruct

log = logging.getLogger(__name__)

HELD_BACK = 64  # pictures of the set that no stage trains on: they tell how well it goes
FEWEST = 8  # pictures to train on


class TrainingRun:
    """What the stages share: the pictures, the device, the folder."""

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
    ):
        """`save_every` is in minutes. `start` is a checkpoint: its text encoder and autoencoder stay as they are, and
        `diffusion`, the only stage then, begins with its U-Net. Raises FileNotFoundError or CheckpointError for a
        `start` that cannot be read, ValueError for pictures that cannot be used or an `out` that holds another run,
        OSError for `out`."""
        self.out, self.seed, self.save_every = out, seed, save_every
        self.device = best_device(device)
        self.start = start and load_models(start, "cpu", torch.float32, tuned=False)
        if self.start and self.start.config.unet.inpaints:  # its U-Net wants a mask and a masked picture too
            raise TrainingError(f"{start} is an inpainting model, which cannot learn further: give another --start.")
        self.source = start or out / "vae.state"  # of the latents
        self.config = self.start.config if self.start else config
        self.tokenizer = Tokenizer()
        self.record = make_record(scenes, folder, seed, start, self.start)
        if self.record["pictures"] < FEWEST:
            raise TrainingError(f"{self.record['pictures']} pictures are too few to train on: {FEWEST} are the least.")
        check_folder(out, self.record)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise TrainingError(f"The folder {out} cannot be used: a file of that name is in the way.") from None
        size = self.config.image_size
        everything = load_folder(folder, out, size) if folder else load_scenes(out, scenes, size)
        held_back = min(HELD_BACK, -(-len(everything) // 10))
        split = len(everything) - held_back
        self.pictures = Pictures(everything.pixels[:split], everything.captions[:split])
        self.test = Pictures(everything.pixels[split:], everything.captions[split:])

    def train(self, name: str, minutes: float, steps: int | None = None) -> None:
        """Trains one stage, or goes on with it. Raises TrainingError if it cannot, OSError if `out` is full."""
        if self.start and name != "diffusion":
            raise TrainingError(f"A finished model can go on with only stage diffusion, not {name}.")
        training = Training(self._stage(name), self.out, self.device, minutes, steps, self.seed, self.record)
        if training.done:
            log.info("%s is finished, after %d steps.", name, training.step)
        look = {"text": self._look_at_text, "diffusion": self._look_at_diffusion}.get(name, self._look_at_vae)
        with tqdm(total=training.total, initial=training.step, desc=name, mininterval=1) as bar:

            def report(progress: Progress) -> None:
                bar.total = progress.total
                bar.set_postfix(
                    {"loss": f"{progress.loss:.4f}", "samples/s": f"{progress.samples_per_second:.0f}"}, refresh=False
                )
                bar.update()

            training.run(report, 60 * self.save_every, lambda: log.info(look(training)))

    def _stage(self, name: str) -> Stage:
        """The stage at its beginning, which depends on nothing but the seed and the files of the stages before."""
        # Before the seed is set: building networks uses random numbers up, and some are built only while there are no
        # latents yet.
        ready = self._frozen() if name == "diffusion" else ()
        torch.manual_seed(self.seed)
        if name == "vae":
            return VAEStage(self.config.vae, self.pictures)
        if name == "text":
            return TextStage(self.config.text, self.pictures, self.tokens)
        if name == "decoder":
            encoder, decoder = self._plain_vae()
            whole = VAEStage(self.config.vae, self.pictures, crop=self.config.image_size)
            return DecoderStage(whole, encoder.to(self.device), decoder)
        return DiffusionStage(self.config.unet, self.config.schedule, *ready, self.start and self.start.diffusion)

    def _frozen(self) -> tuple[tuple[Tensor, Tensor], list[Tensor], Tensor, CLIP]:
        """What the U-Net learns from: latents, tokens, those of the empty caption, and the text encoder."""
        clip = self.clip.to(self.device)
        return self._latents(), self.tokens, self.tokenizer([""]), clip

    @cached_property
    def tokens(self) -> list[Tensor]:
        """Of the captions of each picture, int32 (captions, 77)."""
        return tokenise(self.pictures, self.tokenizer)

    @cached_property
    def vae(self) -> tuple[Encoder, Decoder]:
        """The trained autoencoder as it was when first needed: what the U-Net's latents are made with."""
        return (self.start.encoder, self.start.decoder) if self.start else self._finished_vae()

    def _finished_vae(self) -> tuple[Encoder, Decoder]:
        """The trained autoencoder, with the last decoder that there is, its latents brought to unit variance."""
        encoder, decoder = self._plain_vae()
        if (self.out / "decoder.state").exists():
            decoder.load_state_dict(_part(load_state(self.out / "decoder.state")["average"], "decoder"))
        sample = Pictures(self.pictures.pixels[:1000], self.pictures.captions[:1000])
        means = encode_all(encoder.to(self.device), sample, self.device)[0].float()
        mean, std = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
        normalise_latents(encoder.cpu(), decoder, mean, std)
        return encoder.eval().requires_grad_(False), decoder.eval().requires_grad_(False)

    def _plain_vae(self) -> tuple[Encoder, Decoder]:
        """The autoencoder as its own stage left it."""
        average = load_state(self.out / "vae.state")["average"]
        encoder, decoder = Encoder(self.config.vae), Decoder(self.config.vae)
        encoder.load_state_dict(_part(average, "encoder"))
        decoder.load_state_dict(_part(average, "decoder"))
        return encoder, decoder

    @cached_property
    def clip(self) -> CLIP:
        """The trained text encoder, frozen."""
        if self.start:
            return self.start.clip
        average = load_state(self.out / "text.state")["average"]
        clip = CLIP(self.config.text)
        clip.load_state_dict(_part(average, "captions.clip"))
        silence_unknown_tokens(clip, self.tokens)
        return clip.eval().requires_grad_(False)

    def _latents(self) -> tuple[Tensor, Tensor]:
        """The latents of all pictures, made once for each autoencoder and training set."""
        path, source = self.out / "latents.state", self.source.stat().st_mtime_ns
        if path.exists():
            known = load_state(path)
            if known["source"] == source and known.get("record") == self.record:
                return known["means"], known["stds"]
        means, stds = encode_all(self.vae[0].to(self.device), self.pictures, self.device)
        save_atomically({"source": source, "record": self.record, "means": means, "stds": stds}, path)
        return means, stds

    def _look_at_vae(self, training: Training) -> str:
        encoder = training.average["encoder"] if training.stage.name == "vae" else training.stage.encoder
        images = self.test.batch(torch.arange(min(16, len(self.test)))).to(self.device)
        copies = reconstruct(encoder, training.average["decoder"], images)
        name = training.stage.name
        self._grid(name, torch.stack([images, copies], dim=1).flatten(0, 1))
        return f"{name}, step {training.step}: {psnr(images, copies).mean():.2f} dB on pictures not trained on"

    @torch.no_grad()
    def _look_at_text(self, training: Training) -> str:
        captions: CaptionEncoder = training.average["captions"]
        tokens = self.tokenizer([choices[0] for choices in self.test.captions]).to(self.device)
        images = self.test.batch(torch.arange(len(self.test))).to(self.device)
        share = retrieval(training.average["pictures"](images), captions(tokens))
        return f"text, step {training.step}: {share:.0%} of {len(tokens)} pictures find their caption"

    def _look_at_diffusion(self, training: Training) -> str:
        models = self._models(training.average["diffusion"])
        prompts = [max(choices, key=len) for choices in self.test.captions[:16]]
        sampler = SAMPLERS["ddpm"](torch.Generator().manual_seed(0), schedule=self.config.schedule)
        sampler.set_inference_timesteps(20)
        context = encode_prompt(models, prompts)
        latents = get_latents(models, len(prompts), seed=0)
        for step in denoise(models, latents, context, sampler, cfg_scale=5.0):
            latents = step.latents
        self._grid("diffusion", decode_latents(models, latents))
        (self.out / "diffusion.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        return f"diffusion, step {training.step}: see {self.out / 'diffusion.png'}"

    def _models(self, unet: Diffusion) -> Models:
        encoder, decoder = (network.to(self.device) for network in self.vae)
        clip = self.clip.to(self.device)
        return Models(clip, encoder, decoder, unet.eval(), self.tokenizer, self.config, self.device)

    def _grid(self, name: str, images: Tensor | np.ndarray, columns: int = 8) -> None:
        """Pictures in rows of eight -> out/name.png."""
        arrays = tensor_to_array(images) if isinstance(images, Tensor) else images
        height, width = arrays.shape[1:3]
        rows = -(-len(arrays) // columns)
        sheet = Image.new("RGB", (columns * width, rows * height))
        for i, array in enumerate(arrays):
            sheet.paste(Image.fromarray(array), (i % columns * width, i // columns * height))
        write_png(self.out / f"{name}.png", sheet, overwrite=True)

    @property
    def complete(self) -> bool:
        """Whether every network has been trained, if only a little."""
        needed = ("diffusion",) if self.start else ("vae", "text", "diffusion")
        return all((self.out / f"{name}.state").exists() for name in needed)

    def write_checkpoint(self) -> Path:
        """The three stages in one file, float16, as `load_models` reads it."""
        unet = Diffusion(self.config.unet)
        unet.load_state_dict(_part(load_state(self.out / "diffusion.state")["average"], "diffusion"))
        encoder, decoder = self.vae if self.start else self._finished_vae()  # with the polished decoder
        models = SimpleNamespace(clip=self.clip, encoder=encoder, decoder=decoder, diffusion=unet)
        state = {k: t.half() if t.is_floating_point() else t for k, t in to_compvis(models).items()}
        path = self.out / "tiny.ckpt"
        write_checkpoint(path, state, self.config.to_dict())
        return path


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): t for key, t in state.items() if key.startswith(f"{prefix}.")}
