"""The libraries that the benchmark compares, each as a class with the same methods: load, step, decode, picture, ...

`worker.py` runs one of them in a separate process.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

PROMPT = "a photograph of an astronaut riding a horse"
SIDE = 64  # width and height of the latents; images are eight times as wide and high


class Contestant:
    """What all have in common: the same inputs, and a warm-up."""

    any_size = True  # whether its networks take inputs of any size

    def __init__(self, path: str, device: str, dtype: torch.dtype, compiled: bool = False):
        self.path, self.device, self.dtype, self.compiled = path, torch.device(device), dtype, compiled
        self.side = SIDE
        self.random = cache(self.random)  # a GPU should not wait for random numbers while it is timed

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)

    def prepare(self, measure: str, *arguments: int | str) -> None:
        """Warms up a measure: its first run reads weights from the file and chooses kernels.

        Compiled kernels and GPU kernels depend on the size, so there the warm-up has full size. On a CPU a small image
        is enough.
        """
        self.side = 8 if self.any_size and not self.compiled and self.device.type == "cpu" else SIDE
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

    def step(self) -> Tensor:
        timesteps = torch.tensor(500, device=self.device).expand(2)  # strided as in `generate`, for compiled code
        context = self.random(2, 77, self.models.config.unet.context_width)
        return self.models.diffusion(self.random(2, 4, self.side, self.side), context, timesteps)

    def encode(self) -> None:
        self.models.encoder(self.random(1, 3, 8 * self.side, 8 * self.side))

    def decode(self) -> object:
        from sd.pipeline import decode_latents

        return decode_latents(self.models, self.random(1, 4, self.side, self.side))  # as `generate`, perhaps in strips

    def picture(self, steps: int = 1, count: int = 1) -> None:
        from sd import generate

        size = {"height": 8 * self.side, "width": 8 * self.side}
        sampling = {"n_inference_steps": steps, "sampler_name": "dpm++2m", "seed": 0}
        generate([PROMPT] * count, models=self.models, **sampling, **size)


class OpenVINO(Ours):
    """OpenVINO, on a CPU: its compiler and kernels for our U-Net and decoder. All else is this project's."""

    any_size = False  # its kernels are compiled for one size

    def imports(self) -> None:
        import openvino  # noqa: F401

        super().imports()

    def random(self, *shape: int) -> Tensor:
        return super().random(*shape).float()  # what goes in and out is float32, whatever it computes in

    def load(self, folder: str) -> None:
        """`folder` has what `openvino_networks.py` wrote."""
        from sd import load_models

        models = load_models(self.path, "cpu", torch.float32)
        latents, context = [SIDE, SIDE], [77, models.config.unet.context_width]
        unet = self._compile(Path(folder) / "unet.xml", [[2, 4, *latents], [2, *context], [2]])
        self.models = replace(
            models, diffusion=unet, decoder=self._compile(Path(folder) / "decoder.xml", [[1, 4, *latents]])
        )

    def _compile(self, file: Path, shapes: list[list[int]]) -> nn.Module:
        import openvino

        core = openvino.Core()
        network = core.read_model(file)
        network.reshape(dict(enumerate(shapes)))
        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[self.dtype]
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        return InOpenVINO(
            core.compile_model(network, "CPU", {**hints, "INFERENCE_NUM_THREADS": torch.get_num_threads()})
        )


class InOpenVINO(nn.Module):
    """A network that OpenVINO has compiled, with tensors in and out."""

    def __init__(self, compiled: object):
        super().__init__()
        self.compiled = compiled
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # says on which device it is, and in what dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        """The inputs and the output of the network that was converted, in float32."""
        return torch.from_numpy(self.compiled([x.contiguous().numpy() for x in inputs])[0])


class Copies(Contestant):
    """Copies all weights of a file into the dtype, one after the other, and does nothing else: a limit for loading."""

    def imports(self) -> None:
        import sd.checkpoints.files  # noqa: F401

    def load(self) -> None:
        from sd.checkpoints.files import read_state_dict

        self.weights = [tensor.to(self.dtype) for tensor in read_state_dict(self.path).values()]


class Diffusers(Contestant):
    """diffusers, set up as its documentation recommends: in 16 bits, the networks in channels-last order."""

    def imports(self) -> None:
        from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel  # noqa: F401

    def load(self, folder: str) -> None:
        """`folder` has what `reference_networks.py` wrote."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel

        from sd.tokenizer import Tokenizer

        self.tokenizer = Tokenizer()  # ours for both libraries
        parts = {"text": CLIPTextModel, "vae": AutoencoderKL, "unet": UNet2DConditionModel}
        for name, kind in parts.items():
            network = kind.from_pretrained(f"{folder}/{name}", torch_dtype=self.dtype).to(self.device).eval()
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
        self.unet(
            self.random(2, 4, self.side, self.side), timesteps, self.random(2, 77, self.unet.config.cross_attention_dim)
        )

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
