"""Mutations that know a format: what they change is found behind checksums and lengths that still hold."""

from __future__ import annotations

import io
import json
import pickletools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence

from fuzzing.mutate import NUMBERS, WORDS, Rng, chance, mutate_bytes, mutate_json, odd_name, odd_value, pick, times

OUTSIDE = "/nowhere"  # an absolute folder that nothing may be written to; the worker sets it


def pickle_ops(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """A pickle with operations moved, repeated, left out, or with other arguments."""
    try:
        places = [place for _, _, place in pickletools.genops(data)]
    except Exception:  # it is one of ours, mutated before
        return mutate_bytes(data, rng, others)
    ends = [*places[1:], len(data)]
    ops = [data[start:end] for start, end in zip(places, ends, strict=True)]
    for _ in times(rng):
        at = int(rng.integers(len(ops)))
        kind = int(rng.integers(6))
        if kind == 0:
            del ops[at]
        elif kind == 1:
            ops.insert(at, pick(rng, ops))
        elif kind == 2:
            ops[at] = ops[at][:1] + mutate_bytes(ops[at][1:], rng, most=1) if len(ops[at]) > 1 else ops[at]
        elif kind == 3:
            ops.insert(at, pick(rng, PICKLE_OPS))
        elif kind == 4:
            ops[at] = pick(rng, PICKLE_OPS)
        else:
            other = int(rng.integers(len(ops)))
            ops[at], ops[other] = ops[other], ops[at]
        if not ops:
            break
    return b"".join(ops)


PICKLE_OPS = [
    b"r" + struct.pack("<I", 2**31 - 1),  # LONG_BINPUT: a place in the memo, for which room would be made
    b"r" + struct.pack("<I", 2**28),
    b"p2147483000\n",
    b"j" + struct.pack("<I", 2**31),
    b"\x82\x01",  # EXT1
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n",
    b"R", b"b", b"o", b"\x81", b"Q", b"0", b"2", b"(", b"t", b"u", b"s", b"a", b"e", b"}", b"]", b")", b"N", b"\x94",
    b"\x8a\x01\xff",  # -1
    b"\x8a\x08" + struct.pack("<q", 2**62),
    b"K\x00", b"K\x03", b"J" + struct.pack("<i", -5), b"G" + struct.pack(">d", float("nan")),
    b"X" + struct.pack("<I", 7) + b"storage",
    b"X" + struct.pack("<I", 3) + b"a\nb",
    b"\x8e" + struct.pack("<Q", 2**40) + b"few",  # BINBYTES8 of a terabyte
    b"\x96" + struct.pack("<Q", 2**33) + b"few",  # BYTEARRAY8
    b"B" + struct.pack("<I", 2**31) + b"few",
    b"\x95" + struct.pack("<Q", 2**50),  # FRAME
    b"I99999999999999999999\n", b"L" + b"9" * 5000 + b"L\n",
]  # fmt: skip


def zip_archive(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """A zip archive written anew with members changed, renamed, left out, compressed or doubled."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return mutate_bytes(data, rng, others)
    compress = zipfile.ZIP_STORED
    for _ in times(rng, 4):
        if not members:
            break
        at = int(rng.integers(len(members)))
        if chance(rng, 0.5):
            at = next((i for i, (name, _) in enumerate(members) if name.endswith(".pkl")), at)
        name, content = members[at]
        kind = int(rng.integers(8))
        if kind <= 3:
            members[at] = name, (pickle_ops if name.endswith(".pkl") else mutate_bytes)(content, rng)
        elif kind == 4:
            members[at] = pick(rng, [odd_name(rng, OUTSIDE), name + "x", "data.pkl", "x/data.pkl"]), content
        elif kind == 5:
            del members[at]
        elif kind == 6:
            members.append((name, mutate_bytes(content, rng)))
        else:
            compress = zipfile.ZIP_DEFLATED
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compress) as archive:
        for name, content in members:
            try:
                archive.writestr(name, content)
            except Exception:  # a name that zipfile itself does not write
                archive.writestr("x", content)
    return file.getvalue()


def safetensors_header(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """Another header before the same numbers, its length right."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for _ in times(rng, 4):
        meta = header.get("__metadata__")
        if meta and chance(rng, 0.5):
            key = pick(rng, list(meta))
            try:
                meta[key] = json.dumps(mutate_json(json.loads(meta[key]), rng))
            except ValueError:
                meta[key] = pick(rng, WORDS)
        else:
            header = mutate_json(header, rng)
        if not isinstance(header, dict) or not header:
            break
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def png_chunks(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """PNG chunks changed, with their checksums made anew; of the header the sizes, bits and kind."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in times(rng, 4):
        if not chunks:
            break
        place = int(rng.integers(len(chunks)))
        kind, content = chunks[place]
        way = int(rng.integers(7))
        if way == 0 and kind == b"IHDR" and len(content) == 13:
            head = list(struct.unpack(">IIBBBBB", content))
            field = int(rng.integers(7))
            head[field] = abs(pick(rng, NUMBERS)) % (2**32 if field < 2 else 256)
            chunks[place] = kind, struct.pack(">IIBBBBB", *head)
        elif way == 1:
            chunks[place] = kind, mutate_bytes(content, rng, most=2)
        elif way == 2:
            chunks.insert(place, pick(rng, chunks))
        elif way == 3:
            del chunks[place]
        elif way == 4:
            name = pick(rng, [b"tEXt", b"iCCP", b"PLTE", b"tRNS", b"acTL", b"fdAT", b"eXIf", b"IDAT", b"IEND", b"zTXt"])
            chunks.insert(place, (name, rng.bytes(int(rng.integers(40)))))
        elif way == 5 and kind == b"IDAT":
            try:
                chunks[place] = kind, zlib.compress(mutate_bytes(zlib.decompress(content), rng))
            except zlib.error:
                pass
        else:
            chunks[place] = kind, content[: int(rng.integers(len(content) + 1))]
    parts = [data[:8]]
    for kind, content in chunks:
        parts += [struct.pack(">I", len(content)), kind, content, struct.pack(">I", zlib.crc32(kind + content))]
    return b"".join(parts)


def atoms(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """An MP4 or AVI: numbers beside the names of its boxes, where lengths and counts stand."""
    names = [b"moov", b"trak", b"stsz", b"stco", b"stsc", b"stts", b"mdat", b"avcC", b"esds", b"tkhd", b"mdhd", b"elst"]
    names += [
        b"stsd",
        b"mp4v",
        b"RIFF",
        b"LIST",
        b"avih",
        b"strh",
        b"strf",
        b"movi",
        b"idx1",
        b"00dc",
        b"hdlr",
        b"mvhd",
    ]
    result = bytearray(data)
    for _ in times(rng, 5):
        place = result.find(pick(rng, names))
        if place < 0:
            continue
        offset = place + int(rng.integers(-2, 12)) * 4
        size = 4 if chance(rng, 0.8) else 1
        if offset >= 0:
            number = pick(rng, NUMBERS) % (1 << 8 * size)
            result[offset : offset + size] = number.to_bytes(size, pick(rng, ["big", "little"]))
    return bytes(result)


def tar_members(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """A tar written anew: members of strange names, kinds, sizes and headers."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(m, archive.extractfile(m).read() if m.isreg() else b"") for m in archive]
    out = io.BytesIO()
    format = pick(rng, [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    for member, content in members * int(rng.integers(1, 3)):
        if chance(rng, 0.6):
            member = tarfile.TarInfo(odd_name(rng, OUTSIDE))
            member.size = len(content)
        if chance(rng, 0.15):
            kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"S", b"V"]
            member.type = pick(rng, kinds)
            member.linkname = odd_name(rng, OUTSIDE) if chance(rng, 0.5) else pick(rng, members)[0].name
        if chance(rng, 0.1):
            member.size = abs(pick(rng, NUMBERS)) % 8**11
        if chance(rng, 0.1):
            keys = ["size", "path", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.realsize"]
            keys += ["hdrcharset", "linkpath", "mtime", "GNU.sparse.name", "uid"]
            member.pax_headers = {pick(rng, keys): str(odd_value(rng, 3)) for _ in times(rng, 3)}
        try:
            out.write(member.tobuf(format, "utf-8", "surrogateescape"))
        except (ValueError, UnicodeError):
            continue
        out.write(content + b"\0" * (-len(content) % 512))
    out.write(b"\0" * 1024 * int(rng.integers(2)))
    return out.getvalue()


def tar_header(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """Bytes of a member's header changed, and its checksum made anew."""
    result = bytearray(data)
    for _ in times(rng, 3):
        blocks = [at for at in range(0, len(result) - 511, 512) if result[at + 257 : at + 262] == b"ustar"]
        if not blocks:
            break
        at = pick(rng, blocks)
        field, length = pick(
            rng, [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
        )
        head = mutate_bytes(bytes(result[at + field : at + field + length]), rng, most=2)[:length].ljust(length, b"\0")
        result[at + field : at + field + length] = head
        result[at + 148 : at + 156] = b" " * 8
        result[at + 148 : at + 156] = b"%06o\0 " % sum(result[at : at + 512])
    return bytes(result)
