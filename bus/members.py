"""Compressed segments: gzip members one behind the other, each of whole lines, each readable without the others.

A member's header says in an extra field (RFC 1952, section 2.3.1.1) how long it is, packed and unpacked, and how many
lines it holds: a reader hops from header to header to the line it wants. To zcat and its like the file is plain gzip.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

from bus.records import BrokenLineError

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMBER_BYTES = 1 << 18
"""How much a member holds unpacked: so much, and the rest of the line that ends behind it."""

_LEVEL = 6
_HEADER = struct.Struct("<4sIBBH2sHIII")
_CRC16 = struct.Struct("<H")
_TRAILER = struct.Struct("<II")
_MAGIC = b"\x1f\x8b\x08\x06"
"""gzip, deflate, with an extra field and a checksum of the header."""

_UNKNOWN_OS = 255
_FIELD = b"AL"
_FIELD_BYTES = 12
_HEADER_BYTES = _HEADER.size + _CRC16.size
_LEAST_BYTES = _HEADER_BYTES + _TRAILER.size
_GZIP = zlib.MAX_WBITS | 16


class Member(NamedTuple):
    """Where a member lies in its file, and what is in it: bytes and lines, unpacked."""

    offset: int
    packed: int
    length: int
    lines: int


def pack(lines: bytes) -> bytes:
    """The member that holds these whole lines."""
    deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = deflate.compress(lines) + deflate.flush()
    packed = _HEADER_BYTES + len(body) + _TRAILER.size
    header = _HEADER.pack(
        _MAGIC, 0, 0, _UNKNOWN_OS, _FIELD_BYTES + 4, _FIELD, _FIELD_BYTES, packed, len(lines), lines.count(b"\n")
    )
    trailer = _TRAILER.pack(zlib.crc32(lines), len(lines))
    return header + _CRC16.pack(zlib.crc32(header) & 0xFFFF) + body + trailer


def members(fd: int) -> list[Member]:
    """All of a file, in order; from where there is none of ours, the rest as one, its length and lines unknown (-1).

    None of ours is also one that does not end within the file, or ends before it can.
    """
    size, found = os.fstat(fd).st_size, []
    end = 0
    for member in _hop(fd, size):
        found.append(member)
        end = member.offset + member.packed
    return found if end == size else [*found, Member(end, size - end, -1, -1)]


def _hop(fd: int, size: int) -> Iterator[Member]:
    offset = 0
    while offset < size:
        header = os.pread(fd, _HEADER_BYTES, offset)
        if len(header) < _HEADER_BYTES:
            return
        magic, _, _, _, _, field, _, packed, length, lines = _HEADER.unpack_from(header)
        crc = _CRC16.unpack_from(header, _HEADER.size)[0]
        if (magic, field) != (_MAGIC, _FIELD) or crc != zlib.crc32(header[: _HEADER.size]) & 0xFFFF:
            return
        if not _LEAST_BYTES <= packed <= size - offset:
            return
        yield Member(offset, packed, length, lines)
        offset += packed


def unpack(fd: int, member: Member) -> bytes:
    """Its lines. Raises `BrokenLineError` where it does not hold what was packed."""
    data = os.pread(fd, member.packed, member.offset)
    try:
        lines = _unpack_all(data) if member.lines < 0 else zlib.decompress(data, _GZIP)
    except zlib.error as error:
        raise BrokenLineError("gzip", f"its segment cannot be unpacked at byte {member.offset}: {error}") from None
    if member.lines >= 0 and (len(lines), lines.count(b"\n")) != (member.length, member.lines):
        raise BrokenLineError("gzip", f"its segment holds something else at byte {member.offset} than its header says")
    return lines


def _unpack_all(data: bytes) -> bytes:
    """Of members that are not ours."""
    parts = []
    while data:
        member = zlib.decompressobj(_GZIP)
        parts.append(member.decompress(data))
        if not member.eof:
            raise zlib.error("it has no end")
        data = member.unused_data
    return b"".join(parts)
