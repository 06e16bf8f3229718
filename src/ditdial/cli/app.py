"""The command ``ditdial``: its subcommands, and how errors end it.

The modules of the commands import the library inside their functions, so that ``ditdial --help``
and the refusal of a misspelt command need not wait for torch and diffusers.
"""

from __future__ import annotations

import logging
import sys

import typer
from rich.console import Console
from rich.text import Text

from ditdial.cli.calibrate import calibrate
from ditdial.cli.cost import cost
from ditdial.cli.demo import demo
from ditdial.cli.evaluate import evaluate
from ditdial.cli.lists import backbones, methods
from ditdial.cli.probe import probe
from ditdial.cli.report import report
from ditdial.cli.sample import sample
from ditdial.cli.train import train
from ditdial.measure.memory import keep_freed_memory
from ditdial.plain.checks import on_one_line

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
"""What bad input, a full or read-only disk, a missing extra or a diverged training raise."""

CHATTY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Loggers that warn when diffusers imports torchao, which it does wherever torchao is installed."""

LONGEST = 2000
"""Characters of an error that are shown: a file may have anything in the place of a number."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Let a pretrained Diffusion Transformer change how much work it does at every step.",
)
for command in (demo, train, sample):
    app.command()(command)
app.command("eval")(evaluate)
for command in (calibrate, cost, probe, report, methods, backbones):
    app.command()(command)


def main() -> None:
    """Entry point: bad input ends with one clear line and exit code 2."""
    configure_logging()
    keep_freed_memory()
    try:
        app()
    except USER_ERRORS as error:
        # As Text: paths and messages may hold [brackets], which are markup in a plain string.
        line = Text.assemble(("error: ", "bold red"), error_text(error))
        Console(stderr=True).print(line, soft_wrap=True)
        sys.exit(2)


def configure_logging() -> None:
    """Show what this package tells, and warnings of others but for those at every start.

    The levels are set on the loggers' own names before anything imports torch: a library's
    configuration of its root logger leaves its children as they are.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ditdial").setLevel(logging.INFO)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def error_text(error: BaseException) -> str:
    """An error as one line: the system's errors without their numbers, with the file they name."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f": {str(error.filename)!r}"
        text = f"{error.strerror}{named}"
    line = on_one_line(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
