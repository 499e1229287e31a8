"""The tracer records what happens, and changes nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sd import generate, pipeline
from sd.config import SD15
from sd.decoder import Decoder
from sd.diffusion import Diffusion
from sd.encoder import Encoder
from sd.inside.tracer import Tracer, feature_image
from sd.runtime import decode_in_strips as strips
from tests.support.synthetic import MICRO, random_models

OPTIONS = {"seed": 3, "n_inference_steps": 2, "height": 32, "width": 40}


@pytest.fixture(scope="module")
def models():
    return random_models(MICRO)


def hooks(models):
    networks = (models.clip, models.encoder, models.diffusion, models.decoder)
    modules = [module for network in networks for module in network.modules()]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


@pytest.mark.slow
def test_the_shapes_of_sd15_at_512():
    """The tables of every network, on the meta device, without weights."""
    with torch.device("meta"):
        diffusion, encoder, decoder = Diffusion(SD15.unet), Encoder(SD15.vae), Decoder(SD15.vae)
        networks = {"clip": torch.nn.Identity(), "encoder": encoder, "decoder": decoder, "diffusion": diffusion}
        models = SimpleNamespace(**networks, tokenizer=None, config=SD15)
        with Tracer(models) as trace:
            encoder(torch.empty(1, 3, 512, 512))
            diffusion(torch.empty(2, 4, 64, 64), torch.empty(2, 77, 768), torch.empty(2))
            decoder(torch.empty(1, 4, 64, 64))
    unet = dict(trace.shapes("diffusion"))
    stages = [*(f"down.{i}" for i in range(12)), "middle", *(f"up.{i}" for i in range(12))]
    assert list(unet) == ["in", *stages, "conv_out"]
    ends = ["in", "down.0", "down.3", "down.6", "down.9", "down.11"]
    ends += ["middle", "up.2", "up.5", "up.8", "up.11", "conv_out"]
    sizes = [(4, 64), (320, 64), (320, 32), (640, 16), (1280, 8), (1280, 8), (1280, 8)]
    sizes += [(1280, 16), (1280, 32), (640, 64), (320, 64), (4, 64)]
    assert [unet[name] for name in ends] == [(2, channels, side, side) for channels, side in sizes]
    sizes = [(4, 64), (512, 64), (512, 64), (512, 128), (512, 256), (256, 512), (128, 512), (3, 512)]
    names = ["in", "conv_in", "middle", "levels.3", "levels.2", "levels.1", "levels.0", "conv_out"]
    assert trace.shapes("decoder") == [(name, (1, c, side, side)) for name, (c, side) in zip(names, sizes)]
    sizes = [(3, 512), (128, 512), (128, 256), (256, 128), (512, 64), (512, 64), (512, 64), (8, 64)]
    names = ["in", "conv_in", "levels.0", "levels.1", "levels.2", "levels.3", "middle", "conv_out"]
    assert trace.shapes("encoder") == [(name, (1, c, side, side)) for name, (c, side) in zip(names, sizes)]


def test_a_call_for_every_run_of_a_network(models):
    with Tracer(models) as trace:
        generate(["a cat", "a dog"], models=models, **OPTIONS)
    assert [call.network for call in trace.calls] == ["clip", "diffusion", "diffusion", "decoder", "decoder"]
    assert trace.calls[0].shapes == {"in": (4, 77), "layers.0": (4, 77, 32), "layers.1": (4, 77, 32)}
    assert trace.calls[1].shapes == trace.calls[2].shapes
    assert trace.shapes("diffusion")[:2] == [("in", (4, 4, 4, 5)), ("down.0", (4, 16, 4, 5))]
    assert trace.shapes("decoder")[-1] == ("conv_out", (1, 3, 32, 40))


def test_parts_of_a_network_that_run_alone(models):
    image = torch.zeros(1, 3, 16, 16)
    with Tracer(models) as trace:
        models.encoder.moments(image)
        models.encoder.moments(image)
        models.clip.encode(torch.zeros(1, 5, 32))
    assert [call.network for call in trace.calls] == ["encoder", "encoder", "clip"]
    assert trace.shapes("encoder")[:2] == [("in", (1, 3, 16, 16)), ("conv_in", (1, 16, 16, 16))]
    assert trace.shapes("clip")[0] == ("in", (1, 5, 32))


def test_arguments_by_name(models):
    arguments = {"latents": torch.randn(1, 4, 4, 5), "context": torch.randn(1, 77, 32), "timesteps": torch.tensor([9])}
    with Tracer(models, attention=True) as trace:
        models.diffusion(**arguments)
        models.diffusion(**dict(reversed(arguments.items())))
        models.diffusion.middle(torch.zeros(1, 32, 2, 3), time=torch.zeros(1, 64), context=arguments["context"])
    with Tracer(models, attention=True) as expected:
        models.diffusion(*arguments.values())
    assert trace.calls[0] == trace.calls[1] == expected.calls[0]
    assert torch.equal(trace.attention["down.1"], expected.attention["down.1"])
    with Tracer(models, attention=True) as trace:
        models.diffusion.middle[1](context=torch.zeros(1, 7, 32), x=torch.zeros(1, 32, 2, 3))
    assert trace.attention["middle"].shape == (1, 2, 3, 7)


def test_a_deep_cache(models):
    """It runs all stages, then only the first and the last, without the network's `forward`."""
    with Tracer(models, activations=["diffusion.middle", "diffusion.time_embedding"], attention=True) as trace:
        generate("a cat", models=models, deep_cache=2, **OPTIONS)
    full, cached = (call.shapes for call in trace.calls if call.network == "diffusion")
    assert len(full) == 28
    assert list(cached) == ["in", "time_embedding", "down.0", "up.11", "conv_out"]
    assert full["in"] == cached["in"] == (2, 4, 4, 5)
    assert trace.shapes("diffusion")[0] == ("in", (2, 4, 4, 5))
    assert trace.activation("diffusion.middle").shape == (2, 32, 1, 1)
    assert trace.word_map("cat", "a cat").shape == (32, 40)


@pytest.mark.parametrize(
    "prompt, do_cfg, dtype",
    [
        ("a cat", True, torch.float32),
        ("a cat", False, torch.bfloat16),
        (["a cat", "a dog"], True, torch.bfloat16),
        (["a cat", "a dog"], False, torch.float32),
    ],
)
def test_the_same_bits_before_with_and_after(prompt, do_cfg, dtype):
    models = random_models(MICRO)
    for network in (models.clip, models.encoder, models.diffusion, models.decoder):
        network.to(dtype)

    def picture():
        return generate(prompt, do_cfg=do_cfg, models=models, **OPTIONS)

    def noise():
        g = torch.Generator().manual_seed(0)
        latents, context = torch.randn(2, 4, 4, 5, generator=g), torch.randn(2, 77, 32, generator=g)
        return models.diffusion(latents.to(dtype), context.to(dtype), torch.tensor([5, 900]))

    before = picture(), noise()
    with Tracer(models, activations=["diffusion.down.1.1.cross_attention.query", "decoder.middle"], attention=True):
        assert hooks(models) > 0
        within = picture(), noise()
    after = picture(), noise()
    assert hooks(models) == 0
    for pixels, predicted in (within, after):
        assert np.array_equal(pixels, before[0])
        assert torch.equal(predicted, before[1])


def test_no_hooks_are_left_after_an_exception(models):
    with pytest.raises(KeyboardInterrupt), Tracer(models, attention=True):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError), Tracer(models, attention=True) as trace:
        models.diffusion(torch.zeros(1, 4, 4, 4), torch.zeros(1, 77, 31), torch.zeros(1))
    assert hooks(models) == 0
    # The interrupted call does not mix with the next one.
    with trace:
        models.diffusion(torch.zeros(1, 4, 4, 4), torch.zeros(1, 77, 32), torch.zeros(1))
    assert len(trace.shapes("diffusion")) == 27


def test_activations_are_what_the_module_gave(models):
    latents = torch.randn(1, 4, 2, 3)
    kept = []
    handle = models.decoder.levels[1].register_forward_hook(lambda *args: kept.append(args[-1]))
    with Tracer(models, activations=["decoder.levels.1", "decoder.levels.1.blocks.0"]) as trace:
        models.decoder(latents)
        models.decoder(latents + 1)
    handle.remove()
    assert torch.equal(trace.activation("decoder.levels.1"), kept[1])
    assert torch.equal(trace.calls[0].activations["levels.1"], kept[0])
    assert trace.activation("decoder.levels.1.blocks.0").shape == (1, 16, 8, 12)
    assert list(trace.calls[0].activations) == ["levels.1.blocks.0", "levels.1"]


def test_large_images_are_decoded_whole_while_hooks_are_active(models, monkeypatch):
    """Strips, the rule for large maps in float32 on a CPU, do not call the decoder's modules."""
    monkeypatch.setattr(strips, "LARGE_MAP", 0)
    monkeypatch.setattr(strips, "_free_memory", lambda device: 1 << 40)
    latents, seen = torch.randn(1, 4, 4, 6), []
    monkeypatch.setattr(strips, "decode_in_strips", lambda decoder, x: seen.append("strips") or decoder(x))
    pictures = [pipeline.decode_latents(models, latents)]
    assert seen == ["strips"]
    with Tracer(models, activations=["decoder.levels.1"]) as trace:
        pictures.append(pipeline.decode_latents(models, latents))
    assert trace.activation("decoder.levels.1").shape == (1, 16, 32, 48)
    assert trace.shapes("decoder")[-1] == ("conv_out", (1, 3, 32, 48))
    handle = models.decoder.levels[1].register_forward_hook(lambda *_: seen.append("level"))
    pictures.append(pipeline.decode_latents(models, latents))
    handle.remove()
    assert seen == ["strips", "level"]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
    pipeline.decode_latents(models, latents)
    assert seen == ["strips", "level", "strips"]


def test_hooks_do_not_prevent_strips_if_memory_is_short(models, monkeypatch):
    monkeypatch.setattr(strips, "_free_memory", lambda device: 0)
    with Tracer(models):
        assert strips.needed(models.decoder, torch.zeros(1, 4, 4, 6))


def test_bad_requests(models):
    with pytest.raises(ValueError, match=r"activations should be names like .*, not \['decoder.levels.9', 'unet'\]"):
        Tracer(models, activations=["unet", "decoder.levels.9", "decoder.levels.0"])
    with Tracer(models, activations=["decoder.middle"]) as trace:
        models.decoder(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"network should be one that has run, \['decoder'\], not 'diffusion'."):
        trace.shapes("diffusion")
    with pytest.raises(ValueError, match="activations, of a module that has run, not 'decoder.conv_in'"):
        trace.activation("decoder.conv_in")
    with pytest.raises(ValueError, match="attention should be True when the Tracer is made"):
        trace.token_map(1)
    with Tracer(models, attention=True) as trace:
        models.diffusion(torch.zeros(1, 4, 2, 2), torch.zeros(1, 77, 32), torch.tensor([1]))
    for positions in (77, -1, []):
        with pytest.raises(ValueError, match="positions should be from 0 to 76, not "):
            trace.token_map(positions)


# Images of feature maps


def test_similar_features_have_similar_colours():
    features = torch.zeros(16, 8, 8)
    features[:, :, 4:] = torch.randn(16, 1, 1)
    features[:, 4:] += torch.randn(16, 1, 1) / 2
    picture = feature_image(features)
    assert picture.shape == (8, 8, 3)
    assert picture.dtype == np.uint8
    quarters = [picture[:4, :4], picture[:4, 4:], picture[4:, :4], picture[4:, 4:]]
    colours = {tuple(quarter[0, 0, :2]) for quarter in quarters}  # the features have only two directions
    assert len(colours) == 4
    assert all((quarter[..., :2] == quarter[0, 0, :2]).all() for quarter in quarters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 64])
def test_pictures_of_any_number_of_channels(channels, dtype):
    features = torch.randn(channels, 6, 9).to(dtype)
    picture = feature_image(features)
    assert picture.shape == (6, 9, 3)
    assert np.array_equal(picture, feature_image(features * 4))  # stretched to the same range
    assert picture.max() == 255
    assert (picture[..., 0] == picture[..., 1]).all() == (channels == 1)


def test_a_flat_feature_map_is_black():
    assert (feature_image(torch.ones(1, 4, 4)) == 0).all()


@pytest.mark.parametrize(
    "features, expected",
    [
        (torch.zeros(4, 4), r"of shape \(C, h, w\), not \(4, 4\)"),
        (torch.zeros(1, 3, 4, 4), r"of shape \(C, h, w\), not \(1, 3, 4, 4\)"),
        (torch.full((3, 4, 4), torch.nan), "finite, not NaN or infinity"),
    ],
)
def test_bad_features(features, expected):
    with pytest.raises(ValueError, match=f"features should be {expected}"):
        feature_image(features)


def test_pictures_of_the_decoder_level_by_level(models):
    names = [f"decoder.levels.{i}" for i in (3, 2, 1, 0)]
    with Tracer(models, activations=names) as trace:
        pipeline.decode_latents(models, torch.randn(1, 4, 4, 6))
    pictures = [feature_image(trace.activation(name)[0]) for name in names]
    assert [picture.shape for picture in pictures] == [(8, 12, 3), (16, 24, 3), (32, 48, 3), (32, 48, 3)]
    assert all(picture.std() > 10 for picture in pictures)
