"""A hub without a network: the cache that an earlier download would have left."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub.constants


def keep(monkeypatch, cache: Path, name: str, revisions: Mapping[str, Path]) -> None:
    """Have a repository of the hub in the cache, and nothing else of the hub.

    Args:
        name: of the repository, ``owner/name``.
        revisions: folders of files by the name of a branch or tag.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for number, (revision, folder) in enumerate(revisions.items()):
        commit = f"{number + 1:040x}"
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
