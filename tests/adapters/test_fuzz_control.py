"""Thousands of damaged ControlNets, tiny autoencoders and config.json files: each loads, or is refused clearly.

`--slow` reads 5,000 of each. `FUZZ_FIRST=5000` continues with new ones.
"""

import json
import os
import random
import subprocess
import sys

import pytest

from sd.adapters.controlnet_files import load_controlnet
from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.files import write_checkpoint
from tests import ROOT
from tests.support.control import cldm_state, diffusers_config, diffusers_name, random_controlnet
from tests.support.mutations import NUMBERS, VALUES
from tests.support.synthetic import MICRO, random_models

FIRST = int(os.environ.get("FUZZ_FIRST", 0))


@pytest.mark.parametrize("controls, tiny", [(8, 4), pytest.param(5000, 5000, marks=pytest.mark.slow)])
def test_hostile_files_load_or_are_refused(tmp_path, controls, tiny):
    arguments = [str(tmp_path), str(FIRST), f"controls={controls}", f"tiny={tiny}"]
    command = [sys.executable, "-m", "tests.support.adapter_fuzzer", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr  # a crash, or a hang of a minute
    report = json.loads(result.stdout)
    print(report)
    assert report["wrong"] == {}
    assert sum(report["outcomes"].values()) == controls + tiny
    assert set(report["outcomes"]) == {"controls loaded", "controls refused", "tiny loaded", "tiny refused"}
    assert report["slowest"][0] < 2
    assert report["memory"] < 1 << 30


@pytest.mark.parametrize("count", [15, pytest.param(5000, marks=pytest.mark.slow)])
def test_hostile_configurations_load_or_are_refused(tmp_path, count):
    net, models, rng = random_controlnet(MICRO.unet), random_models(MICRO), random.Random(FIRST)
    state = {diffusers_name(key): tensor for key, tensor in cldm_state(net, "").items()}
    write_checkpoint(tmp_path / "diffusion_pytorch_model.safetensors", state)
    config = diffusers_config(MICRO.unet, sample_size=64, global_pool_conditions=False)
    messages = []
    for _ in range(count):
        changed = dict(config)
        for _ in range(rng.choice([1, 1, 3])):
            value = rng.choice([*VALUES, *NUMBERS, [rng.choice(NUMBERS)], [8] * rng.choice([1, 4, 9000]), ["x"] * 4])
            changed[rng.choice(list(config))] = value
        (tmp_path / "config.json").write_text(json.dumps(changed), encoding="utf-8", errors="surrogatepass")
        try:
            load_controlnet(tmp_path, models)
        except CheckpointError as error:
            messages.append(str(error))
    assert 0 < len(messages) < count
    for message in messages:
        assert message.startswith("control: ")
        assert "\n" not in message or "does not fit the network" in message
