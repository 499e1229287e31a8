"""A recording and its trace -> one HTML page that contains everything: text, images, style and script.

The page is made from page.html, style.css and script.js in this folder. It loads nothing from anywhere, and everything
in the prompt is shown as text, even HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import torch
from torch import Tensor

from sd.files import write_whole
from sd.inside.film import shows_previews
from sd.inside.preview import preview_for
from sd.inside.recording import Moment, Recording
from sd.inside.report.control import control_section
from sd.inside.report.figures import schedule_svg, unet_svg
from sd.inside.report.pictures import encode, encode_exactly, encode_maps
from sd.inside.report.tokens import MAX_TOKENS, Token, tokens_of
from sd.inside.tracer import Tracer
from sd.models import empty_networks

HERE = Path(__file__).resolve().parent
# Bytes for the images. Base64 makes four bytes of three, and the page should stay below 5 MB.
BUDGETS = {"image": 1_500_000, "expected": 700_000, "small": 1_000_000, "maps": 250_000, "control": 400_000}
GROUPS = {"start": "The start of the prompt", "end": "The end of the prompt, with the padding after it,"}
LONG_PROMPT = 90  # characters: longer headings are in a smaller font

COSTS = {
    "encode_prompt": ("Text encoder", "clip", "turns the prompt into vectors that the U-Net reads"),
    "prepare": ("First latents", "encoder", "draws noise, and encodes the input image if there is one"),
    "denoise": ("U-Net", "diffusion", "denoises the latents, in all steps"),
    "decode_latents": ("Decoder", "decoder", "turns the final latents into the image"),
}


def report(
    recording: Recording, frames: list[np.ndarray], trace: Tracer, settings: dict[str, str], command: str
) -> str:
    """The page as text, less than 5 MB for images of usual sizes.

    `frames` are `film.frames` of the recording. `trace` is a Tracer with attention that was active while it was made.
    `settings` are the pairs to list, and `command` makes the same image again.
    """
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    tokens = tokens_of(recording.models, recording.prompt, trace)
    steps, steps_note = _steps(recording, frames)
    maps = encode_maps([token.map for token in tokens], BUDGETS["maps"])
    height, width = recording.image.shape[:2]
    parts = {
        "style": style,
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": _json({"steps": steps, "maps": maps, **_map_place(recording)}),
        "width": str(width),
        "height": str(height),
        "ratio": f"{width / height:.4f}",
        "steps_note": steps_note,
        "settings": "".join(f"<dt>{escape(k)}</dt><dd><bdi>{escape(v)}</bdi></dd>\n" for k, v in settings.items()),
        "command": _command_html(command),
        **_prompt_parts(recording, tokens),
        **_image_parts(recording),
        **_slider_parts(steps),
        **_step_parts(recording, steps[len(steps) // 2]),
        **_schedule_parts(recording),
        "control": control_section(recording, BUDGETS["control"]),
        **_unet_parts(trace),
        "loras": _loras_html(recording),
        **_cost_parts(recording),
    }
    page = Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(parts)
    return page.encode("utf-8", "replace").decode("utf-8")  # lone surrogates, which UTF-8 cannot encode


def _map_place(recording: Recording) -> dict[str, str]:
    """Where the maps lie on the image, as CSS writes it: on all of it, or on the region that was repainted alone."""
    region = recording.inpainting and recording.inpainting.region
    if region is None:
        return {"position": "0 0", "size": "100% 100%"}
    left, top, right, bottom = region.box
    height, width = recording.image.shape[:2]
    rest_x, rest_y = width - (right - left), height - (bottom - top)  # CSS counts shares of what is left free
    position = f"{100 * left / max(rest_x, 1):.4g}% {100 * top / max(rest_y, 1):.4g}%"
    return {"position": position, "size": f"{100 - 100 * rest_x / width:.4g}% {100 - 100 * rest_y / height:.4g}%"}


def _json(value: object) -> str:
    """JSON for a script element. It contains no "<", so it cannot end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _command_html(command: str) -> str:
    """The command as HTML in which no line breaks after the hyphens of a flag."""
    return re.sub(r"(?<!\S)(--[a-z][a-z-]{0,20})(?!\S)", r'<span class="flag">\1</span>', escape(command))


def _prompt_parts(recording: Recording, tokens: list[Token]) -> dict[str, str]:
    prompt = " ".join(recording.prompt.split()) or "(an empty prompt)"
    beside = sum(token.share for token in tokens if token.id is None)
    weighted = ", with its weight in the prompt" * any(token.weight != 1 for token in tokens)
    note = f"The number under a token is its id in the vocabulary{weighted}. There are also tokens at the start and "
    note += f"at the end of the prompt; they got {beside:.0%} of the attention. Each map is the average over all "
    note += "steps, layers and heads, and is stretched from its smallest to its largest value."
    if len(tokens) == MAX_TOKENS + 2:
        note += f" Only the first {MAX_TOKENS} tokens are shown."
    negative = ""
    if recording.uncond_prompt and _is_guided(recording.moments):
        negative = f"<p class='negative'>Negative prompt: <bdi>{escape(recording.uncond_prompt)}</bdi></p>\n"
    kind = "long" if len(prompt) > LONG_PROMPT else "short"
    return {
        "title": escape(f"{prompt[:LONG_PROMPT]} – how this image was made"),
        "heading": f'<h1 class="{kind}"><bdi>{escape(prompt)}</bdi></h1>',
        "prompt": escape(prompt),
        "tokens": _token_buttons(tokens),
        "tokens_note": note,
        "negative": negative,
    }


def _token_buttons(tokens: list[Token]) -> str:
    most = max((token.share for token in tokens if token.id is not None), default=0) or 1
    buttons = []
    for token, following in zip(tokens, [*tokens[1:], None]):
        classes = ["token"] + ["group"] * (token.id is None) + ["joined"] * token.joined
        classes += ["ongoing"] * (following is not None and following.joined)
        weight = f" × {token.weight:.3g}" if token.weight != 1 else ""
        name = f"“{token.text}”" if token.id is not None else GROUPS[token.text]
        says = f"{name} got {token.share:.1%} of the attention."
        below = "tokens" if token.id is None else f"{token.id}{weight}"
        below = f"<small>{below}</small><noscript><small>{token.share:.1%}</small></noscript>"
        share = 0 if token.id is None else token.share / most
        buttons.append(
            f'<button type="button" class="{" ".join(classes)}" aria-pressed="false" style="--share:{share:.3f}" '
            f'data-says="{escape(says)}"><bdi>{escape(token.text)}</bdi>{below}</button>\n'
        )
    return "".join(buttons)


def _image_parts(recording: Recording) -> dict[str, str]:
    uri, done = encode_exactly(recording.image, BUDGETS["image"])
    note = "The image on this page has exactly the pixels of the saved file. The command makes them again on the same "
    note += "machine with the same versions and number of threads. Elsewhere, a pixel may differ by one or two levels "
    note += "of 255."
    if done != "exact":
        note = f"To keep this page small, the image on it is not exact: {done}."
    return {"image": uri, "image_note": note}


def _steps(recording: Recording, frames: list[np.ndarray]) -> tuple[list[dict], str]:
    """What the script shows at each step, and a note on the images."""
    preview, moments = preview_for(recording.models), recording.moments
    total = len(recording.sampler.timesteps)
    expected, done = encode(frames[: len(moments)], BUDGETS["expected"])
    maps = _maps(moments)
    small, small_done = encode([preview(x)[0] for each in maps for x in each.values()], BUDGETS["small"])
    uris = iter(small)
    steps = []
    for moment, each, image in zip(moments, maps, expected):
        signal, noise = _mixture(recording, moment.timestep)
        steps.append(
            {
                "title": f"{moment.index + 1} of {total}, t = {moment.timestep:.4g}",
                "mixture": f"latents = {signal:.2f} · image + {noise:.2f} · noise",
                "x": round(100 * (1 - moment.timestep / (len(recording.sampler.alphas_cumprod) - 1)), 2),
                "signal": round(signal, 4),
                "noise": round(noise, 4),
                "expected": image,
                **{name: next(uris) for name in each},
            }
        )
    note = "In the small images, each pixel is one position of the latents; a linear map gives its colour."
    if recording.inpainting is not None and recording.inpainting.region is not None:
        note += " They show only the part of the image that was repainted, and the space around it."
    if recording.preview is not None:
        note += " A smaller decoder made the expected images, to save time."
    elif shows_previews(recording.models):
        note += " The expected images are made by the same map, because decoding all of them would take too long."
    for name, how in (("small", small_done), ("expected", done)):
        note += f" To keep this page small, the {name} images are not exact: {how}." * (how != "exact")
    if len(steps) < total:
        note += f" Of the {total} steps, {len(steps)} are shown, evenly spaced."
    return steps, note


def _maps(moments: list[Moment]) -> list[dict[str, Tensor]]:
    """What the small images of each step show, under the names of the panels: all (1, 4, h, w)."""
    maps = [{"latents": moment.latents, "cond": moment.noise_cond} for moment in moments]
    if not _is_guided(moments):
        return maps
    nothing = torch.zeros_like(moments[0].noise_cond)  # in steps without guidance
    unconds = [nothing if moment.noise_uncond is None else moment.noise_uncond for moment in moments]
    pushes = [nothing if moment.noise_uncond is None else moment.noise_cond - moment.noise_uncond for moment in moments]
    strongest = max(push.std().item() for push in pushes) or 1  # scales the strongest to the strength of noise
    for each, uncond, push in zip(maps, unconds, pushes):
        each |= {"uncond": uncond, "push": push / strongest}
    return maps


def _is_guided(moments: list[Moment]) -> bool:
    """Whether any step had guidance."""
    return any(moment.noise_uncond is not None for moment in moments)


def _mixture(recording: Recording, timestep: float) -> tuple[float, float]:
    """sqrt(a_t) and sqrt(1 - a_t)."""
    a_t = float(recording.sampler.alpha_bar_at(timestep))
    return a_t**0.5, (1 - a_t) ** 0.5


def _slider_parts(steps: list[dict]) -> dict[str, str]:
    """The slider's first position and what is shown there. Without JavaScript, the page stays like this."""
    chosen = len(steps) // 2
    step = steps[chosen]
    return {
        "last": str(len(steps) - 1),
        "chosen": str(chosen),
        "now": step["title"],
        "mixture": step["mixture"],
        "x": f"{step['x']:.2f}",
        "signal_y": f"{100 - 100 * step['signal']:.2f}",
        "noise_y": f"{100 - 100 * step['noise']:.2f}",
    }


def _step_parts(recording: Recording, shown: dict) -> dict[str, str]:
    guided = _is_guided(recording.moments)
    noise = recording.sampler.schedule.prediction_type == "epsilon"
    title = "Predicted noise" if noise else "Predicted v"
    other = "with the negative prompt" if recording.uncond_prompt else "without the prompt"
    panels = [
        ("expected", "Expected image", "The final image, as predicted at this step"),
        ("latents", "Latents", "The compressed image with its noise, the input of the U-Net"),
    ]
    channels, rows, columns = recording.moments[0].latents.shape[1:]
    height, width = recording.image.shape[:2]
    if recording.inpainting is not None:  # whose image may be a part of the whole one
        height, width = recording.inpainting.image.shape[2:]
    start = "the latents of the input image with noise added" if recording.sampler.skipped else "noise"
    text = "Stable Diffusion does not work on pixels but on latents. They are a compressed form of an image: the "
    text += "encoder computes them from an image, and the decoder computes the image from them. Here, "
    text += f"{width} × {height} pixels are {columns} × {rows} positions with {channels} numbers each. "
    text += f"Sampling starts from {start}. At every step, the U&#8209;Net reads the latents and predicts "
    text += "the noise in them. " if noise else "v, a mixture of the noise and the image in them. "
    if guided:
        panels += [
            ("uncond", title, other.capitalize()),
            ("cond", title, "With the prompt"),
            ("push", "What the prompt adds", "The difference between the two, scaled to be visible"),
        ]
        text += f"It does this twice, {other} and with the prompt. The difference, what the prompt adds, is multiplied "
        text += f"by {recording.cfg_scale:g}, the CFG scale. "
        if any(moment.noise_uncond is None for moment in recording.moments):
            text += "Some steps have no guidance: they use only the prediction with the prompt. "
    else:
        reads_scale = recording.models.config.unet.guidance_width is not None  # a latent consistency model
        how = f"at CFG scale {recording.cfg_scale:g}" if reads_scale else "without guidance"
        panels.append(("cond", title, f"With the prompt, {how}"))
    text += "The prediction gives the expected image, and the step moves the latents part of the way towards it."
    figures = []
    for name, heading, caption in panels:
        kind = "expected" if name == "expected" else "pixels"
        figures.append(
            f'<figure class="{kind}"><img id="{name}" class="{kind}" src="{shown[name]}" width="{width}" '
            f'height="{height}" alt="{heading} at this step: {caption[0].lower()}{caption[1:]}">'
            f"<figcaption><b>{heading}</b>{caption}</figcaption></figure>\n"
        )
    return {"steps_text": text, "panels": "".join(figures), "count": "" if guided else " three"}


def _schedule_parts(recording: Recording) -> dict[str, str]:
    sampler = recording.sampler
    last = len(sampler.alphas_cumprod) - 1
    places = [100 * (1 - timestep / last) for timestep in sampler.timesteps.tolist()]
    skipped = ""
    ticks = "".join(f'<span class="visited" style="left:{x:.2f}%"></span>' for x in places)
    if sampler.skipped:  # a late first timestep is not enough: leading spacing has one too
        ticks = f'<span class="unvisited" style="width:{places[0]:.2f}%"></span>{ticks}'
        skipped = " Here, sampling starts late, from the input image with noise added, and the hatched part is skipped."
    alt = f"Two curves over the timesteps, from {last} to 0: the factor of the noise falls from 1 to nearly 0, that "
    alt += f"of the image rises from nearly 0 to 1. {len(places)} steps, from timestep {sampler.timesteps[0]:.4g}."
    svg = schedule_svg(sampler.alphas_cumprod.tolist())
    return {"schedule": svg, "ticks": ticks, "skipped": skipped, "schedule_alt": alt, "first_t": str(last)}


def _unet_parts(trace: Tracer) -> dict[str, str]:
    runs_of_unet = [call for call in trace.calls if call.network == "diffusion"]
    fullest = max((call.shapes for call in runs_of_unet), key=len)  # with a deep cache, some runs skip stages
    shapes = list(fullest.items())
    rows = [
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{size}</td>" for size in shape[1:])}</tr>\n'
        for name, shape in shapes
    ]
    calls = len(runs_of_unet)
    guided = sum(next(iter(call.shapes.values()))[0] > 1 for call in runs_of_unet)  # the size of the batch
    runs = f"{calls} times" if calls > 1 else "once"
    if guided:
        often = "" if calls == 1 else ", each time" if guided == calls else f", {guided} times"
        runs += f"{often} on a batch of two: with and without the prompt"
    return {"unet": unet_svg(shapes, set(trace.attention)), "shapes": "".join(rows), "runs": runs}


def _loras_html(recording: Recording) -> str:
    """The LoRAs that were at work, in a paragraph, or nothing."""
    if not recording.models.loras:
        return ""
    names = ", ".join(f"<bdi>{escape(lora.label)}</bdi>" for lora in recording.models.loras)
    note = "Their changes are part of the weights, so a step takes no longer. The numbers are their strengths."
    return f'<p class="text">LoRAs at work: {names}. {note}</p>\n'


def _cost_parts(recording: Recording) -> dict[str, str]:
    costs, models = recording.costs, recording.models
    longest = max(cost.seconds for cost in costs.values())
    most = max(cost.peak or 1 for cost in costs.values())
    # Weights are counted in networks as loaded, but for the U-Net, whose weights may be packed.
    networks = vars(models) | {"diffusion": empty_networks(models.config)["diffusion"]}
    rows = []
    for key, cost in costs.items():
        title, network, caption = COSTS[key]
        weights = sum(parameter.numel() for parameter in networks[network].parameters()) / 1e6
        peak = "unknown" if cost.peak is None else f"{cost.peak / 2**20:,.0f} MiB"
        bar = f'<span class="bar memory" style="width:{100 * (cost.peak or 0) / most:.1f}%"></span>'
        rows.append(
            f'<tr><th scope="row">{title}<br><small>{caption}</small></th><td>{weights:,.1f} M</td>'
            f'<td>{cost.seconds:.2f}<span class="bar" style="width:{100 * cost.seconds / longest:.1f}%"></span></td>'
            f"<td>{peak}{bar}</td></tr>\n"
        )
    steps = len(recording.sampler.timesteps)
    of = "GPU" if models.device.type == "cuda" else "process"
    note = f"A step took {costs['denoise'].seconds / steps:.2f} seconds on average. Peak memory is the most that the "
    note += f"{of} had in use, including the weights. Without a report, the image takes a little less time, because no "
    note += "attention maps are computed."
    return {"costs": "".join(rows), "costs_note": note}


def write_report(path: str | os.PathLike, page: str, overwrite: bool = False) -> None:
    """Writes the page atomically. Overwrites an existing file only with `overwrite`.

    Raises FileExistsError or another OSError, as `images.write_png` does.
    """
    write_whole(Path(path), lambda file: file.write(page.encode("utf-8")), overwrite)
