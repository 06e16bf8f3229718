"""The house in numbers: sizes of files, functions and classes, and how much of it is explained.

``python scripts/house.py`` prints what it measured and fails where a limit is broken. Sizes are
read from the source alone; the names that a class inherits are counted along its bases, for which
the package is imported.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import inspect
import io
import json
import statistics
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "ditdial"
SHOWN = 5
"""Entries that the report lists of each kind."""

CLASS_LIMITS = {"ditdial.backbones.base.Backbone": 30}
"""Classes with a limit of their own, which their subclasses share: a backbone declares facts."""

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
"""Kinds of token that do not make a line a line of code."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What can still be read with pleasure.

    Attributes:
        root_files: Python files that lie beside the rooms.
        file_lines: lines of a source file.
        function_lines: lines of a function, from its ``def`` to its end, docstring included.
        function_lines_p95: the length that 95 of 100 functions do not exceed.
        class_names: public methods and properties of a class, those of its bases included.
    """

    root_files: int = 8
    file_lines: int = 400
    function_lines: int = 60
    function_lines_p95: int = 30
    class_names: int = 20


class Source:
    """One source file, parsed.

    Args:
        file: the file.
        name: the dotted name of its module.
    """

    def __init__(self, file: Path, name: str):
        self.name, self.text = name, file.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.lines = len(self.text.splitlines())
        self.tokens = list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    def comments(self) -> int:
        """How many comments it has, those behind code included."""
        return sum(token.type == tokenize.COMMENT for token in self.tokens)

    def code_lines(self) -> int:
        """Lines that are neither blank nor a comment nor part of a docstring."""
        code: set[int] = set()
        for token in self.tokens:
            if token.type not in LAYOUT:
                code.update(range(token.start[0], token.end[0] + 1))
        for node in [self.tree, *(node for node, _ in definitions(self.tree, self.name))]:
            code.difference_update(docstring_lines(node))
        return len(code)

    def functions(self) -> Iterator[tuple[str, int]]:
        """Name and length of each function, nested ones as well; decorators do not count."""
        for node, name in definitions(self.tree, self.name):
            if isinstance(node, Function):
                yield name, (node.end_lineno or node.lineno) - node.lineno + 1

    def documentation(self) -> Iterator[int]:
        """Lines of the docstring of each public module, class and function; 0 where it has none."""
        outside = definitions(self.tree, self.name, inside_functions=False)
        for node, name in [(self.tree, self.name), *outside]:
            if not any(part.startswith("_") for part in name.split(".")):
                yield len(docstring_lines(node))


def docstring_lines(node: Definition | ast.Module) -> range:
    """Numbers of the lines that the docstring of a module, class or function takes."""
    if ast.get_docstring(node) is None:
        return range(0)
    return range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)


def definitions(
    tree: ast.AST, prefix: str, *, inside_functions: bool = True
) -> Iterator[tuple[Definition, str]]:
    """Classes and functions below a node with their dotted names."""
    for node in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(node, Definition):
            name = f"{prefix}.{node.name}"
            yield node, name
        if inside_functions or not isinstance(node, Function):
            yield from definitions(node, name, inside_functions=inside_functions)


def read(package: Path) -> dict[str, Source]:
    """All source files of a package by their path inside it."""
    sources = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[str(file.relative_to(package))] = Source(file, name)
    return sources


def classes(sources: Iterable[Source]) -> Iterator[type]:
    """Classes at the top level of the modules; ``__main__`` is left out, an import would run it."""
    for source in sources:
        if not source.name.endswith(".__main__"):
            for value in vars(importlib.import_module(source.name)).values():
                if inspect.isclass(value) and value.__module__ == source.name:
                    yield value


def public_names(cls: type) -> tuple[str, set[str], int]:
    """A class's dotted name, its public names and how many it may have.

    Names are those of the methods and properties that its body defines, and the same of each base
    of the same package; what torch, diffusers or the standard library add is not ours to keep
    small.
    """
    package = cls.__module__.split(".")[0]
    ours = [base for base in cls.__mro__ if base.__module__.split(".")[0] == package]
    found = {name for base in ours for name, value in vars(base).items() if _is_offered(value)}
    called = [f"{base.__module__}.{base.__qualname__}" for base in ours]
    own_limits = [CLASS_LIMITS[name] for name in called if name in CLASS_LIMITS]
    public = {name for name in found if not name.startswith("_")}
    return called[0], public, max(own_limits, default=Limits().class_names)


def _is_offered(value: object) -> bool:
    """Whether a class member is a method or a property; fields are its state, not its offers."""
    kinds = (property, classmethod, staticmethod, functools.cached_property)
    return inspect.isroutine(value) or isinstance(value, kinds)


def quantile_95(lengths: Iterable[int]) -> int:
    """The smallest of the lengths that at least 95 of 100 do not exceed."""
    ordered = sorted(lengths)
    return ordered[-(-len(ordered) * 95 // 100) - 1]


def measure(package: Path) -> dict[str, Any]:
    """All numbers of a package; lists of things with their sizes are sorted, largest first."""
    sources = read(package)
    lines = sum(source.lines for source in sources.values())
    comments = sum(source.comments() for source in sources.values())
    documentation = [size for source in sources.values() for size in source.documentation()]
    functions = [function for source in sources.values() for function in source.functions()]
    lengths = [length for _, length in functions] or [0]
    named = [public_names(cls) for cls in classes(sources.values())]
    return {
        "root_files": sorted(file for file in sources if "/" not in file),
        "files": _largest((file, source.lines) for file, source in sources.items()),
        "functions": _largest(functions),
        "classes": _largest((name, len(names), limit) for name, names, limit in named),
        "file_lines_median": statistics.median(source.lines for source in sources.values()),
        "function_lines_median": statistics.median(lengths),
        "function_lines_p95": quantile_95(lengths),
        "lines": lines,
        "code_lines": sum(source.code_lines() for source in sources.values()),
        "public_names": len(documentation),
        "docstring_lines_per_public_name": statistics.mean(documentation),
        "comments_per_100_lines": 100 * comments / lines,
    }


def _largest(sized: Iterable[tuple]) -> list[tuple]:
    return sorted(sized, key=lambda entry: (-entry[1], entry[0]))


def broken(found: dict[str, Any], limits: Limits) -> list[str]:
    """A sentence for each limit that the numbers break."""
    told = []
    for what, size, limit in [
        ("files at the root of the package", len(found["root_files"]), limits.root_files),
        ("95th percentile of lines", found["function_lines_p95"], limits.function_lines_p95),
        *((f"lines of {name}", size, limits.file_lines) for name, size in found["files"]),
        *((f"lines of {name}()", size, limits.function_lines) for name, size in found["functions"]),
        *((f"public names of {name}", size, limit) for name, size, limit in found["classes"]),
    ]:
        if size > limit:
            told.append(f"{what} = {size}; legal: at most {limit}")
    return told


def report(found: dict[str, Any], limits: Limits) -> str:
    """The numbers as text."""
    files, functions = found["files"], found["functions"]
    p95, median = found["function_lines_p95"], found["function_lines_median"]
    blocks = {
        f"{len(files)} files, median {found['file_lines_median']:.0f} lines "
        f"(limit {limits.file_lines})": files,
        f"{len(functions)} functions, median {median:.0f} lines, 95th percentile {p95} "
        f"(limit {limits.function_lines_p95}), longest (limit {limits.function_lines})": functions,
        f"{len(found['classes'])} classes, public names "
        f"(limit {limits.class_names} unless said)": found["classes"],
    }
    lines = [
        f"{found['lines']} lines, {found['code_lines']} of code",
        f"{found['docstring_lines_per_public_name']:.2f} docstring lines for each of "
        f"{found['public_names']} public names",
        f"{found['comments_per_100_lines']:.2f} comments in 100 lines",
        f"{len(found['root_files'])} files at the root (limit {limits.root_files}): "
        + ", ".join(found["root_files"]),
    ]
    for title, entries in blocks.items():
        lines.append(title)
        lines += [f"  {size:4d}  {name}" for name, size, *_ in entries[:SHOWN]]
    return "\n".join(lines)


def main() -> int:
    """Print the numbers; 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description="The house in numbers.")
    parser.add_argument("--package", type=Path, default=PACKAGE, help="the package's folder")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    package = options.package.resolve()
    sys.path.insert(0, str(package.parent))
    limits = Limits()
    found = measure(package)
    told = broken(found, limits)
    if options.json:
        print(json.dumps({**found, "limits": asdict(limits), "broken": told}, indent=1))
    else:
        print(report(found, limits))
    for sentence in told:
        print(sentence, file=sys.stderr)
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
