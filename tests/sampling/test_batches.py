"""A picture depends on its own seed alone: not on the batch, not on the number of processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ditdial import Mode, Schedule, elastify
from ditdial.reference import load_reference, reference_adapter
from ditdial.sampling.batches import cyclic_labels, sample

TOLERANCE = 1e-4  # of the pixel range: matrix products of other batch sizes round differently


@pytest.fixture(scope="module")
def pipe():
    pipe = load_reference()
    elastify(pipe, reference_adapter("lora")).schedule = Schedule.weak_first(0.5, Mode(2))
    return pipe


def test_same_picture_alone_and_in_any_batch(pipe):
    labels, seeds = cyclic_labels(6, 10), list(range(40, 46))
    together = sample(pipe, labels, seeds, steps=6, batch_size=6).images
    in_parts = sample(pipe, labels, seeds, steps=6, batch_size=4).images
    alone = sample(pipe, labels[3:4], seeds[3:4], steps=6).images
    torch.testing.assert_close(together, in_parts, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(together[3:4], alone, atol=TOLERANCE, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


WORKER = """
import sys, torch, torch.distributed as dist
from ditdial.reference import load_reference
from ditdial.sampling.batches import sample
torch.set_num_threads(1)
dist.init_process_group("gloo")
images = sample(load_reference(), [0, 1, 2, 3, 4], [7, 8, 9, 10, 11], steps=3, batch_size=2).images
if dist.get_rank() == 1:
    torch.save(images, sys.argv[1])
dist.destroy_process_group()
"""


def test_two_processes_make_the_pictures_of_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, str(script), str(tmp_path / "out.pt")], check=True)
    expected = sample(load_reference(), [0, 1, 2, 3, 4], [7, 8, 9, 10, 11], steps=3).images
    made = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(made, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("labels", "seeds", "batch_size", "word"),
    [([1], [1, 2], 4, "2 seeds"), ([], [], 4, "0 labels"), ([1], [1], 0, "batch_size = 0")],
)
def test_bad_arguments(pipe, labels, seeds, batch_size, word):
    with pytest.raises(ValueError, match=word):
        sample(pipe, labels, seeds, batch_size=batch_size)
