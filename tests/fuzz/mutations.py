"""Changes to inputs: of any bytes, and of what is inside JSON, safetensors, pickles, archives and images."""

import copy
import hashlib
import io
import json
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Sequence
from random import Random
from typing import Any

# What a field may hold instead of what belongs there. Text that JSON cannot be made of is put in by `_dumped`.
_HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**53, 2**63, 10**18, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"),
    "", "a" * 3000, "\x1b[2J\x1b]0;x\x07", "\udc80", "\u202egnp", "../../x", "/etc/passwd", "__class__.x", "forward",
    "0", "os:system", "squeezenet1_1", "resnet18", "fasterrcnn_resnet50_fpn", "%s{0}{x}", [], {}, [[]], [0] * 1000,
    [-1, 3], {"a": 1}, "@HUGE@", "@DEEP@", "@TWICE@",
]  # fmt: skip
_BYTES = [
    b"\0",
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\x80",
    b"PK\x03\x04",
    b"{",
    b"\n",
    b",",
    b'"',
    b"nan",
    b"-1",
    b"9" * 40,
]
_GLOBALS = [
    b"cos\nsystem\n",
    b"cposix\nsystem\n",
    b"cbuiltins\neval\n",
    b"cos\nmkdir\n",
    b"ctorch\nload\n",
    b"cnumpy\nload\n",
]
_CALL = b"(X\x08\x00\x00\x00sentineltR."


def raw(data: bytes, random: Random, corpus: Sequence[bytes]) -> bytes:
    """Flipped bits, cut, doubled, overwritten or foreign pieces."""
    changed = bytearray(data or b"\0")
    place = random.randrange(len(changed))
    length = random.choice((1, 2, 4, 8, 64, len(changed)))
    kind = random.randrange(7)
    if kind == 0:
        changed[place] ^= 1 << random.randrange(8)
    elif kind == 1:
        changed[place] = random.randrange(256)
    elif kind == 2:
        del changed[place:]
    elif kind == 3:
        del changed[place : place + length]
    elif kind == 4:
        changed[place:place] = changed[place : place + length]
    elif kind == 5:
        piece = random.choice(_BYTES)
        changed[place : place + random.choice((0, len(piece)))] = piece
    else:
        other = random.choice(corpus)
        start = random.randrange(len(other) + 1)
        changed[place : place + length] = other[start : start + length]
    return bytes(changed)


def json_text(data: bytes, random: Random, corpus: Sequence[bytes]) -> bytes:
    """Another value, name or nesting somewhere in the document."""
    try:
        return _dumped(_changed(json.loads(data), random), random)
    except (ValueError, RecursionError):
        return raw(data, random, corpus)


def safetensors(data: bytes, random: Random, corpus: Sequence[bytes]) -> bytes:
    """Another header, or another record in it under a seal that fits."""
    try:
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        sealed = header["__metadata__"]["bnsurgery"] if random.random() < 0.85 else ""
        if isinstance(sealed, str) and sealed:
            record = json_text(sealed.partition(" ")[2].encode(errors="replace"), random, corpus).decode(
                errors="replace"
            )
            header["__metadata__"]["bnsurgery"] = f"{hashlib.sha256(record.encode()).hexdigest()} {record}"
            text = json.dumps(header).encode()
        else:
            text = _dumped(_changed(header, random), random)
    except (ValueError, RecursionError, KeyError, TypeError):
        return raw(data, random, corpus)
    return struct.pack("<Q", len(text)) + text + body


def pickled(data: bytes, random: Random, corpus: Sequence[bytes]) -> bytes:
    """Opcodes left out, doubled or swapped, and calls of what is no tensor."""
    try:
        places = [place for _, _, place in pickletools.genops(data) if place is not None]
    except Exception:  # a damaged pickle makes it raise just about anything
        return raw(data, random, corpus)
    end = data.find(b".", places[-1]) + 1
    ops = [data[a:b] for a, b in zip(places, [*places[1:], end], strict=True)]
    at = random.randrange(len(ops))
    kind = random.randrange(5)
    if kind == 0:
        del ops[at]
    elif kind == 1:
        ops[at:at] = ops[at : at + random.choice((1, 3, 10))]
    elif kind == 2:
        other = random.randrange(len(ops))
        ops[at], ops[other] = ops[other], ops[at]
    elif kind == 3:
        ops.insert(
            at, random.choice([*_GLOBALS, b"R", b"b", b"\x81", b"Q", b"P0\n", b"\x82\x01", b"I999999999999\n", b"}"])
        )
    else:
        ops[at:] = [random.choice(_GLOBALS), _CALL]
    return b"".join(ops) + data[end:]


def archive(data: bytes, random: Random, corpus: Sequence[bytes]) -> bytes:
    """A zip file with an entry changed, renamed, doubled or compressed; sometimes the pickle in it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            entries = [(info.filename, old.read(info)) for info in old.infolist()]
    except Exception:  # a damaged archive makes it raise just about anything
        return raw(data, random, corpus)
    if not entries:
        return raw(data, random, corpus)
    at = random.randrange(len(entries))
    name, content = entries[at]
    kind = random.randrange(6)
    if kind < 2:
        at, (name, content) = next(
            (i, e) for i, e in enumerate(entries) if e[0].endswith(".pkl") or i == len(entries) - 1
        )
        entries[at] = name, pickled(content, random, corpus)
    elif kind == 2:
        entries[at] = name, raw(content, random, corpus)
    elif kind == 3:
        entries[at] = random.choice(["../x", "/x", "a/constants.pkl", "x\0y", "", name * 20]), content
    elif kind == 4:
        entries[at] = name, content + bytes(random.choice((64, 2**16, 2**22)))
    else:
        del entries[at]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as new:
        for name, content in entries:
            new.writestr(zipfile.ZipInfo(name), content, new.compression)
    return buffer.getvalue()


def weights(data: bytes, random: Random, corpus: Sequence[bytes]) -> bytes:
    """By what the file is; a quarter of the time as plain bytes."""
    kinds = {b"PK": archive, b"\x80": pickled, b"{": safetensors}
    kind = next((kinds[start] for start in kinds if start in (data[:2], data[:1], data[8:9])), raw)
    return (kind if random.random() < 0.75 else raw)(data, random, corpus)


def image(data: bytes, random: Random, corpus: Sequence[bytes]) -> bytes:
    """A PNG's chunk changed under a checksum that fits; other formats as plain bytes."""
    if not data.startswith(b"\x89PNG") or random.random() < 0.3:
        return raw(data, random, corpus)
    chunks, place = [], 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return raw(data, random, corpus)
    at = random.randrange(len(chunks))
    kind, content = chunks[at]
    chunks[at : at + random.randrange(2)] = [(kind, raw(content, random, corpus))]
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return data[:8] + b"".join(parts)


def table(data: bytes, random: Random, corpus: Sequence[bytes]) -> bytes:
    """Another cell in a CSV file."""
    lines = [line.split(b",") for line in data.split(b"\n")]
    line = random.choice(lines)
    cell = random.choice(
        [b"", b"nan", b"inf", b"-1", b"1e999", b"9" * 5000, b"\xff", b'"', b"x" * 200_000, b"\0", b"1_0"]
    )
    line[random.randrange(len(line))] = cell
    return b"\n".join(map(b",".join, lines)) if random.random() < 0.8 else raw(data, random, corpus)


def arguments(data: bytes, random: Random, corpus: Sequence[bytes]) -> bytes:
    """Words left out, doubled, swapped, or taken from other commands. No bit flips: a path might leave the folder."""
    words = data.split(b"\0")
    at = random.randrange(len(words))
    kind = random.randrange(5)
    if kind == 0:
        del words[at]
    elif kind == 1:
        words.insert(at, random.choice(words))
    elif kind == 2:
        words[at] = random.choice(_WORDS)
    elif kind == 3:
        words[at] += random.choice([b"\x1b[2J", b"\xff", b"=", b":", b"-", b"x" * 5000, b"%", b",,"])
    else:
        words.insert(at, random.choice(random.choice(corpus).split(b"\0")))
    return b"\0".join(words)


_WORDS = [
    b"", b"-", b"--", b"-1", b"0", b"1", b"1e400", b"nan", b"1" * 30, b"9" * 5000, b"..", b".", b"missing",
    b"\xff\xfe.pt", b"net.safetensors", b"evil.pt", b"evil.png", b"pipe", b"loop", b"run", b"photo.png", b"photos",
    b"samples", b"--json", b"--force", b"--model", b"os:system", b"evil.pt:x", b"timm:x", b"::", b"--weights",
    b"--data", b"vgg16_bn", b"--device", b"cuda:99", b"meta", b"\x1b]0;x\x07",
]  # fmt: skip


def _changed(document: Any, random: Random) -> Any:
    """The document with one node replaced, removed, renamed or wrapped; nodes at the leaves are as likely as others."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(document)
    if not places:
        return copy.deepcopy(random.choice(_HOSTILE))
    node, key = random.choice(places)
    kind = random.randrange(6)
    if kind < 3:
        node[key] = copy.deepcopy(random.choice(_HOSTILE))
    elif kind == 3:
        del node[key]
    elif kind == 4:
        other, name = random.choice(places)
        node[key] = json.loads(json.dumps(other[name])) if other is not node else [node[key]]
    elif isinstance(node, dict):
        node[str(random.choice(_HOSTILE))] = node.pop(key)
    else:
        node.extend(node)
    return document


def _dumped(document: Any, random: Random) -> bytes:
    text = json.dumps(document)
    for mark, written in (
        ("@HUGE@", random.choice(("9" * 5000, "1e999", "-" + "9" * 400))),
        ("@DEEP@", "[" * (depth := random.choice((50, 900, 50_000))) + "]" * depth),
        ("@TWICE@", '{"a": 1, "a": 2}'),
    ):
        text = text.replace(f'"{mark}"', written, 1)
    return text.encode()
