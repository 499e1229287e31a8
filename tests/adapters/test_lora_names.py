"""Every layer that a LoRA may change is found under every name that files have for it."""

import pytest
import torch

from sd.adapters.lora_names import diffusers_name, layer_names, split_key
from sd.checkpoints.diffusers_folder import unet_name
from sd.checkpoints.key_rules import UNET_PREFIX
from sd.config import SD2, SD15, TINY
from sd.model_converter import compvis_shapes
from sd.models import empty_networks


@pytest.fixture(scope="module", params=[SD15, SD2, TINY], ids=["sd15", "sd2", "tiny"])
def config(request):
    return request.param


def test_the_names_of_diffusers_are_those_that_its_reader_knows(config):
    keys = [key.removeprefix(UNET_PREFIX) for key in compvis_shapes(config) if key.startswith(UNET_PREFIX)]
    names = [diffusers_name(key, config.unet) for key in keys]
    assert [unet_name(name, config.unet) for name in names] == keys
    assert not any(name.startswith(("input_blocks", "output_blocks", "middle_block")) for name in names)


def test_no_two_layers_share_a_name(config):
    layers = set(layer_names(empty_networks(config), config.unet).values())
    flat = {(layer.network, layer.path.replace(".", "_")) for layer in layers}
    assert len(flat) == len(layers)
    matrices = [layer for layer in layers if len(layer.shape) > 1]
    counts = {SD15: (282, 72), SD2: (282, 138)}.get(config)
    if counts:  # those that kohya's trainer and LyCORIS name
        assert tuple(sum(layer.network == name for layer in matrices) for name in ("diffusion", "clip")) == counts


NAMES = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k": "down.1.1.self_attention.qkv",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k": "down.1.1.self_attention.qkv",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": "down.1.1.self_attention.qkv",
    "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0": "up.5.1.cross_attention.out",
    "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj": "up.11.1.mlp.0.proj",
    "lora_unet_mid_block_resnets_1_time_emb_proj": "middle.2.time",
    "lora_unet_up_blocks_0_upsamplers_0_conv": "up.2.1.conv",
    "lora_unet_up_blocks_1_upsamplers_0_conv": "up.5.2.conv",
    "lora_unet_down_blocks_2_downsamplers_0_conv": "down.9.0.conv",
    "lora_unet_down_blocks_1_resnets_0_conv_shortcut": "down.4.0.shortcut",
    "lora_unet_time_embedding_linear_2": "time_embedding.2",
    "lora_unet_conv_in": "down.0.0",
    "conv_out": "conv_out",
    "lora_unet_conv_norm_out": "norm_out",
    "lora_te_text_model_encoder_layers_3_self_attn_out_proj": "layers.3.attention.out",
    "lora_te1_text_model_encoder_layers_3_mlp_fc1": "layers.3.mlp.0",
    "text_encoder.text_model.encoder.layers.3.self_attn.q_proj": "layers.3.attention.qkv",
    "text_encoder.encoder.layers.3.mlp.fc2": "layers.3.mlp.2",
    "lora_te_text_model_final_layer_norm": "norm",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files(name, names_of_sd15):
    assert names_of_sd15[name].module == NAMES[name]


@pytest.fixture(scope="module")
def names_of_sd15():
    return layer_names(empty_networks(SD15), SD15.unet)


def test_queries_keys_and_values_are_thirds_of_one_matrix(names_of_sd15):
    prefix = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    layers = [names_of_sd15[prefix + part] for part in "qkv"]
    assert [layer.first_row for layer in layers] == [0, 1280, 2560]
    assert {layer.shape for layer in layers} == {torch.Size([1280, 1280])}
    assert not any(layer.has_bias for layer in layers)


@pytest.mark.parametrize(
    "key, name, part",
    [
        ("lora_unet_x.lora_up.weight", "lora_unet_x", "up"),
        ("unet.a.to_out.0.lora_A.weight", "unet.a.to_out.0", "down"),
        ("base_model.model.a.lora_B.default.weight", "a", "up"),
        ("unet.a.attn1.processor.to_q_lora.up.weight", "unet.a.attn1.to_q", "up"),
        ("a.attn2.processor.to_out_lora.down.weight", "a.attn2.to_out.0", "down"),
        ("unet.a.proj_in.lora.down.weight", "unet.a.proj_in", "down"),
        ("text_encoder.b.self_attn.to_k_lora.up.weight", "text_encoder.b.self_attn.k_proj", "up"),
        ("text_encoder.b.mlp.fc1.lora_linear_layer.up.weight", "text_encoder.b.mlp.fc1", "up"),
        ("unet.a.to_q.lora_up.weight", "unet.a.to_q", "up"),
        ("base_model.model.a.lora_magnitude_vector.default.weight", "a", "magnitude"),
        ("lora_te_x.hada_w1_a", "lora_te_x", "hada_w1_a"),
        ("lora_te_x.w_norm", "lora_te_x", "diff"),
    ],
)
def test_parts_of_a_key(key, name, part):
    assert split_key(key) == (name, part)


@pytest.mark.parametrize("key", ["a.weight", "lora_unet_x.oft_blocks", "a.lora_B.bias", "x.lokr_t1", ".alpha", ""])
def test_other_keys(key):
    assert split_key(key) is None
