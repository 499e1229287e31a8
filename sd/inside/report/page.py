"""A recording and a trace of it -> one HTML page, with everything in it: pictures, style and script.

In: what `record` returns, and the `Tracer` that listened to it. Out: the text of the page, from page.html, style.css
and script.js beside this file. It loads nothing from anywhere, and whatever the prompt says is text in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from torch import Tensor

from sd.files import write_whole
from sd.inside.preview import preview_for
from sd.inside.recording import Moment, Recording
from sd.inside.report.figures import schedule_svg, unet_svg
from sd.inside.report.pictures import encode, encode_exactly, encode_maps
from sd.inside.report.tokens import MAX_TOKENS, Token, tokens_of
from sd.inside.tracer import Tracer
from sd.models import empty_networks

HERE = Path(__file__).resolve().parent
# Bytes of pictures; Base64 makes four of three, and the page shall stay below 5 MB.
BUDGETS = {"picture": 1_500_000, "expected": 700_000, "small": 1_000_000, "maps": 250_000}
LONG_PROMPT = 90  # characters: longer headings are set smaller

COSTS = {
    "encode_prompt": ("Text encoder", "clip", "prompt to context"),
    "prepare": ("First latents", "encoder", "noise, and the picture to start from"),
    "denoise": ("U-Net", "diffusion", "all steps"),
    "decode_latents": ("Decoder", "decoder", "latents to picture"),
}


def report(
    recording: Recording, frames: list[np.ndarray], trace: Tracer, settings: dict[str, str], command: str
) -> str:
    """The page, less than 5 MB of it for any usual picture.

    `frames` are `film.frames` of the recording; `trace` is a Tracer with attention that heard it; `settings` are pairs
    to list, and `command` is what makes the same picture again.
    """
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    tokens = tokens_of(recording.models, recording.prompt, trace)
    steps, steps_note = _steps(recording, frames)
    maps = encode_maps([token.map for token in tokens], BUDGETS["maps"])
    height, width = recording.picture.shape[:2]
    parts = {
        "style": style,
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": _json({"steps": steps, "maps": maps}),
        "width": str(width),
        "height": str(height),
        "ratio": f"{width / height:.4f}",
        "steps_note": steps_note,
        "settings": "".join(f"<dt>{escape(k)}</dt><dd><bdi>{escape(v)}</bdi></dd>\n" for k, v in settings.items()),
        "command": escape(command),
        **_prompt_parts(recording, tokens),
        **_picture_parts(recording),
        **_slider_parts(steps),
        **_step_parts(recording, steps[len(steps) // 2]),
        **_schedule_parts(recording),
        **_unet_parts(trace),
        **_cost_parts(recording),
    }
    page = Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(parts)
    return page.encode("utf-8", "replace").decode("utf-8")  # half characters, which no encoding takes


def _json(value: object) -> str:
    """JSON that can stand in a script element: nothing in it can end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _prompt_parts(recording: Recording, tokens: list[Token]) -> dict[str, str]:
    prompt = " ".join(recording.prompt.split()) or "(an empty prompt)"
    beside = sum(token.share for token in tokens if token.id is None)
    note = f"The start and the end of the prompt are tokens too, and got {beside:.0%} of the attention. The maps are "
    note += "averages over all steps, layers and heads, each from its own least to its own most."
    if len(tokens) == MAX_TOKENS + 2:
        note += f" No more than the first {MAX_TOKENS} tokens are shown."
    negative = ""
    if recording.uncond_prompt and recording.moments[0].noise_uncond is not None:
        negative = f"<p class='negative'>Negative prompt: <bdi>{escape(recording.uncond_prompt)}</bdi></p>\n"
    kind = "long" if len(prompt) > LONG_PROMPT else "short"
    return {
        "title": escape(f"{prompt[:LONG_PROMPT]} – how this picture came to be"),
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
        name = f"“{token.text}”" if token.id is not None else f"The {token.text} of the prompt"
        says = f"{name} got {token.share:.1%} of the attention."
        below = "tokens" if token.id is None else f"{token.id}{weight}"
        below = f"<small>{below}</small><noscript><small>{token.share:.1%}</small></noscript>"
        share = 0 if token.id is None else token.share / most
        buttons.append(
            f'<button type="button" class="{" ".join(classes)}" aria-pressed="false" style="--share:{share:.3f}" '
            f'data-says="{escape(says)}"><bdi>{escape(token.text)}</bdi>{below}</button>\n'
        )
    return "".join(buttons)


def _picture_parts(recording: Recording) -> dict[str, str]:
    uri, done = encode_exactly(recording.picture, BUDGETS["picture"])
    note = "The picture on this page has the very pixels of the file. The command gives them again on the same machine "
    note += "with the same versions and number of threads; elsewhere, a pixel may differ by a level or two."
    if done != "exact":
        note = f"So that this page stays small, the picture on it is not exact: it is {done}."
    return {"picture": uri, "picture_note": note}


def _steps(recording: Recording, frames: list[np.ndarray]) -> tuple[list[dict], str]:
    """What the script shows at each step, and a note on what the pictures are."""
    preview, moments = preview_for(recording.models), recording.moments
    total = len(recording.sampler.timesteps)
    expected, done = encode(frames[: len(moments)], BUDGETS["expected"])
    maps = _maps(moments)
    small, small_done = encode([preview(x)[0] for each in maps for x in each.values()], BUDGETS["small"])
    uris = iter(small)
    steps = []
    for moment, each, picture in zip(moments, maps, expected):
        signal, noise = _mixture(recording, moment.timestep)
        steps.append(
            {
                "title": f"{moment.index + 1} of {total}, t = {moment.timestep:.4g}",
                "mixture": f"x = {signal:.2f} · picture + {noise:.2f} · noise",
                "x": round(100 * (1 - moment.timestep / (len(recording.sampler.alphas_cumprod) - 1)), 2),
                "signal": round(signal, 4),
                "noise": round(noise, 4),
                "expected": picture,
                **{name: next(uris) for name in each},
            }
        )
    note = f"Small pictures: one pixel a latent, coloured by a linear map, {small_done}. Expected picture: {done}."
    if len(steps) < total:
        note += f" Of the {total} steps, {len(steps)} are shown, evenly spaced."
    return steps, note


def _maps(moments: list[Moment]) -> list[dict[str, Tensor]]:
    """What is shown of each step in the latents' kind, under the names of the panels: all (1, 4, h, w)."""
    maps = [{"latents": moment.latents, "cond": moment.noise_cond} for moment in moments]
    if moments[0].noise_uncond is None:
        return maps
    pushes = [moment.noise_cond - moment.noise_uncond for moment in moments]
    strongest = max(push.std().item() for push in pushes) or 1  # to be as strong as noise is
    for each, moment, push in zip(maps, moments, pushes):
        each |= {"uncond": moment.noise_uncond, "push": push / strongest}
    return maps


def _mixture(recording: Recording, timestep: float) -> tuple[float, float]:
    """sqrt(a_t) and sqrt(1 - a_t)."""
    a_t = float(recording.sampler.alpha_bar_at(timestep))
    return a_t**0.5, (1 - a_t) ** 0.5


def _slider_parts(steps: list[dict]) -> dict[str, str]:
    """Where the slider stands at first, and what the script shows there: without scripts it stays so."""
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
    guided = recording.moments[0].noise_uncond is not None
    noise = recording.sampler.schedule.prediction_type == "epsilon"
    title = "Predicted noise" if noise else "Predicted v"
    other = "with the negative prompt" if recording.uncond_prompt else "without the prompt"
    panels = [
        ("expected", "Expected picture", "Where the picture seems to be heading"),
        ("latents", "Latents", "What the U-Net sees"),
    ]
    text = "At every step the U-Net sees the latents and predicts "
    text += "the noise in them. " if noise else "v, a mixture of the noise and the picture in them. "
    if guided:
        panels += [
            ("uncond", title, other.capitalize()),
            ("cond", title, "With the prompt"),
            ("push", "What the prompt adds", "The difference of the two, made stronger to be seen"),
        ]
        text += f"It does so twice, {other} and with the prompt, and what the prompt adds counts "
        text += f"{recording.cfg_scale:g} times. "
    else:
        panels.append(("cond", title, "With the prompt; there is no guidance"))
    text += "From that follows the picture that it expects, and a step goes part of the way there."
    figures = []
    for name, heading, caption in panels:
        kind = "expected" if name == "expected" else "pixels"
        height, width = recording.picture.shape[:2]
        figures.append(
            f'<figure class="{kind}"><img id="{name}" class="{kind}" src="{shown[name]}" width="{width}" '
            f'height="{height}" alt="{heading} at this step: {caption.lower()}">'
            f"<figcaption><b>{heading}</b>{caption}</figcaption></figure>\n"
        )
    return {"steps_text": text, "panels": "".join(figures), "count": "" if guided else " three"}


def _schedule_parts(recording: Recording) -> dict[str, str]:
    sampler = recording.sampler
    last = len(sampler.alphas_cumprod) - 1
    places = [100 * (1 - timestep / last) for timestep in sampler.timesteps.tolist()]
    skipped = ""
    ticks = "".join(f'<span class="visited" style="left:{x:.2f}%"></span>' for x in places)
    if sampler.skipped:  # a late first timestep alone says nothing: leading spacing has one too
        ticks = f'<span class="unvisited" style="width:{places[0]:.2f}%"></span>{ticks}'
        skipped = " It begins late, from the picture that was given, under so much noise: the hatched part is skipped."
    alt = f"Two curves over the timesteps, from {last} to 0: the share of noise falls from 1 to nearly 0, that of the "
    alt += f"picture rises from nearly 0 to 1. {len(places)} steps, from timestep {sampler.timesteps[0]:.4g}."
    svg = schedule_svg(sampler.alphas_cumprod.tolist())
    return {"schedule": svg, "ticks": ticks, "skipped": skipped, "schedule_alt": alt, "first_t": str(last)}


def _unet_parts(trace: Tracer) -> dict[str, str]:
    runs_of_unet = [call for call in trace.calls if call.network == "diffusion"]
    fullest = max((call.shapes for call in runs_of_unet), key=len)  # a deep cache skips stages in some runs
    shapes = list(fullest.items())
    rows = [
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{size}</td>" for size in shape[1:])}</tr>\n'
        for name, shape in shapes
    ]
    calls, batch = len(runs_of_unet), shapes[0][1][0]
    runs = f"{calls} times" if calls > 1 else "once"
    runs += ", each time for two: with and without the prompt" if batch > 1 else ""
    return {"unet": unet_svg(shapes, set(trace.attention)), "shapes": "".join(rows), "runs": runs}


def _cost_parts(recording: Recording) -> dict[str, str]:
    costs, models = recording.costs, recording.models
    longest = max(cost.seconds for cost in costs.values())
    most = max(cost.peak or 1 for cost in costs.values())
    networks = empty_networks(models.config)  # without memory; of those that compute, weights may be packed
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
    note = f"A step took {costs['denoise'].seconds / steps:.2f} seconds. Memory is the most that the {of} had in use, "
    note += "with the weights. The attention maps were computed meanwhile, so without a report it is a little faster."
    return {"costs": "".join(rows), "costs_note": note}


def write_report(path: str | os.PathLike, page: str, overwrite: bool = False) -> None:
    """Write the page, there whole or not at all, and never over an existing file unless `overwrite`.

    Raises as `images.write_png` does.
    """
    write_whole(Path(path), lambda file: file.write(page.encode("utf-8")), overwrite)
