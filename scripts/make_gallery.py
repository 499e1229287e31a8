"""Make the sheets of pictures in images/, which README.md and sd/training/README.md show, with the tiny model in data/.

    python scripts/make_gallery.py [--out images] [--earlier earlier.ckpt]

With --earlier, `two_things.png` compares the tiny model with an earlier one, which was trained without two things.

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
    import numpy as np
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
    "a red house and a yellow tree at noon",
    "two blue tents in the mountains",
]
TWO_THINGS = "a red house and a blue lighthouse"
WINDMILLS = [
    "a red windmill at night",
    "a blue windmill in the snow, on the right",
    "a yellow windmill by the sea at sunset",
    "a green windmill on green hills, on the left",
    "a white windmill in the snow at night, with the moon",
    "a red house at night",
]
SAMPLER_STEPS = (5, 10, 20, 50)
FEW_STEPS = ("lcm", "tcd")  # samplers for a model that was distilled, and without guidance

# Prompts for three outlines and a drawing by hand: three rows of pictures.
CONTROLLED = [
    ("a red house at noon", "a white sailboat at dawn", "a yellow balloon at noon", "a green tree at noon"),
    ("a blue house at night", "a red sailboat at night", "a purple balloon at sunset", "a red tree at sunset"),
    ("a yellow house at dawn", "a purple sailboat at sunset", "a red balloon at night", "a white tree at night"),
]
STROKES = [  # of a drawing: points (x, y) in pixels
    [(60, 118), (62, 104), (59, 86)],  # the trunk
    [(69, 119), (68, 102), (71, 87)],
    [(61, 87), (48, 84), (42, 73), (46, 60), (44, 50), (54, 40), (66, 37), (78, 41)],  # the crown
    [(78, 41), (88, 50), (86, 62), (90, 72), (82, 84), (70, 87), (60, 86)],
    [(0, 92), (18, 86), (38, 88), (58, 92)],  # the hill
    [(72, 94), (92, 88), (110, 84), (127, 87)],
    [(14, 26), (18, 17), (27, 15), (33, 22), (32, 31), (24, 36), (16, 33), (14, 26)],  # the sun
]

# Rough paintings: each a prompt and rectangles, (colour, (left, top, right, bottom)), the ground first.
SKY, SUN, GROUND = (120, 180, 240), (16, 12, 34, 30), (0, 84, 128, 128)
PAINTINGS = [
    (
        "a red house on green hills at noon, on the right, with the sun",
        [((90, 180, 70), GROUND), ((200, 40, 40), (62, 64, 105, 101)), ((110, 70, 60), (56, 50, 111, 65))],
    ),
    (
        "a white sailboat at sea at noon, in the middle, with the sun",
        [((50, 110, 190), GROUND), ((240, 240, 240), (60, 36, 84, 84)), ((130, 80, 50), (42, 84, 92, 96))],
    ),
    (
        "a purple tree in the desert at noon, on the right, with the sun",
        [((225, 185, 110), GROUND), ((120, 80, 50), (86, 72, 94, 104)), ((140, 70, 180), (64, 30, 116, 72))],
    ),
    (
        "a yellow balloon over mountains at noon, in the middle, with the sun",
        [((110, 140, 110), GROUND), ((235, 200, 50), (46, 18, 90, 62)), ((130, 80, 50), (62, 74, 74, 84))],
    ),
]


def prompts_sheet(models: Models) -> Image.Image:
    """Ten prompts with four seeds each."""
    from sd import generate
    from sd.inside.contact_sheet import contact_sheet

    seeds = range(4)
    rows = [list(generate([prompt] * len(seeds), models=models, seed=0)) for prompt in PROMPTS]
    # The label of the first picture is the prompt, and extends over the whole row.
    return contact_sheet(rows, [[prompt, "", "", ""] for prompt in PROMPTS])


def steps_sheet(models: Models) -> Image.Image:
    """One picture at every fourth step: the noisy latents, decoded, and the predicted x_0, decoded."""
    from sd import pipeline
    from sd.inside.contact_sheet import contact_sheet
    from sd.noise import make_generators
    from sd.samplers import SAMPLERS

    generators = make_generators(0, 1)
    sampler = SAMPLERS["dpm++2m"](generators, schedule=models.config.schedule)
    sampler.set_inference_timesteps(20)
    latents = pipeline.get_latents(models, seed=generators)
    steps = list(pipeline.denoise(models, latents, pipeline.encode_prompt(models, PROMPTS[0]), sampler))
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


def painted_sheet(models: Models) -> Image.Image:
    """Rectangles in a few colours, and below them the pictures that image-to-image makes of them."""
    from sd import generate
    from sd.inside.contact_sheet import contact_sheet

    paintings = [paint(rectangles) for _, rectangles in PAINTINGS]
    finished = [
        generate(prompt, "", painting, strength=0.7, models=models, seed=0)
        for (prompt, _), painting in zip(PAINTINGS, paintings)
    ]
    labels = [["painted", *[""] * (len(paintings) - 1)], ["image to image, strength 0.7", *[""] * (len(finished) - 1)]]
    return contact_sheet([paintings, finished], labels)


def paint(rectangles: list[tuple]) -> np.ndarray:
    """A sky with the sun, a square of 18 pixels, and these rectangles: uint8 (128, 128, 3)."""
    import numpy as np
    from PIL import Image

    image = Image.new("RGB", (128, 128), SKY)
    for colour, box in [((250, 230, 120), SUN), *rectangles]:
        image.paste(colour, box)
    return np.asarray(image)


def samplers_sheet(models: Models) -> Image.Image:
    """The same prompt and seed with every sampler and with different numbers of steps; `lcm` and `tcd` draw with the
    distilled model, without guidance."""
    from sd import generate
    from sd.inside.contact_sheet import contact_sheet
    from sd.samplers import SAMPLERS

    rows, labels, distilled = [], [], with_few_steps(models)
    for name in SAMPLERS:
        options = {"models": models, "seed": 0, "sampler_name": name}
        if name in FEW_STEPS:
            options |= {"models": distilled, "do_cfg": False}
        rows.append([generate(PROMPTS[2], n_inference_steps=steps, **options) for steps in SAMPLER_STEPS])
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


def control_sheet(models: Models) -> Image.Image:
    """Outlines of three scenes and a drawing by hand, and under each three pictures that follow it."""
    import numpy as np

    from sd import generate
    from sd.adapters.control import Control
    from sd.adapters.controlnet_files import load_controlnet
    from sd.files import DATA
    from sd.inside.contact_sheet import contact_sheet

    net = load_controlnet(DATA / "tiny-scribble.safetensors", models)
    images = [np.asarray(image.convert("RGB")) for image in (*outlines_of_scenes(), drawing_by_hand())]
    rows, labels = [images], [["outline", "outline", "outline", "drawn by hand"]]
    for prompts in CONTROLLED:
        options = {"models": models, "seed": 0}
        rows.append([generate(text, control=[Control(net, image)], **options) for text, image in zip(prompts, images)])
        labels.append(list(prompts))
    return contact_sheet(rows, labels)


def two_things_sheet(models: Models, earlier: Models) -> Image.Image:
    """A prompt for two things, and where the U-Net looked for its words: an earlier model, and the tiny model."""
    import numpy as np

    from sd import generate
    from sd.inside.contact_sheet import contact_sheet
    from sd.inside.tracer import Tracer

    words = [word for word in TWO_THINGS.split() if word not in ("a", "and")]
    rows, labels = [], []
    for name, model in {"before": earlier, "after": models}.items():
        for seed in range(2):
            with Tracer(model, attention=True) as trace:
                image = generate(TWO_THINGS, models=model, seed=seed)
            maps = [trace.word_map(word, TWO_THINGS).numpy() for word in words]
            shares = [(each - each.min()) / (each.max() - each.min()) for each in maps]
            rows.append([image, *((255 * share[..., None].repeat(3, axis=2)).astype(np.uint8) for share in shares)])
            labels.append([f"{name}, seed {seed}", *words])
    return contact_sheet(rows, labels)


def outlines_of_scenes() -> list[Image.Image]:
    """The outlines of three renders of the toy world: a house, a sailboat and a balloon."""
    import numpy as np
    import torch
    from PIL import Image

    from sd.images import from_uint8
    from sd.training.outlines import outlines
    from sd.training.world.render import render
    from sd.training.world.scenes import Scene

    scenes = (
        Scene("noon", "hills", "house", "green", "left", light=True, clouds=True),
        Scene("dawn", "sea", "sailboat", "red", "centre", light=True, clouds=False),
        Scene("noon", "mountains", "balloon", "blue", "right", light=False, clouds=True),
    )
    pictures = np.stack([np.asarray(render(scene, seed)) for seed, scene in enumerate(scenes)])
    lines = outlines(from_uint8(torch.from_numpy(pictures).permute(0, 3, 1, 2)))  # (3, 1, 128, 128)
    return [Image.fromarray(one.mul(255).byte().numpy()) for one in lines[:, 0]]


def drawing_by_hand() -> Image.Image:
    """A tree on a hill under the sun, in a few strokes: white on black, 128 x 128 pixels."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (128, 128))
    for stroke in STROKES:
        ImageDraw.Draw(image).line(stroke, fill=255, width=2)
    return image


def with_few_steps(models: Models) -> Models:
    """The tiny model with the LoRA that was distilled from it."""
    from sd.files import DATA

    return models.with_loras([DATA / "tiny-lcm.safetensors"])


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("make_gallery.py", __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).resolve().parent.parent / "images", metavar="DIR")
    add("--earlier", type=Path, metavar="FILE", help="also draw two_things.png, with this model for comparison")
    options = parser.parse_args(arguments)
    interrupted = "interrupted; the pictures printed above are complete."
    return exit_status("make_gallery.py", lambda: make(options.out, options.earlier), interrupted)


def make(out: Path, earlier: Path | None = None) -> None:
    """Draw all sheets, and with an `earlier` model also the comparison with it."""
    make_folder("--out", out)
    from sd import load_models
    from sd.images import write_png

    models, before = load_models(), load_models(earlier) if earlier else None
    sheets = {"steps": steps_sheet, "changes": changes_sheet, "prompts": prompts_sheet, "painted": painted_sheet}
    sheets |= {"samplers": samplers_sheet, "few_steps": few_steps_sheet}
    sheets |= {"windmill": windmill_sheet, "control": control_sheet}
    if before:
        sheets["two_things"] = lambda models: two_things_sheet(models, before)
    for name, draw in sheets.items():
        write_png(out / f"{name}.png", draw(models), overwrite=True)
        print(out / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
