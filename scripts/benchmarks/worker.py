"""Runs one library for the benchmark, in a separate process so that its memory can be measured.

It reads commands from standard input, one JSON list per line, such as ["step"] or ["picture", 20]. For each it prints a
line of JSON: the seconds that it took (Infinity if memory ran out), and the peak memory of the process so far.

    python scripts/benchmarks/worker.py sd bf16 cpu runs/benchmark/sd15.safetensors
    python scripts/benchmarks/worker.py diffusers fp32 cuda runs/benchmark/sd15.safetensors compiled
"""

from __future__ import annotations

import json
import math
import os
import sys
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from scripts.benchmarks.contestants import Contestant, Copies, Diffusers, OpenVINO, Ours
from scripts.benchmarks.few_steps import FewSteps
from scripts.benchmarks.timing import gemm, timed

if sys.platform != "win32":
    import resource

LIBRARIES = {"sd": Ours, "diffusers": Diffusers, "openvino": OpenVINO, "copies": Copies, "few": FewSteps}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
    contestant = LIBRARIES[library](path, device, DTYPES[dtype], "compiled" in sys.argv)
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
