"""Adapter folders: ``config.json``, ``adapter.safetensors``, ``calibration.json``; never pickle.

Everything about a file is checked before a model is touched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditdial.host import tensor_files
from ditdial.methods import Combined, Method, method_from_config
from ditdial.plain import files, json_files
from ditdial.plain.checks import require
from ditdial.plain.kinds import checked_fields
from ditdial.plan.calibration import FILE as CALIBRATION
from ditdial.plan.calibration import Calibration
from ditdial.plan.kept_seconds import added
from ditdial.plan.schedule import Schedule

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "adapter.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The trained weights of a method for one base.

    Args:
        base: the identity of the base it was trained for.
        tensors: new tensors by their name in the converted model; retrained base weights under
            ``base.``.
        schedule: the default schedule.
        notes: anything else worth keeping (training facts, recommended guidance scales).
        calibration: what was measured of these weights, for plans that a budget buys.

    Raises:
        ValueError: a calibration of another base or method.
    """

    method: Method
    base: dict[str, Any]
    tensors: dict[str, Tensor]
    schedule: Schedule | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    @checked_fields
    def __post_init__(self) -> None:
        if self.calibration is not None:
            self.calibration.check(self.base, identity(self.method))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
    ) -> Adapter:
        """Read an adapter from a folder or from the hub.

        Args:
            source: the folder, or a hub id (``owner/name``).
            revision: branch, tag or commit of the hub's repository.
            token: for private repositories; that of ``hf auth login`` by default.
            subfolder: of the folder or repository, which holds the adapter.

        Raises:
            FileNotFoundError: no such folder, and not a hub id; or a file is missing.
            ValueError: pickled, truncated or foreign weights, NaN, or a config or calibration that
                is not understood.
        """
        return _read(_find(source, revision=revision, token=token, subfolder=subfolder))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write the folder; the files of an old adapter there go only once the new ones are whole.

        A calibration goes with the adapter it was measured of; other files in the folder stay.

        Args:
            dtype: of the stored weights; their own by default.

        Raises:
            FileExistsError: the folder exists and holds something that is no adapter.
            ValueError: weights that could not be loaded again, such as NaN, or a dtype of whole
                numbers or of fewer than 16 bits.
        """
        folder = Path(folder).expanduser()
        legal = "None, or one of 16 bits or more, as torch.float16"
        wide = dtype in tensor_files.FLOATS and dtype.itemsize >= 2
        require(dtype is None or wide, "dtype", dtype, legal)
        if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
            raise FileExistsError(
                f"{str(folder)!r} exists and holds no adapter; choose another folder"
            )
        tensors = {
            name: value.detach().to("cpu", _stored(value.dtype, dtype)).contiguous()
            for name, value in self.tensors.items()
        }
        tensor_files.check_numbers("the adapter", tensors)
        with files.filling(folder, (CONFIG, WEIGHTS, CALIBRATION)) as partial:
            self._write(partial, tensors)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload adapter",
    ) -> str:
        """Upload the adapter to the hub; the repository is made if there is none.

        Args:
            repo_id: ``owner/name``.
            private: of a new repository; the owner's default if None.
            revision: branch to commit to.

        Returns:
            The address of the commit.
        """
        from huggingface_hub import HfApi  # it comes with diffusers, and takes a while to import

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(Path(scratch) / "adapter")
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
            )
        return commit.commit_url

    def _write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        tensor_files.save(folder / WEIGHTS, tensors, {"format": "pt"})
        config = {
            "format": FORMAT,
            "method": self.method.name,
            "settings": self.method.to_config(),
            "base": self.base,
            "schedule": self.schedule.to_dict() if self.schedule else None,
            "notes": self.notes,
        }
        json_files.write(folder / CONFIG, config)
        if self.calibration is not None:
            self.calibration.save(folder / CALIBRATION)


def _stored(own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor is stored; whole numbers, which are positions, stay such."""
    return asked if asked is not None and own.is_floating_point else own


def identity(method: Method) -> dict[str, Any]:
    """What tells a method and its settings apart from others, as plain data."""
    return {"name": method.name, "settings": method.to_config()}


def _read(folder: Path) -> Adapter:
    config = _read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickled = [f.name for f in folder.iterdir() if f.suffix in PICKLES]
        if pickled:
            raise ValueError(
                f"{str(folder)!r} holds pickled weights {pickled}; legal: {WEIGHTS} "
                "(pickle can run code)"
            )
        raise FileNotFoundError(f"{str(folder)!r} has no {WEIGHTS}")
    tensors, _ = tensor_files.load(weights)
    tensor_files.check_numbers(repr(str(weights)), tensors)
    try:
        method = method_from_config(config["method"], config["settings"])
        schedule = config.get("schedule")
        schedule = None if schedule is None else Schedule.from_dict(schedule)
    except ValueError as error:
        raise ValueError(f"{str(folder / CONFIG)!r}: {error}") from error
    measured = folder / CALIBRATION
    return Adapter(
        method=method,
        base=config["base"],
        tensors=tensors,
        schedule=schedule,
        notes=config["notes"],
        calibration=added(Calibration.load(measured)) if measured.is_file() else None,
    )


def check_base(adapter: Adapter, identity: dict[str, Any]) -> None:
    """Refuse an adapter of another base.

    Raises:
        ValueError: naming each fact that differs.
    """
    differing = [
        f"{key}: adapter {adapter.base.get(key)!r}, this model {value!r}"
        for key, value in identity.items()
        if adapter.base.get(key) != value
    ]
    if differing:
        raise ValueError("the adapter was made for another base; " + "; ".join(differing))


def check_tensors(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that are missing, unknown, or of another shape or kind of numbers.

    Raises:
        ValueError: naming the first few of each.
    """
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(set(tensors) - set(expected))
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    kinds = [
        f"{name} {tensors[name].dtype} instead of {value.dtype}"
        for name, value in expected.items()
        if name in tensors and value.is_floating_point() and not tensors[name].is_floating_point()
    ]
    problems = [
        f"{kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for kind, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("wrong shape", wrong),
            ("wrong dtype", kinds),
        )
        if names
    ]
    if problems:
        raise ValueError(
            "adapter weights do not fit its own config and this model; " + "; ".join(problems)
        )


def _find(
    source: str | Path, *, revision: str | None, token: str | bool | None, subfolder: str | None
) -> Path:
    """The folder of an adapter, from the hub if it is not here."""
    folder, inside = Path(source).expanduser(), subfolder or ""
    if folder.is_dir():
        return folder / inside
    if folder.is_file():
        kind = "pickled weights" if folder.suffix in PICKLES else "a file"
        raise ValueError(
            f"{str(source)!r} is {kind}; legal: a folder with {CONFIG} and {WEIGHTS}, or a hub id"
        )
    text = str(source)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"adapter {text!r} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download  # it takes a while to import

    wanted = [str(Path(inside) / name) for name in (CONFIG, WEIGHTS, CALIBRATION)]
    try:
        found = snapshot_download(text, revision=revision, token=token, allow_patterns=wanted)
    except OSError as error:  # every error of the hub and of the network
        asked = "" if revision is None else f", revision {revision!r}"
        raise FileNotFoundError(
            f"adapter {text!r}{asked} is no folder here, and the hub has not got it: {error}"
        ) from error
    return Path(found) / inside


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty or holds an adapter, hence may be replaced by one."""
    if not any(folder.iterdir()):
        return True
    try:
        _read_config(folder)
    except (ValueError, FileNotFoundError):
        return False
    return True


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {CONFIG}; it is no adapter folder")
    name = repr(str(path))
    config = json_files.loads(files.read(path, "config"), name, lambda data: data)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        raise ValueError(f"{name}: format = {found!r}; legal: {FORMAT}")
    for key, kind in (("method", str), ("settings", dict), ("base", dict), ("notes", dict)):
        if not isinstance(config.get(key), kind):
            raise ValueError(
                f"{name}: {key} = {config.get(key)!r}; legal: a JSON "
                f"{'text' if kind is str else 'object'}"
            )
    return config


@dataclass(frozen=True)
class Composition:
    """A method, with the adapters that hold weights of it.

    Args:
        adapters: of the method, or each of another part of it. Parts without one start from the
            base's weights.
        schedule: that one of the adapters begins with.
    """

    method: Method
    adapters: tuple[Adapter, ...]
    schedule: Schedule | None

    @classmethod
    def of(cls, sources: Sequence[Adapter | Method]) -> Composition:
        """Methods and adapters joined.

        Raises:
            ValueError: none, methods that cannot be combined, or two adapters whose parts were
                trained with base weights of their own.
        """
        adapters = tuple(source for source in sources if isinstance(source, Adapter))
        methods = [x.method if isinstance(x, Adapter) else x for x in sources]
        if not methods:
            raise ValueError("adapter = []; legal: at least one adapter or method")
        trained = [adapter for adapter in adapters if adapter.method.trains_base]
        if len(trained) > 1:
            names = " and ".join(repr(adapter.method.name) for adapter in trained)
            raise ValueError(
                f"the adapters of {names} each hold base weights of their own, and a model has one "
                "set; legal: at most one adapter that retrains the base (recipes 'lora', 'td-lora' "
                "and method 'ddit' leave it as it is)"
            )
        method = methods[0] if len(methods) == 1 else Combined(parts=tuple(methods))
        # Only the part that has retrained the base's weights says where they may be used.
        told = trained if len(methods) > 1 else adapters
        schedule = next((x.schedule for x in told if x.schedule is not None), None)
        return cls(method, adapters, schedule)
