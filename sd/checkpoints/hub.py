"""A model's name on the Hugging Face hub -> its file or folder on this computer, fetched if it is not here yet.

    owner/name    owner/name@revision    owner/name:file.safetensors    owner/name@revision:folder/file.ckpt

`huggingface_hub`, the hub's own client, does the work, and shares its cache with diffusers. Its environment variables
apply: HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN, HF_HOME.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sd.checkpoints.diffusers_folder import NETWORKS
from sd.checkpoints.folder_files import VARIANTS, weight_names

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^:@]+))?(:(?P<file>[^:]+))?")
FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

# Of a folder in the layout of diffusers, besides the weights and the config.json of each network.
SETTINGS = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/added_tokens.json"]


def is_name(path: str | Path) -> bool:
    """Whether this can only be a name on the hub: neither a file nor a folder here, nor the path of a weight file."""
    match = NAME.fullmatch(_text(path)) if isinstance(path, (str, Path)) else None
    if match is None or Path(path).exists():
        return False
    return match["file"] is not None or not match["repo"].lower().endswith(FILE_SUFFIXES)


def _text(path: str | Path) -> str:
    return path.as_posix() if isinstance(path, Path) else path


def fetch(name: str | Path, half: bool = False, out: Path | None = None) -> Path:
    """The file of a name with one, or else a folder in the layout of diffusers with the files that are needed.

    `half`: fetch the weights in 16 bits where the hub has them: half the size.
    `out`: a folder for the file, or for a folder with the model's name, instead of the hub's cache.

    Where the hub cannot be reached, what its cache has is used, unless `out` is given. A dropped connection is resumed.
    Files appear under their names when they are complete.

    Raises ImportError without the package; FileNotFoundError for a model, revision or file that the hub does not have;
    PermissionError for a model whose terms must be accepted first; ConnectionError if the hub is needed and cannot be
    reached; FileExistsError if `out` has something else under that name; another OSError, such as for a full disk. Each
    is one sentence.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"{name} is neither a file nor a folder here. To fetch it from the Hugging Face hub, install the package "
            "huggingface_hub: pip install -r requirements-hub.txt"
        ) from None
    name = _text(name)
    match = NAME.fullmatch(name)
    repo, revision, file = match["repo"], match["revision"], match["file"]
    folder = out if out is None or file is not None else out / repo.partition("/")[2]
    if out is not None:
        _check_free(folder if file is None else folder / file)

    def download(file: str, revision: str | None) -> str:
        return huggingface_hub.hf_hub_download(repo, file, revision=revision, local_dir=folder)

    with _plain_errors(name, repo, revision, out):
        if file is not None:
            return Path(download(file, revision))
        info = _model_info(repo, revision)
        if info is None:
            if out is not None:
                raise ConnectionError
            return _cached_folder(repo, revision)

    def cached(file: str) -> bool:
        return isinstance(huggingface_hub.try_to_load_from_cache(repo, file, revision=revision), str)

    wanted = choose(_names(info), half, cached)
    if wanted is None:
        raise FileNotFoundError(
            f"{repo} on the hub is not a folder in the layout of diffusers{_advice(repo, _names(info))}."
        )
    with _plain_errors(name, repo, revision, out):
        # Not snapshot_download: after Ctrl-C it waits until the files under way are complete.
        first = download(wanted[0], revision)  # by the name of the revision: the cache notes its commit
        for other in wanted[1:]:
            download(other, info.sha)
    return Path(first.removesuffix(str(Path(wanted[0]))))


def _check_free(path: Path) -> None:
    """Raises FileExistsError if the client would replace what it did not put there."""
    if path.exists() and not (path / ".cache" / "huggingface").is_dir():
        raise FileExistsError(f"{path} already exists: move it away to fetch it again, or choose another folder.")


def choose(files: Collection[str], half: bool, cached: Callable[[str], bool] = lambda file: False) -> list[str] | None:
    """Which of a repository's files are needed, or None if it has no whole model, nor a lone VAE, in the layout of
    diffusers.

    For each network, it is what `folder_files.find_weights` looks for. With `half`, the 16-bit variant comes first,
    unless others are in the cache already.
    """
    lone_vae = "config.json" in files and "unet/config.json" not in files
    folders = {"vae": ""} if lone_vae else {network: f"{network}/" for network in NETWORKS}
    variants = sorted(VARIANTS, key=lambda variant: variant != ".fp16") if half else VARIANTS
    wanted = [file for file in SETTINGS if file in files]
    for network, folder in folders.items():
        names = [folder + name for name in weight_names(network, variants) if folder + name in files]
        if not names or f"{folder}config.json" not in files:
            return None
        choices = [[name, *_shards(name, files)] for name in names]
        here = [choice for choice in choices if half and all(map(cached, choice))]
        wanted += [f"{folder}config.json", *(here or choices)[0]]
    return wanted


def _shards(index: str, files: Collection[str]) -> list[str]:
    """The files that an index stands for, or none for a single file."""
    match = re.fullmatch(r"(.+)(\.safetensors|\.bin)\.index(\.\w+)?\.json", index)
    if match is None:
        return []
    stem, suffix, variant = match[1], match[2], match[3] or ""
    # diffusers has written the variant before the number, and after it.
    pattern = re.compile(rf"{re.escape(stem)}({variant}-\d+-of-\d+|-\d+-of-\d+{variant}){re.escape(suffix)}")
    return [file for file in files if pattern.fullmatch(file)]


def _model_info(repo: str, revision: str | None) -> ModelInfo | None:
    """The commit and the files of a repository, or None if the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # Not list_repo_files, which tries for half a minute where there is no network.
        return HfApi().model_info(repo, revision=revision)
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", 500) < 500:
            raise
    except ValueError:  # an impossible name
        raise
    except Exception:  # offline mode, or whatever the HTTP library of this version of the client raises
        pass
    return None


def _names(info: ModelInfo | None) -> list[str]:
    return [file.rfilename for file in info.siblings] if info else []


def _cached_folder(repo: str, revision: str | None) -> Path:
    """The folder that the cache has of a repository. Raises ConnectionError if it has none."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("unet/config.json", "config.json"):  # the latter of a lone VAE
        config = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(config, str):  # not None, and not the mark for a file that the hub does not have
            return Path(config.removesuffix(name))
    raise ConnectionError


@contextmanager
def _plain_errors(name: str, repo: str, revision: str | None, out: Path | None) -> Iterator[None]:
    """Turns the client's errors into one sentence each."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(
            f"{name} is a model whose terms must be accepted first: do so at {hub}/{repo}, then set HF_TOKEN to your "
            "token, or run `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name} is neither a file nor a folder here, nor a public model at {hub}: check its name, or set HF_TOKEN "
            "for a private one."
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{name}: the model {repo} has no revision {revision!r} at {hub}.") from None
    except (errors.LocalEntryNotFoundError, ConnectionError):
        here = "neither a file nor a folder here nor in the hub's cache" if out is None else f"not in {out}"
        raise ConnectionError(
            f"{name} is {here}, and {hub} cannot be reached: check the network, and HF_HUB_OFFLINE."
        ) from None
    except errors.EntryNotFoundError:
        advice = _advice(repo, _names(_model_info(repo, revision)))
        raise FileNotFoundError(f"{name}: the hub has no such file{advice}.") from None
    except errors.HFValidationError:
        raise FileNotFoundError(
            f"{name} is neither a file nor a folder here, nor a possible name on the hub."
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            place = f"{constants.HF_HUB_CACHE}, which HF_HOME moves" if out is None else out
            raise OSError(f"{name} could not be saved ({error.strerror}): it goes to {place}.") from None
        # Of the HTTP library, which differs between versions of the client.
        reason = " ".join(str(error).split())
        raise OSError(f"{name} could not be fetched from {hub}: {reason:.200}") from None


def _advice(repo: str, files: Sequence[str], most: int = 4) -> str:
    """What to type instead, from the weight files that the repository has."""
    weights = [file for file in files if file.lower().endswith(FILE_SUFFIXES)]
    weights = sorted(weights, key=lambda file: (file.count("/"), len(file)))[:most]
    return f": give one of its files, such as {' or '.join(f'{repo}:{file}' for file in weights)}" if weights else ""
