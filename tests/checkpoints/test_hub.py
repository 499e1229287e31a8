"""Models by their name on the hub, with the real client against a server on this computer."""

import os
import sys
from pathlib import Path

import pytest

from sd.checkpoints import hub
from sd.checkpoints.hub import choose, is_name
from tests import ROOT
from tests.support.hub_client import run_code, settings
from tests.support.hub_server import COMMIT, Repository, serve
from tests.support.marks import slow

pytest.importorskip("huggingface_hub")

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CONFIGS = {f"{network}/config.json": network.encode() for network in STEMS}
EXTRAS = [
    "README.md",
    "safety_checker/model.safetensors",
    "unet/openvino_model.bin",
    "v1.ckpt",
    "vae/flax_model.msgpack",
]


def weights(*kinds: str) -> dict[str, bytes]:
    """For each network one file of each kind, such as ".fp16.safetensors"."""
    return {f"{network}/{stem}{kind}": os.urandom(3000) for network, stem in STEMS.items() for kind in kinds}


def folder(*kinds: str) -> dict[str, bytes]:
    return CONFIGS | {"model_index.json": b"{}"} | weights(*kinds) | dict.fromkeys(EXTRAS, b"not needed")


REPOSITORIES = {
    "owner/both": Repository(folder(".safetensors", ".fp16.safetensors", ".bin"), tags=("v2",)),
    "owner/gated": Repository(folder(".safetensors"), gated=True),
    "owner/files": Repository({"a.ckpt": b"123", "parts/b.safetensors": b"4567"}),
}


@pytest.fixture(scope="module")
def server():
    with serve(REPOSITORIES) as running:
        yield running


def fetch(server, cache: Path, *calls: str | tuple[str, bool], **environment: str) -> list[str]:
    """What `fetch` returns or raises for each name (and `half`), in one new process."""
    server.downloads.clear()
    calls = [(call, False) if isinstance(call, str) else call for call in calls]
    code = (
        f"from sd.checkpoints.hub import fetch\nfor name, half in {calls!r}:\n"
        "    try: print(fetch(name, half))\n    except Exception as error: print(type(error).__name__, error, sep=': ')"
    )
    done = run_code(code, settings(server, cache, **environment), cache)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert len(lines) == len(calls), "an error has more than one line"
    return lines


def fetched(server) -> list[str]:
    return sorted(name.removeprefix("owner/").partition("/")[2] for name in server.downloads)


def test_only_the_files_that_are_needed_are_fetched_and_only_once(server, tmp_path):
    path = Path(*fetch(server, tmp_path, "owner/both"))
    assert path.name == COMMIT
    files = sorted(
        [*CONFIGS, "model_index.json", *(f"{network}/{stem}.safetensors" for network, stem in STEMS.items())]
    )
    assert fetched(server) == files
    assert sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()) == files
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (path / weights).read_bytes() == REPOSITORIES["owner/both"].files[weights]
    # In 16 bits the other variant would do, but this one is here already.
    assert fetch(server, tmp_path, "owner/both", "owner/both@v2", ("owner/both", True)) == [str(path)] * 3
    assert fetched(server) == []
    assert fetch(server, tmp_path, "owner/both", HF_HUB_OFFLINE="1") == [str(path)]


@pytest.mark.slow
def test_where_the_hub_cannot_be_reached_its_cache_is_used(server, tmp_path):
    path = fetch(server, tmp_path, "owner/both")
    assert fetch(server, tmp_path, "owner/both", HF_ENDPOINT="http://127.0.0.1:9") == path


@pytest.mark.slow
def test_sixteen_bits_are_half_the_size(server, tmp_path):
    fetch(server, tmp_path, ("owner/both", True))
    assert [name for name in fetched(server) if "fp16" in name] == sorted(
        f"{network}/{stem}.fp16.safetensors" for network, stem in STEMS.items()
    )
    assert not any(name.endswith("model.safetensors") for name in fetched(server))


@pytest.mark.slow
def test_a_single_file(server, tmp_path):
    path, again = map(Path, fetch(server, tmp_path, *["owner/files:parts/b.safetensors"] * 2))
    assert path == again
    assert path.read_bytes() == b"4567"
    assert fetched(server) == ["parts/b.safetensors"]
    assert fetch(server, tmp_path, "owner/files:parts/b.safetensors", HF_HUB_OFFLINE="1") == [str(path)]


def test_a_token_opens_a_gated_model(server, tmp_path):
    assert Path(*fetch(server, tmp_path, "owner/gated", HF_TOKEN="hf_token")).is_dir()


@pytest.mark.slow
def test_a_download_that_breaks_off_is_made_whole(tmp_path):
    content = os.urandom(300_000)
    with serve({"owner/files": Repository({"a.ckpt": content})}, cut_after=100_000) as server:
        path = fetch(server, tmp_path, "owner/files:a.ckpt")
        assert len(server.downloads) == 2
        assert Path(*path).read_bytes() == content


def test_what_the_hub_does_not_have(server, tmp_path):
    sentences = {
        "owner/none": "FileNotFoundError: owner/none is neither a file nor a folder here, nor a public model at",
        "owner/both@v9": "FileNotFoundError: owner/both@v9: the model owner/both has no revision 'v9' at",
        "owner/files:c.ckpt": "FileNotFoundError: owner/files:c.ckpt: the hub has no such file: give one of its files, "
        "such as owner/files:a.ckpt or owner/files:parts/b.safetensors.",
        "owner/files": "FileNotFoundError: owner/files on the hub is not a folder in the layout of diffusers: give one",
        "own..er/files": "FileNotFoundError: own..er/files is neither a file nor a folder here, nor a possible name",
        "owner/gated": "PermissionError: owner/gated is a model whose terms must be accepted first: do so at "
        f"{server.url}/owner/gated, then set HF_TOKEN to your token, or run `hf auth login`.",
    }
    for message, sentence in zip(fetch(server, tmp_path, *sentences), sentences.values()):
        assert message.startswith(sentence)
    assert fetched(server) == []


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, slow({"HF_ENDPOINT": "http://127.0.0.1:9"})])
def test_without_a_network_and_without_a_cache(server, tmp_path, offline):
    for message in fetch(server, tmp_path, "owner/both", "owner/files:a.ckpt", **offline):
        assert "is neither a file nor a folder here nor in the hub's cache" in message
        assert message.startswith("ConnectionError: owner/")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """A limit on the size of files stands for the full disk."""
    with serve({"owner/files": Repository({"a.ckpt": os.urandom(300_000)})}) as server:
        code = (
            "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\nfrom sd.checkpoints.hub import fetch\n"
            "try: fetch('owner/files:a.ckpt')\nexcept OSError as error: print(error)"
        )
        done = run_code(code, settings(server, tmp_path), tmp_path)
    place = f"it goes to {tmp_path / 'hub'}, which HF_HOME moves."
    assert done.out == f"owner/files:a.ckpt could not be saved (File too large): {place}\n"
    assert not list(tmp_path.rglob("a.ckpt"))


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError) as caught:
        hub.fetch("owner/name")
    assert str(caught.value) == (
        "owner/name is neither a file nor a folder here. To fetch it from the Hugging Face hub, install the package "
        "huggingface_hub: pip install -r requirements-hub.txt"
    )


@pytest.mark.parametrize(
    "path, expected",
    [
        ("owner/name", True),
        ("owner/name@main", True),
        ("owner/name:file.ckpt", True),
        ("owner/name@v1.0:folder/file.safetensors", True),
        ("models/missing.safetensors", False),  # the path of a file, mistyped
        ("models/missing.CKPT", False),
        ("tests/checkpoints", False),  # a folder here
        ("name", False),
        ("a/b/c", False),
        ("/models/name", False),
        ("./name", False),
        ("../name", False),
        ("C:\\models\\name", False),
        (Path("owner/name"), True),
        (Path("/owner/name"), False),
        (None, False),
        (5, False),
    ],
)
def test_what_is_a_name(monkeypatch, path, expected):
    monkeypatch.chdir(ROOT)
    assert is_name(path) is expected


def test_shards_and_variants_are_chosen_like_diffusers_does():
    shards = ["-00001-of-00002.safetensors", "-00002-of-00002.safetensors", ".safetensors.index.json"]
    half = [".fp16-00001-of-00002.safetensors", ".fp16-00002-of-00002.safetensors", ".safetensors.index.fp16.json"]
    for first, kinds in ((shards, [False]), (half, [True])):
        files = list(folder(*shards, *half, ".bin"))
        for is_half in kinds:
            chosen = choose(files, is_half)
            assert sorted(chosen) == sorted([*CONFIGS, "model_index.json", *weights(*first)])
    assert choose(list(folder(".bin", ".fp16.safetensors")), False)[-1].endswith("/model.bin")  # full precision first
    assert choose(list(folder(".bin", ".fp16.safetensors")), True)[-1].endswith(".fp16.safetensors")
    torch_files = {
        name.replace("r/model.bin", "r/pytorch_model.bin"): content for name, content in folder(".bin").items()
    }
    assert choose(list(torch_files), True)[-1] == "text_encoder/pytorch_model.bin"  # as transformers calls it
    older = [f"unet/diffusion_pytorch_model-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)]
    older.append("unet/diffusion_pytorch_model.safetensors.index.fp16.json")
    files = [name for name in folder(".fp16.safetensors") if not name.startswith("unet/diffusion")] + older
    assert set(older) < set(choose(files, True))
    lone_vae = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "README.md"]
    assert choose(lone_vae, True) == lone_vae[:2]
    assert choose(list(weights(".safetensors")), True) is None
    assert choose(list(CONFIGS), True) is None
