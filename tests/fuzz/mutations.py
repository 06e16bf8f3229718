"""Odd inputs made of good ones: other values, parts missing, repeated or moved, damaged bytes."""

from __future__ import annotations

import copy
import json
import math
import string
import struct
from typing import Any

from hypothesis import strategies as st

LONG = "x" * 300
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    *(0, 1, -1, 2, 3, 7, 10_000, 10**9, 10**18, 10**30, -(10**9)),
    *(0.0, 0.5, -0.5, 0.999, 1.5, 1e-300, 1e300, math.nan, math.inf, -math.inf),
    *("", " ", "x", LONG, "[/x]", "[bold]x[/y]", "a\nb", "a\0b", "\ud800", "\x1b[31m", "nan", "1"),
    *("full", "patch2", "patch1000000000", "grid3", "width50", "patch2_width50", "lora", "shared"),
    *("cfg", "weak", "../up", "/", ".", "~", "owner/name", "pinv", "DiTTransformer2DModel"),
    *([], {}, [[]], [None], [1, 2], [0.5] * 3, ["patch2"], [[1, 2, 2]], {"x": 1}, {"format": 1}),
)
"""Values in the place of others."""

DEEP: Any = "x"
for _ in range(150):
    DEEP = [DEEP]


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything in plain data, the whole first."""
    found = [at]
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            found += places(value, (*at, key))
    return found


def parent_of(data: Any, way: tuple[Any, ...]) -> Any:
    """What holds the thing at the end of a way."""
    for key in way[:-1]:
        data = data[key]
    return data


def edited(data: Any, way: tuple[Any, ...], kind: str, value: Any, other: tuple[Any, ...]) -> Any:
    """Plain data with one change."""
    data = copy.deepcopy(data)
    if not way:
        return value if kind == "set" else data
    holder, key = parent_of(data, way), way[-1]
    if kind == "set":
        holder[key] = value
    elif kind == "drop":
        del holder[key]
    elif kind == "add" and isinstance(holder[key], dict):
        holder[key]["x"] = value
    elif kind == "repeat" and isinstance(holder[key], list):
        holder[key] = holder[key] * 50
    elif kind == "wrap":
        holder[key] = [holder[key]]
    elif kind == "scale" and isinstance(holder[key], int | float):
        holder[key] = holder[key] * value if isinstance(value, int | float) else -holder[key]
    elif kind == "move" and other:
        holder[key] = copy.deepcopy(parent_of(data, other)[other[-1]])
    elif kind == "reverse" and isinstance(holder[key], list):
        holder[key] = holder[key][::-1]
    return data


KINDS = ("set", "set", "set", "drop", "add", "repeat", "wrap", "scale", "move", "reverse")


@st.composite
def mutated(draw: st.DrawFn, data: Any) -> Any:
    """Plain data with one change, or a few: most are refused at the first odd thing."""
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        ways = places(data)
        way, other = draw(st.sampled_from(ways)), draw(st.sampled_from(ways))
        value = draw(st.one_of(st.sampled_from(ODD), st.just(DEEP), st.integers()))
        data = edited(data, way, draw(st.sampled_from(KINDS)), value, other)
    return data


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are missing, others, doubled or new."""
    at = draw(st.integers(0, len(content)))
    kind = draw(st.sampled_from(["cut", "flip", "insert", "double", "skip"]))
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        return content[:at] + draw(st.binary(min_size=1, max_size=3)) + content[at + 1 :]
    if kind == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=20)) + content[at:]
    return content[:at] + content if kind == "double" else content[:at] + content[at + 7 :]


def json_files(data: Any) -> st.SearchStrategy[bytes]:
    """Contents of a JSON file, from good data."""
    text = json.dumps(data).encode()
    return st.one_of(
        mutated(data).map(lambda changed: json.dumps(changed).encode()),
        mutated(data).map(lambda changed: json.dumps(changed).encode()),
        damaged(text),
        st.sampled_from([b"", b"[" * 3000, b"\xff\xfe", b"9" * 5000, b"null", text]),
    )


def toml(data: Any) -> str:
    """Plain data as TOML; what TOML has no form for becomes a text."""
    if isinstance(data, dict):
        pairs = (f"{json.dumps(str(key))} = {toml(value)}" for key, value in data.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(data, list):
        return "[" + ", ".join(map(toml, data)) + "]"
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return json.dumps("none" if data is None else data)


def recipe_text(data: Any) -> str:
    """A recipe as it is written: a line for each entry at the top, inline tables for the others."""
    if not isinstance(data, dict):
        return toml(data)
    return "".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in data.items())


def toml_files(data: Any) -> st.SearchStrategy[bytes]:
    """Contents of a TOML file, from good data."""
    text = recipe_text(data)
    encoded = mutated(data).map(lambda x: recipe_text(x).encode("utf-8", "surrogatepass"))
    deep = b"a = " + b"[" * 3000
    return st.one_of(
        encoded, encoded, damaged(text.encode()), st.sampled_from([b"", deep, text.encode()])
    )


def safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    """Contents of a safetensors file, from a good one: another header, or damaged bytes."""
    length = struct.unpack("<Q", content[:8])[0]
    header, numbers = json.loads(content[8 : 8 + length]), content[8 + length :]

    def joined(changed: Any) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + numbers

    kinds = ["I32", "F16", "BF16", "F64", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "U16", "F32"]
    dtypes = st.sampled_from(kinds).map(
        lambda kind: joined(
            {k: v | {"dtype": kind} if "dtype" in v else v for k, v in header.items()}
        )
    )
    sizes = st.sampled_from([0, 2**63, 2**64 - 1, 10**6]).map(
        lambda size: struct.pack("<Q", size) + content[8:]
    )
    values = st.sampled_from([b"\xff", b"\x7f", b"\x00", b"\x80\x7f"]).map(
        lambda byte: content[: 8 + length] + (byte * len(numbers))[: len(numbers)]
    )
    changed = mutated(header).map(joined)
    return st.one_of(changed, changed, damaged(content), dtypes, sizes, values, st.just(content))


WORDS = (
    *("", "0", "1", "-1", "2", "3", "0.5", "1.5", "nan", "inf", "1e400", "999999999999", "9" * 400),
    *("x", LONG, "[/x]", "[bold]", "a\nb", "\x1b[31m", "ä", "²", "0-9", "0-999999999999", "1,2,x"),
    *("lora", "shared", "mnist", "weak:0.5", "weak:nan", "cfg", "weak", "flexidit", "sparsedit"),
    *("good.json", "bad.json", "folder", "taken/x", "no/such", "recipe.toml", "dit-xl-2-256"),
    *("/dev/null", "/dev/zero", ".", "..", "--", "-", "--help", "loop.images=0", "a=[[", "a.b.c=1"),
)
"""Arguments of commands that may be wrong anywhere."""

TEXTS = st.text(string.printable, max_size=12)


@st.composite
def arguments(
    draw: st.DrawFn, good: dict[str, dict[str, str]], options: dict[str, list[str]]
) -> Any:
    """A command line: a command's good arguments, some of them others, missing or repeated.

    Args:
        good: of each command, what makes it quick, by option; a name without dashes is a place.
        options: all that each command has.
    """
    name = draw(st.sampled_from(sorted(good)))
    found = dict(good[name])
    for _ in range(draw(st.integers(1, 3))):
        option = draw(st.sampled_from(options[name]))
        found[option] = draw(st.one_of(st.sampled_from(WORDS), TEXTS))
    if draw(st.integers(0, 9)) == 0:
        found.pop(draw(st.sampled_from(sorted(found))), None)
    words = [name]
    for option, value in found.items():
        flag = option.startswith("--")
        words += [option] if flag and value == "" else [option, value] if flag else [value]
    if draw(st.integers(0, 9)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(st.sampled_from(WORDS)))
    return words
