"""Which file of a folder holds the weights, and which words its tokenizer has."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.folder_files import find_weights, read_added_words, read_json

UNET = "diffusion_pytorch_model"
ORDER = {  # best first
    "unet": [
        f"{UNET}.safetensors.index.json",
        f"{UNET}.safetensors",
        f"{UNET}.bin",
        f"{UNET}.fp16.safetensors",
        f"{UNET}.fp16.bin",
        f"{UNET}.non_ema.safetensors",
    ],
    "text_encoder": [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "model.safetensors.index.fp16.json",
        "pytorch_model.fp16.bin",
    ],
}
OTHERS = [
    "optimizer.bin",
    "openvino_model.bin",
    "pytorch_lora_weights.safetensors",
    "scheduler.bin",
    "random_states_0.pkl",
]
OTHERS += [".DS_Store", f"._{UNET}.safetensors", "._model.safetensors", "diffusion_flax_model.msgpack", "tf_model.h5"]
OTHERS += [f"{UNET}-00001-of-00002.safetensors", "training_args.bin", "a.safetensors"]


@pytest.mark.parametrize("network", ORDER)
def test_names_in_their_order(tmp_path, network):
    for name in OTHERS:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"has no weights: it should hold (model|diffusion_pytorch_model)\."):
        find_weights(tmp_path, network)
    for name in reversed(ORDER[network]):
        (tmp_path / name).write_bytes(b"x")
        assert find_weights(tmp_path, network).name == name


def test_diffusers_takes_the_same_file(tmp_path):
    """Each file holds another number; without a variant, diffusers takes the one that we take."""
    diffusers = pytest.importorskip("diffusers")
    options = {"block_out_channels": (8, 8), "down_block_types": ("DownBlock2D",) * 2, "norm_num_groups": 4}
    model = diffusers.UNet2DConditionModel(**options, up_block_types=("UpBlock2D",) * 2, cross_attention_dim=8)
    model.save_config(tmp_path)
    names = {f"{UNET}.bin": 1.0, f"{UNET}.safetensors": 2.0, f"{UNET}.fp16.safetensors": 5.0}
    for name, number in names.items():
        state = {key: torch.full_like(tensor, number) for key, tensor in model.state_dict().items()}
        (save_file if name.endswith("s") else torch.save)(state, tmp_path / name)
        if "fp16" not in name:
            theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
            assert theirs.conv_in.bias[0] == names[find_weights(tmp_path, "unet").name] == number


WORDS = {"<my-cat>": 49408, "<my-cat>_1": 49409}
FORMS = {
    "added_tokens.json": WORDS,
    "vocab.json": {"!": 0, "<|endoftext|>": 49407, **WORDS},
    "tokenizer.json": {
        "added_tokens": [
            {"id": 49406, "content": "<|startoftext|>", "special": True},
            *({"id": token, "content": word, "special": False} for word, token in WORDS.items()),
        ]
    },
    "tokenizer_config.json": {
        "added_tokens_decoder": {str(token): {"content": word, "lstrip": False} for word, token in WORDS.items()}
        | {"49407": {"content": "<|endoftext|>"}}
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_added_words_in_every_form(tmp_path, name):
    assert read_added_words(tmp_path, 49408) == {}
    (tmp_path / name).write_text(json.dumps(FORMS[name]))
    assert read_added_words(tmp_path, 49408) == WORDS


@pytest.mark.parametrize(
    "values", [{"<a>": "49408"}, {"<a>": True}, {"<a>": -1}, {"<a>": 49408.0}, {" ": 49408}, {"<a>": None}]
)
def test_words_without_a_token_are_none(tmp_path, values):
    (tmp_path / "added_tokens.json").write_text(json.dumps(values))
    assert read_added_words(tmp_path, 49408) == {}


@pytest.mark.parametrize(
    "added", [5, None, {"a": 1}, [5, None, [], {}, {"id": 49408}, {"content": "x"}, {"id": [], "content": []}]]
)
def test_other_lists_hold_no_words(tmp_path, added):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert read_added_words(tmp_path, 49408) == {}


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "added_tokens.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"added_tokens\.json is damaged: it should hold a JSON object"):
        read_json(tmp_path / "added_tokens.json")
