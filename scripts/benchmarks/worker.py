"""Runs one library for the benchmark, in a separate process so that its memory can be measured.

It reads commands from standard input, one JSON list per line, such as ["step"] or ["picture", 20]. For each it prints a
line of JSON: the seconds that it took (Infinity if memory ran out), and the peak memory of the process so far.

    python scripts/benchmarks/worker.py sd bf16 cpu runs/benchmark/sd15.safetensors
    python scripts/benchmarks/worker.py diffusers fp32 cuda runs/benchmark/diffusers
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

if sys.platform != "win32":
    import resource

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROMPT = "a photograph of an astronaut riding a horse"
SIDE = 64  # width and height of the latents; images are eight times as wide and high


class Contestant:
    """What both libraries have in common: the same inputs, and a warm-up."""

    def __init__(self, path: str, device: str, dtype: torch.dtype, compiled: bool):
        self.path, self.device, self.dtype, self.compiled = path, torch.device(device), dtype, compiled
        self.side = SIDE

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)

    def prepare(self, measure: str, *arguments: int) -> None:
        """Warms up a measure: its first run reads weights from the file and chooses kernels.

        Compiled kernels and GPU kernels depend on the size, so there the warm-up has full size. On a CPU a small image
        is enough.
        """
        self.side = SIDE if self.compiled or self.device.type != "cpu" else 8
        for _ in range(3 if self.compiled and self.device.type == "cuda" else 1):  # the second run records CUDA graphs
            getattr(self, measure)(*arguments)
        self.side = SIDE


class Ours(Contestant):
    """This project."""

    def imports(self) -> None:
        import sd.pipeline  # noqa: F401

    def load(self) -> None:
        from sd import load_models

        self.models = load_models(self.path, self.device, self.dtype, compiled=self.compiled)

    def read(self) -> None:
        from sd.pipeline import encode_prompt

        encode_prompt(self.models, PROMPT)

    def step(self) -> None:
        timesteps = torch.tensor(500, device=self.device).expand(2)  # strided as in `generate`, for compiled code
        self.models.diffusion(self.random(2, 4, self.side, self.side), self.random(2, 77, 768), timesteps)

    def encode(self) -> None:
        self.models.encoder(self.random(1, 3, 8 * self.side, 8 * self.side))

    def decode(self) -> None:
        from sd.pipeline import decode_latents

        decode_latents(self.models, self.random(1, 4, self.side, self.side))  # as `generate` does, perhaps in strips

    def picture(self, steps: int = 1, count: int = 1) -> None:
        from sd import generate

        size = {"height": 8 * self.side, "width": 8 * self.side}
        sampling = {"n_inference_steps": steps, "sampler_name": "dpm++2m", "seed": 0}
        generate([PROMPT] * count, models=self.models, **sampling, **size)


class Diffusers(Contestant):
    """diffusers, set up as its documentation recommends: in 16 bits, the networks in channels-last order."""

    def imports(self) -> None:
        from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel  # noqa: F401

    def load(self) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel

        from sd.tokenizer import Tokenizer

        self.tokenizer = Tokenizer()  # ours for both libraries
        parts = {"text": CLIPTextModel, "vae": AutoencoderKL, "unet": UNet2DConditionModel}
        for name, kind in parts.items():
            network = kind.from_pretrained(f"{self.path}/{name}", torch_dtype=self.dtype).to(self.device).eval()
            if self.dtype != torch.float32 and name != "text" and self.device.type != "mps":  # as in ours
                network = network.to(memory_format=torch.channels_last)
            setattr(self, name, network.requires_grad_(False))
        if self.compiled:
            mode = "max-autotune" if self.device.type == "cuda" else None
            options = None if mode else {"freezing": True}
            self.unet = torch.compile(self.unet, mode=mode, options=options, dynamic=False)
            self.vae.decode = torch.compile(self.vae.decode, mode=mode, dynamic=False)

    def read(self) -> torch.Tensor:
        """The context of the negative prompt and of the prompt."""
        return self.text(self.tokenizer(["", PROMPT]).to(self.device))[0]

    def step(self) -> None:
        timesteps = torch.tensor([500, 500], device=self.device)
        self.unet(self.random(2, 4, self.side, self.side), timesteps, self.random(2, 77, 768))

    def encode(self) -> None:
        self.vae.encode(self.random(1, 3, 8 * self.side, 8 * self.side))

    def decode(self) -> None:
        self.vae.decode(self.random(1, 4, self.side, self.side))

    def picture(self, steps: int = 1, count: int = 1) -> None:
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

        schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
        networks = {"vae": self.vae, "text_encoder": self.text, "unet": self.unet}
        unused = {"tokenizer": None, "safety_checker": None, "feature_extractor": None}
        scheduler = DPMSolverMultistepScheduler(**schedule)
        pipeline = StableDiffusionPipeline(**networks, **unused, scheduler=scheduler, requires_safety_checker=False)
        negative, positive = self.read().split(1)
        pipeline.set_progress_bar_config(disable=True)
        pipeline(
            prompt_embeds=positive.expand(count, -1, -1),
            negative_prompt_embeds=negative.expand(count, -1, -1),
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            height=8 * self.side,
            width=8 * self.side,
        )


def gemm(device: torch.device, dtype: torch.dtype, side: int = 4096) -> float:
    """Operations per second in a product of large matrices: an upper limit for every network on this machine."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(device, lambda: a @ b) for _ in range(4))
    return 2 * side**3 / best


def timed(device: torch.device, function) -> float:
    """Seconds that the function takes, including work that it queued on the device."""
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started


def until_memory_ends(job, contestant: Contestant) -> float:
    """Seconds that a job takes, or infinity if memory runs out."""
    from sd.runtime.out_of_memory import OutOfMemory, explain_out_of_memory

    try:
        with explain_out_of_memory():
            return timed(contestant.device, job)
    except OutOfMemory:
        return math.inf


def peak_memory(device: torch.device) -> dict[str, float]:
    """The peak memory of this process so far, in GB: resident, and on a CUDA device."""
    peak = {}
    if sys.platform != "win32":
        unit = 1 if sys.platform == "darwin" else 1024
        peak["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peak


def main() -> None:
    library, dtype, device, path = sys.argv[1:5]
    contestant = {"sd": Ours, "diffusers": Diffusers}[library](path, device, DTYPES[dtype], "compiled" in sys.argv)
    answers = sys.stdout
    sys.stdout = sys.stderr  # keeps what the libraries print out of the answers
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        with torch.no_grad():
            if command == "gemm":
                answer = {"rate": gemm(contestant.device, contestant.dtype)}
            elif command == "imports":  # the first command, so that nothing is imported yet
                answer = {"seconds": timed(contestant.device, contestant.imports)}
            else:
                answer = {"seconds": until_memory_ends(partial(getattr(contestant, command), *arguments), contestant)}
        print(json.dumps(answer | peak_memory(contestant.device)), file=answers, flush=True)


if __name__ == "__main__":
    main()
