"""The samplers by name: what `sampler_name` and `--sampler` may be."""

from sd.ddim import DDIMSampler
from sd.ddpm import DDPMSampler
from sd.dpm_solver import DPMSolverKarrasSampler, DPMSolverSampler
from sd.dpm_solver_sde import DPMSolverSDEKarrasSampler, DPMSolverSDESampler
from sd.euler import EulerKarrasSampler, EulerSampler
from sd.euler_a import EulerAncestralSampler
from sd.heun import HeunKarrasSampler, HeunSampler
from sd.lms import LMSKarrasSampler, LMSSampler
from sd.plms import PLMSSampler
from sd.sampler import Sampler

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
