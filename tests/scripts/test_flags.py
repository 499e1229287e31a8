"""Errors of `sd` with the names of flags."""

import pytest

from scripts.support.flags import with_flags


@pytest.mark.parametrize(
    "message, meant",
    [
        ("seed should be a whole number.", "--seed should be a whole number."),
        ("mask_image should have the shape of input_image, 3 x 2.", "--mask should have the shape of --image, 3 x 2."),
        ("The image has NaN: try a smaller cfg_scale.", "The image has NaN: try a smaller --cfg-scale."),
        ("ask for a smaller height and width", "ask for a smaller --height and --width"),
        ("load it with dtype=torch.float16 (torch.bfloat16 on a CPU)", "load it with --dtype fp16 (bf16 on a CPU)"),
        ("dtype=torch.float32, or else", "--dtype fp32, or else"),
        ("a VAE alone: give it as `vae=`, beside", "a VAE alone: give it as --vae, beside"),
        ("The seed of the width.", "The seed of the width."),
        ("a/input_image.png is damaged, and input_image.png", "a/input_image.png is damaged, and input_image.png"),
        (
            "not 'input_image' or \"mask_image\" or input_image=3",
            "not 'input_image' or \"mask_image\" or input_image=3",
        ),
        ("my_input_image", "my_input_image"),
        ("", ""),
    ],
)
def test_names_anywhere_become_flags(message, meant):
    assert with_flags(message) == meant


def test_every_argument_has_a_flag_here_or_none():
    from dataclasses import fields

    from scripts.support.flags import FLAGS
    from sd.request import Request

    assert {field.name for field in fields(Request)} - FLAGS.keys() == {"prompt", "do_cfg", "cfg_rescale"}
