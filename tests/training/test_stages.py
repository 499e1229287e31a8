"""The stages on a very small model: they learn, resume with the same losses, and end in a checkpoint."""

import json
import math
import shutil
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import sd
from scripts import evaluate_tiny, train_tiny
from sd.checkpoints.files import write_checkpoint
from sd.clip import CLIP
from sd.config import PREDICTION_TYPES
from sd.decoder import Decoder
from sd.encoder import Encoder
from sd.tokenizer import Tokenizer
from sd.training import evaluation, stages, text
from sd.training.data import CaptionedImages, load_scenes
from sd.training.diffusion import DiffusionStage
from sd.training.loop import Training, TrainingError, load_state
from sd.training.stages import TrainingRun
from sd.training.text import TextStage, end_states, pick_captions, retrieval, shrink, silence_unknown_tokens, tokenise
from sd.training.vae import VAEStage, encode_all, normalise_latents, psnr
from tests.support.synthetic import FEW_LAYERS, random_state

CPU = torch.device("cpu")
SMALL = FEW_LAYERS  # its latents are scaled by 0.5, so a stage that forgets the factor fails


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return load_scenes(tmp_path_factory.mktemp("scenes"), 32, 64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which each stage was trained for three steps."""
    out = tmp_path_factory.mktemp("trained")
    run = TrainingRun(out, scenes=40, device="cpu", config=SMALL)
    for name in train_tiny.SHARES:
        run.train(name, minutes=1, steps=3)
    run.write_checkpoint()
    return out


def train_vae(folder, pictures, stop_after=None):
    """The losses of fourteen steps of the autoencoder, or of fewer with `stop_after`."""
    torch.manual_seed(0)
    stage = VAEStage(SMALL.vae, pictures, batch_size=8, crop=32)
    training, losses = Training(stage, folder, CPU, 1.0, 14, seed=1), []

    def pause():
        if len(losses) == stop_after:
            raise KeyboardInterrupt

    try:
        training.run(lambda progress: losses.append(progress.loss), 0.0, pause)
    except KeyboardInterrupt:
        assert len(losses) == stop_after
    return losses


def test_the_autoencoder_learns_and_resumes_to_the_same_losses(tmp_path, pictures):
    whole = train_vae(tmp_path / "whole", pictures)
    assert np.mean(whole[-3:]) < 0.9 * np.mean(whole[:3])
    halves = train_vae(tmp_path / "halves", pictures, stop_after=6) + train_vae(tmp_path / "halves", pictures)
    assert halves == pytest.approx(whole, rel=1e-5)


def test_the_stages_end_in_a_checkpoint_that_makes_pictures(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"vae.png", "decoder.png", "diffusion.png", "tiny.ckpt"} <= names
    models = sd.load_models(trained / "tiny.ckpt", "cpu", torch.float32)
    assert models.config == SMALL
    assert sd.generate("a red house", models=models, n_inference_steps=2, seed=0).shape == (64, 64, 3)


def test_the_checkpoint_is_in_half_precision(trained):
    state = sd.checkpoints.files.read_state_dict(trained / "tiny.ckpt")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16, torch.int64}
    assert "model.diffusion_model.time_embed.0.weight" in state


def test_its_decoder_is_that_of_the_last_stage(trained):
    state = sd.checkpoints.files.read_state_dict(trained / "tiny.ckpt")
    first, last = (load_state(trained / f"{name}.state")["average"] for name in ("vae", "decoder"))
    for name in ("conv_in.weight", "conv_out.weight"):
        assert torch.equal(state[f"first_stage_model.decoder.{name}"], last[f"decoder.{name}"].half())
        assert not torch.equal(first[f"decoder.{name}"], last[f"decoder.{name}"])


def test_its_embeddings_of_unknown_words_are_zero(trained):
    embedding = sd.load_models(trained / "tiny.ckpt", "cpu", torch.float32).clip.token_embedding.weight
    red, zebra = (Tokenizer().encode(word)[0] for word in ("red", "zebra"))
    assert embedding[red].abs().sum() > 0
    assert embedding[zebra].abs().sum() == 0


def test_its_latents_have_unit_variance(trained, pictures):
    models = sd.load_models(trained / "tiny.ckpt", "cpu", torch.float32)
    latents = models.encoder(pictures.batch(torch.arange(len(pictures))))
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.2
    assert latents.std(dim=(0, 2, 3)) == pytest.approx(torch.ones(4), abs=0.2)


def test_normalised_latents_decode_to_the_same_picture():
    torch.manual_seed(0)
    encoder, decoder, image = Encoder(SMALL.vae), Decoder(SMALL.vae), torch.randn(1, 3, 64, 64)
    mean, std = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([2.0, 0.5, 3.0, 1.0])
    with torch.no_grad():
        before, (_, log_variance) = encoder(image), encoder.moments(image)
        expected = decoder(before)
        normalise_latents(encoder, decoder, mean, std)
        after, (_, narrowed) = encoder(image), encoder.moments(image)
        torch.testing.assert_close(after, (before - mean[:, None, None]) / std[:, None, None], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(narrowed, log_variance - 2 * std.log()[:, None, None], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decoder(after), expected, rtol=1e-3, atol=1e-3)


def test_latents_to_train_on_are_those_that_the_pipeline_makes(pictures):
    torch.manual_seed(0)
    encoder = Encoder(SMALL.vae)
    images, one = pictures.batch(torch.arange(2)), torch.ones(2, 4, 8, 8)
    means, stds = encode_all(encoder, CaptionedImages(pictures.pixels[:2], pictures.captions[:2]), CPU)
    with torch.no_grad():
        torch.testing.assert_close(means.float(), encoder(images), rtol=0.02, atol=0.02)
        torch.testing.assert_close((means + stds).float(), encoder(images, one), rtol=0.02, atol=0.02)


def test_psnr():
    image = torch.zeros(2, 3, 4, 4)
    other = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 2.0)])
    assert psnr(image, other).tolist() == pytest.approx([20.0, 0.0], abs=1e-4)


def test_the_end_state_does_not_depend_on_the_padding():
    torch.manual_seed(0)
    clip, tokens = CLIP(SMALL.text), Tokenizer()(["a red house", "night"])
    states = end_states(clip, tokens)
    assert torch.allclose(states[1], clip(tokens)[1, 2], atol=1e-5)  # start, "night", end
    longer = tokens.clone()
    longer[1, 3:] = 320
    longer[1, 10] = 49407
    assert torch.allclose(states[1], end_states(clip, longer)[1], atol=1e-5)


def test_embeddings_of_unknown_words_are_zeroed():
    clip, tokenizer = CLIP(SMALL.text), Tokenizer()
    silence_unknown_tokens(clip, [tokenizer(["a red house"]).int()])
    known = tokenizer.encode("red")[0]
    assert clip.token_embedding.weight[known].abs().sum() > 0
    assert clip.token_embedding.weight[tokenizer.encode("zebra")[0]].abs().sum() == 0


def test_every_caption_of_a_picture_is_picked(pictures):
    tokens = tokenise(pictures, Tokenizer())
    indices = torch.zeros(200, dtype=torch.long)
    picked = pick_captions(tokens, indices, torch.Generator().manual_seed(0))
    assert len(picked.unique(dim=0)) == len(tokens[0].unique(dim=0))


def test_shrunk_pictures(pictures):
    small = shrink(pictures, side=16)
    assert small.shape == (32, 3, 16, 16)
    assert small.float().mean() == pytest.approx(pictures.pixels.mean(), abs=1)


def test_pictures_on_apple_gpus_are_shrunk_on_the_cpu(monkeypatch):
    """torch 2.4 has no antialiasing on MPS. The result is moved back to the device."""
    images = Mock(device=torch.device("mps"))
    interpolate = Mock()
    monkeypatch.setattr(text.F, "interpolate", interpolate)
    small = text.resize(images, 16)
    assert interpolate.call_args.args == (images.cpu(),)
    interpolate().to.assert_called_once_with(images.device)
    assert small is interpolate().to()


def test_retrieval_is_the_share_of_pictures_matched_with_their_caption():
    assert retrieval(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]) == 0.5


def test_a_stage_names_the_missing_stage(tmp_path):
    with pytest.raises(TrainingError, match="train stage text first"):
        TrainingRun(tmp_path, scenes=12, device="cpu", config=SMALL).train("diffusion", 1, 1)


def test_training_on_your_own_folder(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(10):
        Image.new("RGB", (80, 60), (25 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red number {i}", encoding="utf-8")
    run = TrainingRun(tmp_path / "out", folder, device="cpu", config=SMALL)
    run.train("text", minutes=1, steps=2)
    assert run.clip(Tokenizer()(["red"])).isfinite().all()


@pytest.mark.slow
def test_captions_of_strangers_train_and_are_sampled(tmp_path, caplog, recwarn):
    """Brackets without their pair, line ends in JSON, and more tokens than fit, which is one line in the log."""
    captions = ["a (cat :)", "[dog", "two\nlines", "a " * 80, "a b " * 60, "(bad:1.2.3)", "a | b", "{", "猫", "x"]
    with open(tmp_path / "captions.jsonl", "w") as file:
        for i, caption in enumerate(captions):
            Image.new("RGB", (64, 64), (25 * i, 0, 0)).save(tmp_path / f"{i}.png")
            file.write(json.dumps({"file": f"{i}.png", "caption": [caption, caption + "!"]}) + "\n")
    run = TrainingRun(tmp_path / "out", tmp_path, device="cpu", config=SMALL)
    run.test_set.captions = run.test_set.captions + run.train_set.captions
    run.test_set.pixels = np.concatenate([run.test_set.pixels, run.train_set.pixels])
    for name in ("vae", "text", "diffusion"):
        run.train(name, minutes=1, steps=1)
    lines = (tmp_path / "out/diffusion.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10
    assert "two lines!" in lines
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert messages == [f"4 of {n} captions have more than 75 tokens: their ends are not used." for n in (18, 20)]
    assert [str(w.message) for w in recwarn if "tokens fit" in str(w.message)] == []


def test_the_names_in_a_text_state_stay_those_of_earlier_versions(trained):
    names = {name.partition(".")[0] for name in load_state(trained / "text.state")["average"]}
    assert names == {"pictures", "captions", "log_scale"}


@pytest.mark.parametrize(
    "minutes, images, on_cpu, more, enough",
    [(3, 36, True, 1, False), (96, 20000, True, 19, True), (3, 20000, False, 1, True), (44, 1500, True, 4, False)],
)
def test_what_to_expect_is_said_before_training(minutes, images, on_cpu, more, enough):
    text = train_tiny.forecast(minutes, images, on_cpu)
    assert text.startswith(
        f"Training takes about {minutes} minutes, and encoding images and drawing samples about {more}"
    )
    assert ("give noise" in text) != enough


def test_the_forecast_is_for_new_runs_of_all_stages(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(TrainingRun, "train", lambda *_: None)
    said = []
    for more in (["all"], ["vae"], ["all", "--steps", "3"], ["all"]):
        caplog.clear()
        arguments = ["--scenes", "12", "--minutes", "3", "--device", "cpu", "--out", str(tmp_path)]
        assert train_tiny.main([*more, *arguments]) == 0
        said.append("about 3 minutes" in caplog.text)
        if len(said) == 3:  # as if it had begun
            (tmp_path / "latents.state").write_bytes(b"")
    assert said == [True, False, False, False]


def further(out, trained, name="diffusion", steps=2):
    """A run that starts from the finished checkpoint, after some steps."""
    run = TrainingRun(out, scenes=40, device="cpu", start=trained / "tiny.ckpt")
    run.train(name, minutes=1, steps=steps)
    return run


@pytest.mark.slow
def test_further_training_changes_only_the_unet(tmp_path, trained):
    path = further(tmp_path, trained).write_checkpoint()
    before, after = (sd.checkpoints.files.read_state_dict(file) for file in (trained / "tiny.ckpt", path))
    assert before.keys() == after.keys()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"model"}
    assert sd.load_models(path, "cpu").config == SMALL


@pytest.mark.slow
def test_further_training_starts_with_the_weights_of_the_model(tmp_path, trained):
    run = TrainingRun(tmp_path, scenes=40, device="cpu", start=trained / "tiny.ckpt")
    assert run.train_set.pixels.shape[1:3] == (64, 64)  # the size of this model, not the 128 of the tiny model
    stage, known = run._stage("diffusion"), sd.load_models(trained / "tiny.ckpt", "cpu", torch.float32)
    for name, tensor in known.diffusion.state_dict().items():
        assert torch.equal(stage.networks["diffusion"].state_dict()[name], tensor)
    assert stage.learning_rate < DiffusionStage.learning_rate


def test_text_encoder_and_decoder_can_be_trained_further(tmp_path, trained):
    known = sd.load_models(trained / "tiny.ckpt", "cpu", torch.float32).clip.state_dict()
    run = TrainingRun(tmp_path, scenes=40, device="cpu", start=trained / "tiny.ckpt")
    stage = run._stage("text")
    for name, tensor in stage.networks["captions"].clip.state_dict().items():
        assert torch.equal(tensor, known[name])
    assert stage.learning_rate < TextStage.learning_rate

    for name in ("text", "diffusion", "decoder"):
        run.train(name, minutes=1, steps=2)
    path = run.write_checkpoint()
    before, after = (sd.checkpoints.files.read_state_dict(file) for file in (trained / "tiny.ckpt", path))
    changed = {".".join(key.split(".")[:2]) for key in before if not torch.equal(before[key], after[key])}
    decoder = {"first_stage_model.decoder", "first_stage_model.post_quant_conv"}
    assert changed == {"cond_stage_model.transformer", "model.diffusion_model"} | decoder
    embeddings = [sd.load_models(file, "cpu").clip.token_embedding.weight for file in (trained / "tiny.ckpt", path)]
    assert torch.equal(*[(rows == 0).all(dim=1) for rows in embeddings])  # unknown words stay unknown


def test_the_encoder_cannot_be_trained_further(tmp_path, trained):
    with pytest.raises(TrainingError, match="the stage should be text, diffusion or decoder, not vae"):
        further(tmp_path, trained, "vae")


def test_a_handful_of_pictures_is_too_few(tmp_path):
    with pytest.raises(TrainingError, match="The number of training images should be at least 8, not 3"):
        TrainingRun(tmp_path, scenes=3, device="cpu", config=SMALL)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["vae", "--folder", "{tmp}/nowhere"], "There is no folder"),
        (["diffusion", "--scenes", "12"], "train stage text first"),
        (["diffusion", "--start", "{tmp}/nothing.ckpt"], "There is no checkpoint"),
        (["diffusion", "--start", "{tmp}/file"], "is a text file; give a .ckpt or .safetensors file"),
        (["vae", "--device", "tpu"], "device should be one that torch can use here"),
        (["vae", "--out", "{tmp}/file", "--scenes", "12"], "cannot be created: it or a parent of it is a file"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert train_tiny.main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train_tiny.py: ")
    assert message in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["unet"],
        ["vae", "--minutes", "0"],
        ["vae", "--steps", "-1"],
        ["vae", "--start", "tiny.ckpt"],
        ["diffusion", "--start", "tiny.ckpt", "--prediction-type", "epsilon"],
        ["all", "--prediction-type", "x"],
    ],
)
def test_bad_options_exit_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        train_tiny.main(arguments)
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_are_loaded_only_if_the_model_was_trained_with_them(trained, tmp_path, dtype):
    models = sd.load_models(trained / "tiny.ckpt", "cpu", dtype)
    encoders = evaluation.load_encoders(trained / "text.state", models)
    pictures = torch.zeros(4, 3, 64, 64)
    assert 0 <= evaluation.second_opinion(encoders, models.tokenizer, pictures, ["a red house"] * 4) <= 1
    assert evaluation.load_encoders(tmp_path / "text.state", models) is None
    write_checkpoint(tmp_path / "other.ckpt", random_state(SMALL), SMALL.to_dict())
    other = sd.load_models(tmp_path / "other.ckpt", "cpu", dtype)
    assert evaluation.load_encoders(trained / "text.state", other) is None


@pytest.mark.slow
def test_a_model_is_evaluated_with_its_own_sampling_settings(trained, tmp_path, monkeypatch, capsys):
    for name, count in {"JUDGE_PICTURES": 64, "TEST_PICTURES": 8, "TEST_SCENES": 8}.items():
        monkeypatch.setattr(evaluate_tiny, name, count)
    drawn = []
    draw = evaluation.draw_prompts
    monkeypatch.setattr(evaluation, "draw_prompts", lambda *options: drawn.append(options[2:]) or draw(*options))
    model = trained / "tiny.ckpt"
    arguments = ["--checkpoint", model, "--out", tmp_path, "--prompts", 2, "--judge-steps", 2, "--device", "cpu"]
    assert evaluate_tiny.main([*map(str, arguments), "--kinds", "full", "twice"]) == 0
    assert drawn == [("dpm++2m", 20, 7.5, 1)] * 4  # the settings of the checkpoint
    result = json.loads((tmp_path / "evaluation.json").read_text())
    names = [f"{kind}, {seen}" for kind in ("full", "twice") for seen in ("seen", "held out")]
    assert list(result["accuracy"]) == names
    assert result["accuracy"]["twice, seen"]["number"]["of"] == 2
    row = result["accuracy"]["full, seen"]
    low, high = row["time"]["interval"]
    assert 0 <= low <= row["time"]["share"] <= high <= 1
    assert "interval" not in row["mean"]
    assert "renders: all" in result["judge"]
    assert list(result["retrieval"]) == names[:2]
    assert result["checkpoint"] == str(model)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| twice")]
    assert len(rows) == 2
    assert len({line.count("|") for line in [*rows, *(line for line in lines if line.startswith("| | time"))]}) == 1


def test_the_kinds_of_prompts_of_the_script_are_those_of_the_evaluation():
    assert tuple(evaluation.PROMPTS) == evaluate_tiny.KINDS
    assert train_tiny.PREDICTION_TYPES == PREDICTION_TYPES


def test_the_table_is_markdown():
    rows = {"short, seen": {"time": (1.0, 40), "all": (0.925, 40)}, "none, seen": {"all": (0.0, 40)}}
    assert evaluate_tiny.table(rows, ("time", "all")).splitlines() == [
        "| | time | all |",
        "|---|---|---|",
        "| short, seen | 1.00 | .925 |",
        "| none, seen | - | .000 |",
    ]


@pytest.mark.slow
def test_a_model_that_predicts_v_says_so(tmp_path, trained):
    """Training and sampling with --prediction-type; the checkpoint says what its U-Net predicts."""
    for path in (trained / "vae.state", trained / "text.state", *trained.glob("*.npy")):
        shutil.copy(path, tmp_path)
    schedule = replace(SMALL.schedule, prediction_type="v_prediction")
    run = TrainingRun(tmp_path, scenes=40, device="cpu", config=replace(SMALL, schedule=schedule))
    run.train("diffusion", minutes=1, steps=2)
    models = sd.load_models(run.write_checkpoint(), "cpu", torch.float32)
    assert models.config.schedule.prediction_type == "v_prediction"
    assert sd.generate("a red house", models=models, n_inference_steps=2, seed=0).shape == (64, 64, 3)
    plain = TrainingRun(tmp_path, scenes=40, device="cpu", config=SMALL)
    with pytest.raises(TrainingError, match="has another configuration"):
        plain.train("diffusion", minutes=1, steps=2)
    again = sd.load_models(plain.write_checkpoint(), "cpu")  # as after `train_tiny.py decoder` without the flag
    assert again.config.schedule.prediction_type == "v_prediction"


def test_the_prediction_type_is_passed_on(tmp_path, monkeypatch):
    configs = []

    def stop(*_, config, **__):
        configs.append(config.schedule.prediction_type)
        raise TrainingError("enough")

    monkeypatch.setattr(stages, "TrainingRun", stop)
    for more in ([], ["--prediction-type", "v_prediction"]):
        assert train_tiny.main(["vae", "--out", str(tmp_path), *more]) == 2
    assert configs == ["epsilon", "v_prediction"]


def test_a_batch_of_the_text_stage_has_neighbouring_scenes_together(pictures):
    tokens = tokenise(pictures, Tokenizer())
    stage = TextStage(SMALL.text, pictures, tokens, batch_size=8, in_pairs=True)
    stage.small = torch.arange(32, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 64, 64)
    numbers = stage.draw(torch.Generator().manual_seed(0))[0][:, 0, 0, 0]
    assert len(numbers.unique()) == 8
    assert torch.equal(numbers[1::2], numbers[::2] + 1)
    assert (numbers[::2] % 2 == 0).all()


def test_shares_of_the_minutes_add_up_to_one():
    assert math.isclose(sum(train_tiny.SHARES.values()), 1)
    assert stages.HELD_BACK > 0
