"""LoRAs in our networks against diffusers with PEFT, and against LyCORIS' own modules, on equal files, in float32."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from sd import load_models
from sd.adapters.lora import delta
from sd.adapters.lora_names import split_key
from sd.checkpoints.files import write_checkpoint
from sd.config import SD15
from sd.model_converter import to_compvis
from tests.parity import reference
from tests.support.marks import slow
from tests.support.synthetic import MICRO, SD2_MICRO, random_state
from tests.support.synthetic_lora import file_state, layers, lora

# Two levels, of which one has attention, with one block each.
NANO = replace(
    MICRO,
    text=replace(MICRO.text, layers=1),
    unet=replace(MICRO.unet, channels=(16, 32), attention=(True, False), blocks_per_level=1),
)
FULL = replace(SD15, vae=MICRO.vae)
CONFIGS = {"nano": NANO, "micro": MICRO, "sd2": SD2_MICRO, "full": FULL}
WEIGHTS = 1e-5  # relative to the largest number of a tensor
OUTPUT = 1e-4  # relative to the spread of the output


def assert_close(ours, theirs, name=""):
    assert ours.shape == theirs.shape, name
    assert (ours - theirs).abs().max() <= WEIGHTS * theirs.abs().max(), name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A configuration, its random weights, and a file with them."""
    folder, made = tmp_path_factory.mktemp("base"), {}

    def base(name):
        if name not in made:
            path, config = folder / f"{name}.safetensors", CONFIGS[name]
            state = random_state(config, seed=2)
            write_checkpoint(path, state, config.to_dict())
            made[name] = config, state, path
        return made[name]

    return base


def pipeline(config, state):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    unet, text = reference.unet(config, state), reference.text_encoder(config, state)
    parts = {"vae": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        unet=unet, text_encoder=text, scheduler=scheduler, requires_safety_checker=False, **parts
    )


def fuse(pipe, paths, strengths):
    """Adds the LoRAs to the weights, as diffusers does."""
    names = [f"adapter{number}" for number, _ in enumerate(paths)]
    for name, path in zip(names, paths):
        pipe.load_lora_weights(str(path), adapter_name=name)
    pipe.set_adapters(names, strengths)
    pipe.fuse_lora(components=list(pipe.get_list_adapters()), adapter_names=names)


def plain(network):
    """The weights of a network, without PEFT's own and the names that it puts between."""
    return {key.replace(".base_layer", ""): x for key, x in network.state_dict().items() if ".lora_" not in key}


def assert_same_networks(models, pipe, config):
    state = to_compvis(models)
    for ours, theirs in (
        (reference.unet(config, state).state_dict(), plain(pipe.unet)),
        (reference.text_encoder(config, state).state_dict(), plain(pipe.text_encoder)),
    ):
        assert ours.keys() == theirs.keys()
        for key, weight in ours.items():
            assert_close(weight, theirs[key], key)


@torch.no_grad()
def assert_same_output(models, pipe, config):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, config.unet.in_channels, 16, 16, generator=generator)
    context, times = torch.randn(2, 77, config.unet.context_width, generator=generator), torch.tensor([500, 20])
    ours, theirs = models.diffusion(latents, context, times), pipe.unet(latents, times, context).sample
    assert (ours - theirs).abs().max() <= OUTPUT * theirs.std()


def layers_of(pipe, conv=True):
    return layers(pipe.unet, pipe.text_encoder, conv)


STYLES = [("kohya", True), ("peft", True), ("2023", False)]
CASES = [("nano", *style) for style in STYLES]
CASES += [slow(name, *style) for name in ("micro", "sd2") for style in STYLES] + [slow("full", "kohya", True)]


@pytest.mark.parametrize("name, style, conv", CASES)
def test_diffusers_fuses_the_same_weights(tmp_path, base, name, style, conv):
    config, state, path = base(name)
    pipe = pipeline(config, state)
    alpha = 2 if style == "kohya" else None
    save_file(file_state(lora(layers_of(pipe, conv), alpha=alpha), style), tmp_path / "a.safetensors")
    models = load_models(path, "cpu", torch.float32, loras=[(tmp_path / "a.safetensors", 0.7)])
    fuse(pipe, [tmp_path / "a.safetensors"], [0.7])
    assert_same_networks(models, pipe, config)
    assert_same_output(models, pipe, config)


def test_two_at_once_with_strengths_for_each_network(tmp_path, base):
    config, state, path = base("nano")
    pipe = pipeline(config, state)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(file_state(lora(layers_of(pipe), rank=4, seed=1)), files[0])
    second = lora(layers_of(pipe, conv=False), alpha=None, rank=8, seed=2)
    save_file(file_state(second, "peft"), files[1])
    models = load_models(path, "cpu", torch.float32, loras=[(files[0], 0.5, -0.25), (str(files[1]), -1)])
    fuse(pipe, files, [{"unet": 0.5, "text_encoder": -0.25}, -1.0])
    assert_same_networks(models, pipe, config)


def test_alphas_in_the_metadata(tmp_path, base):
    """diffusers writes PEFT's settings there."""
    peft = pytest.importorskip("peft")
    config, state, path = base("nano")
    pipe = pipeline(config, state)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["to_q", "to_k", "proj_in"],
        use_rslora=True,
        alpha_pattern={"attn1.to_q": 5, "down_blocks.0.attentions.0.proj_in": 7},
        rank_pattern={"attn2.to_k": 2},
    )
    pipe.unet.add_adapter(settings, "adapter0")
    generator = torch.Generator().manual_seed(0)
    for name, weight in pipe.unet.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    weights = peft.get_peft_model_state_dict(pipe.unet, adapter_name="adapter0")
    pipe.save_lora_weights(tmp_path, weights, unet_lora_adapter_metadata=settings.to_dict())
    models = load_models(path, "cpu", torch.float32, loras=[tmp_path / "pytorch_lora_weights.safetensors"])
    pipe.fuse_lora(components=["unet"])
    assert_same_networks(models, pipe, config)


def test_the_first_style_of_diffusers(tmp_path, base):
    """Only attention, without a prefix. diffusers ignores such files today; the tensors are those of PEFT's style."""
    config, state, path = base("nano")
    found = {key: x for key, x in layers(reference.unet(config, state), None).items() if ".attn" in key}
    for style in ("attention", "peft", "peft raw"):
        save_file(file_state(lora(found, alpha=None), style), tmp_path / f"{style}.safetensors")
    first, *others = (
        to_compvis(load_models(path, "cpu", torch.float32, loras=[tmp_path / f"{style}.safetensors"]))
        for style in ("attention", "peft", "peft raw")
    )
    assert sum(not torch.equal(first[key], state[key]) for key in state) == len(found)
    assert all(torch.equal(first[key], other[key]) for key in state for other in others)


SHAPES = {
    "linear": torch.nn.Linear(48, 64),
    "square": torch.nn.Linear(64, 64, bias=False),
    "1x1": torch.nn.Conv2d(32, 64, 1),
    "3x3": torch.nn.Conv2d(32, 64, 3),
}
TUCKER = {"use_tucker": True}
MODULES = {  # of LyCORIS: the class, its rank and its options
    "locon": ("LoConModule", 4, {}),
    "locon, tucker": ("LoConModule", 4, TUCKER),
    "loha": ("LohaModule", 4, {}),
    "loha, tucker": ("LohaModule", 4, TUCKER),
    "lokr, second of low rank": ("LokrModule", 2, {"factor": 4}),
    "lokr, both of low rank": ("LokrModule", 1, {"factor": 8, "decompose_both": True}),
    "lokr, both whole": ("LokrModule", 100, {"factor": 4}),
    "lokr, tucker": ("LokrModule", 2, {"factor": 4, **TUCKER}),
}


def lycoris_module(kind, layer, **more):
    """A module with random weights, and what it would write into a file."""
    modules = pytest.importorskip("lycoris.modules")
    name, rank, options = MODULES[kind]
    module = getattr(modules, name)("x", layer, 1, rank, 3, **options, **more)
    generator = torch.Generator().manual_seed(0)
    for name, weight in module.named_parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.3 + (name == "dora_scale")
    return module, {split_key(f"x.{key}")[1]: x for key, x in module.state_dict().items() if split_key(f"x.{key}")}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MODULES)
def test_lycoris_computes_the_same_change(kind, shape):
    layer = SHAPES[shape]
    module, parts = lycoris_module(kind, layer)
    if "low rank" in kind:
        assert "lokr_w2_a" in parts
        assert ("lokr_w1_a" in parts) == ("both" in kind)
    assert ("mid" in parts or "hada_t1" in parts or "lokr_t2" in parts) == ("tucker" in kind and shape == "3x3")
    # LoKr's and LoHa's get_diff_weight applies the scale twice; LoCon has no get_weight.
    change = module.get_diff_weight()[0] if "locon" in kind else module.get_weight(layer.weight.shape)
    assert_close(delta(parts, layer.weight.detach()), change.detach())


@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["locon", "locon, tucker", "loha", "lokr, both whole"])
def test_lycoris_decomposes_the_same_weight(kind, shape, on_output):
    """DoRA, with magnitudes of outputs or of inputs."""
    layer = SHAPES[shape]
    module, parts = lycoris_module(kind, layer, weight_decompose=True, wd_on_out=on_output)
    change = delta({name: x for name, x in parts.items() if name != "dora_scale"}, layer.weight.detach())
    expected = module.apply_weight_decompose(layer.weight.detach() + change)
    assert_close(layer.weight.detach() + delta(parts, layer.weight.detach()), expected.detach())


@pytest.mark.parametrize("shape", SHAPES)
def test_peft_decomposes_the_same_weight(shape):
    peft = pytest.importorskip("peft")
    weight = SHAPES[shape].weight.detach().clone()
    settings = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(torch.nn.Sequential(copy.deepcopy(SHAPES[shape])), settings)
    generator = torch.Generator().manual_seed(0)
    for name, x in model.named_parameters():
        if "lora_" in name:
            x.data = x.data + torch.randn(x.shape, generator=generator) * 0.3
    saved = peft.get_peft_model_state_dict(model)
    parts = {split_key(key)[1]: x for key, x in saved.items()}
    assert parts.keys() == {"up", "down", "magnitude"}
    assert_close(weight + delta(parts, weight), model.merge_and_unload()[0].weight.detach())
