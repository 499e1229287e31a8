"""Textual inversion: one new word, learned from a few pictures, while all networks stay as they are (2208.01618).

The word S* is one or more new rows v* of the text encoder's table of embeddings. They are what the U-Net needs to
predict the noise in the pictures (eq. 2):

    v* = arg min_v  E |e - e_theta(z_t, t, c_theta(y))|^2         z_t: a noised picture,  y: "a photo of S*"

In: a finished model, pictures, and the captions y, which have the word. Out: the rows, in a file that other programs
read as well. How they are used: `sd.adapters.textual_inversion`.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.adapters.textual_inversion import Embedding, with_embeddings
from sd.checkpoints.files import write_checkpoint
from sd.clip import CLIP
from sd.config import ModelConfig
from sd.model_loader import TINY_CHECKPOINT, load_models
from sd.models import Models
from sd.noise import make_betas
from sd.prompts.added_words import words_in
from sd.runtime.devices import best_device
from sd.runtime.out_of_memory import ADVICE_FOR_TRAINING, explain_out_of_memory
from sd.tokenizer import clean
from sd.training.captions import DataError, read_captions
from sd.training.data import load_folder
from sd.training.evaluation import draw_prompts
from sd.training.latents import Latents, spread_timesteps
from sd.training.loop import Training, TrainingError, load_state
from sd.training.losses import diffusion_loss
from sd.training.precision import product_dtype
from sd.training.recompute import recompute_activations
from sd.training.record import check_result, make_folder, make_record
from sd.training.stages import train_with_bar, write_grid
from sd.training.text import tokenise
from sd.training.vae import encode_all

log = logging.getLogger(__name__)

MOST_VECTORS = 16
FASTER = 5
LARGE = 256  # pixels, from which on a model is not one like the tiny one
# Vectors and learning rate. In a small model, most words have no meaning, and so a LoRA needs vectors, too.
SUITED = {
    ("lora", "small"): (2, 3e-3),
    ("lora", "large"): (0, 5e-4),
    ("inversion", "small"): (4, 4e-3),
    ("inversion", "large"): (4, 1e-3),
}
FEW_PICTURES = 4
PLACES = ("", " in the snow", " by the sea", " at night")  # where samples show the new thing


class NewWord(nn.Module):
    """The rows v* of a new word, (n, width). Its tokens are `first`, `first` + 1, ..., the ids after the table's.

    The rows learn FASTER times as fast as a network at the same learning rate: they have a longer way to go.
    """

    def __init__(self, start: Tensor, first: int):
        super().__init__()
        self.first = first
        self.register_buffer("start", start.detach().float().clone())
        self.embedding_change = nn.Parameter(torch.zeros_like(self.start))

    @property
    def rows(self) -> Tensor:
        """v*, float32 (n, width)."""
        return self.start + FASTER * self.embedding_change

    def context(self, clip: CLIP, tokens: Tensor) -> Tensor:
        """tokens (B, 77), which may have the new ones -> the context (B, 77, width). Gradients reach the rows."""
        is_new = tokens >= self.first  # (B, 77)
        known = clip.token_embedding(tokens.masked_fill(is_new, 0))  # (B, 77, width)
        new = self.rows[(tokens - self.first).clamp(min=0)].to(known.dtype)  # (B, 77, width)
        rows = torch.where(is_new[..., None], new, known)
        return clip.encode(rows + clip.position_embedding.weight[: tokens.shape[1]])


class InversionStage:
    """A new word alone. The moving average of its rows makes the better pictures."""

    name = "inversion"
    divisible = True
    ema = 0.98

    def __init__(self, models: Models, networks: nn.ModuleDict, pictures: Latents, settings: NewThing):
        """models: those without the word; networks: the `NewWord` under "word"; pictures: with the tokens of the word
        in their captions; settings: without None."""
        self.config = settings.of(self.name)
        self.models, self.pictures = models, pictures
        self.learning_rate, self.batch_size = settings.learning_rate, settings.batch_size
        self.networks = networks
        self.unet = models.diffusion
        self.alphas_cumprod = torch.cumprod(1 - make_betas(models.config.schedule), 0).to(models.device)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A random batch: latents (B, 4, h, w), token ids (B, 77), timesteps (B,) and noise (B, 4, h, w)."""
        latents, tokens = self._latents(generator)
        steps = self.models.config.schedule.num_training_steps
        timesteps = spread_timesteps(self.batch_size, steps, generator)
        timesteps = timesteps[torch.randperm(self.batch_size, generator=generator)]  # rows of a kind are neighbours
        return latents, tokens, timesteps, torch.randn(latents.shape, generator=generator)

    def _latents(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.pictures.draw(self.batch_size, generator)

    def loss(self, latents: Tensor, tokens: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """2208.01618, eq. 2, with min-SNR weights."""
        clip, predicts = self.models.clip, self.models.config.schedule.prediction_type
        if "word" in self.networks:
            context = self.networks["word"].context(clip, tokens)  # (B, 77, D)
        else:
            with torch.no_grad():
                context = clip(tokens)
        return diffusion_loss(
            self._predict, latents, context, timesteps, noise, self.alphas_cumprod, predicts, min_snr=5.0
        )

    def _predict(self, noisy: Tensor, context: Tensor, timesteps: Tensor) -> Tensor:
        """The U-Net's output. It may be in bfloat16, and then so should its input."""
        return self.unet(noisy.to(context.dtype), context, timesteps)


@dataclass(frozen=True)
class NewThing:
    """The settings of a run that teaches a model one thing. None stands for what suits the model (`suited_to`)."""

    word: str  # what prompts call it
    kind: str | None = None  # what kind of thing it is, a word that the model knows: the class of 2208.12242
    vectors: int | None = None  # the rows of the word; 0: the word has the tokens that the tokenizer gives it
    rank: int = 8  # of the LoRA
    prior: float = 0.4  # the share of each batch that has prompts of other things
    learning_rate: float | None = None
    batch_size: int | None = None

    def suited_to(self, config: ModelConfig, stage: str) -> NewThing:
        """The same settings without None, for stage `inversion` or `lora`, and with the word as prompts have it."""
        small = config.image_size < LARGE
        vectors, rate = SUITED[stage, "small" if small else "large"]
        return replace(
            self,
            word=clean(self.word),
            kind=self.kind and clean(self.kind),
            vectors=vectors if self.vectors is None else self.vectors,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            batch_size=self.batch_size or (16 if small else 4),
        )

    def of(self, stage: str) -> dict:
        """The settings that matter to a stage, to compare them when it is resumed."""
        names = ["word", "kind", "vectors", "learning_rate", "batch_size"] + ["rank", "prior"] * (stage == "lora")
        return {name: getattr(self, name) for name in names}


FLAGS = {"kind": "--class", "batch_size": "--batch"}  # of settings whose flags have other names


class InversionRun:
    """Teaches a model a new word in one folder: `train`, then `write`."""

    stage = InversionStage
    least_vectors = 1

    def __init__(
        self,
        out: Path,
        pictures: Path,
        settings: NewThing,
        start: Path | None = None,
        device: str | None = None,
        seed: int = 0,
        save_every: float = 3,
        accumulate: int = 1,
        recompute: bool = False,
    ):
        """Train in the folder `out` on the captioned pictures of a folder. `start` is the model's checkpoint (default:
        the tiny model); `save_every` is in minutes. `accumulate` and `recompute` save memory: see `Training` and
        `recompute_activations`.

        In a folder without any captions, that of every picture is "a WORD".

        Raises what `load_models` raises for `start`, ValueError if the model, the pictures or the settings cannot be
        used or if `out` is the folder of another run, OSError if `out` cannot be written.
        """
        start = start or TINY_CHECKPOINT
        self.out, self.seed, self.save_every, self.name = out, seed, save_every, self.stage.name
        self.accumulate, self.recompute = accumulate, recompute
        _check_word(settings.word)
        self.captions = read_captions(pictures, usual=f"a {settings.word}")
        _check_captions(pictures, self.captions, settings.word)
        self.models = load_models(start, best_device(device), torch.float32, tuned=False)
        self.settings = settings.suited_to(self.models.config, self.name)
        self._check(start)
        self.rows = self._first_rows()
        self.record = make_record(0, pictures, seed, start, self.models, self.captions)
        if self.models.device.type == "cuda":  # what is not trained needs no float32, and has most of the numbers
            for network in (self.models.clip, self.models.diffusion):
                network.to(product_dtype(self.models.device))
        self._check_settings()
        self.tokenizer = self._with_word(self.rows).tokenizer
        make_folder(out, pictures, self.record)
        self.images = load_folder(pictures, out, self.models.config.image_size, self.captions)

    @property
    def path(self) -> Path:
        """The file that `write` writes. Its name is the word, as web UIs expect."""
        return self.out / f"{self.settings.word}.safetensors"

    def _check(self, start: Path) -> None:
        """Raise TrainingError for a model or settings that cannot be used."""
        config, settings = self.models.config, self.settings
        if config.unet.inpaints:
            raise TrainingError(f"{start} is an inpainting model, which cannot learn new things: choose another.")
        if config.sampling.cfg_scale <= 1:
            raise TrainingError(f"{start} draws in a few steps, which this training would undo: choose another.")
        if not self.least_vectors <= settings.vectors <= MOST_VECTORS:
            allowed = f"{self.least_vectors} to {MOST_VECTORS}"
            raise TrainingError(f"--vectors should be {allowed}, not {settings.vectors}.")
        if not 0 < settings.learning_rate < math.inf:  # false for NaN too
            raise TrainingError(f"--learning-rate should be a number above 0, not {settings.learning_rate:g}.")
        tokenizer, table = self.models.tokenizer, self.models.clip.token_embedding.weight
        tokens = tokenizer.encode(settings.word)
        known = bool(table[tokens].any(dim=1).all())
        if settings.kind == settings.word:
            raise TrainingError(f"--class should be another word than --word, not {settings.kind!r}.")
        if settings.kind and not table[tokenizer.encode(settings.kind)].any(dim=1).all():
            raise TrainingError(f"--class should be a word that the model knows, not {settings.kind!r}.")
        if not settings.vectors and not known:
            raise TrainingError(f"--vectors should be above 0: the model does not know the word {settings.word!r}.")
        if settings.vectors and known and len(tokens) == 1:
            log.info("The model knows the word %r: with the new file, it has the new meaning.", settings.word)
        if not settings.vectors and len(tokens) > 1:
            pieces = ", ".join(tokenizer.decode([token]) for token in tokens)
            log.info("The tokenizer splits %r into %d pieces: %s.", settings.word, len(tokens), pieces)

    def _first_rows(self) -> Tensor:
        """The rows of the word when training starts, (n, width): those of its kind, repeated; or else the mean of all
        rows that have a meaning."""
        table, n = self.models.clip.token_embedding.weight.float(), self.settings.vectors
        tokens = self.models.tokenizer.encode(self.settings.kind) if self.settings.kind else []
        rows = table[tokens] if tokens else table[table.any(dim=1)].mean(dim=0, keepdim=True)
        return rows.repeat(n, 1)[:n]

    def _check_settings(self) -> None:
        """Raise TrainingError if `out` has a run with other settings, or a file that was not trained there."""
        state = self.out / f"{self.name}.state"
        check_result(self.path, state)
        if not state.exists():
            return
        known = load_state(state, mapped=True)["config"]
        for name, value in self.settings.of(self.name).items():
            if known.get(name) != value:
                flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
                raise TrainingError(
                    f"{flag} should be {known.get(name)}, as in the run in {self.out}, not {value}: or choose another "
                    "--out."
                )

    @explain_out_of_memory(ADVICE_FOR_TRAINING)
    def train(self, minutes: float, steps: int | None = None) -> None:
        """Train for about `minutes`, or for `steps`; or resume. Raises TrainingError if it cannot start or continue,
        OutOfMemory, OSError if its files cannot be written."""
        stage = self._stage()
        if self.recompute:
            recompute_activations(stage.unet)
        device = self.models.device
        training = Training(stage, self.out, device, minutes, steps, self.seed, self.record, self.accumulate)
        train_with_bar(training, self.save_every, self._show)

    def _stage(self) -> InversionStage:
        return InversionStage(self.models, self._networks(), self._pictures(), self.settings)

    def _pictures(self) -> Latents:
        tokens = tokenise(self.images, self.tokenizer)
        return Latents(*encode_all(self.models.encoder, self.images, self.models.device, shared=True), tokens)

    def _with_word(self, rows: Tensor) -> Models:
        """The models with the new word, (n, width), if it has rows."""
        if not len(rows):
            return self.models
        return with_embeddings(self.models, [Embedding(self.path, (self.settings.word,), rows.detach())])

    def _trained(self, average: nn.ModuleDict) -> Models:
        """The models with what was trained."""
        return self._with_word(average["word"].rows if "word" in average else self.rows)

    def _show(self, training: Training) -> str:
        """Write a grid of images: rows with captions of the pictures, with the new thing in other places, and with
        others of its kind there. Returns a line for the log."""
        names = [self.settings.word, *filter(None, [self.settings.kind])]
        prompts = [captions[0] for captions in self.images.captions[: len(PLACES)]]
        prompts += [f"a {name}{place}" for name in names for place in PLACES]
        models, settings = self._trained(training.average), self.models.config.sampling
        sampling = settings.sampler, settings.steps, settings.cfg_scale
        parts = [prompts] if self.models.config.image_size < LARGE else [[prompt] for prompt in prompts]
        images = torch.cat([draw_prompts(models, part, *sampling) for part in parts])
        path = self.out / f"{self.name}.png"
        write_grid(path, images, len(PLACES))
        return f"{self.name}, step {training.step}: see {path}"

    def write(self) -> Path:
        """Write the rows as diffusers and web UIs read them, {"<word>": (n, width)}, in float16. Returns the path."""
        write_checkpoint(self.path, {f"<{self.settings.word}>": self._average()["word"].rows.detach().half()})
        return self.path

    def _average(self) -> nn.ModuleDict:
        """The average of what was trained, from the run's state."""
        networks = self._networks()
        networks.load_state_dict(load_state(self.out / f"{self.name}.state")["average"])
        return networks

    def _networks(self) -> nn.ModuleDict:
        """What is trained, as it begins."""
        word = NewWord(self.rows, len(self.models.clip.token_embedding.weight))
        return nn.ModuleDict({"word": word} if len(self.rows) else {})


def _check_word(word: str) -> None:
    """Raise TrainingError for a word that cannot be the name of a file and of a tensor."""
    if not re.fullmatch(r"[\w-]+( [\w-]+)*", word):
        raise TrainingError(f"--word should be of letters, digits, - and _, such as windmill, not {word[:80]!r}.")


def _check_captions(folder: Path, captions: dict[str, list[str]], word: str) -> None:
    """Raise DataError if a caption lacks the word. Logs a line for few pictures."""
    for name, texts in captions.items():
        for text in texts:
            if not words_in([text], [clean(word)]):
                raise DataError(f"A caption of {folder / name} should have the word {word!r}: it is {text[:80]!r}.")
    if len(captions) < FEW_PICTURES:
        log.warning("With fewer than %d pictures, their background becomes part of the new thing.", FEW_PICTURES)
