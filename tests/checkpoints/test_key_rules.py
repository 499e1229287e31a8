"""Rules rename whole segments of keys, in order and back again."""

import pytest

from sd.checkpoints.key_rules import inverse, rename

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
