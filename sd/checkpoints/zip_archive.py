"""A zip archive that is mapped into memory -> its records, read without trusting what it says of itself.

zipfile reads the table of contents at the end of the file; the records are then taken from the mapping, in place where
they are not compressed. Errors speak of the file as "it"; `checkpoint.read_checkpoint` puts its name in front.
"""

from __future__ import annotations

import mmap
import zipfile
import zlib
from typing import BinaryIO

from sd.checkpoints.checkpoint import CheckpointError

# Honest files stay far below these limits; without them a file of a few kilobytes can claim terabytes.
MAX_DIRECTORY_BYTES = 2 << 20  # of the table of contents: that of Stable Diffusion 1.5 has 0.1 MB
MAX_INFLATION = 20  # compression barely shrinks weights
MAX_INFLATED_BYTES = 8 << 20  # of an archive so small that its pickle is most of it


class Archive:
    """`records` maps names to what the table of contents says of them. All methods raise KeyError for other names."""

    def __init__(self, file: BinaryIO, data: mmap.mmap) -> None:
        """`data` is the mapping of `file`. Raises CheckpointError for sizes that cannot be."""
        try:
            archive = zipfile.ZipFile(_Sparing(file))
        except zipfile.BadZipFile:
            raise CheckpointError(
                "is truncated: a zip archive without its table of contents; download it again"
            ) from None
        self.data, self.records = data, archive.NameToInfo
        if len(self.records) != len(archive.infolist()):
            raise CheckpointError("is damaged: its zip archive has a name twice")
        if {info.compress_type for info in self.records.values()} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise CheckpointError(
                "is a zip archive compressed by another method than deflate; unpack it and save it again"
            )
        packed_size = sum(info.file_size for name, info in self.records.items() if self.is_packed(name))
        stored_size = sum(info.file_size for info in self.records.values()) - packed_size
        if stored_size > len(data) or packed_size > MAX_INFLATED_BYTES + MAX_INFLATION * len(data):
            raise CheckpointError("claims to hold more than fits into a file of its size; it is damaged or an attack")

    def is_packed(self, name: str) -> bool:
        return self.records[name].compress_type != zipfile.ZIP_STORED

    def place(self, name: str) -> tuple[int, int]:
        """The first byte and the size of a record that is not compressed. Both can lie beyond the end of the file."""
        info = self.records[name]
        header = self.data[max(info.header_offset, 0) : info.header_offset + 30]  # the record's own, before its content
        start = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
        own_name = self.data[info.header_offset + 30 : start].decode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if info.flag_bits & 1:
            raise CheckpointError("is an encrypted zip archive; unpack it first")
        if not header.startswith(b"PK\3\4") or own_name != info.orig_filename:
            raise CheckpointError(f"is damaged: its zip archive lacks {name!r:.80} in the place where it should be")
        return start + int.from_bytes(header[28:30], "little"), info.file_size

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A copy of a record, unpacked. Raises CheckpointError if it claims more than `limit` bytes, or is damaged."""
        info = self.records[name]
        if limit is not None and info.file_size > limit:
            raise CheckpointError(f"is damaged: {name!r:.80} in its zip archive claims {info.file_size:,} bytes")
        start, size = self.place(name)
        content = self.data[start : start + info.compress_size]
        try:
            if self.is_packed(name):
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        except zlib.error:
            content = None
        if content is None or len(content) != size or zlib.crc32(content) != info.CRC:
            raise CheckpointError(f"is damaged: {name!r:.80} in its zip archive has not the size or checksum it should")
        return content


class _Sparing:
    """A file of which zipfile gets no more at once than an honest table of contents takes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell, self.seekable = file, file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY_BYTES:  # without a count, it is the last 64 kB
            raise CheckpointError("is damaged: the table of contents of its zip archive is absurdly long")
        return self.file.read(count)
