"""Make the pictures in README.md, all with the tiny model in data/. They are written to images/.

    python scripts/make_gallery.py [--out images]

No picture is picked by hand: seeds count up from 0.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.support.command_line import Parser, exit_status
from scripts.support.output_files import make_folder

if TYPE_CHECKING:
    from PIL import Image

    from sd.models import Models

# torch and sd are imported inside the functions, so that Ctrl-C or a missing torch gives a one-line error in main.

PROMPTS = [
    "a red house on green hills at noon, on the left",
    "a blue lighthouse by the sea at night, with the moon",
    "a yellow balloon over mountains at dawn, in the middle",
    "a white sailboat at sea at sunset, with the sun",
    "a purple tent in the snow at night, on the right",
    "a green cactus in the desert at noon, with the sun, no clouds",
    "a red tree in the snow at dawn, on the left",
    "sand dunes at sunset, with clouds",
]
WINDMILLS = [
    "a red windmill at night",
    "a blue windmill in the snow, on the right",
    "a yellow windmill by the sea at sunset",
    "a green windmill in the mountains, on the left",
    "a purple windmill in the desert at night, with the moon",
    "a red house at night",
]
SAMPLER_STEPS = (5, 10, 20, 50)
FEW_STEPS = ("lcm", "tcd")  # samplers for a model that was distilled, and without guidance


def prompts_sheet(models: Models) -> Image.Image:
    """Eight prompts with four seeds each."""
    from sd import generate
    from sd.inside.contact_sheet import contact_sheet

    seeds = range(4)
    rows = [list(generate([prompt] * len(seeds), models=models, seed=0)) for prompt in PROMPTS]
    # The label of the first picture is the prompt, and extends over the whole row.
    return contact_sheet(rows, [[prompt, "", "", ""] for prompt in PROMPTS])


def steps_sheet(models: Models, prompt: str = PROMPTS[0]) -> Image.Image:
    """One picture at every fourth step: the noisy latents, decoded, and the predicted x_0, decoded."""
    from sd import pipeline
    from sd.inside.contact_sheet import contact_sheet
    from sd.noise import make_generators
    from sd.samplers import SAMPLERS

    generators = make_generators(0, 1)
    sampler = SAMPLERS["dpm++2m"](generators, schedule=models.config.schedule)
    sampler.set_inference_timesteps(20)
    latents = pipeline.get_latents(models, seed=generators)
    steps = list(pipeline.denoise(models, latents, pipeline.encode_prompt(models, prompt), sampler))
    shown = [*steps[:-1:4], steps[-1]]
    rows = [
        [pipeline.decode_latents(models, step.latents)[0] for step in shown],
        [pipeline.decode_latents(models, step.denoised)[0] for step in shown],
    ]
    return contact_sheet(rows, [[f"step {s.index + 1}: x_t" for s in shown], ["predicted x_0"] * len(shown)])


def changes_sheet(models: Models) -> Image.Image:
    """A picture and three changes: another time of day, a negative prompt against clouds, the right half repainted."""
    from PIL import Image

    from sd import generate
    from sd.inside.contact_sheet import contact_sheet

    height = width = models.config.image_size
    noon = generate(PROMPTS[0] + ", with clouds", models=models, seed=0)
    house = "a red house on green hills at night, on the left, with the moon"
    night = generate(house, "at noon, by day", noon, strength=0.6, models=models, seed=0)
    clear = generate("a red house on green hills at noon, on the left", "clouds", models=models, seed=0)
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, height // 4, width, height))
    tree = "a yellow tree on green hills at noon, on the right"
    repainted = generate(tree, "", noon, mask, 1.0, models=models, seed=0)
    labels = ["from noon ...", "to night, strength 0.6", "negative: clouds", "right half repainted"]
    return contact_sheet([[noon, night, clear, repainted]], [labels])


def samplers_sheet(models: Models, prompt: str = PROMPTS[2]) -> Image.Image:
    """The same prompt and seed with every sampler and with different numbers of steps."""
    from sd import generate
    from sd.inside.contact_sheet import contact_sheet
    from sd.samplers import SAMPLERS

    rows, labels, distilled = [], [], with_few_steps(models)
    for name in SAMPLERS:
        options = {"models": models, "seed": 0, "sampler_name": name}
        if name in FEW_STEPS:
            options |= {"models": distilled, "do_cfg": False}
        rows.append([generate(prompt, n_inference_steps=steps, **options) for steps in SAMPLER_STEPS])
        labels.append([f"{name}, {steps} steps" for steps in SAMPLER_STEPS])
    return contact_sheet(rows, labels)


def few_steps_sheet(models: Models) -> Image.Image:
    """Three prompts: 20 and 4 guided steps of the tiny model, and 8, 4, 2 and 1 of the one distilled from it."""
    from sd import generate
    from sd.inside.contact_sheet import contact_sheet

    distilled = {"models": with_few_steps(models), "do_cfg": False, "sampler_name": "lcm"}
    ways = {f"{n} steps, guided": {"models": models, "n_inference_steps": n} for n in (20, 4)}
    ways |= {f"distilled, {n}": distilled | {"n_inference_steps": n} for n in (8, 4, 2, 1)}
    rows = [[generate(prompt, seed=0, **way) for way in ways.values()] for prompt in PROMPTS[:3]]
    return contact_sheet(rows, [list(ways), *([""] * len(ways) for _ in rows[1:])])


def windmill_sheet(models: Models) -> Image.Image:
    """A windmill where no picture of its training shows one: with the LoRA, and with the word of textual inversion."""
    from sd import generate
    from sd.adapters.textual_inversion import with_embeddings
    from sd.files import DATA
    from sd.inside.contact_sheet import contact_sheet

    ways = {
        "LoRA": models.with_loras([DATA / "tiny-windmill.safetensors"]),
        "textual inversion": with_embeddings(models, [(DATA / "tiny-windmill-word.safetensors", "windmill")]),
    }
    rows = [[generate(prompt, models=way, seed=0) for prompt in WINDMILLS] for way in ways.values()]
    return contact_sheet(rows, [[name, *[""] * (len(WINDMILLS) - 1)] for name in ways])


def with_few_steps(models: Models) -> Models:
    """The tiny model with the LoRA that was distilled from it."""
    from sd.files import DATA

    return models.with_loras([DATA / "tiny-lcm.safetensors"])


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("make_gallery.py", __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).resolve().parent.parent / "images", metavar="DIR")
    out = parser.parse_args(arguments).out
    return exit_status("make_gallery.py", lambda: make(out), "interrupted; the pictures printed above are complete.")


def make(out: Path) -> None:
    make_folder("--out", out)
    from sd import load_models
    from sd.images import write_png

    models = load_models()
    sheets = {"steps": steps_sheet, "changes": changes_sheet, "prompts": prompts_sheet, "samplers": samplers_sheet}
    sheets |= {"few_steps": few_steps_sheet, "windmill": windmill_sheet}
    for name, draw in sheets.items():
        write_png(out / f"{name}.png", draw(models), overwrite=True)
        print(out / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
