"""Decoding in strips: the picture of the plain decoder, in less memory."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sd.blocks import Upsample
from sd.config import SD15, ModelConfig, VAEConfig
from sd.decoder import Decoder
from sd.images import tensor_to_array
from sd.model_loader import load_models
from sd.runtime import decode_in_strips as strips
from sd.runtime.decode_in_strips import FeatureMap, InStrips, decode_in_strips, needed
from sd.runtime.devices import device_and_dtype
from tests import ROOT
from tests.support.marks import slow
from tests.support.synthetic import MICRO, random_networks

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
NARROWING = ModelConfig(vae=VAEConfig(channels=(8, 16, 32, 32), groups=8), text=MICRO.text, unet=MICRO.unet)


@pytest.fixture(scope="module", autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def decoder_of(config, layout=torch.contiguous_format, dtype=torch.float32):
    return random_networks(config).decoder.to(dtype).to(memory_format=layout)


def levels(image):
    return torch.from_numpy(tensor_to_array(image)).int()


@LAYOUTS
@pytest.mark.parametrize("config", [MICRO, NARROWING], ids=["equal widths", "shortcut after upsampling"])
@pytest.mark.parametrize(
    "shape, rows",
    [
        ((1, 4, 8, 8), 16),  # divides the height
        ((1, 4, 5, 9), 7),  # does not
        slow((2, 4, 3, 4), 1),
        slow((3, 4, 2, 3), 5),
        ((1, 4, 1, 1), 2),
        slow((1, 4, 7, 1), 3),
        ((1, 4, 1, 6), 1000),  # one strip
    ],
)
def test_the_picture_is_that_of_the_plain_decoder(config, layout, shape, rows):
    decoder = decoder_of(config, layout)
    latents = torch.randn(shape).contiguous(memory_format=layout)
    expected = decoder(latents)
    torch.testing.assert_close(decode_in_strips(decoder, latents, rows), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("channels", [(16,), (8, 16), (8, 16, 16)])
def test_any_number_of_levels(channels):
    decoder = decoder_of(ModelConfig(vae=VAEConfig(channels=channels, groups=4), text=MICRO.text, unet=MICRO.unet))
    latents = torch.randn(1, 4, 6, 5)
    torch.testing.assert_close(decode_in_strips(decoder, latents, 4), decoder(latents), rtol=1e-5, atol=2e-5)


@pytest.mark.slow
@LAYOUTS
def test_trained_weights_in_bfloat16(layout):
    decoder = load_models(dtype=torch.bfloat16).decoder.to("cpu").to(memory_format=layout)
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    difference = levels(decoder(latents)) - levels(decode_in_strips(decoder, latents))
    assert difference.abs().max() <= 2


@LAYOUTS
@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 1), (torch.float16, 0.2)])
def test_sixteen_bits_cost_no_more_than_in_the_plain_decoder(layout, dtype, error):
    """Random weights amplify the rounding of every layer in both decoders, so both are compared with float32."""
    latents = torch.randn(1, 4, 12, 12)
    exact = levels(decoder_of(MICRO)(latents))
    decoder, latents = decoder_of(MICRO, layout, dtype), latents.to(dtype)
    plain, ours = (
        (levels(image) - exact).abs().float().mean()
        for image in (decoder(latents), decode_in_strips(decoder, latents, 5))
    )
    assert ours < 1.1 * plain + 0.01
    assert ours < error


def test_the_latents_and_the_weights_are_unchanged():
    decoder, latents = decoder_of(MICRO), torch.randn(1, 4, 4, 4)
    before = latents.clone(), {key: tensor.clone() for key, tensor in decoder.state_dict().items()}
    decode_in_strips(decoder, latents)
    assert torch.equal(before[0], latents)
    assert all(torch.equal(before[1][key], tensor) for key, tensor in decoder.state_dict().items())


class LargestTensor(TorchDispatchMode):
    """The number of elements in the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [out] if isinstance(out, torch.Tensor) else out if isinstance(out, (tuple, list)) else []
        self.numel = max([self.numel, *(x.numel() for x in tensors if isinstance(x, torch.Tensor))])
        return out


@LAYOUTS
def test_the_largest_map_is_never_stored(layout):
    decoder, latents = decoder_of(NARROWING, layout), torch.randn(1, 4, 16, 16).contiguous(memory_format=layout)
    pixels = 128 * 128
    with LargestTensor() as plain:
        decoder(latents)
    assert plain.numel == 16 * pixels
    with LargestTensor() as ours:
        decode_in_strips(decoder, latents, rows=8)
    assert ours.numel == 8 * pixels


@LAYOUTS
@pytest.mark.parametrize("height", [1, 4])
def test_any_rows_of_an_upsampling(layout, height):
    upsample = Upsample(8).to(memory_format=layout)
    x = torch.randn(1, 8, height, 3).contiguous(memory_format=layout)
    expected, lazy = upsample(x), FeatureMap(x, 3, upsample)
    assert (lazy.height, lazy.width) == expected.shape[2:]
    for top in range(2 * height):
        for bottom in range(top + 1, 2 * height + 1):
            torch.testing.assert_close(lazy.read(top, bottom), expected[:, :, top:bottom])
    torch.testing.assert_close(lazy.whole(), expected)
    assert lazy.whole().is_contiguous(memory_format=layout)


@LAYOUTS
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_statistics_do_not_cancel_where_the_mean_is_large(layout, rows):
    norm = nn.GroupNorm(4, 8)
    slope = torch.linspace(0, 3, 64)[:, None]  # every strip has a different mean
    noise = torch.randn(1, 8, 64, 48, generator=torch.Generator().manual_seed(0))
    x = (1000 + torch.arange(8.0)[:, None, None] + slope + noise).contiguous(memory_format=layout)
    mean, variance = strips._statistics(norm, FeatureMap(x, rows))
    groups = x.double().reshape(4, -1)
    expected = groups.mean(1).repeat_interleave(2), groups.var(1, correction=0).repeat_interleave(2)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected[0], rtol=2e-6, atol=0)
    # float32 knows these means to 1e-3; a mean of squares, about 1e6, minus a squared mean would be off by whole units.
    torch.testing.assert_close(variance.double(), expected[1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("rows", [0, -3])
def test_invalid_rows(rows):
    with pytest.raises(ValueError, match=f"rows should be at least 1, not {rows}."):
        decode_in_strips(decoder_of(MICRO), torch.randn(1, 4, 2, 2), rows)


def test_as_a_network():
    """It has the decoder's device, dtype and weights, and works with `functional_call`."""
    decoder, latents = decoder_of(MICRO), torch.randn(1, 4, 4, 4)
    network = InStrips(decoder.half())
    assert device_and_dtype(network) == (torch.device("cpu"), torch.float16)
    wide = {key: tensor.float() for key, tensor in network.state_dict().items()}
    image = torch.func.functional_call(network, wide, latents)
    torch.testing.assert_close(image, decoder.float()(latents), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_needed_if_the_plain_decode_might_not_fit(monkeypatch, dtype, size):
    decoder, latents = decoder_of(NARROWING, dtype=dtype), torch.zeros(3, 4, 10, 20)
    peak = int(strips.MAPS_AT_ONCE * 16 * (80 * 160) * size)  # 16 channels are read at full resolution
    for free, expected in ((peak, False), (peak - 1, True), (0, True), (1 << 40, False)):
        monkeypatch.setattr(strips, "_free_memory", lambda device, free=free: free)
        assert needed(decoder, latents) is expected


def test_large_maps_in_float32_are_always_decoded_in_strips(monkeypatch):
    monkeypatch.setattr(strips, "_free_memory", lambda device: 1 << 40)
    with torch.device("meta"):
        decoder = Decoder(SD15.vae)
    decoder.conv_in = nn.Conv2d(4, 512, 3)  # decides the device and the dtype
    assert needed(decoder, torch.zeros(1, 4, 64, 64))
    assert not needed(decoder, torch.zeros(1, 4, 40, 40))
    decoder.compile(backend="eager")
    assert not needed(decoder, torch.zeros(1, 4, 64, 64))
    decoder._compiled_call_impl = None
    assert needed(decoder, torch.zeros(1, 4, 64, 64))
    assert not needed(decoder.bfloat16(), torch.zeros(1, 4, 64, 64))


def test_needed_if_the_free_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(strips, "_free_memory", lambda device: None)
    decoder = decoder_of(MICRO)
    assert not needed(decoder, torch.zeros(1, 4, 64, 64))
    assert needed(decoder, torch.zeros(1, 4, 512, 512))


def test_free_memory(monkeypatch):
    assert strips._free_memory(torch.device("cpu")) is None or strips._free_memory(torch.device("cpu")) > 1 << 20
    assert strips._free_memory(torch.device("meta")) is None
    cuda = SimpleNamespace(
        mem_get_info=lambda device: (100, 1000), memory_reserved=lambda device: 50, memory_allocated=lambda device: 20
    )
    mps = SimpleNamespace(recommended_max_memory=lambda: 900, current_allocated_memory=lambda: 300)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "mps", mps)
    assert strips._free_memory(torch.device("cuda")) == 130
    assert strips._free_memory(torch.device("mps")) == 600
    monkeypatch.setattr(torch, "mps", SimpleNamespace())
    assert strips._free_memory(torch.device("mps")) is None
    monkeypatch.setattr(strips.Path, "exists", lambda path: False)
    assert strips._free_memory(torch.device("cpu")) is None


MEASURED_DECODE = """
import re, sys
import torch
from pathlib import Path
from sd.images import tensor_to_array
from sd.runtime.decode_in_strips import decode_in_strips
from tests.support.synthetic import FULL_VAE, random_networks

def status(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

layout = getattr(torch, sys.argv[1])
decoder = random_networks(FULL_VAE).decoder.bfloat16().to(memory_format=layout)
latents = torch.randn(1, 4, 128, 128).bfloat16().contiguous(memory_format=layout)
with torch.no_grad():
    decode_in_strips(decoder, latents[:, :, :8, :8])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    image = decode_in_strips(decoder, latents)
    peak = status("VmHWM") - before
    difference = abs(tensor_to_array(decoder(latents)).astype(int) - tensor_to_array(image))
print(peak, difference.max(), (difference > 2).mean())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports and resets the peak memory of a process")
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
def test_a_megapixel_in_a_gigabyte(layout):
    done = subprocess.run([sys.executable, "-c", MEASURED_DECODE, layout], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, largest, visible = map(float, re.fullmatch(r"(\S+) (\S+) (\S+)\n", done.stdout).groups())
    print(
        f"1024x1024, bfloat16, {layout}: {peak / 1e6:.0f} MB beyond the weights; "
        f"against the plain decode, at most {largest:.0f} levels, above 2 in {visible:.3%}"
    )
    assert peak <= 1.0e9
    assert largest <= 8  # of random weights: two plain decodes, one in either layout, differ by 7
    assert visible <= 0.002
