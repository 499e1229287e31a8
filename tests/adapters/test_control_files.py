"""Files of ControlNets: every layout gives the same network, and other files are named."""

import json
from dataclasses import replace

import pytest
import torch

from sd.adapters.controlnet import ControlNet
from sd.adapters.controlnet_files import check_family, load_controlnet
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.files import write_checkpoint
from sd.config import SD2, SD15
from sd.model_loader import load_models
from tests.support.control import cldm_state, diffusers_config, diffusers_name, random_controlnet
from tests.support.synthetic import INPAINTING_MICRO, MICRO, SD2_MICRO, random_models, random_state


@pytest.fixture(scope="module")
def net():
    return random_controlnet(MICRO.unet)


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_folder(folder, net, **more):
    folder.mkdir()
    state = {diffusers_name(key): x for key, x in cldm_state(net, "", kernels=net.config.head_width is None).items()}
    write_checkpoint(folder / "diffusion_pytorch_model.safetensors", state)
    (folder / "config.json").write_text(json.dumps(diffusers_config(net.config, **more)))
    return folder


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("prefix", ["control_model.", "", "module.control_model."])
def test_cldm_and_bare_names(tmp_path, net, models, suffix, prefix):
    path = tmp_path / f"net.{suffix}"
    write_checkpoint(path, cldm_state(net, prefix))
    loaded = load_controlnet(path, models)
    assert same(loaded, net)
    assert loaded.source == path
    assert not loaded.global_pool
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_whole_model_beside_it(tmp_path, net, models):
    path = tmp_path / "control_sd15_canny.pth"
    write_checkpoint(path, random_state(MICRO) | cldm_state(net))
    assert same(load_controlnet(path, models), net)


@pytest.mark.parametrize("config", [MICRO, SD2_MICRO])
@pytest.mark.parametrize("with_models", [True, False])
def test_the_layout_of_diffusers(tmp_path, config, with_models):
    net = random_controlnet(config.unet)
    folder = write_folder(tmp_path / "net", net)
    for path in (folder, folder / "diffusion_pytorch_model.safetensors"):
        loaded = load_controlnet(path, random_models(config) if with_models else None, "cpu", torch.float32)
        assert same(loaded, net)
        heads = [loaded.config.heads_of(width) for width in config.unet.channels]
        assert heads == [config.unet.heads_of(width) for width in config.unet.channels]
        assert replace(loaded.config, heads=config.unet.heads) == config.unet


def test_a_file_in_the_layout_of_diffusers_alone(tmp_path, net, models):
    folder = write_folder(tmp_path / "net", net)
    (folder / "config.json").unlink()
    assert same(load_controlnet(folder / "diffusion_pytorch_model.safetensors", models), net)


def test_projections_as_matrices(tmp_path, models):
    """Those of SD 2 are matrices, and some files of SD 1.5 have them, too."""
    net = random_controlnet(MICRO.unet)
    write_checkpoint(tmp_path / "net.pth", cldm_state(net, kernels=False))
    assert same(load_controlnet(tmp_path / "net.pth", models), net)


@pytest.mark.slow
def test_differences_get_the_base_model_added(tmp_path, net, models):
    base = models.diffusion.state_dict()
    assert not set(base).isdisjoint(net.state_dict())
    difference = random_controlnet(MICRO.unet)
    weights = {name: x - base[name] if name in base else x for name, x in net.state_dict().items()}
    difference.load_state_dict(weights)
    state = cldm_state(difference) | {"difference": torch.ones(())}
    write_checkpoint(tmp_path / "diff.safetensors", state)
    loaded = load_controlnet(tmp_path / "diff.safetensors", models)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match="should be a model that is not for inpainting"):
        load_controlnet(tmp_path / "diff.safetensors", random_models(INPAINTING_MICRO))


def test_differences_need_the_base_model(tmp_path):
    path = tmp_path / "net"
    write_folder(path, random_controlnet(MICRO.unet))
    file = path / "diffusion_pytorch_model.safetensors"
    from sd.checkpoints.files import read_state_dict

    write_checkpoint(file, {k: x.clone() for k, x in read_state_dict(file).items()} | {"difference": torch.ones(())})
    with pytest.raises(CheckpointError, match=r"^control: .*differences from its base model: give that as models=\.$"):
        load_controlnet(path)


def test_pooling_by_config_by_name_and_by_argument(tmp_path, net, models):
    folder = write_folder(tmp_path / "a", net, global_pool_conditions=True)
    assert load_controlnet(folder, models).global_pool
    for name, pools in {"x_shuffle": True, "control_v11e_sd15_shuffle_fp16": True, "shuffled": False}.items():
        path = tmp_path / f"{name}.safetensors"
        write_checkpoint(path, cldm_state(net))
        assert load_controlnet(path, models).global_pool is pools
    assert not load_controlnet(folder, models, global_pool=False).global_pool
    residuals = load_controlnet(folder, models)(
        torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32), torch.tensor([3]), torch.zeros(1, 16, 8, 8)
    )
    assert {residual.shape[2:] for residual in residuals} == {(1, 1)}


def test_half_precision_and_dtypes(tmp_path, net, models):
    half = {key: tensor.half() for key, tensor in cldm_state(net).items()}
    write_checkpoint(tmp_path / "half.safetensors", half)
    assert load_controlnet(tmp_path / "half.safetensors", models).zero_middle.weight.dtype == torch.float32
    folder = write_folder(tmp_path / "net", net)
    assert load_controlnet(folder, device="cpu", dtype=torch.float16).zero_middle.weight.dtype == torch.float16


def keys(*names):
    return {name: torch.zeros(2, 2) for name in names}


@pytest.mark.parametrize(
    "state, what",
    [
        (keys("control_model.zero_convs.0.0.weight", "lora_controlnet"), "is a Control-LoRA"),
        (keys("body.0.block1.weight", "conv_in.weight"), "is a T2I-Adapter"),
        (keys("adapter.body.0.resnets.0.block1.weight"), "is a T2I-Adapter"),
        (keys("control_model.label_emb.0.0.weight", "control_model.zero_convs.0.0.weight"), "Stable Diffusion XL"),
        (keys("add_embedding.linear_1.weight", "controlnet_down_blocks.0.weight"), "Stable Diffusion XL"),
        (keys("controlnet_blocks.0.weight", "pos_embed.pos_embed"), "Stable Diffusion 3 or FLUX"),
        (keys("lora_unet_a.lora_down.weight"), "is a LoRA"),
        (keys("1.weight", "3.conv.0.weight"), "is TAESD"),
        (keys("first_stage_model.decoder.conv_in.weight"), "is a VAE: give it as `vae=`"),
        (keys("emb_params"), "is a textual inversion embedding"),
        (keys("model0.conv1_1.weight"), "has no zero convolutions, as ControlNets have; it may make control images"),
    ],
)
def test_other_files_are_named(tmp_path, state, what):
    write_checkpoint(tmp_path / "a.pth", state)
    with pytest.raises(CheckpointError, match=what) as error:
        load_controlnet(tmp_path / "a.pth")
    message = str(error.value)
    assert message.startswith(f"control: {tmp_path / 'a.pth'}: This file ")
    assert message.endswith("give a ControlNet of Stable Diffusion 1.x or 2.x.")
    assert "\n" not in message


def test_a_whole_model_is_none(tmp_path):
    write_checkpoint(tmp_path / "a.ckpt", random_state(MICRO))
    with pytest.raises(CheckpointError, match="This file is a whole model: give it as the checkpoint; give a ControlN"):
        load_controlnet(tmp_path / "a.ckpt")


def test_other_folders_are_named(tmp_path, net):
    folder = write_folder(tmp_path / "net", net)
    (folder / "config.json").write_text('{"_class_name": "T2IAdapter"}')
    with pytest.raises(CheckpointError, match="should be that of a ControlNetModel, with its config.json, not T2IAd"):
        load_controlnet(folder)
    with pytest.raises(FileNotFoundError, match="^control: There is no file or folder at .*none.$"):
        load_controlnet(tmp_path / "none")
    with pytest.raises(TypeError, match="^control should be the path of a file or a folder, not 3"):
        load_controlnet(3)


def test_another_family_is_one_sentence(tmp_path):
    """SD 1.5's ControlNet for a model of SD 2, and the other way round: from the real widths, without their sizes."""
    for own, other in ((SD15, SD2), (SD2, SD15)):
        key = "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        state = {key: torch.zeros(320, own.unet.context_width)} | keys("control_model.zero_convs.0.0.weight")
        write_checkpoint(tmp_path / "net.pth", state)
        models = replace(random_models(MICRO), config=other)
        families = {768: r"Stable Diffusion 1\.x", 1024: r"Stable Diffusion 2\.x"}
        ours, theirs = families[other.unet.context_width], families[own.unet.context_width]
        with pytest.raises(CheckpointError, match=f"should be one for {ours} .*, like the model, not for {theirs}"):
            load_controlnet(tmp_path / "net.pth", models)


def test_other_channels_are_named():
    config = replace(MICRO.unet, channels=(8, 8, 8, 8))
    with pytest.raises(
        CheckpointError, match=r"\(context of 32, channels 16, 16, 32, 32\), .* channels 8, 8, 8, 8\)\.$"
    ):
        check_family(config, MICRO.unet)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"in_channels": 9}, "in_channels should be 4"),
        ({"controlnet_conditioning_channel_order": "bgr"}, "controlnet_conditioning_channel_order should be 'rgb'"),
        ({"layers_per_block": 10**9}, "at most 6 levels of 4 blocks"),
        ({"block_out_channels": [10**9]}, "widths of at most a million"),
        ({"class_embed_type": "timestep"}, "class_embed_type should be None"),
        ({"cross_attention_dim": "wide"}, "should be like 768, not 'wide'"),
        ({"norm_num_groups": 7}, "divisible by unet.groups"),
    ],
)
def test_bad_configurations(tmp_path, net, change, problem):
    folder = write_folder(tmp_path / "net", net, **change)
    with pytest.raises(CheckpointError, match=problem) as error:
        load_controlnet(folder)
    assert str(error.value).startswith(f"control: {folder}")


def test_what_is_wrong_is_listed(tmp_path, net, models):
    state = cldm_state(net)
    del state["control_model.zero_convs.3.0.weight"]
    state["control_model.middle_block_out.0.bias"] = torch.zeros(7)
    state["control_model.time_embed.9.weight"] = torch.zeros(2)
    state["control_model.time_embed.0.bias"] = torch.zeros(64, dtype=torch.long)
    write_checkpoint(tmp_path / "net.pth", state)
    with pytest.raises(CheckpointError) as error:
        load_controlnet(tmp_path / "net.pth", models)
    message = str(error.value)
    assert "does not fit the network, 4 problems" in message
    for part in (
        "missing key zero_convs.3.0.weight",
        "has shape (7,), expected (32,)",
        "unknown key time_embed.9.weight",
    ):
        assert part in message
    assert "time_embed.0.bias holds torch.int64" in message


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD15, SD2])
def test_the_sizes_of_the_real_ones(config):
    with torch.device("meta"):
        state = cldm_state(ControlNet(config.unet), kernels=config is SD15)
    assert len(state) == 340
    assert (
        sum(tensor.numel() for tensor in state.values())
        == {768: 361_279_120, 1024: 364_228_240}[config.unet.context_width]
    )


def test_given_as_a_checkpoint_its_folder_and_file_are_named(tmp_path, net):
    folder = write_folder(tmp_path / "net", net)
    for path in (folder, folder / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(CheckpointError, match="is (the folder of )?a ControlNet.*: give it as `control=`"):
            load_models(path)
