"""A checksum for checkpoints: `torch.load` does not notice damaged bytes."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib


class Damaged(Exception):
    """The bytes are not those that were saved."""


SEAL = b"relu-mlp sha256 "
SEAL_SIZE = len(SEAL) + 64

#: How the last record of a zip file begins, its size, and its end if there is no comment.
END, END_SIZE, NO_COMMENT = b"PK\5\6", 22, b"\0\0"


def sealed(data: bytes) -> bytes:
    """A zip file, with the SHA-256 of its bytes as its comment, which `torch.load` ignores."""
    data = data[:-2] + SEAL_SIZE.to_bytes(2, "little")
    return data + SEAL + hashlib.sha256(data).hexdigest().encode()


def check_seal(data: bytes) -> None:
    """Raises `Damaged` if the bytes are not those that were saved.

    A file that a user or an earlier version saved with `torch.save` has no seal. Its
    records have checksums, which `torch.load` ignores.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if not (data[-END_SIZE:].startswith(END) and data.endswith(NO_COMMENT)):
            body, seal = data[:-SEAL_SIZE], data[-SEAL_SIZE:]
            if seal != SEAL + hashlib.sha256(body).hexdigest().encode():
                raise Damaged("its checksum is not that of its bytes")
            return
        records = archive.infolist()
        # torch.save does not compress. Compressed records may be far larger than the file.
        if any(r.compress_type for r in records) or sum(r.file_size for r in records) > len(data):
            raise Damaged("its records are larger than the file")
        try:
            damaged = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
            damaged = "a record"
        if damaged is not None:
            raise Damaged("its checksums are not those of its bytes")
