"""A prompt, and perhaps an image -> an image. `generate` is these four steps in a row:

    prompt --tokenizer--> ids (B, 77) --clip--> context (B, 77, D)             encode_prompt
    noise, or image --encoder--> latents (B, 4, H/8, W/8)                      get_latents
    latents --(diffusion, sampler) x steps--> latents                         denoise
    latents --decoder--> image (B, 3, H, W) --> uint8 (B, H, W, 3)             decode_latents

Noise is drawn and latents are kept in float32, whatever the dtype of the networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from sd.guidance import ImageLoss, by_loss, classifier_free
from sd.images import ImageSource, image_to_tensor, tensor_to_array
from sd.models import Models
from sd.noise import draw_noise, make_generators
from sd.prompts.weights import join_chunks, layout, weigh
from sd.request import Request, check_models, check_prompts, check_shape, check_steps, image_size, latent_shape
from sd.runtime import warn
from sd.runtime.decode_in_strips import InStrips, needed
from sd.runtime.devices import Device, best_device, device_and_dtype, is_compiled, on_device
from sd.runtime.not_finite import check_finite, run_in_range
from sd.runtime.out_of_memory import explain_out_of_memory
from sd.sampler import Sampler
from sd.samplers import SAMPLERS
from sd.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sd.inpainting import InpaintingInputs


@dataclass(frozen=True)
class Step:
    """What one step of `denoise` computed. All tensors are float32, (B, 4, H/8, W/8)."""

    index: int
    timestep: int | float
    latents: Tensor  # after the step
    denoised: Tensor  # x_0 as predicted at this step: the image it is heading for
    noise: Tensor  # the U-Net's output after guidance: the noise, or v where it predicts v (2202.00512)
    noise_uncond: Tensor | None  # the U-Net's output for the negative prompt; None without guidance
    noise_cond: Tensor  # the U-Net's output for the prompt


def generate(
    prompt: str | list[str],
    uncond_prompt: str | list[str] | None = Request.uncond_prompt,
    input_image: ImageSource | None = None,
    mask_image: ImageSource | None = None,
    strength: float = Request.strength,
    do_cfg: bool = Request.do_cfg,
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
    feather: float = Request.feather,
    padding_mask_crop: int | None = None,
    cfg_rescale: float = Request.cfg_rescale,
    cfg_interval: Sequence[float] | None = None,
    deep_cache: int = Request.deep_cache,
    control: Sequence | None = None,
    clip_skip: int = Request.clip_skip,
    freeu: Sequence[float] | None = None,
    hires_scale: float = Request.hires_scale,
    hires_strength: float = Request.hires_strength,
    hires_latents: bool = Request.hires_latents,
    timestep_spacing: str | None = None,
) -> np.ndarray:
    """An image for a prompt: uint8 (height, width, 3); for a list of N prompts (N, height, width, 3).

    prompt, uncond_prompt   what to draw, and what not; words can have weights, "a (red:1.3) house" (`sd.prompts`)
    input_image, strength   the image to start from, cropped to the size; how much of it may change, in (0, 1]
    mask_image, feather     white is repainted, black stays the same to the byte; width of its soft edges, in pixels
    padding_mask_crop       repaint only the masked part of a large image, with this many pixels around it, at `height`
                            x `width`, and paste it back: the result has the size of `input_image`
    do_cfg, cfg_scale, cfg_rescale   guidance: how closely to follow the prompt (`guidance.classifier_free`)
    cfg_interval            the part of the run that is guided, such as (0, 0.6): other steps take half the time
    sampler_name, n_inference_steps  a key of `SAMPLERS`, and its number of steps
    timestep_spacing        "trailing" for models and LoRAs of few steps, such as SD-Turbo or Hyper-SD, with samplers
                            other than lcm and tcd; or "leading" or "linspace" (`noise.space_timesteps`)
    models, tokenizer       what `load_models` returns (default: the tiny model); another tokenizer for it
    seed                    makes the image repeatable; image i of a list is what `seed + i` gives for one prompt
    device, idle_device     where to compute, and where to keep the networks that are not in use
    height, width           multiples of 8 (default: the size the model was trained on)
    deep_cache              2 or 3: much faster, and a slightly different image (`sd.runtime.deep_cache`)
    control                 ControlNets and their images: [Control(net, image, strength)] (`sd.adapters.control`)
    clip_skip               2 leaves out the last layer of SD 1's text encoder, 3 the last two (`CLIP.encode`)
    freeu                   b1, b2, s1, s2: other weights on the U-Net's way up (`sd.adapters.freeu`)
    hires_scale, hires_strength, hires_latents   draw, enlarge the image or its latents, and change that much of it
                            (`enlarge`): for images larger than those that the model was trained on

    A seed gives the same bytes with the same machine, number of threads and version of torch, unless memory runs short
    (`decode_latents`). Elsewhere they differ by a level or two.

    Raises ValueError, before any work, for an argument that is not allowed, and what `read_image` and `load_models`
    raise; OutOfMemory, with advice; NotFiniteError if a network's output has NaN or infinity.
    """
    request = Request(
        prompt=prompt,
        uncond_prompt=uncond_prompt,
        input_image=input_image,
        mask_image=mask_image,
        strength=strength,
        do_cfg=do_cfg,
        cfg_scale=cfg_scale,
        sampler_name=sampler_name,
        n_inference_steps=n_inference_steps,
        seed=seed,
        height=height,
        width=width,
        feather=feather,
        padding_mask_crop=padding_mask_crop,
        cfg_rescale=cfg_rescale,
        cfg_interval=cfg_interval,
        deep_cache=deep_cache,
        control=control,
        clip_skip=clip_skip,
        freeu=freeu,
        hires_scale=hires_scale,
        hires_strength=hires_strength,
        hires_latents=hires_latents,
        timestep_spacing=timestep_spacing,
    )
    images = draw(request, models, device, idle_device, tokenizer)
    return images[0] if isinstance(prompt, str) else images


@explain_out_of_memory()
def draw(
    request: Request,
    models: Models | None = None,
    device: Device = None,
    idle_device: Device = None,
    tokenizer: Tokenizer | None = None,
) -> np.ndarray:
    """The images of a request, uint8 (N, height, width, 3). Arguments and errors are those of `generate`."""
    request.check()
    check_models(models, tokenizer, device, idle_device)
    request = request.read_images()
    if models is None:
        from sd.model_loader import load_models  # only here: whoever passes models needs no checkpoint reader

        models = load_models(device=device)
    device = models.device if device is None else best_device(device)
    if idle_device is not None and is_compiled(models.diffusion):
        raise ValueError("idle_device should be None for compiled models: their weights cannot move.")
    models = replace(models, tokenizer=tokenizer or models.tokenizer, device=device)
    control = [one.loaded(models) for one in request.control or ()]
    if models.config.unet.inpaints and request.hires_scale > 1:
        raise ValueError("hires_scale should be 1 for an inpainting model.")

    with on_device(models.clip, device, idle_device):
        guided = request.do_cfg and models.config.unet.guidance_width is None
        uncond_prompt = (request.uncond_prompt or "") if guided else None
        context = encode_prompt(models, request.prompts, uncond_prompt, clip_skip=request.clip_skip)
    with on_device(models.encoder, device, idle_device):
        sampler, latents, inpainting = prepare(models, request)
    nets = nn.ModuleList(one.net for one in control)

    def run(latents: Tensor) -> Tensor:
        with on_device(models.diffusion, device, idle_device), on_device(nets, device, idle_device):
            steps = steps_of(request, models, latents, context, sampler, inpainting, control)
            for step in tqdm(steps, total=len(sampler.timesteps)):
                latents = step.latents
        return latents

    latents = run(latents)
    if request.hires_scale > 1:
        with on_device(models.encoder, device, idle_device), on_device(models.decoder, device, idle_device):
            sampler.set_strength(request.hires_strength)
            latents = enlarge(models, latents, request.hires_scale, sampler, request.hires_latents)
        latents = run(latents)
    with on_device(models.decoder, device, idle_device):
        images = decode_latents(models, latents)
    return images if inpainting is None else inpainting.restore_pixels(images)


def prepare(models: Models, request: Request) -> tuple[Sampler, Tensor, InpaintingInputs | None]:
    """The sampler of a checked request, its first latents (B, 4, H/8, W/8), and what inpainting keeps."""
    defaults, schedule = models.config.sampling, models.config.schedule
    scale = defaults.cfg_scale if request.cfg_scale is None else request.cfg_scale
    negative = any(request.uncond_prompt or ())  # not for "", nor for ["", ""]
    if negative and models.config.unet.guidance_width is not None:
        warn("uncond_prompt has no effect on this model: its U-Net reads the guidance scale.")
    elif negative and request.do_cfg and scale == 1:
        warn("uncond_prompt has no effect with a cfg_scale of 1, which is no guidance.")
    schedule = replace(schedule, timestep_spacing=request.timestep_spacing or schedule.timestep_spacing)
    generators = make_generators(request.seed, len(request.prompts))
    sampler = SAMPLERS[request.sampler_name or defaults.sampler](generators, schedule=schedule)
    # A sampler chosen by name keeps its own default number of steps.
    if request.n_inference_steps is not None or request.sampler_name is None:
        sampler.set_inference_timesteps(int(request.n_inference_steps or defaults.steps))
    strength = 1 if request.input_image is None else request.strength
    sampler.set_strength(strength)
    size, image, mask = (request.height, request.width), request.input_image, request.mask_image
    if mask is None and not models.config.unet.inpaints:
        return sampler, get_latents(models, len(generators), *size, generators, image, sampler), None
    from sd.inpainting import get_inpainting_inputs  # only here: most images are drawn whole

    inpainting = get_inpainting_inputs(
        models, len(generators), *size, generators, image, mask, request.feather, request.padding_mask_crop
    )
    return sampler, inpainting.start(sampler, strength), inpainting


@torch.no_grad()
def encode_prompt(
    models: Models,
    prompt: str | list[str],
    uncond_prompt: str | list[str] | None = "",
    plain: bool = False,
    clip_skip: int = 1,
) -> Tensor:
    """B prompts -> context (2B, 77 k, D), the unconditional half first; (B, 77 k, D) if `uncond_prompt` is None.

    `uncond_prompt` is one text for all prompts, or a list with one for each. Weights, as in "(word:1.3)", and BREAK are
    applied. A long prompt takes several chunks of 77 tokens. k is the least common multiple of the prompts' numbers of
    chunks; a shorter context is repeated, which changes no image (`sd.prompts.weights`). With `plain`, brackets and
    BREAK are ordinary text, a prompt of more than 75 tokens is truncated with a warning, and k is 1. `clip_skip`
    leaves out layers of the text encoder (`CLIP.encode`).

    Raises ValueError for anything but texts, for unequal numbers of prompts and negative prompts, and as
    `prompts.weights.layout` and `CLIP.encode` do; NotFiniteError if the text encoder's output has NaN or infinity.
    """
    check_prompts(prompt, uncond_prompt)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    unconds = [] if uncond_prompt is None else uncond_prompt
    unconds = [unconds] * len(prompts) if isinstance(unconds, str) else unconds
    texts = [*unconds, *prompts]
    if plain:
        return _encode_tokens(models, models.tokenizer(texts), clip_skip)  # (2B, 77, D)
    tokens, weights, counts = layout(texts, models.tokenizer)  # (N, 77) both
    chunks = weigh(_encode_tokens(models, tokens, clip_skip), weights)  # (N, 77, D)
    return join_chunks(chunks, counts)  # (2B, 77 k, D)


def _encode_tokens(models: Models, tokens: Tensor, clip_skip: int) -> Tensor:
    """Token ids (N, 77) -> context (N, 77, D)."""
    device, _ = device_and_dtype(models.clip)
    return check_finite(models.clip(tokens.to(device), clip_skip), models.clip, "text encoder")


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
    """The latents to start from, float32 (B, 4, height / 8, width / 8): pure noise unless there is an `input_image`.

    The image is encoded, and noised to the level of the `sampler`'s first timestep. `seed` can also be the sampler's
    list of generators. Raises ValueError for a size that is not allowed, an image without a sampler, or a list that is
    not one generator per image, and what `read_image` raises.
    """
    shape = latent_shape(models, batch_size, height, width)
    generators = seed if isinstance(seed, list) else make_generators(seed, batch_size)
    noise = draw_noise(shape, generators)
    if input_image is None:
        return noise.to(device_and_dtype(models.diffusion)[0])
    if sampler is None:
        raise ValueError("sampler should be given with input_image: it determines how much noise to add.")
    image = image_to_tensor(input_image, *image_size(models, shape))  # (1, 3, H, W)
    latents = run_in_range(models.encoder, "VAE encoder", image, noise)  # (B, 4, H/8, W/8)
    return sampler.add_noise(latents, sampler.timesteps[0])


def steps_of(
    request: Request,
    models: Models,
    latents: Tensor,
    context: Tensor,
    sampler: Sampler,
    inpainting: InpaintingInputs | None,
    control: Sequence,
) -> Iterator[Step]:
    """`denoise` with the settings of a request. `control` are its own, loaded."""
    return denoise(
        models,
        latents,
        context,
        sampler,
        request.cfg_scale if request.do_cfg else 1,
        inpainting,
        request.cfg_rescale,
        request.cfg_interval or (0, 1),
        deep_cache=request.deep_cache,
        control=control,
        freeu=request.freeu,
    )


@torch.no_grad()
def enlarge(models: Models, latents: Tensor, scale: float, sampler: Sampler, as_latents: bool = False) -> Tensor:
    """Latents (B, 4, h, w) of finished images -> where a second pass starts: (B, 4, scale h, scale w), with noise.

    Drawn at once, large images repeat things: the model has learned small ones. So a small one is drawn, enlarged, and
    noised to the level of the `sampler`'s first timestep, as in SDEdit (2108.01073). `as_latents` enlarges the latents
    themselves, which are blurred by it: they need a strength of 0.5 or more. Otherwise images are decoded, enlarged and
    encoded.
    """
    height, width = (round(scale * side) for side in latents.shape[2:])
    if as_latents:
        latents = F.interpolate(latents, (height, width), mode="bilinear")
    else:
        factor = models.config.vae.downscale
        images = [Image.fromarray(image) for image in decode_latents(models, latents)]
        resized = [image_to_tensor(image, factor * height, factor * width) for image in images]  # (1, 3, H, W) each
        noise = draw_noise((len(images), latents.shape[1], height, width), sampler.generator)
        parts = zip(resized, noise.split(1))
        latents = torch.cat([run_in_range(models.encoder, "VAE encoder", image, one) for image, one in parts])
    return sampler.add_noise(latents, sampler.timesteps[0])


@torch.no_grad()
def denoise(
    models: Models,
    latents: Tensor,
    context: Tensor,
    sampler: Sampler,
    cfg_scale: float | None = None,
    inpainting: InpaintingInputs | None = None,
    cfg_rescale: float = 0,
    cfg_interval: Sequence[float] = (0, 1),
    guidance: ImageLoss | None = None,
    deep_cache: int = 1,
    control: Sequence = (),
    freeu: Sequence[float] | None = None,
) -> Iterator[Step]:
    """Takes the noise out of latents (B, 4, h, w), step by step, and yields a `Step` after each.

    With a context (2B, 77 k, D), one batch of 2B gives both predictions for classifier-free guidance: see
    `guidance.classifier_free` for `cfg_scale` and `cfg_rescale`. `cfg_interval` is the part of the run that is guided
    (2404.07724); outside it, and with a context of B rows, only the prompt's prediction is used. `guidance` is a loss
    on images (`guidance.by_loss`). `inpainting` holds what must stay. `deep_cache=n` runs the U-Net's deep stages only
    every n steps (`sd.runtime.deep_cache`). `control` are what `Control.loaded` returns, `freeu` the four factors of
    `sd.adapters.freeu`. A U-Net with a `guidance_width` reads `cfg_scale` itself, and only the prompt.

    Raises ValueError for latents or a context of another shape, a `deep_cache` that is not a whole number from 1 to
    1000, and an inpainting U-Net without `inpainting`; NotFiniteError, with the step, for NaN or infinity.
    """
    check_steps("deep_cache", deep_cache)
    check_shape("latents", latents, ("B", models.config.vae.latent_channels, "h", "w"))
    check_shape("context", context, ("B or 2B", "77 k", models.config.unet.context_width))
    if len(context) not in (len(latents), 2 * len(latents)):
        raise ValueError(f"context should have {len(latents)} or {2 * len(latents)} rows, not {len(context)}.")
    if inpainting is None and models.config.unet.inpaints:
        raise ValueError("inpainting should be what `get_inpainting_inputs` returns: this U-Net is for inpainting.")
    if freeu is not None and is_compiled(models.diffusion):
        raise ValueError("freeu should be None for compiled models: it could not change what their stages read.")
    unet = models.diffusion
    if deep_cache > 1:
        from sd.runtime.deep_cache import DeepCache

        unet = DeepCache(unet, deep_cache)
    if freeu is not None:
        from sd.adapters.freeu import FreeU

        unet = FreeU(models.diffusion, freeu, unet)
    steering = None
    if control:
        from sd.adapters.control import Steering

        steering = Steering(control, latents, inpainting and inpainting.region)
    device, dtype = device_and_dtype(models.diffusion)
    cfg_scale = float(models.config.sampling.cfg_scale if cfg_scale is None else cfg_scale)
    latents, context = latents.to(device), context.to(device, dtype)
    first, last = (round(share * len(sampler.timesteps), 4) for share in cfg_interval)  # 0.07 * 100 is above 7
    timesteps = sampler.timesteps.to(device)  # in one copy: each one makes a GPU wait
    reads_scale = models.config.unet.guidance_width is not None
    for index, timestep in enumerate(sampler.timesteps):
        scale = cfg_scale if first <= index < last else 1.0
        guided = len(context) > len(latents) and scale != 1 and not reads_scale
        rows = context if guided else context[-len(latents) :]  # (2B, 77, D), or the conditional half (B, 77, D)
        inputs = latents if inpainting is None else inpainting.with_mask_channels(latents)  # (B, 4 or 9, h, w)
        inputs = inputs.to(dtype).repeat(len(rows) // len(inputs), 1, 1, 1)  # (2B, 4 or 9, h, w)
        arguments = [inputs, rows, timesteps[index].expand(len(rows))]
        if steering is not None:
            noisy = inputs[:, : latents.shape[1]]  # (2B, 4, h, w), without the channels of inpainting
            arguments.append(steering.residuals(noisy, *arguments[1:], index, len(timesteps), guided))
        if reads_scale:  # after the residuals, or None
            arguments += [None] * (4 - len(arguments)) + [torch.full((len(rows),), scale, device=device)]
        noise = unet(*arguments)  # (2B, 4, h, w)
        when = f" at step {index + 1} of {len(timesteps)}"
        noise = check_finite(noise, models.diffusion, "U-Net", inputs, when).float()
        noise_uncond, noise_cond = noise.chunk(2) if guided else (None, noise)
        if guided:
            noise = classifier_free(noise_uncond, noise_cond, cfg_scale, float(cfg_rescale))  # (B, 4, h, w)
        if guidance is not None:
            latents = by_loss(models.decoder, sampler, timestep, latents, noise, guidance)
        denoised, _ = sampler.predict(timestep, latents, noise)
        latents = sampler.step(timestep, latents, noise)
        if inpainting is not None:
            latents = inpainting.restore_known(latents, sampler, index + 1)
        yield Step(index, timestep.item(), latents, denoised, noise, noise_uncond, noise_cond)


@torch.no_grad()
def decode_latents(models: Models, latents: Tensor) -> np.ndarray:
    """Latents (B, 4, h, w) -> images, uint8 (B, 8 h, 8 w, 3). Raises ValueError for latents of another shape, and
    NotFiniteError as `run_in_range` does.

    It decodes in strips if memory is short, and always for large images in float32 on a CPU: the same image except for
    rounding. A decoder with forward hooks, such as a `Tracer`'s, decodes whole if memory allows.
    """
    check_shape("latents", latents, ("B", models.config.vae.latent_channels, "h", "w"))
    # One at a time: an image takes the most memory here, for the decoder's feature maps at full resolution.
    decoder = InStrips(models.decoder) if needed(models.decoder, latents) else models.decoder
    return np.concatenate([tensor_to_array(run_in_range(decoder, "VAE decoder", one)) for one in latents.split(1)])
