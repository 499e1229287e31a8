"""The variants of checkpoints that people share are read, and errors say what other files are."""

import re
from dataclasses import replace

import pytest
import torch

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.variants import (
    averaged,
    averaged_name,
    identify,
    recognise,
    standard_layout,
    vae_layout,
    warn_of_unknown,
)
from sd.config import LCM_SAMPLING, SD15, SD15_INPAINTING
from sd.model_converter import compvis_shapes, from_compvis
from tests.support.synthetic import MICRO, random_state

CLIP = "cond_stage_model.transformer."
UNET = "model.diffusion_model."
VAE = "first_stage_model."


def random_vae():
    return {key: tensor for key, tensor in random_state(MICRO).items() if key.startswith(VAE)}


def state_of(config):
    return {key: torch.empty(shape, device="meta") for key, shape in compvis_shapes(config).items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def with_averages(state):
    """Adds averaged copies as trainers do: other numbers, under names without dots."""
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor + 1
        for key, tensor in state.items()
        if key.startswith(UNET)
    }
    return state | averages | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def test_what_trainers_store_beside_the_weights_is_dropped():
    state = random_state(MICRO)
    extras = dict.fromkeys(
        [
            "betas",
            "alphas_cumprod",
            "alphas_cumprod_prev",
            "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod",
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "posterior_variance",
            "posterior_log_variance_clipped",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "lvlb_weights",
            "logvar",
            "scale_factor",
            "first_stage_model.loss.discriminator.main.0.weight",
            "first_stage_model.loss.logvar",
            "model_ema.diffusion_modelout2bias",
            "cond_stage_model.logit_scale",
            "cond_stage_model.transformer.text_projection.weight",
            "cond_stage_model.transformer.vision_model.embeddings.class_embedding",
            "cond_stage_model.text_projection",
            "embedding_manager.string_to_param_dict.*",
            "first_stage_model.logvar",
            "ddim_sigmas",
        ],
        torch.zeros(3),
    )
    assert same(standard_layout(state | extras), state)


def test_unknown_tensors_are_dropped_with_a_warning():
    state = random_state(MICRO)
    unknown = {f"extra.{i}": torch.zeros(1) for i in range(9)} | {"x" * 10_000: torch.zeros(1)}
    assert same(standard_layout(state | unknown), state)
    with pytest.warns(UserWarning, match=r"Left out, .*: extra\.0, extra\.1, extra\.2, extra\.3, extra\.4, \.\.\.$"):
        warn_of_unknown(state | unknown, state.keys())
    with pytest.warns(UserWarning, match="Left out") as caught:
        warn_of_unknown(state | {"x" * 10_000: torch.zeros(1)}, state.keys())
    assert len(str(caught[0].message)) < 400


def test_an_odd_key_in_a_network_is_dropped_where_its_keys_are_known():
    key, state = UNET + "trainer.note", random_state(MICRO)
    assert key in standard_layout(state | {key: torch.zeros(1)})
    assert same(standard_layout(state | {key: torch.zeros(1)}, known=state.keys()), state)


def test_further_blocks_of_a_network_are_kept_for_the_converter_to_refuse():
    key, state = UNET + "input_blocks.99.0.weight", random_state(MICRO)
    assert key in standard_layout(state | {key: torch.zeros(1)}, known=state.keys())


def test_text_encoder_without_text_model():
    state = random_state(MICRO)
    short = {key.replace(CLIP + "text_model.", CLIP): tensor for key, tensor in state.items()}
    assert short.keys() != state.keys()
    assert same(standard_layout(short), state)


def test_attention_of_the_vae_under_the_names_of_diffusers():
    """As EveryDream 2 and an early converter of diffusers wrote them."""
    state, theirs = random_state(MICRO), {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

    def renamed(key):
        return re.sub(r"(?<=\.mid\.attn_1\.)(q|k|v|proj_out)(?=\.)", lambda match: theirs[match[0]], key)

    other = {renamed(key): tensor for key, tensor in state.items()}
    assert len(other.keys() - state.keys()) == 16
    assert same(standard_layout(other, known=state.keys()), state)
    assert vae_layout(other).keys() == vae_layout(state).keys()


def test_averaged_weights_on_request_only():
    state = random_state(MICRO)
    full = with_averages(state)
    assert same(standard_layout(full), state)
    weights = standard_layout(full, ema=True)
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[k], t + 1 if k.startswith(UNET) else t) for k, t in state.items())


def test_missing_averaged_weights():
    with pytest.raises(CheckpointError, match="no averaged weights for .*: load it with ema=False"):
        averaged(random_state(MICRO))


def test_recognises_the_inpainting_variant_by_its_shape():
    first = UNET + "input_blocks.0.0.weight"
    assert recognise({first: torch.empty(320, 4, 3, 3)}) == SD15
    assert recognise({first: torch.empty(320, 9, 3, 3)}) == SD15_INPAINTING
    with pytest.raises(CheckpointError, match="InstructPix2Pix"):
        recognise({first: torch.empty(320, 8, 3, 3)})


def test_recognises_a_latent_consistency_model_by_its_projection():
    """(320, 256) in the published files, under the same name in all of them."""
    first, name = UNET + "input_blocks.0.0.weight", UNET + "time_embedding.cond_proj.weight"
    lcm = replace(SD15, unet=replace(SD15.unet, guidance_width=256), sampling=LCM_SAMPLING)
    state = {first: torch.empty(320, 4, 3, 3), name: torch.empty(320, 256)}
    assert recognise(state) == recognise({averaged_name(key): tensor for key, tensor in state.items()}) == lcm
    assert compvis_shapes(lcm).keys() - compvis_shapes(SD15).keys() == {name}
    assert compvis_shapes(lcm)[name] == (320, 256)
    with pytest.raises(CheckpointError, match=r"cond_proj.weight has shape \(320,\), expected \(320, 256\)"):
        from_compvis(
            {key: torch.empty(shape, device="meta") for key, shape in compvis_shapes(SD15).items()}
            | {name: torch.empty(320)}
        )


def test_recognises_v_prediction_by_its_mark():
    first = UNET + "input_blocks.0.0.weight"
    state = {first: torch.empty(320, 4, 3, 3), "v_pred": torch.empty(0)}
    assert recognise(state).schedule.prediction_type == "v_prediction"
    assert standard_layout(state).keys() == {first}


@pytest.mark.parametrize("prefix", ["", VAE])
def test_vae_alone(prefix):
    vae = random_vae()
    file = {key.replace(VAE, prefix): tensor for key, tensor in vae.items()}
    extras = {prefix + "loss.logvar": torch.zeros(1), "model_ema.decoderconv_inbias": torch.zeros(1)}
    assert same(vae_layout(file | extras), vae)


def test_vae_of_a_full_checkpoint():
    assert same(vae_layout(random_state(MICRO)), random_vae())


def test_a_file_without_a_vae():
    with pytest.raises(CheckpointError, match="no VAE in the layout of Stable Diffusion 1"):
        vae_layout({"encoder.layers.0.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    "key, what",
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "Stable Diffusion XL"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "LoRA"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "LoRA"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("zero_convs.0.0.weight", "ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "ControlNet"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("adaln_single.linear.weight", "PixArt"),
        ("input_blocks.0.0.weight", "U-Net alone, without a text encoder and a VAE"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers"),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "diffusers"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "diffusers"),
        ("emb_params", "textual inversion"),
        ("<cat-toy>", "textual inversion"),
        ("first_stage_model.decoder.conv_in.weight", "VAE alone: give it as `vae=`"),
        ("decoder.conv_in.weight", "VAE alone: give it as `vae=`"),
        ("layer1.0.conv1.weight", "no Stable Diffusion weights"),
    ],
)
def test_other_files_are_named(key, what):
    with pytest.raises(CheckpointError, match=what):
        identify([key])


def test_sdxl_is_named_although_its_unet_looks_similar():
    keys = [UNET + "input_blocks.0.0.weight", VAE + "decoder.conv_in.weight", "conditioner.embedders.1.model.ln.weight"]
    with pytest.raises(CheckpointError, match="Stable Diffusion XL"):
        identify(keys)


def test_half_of_the_tensors_in_half_precision():
    state = {
        key: t.half() if i % 2 and t.is_floating_point() else t
        for i, (key, t) in enumerate(random_state(MICRO).items())
    }
    networks = from_compvis(state, MICRO)
    assert {t.dtype for weights in networks.values() for t in weights.values()} == {torch.float16, torch.float32}


def test_a_model_is_one_whatever_else_it_carries():
    others = [
        "lora_unet_x.lora_down.weight",
        "control_model.a",
        "<cat>",
        "*",
        "unet.a",
        "text_model.a",
        "zero_convs.0.a",
    ]
    identify([UNET + "out.2.bias", CLIP + "text_model.a", *others])
    identify(["model_ema.diffusion_modelout2bias", CLIP + "text_model.a", *others])


@pytest.mark.parametrize("width, what", [(2048, "Stable Diffusion XL"), (1280, "Stable Diffusion XL refiner")])
def test_other_models_are_named_by_the_width_of_their_context(width, what):
    key = UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    state = {key: torch.empty(640, width), CLIP + "text_model.a": torch.empty(1)}
    with pytest.raises(CheckpointError, match=f"is an? {what}"):
        recognise(state)
    assert recognise({key: torch.empty(640, 768)}) == recognise({key: torch.empty(())}) == SD15


def test_averaged_weights_alone_are_taken():
    state = random_state(MICRO)
    alone = {averaged_name(key) if key.startswith(UNET) else key: tensor for key, tensor in state.items()}
    alone["model_ema.decay"] = torch.tensor(0.9999)
    assert same(standard_layout(alone, known=state.keys()), state)
    del alone[averaged_name(UNET + "out.2.bias")]
    with pytest.raises(CheckpointError, match=r"no averaged weights for model.diffusion_model.out.2.bias\.$"):
        standard_layout(alone, known=state.keys())


def test_the_inpainting_variant_by_its_averaged_weights():
    assert recognise({averaged_name(UNET + "input_blocks.0.0.weight"): torch.empty(320, 9, 3, 3)}) == SD15_INPAINTING


def test_a_text_encoder_with_added_words():
    table = CLIP + "text_model.embeddings.token_embedding.weight"
    with pytest.warns(UserWarning, match="has 3 added words, but no tokenizer names them: none is used"):
        assert recognise({table: torch.empty(49411, 768)}).text.vocab_size == 49411
    assert recognise({table: torch.empty(49408, 768)}) == SD15


def test_the_vae_of_another_family_is_refused():
    with pytest.raises(CheckpointError, match="is a Stable Diffusion XL checkpoint, whose VAE makes other latents"):
        vae_layout(random_vae() | {"conditioner.embedders.1.model.ln.weight": torch.zeros(1)})
