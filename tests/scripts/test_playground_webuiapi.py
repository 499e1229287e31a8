"""PyPI's webuiapi, a client of AUTOMATIC1111's interface that nobody here wrote: the calls of its README."""

import threading
import time

import pytest
from PIL import Image, ImageDraw

pytestmark = pytest.mark.slow
pytest.importorskip("fastapi")
webuiapi = pytest.importorskip("webuiapi")

from scripts.playground import files  # noqa: E402
from tests.support.playground import Live  # noqa: E402

SIZE = {"width": 128, "height": 128}


@pytest.fixture(scope="module")
def live():
    with Live() as live:
        yield live


@pytest.fixture(scope="module")
def api(live):
    return webuiapi.WebUIApi(host="127.0.0.1", port=live.port, sampler="Euler a", steps=3)


@pytest.fixture(scope="module")
def first(api):
    return api.txt2img(prompt="cute squirrel", negative_prompt="ugly", seed=1003, styles=["anime"], cfg_scale=7, **SIZE)


def test_txt2img(first):
    assert first.image.size == (128, 128)
    assert first.parameters["prompt"] == "cute squirrel"
    assert first.info["all_seeds"] == [1003]
    assert first.info["sampler_name"] == "Euler a"
    text = "cute squirrel\nNegative prompt: ugly\nSteps: 3, Sampler: Euler a, CFG scale: 7, Seed: 1003, Size: 128x128, "
    assert first.info["infotexts"] == [f"{text}Model: tiny"]
    assert first.image.info["parameters"] == f"{text}Model: tiny"


def test_txt2img_with_a_second_pass(api):
    latent = webuiapi.HiResUpscaler.Latent
    high = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": latent, "denoising_strength": 0.7}
    assert api.txt2img(prompt="a house", **high, **SIZE).image.size == (256, 256)


def test_a_seed_gives_the_same_picture_alone_and_in_a_batch(api):
    settings = {"prompt": "a red house", "sampler_name": "Euler", **SIZE}
    several = api.txt2img(seed=7, batch_size=2, n_iter=2, **settings)
    assert several.info["all_seeds"] == [7, 8, 9, 10]
    assert several.images[2].tobytes() == api.txt2img(seed=9, **settings).image.tobytes()


def test_img2img(api, first):
    result = api.img2img(
        images=[first.image], prompt="cute cat", seed=5555, cfg_scale=6.5, denoising_strength=0.6, **SIZE
    )
    assert result.image.size == (128, 128)
    assert result.parameters["init_images"] is None
    assert result.info["denoising_strength"] == 0.6


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("invert", [0, 1])
def test_inpainting(api, first, whole, invert):
    """What is black in the mask stays the same to the byte."""
    mask = Image.new("RGB", first.image.size, color="black")
    ImageDraw.Draw(mask).ellipse((30, 20, 90, 100), fill="white")
    options = {"inpainting_fill": 1, "inpaint_full_res": not whole, "inpainting_mask_invert": invert}
    result = api.img2img(
        images=[first.image], mask_image=mask, prompt="cute cat", seed=104, denoising_strength=0.7, **options, **SIZE
    )
    corner, centre = (2, 2), (60, 60)
    kept, changed = (centre, corner) if invert else (corner, centre)
    assert result.image.getpixel(kept) == first.image.getpixel(kept)
    assert result.image.getpixel(changed) != first.image.getpixel(changed)


def test_extras_are_refused_clearly(api, first):
    with pytest.raises(RuntimeError, match="Enlarging a finished image is not supported") as error:
        api.extra_single_image(image=first.image, upscaler_1=webuiapi.Upscaler.ESRGAN_4x, upscaling_resize=1.5)
    assert error.value.args[0] == 501
    with pytest.raises(RuntimeError, match="Enlarging a finished image is not supported"):
        api.extra_batch_images(images=[first.image], upscaler_1=webuiapi.Upscaler.ESRGAN_4x, upscaling_resize=1.5)
    with pytest.raises(RuntimeError, match="Captions for images are not supported"):
        api.interrogate(image=first.image)


def test_png_info(api, first):
    result = api.png_info(first.image)
    assert result.info == first.info["infotexts"][0]
    assert result.parameters["Seed"] == "1003"
    assert result.parameters["Negative prompt"] == "ugly"
    assert api.png_info(Image.new("RGB", (8, 8))).info == ""


def test_loras_in_the_prompt(api):
    settings = {"steps": 4, "sampler_name": "LCM", "cfg_scale": 1, **SIZE}
    result = api.txt2img(prompt="a red house <lora:tiny-lcm:1>", seed=1000, save_images=True, **settings)
    assert '"tiny-lcm: ' in result.info["infotexts"][0]


def test_scripts_that_do_not_exist_are_refused(api):
    with pytest.raises(RuntimeError, match="alwayson_scripts should be ControlNet"):
        api.txt2img(prompt="x", alwayson_scripts={"Simple wildcards": []}, **SIZE)
    with pytest.raises(RuntimeError, match="script_name should be "):
        api.txt2img(prompt="x", script_name="X/Y/Z Plot", script_args=[1], **SIZE)


def test_an_unknown_controlnet(api, first):
    unit = webuiapi.ControlNetUnit(image=first.image, module="none", model="control_v11p_sd15_canny [d14c016b]")
    with pytest.raises(RuntimeError, match="control.net should be one of those in data/"):
        api.txt2img(prompt="x", controlnet_units=[unit], alwayson_scripts={}, **SIZE)  # it keeps its default


def test_configuration(api):
    options = api.get_options()
    assert options["sd_model_checkpoint"] == "tiny.ckpt"
    assert api.set_options({"sd_model_checkpoint": "tiny.ckpt [7460a6fa]"}) is None
    assert "should be 'tiny.ckpt'" in api.set_options({"sd_model_checkpoint": "model.ckpt [7460a6fa]"})["detail"]
    assert [model["title"] for model in api.get_sd_models()] == ["tiny.ckpt"]
    assert "Euler a" in [sampler["name"] for sampler in api.get_samplers()]
    assert [lora["name"] for lora in api.get_loras()] == list(files.lora_files())
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.get_progress()["state"]["job_count"] == 0
    assert api.get_memory()["ram"]["total"] > 0
    assert api.get_cmd_flags()["api"] is True
    assert api.get_latent_upscale_modes() == [{"name": "Latent"}]
    assert [one["name"] for one in api.get_upscalers()] == ["None", "Lanczos"]
    lists = [api.get_hypernetworks(), api.get_face_restorers(), api.get_realesrgan_models(), api.get_prompt_styles()]
    assert [*lists, api.get_sd_vae()] == [[]] * 5
    assert api.controlnet_model_list() == list(files.control_files())
    assert api.get_scripts()["txt2img"] == ["controlnet"]
    assert (api.interrupt(), api.skip(), api.refresh_checkpoints()) == ({}, None, None)


def test_utilities(api):
    assert api.util_get_current_model() == "tiny.ckpt"
    assert api.util_get_model_names() == ["tiny.ckpt"]
    assert "DPM++ 2M Karras" in api.util_get_sampler_names()
    assert api.util_get_scheduler_names() == ["automatic", "karras", "uniform"]
    api.util_set_model("tiny.ckpt")
    api.util_set_model("robodiffusion")  # the closest, which is the only one
    api.util_wait_for_ready()


def in_background(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


def wait_for_a_step(api, job=0):
    while (progress := api.get_progress())["state"]["sampling_step"] < 1 or progress["state"]["job_no"] < job:
        time.sleep(0.05)
    return progress


def test_progress_and_interrupt(api):
    """The call returns what has been drawn so far."""
    thread, results = in_background(lambda: api.txt2img(prompt="a house", n_iter=3, steps=100, **SIZE))
    progress = wait_for_a_step(api)
    assert 0 < progress["progress"] < 1
    assert progress["eta_relative"] > 0
    assert (progress["state"]["job_count"], progress["state"]["sampling_steps"]) == (3, 100)
    while api.get_progress()["current_image"] is None:
        time.sleep(0.05)
    api.interrupt()
    thread.join(30)
    assert len(results[0].images) == 1
    api.util_wait_for_ready(0.1)


def test_skip(api):
    """The next picture of the call comes at once."""
    thread, results = in_background(lambda: api.txt2img(prompt="a house", n_iter=2, steps=100, **SIZE))
    for job in (0, 1):
        wait_for_a_step(api, job)
        api.skip()
    thread.join(30)
    assert len(results[0].images) == 2


def test_a_password():
    token = "a long password"
    with Live("--token", token) as live:
        api = webuiapi.WebUIApi(port=live.port)
        assert "token" in api.get_options()["detail"]
        api.set_auth("anyone", token)
        assert api.get_options()["sd_model_checkpoint"] == "tiny.ckpt"
