"""Damage to files and folders. It writes new files, since old ones may be links to good ones."""

import contextlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entangle.model import folders

OTHER: tuple[Any, ...] = (  # values of other types and sizes
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 0.5, 1e300, float("nan")),
    *(float("inf"), "", "a", "llama", "gpt2", "0", "½ \x00", "x" * 3000, [], [1], ["a"], [[]], {}),
    *({"a": 1}, [None, "a", 2]),
)
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "one character": b"a",
    "one space": b" ",
    "line ends only": b"\r\n" * 400,
    "zeros": b"\0" * 2000,
    "binary": random.Random(0).randbytes(4000),
    "not UTF-8": "Größe ".encode("latin-1") * 300,
    "cut in a character": ("Größe " * 300).encode()[:-3] + b"\xc3",
    "UTF-16": ("Grosse " * 300).encode("utf-16"),
    "a BOM": b"\xef\xbb\xbf" + b"some words here " * 100,
    "one line": b"a" * 100_000,
    "surrogates": b"\xed\xa0\x80" * 300,
    "controls": bytes(range(1, 32)) * 60,
    "other letters": "שלום 你好 🙂 \u202e".encode() * 60,
    "the same letter": b"e" * 900,
}


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file, or a file of a folder or the folder itself; return what was done."""
    if path.is_dir() and rng.random() < 0.85:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        top = [file for file in files if file.parent == path]
        if files:
            path = rng.choice(top if top and rng.random() < 0.7 else files)
    ways: list[Callable[[Path, random.Random], str]] = [_gone, _replaced]
    if path.is_file():
        ways += [_cut, _flipped, _garbage, _longer]
        ways += {".json": [_json] * 12, ".safetensors": [_tensors] * 9, ".txt": [_text] * 12}.get(
            path.suffix, []
        )
    name = f"{path.parent.name}/{path.name}"
    return f"{name}: {rng.choice(ways)(path, rng)}"


def write(file: Path, data: bytes) -> None:
    """Write a file that shares no bytes with another name of the old one."""
    remove(file)
    file.write_bytes(data)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _gone(path: Path, rng: random.Random) -> str:
    remove(path)
    return "removed"


def _replaced(path: Path, rng: random.Random) -> str:
    """Put something of another kind in its place."""
    was_folder = path.is_dir()
    remove(path)
    kind = rng.choice(["loop", "dangling", "empty folder", "file"])
    if kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "file" and was_folder:
        path.write_bytes(b"a file")
    else:
        path.mkdir()
    return f"replaced by: {kind}"


def _cut(file: Path, rng: random.Random) -> str:
    data = file.read_bytes()
    length = rng.choice([0, 1, len(data) // 2, max(len(data) - 1, 0), rng.randint(0, len(data))])
    write(file, data[:length])
    return f"cut to {length} of {len(data)} bytes"


def _flipped(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 1, 20]))] if data else []
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    write(file, bytes(data))
    return f"bits flipped at {places}"


def _garbage(file: Path, rng: random.Random) -> str:
    write(file, rng.randbytes(rng.choice([1, 9, 4000])))
    return "random bytes"


def _longer(file: Path, rng: random.Random) -> str:
    write(file, file.read_bytes() + rng.choice([b"\0", b"\n", b"}", b"x" * 99]))
    return "longer"


def _text(file: Path, rng: random.Random) -> str:
    kind = rng.choice(list(TEXTS))
    write(file, TEXTS[kind])
    return f"text of {kind}"


def _json(file: Path, rng: random.Random) -> str:
    """Damage JSON as JSON: wrong types, missing keys, too deep, not UTF-8."""
    kind = rng.choice(["value"] * 6 + ["key"] * 3 + ["top", "deep", "encoding", "twice"])
    data = file.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # damaged before
        return _garbage(file, rng)
    if kind in {"value", "key"} and isinstance(content, dict):
        said = _edit(content, rng, delete=kind == "key")
        write(file, json.dumps(content, indent=2).encode("utf-8", "surrogatepass"))
        _seal(file, rng)
        return said
    if kind == "deep":
        write(file, b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    elif kind == "encoding":
        write(file, rng.choice([data.decode().encode("utf-16"), b"\xef\xbb\xbf" + data, b"\xff"]))
    elif kind == "twice":
        write(file, data + data)
    else:
        write(file, json.dumps(rng.choice(OTHER)).encode())
    return f"JSON: {kind}"


def _edit(content: dict[str, Any], rng: random.Random, *, delete: bool) -> str:
    """Change or delete one value, at any depth."""
    inside: Any = content
    names: list[str] = []
    while True:
        keys = list(inside) if isinstance(inside, dict) else range(len(inside))
        if not keys:
            return "nothing"
        key = rng.choice(list(keys)[:40])
        names.append(str(key))
        if not isinstance(inside[key], dict | list) or not inside[key] or rng.random() < 0.4:
            break
        inside = inside[key]
    name = ".".join(names)
    if delete:
        del inside[key]
        return f"JSON without {name}"
    inside[key] = rng.choice(OTHER)
    return f"JSON with {name} = {str(inside[key])[:40]!r}"


def _seal(file: Path, rng: random.Random) -> None:
    """Let the sums of a run agree with its run.json again, as another program would write it."""
    log = file.with_name("log.json")
    if file.name != "run.json" or not log.is_file() or rng.random() < 0.6:
        return
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(log.read_bytes())
        if isinstance(content, dict) and isinstance(content.get("files"), dict):
            content["files"] |= folders.sums(file.parent, ["run.json"])
            write(log, json.dumps(content).encode())


def _tensors(file: Path, rng: random.Random) -> str:
    """Damage a file of tensors as such: names, shapes, types, values, places in the file."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
        name = rng.choice([name for name in header if name != "__metadata__"])
    except (ValueError, IndexError):  # damaged before
        return _garbage(file, rng)
    one, kind = header[name], rng.choice(
        ["missing", "renamed", "shape", "type", "places", "NaN", "zeros", "huge", "size", "empty"]
    )  # fmt: skip
    begin, end = one["data_offsets"]
    if kind == "missing":
        del header[name]
    elif kind == "renamed":
        header[name + "x"] = header.pop(name)
    elif kind == "shape":
        one["shape"] = rng.choice([[], [1], one["shape"][::-1], [*one["shape"], 1], [2**62, 4]])
    elif kind == "type":
        one["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "I8", "U8", "BOOL", "F8_E4M3", "Q"])
    elif kind == "places":
        one["data_offsets"] = rng.choice(
            [[0, 4], [end, begin], [0, 2**60], [-4, 4], [begin, end + 4]]
        )
    elif kind in {"NaN", "zeros", "huge"} and (end - begin) % 4 == 0:
        value = {"NaN": float("nan"), "zeros": 0.0, "huge": 1e38}[kind]
        body[begin:end] = struct.pack("<f", value) * ((end - begin) // 4)
    elif kind == "empty":
        header, body = {}, bytearray()
    text = json.dumps(header).encode()
    length = rng.choice([0, 1, 2**63, len(text) + 5]) if kind == "size" else len(text)
    write(file, struct.pack("<Q", length) + text + body)
    return f"tensor {name}: {kind}"
