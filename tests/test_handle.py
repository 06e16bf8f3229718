"""The owner's view: what a handle takes, refuses, and answers once it is removed."""

from __future__ import annotations

import huggingface_hub
import pytest
import torch

from ditdial import FULL, Adapter, Execution, Handle, Mode, Schedule, elastify
from ditdial.adapter import CONFIG, WEIGHTS

WEAK = Mode(2)


def test_a_disabled_model_runs_as_the_base_and_goes_on_as_before(
    make_model, make_elastic, make_call, output
):
    handle, call = make_elastic(), make_call()
    handle.schedule = Schedule.constant(WEAK)
    coarse, stock = output(handle.model, call), output(make_model(), call)
    with handle.disabled():
        assert torch.equal(output(handle.model, call), stock)
    assert torch.equal(output(handle.model, call), coarse)
    assert not torch.equal(coarse, stock)


def test_an_execution_is_set_as_a_whole(make_elastic):
    handle = make_elastic()
    assert handle.execution == Execution()
    handle.execution = Execution(merge=True, packed=True)
    assert handle.execution.merge
    handle.execution = Execution(packed=True)
    assert not handle.execution.merge


@pytest.mark.parametrize("execution", [None, True, "merge", {"merge": True}])
def test_what_is_no_execution_is_refused(make_model, make_elastic, execution):
    with pytest.raises(ValueError, match=r"execution = .*legal: an Execution"):
        make_elastic().execution = execution
    if execution is not None:
        with pytest.raises(ValueError, match=r"execution = .*legal: an Execution"):
            elastify(make_model(), make_elastic().method, execution=execution)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"merge": 1}, "merge = 1 .*True, False"),
        ({"packed": "masked"}, "packed = 'masked' .*True, False"),
        ({"width_buckets": -1}, "width_buckets = -1 .*>= 0"),
        ({"width_slices": 0.5}, "width_slices = 0.5 .*>= 0"),
    ],
)
def test_an_execution_checks_itself(settings, word):
    with pytest.raises(ValueError, match=word):
        Execution(**settings)


def test_a_saved_handle_is_an_adapter_folder(make_model, make_elastic, make_call, output, tmp_path):
    handle, call = make_elastic(), make_call()
    with handle.using(WEAK):
        expected = output(handle.model, call)
    folder = handle.save(tmp_path / "adapter", seed=3)
    assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert Adapter.from_pretrained(folder).notes == {"seed": 3}
    other = elastify(make_model(), folder)
    with other.using(WEAK):
        assert torch.equal(output(other.model, call), expected)


def test_an_adapter_in_a_subfolder_is_found(make_elastic, tmp_path):
    make_elastic().save(tmp_path / "deep" / "adapter")
    found = Adapter.from_pretrained(tmp_path, subfolder="deep/adapter")
    assert found.method == make_elastic().method
    with pytest.raises(FileNotFoundError, match="is no adapter folder"):
        Adapter.from_pretrained(tmp_path)


def test_what_goes_to_the_hub_is_the_saved_folder(make_elastic, monkeypatch, tmp_path):
    """The hub itself cannot be asked in a test: its client is."""
    calls = []

    class Client:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **facts):
            calls.append(("create", repo_id, facts))

        def upload_folder(self, *, repo_id, folder_path, **facts):
            adapter = Adapter.from_pretrained(folder_path)
            calls.append(("upload", repo_id, adapter.notes, facts["revision"]))
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    adapter = make_elastic().adapter(seed=1)
    url = adapter.push_to_hub("me/mine", private=True, token="secret", revision="next")
    assert url == "https://hub/commit/1"
    assert calls == [
        ("token", "secret"),
        ("create", "me/mine", {"private": True, "exist_ok": True}),
        ("upload", "me/mine", {"seed": 1}, "next"),
    ]


ASKED = [
    name for name in vars(Handle) if not name.startswith("_") and name not in ("model", "remove")
]


@pytest.mark.parametrize("name", sorted(ASKED))
def test_a_removed_handle_answers_nothing_but_remove(make_elastic, name):
    arguments = {
        "calibrate": (lambda batch: None,),
        "frontier": (4,),
        "plan": (4,),
        "plan_levels": ([0.5],),
        "using": (FULL,),
        "save": ("nowhere",),
    }
    handle = make_elastic()
    handle.remove()
    handle.remove()

    def ask():
        found = getattr(handle, name)
        if callable(found):
            result = found(*arguments.get(name, ()))
            result.__enter__()  # of what is a context

    with pytest.raises(RuntimeError, match="removed or replaced"):
        ask()
