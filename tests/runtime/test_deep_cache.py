"""The U-Net whose deep stages run only at some of the steps."""

from threading import Thread

import pytest
import torch

from sd.runtime.deep_cache import DeepCache
from tests.support.synthetic import MICRO, random_networks


@pytest.fixture(scope="module")
def unet():
    return random_networks(MICRO).diffusion


def test_deep_features_of_the_same_latents_give_the_same_noise(unet):
    inputs = torch.randn(2, 4, 9, 6), torch.randn(2, 77, 32), torch.tensor([500, 500])
    cached, noise = DeepCache(unet, 3), unet(*inputs)
    assert torch.equal(cached(*inputs), noise)
    assert torch.equal(cached(*inputs), noise)  # from the kept map
    cached.deep = torch.zeros_like(cached.deep)
    assert (cached(*inputs) - noise).abs().max() > 1e-2


@pytest.mark.parametrize("interval, deep_calls", [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_a_deep_cache_goes_deep_once_in_so_many_calls(unet, interval, deep_calls):
    cached, went = DeepCache(unet, interval), []
    hook = unet.middle.register_forward_hook(lambda *_: went.append(cached.calls))
    context = torch.randn(1, 77, 32)
    for call in range(6):
        cached(torch.randn(1, 4, 8, 8), context, torch.tensor([900 - 100 * call]))
    hook.remove()
    assert went == deep_calls


def test_a_deep_cache_starts_anew_when_guidance_ends(unet):
    cached, context = DeepCache(unet, 3), torch.randn(2, 77, 32)
    cached(torch.randn(2, 4, 8, 8), context, torch.tensor([500, 500]))
    latents, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([450])
    torch.testing.assert_close(cached(latents, context[1:], timesteps), unet(latents, context[1:], timesteps))


def test_another_thread_that_uses_the_same_unet_is_left_alone(unet):
    inputs = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32), torch.tensor([500])
    alone, shared = DeepCache(unet, 2), DeepCache(unet, 2)
    alone(*inputs)

    def meanwhile(*_):
        hook.remove()  # before the other thread comes here, too
        other = Thread(target=unet, args=(torch.zeros(1, 4, 8, 8), *inputs[1:]))
        other.start()
        other.join()

    hook = unet.conv_out.register_forward_pre_hook(meanwhile)  # after the map was kept
    shared(*inputs)
    assert torch.equal(shared.deep, alone.deep)
