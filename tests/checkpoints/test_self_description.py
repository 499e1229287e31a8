"""What a file says of its prediction type, image size and noise schedule counts, wherever it says it."""

import pytest
import torch
from safetensors.torch import save_file

from sd.checkpoints.self_description import described, yaml_beside
from sd.checkpoints.whole_model import read_model
from sd.config import SD15
from sd.model_converter import compvis_shapes

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
YAML = """model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: {}
    linear_start: 0.00085
"""


def said(keys=(), metadata=None, yaml=""):
    config = described(SD15, keys, metadata, yaml)
    return config.schedule.prediction_type, config.schedule.rescale_betas_zero_snr, config.image_size


def test_a_file_that_says_nothing():
    assert described(SD15, [FIRST], {"format": "pt"}, "model:\n  params: {}\n") == SD15


@pytest.mark.parametrize(
    "keys, expected",
    [
        (["v_pred"], ("v_prediction", False, 512)),
        (["v_pred", "ztsnr"], ("v_prediction", True, 512)),
        (["ztsnr"], ("v_prediction", True, 512)),
    ],
)
def test_marks_among_the_tensors(keys, expected):
    assert said([FIRST, *keys]) == expected


@pytest.mark.parametrize(
    "metadata, prediction, size",
    [
        ({"modelspec.prediction_type": "v", "modelspec.resolution": "768x768"}, "v_prediction", 768),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon", 512),
        ({"modelspec.prediction_type": "V-Prediction"}, "v_prediction", 512),
        ({"modelspec.predict_key": "v"}, "v_prediction", 512),  # ComfyUI
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", 512),
        ({"modelspec.architecture": "stable-diffusion-v1"}, "epsilon", 512),
        ({"modelspec.resolution": "640 x 640"}, "epsilon", 640),
        ({"modelspec.resolution": "768x512"}, "epsilon", 512),  # not square
        ({"modelspec.resolution": "516x516"}, "epsilon", 512),  # no multiple of 8
        ({"modelspec.resolution": "9992x9992"}, "epsilon", 512),
        ({"modelspec.resolution": "0000x0000"}, "epsilon", 512),
        ({"modelspec.resolution": "large"}, "epsilon", 512),
    ],
)
def test_metadata(metadata, prediction, size):
    assert said(metadata=metadata) == (prediction, False, size)


@pytest.mark.parametrize(
    "line, prediction",
    [
        ("v", "v_prediction"),
        ('"v"', "v_prediction"),
        ("'v'   # not noise", "v_prediction"),
        ("eps", "epsilon"),
    ],
)
def test_a_yaml(line, prediction):
    assert said(yaml=YAML.format(line))[0] == prediction
    assert said(yaml=YAML.format(line).replace("\n", "\r\n"))[0] == prediction


@pytest.mark.parametrize(
    "line", ["# parameterization: v", "other_parameterization: v", "note: parameterization: v", "v"]
)
def test_lines_of_a_yaml_that_say_nothing(line):
    assert said(yaml=f"model:\n  {line}\n")[0] == "epsilon"


def test_the_mark_comes_first_then_metadata_then_the_yaml():
    noise = {"modelspec.prediction_type": "epsilon"}
    assert said(["v_pred"], noise)[0] == "v_prediction"
    assert said([], noise, YAML.format("v"))[0] == "epsilon"


def test_an_unknown_prediction_is_named():
    with pytest.warns(UserWarning, match="says that its U-Net predicts 'x0'; only epsilon and v are supported"):
        assert said(yaml=YAML.format("x0"))[0] == "epsilon"


def test_the_yaml_of_the_same_name_is_read(tmp_path):
    (tmp_path / "model.yaml").write_text(YAML.format("v"), encoding="utf-8-sig")
    (tmp_path / "other.yaml").write_bytes(b"\xff\xfe\0")
    assert "parameterization: v" in yaml_beside(tmp_path / "model.safetensors")
    assert "parameterization: v" in yaml_beside(tmp_path / "model.ckpt")
    assert "parameterization" not in yaml_beside(tmp_path / "other.ckpt")
    assert yaml_beside(tmp_path / "absent.ckpt") == ""
    assert yaml_beside(tmp_path / "model.yaml") == ""


def test_whole_files(tmp_path):
    """From the file to the configuration; what the caller says comes before what the file says."""
    shapes = compvis_shapes(SD15)
    zeros = torch.zeros(max(shape.numel() for shape in shapes.values()), dtype=torch.float16)
    state = {key: zeros[: shape.numel()].view(shape) for key, shape in shapes.items()}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}}, path)
    _, config = read_model(path)
    assert config.schedule.prediction_type == "v_prediction"
    assert config.schedule.rescale_betas_zero_snr
    with pytest.warns(UserWarning, match="prediction_type should be v_prediction"):
        assert read_model(path, prediction_type="epsilon")[1].schedule.prediction_type == "epsilon"

    torch.save({"state_dict": state}, path)
    assert read_model(path)[1] == SD15
    (tmp_path / "model.yaml").write_text(YAML.format("v"))
    assert read_model(path)[1].schedule.prediction_type == "v_prediction"

    few = {FIRST: torch.zeros(320, 4, 3, 3), "cond_stage_model.transformer.text_model.x": torch.zeros(1)}
    metadata = {"modelspec.prediction_type": "v", "modelspec.resolution": "768x768"}
    save_file(few, tmp_path / "few.safetensors", metadata=metadata)
    _, config = read_model(tmp_path / "few.safetensors")
    assert (config.schedule.prediction_type, config.image_size) == ("v_prediction", 768)
