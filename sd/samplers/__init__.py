"""The samplers by name: the values of `sampler_name` and `--sampler`. A new one needs a class, and a line here."""

from sd.ddpm import DDPMSampler
from sd.sampler import Sampler, at_karras_levels
from sd.samplers.ddim import DDIMSampler
from sd.samplers.dpm_solver import DPMSolverSampler, DPMSolverSDESampler
from sd.samplers.euler import EulerAncestralSampler, EulerSampler
from sd.samplers.heun import HeunSampler
from sd.samplers.lcm import LCMSampler
from sd.samplers.lms import LMSSampler
from sd.samplers.plms import PLMSSampler
from sd.samplers.tcd import TCDSampler

SAMPLERS: dict[str, type[Sampler]] = {
    "ddpm": DDPMSampler,
    "ddim": DDIMSampler,
    "plms": PLMSSampler,
    "lms": LMSSampler,
    "lms_karras": at_karras_levels(LMSSampler),
    "euler": EulerSampler,
    "euler_karras": at_karras_levels(EulerSampler),
    "euler_a": EulerAncestralSampler,
    "heun": HeunSampler,
    "heun_karras": at_karras_levels(HeunSampler),
    "dpm++2m": DPMSolverSampler,
    "dpm++2m_karras": at_karras_levels(DPMSolverSampler),
    "dpm++2m_sde": DPMSolverSDESampler,
    "dpm++2m_sde_karras": at_karras_levels(DPMSolverSDESampler),
    "lcm": LCMSampler,
    "tcd": TCDSampler,
}
