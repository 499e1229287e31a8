"""The samplers by name: what `sampler_name` and `--sampler` may be."""

from sd.ddpm import DDPMSampler
from sd.sampler import Sampler
from sd.samplers.ddim import DDIMSampler
from sd.samplers.dpm_solver import (
    DPMSolverKarrasSampler,
    DPMSolverSampler,
    DPMSolverSDEKarrasSampler,
    DPMSolverSDESampler,
)
from sd.samplers.euler import EulerKarrasSampler, EulerSampler
from sd.samplers.euler_ancestral import EulerAncestralSampler
from sd.samplers.heun import HeunKarrasSampler, HeunSampler
from sd.samplers.lms import LMSKarrasSampler, LMSSampler
from sd.samplers.plms import PLMSSampler

SAMPLERS: dict[str, type[Sampler]] = {
    "ddpm": DDPMSampler,
    "ddim": DDIMSampler,
    "plms": PLMSSampler,
    "lms": LMSSampler,
    "lms_karras": LMSKarrasSampler,
    "euler": EulerSampler,
    "euler_karras": EulerKarrasSampler,
    "euler_a": EulerAncestralSampler,
    "heun": HeunSampler,
    "heun_karras": HeunKarrasSampler,
    "dpm++2m": DPMSolverSampler,
    "dpm++2m_karras": DPMSolverKarrasSampler,
    "dpm++2m_sde": DPMSolverSDESampler,
    "dpm++2m_sde_karras": DPMSolverSDEKarrasSampler,
}
