"""The key rules in both directions, and the errors for a checkpoint that does not fit."""

import re

import pytest
import torch

from sd.checkpoints.checkpoint import CheckpointError
from sd.config import SD15, SD15_INPAINTING, TINY
from sd.model_converter import POSITION_IDS, compvis_shapes, from_compvis, to_compvis, to_our_name, to_their_name
from tests.support.synthetic import MICRO, random_networks, random_state

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
LAST = "first_stage_model.decoder.conv_out.bias"


@pytest.mark.parametrize("config", [SD15, SD15_INPAINTING, TINY, MICRO])
def test_names_convert_both_ways_and_stay_distinct(config):
    keys = [key for key in compvis_shapes(config) if key != POSITION_IDS]
    ours = [to_our_name(key) for key in keys]
    assert len(set(ours)) == len(keys)
    assert [to_their_name(name) for name in ours] == keys


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (FIRST, "diffusion.down.0.0.weight"),
        ("model.diffusion_model.input_blocks.3.0.op.bias", "diffusion.down.3.0.conv.bias"),
        ("model.diffusion_model.output_blocks.2.1.conv.bias", "diffusion.up.2.1.conv.bias"),
        ("model.diffusion_model.middle_block.0.emb_layers.1.bias", "diffusion.middle.0.time.bias"),
        (
            "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.weight",
            "diffusion.up.11.1.cross_attention.out.weight",
        ),
        ("first_stage_model.encoder.down.1.block.0.nin_shortcut.bias", "encoder.levels.1.blocks.0.shortcut.bias"),
        ("first_stage_model.decoder.mid.attn_1.q.weight", "decoder.middle.1.attention.qkv.q.weight"),
        ("first_stage_model.quant_conv.weight", "encoder.quant_conv.weight"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "clip.norm.bias"),
    ],
)
def test_names(theirs, ours):
    assert to_our_name(theirs) == ours
    assert to_their_name(ours) == theirs


def test_shapes_of_the_published_file():
    """v1-5-pruned-emaonly has 1,131 tensors beside its schedule, of 1,066,235,384 numbers, position_ids included."""
    shapes = compvis_shapes(SD15)
    assert len(shapes) == 1131
    assert sum(shape.numel() for shape in shapes.values()) == 859_520_964 + 83_653_863 + 123_060_557
    assert shapes[FIRST] == (320, 4, 3, 3)
    assert shapes["model.diffusion_model.input_blocks.1.1.proj_in.weight"] == (320, 320, 1, 1)
    assert shapes["first_stage_model.decoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert shapes[POSITION_IDS] == (1, 77)
    assert compvis_shapes(SD15_INPAINTING)[FIRST] == (320, 9, 3, 3)


def test_round_trip_is_exact():
    models = random_networks(MICRO)
    state = to_compvis(models)
    back = from_compvis(state, MICRO)
    for name, weights in back.items():
        expected = getattr(models, name).state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)

    original = random_state(MICRO)
    assert state.keys() == original.keys()
    assert all(torch.equal(state[key], original[key]) for key in original)


def test_only_fused_tensors_are_copied():
    state = random_state(MICRO)
    networks = from_compvis(state, MICRO)
    assert networks["diffusion"]["down.0.0.weight"].data_ptr() == state[FIRST].data_ptr()
    proj = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
    assert networks["diffusion"]["down.1.1.proj_in.weight"].data_ptr() == state[proj].data_ptr()


def test_matrices_in_the_place_of_1x1_convolutions():
    """diffusers stores the VAE's attention as matrices, and so do files converted by it."""
    state = random_state(MICRO)
    flat = {k: t.flatten(1) if t.shape[2:] == (1, 1) and "attn_1" in k else t for k, t in state.items()}
    assert any(flat[k].shape != state[k].shape for k in state)
    for name, weights in from_compvis(flat, MICRO).items():
        assert all(torch.equal(weights[k], t) for k, t in from_compvis(state, MICRO)[name].items())


def test_any_matrix_may_be_a_1x1_convolution_and_vice_versa():
    state = random_state(MICRO)
    kernels = {
        k: t[..., None, None] if t.ndim == 2 else t.flatten(1) if t.shape[2:] == (1, 1) else t for k, t in state.items()
    }
    changed = [k for k in state if kernels[k].shape != state[k].shape and k != POSITION_IDS]
    assert any("quant_conv" in k for k in changed)
    assert any("to_q" in k for k in changed)
    for name, weights in from_compvis(kernels, MICRO).items():
        expected = from_compvis(state, MICRO)[name]
        assert all(t.shape == expected[k].shape and torch.equal(t, expected[k]) for k, t in weights.items())


def test_every_problem_is_listed_at_once():
    state = random_state(MICRO)
    del state[LAST]
    state["model.diffusion_model.input_blocks.99.0.weight"] = torch.zeros(1)
    state[FIRST] = torch.zeros(16, 4, 5, 5)
    state["first_stage_model.decoder.conv_in.bias"] = torch.zeros(32, dtype=torch.int64)
    with pytest.raises(CheckpointError) as error:
        from_compvis(state, MICRO)
    message = str(error.value)
    assert "4 problems" in message
    for problem in (
        f"missing key {LAST}",
        "unknown key model.diffusion_model.input_blocks.99.0.weight",
        f"{FIRST} has shape (16, 4, 5, 5), expected (16, 4, 3, 3)",
        "first_stage_model.decoder.conv_in.bias holds torch.int64, expected floating point",
    ):
        assert problem in message


@pytest.mark.parametrize("positions", ["absent", torch.arange(77.0)[None], torch.zeros(3)])
def test_position_ids_do_not_matter(positions):
    state = random_state(MICRO)
    del state[POSITION_IDS]
    if not isinstance(positions, str):
        state[POSITION_IDS] = positions
    assert from_compvis(state, MICRO)["clip"]["position_embedding.weight"].shape == (77, 32)


def test_rules_have_no_duplicates():
    from sd.model_converter import RULES

    for rules in RULES.values():
        for side in zip(*rules):
            assert len(set(side)) == len(side)
        assert all(re.fullmatch(r"[a-z_0-9.#]+", text) for pair in rules for text in pair)


PARTS = {"U-Net": "model.", "text encoder": "cond_stage_model.", "VAE": "first_stage_model."}


@pytest.mark.parametrize(
    "absent, message",
    [
        (["VAE"], "This checkpoint has no VAE: give one with --vae, or with vae= in Python."),
        (["text encoder"], "This checkpoint has no text encoder: give the file of a whole model."),
        (["text encoder", "VAE"], "This checkpoint has no text encoder and no VAE: give the file of a whole model."),
        (["U-Net"], "This checkpoint has no U-Net: give the file of a whole model."),
    ],
)
def test_a_missing_part_is_named_in_one_sentence(absent, message):
    prefixes = tuple(PARTS[part] for part in absent)
    state = {key: tensor for key, tensor in random_state(MICRO).items() if not key.startswith(prefixes)}
    with pytest.raises(CheckpointError) as error:
        from_compvis(state, MICRO)
    assert str(error.value) == message


def test_many_problems_are_summed_up_for_each_network():
    state = random_state(MICRO)
    missing = [key for key in state if ".decoder." in key][:100]
    shapes = [key for key in state if ".attn1.to_q." in key]
    state = {key: tensor[:1] if key in shapes else tensor for key, tensor in state.items() if key not in missing}
    with pytest.raises(CheckpointError) as error:
        from_compvis(state, MICRO)
    first, *lines = str(error.value).splitlines()
    assert first == f"The checkpoint does not fit the network, {100 + len(shapes)} problems:"
    assert lines == [
        f"  VAE's decoder: missing key {'; '.join(missing[:3])}; and 97 more",
        "  U-Net: "
        + "; ".join(f"{key} has shape (1, {n}), expected ({n}, {n})" for key, n in zip(shapes[:3], [16, 16, 16]))
        + f"; and {len(shapes) - 3} more",
    ]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_becomes_float16_without_a_change(dtype):
    exact = {key: t.to(dtype) if t.is_floating_point() else t for key, t in random_state(MICRO).items()}
    networks = from_compvis(exact, MICRO)
    expected = from_compvis({key: t.float() for key, t in exact.items()}, MICRO)
    for name, weights in networks.items():
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
        assert all(torch.equal(weights[key].float(), expected[name][key]) for key in weights)


def test_an_odd_key_in_a_network_is_left_out():
    state = random_state(MICRO) | {"model.diffusion_model.trainer.note": torch.zeros(1)}
    with pytest.warns(UserWarning, match=r"Left out, .*: model\.diffusion_model\.trainer\.note$"):
        networks = from_compvis(state, MICRO)
    assert networks["diffusion"].keys() == from_compvis(random_state(MICRO), MICRO)["diffusion"].keys()


def test_a_needed_tensor_that_cannot_be_read_is_named():
    state = random_state(MICRO)
    del state[LAST]
    with pytest.raises(CheckpointError, match=rf"VAE's decoder: unreadable key {LAST} of dtype F4$"):
        from_compvis(state, MICRO, unreadable={LAST: "dtype F4", "another": "dtype F4"})


def test_wrapped_keys():
    networks = from_compvis({"module." + key: t for key, t in random_state(MICRO).items()}, MICRO)
    expected = from_compvis(random_state(MICRO), MICRO)
    assert all(torch.equal(networks[name][key], t) for name in expected for key, t in expected[name].items())


def test_scaled_float8():
    """ComfyUI's scaled float8: weight = float8 * scale_weight. The scales are no unknown tensors."""
    state = random_state(MICRO)
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    scale, extras = state[key].abs().max() / 448, {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    extras |= {key: (state[key] / scale).to(torch.float8_e4m3fn), key.replace("weight", "scale_weight"): scale}
    weight = from_compvis(state | extras, MICRO)["diffusion"]["down.1.1.self_attention.qkv.weight"]
    torch.testing.assert_close(weight[:16].float(), state[key], rtol=0.07, atol=0.01)
    extras[key.replace("weight", "scale_weight")] = torch.ones(5)
    with pytest.raises(CheckpointError, match=r"scale of .* should be one number, not a tensor of \(5,\)"):
        from_compvis(state | extras, MICRO)
