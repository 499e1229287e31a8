"""A memory-mapped zip archive -> its records, with every size and place checked.

zipfile reads the table of contents at the end of the file. The records are then taken from the mapping: a view where
they are not compressed. Error messages start with a verb, as in checkpoint.py.
"""

from __future__ import annotations

import mmap
import zipfile
import zlib
from typing import BinaryIO

from sd.checkpoints.checkpoint import CheckpointError

# Real checkpoints stay far below these limits. Without limits, a file of a few kilobytes could unpack to terabytes.
MAX_DIRECTORY_BYTES = 2 << 20  # the table of contents: that of Stable Diffusion 1.5 has 0.1 MB
MAX_INFLATION = 20  # unpacked bytes per byte of the file: compression barely shrinks weights
MAX_INFLATED_BYTES = 8 << 20  # on top, for small archives that are mostly the pickle


class Archive:
    """`records` maps names to their entries in the table of contents. All methods raise KeyError for unknown names."""

    def __init__(self, file: BinaryIO, data: mmap.mmap) -> None:
        """`data` is the mapping of `file`. Raises CheckpointError for a damaged archive or impossible sizes."""
        try:
            archive = zipfile.ZipFile(_LimitedFile(file))
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
            raise CheckpointError("lists more than fits into a file of its size; it is damaged or an attack")

    def is_packed(self, name: str) -> bool:
        return self.records[name].compress_type != zipfile.ZIP_STORED

    def place(self, name: str) -> tuple[int, int]:
        """The first byte and the size of an uncompressed record. It can reach beyond the end of the file."""
        info = self.records[name]
        header = self.data[max(info.header_offset, 0) : info.header_offset + 30]  # the second one, before the content
        start = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
        own_name = self.data[info.header_offset + 30 : start].decode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if info.flag_bits & 1:
            raise CheckpointError("is an encrypted zip archive; unpack it first")
        if not header.startswith(b"PK\3\4") or own_name != info.orig_filename:
            raise CheckpointError(f"is damaged: its zip archive lacks {name!r:.80} in the place where it should be")
        return start + int.from_bytes(header[28:30], "little"), info.file_size

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A copy of a record, unpacked. Raises CheckpointError if it is damaged or larger than `limit` bytes."""
        info = self.records[name]
        if limit is not None and info.file_size > limit:
            raise CheckpointError(
                f"has {info.file_size:,} bytes of {name!r:.80}; the limit of this reader is {limit:,}"
            )
        start, size = self.place(name)
        content = self.data[start : start + info.compress_size]
        try:
            if self.is_packed(name):
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        except zlib.error:
            content = None
        if content is None or len(content) != size or zlib.crc32(content) != info.CRC:
            raise CheckpointError(f"is damaged: {name!r:.80} in its zip archive has the wrong size or checksum")
        return content


class _LimitedFile:
    """A file that limits how much zipfile may read at once: a table of contents is never large."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell, self.seekable = file, file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY_BYTES:  # without a count, zipfile reads the last 64 kB
            raise CheckpointError("is damaged: the table of contents of its zip archive is absurdly long")
        return self.file.read(count)
