"""Recipes: frozen dataclasses that check themselves, read from TOML.

A recipe is one TOML file with the tables ``[data]``, ``[optim]``, ``[loop]`` and one table of its
task. Unknown keys are errors that list the legal ones.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ditdial.plain.checks import did_you_mean, require
from ditdial.training.limits import AtMost, check_numbers, check_plain

T = TypeVar("T")

Count = Annotated[int, AtMost(10**12)]
"""Steps or pictures: a run of so many never ends, and nothing is as large as their number."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images and labels come from.

    Args:
        path: a folder of parquet files, an image folder, or a hub id; whatever
            `datasets.load_dataset` reads.
        image_size: side in pixels; smaller images are padded symmetrically with ``pad_value``,
            larger ones refused.
        mean, std: pixel statistics in [0, 1] that make the data zero-mean with unit variance.
    """

    path: str
    split: str = "train"
    image_column: str = "image"
    label_column: str = "label"
    image_size: Annotated[int, AtMost(4096)] = 32
    channels: int = 3
    mean: float = 0.5
    std: float = 0.5
    pad_value: int = 0
    horizontal_flip: bool = False

    def __post_init__(self) -> None:
        for name in ("path", "split", "image_column", "label_column"):
            require(bool(getattr(self, name)), f"data.{name}", "", "a name that is not empty")
        require(self.image_size >= 1, "data.image_size", self.image_size, ">= 1")
        require(self.channels in (1, 3), "data.channels", self.channels, "1 or 3")
        require(self.std > 0, "data.std", self.std, "> 0")
        # No pixels of eight bits that differ at all have a smaller one.
        require(1e-4 <= self.std <= 1, "data.std", self.std, "[0.0001, 1]")
        require(0 <= self.mean <= 1, "data.mean", self.mean, "[0, 1]")
        require(0 <= self.pad_value <= 255, "data.pad_value", self.pad_value, "0..255")
        check_numbers(self, "data")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser: ``adamw``, or ``muon`` for the matrices with AdamW for the rest.

    Args:
        lr: peak rate of AdamW, and of Muon too (its updates are scaled to AdamW's size).
        schedule: ``constant`` or ``cosine`` (to zero), both after ``warmup_steps``.
        ema_decay: decay of the weight average; the first steps use ``(1 + n) / (10 + n)``.
    """

    name: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.0
    beta2: float = 0.99
    warmup_steps: Count = 100
    schedule: str = "constant"
    grad_clip: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        require(self.name in ("adamw", "muon"), "optim.name", self.name, "'adamw' or 'muon'")
        require(self.lr > 0, "optim.lr", self.lr, "> 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, ">= 0")
        require(0 < self.beta2 < 1, "optim.beta2", self.beta2, "(0, 1)")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, ">= 0")
        require(
            self.schedule in ("constant", "cosine"),
            "optim.schedule",
            self.schedule,
            "'constant' or 'cosine'",
        )
        require(self.grad_clip > 0, "optim.grad_clip", self.grad_clip, "> 0")
        require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "[0, 1)")
        check_numbers(self, "optim")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how often, how precise.

    Args:
        images: images seen in all, over all processes.
        batch_size: images per optimiser step, over all processes.
        mixed_precision: ``no``, ``bf16`` or ``fp16`` (the last two need a GPU).
        device_data: keep the decoded data set on the training device.
    """

    images: Count
    batch_size: Annotated[int, AtMost(2**20)] = 64
    mixed_precision: str = "no"
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2
    log_every: Count = 20
    compile: bool = False
    device_data: bool = False

    def __post_init__(self) -> None:
        require(self.images >= 1, "loop.images", self.images, ">= 1")
        require(self.batch_size >= 1, "loop.batch_size", self.batch_size, ">= 1")
        legal = ("no", "bf16", "fp16")
        require(
            self.mixed_precision in legal,
            "loop.mixed_precision",
            self.mixed_precision,
            " | ".join(legal),
        )
        for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
            require(getattr(self, name) >= 1, f"loop.{name}", getattr(self, name), ">= 1")
        check_numbers(self, "loop")

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return -(-self.images // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. ``settings`` is the task's own table, checked by the task."""

    task: str
    output: str
    seed: int
    data: DataConfig
    optim: OptimConfig
    loop: LoopConfig
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The recipe as it was run, for the record."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)


def from_table(cls: type[T], table: dict[str, Any], name: str) -> T:
    """Build a config dataclass from a TOML table.

    Raises:
        ValueError: unknown key (the legal ones are named), missing key, or a value of the wrong
            type or range.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyrefly: ignore[bad-argument-type]
    types = typing.get_type_hints(cls)
    for key, value in table.items():
        if key not in fields:
            raise ValueError(
                f"[{name}] has no key {key!r}; legal keys: {', '.join(sorted(fields))}"
                f"{did_you_mean(key, fields)}"
            )
        wanted = types[key]
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            table = {**table, key: float(value)}
        elif typing.get_origin(wanted) is list:
            inner = typing.get_args(wanted)[0]
            kinds = (int, float) if inner is float else (inner,)
            if not isinstance(value, list) or any(type(x) not in kinds for x in value):
                raise ValueError(f"[{name}] {key} = {value!r}; legal: a list of {inner.__name__}")
        elif wanted in (int, float, str, bool) and type(value) is not wanted:
            raise ValueError(
                f"[{name}] {key} = {value!r} is a {type(value).__name__}; legal: {wanted.__name__}"
            )
    missing = [f.name for f in fields.values() if f.name not in table and _has_no_default(f)]
    if missing:
        raise ValueError(f"[{name}] lacks {', '.join(missing)}")
    return cls(**table)


def _has_no_default(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply ``table.key=value`` overrides, with values in TOML syntax.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: not TOML, unknown keys, values out of range.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"recipe {str(path)!r} does not exist")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bytes that are no text, and numbers of thousands of digits, too
        raise ValueError(f"recipe {str(path)!r} is not valid TOML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"recipe {str(path)!r} is nested too deeply to be read") from error
    for override in overrides:
        _apply_override(raw, override)
    check_plain(raw, f"recipe {str(path)!r}")
    task = raw.pop("task", None)
    if not isinstance(task, str):
        raise ValueError(
            f"recipe {str(path)!r}: task = {task!r}; legal: the name of a task, as in recipes/"
        )
    known = {"output", "seed", "data", "optim", "loop", task}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise ValueError(
            f"recipe {str(path)!r} has unknown entries {unknown}; legal: {sorted(known)} "
            f"with task = {task!r}{did_you_mean(unknown[0], known)}"
        )
    output, seed = raw.get("output", f"runs/{path.stem}"), raw.get("seed", 0)
    require(isinstance(output, str) and bool(output), "output", output, "a folder's name")
    # Seeds of single steps are made of it, and have 64 bits.
    whole = type(seed) is int and 0 <= seed < 2**32
    require(whole, "seed", seed, f"a whole number >= 0 and below {2**32}")
    for name in ("data", "optim", "loop", task):
        table = raw.get(name, {})
        require(isinstance(table, dict), name, table, f"a table [{name}]")
    return Recipe(
        task=task,
        output=output,
        seed=seed,
        data=from_table(DataConfig, raw.get("data", {}), "data"),
        optim=from_table(OptimConfig, raw.get("optim", {}), "optim"),
        loop=from_table(LoopConfig, raw.get("loop", {}), "loop"),
        settings=raw.get(task, {}),
    )


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ValueError(f"override {override!r} is not of the form table.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except RecursionError as error:
        raise ValueError(f"override of {key!r} is nested too deeply to be read") from error
    except ValueError:
        value = text
    *tables, name = key.split(".")
    target = raw
    for table in tables:
        target = target.setdefault(table, {})
        if not isinstance(target, dict):
            raise ValueError(f"override {override!r}: {table!r} is not a table")
    target[name] = value
