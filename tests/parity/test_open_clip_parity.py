"""SD 2's text encoder and tokens against open_clip's own, with equal random weights, in float32.

SD 2 was trained on what open_clip's last layer but one gives, after the final norm. So our encoder has one layer less.
"""

import importlib.util
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch

from sd.model_converter import to_compvis
from sd.model_saver import save_folder
from sd.tokenizer import Tokenizer
from tests.parity.test_tokenizer_parity import CORPUS
from tests.support.marks import slow
from tests.support.synthetic import FULL_SD2_TEXT, SD2_MICRO, random_models, random_networks

PACKAGE = "open_clip_torch==3.3.0"
PREFIX = "cond_stage_model.model."


@pytest.fixture(scope="module")
def open_clip():
    """The package's modules `transformer` and `tokenizer`. Without torchvision, which only its image side uses."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip(f"needs open_clip: pip install --no-deps {PACKAGE}")
    package = ModuleType("open_clip")  # not its own __init__, which imports everything
    package.__path__ = list(spec.submodule_search_locations)
    torchvision = ModuleType("torchvision.ops.misc")
    torchvision.FrozenBatchNorm2d = torch.nn.Identity
    names = ("torchvision", "torchvision.ops")
    replaced = {name: ModuleType(name) for name in names} | {torchvision.__name__: torchvision}
    with mock.patch.dict(sys.modules, replaced | {"open_clip": package}):
        package.transformer = importlib.import_module("open_clip.transformer")
        package.tokenizer = importlib.import_module("open_clip.tokenizer")
    return package


@pytest.mark.parametrize("config, batch", [(SD2_MICRO, 3), slow(FULL_SD2_TEXT, 2)], ids=["micro", "full"])
@torch.no_grad()
def test_text_encoder(open_clip, config, batch):
    models, text = random_networks(config, seed=1), config.text
    theirs = open_clip.transformer.TextTransformer(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        width=text.width,
        heads=text.heads,
        layers=text.layers + 1,
        output_dim=text.width,
    ).eval()
    state = to_compvis(models)
    state = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if key.startswith(PREFIX)}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    last = f"transformer.resblocks.{text.layers}."
    assert not unexpected
    assert all(key == "text_projection" or key.startswith(last) for key in missing)

    penultimate = []
    theirs.transformer.resblocks[-2].register_forward_hook(lambda layer, args, out: penultimate.append(out))
    tokens = Tokenizer(pad_token_id=0)(["", "a red house at night, wow!", "word " * 75][:batch])
    theirs(tokens)
    expected = theirs.ln_final(penultimate[0])
    assert 0.5 < expected.std() < 2
    assert (models.clip(tokens) - expected).abs().max() <= 2e-5


@torch.no_grad()
def test_diffusers_reads_it_from_a_single_file(tmp_path):
    """Its loader of whole files does not need what ours leave out: the last layer, text_projection and logit_scale."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    from transformers import CLIPTextModel

    models = random_models(SD2_MICRO, seed=1)
    save_folder(models, tmp_path / "model")  # for its configuration
    theirs = single_file.create_diffusers_clip_model_from_ldm(
        CLIPTextModel, to_compvis(models), "text_encoder", str(tmp_path / "model"), local_files_only=True
    )
    tokens = Tokenizer(pad_token_id=0)(["a red house at night, wow!"])
    assert (models.clip(tokens) - theirs(tokens).last_hidden_state).abs().max() <= 2e-5


@pytest.mark.filterwarnings("ignore:Only 75 of")
def test_tokens(open_clip):
    """Zeros after the end. Long texts are cut before the end there, too."""
    theirs = open_clip.tokenizer.SimpleTokenizer()
    ours = Tokenizer(pad_token_id=0)
    texts = [text for text in CORPUS if "<|" not in text and "start_of_text" not in text]
    torch.testing.assert_close(ours(texts), theirs(texts), rtol=0, atol=0)


def test_an_exclamation_mark_is_not_padding():
    """transformers' tokenizer for SD 2 turns every "!" into padding."""
    assert Tokenizer(pad_token_id=0)(["wow!"])[0, :4].tolist() == [49406, 2781, 256, 49407]
