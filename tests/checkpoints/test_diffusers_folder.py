"""Folders in the layout of diffusers: right ones, written by diffusers and transformers, and wrong ones."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.diffusers_folder import read_folder
from sd.checkpoints.files import read_checkpoint, write_checkpoint
from sd.model_converter import to_compvis
from sd.model_loader import load_models
from sd.model_saver import save_folder
from tests.support.synthetic import INPAINTING_MICRO, MICRO, SD2_MICRO, random_models, random_state

VAE = "first_stage_model."


def save(config, folder, **options):
    """A folder with the random weights of a configuration."""
    reference = pytest.importorskip("tests.parity.reference")
    state = random_state(config)
    parts = {"unet": reference.unet, "vae": reference.vae, "text_encoder": reference.text_encoder}
    for name, build in parts.items():
        build(config, state).save_pretrained(folder / name, **options)
    return state


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def same(models, state):
    actual = to_compvis(models)
    return actual.keys() == state.keys() and all(torch.equal(actual[key], state[key]) for key in state)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers") / "micro"
    save(MICRO, folder)
    change(folder / "unet" / "config.json", sample_size=MICRO.image_size // MICRO.vae.downscale)
    return folder


@pytest.fixture
def folder(kept, tmp_path):
    """A copy to change."""
    return shutil.copytree(kept, tmp_path / "micro")


def test_every_weight_and_number_arrives(folder):
    models = load_models(folder, "cpu", torch.float32)
    assert models.config == MICRO
    assert same(models, random_state(MICRO))


@pytest.mark.parametrize("config", [INPAINTING_MICRO], ids=["inpainting"])
def test_other_networks(tmp_path, config):
    state = save(config, tmp_path)
    models = load_models(tmp_path, "cpu", torch.float32)
    assert models.config.unet == config.unet
    assert same(models, state)


def test_files_of_torch(tmp_path):
    state = save(MICRO, tmp_path, safe_serialization=False)
    for name in ("unet", "vae", "text_encoder"):
        for file in (tmp_path / name).glob("*.safetensors"):  # transformers 5 writes nothing else
            torch.save(read_checkpoint(file).state, file.with_suffix(".bin"))
            file.unlink()
    assert same(load_models(tmp_path, "cpu", torch.float32), state)


def test_the_file_of_full_precision_comes_first(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors"):
        (folder / "unet" / name).write_text("not to be read")
    load_models(folder, "cpu")
    shutil.copy(file, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    file.unlink()
    load_models(folder, "cpu")


def test_an_older_vae(folder):
    """Its attention has other names, and 1x1 convolutions."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    older = {}
    for key, tensor in read_checkpoint(file).state.items():
        for new, old in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        older[key] = tensor
    assert any("proj_attn" in key for key in older)
    file.unlink()
    torch.save(older, file.with_suffix(".bin"))
    assert same(load_models(folder, "cpu", torch.float32), random_state(MICRO))


def test_the_schedule(folder):
    (folder / "scheduler").mkdir()
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"prediction_type": "v_prediction", "beta_end": 0.02, "steps_offset": 1}))
    schedule = load_models(folder, "cpu").config.schedule
    assert (schedule.prediction_type, schedule.beta_end, schedule.beta_start) == ("v_prediction", 0.02, 0.00085)
    change(path, prediction_type="sample")
    with pytest.raises(CheckpointError, match="prediction_type should be 'epsilon' or 'v_prediction'"):
        load_models(folder, "cpu")


@pytest.mark.parametrize(
    "pipeline, name",
    [
        ("StableDiffusionXLPipeline", "Stable Diffusion XL"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "FLUX"),
        ("PixArtAlphaPipeline", "PixArt"),
        ("StableDiffusionDepth2ImgPipeline", "Stable Diffusion 2's depth model"),
        ("StableDiffusionUpscalePipeline", "Stable Diffusion 2's upscaler"),
        ("StableDiffusionInstructPix2PixPipeline", "an InstructPix2Pix model"),
        ("StableUnCLIPImg2ImgPipeline", "Stable unCLIP"),
    ],
)
def test_the_pipelines_of_other_models_are_named(tmp_path, pipeline, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(CheckpointError, match=f"is {name}.*; give a model of Stable Diffusion 1.x or 2.x"):
        load_models(tmp_path, "cpu")


@pytest.mark.slow
def test_without_its_scheduler_a_folder_of_sd_2_is_a_guess(tmp_path):
    save_folder(random_models(SD2_MICRO), tmp_path / "model")
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").unlink()
    assert read_folder(tmp_path / "model").prediction_guessed
    assert load_models(tmp_path / "model", "cpu", prediction_type="v_prediction").config.schedule == SD2_MICRO.schedule


def test_a_vae_of_diffusers_for_another_checkpoint(folder, tmp_path):
    state = random_state(MICRO)
    other = random_state(MICRO, seed=1)
    write_checkpoint(tmp_path / "other.safetensors", other, MICRO.to_dict())
    models = load_models(tmp_path / "other.safetensors", "cpu", torch.float32, vae=folder / "vae")
    assert same(models, other | {key: tensor for key, tensor in state.items() if key.startswith(VAE)})


@pytest.mark.parametrize("version, image_size", [("0.6.0", 512), ("0.9.0", 256), (None, 256)])
def test_early_versions_of_diffusers_wrote_a_wrong_size(folder, version, image_size):
    change(folder / "unet" / "config.json", sample_size=32, _diffusers_version=version)
    assert load_models(folder, "cpu").config.image_size == image_size // 8 * MICRO.vae.downscale


def test_the_vae_of_xl_is_refused(folder, tmp_path):
    change(folder / "vae" / "config.json", scaling_factor=0.13025)
    write_checkpoint(tmp_path / "micro.safetensors", random_state(MICRO), MICRO.to_dict())
    with pytest.raises(CheckpointError, match="This is the VAE of Stable Diffusion XL, which makes other latents"):
        load_models(tmp_path / "micro.safetensors", "cpu", vae=folder / "vae")


def test_a_vae_alone(folder):
    with pytest.raises(CheckpointError, match="VAE alone: give it as `vae=`"):
        load_models(folder / "vae", "cpu")


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("unet", {"act_fn": "gelu"}, "act_fn should be 'silu', as in Stable Diffusion, not 'gelu'"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type should be None"),
        ("unet", {"down_block_types": ["AttnDownBlock2D"]}, "down_block_types should be a list of"),
        ("unet", {"down_block_types": 7}, "down_block_types should be a list of"),
        ("unet", {"attention_head_dim": [5, 10, 20, 20]}, "attention_head_dim should be one number, or one for"),
        ("unet", {"layers_per_block": 3}, "missing key model.diffusion_model.input_blocks"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act should be 'quick_gelu' or 'gelu', as in"),
        ("vae", {"scaling_factor": "much"}, "config.vae.scaling_factor should be like 0.18215"),
        ("vae", {"shift_factor": 0.1}, "shift_factor should be None"),
    ],
)
def test_other_models_are_refused(folder, name, values, message):
    change(folder / name / "config.json", **values)
    with pytest.raises(CheckpointError, match=message):
        load_models(folder, "cpu")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": ' + "[" * 100_000, "\0\xff"])
def test_a_damaged_description(folder, text):
    (folder / "vae" / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"vae.config\.json is damaged: it should hold a JSON object"):
        load_models(folder, "cpu")


def test_incomplete_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is a folder without unet/config.json; give a .ckpt or .safetensors"):
        load_models(tmp_path / "empty", "cpu")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "a-00001-of-00002.safetensors")
    with pytest.raises(
        CheckpointError, match=r"vae has no weights: it should hold diffusion_pytorch_model.safetensors"
    ):
        load_models(folder, "cpu")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(CheckpointError, match="is a folder without text_encoder/config.json"):
        load_models(folder, "cpu")


def test_further_blocks_are_refused_and_other_keys_left_out(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = read_checkpoint(file).state
    odd = dict.fromkeys(["x", "down_blocks.1.motion.0.a"], torch.zeros(1))
    further = ["down_blocks.77.resnets.0.norm1.weight", "up_blocks.9.upsamplers.0.conv.weight"]
    file.unlink()
    torch.save(state | odd, file.with_suffix(".bin"))
    with pytest.warns(UserWarning, match=r"Left out, .*: model.diffusion_model.x, .*motion"):
        assert same(load_models(folder, "cpu", torch.float32), random_state(MICRO))
    torch.save(state | odd | dict.fromkeys(further, torch.zeros(1)), file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="2 problems"):
        load_models(folder, "cpu")


def test_its_memory_can_be_released(folder):
    checkpoint = read_folder(folder)
    assert len(checkpoint.mappings) == 3
    checkpoint.release()
    assert torch.equal(checkpoint.state[f"{VAE}quant_conv.bias"], random_state(MICRO)[f"{VAE}quant_conv.bias"])


def add_words(folder, words, rows):
    """What textual inversion leaves behind: more rows in the table of embeddings, and their words."""
    file = folder / "text_encoder" / "model.safetensors"
    state = dict(read_checkpoint(file).state)
    key = next(key for key in state if key.endswith("token_embedding.weight"))
    state[key] = torch.cat([state[key], torch.full((rows, state[key].shape[1]), 0.5)])
    file.unlink()
    torch.save(state, file.with_name("pytorch_model.bin"))
    change(folder / "text_encoder" / "config.json", vocab_size=49408 + rows)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps(words))


def test_a_word_of_textual_inversion_is_one_token(folder):
    add_words(folder, {"<my-cat>": 49408}, 1)
    models = load_models(folder, "cpu", torch.float32)
    tokens = models.tokenizer("a <my-cat>")
    assert tokens[0, :4].tolist() == [49406, 320, 49408, 49407]
    assert torch.equal(models.clip.token_embedding.weight[49408], torch.full((32,), 0.5))
    assert models.clip(tokens).shape == (1, 77, 32)


def test_a_word_without_a_vector_is_named(folder):
    add_words(folder, {"<my-cat>": 49408, "<my-dog>": 49409}, 1)
    with pytest.warns(UserWarning, match="no vector for the word '<my-dog>': it is read as letters"):
        models = load_models(folder, "cpu", torch.float32)
    assert models.tokenizer.encode("<my-cat>") == [49408]
    assert len(models.tokenizer.encode("<my-dog>")) > 1


def test_vectors_without_a_word(folder):
    add_words(folder, {}, 2)
    with pytest.warns(UserWarning, match="has 2 added words, but no tokenizer names them"):
        load_models(folder, "cpu")


def test_another_vocabulary_is_refused(folder):
    change(folder / "text_encoder" / "config.json", vocab_size=32000)
    with pytest.raises(CheckpointError, match="vocab_size should be 49408 or more, .* not 32000"):
        load_models(folder, "cpu")


def test_other_files_in_a_folder_do_not_matter(folder):
    for network in ("unet", "vae", "text_encoder"):
        (folder / network / "optimizer.bin").write_bytes(b"x")
        (folder / network / "pytorch_lora_weights.safetensors").write_bytes(b"x")
        (folder / network / "openvino_model.bin").write_bytes(b"x")
        (folder / network / "._model.safetensors").write_bytes(b"\0\5\x16\7")
        (folder / network / ".DS_Store").write_bytes(b"x")
    assert same(load_models(folder, "cpu", torch.float32), random_state(MICRO))


def test_a_split_network(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = read_checkpoint(file).state
    names = {key: f"part-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: tensor for key, tensor in state.items() if names[key] == name}, file.with_name(name))
    index = {"metadata": {}, "weight_map": names}
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    assert same(load_models(folder, "cpu", torch.float32), random_state(MICRO))


def test_zero_terminal_snr(folder):
    (folder / "scheduler").mkdir()
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    assert load_models(folder, "cpu").config.schedule.rescale_betas_zero_snr


@pytest.mark.parametrize("network, name", [("unet", "UNet2DConditionModel"), ("text_encoder", "CLIPTextModel")])
def test_the_folder_of_another_network_is_named(folder, network, name):
    with pytest.raises(
        CheckpointError, match=f"is the folder of one network, {name}; give the folder of a whole model"
    ):
        load_models(folder / network, "cpu")


def test_a_folder_without_a_vae(folder):
    (folder / "vae").rename(folder.parent / "vae")
    with pytest.raises(CheckpointError, match="This checkpoint has no VAE: give one with --vae"):
        load_models(folder, "cpu")
    assert same(load_models(folder, "cpu", torch.float32, vae=folder.parent / "vae"), random_state(MICRO))
