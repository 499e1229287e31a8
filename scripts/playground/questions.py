"""In the worker: what is answered at once, also while a picture is being drawn."""

from __future__ import annotations

from scripts.playground import files
from scripts.support.saved_settings import SAMPLER_NAMES
from sd.adapters.textual_inversion import read_embedding
from sd.inside.report.tokens import token_text
from sd.prompts.other_tools import adapt, take_loras
from sd.prompts.weights import chunks_of
from sd.samplers import SAMPLERS
from sd.training.world.vocabulary import unknown_words

CURVE_POINTS = 101


def about(studio) -> dict:
    """The model, its defaults and its samplers."""
    models, checkpoint, vae = studio.models, studio.options.checkpoint, studio.options.vae
    config = models.config
    sampler = SAMPLERS[config.sampling.sampler](schedule=config.schedule)
    last = len(sampler.alphas_cumprod) - 1
    points = [round(i * last / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)]
    return {
        "model": checkpoint.stem if checkpoint else "tiny",
        "file": checkpoint.name if checkpoint else "tiny.ckpt",
        "vae": vae.name if vae else None,
        "tiny": checkpoint is None,
        "fast": "tiny-lcm" in files.lora_files(checkpoint),
        "device": str(models.device),
        "dtype": str(next(models.diffusion.parameters()).dtype).removeprefix("torch."),
        "image_size": config.image_size,
        "downscale": config.vae.downscale,
        "prediction": config.schedule.prediction_type,
        "inpaints": config.unet.inpaints,
        "defaults": vars(config.sampling),
        "schedule": {"timesteps": points, "alphas_cumprod": [sampler.alphas_cumprod[t].item() for t in points]},
        "samplers": [_sampler(name) for name in SAMPLERS],
    }


def _sampler(name: str) -> dict:
    base, karras, _ = name.partition("_karras")
    most = SAMPLERS[name].max_steps
    label = SAMPLER_NAMES.get(base, base) + " Karras" * bool(karras)
    steps = {"default_steps": SAMPLERS[name].default_steps, "max_steps": None if most == float("inf") else most}
    return {"name": name, "label": label, **steps}


def check(studio, message: dict) -> dict:
    """What is known of a picture before it is drawn. Raises ValueError if it cannot be drawn."""
    prepared = studio.prepare(message["work"])
    request = prepared.request
    names = ("seed", "width", "height", "sampler_name", "n_inference_steps", "cfg_scale")
    return {name: getattr(request, name) for name in names} | {"notes": prepared.notes}


def tokens(studio, message: dict) -> dict:
    """The tokens of a prompt, in the chunks that the text encoder gets. Raises ValueError as `chunks_of` does."""
    tokenizer = studio.models.tokenizer
    prompt, notes = adapt(message["prompt"])
    prompt, tags = take_loras(prompt)
    chunks = []
    for chunk in chunks_of(prompt, tokenizer):
        pieces, joined = [], False
        for token, weight in chunk:
            text, ends_word = token_text(tokenizer, token)
            pieces.append({"text": text, "id": token, "weight": weight, "joined": joined})
            joined = not ends_word
        chunks.append(pieces)
    room = tokenizer.context_length - 2  # without the start and the end token
    unknown = unknown_words(prompt, studio.models) if studio.options.checkpoint is None else []
    return {
        "chunks": chunks,
        "count": sum(map(len, chunks)),
        "room": room,
        "loras": [{"name": tag.name, "strength": tag.unet} for tag in tags],
        "notes": list(notes.values()),
        "unknown": list(unknown)[:20],
    }


def listed(studio, _message: dict) -> dict:
    """The files in data/ that a request may name."""
    checkpoint = studio.options.checkpoint
    return {
        "loras": [{"name": name, "file": path.name} for name, path in files.lora_files(checkpoint).items()],
        "controls": [{"name": name, "file": path.name} for name, path in files.control_files(checkpoint).items()],
        "embeddings": [{"name": word, "file": path.name} for word, path in files.embedding_files().items()],
    }


def embeddings(studio, _message: dict) -> dict:
    """The embeddings that prompts may name, and those that do not fit the model, as AUTOMATIC1111 lists them."""
    found: dict[str, dict] = {"loaded": {}, "skipped": {}}
    for word, path in files.embedding_files().items():
        values = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
        try:
            vectors = read_embedding(path, word).vectors  # (n, width)
            fits = vectors.shape[1] == studio.models.config.text.width
            values |= {"shape": vectors.shape[1], "vectors": len(vectors)}
        except (ValueError, OSError):
            fits, values = False, values | {"shape": 0, "vectors": 0}
        found["loaded" if fits else "skipped"][word] = values
    return found


QUESTIONS = {"check": check, "tokens": tokens, "files": listed, "embeddings": embeddings}
