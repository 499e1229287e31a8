"""Zip archives are read in place, and every size and place in them is checked."""

import io
import mmap
import struct
import zipfile

import pytest

from sd.checkpoints.checkpoint import CheckpointError
from sd.checkpoints.zip_archive import MAX_DIRECTORY_BYTES, MAX_INFLATED_BYTES, MAX_INFLATION, Archive


def zipped(records, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def opened(tmp_path):
    """A function from bytes to their Archive. File and mapping live as long as the test."""
    files = []

    def open_bytes(content: bytes) -> Archive:
        path = tmp_path / "archive.zip"
        path.write_bytes(content)
        files.append(path.open("rb"))
        return Archive(files[-1], mmap.mmap(files[-1].fileno(), 0, access=mmap.ACCESS_READ))

    yield open_bytes
    for file in files:
        file.close()


RECORDS = {"archive/data.pkl": b"pickle", "archive/data/0": bytes(range(200)), "größer": b""}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_record_comes_back(opened, method):
    archive = opened(zipped(RECORDS, method))
    assert {name: archive.read(name) for name in archive.records} == RECORDS


def test_place_gives_the_bytes_of_a_stored_record(opened):
    content = zipped(RECORDS)
    start, size = opened(content).place("archive/data/0")
    assert content[start : start + size] == RECORDS["archive/data/0"]


def test_only_compressed_records_are_packed(opened):
    assert not opened(zipped(RECORDS)).is_packed("archive/data/0")
    assert opened(zipped(RECORDS, zipfile.ZIP_DEFLATED)).is_packed("archive/data/0")


def test_unknown_names_are_key_errors(opened):
    archive = opened(zipped(RECORDS))
    for method in (archive.read, archive.place, archive.is_packed):
        with pytest.raises(KeyError):
            method("archive/data/1")


def test_no_more_is_read_than_allowed(opened):
    archive = opened(zipped(RECORDS))
    assert archive.read("archive/data/0", limit=200) == RECORDS["archive/data/0"]
    with pytest.raises(CheckpointError, match="has 200 bytes of 'archive/data/0'; the limit of this reader is 199"):
        archive.read("archive/data/0", limit=199)


@pytest.mark.parametrize("place", [34, 40])  # in the content, which begins at byte 31
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_is_noticed(opened, method, place):
    content = bytearray(zipped({"a": b"some bytes that are checked"}, method))
    content[place] ^= 1
    archive = opened(bytes(content))
    with pytest.raises(CheckpointError, match="'a' in its zip archive has the wrong size or checksum"):
        archive.read("a")


def test_a_table_that_points_elsewhere_is_noticed(opened):
    content = zipped({"a": b"1", "b": b"2"})
    first, second = (content.find(b"PK\1\2", start) for start in (0, content.find(b"PK\1\2") + 1))
    offset = content[second + 42 : second + 46]  # where "b" begins
    moved = content[: first + 42] + offset + content[first + 46 :]
    with pytest.raises(CheckpointError, match="lacks 'a' in the place where it should be"):
        opened(moved).read("a")


def test_a_name_twice_is_refused(opened):
    content = zipped({"first": b"1", "other": b"2"}).replace(b"other", b"first")
    with pytest.raises(CheckpointError, match="has a name twice"):
        opened(content)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(opened, method):
    with pytest.raises(CheckpointError, match="another method than deflate"):
        opened(zipped(RECORDS, method))


def test_encryption_is_refused(opened):
    content = bytearray(zipped({"a": b"1"}))
    content[content.find(b"PK\1\2") + 8] |= 1
    with pytest.raises(CheckpointError, match="is an encrypted zip archive"):
        opened(bytes(content)).read("a")


def test_a_bomb_is_refused_before_it_is_unpacked(opened):
    content = zipped({"a": bytes(MAX_INFLATED_BYTES + MAX_INFLATION * 100_000)}, zipfile.ZIP_DEFLATED)
    assert len(content) < 100_000
    with pytest.raises(CheckpointError, match="lists more than fits"):
        opened(content)


def test_a_record_that_unpacks_to_more_than_its_size_is_cut_short(opened):
    content = bytearray(zipped({"a": bytes(1_000_000)}, zipfile.ZIP_DEFLATED))
    entry = content.find(b"PK\1\2")
    content[entry + 24 : entry + 28] = struct.pack("<I", 10)  # its size when unpacked
    with pytest.raises(CheckpointError, match="has the wrong size or checksum"):
        opened(bytes(content)).read("a")


def test_an_endless_table_of_contents_is_refused_unread(opened):
    content = zipped({f"{i:060}": b"" for i in range(MAX_DIRECTORY_BYTES // 100)})
    with pytest.raises(CheckpointError, match="table of contents of its zip archive is absurdly long"):
        opened(content)


def test_a_file_without_its_end_is_truncated(opened):
    with pytest.raises(CheckpointError, match="is truncated: a zip archive without its table of contents"):
        opened(zipped(RECORDS)[:-10])
