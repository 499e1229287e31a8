"""The linear multistep method."""

import pytest
import torch

from sd.sampler import at_karras_levels
from sd.samplers.euler import EulerSampler
from sd.samplers.lms import LMSSampler, lms_weights
from sd.samplers.plms import ADAMS_BASHFORTH
from tests.support.gaussian import order_of_convergence

TIMESTEPS = [999, 927.6429, 856.2857, 784.9286, 713.5714, 642.2143, 570.8571, 499.5, 428.1429, 356.7857, 285.4286]
TIMESTEPS += [214.0714, 142.7143, 71.3571, 0]
SIGMAS = [14.6146, 9.6826, 6.6780, 4.7746, 3.5221, 2.6666, 2.0606, 1.6156, 1.2768, 1.0097, 0.7913, 0.6056, 0.4397]
SIGMAS += [0.2780, 0.0292, 0]


def test_timesteps_and_sigmas_are_the_published_ones():
    sampler = LMSSampler()
    sampler.set_inference_timesteps(15)
    assert sampler.timesteps.tolist() == pytest.approx(TIMESTEPS, abs=1e-4)
    assert sampler.sigmas.tolist() == pytest.approx(SIGMAS, abs=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_for_even_steps_are_adams_and_bashforths(order):
    assert lms_weights([float(-j) for j in range(order)], 1.0) == pytest.approx(ADAMS_BASHFORTH[order - 1])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_integrate_polynomials_exactly(order):
    """Slopes d = p sigma^(p - 1), one order after the other, on steps of the lengths that samplers take."""
    sigmas, sigma_next = [3.5221, 4.7746, 6.6780, 9.6826][:order], 2.6666
    weights = lms_weights(sigmas, sigma_next)
    for p in range(1, order + 1):
        slopes = [p * sigma ** (p - 1) for sigma in sigmas]
        expected = sigma_next**p - sigmas[0] ** p
        assert sum(w * d for w, d in zip(weights, slopes)) == pytest.approx(expected)


def test_the_default_order_is_4():
    sampler = LMSSampler()
    for t in sampler.timesteps[:6]:
        sampler.step(t, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2))
    assert sampler.order == len(sampler.history) == 4


def test_order_1_is_euler():
    lms, euler = LMSSampler(order=1), EulerSampler()
    ours = theirs = torch.randn(1, 4, 8, 8)
    for t in lms.timesteps:
        ours, theirs = lms.step(t, ours, ours.tanh()), euler.step(t, theirs, theirs.tanh())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_of_convergence(order):
    assert order_of_convergence(at_karras_levels(LMSSampler)(order=order), 40) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("order", [0, 5, 2.5, None])
def test_bad_order(order):
    with pytest.raises(ValueError, match="order should be 1, 2, 3 or 4, not"):
        LMSSampler(order=order)
