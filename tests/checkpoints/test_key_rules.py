"""Rules rename whole segments of keys, in order and back again."""

import pytest

from sd.checkpoints.key_rules import inverse, rename, without_wrappers

RULES = [
    ("model.net.", "unet."),
    ("input_blocks", "down"),
    ("down.#.0.op", "down.#.0.conv"),
    ("mlp.fc1", "mlp.0"),
    ("level.#.block.#", "levels.#.blocks.#"),
]


@pytest.mark.parametrize(
    "old, new",
    [
        ("model.net.input_blocks.3.0.op.bias", "unet.down.3.0.conv.bias"),  # one rule after another
        ("layers.11.mlp.fc1.weight", "layers.11.mlp.0.weight"),
        ("mlp.fc1", "mlp.0"),  # a whole key
        ("level.2.block.10.a", "levels.2.blocks.10.a"),  # every number keeps its place
    ],
)
def test_rules_rename_in_both_directions(old, new):
    assert rename(old, RULES) == new
    assert rename(new, inverse(RULES)) == old


@pytest.mark.parametrize(
    "key",
    [
        "my_input_blocks.0",  # only whole segments
        "input_blocks_2.0",
        "mlpxfc1",  # a dot is a dot
        "level.a.block.0",  # `#` is a number
        "a.model.net.b",  # a rule that ends in a dot: only at the start
        "model.net",
        "",
    ],
)
def test_other_keys_stay_unchanged(key):
    assert rename(key, RULES) == key


@pytest.mark.parametrize(
    "key, plain",
    [
        ("module.model.diffusion_model.out.2.bias", "model.diffusion_model.out.2.bias"),  # DataParallel
        ("_orig_mod.model.diffusion_model.out.2.bias", "model.diffusion_model.out.2.bias"),  # torch.compile
        ("_orig_mod.module.model.diffusion_model.a", "model.diffusion_model.a"),
        ("model.diffusion_model._orig_mod.out.2.bias", "model.diffusion_model.out.2.bias"),  # of the U-Net alone
        ("_fsdp_wrapped_module.model.diffusion_model.a._checkpoint_wrapped_module.b", "model.diffusion_model.a.b"),
        ("model.model.diffusion_model.a", "model.diffusion_model.a"),  # a trainer's attribute
        ("model.diffusion_model.module_list.a", "model.diffusion_model.module_list.a"),
        ("some_module.a", "some_module.a"),
        ("v_pred", "v_pred"),
    ],
)
def test_keys_without_what_wraps_a_model(key, plain):
    assert without_wrappers({key: 1}) == {plain: 1}


def test_an_outer_name_goes_from_all_keys():
    keys = ["ldm.model.diffusion_model.a", "ldm.first_stage_model.b", "other.c"]
    assert list(without_wrappers(dict.fromkeys(keys))) == ["model.diffusion_model.a", "first_stage_model.b", "other.c"]


def test_two_models_in_one_file_keep_their_names():
    keys = ["student.model.diffusion_model.a", "teacher.model.diffusion_model.a"]
    assert list(without_wrappers(dict.fromkeys(keys))) == keys
