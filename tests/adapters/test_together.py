"""Several kinds of additions to one model."""

import pytest
import torch

from sd.checkpoints.files import write_checkpoint
from sd.model_loader import load_models
from tests.support.synthetic import MICRO, random_state

LAYERS = {
    "lora_unet_mid_block_attentions_0_proj_in": (32, 32),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (128, 32),
}


@pytest.fixture
def files(tmp_path):
    """A checkpoint, a LoRA and an embedding."""
    write_checkpoint(tmp_path / "model.ckpt", random_state(MICRO), MICRO.to_dict())
    lora = {f"{name}.lora_up.weight": torch.randn(rows, 2) for name, (rows, _) in LAYERS.items()}
    lora |= {f"{name}.lora_down.weight": torch.randn(2, columns) for name, (_, columns) in LAYERS.items()}
    write_checkpoint(tmp_path / "style.safetensors", lora)
    write_checkpoint(tmp_path / "my-cat.safetensors", {"emb_params": torch.randn(2, MICRO.text.width)})
    return tmp_path / "model.ckpt", tmp_path / "style.safetensors", tmp_path / "my-cat.safetensors"


def same(one, other):
    states = [(getattr(one, name).state_dict(), getattr(other, name).state_dict()) for name in ("clip", "diffusion")]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in states)


@pytest.mark.slow
def test_loras_are_switched_below_added_words(files):
    """The table has more rows than the checkpoint, which is read again."""
    path, lora, embedding = files
    load = {"path": path, "device": "cpu", "dtype": torch.float32}
    plain, both = load_models(**load, embeddings=[embedding]), load_models(**load, loras=[lora], embeddings=[embedding])
    switched = plain.with_loras([lora])
    assert not same(plain, both)
    assert same(switched, both)
    assert same(switched.with_loras([]), plain)
    assert len(switched.clip.token_embedding.weight) == MICRO.text.vocab_size + 2
    assert switched.tokenizer.encode("my-cat") == [MICRO.text.vocab_size, MICRO.text.vocab_size + 1]
