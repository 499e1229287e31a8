"""Thousands of damaged and odd embedding files: each is read, or refused in one clear sentence.

`FUZZ_FIRST=5000` continues with new ones.
"""

import os

import pytest

from sd.adapters.textual_inversion import read_embedding
from tests.support import malicious_pickles as evil
from tests.support.fuzzing import fuzz

FIRST = int(os.environ.get("FUZZ_FIRST", 0))


@pytest.mark.parametrize("count", [30, pytest.param(5000, marks=pytest.mark.slow)])
def test_hostile_files_are_read_or_refused(tmp_path, count):
    outcomes = fuzz(tmp_path, FIRST, embeddings=count)["outcomes"]
    kinds = ("embedding-damaged", "embedding-odd")
    assert {f"{kind} {end}" for kind in kinds for end in ("loaded", "refused")} == set(outcomes)


def outcome(path):
    """The vectors, or the beginning of the error."""
    try:
        return read_embedding(path).vectors.tolist()
    except ValueError as error:
        return str(error)[: len(f"{path} ")]


@pytest.mark.parametrize("wrap", [evil.in_zip, evil.in_legacy])
def test_programs_in_a_file_do_not_run(tmp_path, wrap):
    """Beside the vectors, in the dictionary of the web UI, or as the state of the paper's ParameterDict."""
    evil.place_accomplices(tmp_path)
    parameters = b"ctorch.nn.modules.container\nParameterDict\n)\x81"
    path = tmp_path / "cat.pt"
    for value in evil.attacks(tmp_path).values():
        honest = evil.mapping(**{"*": evil.tensor(size=b"K\2K\2\x86", stride=b"K\2K\1\x86")})
        states = [evil.mapping(_parameters=honest, _buffers=value), evil.mapping(_parameters=value)]
        wholes = [evil.mapping(string_to_param=honest, optimizer=value)]
        wholes += [evil.mapping(string_to_param=parameters + state + b"b") for state in states]
        for whole in wholes:
            path.write_bytes(wrap(b"\x80\4" + whole + b"."))
            assert outcome(path) in ([[1, 1], [1, 1]], f"{path} ")
    assert not (tmp_path / "canary").exists()
