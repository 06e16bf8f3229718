"""The architecture as pictures, drawn from the code.

``python scripts/architecture.py`` reads the order of the rooms from ``pyproject.toml``, the imports
between them and the first words of each room from the code, and follows two ways through it: one
call of an elastic model, and the way from `ditdial.elastify.elastify` to the place where a coarse
patch is embedded. It writes three drawings into ``docs/images`` and the text between the markers of
``docs/architecture.md``. ``--check`` writes nothing and fails if one of them is not what it would
write. Either fails if a function of the ways, or a call between two of them, is no longer there.
"""

from __future__ import annotations

import argparse
import ast
import html
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "ditdial"
PAGE = "docs/architecture.md"
MARKED = re.compile(r"(?<=<!-- rooms -->\n).*?(?=<!-- /rooms -->)", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """A function on a way through the code, and how the one before it gets there.

    Args:
        number: of the sentence that explains it in the page; 0 for what is not ours.
        file: in the package; empty for what is not ours.
        name: of the function in its file, with the classes and functions that it stands in.
        caller: name of an earlier step; None for the first one.
        call: what the caller says to call it, or to hand it on; empty where torch or diffusers call
            it.
        about: what it does; the first line of its docstring unless given.
    """

    number: int
    file: str
    name: str
    caller: str | None = None
    call: str = ""
    about: str = ""


STOCK = "the stock forward"

CALL = (
    Step(0, "", "pipe(...)", about="The stock pipeline of diffusers calls its transformer."),
    Step(1, "runtime/model_class.py", "_forward_of.forward", "pipe(...)"),
    Step(2, "runtime/engine.py", "Engine.run", "_forward_of.forward", "engine.run"),
    Step(3, "runtime/engine.py", "Engine._choose_and_run", "Engine.run", "self._choose_and_run"),
    Step(
        4,
        "runtime/engine.py",
        "Engine._conditional",
        "Engine._choose_and_run",
        "self._conditional",
    ),
    Step(5, "runtime/engine.py", "Engine._decide", "Engine._conditional", "self._decide"),
    Step(5, "runtime/chooser.py", "Chooser.decide", "Engine._decide", "self.chooser.decide"),
    Step(6, "runtime/pictures.py", "run_groups", "Engine._conditional", "run_groups"),
    Step(6, "runtime/guidance.py", "run_batch", "Engine._conditional", "run_batch"),
    Step(7, "runtime/forward_pass.py", "ForwardPass.run", "Engine._conditional", "self.passes.run"),
    Step(8, "runtime/compiled.py", "Compiled.run", "ForwardPass.run", "self.compiled.run"),
    Step(0, "", STOCK, "Compiled.run", "forward", "Of the diffusers class, which is not copied."),
    Step(9, "layers/tokens.py", "EmbedSeam.forward", STOCK),
    Step(9, "layers/low_rank.py", "LowRankSeam.forward", STOCK),
    Step(9, "layers/tokens.py", "OutputSeam.forward", STOCK),
    Step(10, "runtime/costs.py", "Costs.record", "Engine._conditional", "self.costs.record"),
)
"""One call of an elastic model."""

IDEA = (
    Step(1, "elastify.py", "elastify"),
    Step(2, "runtime/model_class.py", "make_elastic", "elastify", "make_elastic"),
    Step(2, "runtime/model_class.py", "install", "make_elastic", "install"),
    Step(3, "runtime/surgery.py", "Surgery.install", "install", "surgery.install"),
    Step(3, "runtime/surgery.py", "Surgery._swaps", "Surgery.install", "self._swaps"),
    Step(4, "layers/tokens.py", "EmbedSeam.forward", "Surgery._swaps", "EmbedSeam"),
    Step(5, "methods/projections.py", "OwnProjections.embed", "EmbedSeam.forward", "new.embed"),
)
"""From the one verb to the place where a coarse patch is embedded."""


@dataclass(frozen=True)
class Room:
    """A folder or a file at the root of the package.

    Args:
        name: in the package.
        level: number of its layer; rooms of one level know nothing of each other.
        about: its docstring.
        knows: the rooms that it imports.
    """

    name: str
    level: int
    about: str
    knows: frozenset[str]

    @property
    def title(self) -> str:
        """The first line of its docstring, without code marks."""
        return re.sub("`+", "", self.about.splitlines()[0])

    @property
    def path(self) -> str:
        """Where it lies, as its docstring would say it."""
        return f"{self.name}.py" if (PACKAGE / f"{self.name}.py").is_file() else f"{self.name}/"


def layers(pyproject: str) -> list[list[str]]:
    """The rooms of each layer, from the top down, as the contract of import-linter has them."""
    contracts = tomllib.loads(pyproject)["tool"]["importlinter"]["contracts"]
    (rooms,) = (each["layers"] for each in contracts if each["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in rooms]


def rooms(root: Path = ROOT) -> list[Room]:
    """The rooms from the top down, with the imports between them."""
    package = root / "src" / "ditdial"
    sys.path.insert(0, str(package.parent))
    graph = grimp.build_graph(package.name, cache_dir=None)
    knows: dict[str, set[str]] = {}
    for module in graph.modules - {package.name}:
        own = module.split(".")[1]
        for known in graph.find_modules_directly_imported_by(module) - {package.name}:
            knows.setdefault(own, set()).add(known.split(".")[1])
    found = []
    for level, names in enumerate(layers((root / "pyproject.toml").read_text(encoding="utf-8"))):
        for name in names:
            file = package / name / "__init__.py"
            file = file if file.is_file() else package / f"{name}.py"
            about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            known = frozenset(knows.get(name, set()) - {name})
            found.append(Room(name, level, about, known))
    return found


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Functions and classes below a node, nested ones too, by their names in the file."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name, node
            yield from definitions(node, f"{prefix}{node.name}.")


def follow(way: Sequence[Step], package: Path = PACKAGE) -> list[str]:
    """What each function of a way does, in the first line of its docstring.

    Raises:
        ValueError: a function, or a call between two of them, that is not there.
    """
    known: dict[str, ast.AST] = {}
    told = []
    for step in way:
        found: dict[str, ast.AST] = {}
        if step.file:
            tree = ast.parse((package / step.file).read_text(encoding="utf-8"))
            found = dict(definitions(tree))
            if step.name not in found:
                raise ValueError(f"{step.file} has no {step.name}; the way must be written anew")
            known[step.name] = found[step.name]
        if step.call and step.caller is not None:
            _check_call(step, known[step.caller])
        told.append(step.about or _first_line(found, step.name))
    return told


def _check_call(step: Step, caller: ast.AST) -> None:
    names = (ast.Name, ast.Attribute)
    says = {ast.unparse(node) for node in ast.walk(caller) if isinstance(node, names)}
    leads = not step.file or step.call.rpartition(".")[2] in step.name.split(".")
    if step.call not in says or not leads:
        raise ValueError(
            f"{step.caller} does not lead to {step.name} by {step.call}; the way must be written "
            "anew"
        )


def _first_line(found: dict[str, ast.AST], name: str) -> str:
    """Of a function's docstring, or of that of the function which makes it."""
    while name:
        node = found[name]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if about := ast.get_docstring(node):
            return re.sub("`+", "", about.splitlines()[0])
        name = name.rpartition(".")[0]
    raise ValueError("a function of a way has no docstring; legal: one that says what it does")


INK, PALE, LINE, ALARM = "#1f2933", "#5b6773", "#c8d1da", "#c0392b"
FILLS = ("#eef3f8", "#ffffff")
FONT = "font-family='Helvetica, Arial, DejaVu Sans, sans-serif'"
CODE = "font-family='DejaVu Sans Mono, Menlo, Consolas, monospace'"


def text(x: float, y: float, said: str, *, size: float = 12, ink: str = INK, more: str = "") -> str:
    """A line of text that begins at a point."""
    style = more if "font-family" in more else f"{FONT} {more}".strip()
    said = html.escape(said, quote=False)
    return f"<text x='{x:g}' y='{y:g}' font-size='{size:g}' fill='{ink}' {style}>{said}</text>"


def box(x: float, y: float, width: float, height: float, fill: str, line: str = "none") -> str:
    """A rectangle."""
    sides = f"width='{width:g}' height='{height:g}'"
    return f"<rect x='{x:g}' y='{y:g}' {sides} rx='4' fill='{fill}' stroke='{line}'/>"


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A drawing on white, so that it can be read on a dark page too."""
    size = f"width='{width:g}' height='{height:g}' viewBox='0 0 {width:g} {height:g}'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img'>"
    return "\n".join(
        [head, f"<title>{title}</title>", box(0, 0, width, height, "#ffffff"), *parts, "</svg>", ""]
    )


def draw_rooms(found: Sequence[Room]) -> str:
    """The rooms, one above the other, and a dot where one imports another.

    A dot stands in the row of the room that imports and in the column of the one that is imported.
    All dots are right of the diagonal as long as imports go down.
    """
    row, cell, left, top = 34, 20, 525, 96
    width, height = left + cell * len(found) + 40, top + row * len(found) + 34
    parts = [
        text(16, 28, "The rooms of ditdial", size=16, more="font-weight='bold'"),
        text(16, 48, "Each may import the rooms below it, and no other.", ink=PALE),
        text(16, 64, "A dot: the room of this row imports the room of this column.", ink=PALE),
    ]
    for i, room in enumerate(found):
        y, x = top + i * row, left + i * cell
        parts.append(box(8, y + 1, width - 16, row - 2, FILLS[room.level % 2]))
        parts.append(text(16, y + 14, room.path, more=f"font-weight='bold' {CODE}"))
        parts.append(text(16, y + 28, room.title, size=10.5, ink=PALE))
        turn = f"transform='rotate(-55 {x + 12:g} {top - 8:g})'"
        parts.append(text(x + 12, top - 8, room.name, size=11, more=f"{turn} {FONT}"))
    for i, room in enumerate(found):
        parts.append(box(left + i * cell + 4, top + i * row + 11, 12, 12, LINE))
        for j, other in enumerate(found):
            if other.name in room.knows:
                cx, cy = left + j * cell + 10, top + i * row + 17
                ink = INK if j > i else ALARM
                parts.append(f"<circle cx='{cx:g}' cy='{cy:g}' r='4.5' fill='{ink}'/>")
    source = "drawn from pyproject.toml and the imports by scripts/architecture.py"
    parts.append(text(16, height - 12, source, size=10, ink=PALE))
    return svg(width, height, "The rooms of ditdial and the imports between them", parts)


def draw_way(way: Sequence[Step], told: Sequence[str], title: str, about: str) -> str:
    """The functions of a way in their order, each under the one that calls it.

    Args:
        told: what each of them does.
    """
    row, top, indent, wide = 42, 64, 32, 500
    depth: dict[str, int] = {}
    for step in way:
        depth[step.name] = 0 if step.caller is None else depth[step.caller] + 1
    width, height = 64 + indent * max(depth.values()) + wide, top + row * len(way) + 30
    parts = [text(16, 26, title, size=16, more="font-weight='bold'"), text(16, 46, about, ink=PALE)]
    middle = {step.name: top + i * row + 18 for i, step in enumerate(way)}
    for i, (step, said) in enumerate(zip(way, told, strict=True)):
        x, y = 48 + indent * depth[step.name], top + i * row
        if step.caller is not None:
            from_x, from_y = 48 + indent * depth[step.caller] + 14, middle[step.caller] + 18
            parts.append(
                f"<path d='M{from_x:g} {from_y:g} V{y + 18:g} H{x - 1:g}' fill='none' "
                f"stroke='{LINE}' stroke-width='1.5'/>"
            )
        if step.number and (i == 0 or way[i - 1].number != step.number):
            parts.append(text(16, y + 23, str(step.number), size=14, more="font-weight='bold'"))
        parts.append(box(x, y, wide, row - 6, FILLS[not step.file], LINE))
        name = f"font-weight='bold' {CODE if step.file else FONT}"
        parts.append(text(x + 10, y + 15, step.name, more=name))
        end = f"text-anchor='end' {CODE}"
        parts.append(text(x + wide - 10, y + 15, step.file, size=10.5, ink=PALE, more=end))
        parts.append(text(x + 10, y + 30, said, size=10.5, ink=PALE))
    source = "followed through the code by scripts/architecture.py"
    parts.append(text(16, height - 10, source, size=10, ink=PALE))
    return svg(width, height, title, parts)


def paragraphs(found: Sequence[Room]) -> str:
    """What each room holds, in the words of its docstring, from the ground up."""
    told = []
    for room in reversed(found):
        about = re.sub(r"`+([^`]+)`+", r"`\1`", " ".join(room.about.split()))
        told.append(f"**`{room.path}`** {about}\n")
    return "\n".join(told)


def made(root: Path = ROOT) -> dict[str, str]:
    """What is written, by path from the root of the repository.

    Raises:
        ValueError: a function or a call of the ways that is not there.
    """
    found, package = rooms(root), root / "src" / "ditdial"
    page = (root / PAGE).read_text(encoding="utf-8")
    return {
        "docs/images/rooms.svg": draw_rooms(found),
        "docs/images/one-call.svg": draw_way(
            CALL,
            follow(CALL, package),
            "One call of an elastic model",
            "Each function stands under the one that calls it. The numbers are those of the text.",
        ),
        "docs/images/to-the-idea.svg": draw_way(
            IDEA,
            follow(IDEA, package),
            "From elastify to the idea",
            "From elastify(pipe, FlexiDiT()) to where a coarse patch is embedded: five files.",
        ),
        PAGE: MARKED.sub(lambda _: paragraphs(found), page),
    }


def main() -> int:
    """Write the pictures, or tell which of them are out of date."""
    parser = argparse.ArgumentParser(description="Draw the architecture from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    only_check = parser.parse_args().check
    old = []
    for name, content in made().items():
        file = ROOT / name
        if file.is_file() and file.read_text(encoding="utf-8") == content:
            continue
        old.append(name)
        if not only_check:
            file.write_text(content, encoding="utf-8")
    for name in old:
        told = "is out of date; legal: what `make architecture` writes" if only_check else "written"
        print(f"{name} {told}", file=sys.stderr if only_check else sys.stdout)
    return 1 if old and only_check else 0


if __name__ == "__main__":
    sys.exit(main())
