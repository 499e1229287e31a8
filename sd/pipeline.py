"""A prompt, and perhaps a picture -> a picture: four steps, and `generate`, which is those four in a row.

    prompt --tokenizer--> ids (B, 77) --clip--> context (B, 77, D)             encode_prompt
    noise, or image --encoder--> latents (B, 4, H/8, W/8)                      get_latents
    latents --(diffusion, sampler) x steps--> latents                         denoise
    latents --decoder--> image (B, 3, H, W) --> uint8 (B, H, W, 3)             decode_latents

Noise is drawn and latents are kept in float32 whatever the dtype of the networks is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sd.guidance import ImageLoss, by_loss, classifier_free
from sd.images import ImageSource, image_to_tensor, read_image, tensor_to_array
from sd.inpainting import InpaintingInputs, read_mask, read_mask_image, without_masked
from sd.models import Models
from sd.noise import draw_noise, make_generators
from sd.prompts.weights import join_chunks, layout, weigh
from sd.request import check_deep_cache, check_prompts, check_request, check_size
from sd.runtime.decode_in_strips import InStrips, needed
from sd.runtime.deep_cache import DeepCache
from sd.runtime.devices import Device, best_device, device_and_dtype, is_compiled, on_device
from sd.runtime.not_finite import check_finite, run_in_range
from sd.runtime.out_of_memory import explain_out_of_memory
from sd.sampler import Sampler
from sd.samplers import SAMPLERS
from sd.tokenizer import Tokenizer


@dataclass(frozen=True)
class Step:
    """What one step of `denoise` saw and made. All tensors are float32, (B, 4, H/8, W/8)."""

    index: int
    timestep: int | float
    latents: Tensor  # after the step
    denoised: Tensor  # x_0 as predicted at this step: where the picture seems to be heading
    noise: Tensor  # what the U-Net predicted, after guidance: the noise, or v where it predicts v (2202.00512)
    noise_uncond: Tensor | None  # likewise, for the negative prompt; None without guidance
    noise_cond: Tensor  # likewise, for the prompt


@explain_out_of_memory()
def generate(
    prompt: str | list[str],
    uncond_prompt: str | list[str] | None = "",
    input_image: ImageSource | None = None,
    mask_image: ImageSource | None = None,
    strength: float = 0.8,
    do_cfg: bool = True,
    cfg_scale: float | None = None,
    sampler_name: str | None = None,
    n_inference_steps: int | None = None,
    models: Models | None = None,
    seed: int | None = None,
    device: Device = None,
    idle_device: Device = None,
    tokenizer: Tokenizer | None = None,
    height: int | None = None,
    width: int | None = None,
    feather: float = 0,
    cfg_rescale: float = 0,
    deep_cache: int = 1,
) -> np.ndarray:
    """A picture for a prompt: uint8 (height, width, 3); for a list of N prompts (N, height, width, 3).

    A prompt may weigh its words, as in "a (red:1.3) house", and be very long: see `sd.prompts`. `uncond_prompt` says
    what the picture should not show (None is the same as ""), and `cfg_scale` how much more it should follow the prompt
    than that; without `do_cfg` neither counts. `cfg_rescale`, from 0 to 1, softens what a large scale overdoes.
    `input_image` is the picture to start from, cropped to the size asked for; `strength`, in (0, 1], is how much of it
    may change, and `mask_image` where: white is repainted, black stays to the byte, and the edges are softened over
    `feather` pixels. `seed` makes the picture repeatable: to the byte on one machine with one number of threads and one
    torch, to a level or two elsewhere; picture i of a list is the one that `seed + i` would give alone. (A decoder that
    finds little memory free works in strips, which may change a picture of trained weights by a level.) `height` and
    `width` are multiples of 8, by default the size that the model was trained on. `device` is where to compute, and
    `idle_device` where networks wait for their turn. `models` defaults to the tiny model, `tokenizer` to the models'
    own, and `sampler_name`, `n_inference_steps` and `cfg_scale` to what their configuration says. With a `deep_cache`
    of 2 or 3, so many steps share what the deep stages of the U-Net make: much faster, a slightly different picture.

    Raises ValueError, before any work, for an argument that cannot be, and what `read_image` and `load_models` raise;
    OutOfMemory, with advice, where memory runs out; NotFiniteError if a network gives NaN or infinity.
    """
    check_request(**locals())  # every argument, under its own name
    input_image = None if input_image is None else read_image(input_image)
    mask_image = None if mask_image is None else read_mask_image(mask_image, input_image)
    if models is None:
        from sd.model_loader import load_models  # only here: whoever brings models needs no checkpoint reader

        models = load_models(device=device)
    device = models.device if device is None else best_device(device)
    if idle_device is not None and is_compiled(models.diffusion):
        raise ValueError("idle_device should be None for compiled models: their graphs know where the weights lie.")
    models = replace(models, tokenizer=tokenizer or models.tokenizer, device=device)
    prompts = [prompt] if isinstance(prompt, str) else prompt

    with on_device(models.clip, device, idle_device):
        context = encode_prompt(models, prompts, (uncond_prompt or "") if do_cfg else None)
    with on_device(models.encoder, device, idle_device):
        size_and_pictures = (height, width, input_image, mask_image, strength, feather)
        sampler, latents, known = prepare(
            models, len(prompts), sampler_name, n_inference_steps, seed, *size_and_pictures
        )
    with on_device(models.diffusion, device, idle_device):
        steps = denoise(models, latents, context, sampler, cfg_scale, known, cfg_rescale, deep_cache=deep_cache)
        for step in tqdm(steps, total=len(sampler.timesteps)):
            latents = step.latents
    with on_device(models.decoder, device, idle_device):
        images = decode_latents(models, latents)
    images = known.restore_pixels(images) if known else images
    return images[0] if isinstance(prompt, str) else images


def prepare(
    models: Models,
    batch_size: int,
    sampler_name: str | None = None,
    n_inference_steps: int | None = None,
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
    input_image: ImageSource | None = None,
    mask_image: ImageSource | None = None,
    strength: float = 0.8,
    feather: float = 0,
) -> tuple[Sampler, Tensor, InpaintingInputs | None]:
    """A sampler, the latents (B, 4, height / 8, width / 8) that it starts from, and what it must keep of a picture.

    The arguments are those of `generate`; `arguments.check_request` checks them, this does not.
    """
    strength = 1 if input_image is None else strength
    generators = make_generators(seed, batch_size)
    usual = models.config.sampling
    sampler = SAMPLERS[sampler_name or usual.sampler](generators, schedule=models.config.schedule)
    if n_inference_steps is not None or sampler_name is None:  # a sampler that is asked for has a default of its own
        sampler.set_inference_timesteps(int(n_inference_steps or usual.steps))
    sampler.set_strength(strength)
    start = (models, batch_size, height, width, generators, input_image)
    if mask_image is None and not models.config.unet.inpaints:
        return sampler, get_latents(*start, sampler), None
    known = get_inpainting_inputs(*start, mask_image, feather)
    return sampler, known.start(sampler, strength), known


@torch.no_grad()
def encode_prompt(
    models: Models, prompt: str | list[str], uncond_prompt: str | list[str] | None = "", plain: bool = False
) -> Tensor:
    """B prompts -> context (2B, 77 k, D), the unconditional half first; (B, 77 k, D) where `uncond_prompt` is None.

    One `uncond_prompt` serves all prompts; of a list each has its own. Weights, as in "(word:1.3)", and BREAK are
    obeyed. k is the least common multiple of the numbers of chunks that the texts take, and the context of a text that
    takes fewer is repeated, which changes no picture: see `sd.prompts`. With `plain` brackets and BREAK are text like
    any other, a prompt that is longer than 75 tokens is truncated, with a warning, and k is 1.

    Raises ValueError for anything but texts, for another number of negative prompts than of prompts, and as
    `prompts.layout` does; NotFiniteError if the text encoder gives NaN or infinity.
    """
    check_prompts(prompt, uncond_prompt)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    unconds = [] if uncond_prompt is None else uncond_prompt
    unconds = [unconds] * len(prompts) if isinstance(unconds, str) else unconds
    texts = [*unconds, *prompts]
    if plain:
        return _encode_text(models, models.tokenizer(texts))  # (2B, 77, D)
    tokens, weights, counts = layout(texts, models.tokenizer)  # (N, 77) both
    return join_chunks(weigh(_encode_text(models, tokens), weights), counts)  # (2B, 77 k, D), from (N, 77, D)


def _encode_text(models: Models, tokens: Tensor) -> Tensor:
    """Token ids (N, 77) -> their context (N, 77, D)."""
    return check_finite(models.clip(tokens.to(device_and_dtype(models.clip)[0])), models.clip, "text encoder")


@torch.no_grad()
def get_latents(
    models: Models,
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
    seed: int | list[torch.Generator] | None = None,
    input_image: ImageSource | None = None,
    sampler: Sampler | None = None,
) -> Tensor:
    """What to start from: float32 latents (B, 4, height / 8, width / 8), pure noise unless there is an `input_image`.

    The image is encoded, and noised to the level of the first timestep that the `sampler` visits. `seed` may also be
    the list of generators that the sampler goes on drawing from. Raises ValueError for a size that cannot be, an image
    without a sampler or another number of generators, and what `read_image` raises.
    """
    height, width = _size(models, height, width)
    generators = seed if isinstance(seed, list) else make_generators(seed, batch_size)
    noise = draw_noise(_latent_shape(models, batch_size, height, width), generators)
    if input_image is None:
        return noise.to(device_and_dtype(models.diffusion)[0])
    if sampler is None:
        raise ValueError("sampler should be given with input_image: it knows how much noise to add.")
    latents = _encode(models, image_to_tensor(input_image, height, width), noise)
    return sampler.add_noise(latents, sampler.timesteps[0])


@torch.no_grad()
def get_inpainting_inputs(
    models: Models,
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
    seed: int | list[torch.Generator] | None = None,
    input_image: ImageSource | None = None,
    mask_image: ImageSource | None = None,
    feather: float = 0,
) -> InpaintingInputs:
    """What `denoise` must keep of `input_image`: all but where `mask_image` is white. No mask: nothing of it.

    The other arguments are those of `get_latents`. Raises ValueError for a size that cannot be and for a mask of
    another shape than the picture's, and what `read_image` raises.
    """
    height, width = _size(models, height, width)
    size = (height, width)
    if input_image is not None and mask_image is not None:
        input_image = read_image(input_image)
        mask_image = read_mask_image(mask_image, input_image)
    picture = torch.zeros(1, 3, *size) if input_image is None else image_to_tensor(input_image, *size)
    mask = torch.ones(1, 1, *size) if mask_image is None else read_mask(mask_image, *size, float(feather))
    generators = seed if isinstance(seed, list) else make_generators(seed, batch_size)
    shape = _latent_shape(models, batch_size, height, width)
    latents = _encode(models, picture, draw_noise(shape, generators))
    noise = draw_noise(shape, generators)
    condition = None
    if models.config.unet.inpaints:
        rest = _encode(models, without_masked(picture, mask), draw_noise(shape, generators))
        small = F.interpolate((mask >= 0.5).float(), size=shape[2:])  # (1, 1, H/8, W/8)
        condition = torch.cat([small.expand(batch_size, -1, -1, -1).to(rest), rest], dim=1)  # (B, 5, H/8, W/8)
    return InpaintingInputs(picture, mask, latents, noise, condition)


def _encode(models: Models, picture: Tensor, noise: Tensor) -> Tensor:
    """picture (1, 3, H, W), noise (B, 4, H/8, W/8) -> B samples of its latents, float32 (B, 4, H/8, W/8)."""
    return run_in_range(models.encoder, "VAE encoder", picture, noise)


@torch.no_grad()
def denoise(
    models: Models,
    latents: Tensor,
    context: Tensor,
    sampler: Sampler,
    cfg_scale: float | None = None,
    known: InpaintingInputs | None = None,
    cfg_rescale: float = 0,
    cfg_interval: tuple[float, float] = (0, 1),
    guidance: ImageLoss | None = None,
    deep_cache: int = 1,
) -> Iterator[Step]:
    """Takes the noise out of latents (B, 4, h, w), step by step, and yields a `Step` after each.

    With a context (2B, 77 k, D), one batch of 2B gives the two predictions that classifier-free guidance needs: see
    `guidance.classifier_free` for `cfg_scale` and `cfg_rescale`. `cfg_interval` is the part of the run that is guided;
    outside of it, as with a context of B rows, the prompt alone counts. `guidance` is a loss on pictures to follow
    besides (`guidance.by_loss`), and `known` what inpainting must keep. `deep_cache` is how many steps share what the
    deep stages of the U-Net make: see `diffusion.DeepCache`.

    Raises ValueError for a context of any other number of rows, for a `deep_cache` that is not a whole number from 1 to
    1000, and for an inpainting U-Net without `known`; NotFiniteError, which names the step, if the U-Net gives NaN or
    infinity.
    """
    check_deep_cache(deep_cache)
    if len(context) not in (len(latents), 2 * len(latents)):
        raise ValueError(f"context should have {len(latents)} or {2 * len(latents)} rows, not {len(context)}.")
    if known is None and models.config.unet.inpaints:
        raise ValueError(
            "known should be what `get_inpainting_inputs` gives: the U-Net of this checkpoint is made for inpainting."
        )
    device, dtype = device_and_dtype(models.diffusion)
    cfg_scale = float(models.config.sampling.cfg_scale if cfg_scale is None else cfg_scale)
    latents, context = latents.to(device), context.to(device, dtype)
    unet = models.diffusion if deep_cache == 1 else DeepCache(models.diffusion, deep_cache)
    first, last = (share * len(sampler.timesteps) for share in cfg_interval)
    timesteps = sampler.timesteps.to(device)  # all at once: copied one by one, each would make a GPU wait
    for index, timestep in enumerate(sampler.timesteps):
        guided = len(context) > len(latents) and first <= index < last and cfg_scale != 1
        rows = context if guided else context[-len(latents) :]  # (2B, 77, D), or the conditional half (B, 77, D)
        inputs = latents if known is None else known.with_mask_channels(latents)  # (B, 4 or 9, h, w)
        inputs = inputs.to(dtype).repeat(len(rows) // len(inputs), 1, 1, 1)  # (2B, 4 or 9, h, w)
        noise = unet(inputs, rows, timesteps[index].expand(len(rows)))  # (2B, 4, h, w)
        when = f" at step {index + 1} of {len(timesteps)}"
        noise = check_finite(noise, models.diffusion, "U-Net", inputs, when).float()
        noise_uncond, noise_cond = noise.chunk(2) if guided else (None, noise)
        if guided:
            noise = classifier_free(noise_uncond, noise_cond, cfg_scale, float(cfg_rescale))  # (B, 4, h, w)
        if guidance is not None:
            latents = by_loss(models.decoder, sampler, timestep, latents, noise, guidance)
        denoised, _ = sampler.predict(timestep, latents, noise)
        latents = sampler.step(timestep, latents, noise)
        latents = latents if known is None else known.restore_known(latents, sampler, index + 1)
        yield Step(index, timestep.item(), latents, denoised, noise, noise_uncond, noise_cond)


@torch.no_grad()
def decode_latents(models: Models, latents: Tensor) -> np.ndarray:
    """Latents (B, 4, h, w) -> pictures, uint8 (B, 8 h, 8 w, 3). Raises NotFiniteError as `run_in_range` does.

    It decodes in strips where memory is short, and large pictures in float32 on a CPU always, which gives the same but
    for rounding. While a forward hook or a `Tracer` listens to the decoder, it works whole if memory allows.
    """
    # One at a time: the decoder's feature maps at full resolution are the most memory that a picture takes.
    decoder = InStrips(models.decoder) if needed(models.decoder, latents) else models.decoder
    return np.concatenate([tensor_to_array(run_in_range(decoder, "VAE decoder", one)) for one in latents.split(1)])


def _size(models: Models, height: int | None, width: int | None) -> tuple[int, int]:
    check_size(height, width, models.config.vae.downscale)
    return int(height or models.config.image_size), int(width or models.config.image_size)


def _latent_shape(models: Models, batch_size: int, height: int, width: int) -> tuple[int, int, int, int]:
    vae = models.config.vae
    return batch_size, vae.latent_channels, height // vae.downscale, width // vae.downscale
