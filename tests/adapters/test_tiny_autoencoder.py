"""The tiny autoencoder: every layout of its files, in the place of the VAE, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sd import generate, load_models, pipeline
from sd.adapters.tiny_autoencoder import TinyDecoder, TinyEncoder, is_tiny_autoencoder, load_tiny_autoencoder
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.files import write_checkpoint
from sd.config import SD15
from sd.inside.film import frames
from sd.inside.preview import SD15_PREVIEW, preview_for
from sd.inside.recording import record
from sd.model_saver import save_folder
from sd.request import Request
from tests.support.marks import slow
from tests.support.synthetic import INPAINTING_MICRO, MICRO, random_models, random_state
from tests.support.tiny_autoencoders import (
    diffusers_state,
    published,
    random_tiny_autoencoder,
    write_diffusers,
    write_published,
)

OPTIONS = {"seed": 3, "n_inference_steps": 2, "height": 32, "width": 40}


@pytest.fixture(scope="module")
def networks():
    return random_tiny_autoencoder()


@pytest.fixture(scope="module")
def folder(networks, tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("taesd"), networks)


def same(one, other):
    a, b = ({f"{n}.{k}": x for n, net in each.items() for k, x in net.state_dict().items()} for each in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_sizes(networks):
    """The numbers of weights are those that the published ones have."""
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert counts == {"encoder": 1_222_532, "decoder": 1_222_531}
    assert {name: len(network.state_dict()) for name, network in networks.items()} == {"encoder": 67, "decoder": 67}
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = networks["encoder"](image)
    assert latents.shape == (2, 4, 2, 3)
    assert networks["decoder"](latents).shape == image.shape


def test_the_encoder_needs_no_noise(networks):
    """It has no distribution to sample from. One image still makes as many latents as there are noises."""
    image, noise = torch.rand(1, 3, 16, 16), torch.randn(3, 4, 2, 2)
    latents = networks["encoder"](image, noise)
    assert latents.shape == noise.shape
    assert all(torch.equal(one, networks["encoder"](image)[0]) for one in latents)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_two_files(tmp_path, networks, suffix):
    folder = write_published(tmp_path / "taesd", networks, suffix)
    for path in (folder, folder / f"taesd_decoder.{suffix}", folder / f"taesd_encoder.{suffix}"):
        assert is_tiny_autoencoder(path)
        assert same(load_tiny_autoencoder(path, "cpu", torch.float32), networks)


def test_the_layout_of_diffusers(tmp_path, networks):
    folder = write_diffusers(tmp_path / "taesd", networks)
    file = folder / "diffusion_pytorch_model.safetensors"
    for path in (folder, file):
        assert is_tiny_autoencoder(path)
        assert same(load_tiny_autoencoder(path, "cpu", torch.float32), networks)
    (folder / "config.json").unlink()
    assert same(load_tiny_autoencoder(file, "cpu", torch.float32), networks)


def test_a_decoder_alone_is_enough_for_previews_only(tmp_path, networks, demo_checkpoint):
    path = tmp_path / "taesd_decoder.pth"
    write_checkpoint(path, published(networks)["decoder"])
    assert same(load_tiny_autoencoder(path, "cpu", torch.float32), {"decoder": networks["decoder"]})
    with pytest.raises(CheckpointError, match=r"^vae: .* is a tiny decoder alone: put its encoder beside it\.$"):
        load_models(demo_checkpoint, vae=path)
    path = tmp_path / "one" / "taesd_encoder.pth"
    path.parent.mkdir()
    write_checkpoint(path, published(networks)["encoder"])
    with pytest.raises(CheckpointError, match=r"is an encoder alone: put taesd_decoder beside it\.$"):
        load_tiny_autoencoder(path)


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
def test_it_takes_the_place_of_the_vae(folder, networks, demo_checkpoint, dtype):
    models = load_models(demo_checkpoint, "cpu", dtype, vae=folder)
    assert isinstance(models.encoder, TinyEncoder)
    assert isinstance(models.decoder, TinyDecoder)
    latents = torch.randn(1, 4, 4, 5)
    expected = ((networks["decoder"](latents) + 1) * 127.5).clamp(0, 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(pipeline.decode_latents(models, latents)[0] - expected).max() <= (0 if dtype == torch.float32 else 9)
    assert models.decoder.layers[1].weight.dtype == dtype


def test_a_checkpoint_without_a_vae_takes_it(tmp_path, folder):
    state = {key: x for key, x in random_state(MICRO).items() if not key.startswith("first_stage_model.")}
    write_checkpoint(tmp_path / "no-vae.ckpt", state, MICRO.to_dict())
    with pytest.raises(CheckpointError, match="has no VAE: give one with --vae"):
        load_models(tmp_path / "no-vae.ckpt")
    assert isinstance(load_models(tmp_path / "no-vae.ckpt", vae=folder).decoder, TinyDecoder)


@pytest.mark.parametrize("config", [slow(MICRO), INPAINTING_MICRO])
def test_every_kind_of_image(networks, config):
    models = replace(random_models(config), **networks)
    picture = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    mask = Image.new("L", (40, 32))
    mask.paste(255, (8, 8, 24, 24))
    for more in ({}, {"input_image": picture}, {"input_image": picture, "mask_image": mask}):
        images = generate(["a cat", "a dog"], models=models, **OPTIONS, **more)
        assert images.shape == (2, 32, 40, 3)
    assert np.array_equal(images[0][:8], picture[:8])


def test_a_model_with_it_is_not_saved(tmp_path, networks):
    with pytest.raises(ValueError, match=r"^models should have their own VAE to be saved, not a tiny autoencoder"):
        save_folder(replace(random_models(MICRO), **networks), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_guidance_by_a_loss(networks):
    models = replace(random_models(MICRO), **networks)
    request = Request("a cat", **OPTIONS)
    sampler, latents, _ = pipeline.prepare(models, request)
    context = pipeline.encode_prompt(models, "a cat", None)
    steps = pipeline.denoise(models, latents, context, sampler, guidance=lambda images: images.square().mean())
    assert all(step.latents.isfinite().all() for step in steps)


def test_previews(networks):
    """The latents are the VAE's, so the known map for SD 1.x holds; other models get a map of their decoder."""
    models = replace(random_models(MICRO), **networks)
    assert preview_for(models)(torch.randn(1, 4, 4, 5)).shape == (1, 4, 5, 3)
    sd15 = replace(models, config=replace(MICRO, vae=SD15.vae))
    assert preview_for(sd15) is SD15_PREVIEW


def test_films_of_sd15_are_decoded_by_it(networks):
    """Its decoder is fast enough for every frame, also where the image is the full decoder's."""
    models = replace(random_models(MICRO), config=replace(MICRO, vae=SD15.vae))
    recording = record(Request("a cat", **OPTIONS), models)
    rough, fine = frames(recording), frames(replace(recording, preview=networks["decoder"]))
    assert np.array_equal(rough[-1], fine[-1])
    decoded = pipeline.decode_latents(replace(models, **networks), recording.moments[0].denoised)[0]
    assert np.array_equal(fine[0], decoded)
    tiny = record(Request("a cat", **OPTIONS), replace(models, **networks))
    film = frames(tiny)
    assert np.array_equal(film[0], pipeline.decode_latents(tiny.models, tiny.moments[0].denoised)[0])


def with_channels(state, channels):
    return {
        key: torch.zeros(64, channels, 3, 3) if key == "1.weight" and x.shape[1] == 4 else x for key, x in state.items()
    }


@pytest.mark.parametrize("folder_name, what", [("taesdxl", "taesdxl"), ("taesd3", "taesd3"), ("TAEF1", "TAEF1")])
def test_other_families_are_refused_by_name(tmp_path, networks, folder_name, what):
    folder = write_published(tmp_path / folder_name, networks)
    with pytest.raises(CheckpointError, match=rf"^vae: .* Stable Diffusion 1\.x and 2\.x, taesd, not {what}\.$"):
        load_tiny_autoencoder(folder)


def test_other_families_are_refused_by_shape(tmp_path, networks, demo_checkpoint):
    folder = write_published(tmp_path / "a", networks)
    write_checkpoint(folder / "taesd_decoder.pth", with_channels(published(networks)["decoder"], 16))
    for load in (load_tiny_autoencoder, lambda path: load_models(demo_checkpoint, vae=path)):
        with pytest.raises(CheckpointError, match=r"for 4 channels of latents, not one of .* 3 or FLUX, for 16\.$"):
            load(folder)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"act_fn": "silu"}, "act_fn should be 'relu'"),
        ({"scaling_factor": 0.18215}, "scaling_factor should be 1, "),
        ({"upsample_fn": "bilinear"}, "upsample_fn should be 'nearest'"),
    ],
)
def test_bad_configurations(tmp_path, networks, change, problem):
    with pytest.raises(CheckpointError, match=problem):
        load_tiny_autoencoder(write_diffusers(tmp_path / "a", networks, **change))


def test_what_is_wrong_is_listed(tmp_path, networks):
    state = published(networks)["decoder"]
    del state["19.bias"]
    state["7.weight"] = torch.zeros(3)
    path = tmp_path / "taesd_decoder.pth"
    write_checkpoint(path, state)
    with pytest.raises(CheckpointError) as error:
        load_tiny_autoencoder(path)
    message = str(error.value)
    assert message.startswith(f"vae: {path}: The checkpoint does not fit the network, 2 problems:")
    assert "tiny decoder: missing key layers.19.bias" in message


def test_other_files_are_named(tmp_path, demo_checkpoint, networks):
    with pytest.raises(CheckpointError, match=r"has no tiny autoencoder: give taesd_encoder, taesd_decoder, or their"):
        load_tiny_autoencoder(demo_checkpoint)
    with pytest.raises(FileNotFoundError, match=r"^vae: There is no file or folder at "):
        load_tiny_autoencoder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"^--preview: There is no file or folder at "):
        load_tiny_autoencoder(tmp_path / "none", argument="--preview")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="should hold taesd_encoder and taesd_decoder, or an AutoencoderTiny"):
        load_tiny_autoencoder(tmp_path / "empty")
    assert not any(map(is_tiny_autoencoder, (demo_checkpoint, tmp_path / "none", tmp_path, 3)))


@pytest.mark.parametrize("layout", [published, diffusers_state])
def test_given_as_a_checkpoint_it_is_named(tmp_path, networks, layout):
    state = layout(networks)
    path = tmp_path / "a.pth"
    write_checkpoint(path, state.get("decoder", state))
    with pytest.raises(CheckpointError, match="is TAESD, a tiny autoencoder: give it as `vae=`"):
        load_models(path)


def test_given_as_a_checkpoint_its_folder_is_named(tmp_path, networks):
    with pytest.raises(CheckpointError, match="is the folder of a tiny autoencoder: give it as `vae=`, beside"):
        load_models(write_diffusers(tmp_path / "a", networks))
