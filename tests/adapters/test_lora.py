"""LoRAs in the weights of a model: what they change, what they leave, and which files are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd import load_models
from sd.adapters.lora_files import Lora
from sd.adapters.textual_inversion import Embedding, with_embeddings
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.files import write_checkpoint
from sd.model_converter import to_compvis
from sd.runtime import speed
from sd.runtime.devices import is_compiled
from tests.support.marks import slow
from tests.support.model_mutations import NANO
from tests.support.synthetic import random_models, random_state

CLIP, UNET = "cond_stage_model.transformer.text_model.encoder.layers.0.", "model.diffusion_model."
PROJ_IN = "lora_unet_down_blocks_0_attentions_0_proj_in"
TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
SELF_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
GEGLU = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj"
CONV = "lora_unet_mid_block_resnets_0_conv1"
TEXT_K = "lora_te_text_model_encoder_layers_0_self_attn_k_proj"

TEXT_FC1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"
COMPVIS = "lora_unet_input_blocks_1_1_proj_in"


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(name, outs, *ins, rank=2, seed=0, alpha=None):
    ones = [1] * (len(ins) - 1)
    parts = {
        "lora_up.weight": noise(outs, rank, *ones, seed=seed),
        "lora_down.weight": noise(rank, *ins, seed=seed + 1),
    }
    parts |= {} if alpha is None else {"alpha": torch.tensor(float(alpha))}
    return {f"{name}.{part}": x for part, x in parts.items()}


def product(state, name):
    return state[f"{name}.lora_up.weight"].flatten(1) @ state[f"{name}.lora_down.weight"].flatten(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "nano.safetensors"
    write_checkpoint(path, random_state(NANO), NANO.to_dict())
    return path


@pytest.fixture(scope="module")
def models(base):
    return load_models(base, "cpu", torch.float32)


@pytest.fixture
def file(tmp_path):
    def write(state, name="a.safetensors", metadata=None):
        save_file(state, tmp_path / name, metadata)
        return tmp_path / name

    return write


def everywhere():
    """A LoRA of one layer of each kind: linear, in a GEGLU, of keys in a fused matrix, convolution, text encoder."""
    state = low_rank(PROJ_IN, 8, 8, 1, 1, alpha=1) | low_rank(SELF_K, 8, 8, seed=2) | low_rank(GEGLU, 64, 8, seed=4)
    return state | low_rank(CONV, 16, 16, 3, 3, seed=6, alpha=4) | low_rank(TEXT_K, 16, 16, seed=8)


CHANGED = [
    f"{UNET}input_blocks.1.1.proj_in.weight",
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight",
    f"{UNET}input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight",
    f"{UNET}middle_block.0.in_layers.2.weight",
    f"{CLIP}self_attn.k_proj.weight",
]


def changed(models, base):
    state, before = to_compvis(models), to_compvis(base)
    assert state.keys() == before.keys()
    return [key for key in state if not torch.equal(state[key], before[key])]


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float16), torch.bfloat16])
def test_only_these_layers_change_and_are_rounded_once(base, models, file, dtype):
    state = everywhere()
    loaded = load_models(base, "cpu", dtype, loras=[(file(state), 0.5)])
    rounded = load_models(base, "cpu", dtype)
    assert sorted(changed(loaded, rounded)) == sorted(CHANGED)
    scales = [0.5, 1, 1, 2, 1]
    before, after = to_compvis(models), to_compvis(loaded)
    for key, name, scale in zip(CHANGED, [PROJ_IN, SELF_K, GEGLU, CONV, TEXT_K], scales):
        expected = before[key] + 0.5 * scale * product(state, name).reshape(before[key].shape)
        assert (after[key] - expected.to(dtype)).abs().max() <= 1e-5 + torch.finfo(dtype).eps * expected.abs().max()
        assert after[key].dtype == dtype
    assert {x.dtype for x in loaded.diffusion.parameters()} == {dtype}
    assert not any(x.requires_grad or x.is_meta for x in loaded.diffusion.parameters())
    assert not loaded.diffusion.down[1][1].mlp[0].training


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float16), torch.bfloat16])
def test_they_come_off_to_the_bit(base, file, dtype):
    plain = load_models(base, "cpu", dtype)
    first, second = file(everywhere()), file(low_rank(TO_K, 8, 16), "b.safetensors")
    one = plain.with_loras([first])
    two = one.with_loras([(second, 2, 0)])
    assert len(changed(one, plain)) == 5
    assert changed(two, plain) == [f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"]
    assert changed(two.with_loras([]), plain) == []
    assert changed(one.with_loras([first, second]), load_models(base, "cpu", dtype, loras=[first, second])) == []
    assert two.loras == (Lora(second, 2.0, 0.0),)
    assert (plain.loras, two.with_loras([]).loras) == ((), ())


def test_models_share_what_no_lora_changes(models, file):
    before = {name: x.data_ptr() for name, x in models.diffusion.named_parameters()}
    one = models.with_loras([file(everywhere())])
    assert {name: x.data_ptr() for name, x in models.diffusion.named_parameters()} == before
    own = {name for name, x in one.diffusion.named_parameters() if x.data_ptr() != before[name]}
    assert {name.removesuffix(".bias").removesuffix(".weight") for name in own} == {
        "down.1.1.proj_in",
        "down.1.1.self_attention.qkv",
        "down.1.1.mlp.0.proj",
        "middle.0.conv1",
    }
    assert one.encoder is models.encoder
    one.diffusion.half()
    assert models.diffusion.conv_out.weight.dtype == torch.float32
    assert models.with_loras([]).diffusion is models.diffusion


def test_hooks_belong_to_one_network(models, file):
    one = models.with_loras([file(everywhere())])
    one.diffusion.conv_out.register_forward_hook(lambda *_: None)
    assert not models.diffusion.conv_out._forward_hooks


@pytest.mark.parametrize("given", ["list", "tuple", "Path", "str"])
def test_ways_to_give_them(models, file, given):
    path = file(everywhere())
    loras = {"list": [[path, 1]], "tuple": ((path, 1.0, 1),), "Path": [path], "str": iter([str(path)])}[given]
    assert models.with_loras(loras).loras == (Lora(path),)


def test_each_network_has_its_strength(models, file):
    path = file(everywhere())
    assert changed(models.with_loras([(path, 0, 1)]), models) == CHANGED[4:]
    assert sorted(changed(models.with_loras([(path, 1, 0)]), models)) == sorted(CHANGED[:4])
    assert changed(models.with_loras([(path, 0)]), models) == []


def test_opposite_strengths_cancel_and_the_order_does_not_matter(models, file):
    a, b = file(everywhere()), file(low_rank(PROJ_IN, 8, 8, seed=20), "b.safetensors")
    state, before = to_compvis(models.with_loras([(a, 0.7), b, (a, -0.7), (b, -1)])), to_compvis(models)
    assert all((state[key] - before[key]).abs().max() < 1e-5 for key in state)
    one, other = (to_compvis(models.with_loras(loras)) for loras in ([a, b], [b, a]))
    assert all((one[key] - other[key]).abs().max() < 1e-5 for key in one)


def test_whole_differences_and_norms(models, file):
    norm, text = "lora_unet_mid_block_resnets_0_norm1", "lora_te_text_model_encoder_layers_0_layer_norm1"
    state = {f"{CONV}.diff": noise(16, 16, 3, 3), f"{CONV}.diff_b": noise(16), f"{norm}.w_norm": noise(16)}
    state |= {f"{norm}.b_norm": noise(16, seed=1), f"{text}.w_norm": noise(16), f"{TEXT_K}.diff_b": noise(16)}
    after, before = to_compvis(models.with_loras([(file(state), 0.5)])), to_compvis(models)
    for key, name in {
        f"{UNET}middle_block.0.in_layers.2.weight": f"{CONV}.diff",
        f"{UNET}middle_block.0.in_layers.2.bias": f"{CONV}.diff_b",
        f"{UNET}middle_block.0.in_layers.0.weight": f"{norm}.w_norm",
        f"{UNET}middle_block.0.in_layers.0.bias": f"{norm}.b_norm",
        f"{CLIP}layer_norm1.weight": f"{text}.w_norm",
        f"{CLIP}self_attn.k_proj.bias": f"{TEXT_K}.diff_b",
    }.items():
        assert torch.allclose(after[key], before[key] + 0.5 * state[name], atol=1e-6), key
    assert len([key for key in after if not torch.equal(after[key], before[key])]) == 6


def test_an_ordinary_lora_on_an_inpainting_model(tmp_path, file):
    config = replace(NANO, unet=replace(NANO.unet, in_channels=9))
    write_checkpoint(tmp_path / "base.ckpt", random_state(config), config.to_dict())
    models, state = load_models(tmp_path / "base.ckpt", "cpu", torch.float32), low_rank("lora_unet_conv_in", 8, 4, 3, 3)
    weight = models.with_loras([file(state)]).diffusion.down[0][0].weight
    before = models.diffusion.down[0][0].weight
    change = product(state, "lora_unet_conv_in").reshape(8, 4, 3, 3)
    assert torch.allclose(weight[:, :4], before[:, :4] + change, atol=1e-5)
    assert torch.equal(weight[:, 4:], before[:, 4:])


@pytest.mark.parametrize("parts", [("lora_up.weight", "lora_down.weight"), ("lokr_w1", "lokr_w2"), ("diff",)])
def test_tensors_that_are_stored_transposed(models, tmp_path, parts):
    shapes = {
        "lokr_w1": (2, 2),
        "lokr_w2": (4, 4),
        "lora_up.weight": (8, 2),
        "lora_down.weight": (2, 8),
        "diff": (8, 8),
    }
    state = {f"{PROJ_IN}.{part}": noise(*shapes[part]) for part in parts}
    torch.save(state, tmp_path / "a.pt")
    torch.save({key: x.T.contiguous().T for key, x in state.items()}, tmp_path / "b.pt")
    one, other = (models.with_loras([tmp_path / name]) for name in ("a.pt", "b.pt"))
    assert changed(one, models) == CHANGED[:1]
    assert changed(other, one) == []


def test_settings_of_peft_beside_the_file(models, file, tmp_path):
    key = "base_model.model.down_blocks.0.attentions.0.proj_in"
    state = {f"{key}.lora_A.weight": noise(4, 8), f"{key}.lora_B.weight": noise(8, 4)}
    path = file(state, "adapter_model.safetensors")
    (plain,) = (to_compvis(models.with_loras([path])),)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    halved = to_compvis(models.with_loras([path]))
    before = to_compvis(models)[CHANGED[0]]
    assert torch.allclose(halved[CHANGED[0]] - before, (plain[CHANGED[0]] - before) / 2, atol=1e-5)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": "much"}))
    with pytest.raises(CheckpointError, match=r"lora_alpha of down_blocks.* should be a number, not 'much'\."):
        models.with_loras([path])


@pytest.mark.slow
@torch.no_grad()
def test_packed_weights(base, file, monkeypatch):
    """The same code runs in bfloat16 on processors that can pack it; here it packs float32."""
    path = file(everywhere())
    expected = load_models(base, "cpu", torch.float32, loras=[(path, 0.5)])
    monkeypatch.setattr(speed, "can_pack", lambda *_: torch.backends.mkldnn.is_available())
    plain = load_models(base, "cpu", torch.float32)
    worn = plain.with_loras([(path, 0.5)])
    assert isinstance(worn.diffusion.middle[0].conv1, speed.PackedConvolution)
    assert isinstance(worn.diffusion.down[1][1].mlp[0], speed.PackedGEGLU)
    assert worn.diffusion.middle[0].conv2.packed is not plain.diffusion.middle[0].conv2.packed
    latents, context = noise(1, 4, 8, 8), noise(1, 77, 16)
    outputs = [each.diffusion(latents, context, torch.tensor([500])) for each in (worn, expected)]
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4
    assert changed(worn, expected) == []
    assert changed(worn.with_loras([]), plain) == []


def test_an_idle_network_is_packed_only_if_it_computes_on_the_cpu(base, file, monkeypatch):
    asked = []
    monkeypatch.setattr(speed, "can_pack", lambda device, dtype: asked.append(device.type))
    models = load_models(base, "cpu", torch.float32)
    replace(models, device=torch.device("cuda")).with_loras([file(everywhere())])  # as if they waited on the CPU
    assert asked == ["cpu", "cuda"]


@pytest.mark.slow
def test_compiled_networks_are_compiled_again(base, file):
    models = load_models(base, "cpu", torch.float32, compiled=True)
    one = models.with_loras([file(everywhere())])
    assert is_compiled(one.diffusion)
    assert is_compiled(models.diffusion)
    assert one.decoder is models.decoder


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A model with CLIP's whole vocabulary, to which words can be added."""
    path, config = (
        tmp_path_factory.mktemp("worded") / "nano.safetensors",
        replace(NANO, text=replace(NANO.text, vocab_size=49408)),
    )
    write_checkpoint(path, random_state(config), config.to_dict())
    return path


def bundle(*words):
    """A LoRA with embeddings of two vectors for these words."""
    return everywhere() | {f"bundle_emb.{word}.string_to_param.*": noise(2, 16, seed=len(word)) for word in words}


def test_a_bundled_word_comes_with_the_lora_and_goes_with_it(worded, file):
    models = load_models(worded, "cpu", torch.float32)
    one = load_models(worded, "cpu", torch.float32, loras=[(file(bundle("foo", "a")), 0)])
    table = one.clip.token_embedding.weight
    assert one.tokenizer.added == {"a": [49408, 49409], "foo": [49410, 49411]}
    assert torch.equal(table[49408:], torch.cat([noise(2, 16, seed=1), noise(2, 16, seed=3)]))
    assert torch.equal(table[:49408], models.clip.token_embedding.weight)
    assert one.config.text.vocab_size == len(table)

    plain = one.with_loras([])
    assert torch.equal(plain.clip.token_embedding.weight, models.clip.token_embedding.weight)
    assert torch.equal(plain.tokenizer(["a foo"]), models.tokenizer(["a foo"]))
    assert changed(plain, models) == []
    again = plain.with_loras([file(bundle("bar"), "b.safetensors"), file(bundle("foo"))])
    assert again.tokenizer.added == {"bar": [49408, 49409], "foo": [49410, 49411]}


def test_words_from_elsewhere_stay(worded, file):
    one = load_models(worded, "cpu", torch.float32, loras=[file(bundle("foo"))])
    vectors = noise(3, 16, seed=9)
    two = with_embeddings(one, [Embedding(Path("cat.pt"), ("cat", "<cat>"), vectors)])
    three = two.with_loras([])
    assert three.tokenizer.added == {"cat": [49408, 49409, 49410], "<cat>": [49411, 49412, 49413]}
    assert torch.equal(three.clip.token_embedding.weight[49408:], torch.cat([vectors, vectors]))
    assert two.tokenizer.added["foo"] == [49408, 49409]
    with pytest.raises(ValueError, match="c.safetensors should get another word than 'cat', which the models have."):
        three.with_loras([file(bundle("cat"), "c.safetensors")])


def test_one_file_twice_brings_its_word_once(worded, file):
    path = file(bundle("foo"))
    assert load_models(worded, "cpu", loras=[(path, 0.5), (path, 0.25)]).tokenizer.added == {"foo": [49408, 49409]}


REFUSED = {
    "another family": (
        low_rank(TO_K, 8, 768),
        "a.safetensors should be a LoRA for this model, whose context is 16 wide, not for Stable Diffusion 1.x.",
    ),
    "the text encoder of another": (low_rank(TEXT_FC1, 64, 1024), "not for Stable Diffusion 2.x."),
    "a width that nobody has": (low_rank(TO_K, 8, 20), "not for a model whose text encoder is 20 wide."),
    "XL by its names": (low_rank(TEXT_FC1.replace("te", "te2", 1), 64, 16), "not for Stable Diffusion XL."),
    "FLUX": (low_rank("lora_unet_double_blocks_0_img_attn_proj", 8, 8), "not for a transformer, such as FLUX or"),
    "a model": ({f"{UNET}out.2.bias": noise(4), f"{CLIP}norm.bias": noise(4)}, "but it is a whole model: give it as"),
    "a VAE": (
        {"decoder.conv_in.weight": noise(4), "x": noise(4)},
        "should be a LoRA, but it is a VAE: give it as `vae",
    ),
    "an IP-Adapter": ({"ip_adapter.1.to_k_ip.weight": noise(4)}, "should be a LoRA, but it is an IP-Adapter, which is"),
    "embeddings alone": (
        {"bundle_emb.foo.string_to_param.*": noise(2, 16)},
        "should be a LoRA, but it has only embeddings: bundle_emb.foo.string_to_param.*.",
    ),
    "an embedding that is too wide": (
        everywhere() | {"bundle_emb.foo.string_to_param.*": noise(2, 17)},
        "should have vectors of 16 numbers for this model, not bundle_emb.foo.string_to_param.* with 17.",
    ),
    "an embedding of XL": (
        everywhere() | {"bundle_emb.foo.clip_g": noise(2, 16)},
        "has an embedding with an unknown name: bundle_emb.foo.clip_g.",
    ),
    "an embedding with NaN": (
        everywhere() | {"bundle_emb.foo.emb_params": torch.full((2, 16), torch.nan)},
        "should have finite vectors, not NaN or infinity; download it again.",
    ),
    "a ControlNet": ({"control_model.x": noise(4)}, "should be a LoRA, but it is a ControlNet,"),
    "an embedding": ({"emb_params": noise(4)}, "should be a LoRA, but it is a textual inversion embedding."),
    "nothing known": ({"x": noise(4)}, "should be a LoRA, but it has only tensors with unknown names: x."),
    "OFT": ({f"{PROJ_IN}.oft_blocks": noise(2, 4, 4), f"{PROJ_IN}.alpha": noise()}, "not an orthogonal adapter (OFT)."),
    "GLoRA": ({f"{PROJ_IN}.{part}.weight": noise(8, 8) for part in ("a1", "a2", "b1", "b2")}, "not GLoRA."),
    "IA3": ({f"{PROJ_IN}.weight": noise(8, 1), f"{PROJ_IN}.on_input": torch.tensor(True)}, "not IA3."),
    "numbered": ({"unet:0:up": noise(8, 2), "unet:0:down": noise(2, 8)}, "not in cloneofsimo's format"),
    "unknown modules": (
        {key: x for i in range(5) for key, x in low_rank(f"lora_unet_x_{i}", 8, 8).items()},
        "does not fit this model: unknown modules: lora_unet_x_0, lora_unet_x_1, lora_unet_x_2 and 2 more.",
    ),
    "unknown tensors": (everywhere() | {f"{PROJ_IN}.more": noise(2)}, f"unknown tensors: {PROJ_IN}.more."),
    "a bias of PEFT": (
        everywhere() | {"unet.conv_in.lora_B.bias": noise(2)},
        "unknown tensors: unet.conv_in.lora_B.bias.",
    ),
    "ranks that differ": (
        low_rank(PROJ_IN, 8, 8) | {f"{PROJ_IN}.lora_down.weight": noise(3, 8)},
        "another shape or rank: down_blocks.0.attentions.0.proj_in.",
    ),
    "another shape": (low_rank(PROJ_IN, 8, 9), "another shape or rank: down_blocks.0"),
    "another kernel": (low_rank(CONV, 16, 16, 5, 5), "another shape or rank: mid_block.resnets.0.conv1."),
    "no rank": (low_rank(PROJ_IN, 8, 8, rank=0), "an empty tensor, or several alphas: "),
    "several alphas": (
        low_rank(PROJ_IN, 8, 8) | {f"{PROJ_IN}.alpha": noise(2)},
        "an empty tensor, or several alphas: ",
    ),
    "one half": ({f"{PROJ_IN}.lora_up.weight": noise(8, 2)}, "tensors missing, or of two kinds: down_blocks.0.att"),
    "only alpha": ({f"{PROJ_IN}.alpha": noise()}, "tensors missing, or of two kinds: down_blocks.0.att"),
    "two kinds": (low_rank(PROJ_IN, 8, 8) | {f"{PROJ_IN}.diff": noise(8, 8)}, "tensors missing, or of two kinds: "),
    "a core of one": (
        low_rank(CONV, 16, 16, 1, 1) | {f"{CONV}.lora_mid.weight": noise(1, 1, 3, 3)},
        "another shape or rank: mid_block.resnets.0.conv1.",
    ),
    "no bias": (
        low_rank(SELF_K, 8, 8) | {f"{SELF_K}.diff_b": noise(8)},
        "a bias that the model lacks, or of another shape: ",
    ),
    "NaN": (
        low_rank(PROJ_IN, 8, 8) | {f"{PROJ_IN}.alpha": torch.tensor(torch.nan)},
        f"NaN or infinity: {PROJ_IN}.alpha.",
    ),
    "whole numbers": (
        low_rank(PROJ_IN, 8, 8) | {f"{PROJ_IN}.lora_up.weight": torch.ones(8, 2).int()},
        "not floating point: ",
    ),
    "two names": (low_rank(PROJ_IN, 8, 8) | low_rank(COMPVIS, 8, 8), "twice, under two names: lora_unet_"),
    "a magnitude": (
        low_rank(PROJ_IN, 8, 8) | {f"{PROJ_IN}.dora_scale": noise(7, 1)},
        "another shape or rank: ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_do_not_fit(models, file, name):
    state, sentence = REFUSED[name]
    good, bad = file(everywhere(), "good.safetensors"), file(state)
    with pytest.raises(CheckpointError) as caught:
        models.with_loras([good, bad])
    message = str(caught.value)
    assert message.startswith(str(bad))
    assert sentence in message
    assert message.endswith(".")
    assert "\n" not in message


def test_a_refused_file_changes_nothing(models, base, file):
    bad = file(low_rank(PROJ_IN, 8, 9), "bad.safetensors")
    one = models.with_loras([file(everywhere())])
    for attempt in (one.with_loras, models.with_loras, lambda loras: load_models(base, "cpu", loras=loras)):
        with pytest.raises(CheckpointError, match="bad.safetensors does not fit this model: another shape"):
            attempt([(file(everywhere()), 3), bad])
    assert sorted(changed(one, models)) == sorted(CHANGED)
    assert changed(models, load_models(base, "cpu", torch.float32)) == []


@pytest.mark.parametrize(
    "loras, error, sentence",
    [
        ("a.safetensors", TypeError, "loras should be a list, as in loras=['a.safetensors'], not one path."),
        ({"a": 1}, TypeError, "loras should be a list of paths or (path, strength), not {'a': 1}."),
        (None, TypeError, "loras should be a list of paths or (path, strength), not None."),
        ([3], TypeError, "A LoRA should be a path, (path, strength) or (path, unet, text), not 3."),
        ([("a", 1, 2, 3)], TypeError, "A LoRA should be a path, (path, strength) or"),
        ([("a", "0.8")], ValueError, "The strength of a should be a number from -100 to 100; 0.5 to 1 is usual, not"),
        ([("a", float("nan"))], ValueError, "The strength of a should be"),
        ([("a", 1, 101)], ValueError, "The strength of a should be"),
        (
            [("a", True)],
            ValueError,
            "The strength of a should be a number from -100 to 100; 0.5 to 1 is usual, not True.",
        ),
        (["none.safetensors"], FileNotFoundError, "There is no LoRA file at none.safetensors."),
    ],
)
def test_what_is_not_a_list_of_loras(models, loras, error, sentence):
    with pytest.raises(error) as caught:
        models.with_loras(loras)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", None])
def test_a_folder(models, file, tmp_path, name):
    if name:
        file(everywhere(), name)
    with pytest.raises(CheckpointError) as caught:
        models.with_loras([tmp_path])
    assert str(caught.value) == f"{tmp_path} should be a LoRA file, not a folder" + (
        f": give {tmp_path / name}." if name else "."
    )


def test_numbers_beyond_the_dtype(base, file):
    path = file({f"{PROJ_IN}.diff": torch.full((8, 8), 7e4)})
    models = load_models(base, "cpu", torch.float16)
    with pytest.raises(
        CheckpointError, match=r"a.safetensors: with these strengths, down.1.1.proj_in has numbers that float16 cannot"
    ):
        models.with_loras([path])
    assert models.with_loras([(path, 0.5)]).diffusion.down[1][1].proj_in.weight.isfinite().all()


def test_a_checkpoint_that_has_changed(tmp_path, file):
    path = tmp_path / "base.ckpt"
    write_checkpoint(path, random_state(NANO), NANO.to_dict())
    models = load_models(path, "cpu", torch.float32)
    write_checkpoint(path, random_state(NANO, seed=3), NANO.to_dict())
    with pytest.raises(CheckpointError, match=r"base.ckpt has changed since it was loaded, or is gone: load a"):
        models.with_loras([file(everywhere())])
    assert models.with_loras([]).diffusion is models.diffusion
    path.unlink()
    with pytest.raises(CheckpointError, match="base.ckpt has changed since it was loaded, or is gone"):
        models.with_loras([file(everywhere())])


def test_a_checkpoint_in_the_folder_before(tmp_path, file, monkeypatch):
    write_checkpoint(tmp_path / "base.ckpt", random_state(NANO), NANO.to_dict())
    monkeypatch.chdir(tmp_path)
    models, path = load_models("base.ckpt", "cpu", torch.float32), file(everywhere())
    monkeypatch.chdir("/")
    assert len(changed(models.with_loras([path]), models)) == 5


def test_networks_without_a_file():
    with pytest.raises(ValueError, match=r"models should be what load_models returns: a LoRA changes the weights in"):
        random_models(NANO).with_loras([])
