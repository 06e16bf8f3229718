"""Context parallelism over two real processes (gloo, CPU)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from tests.backbones.tiny import CASES
from tests.elastic_models import WEAK, call_of, elastic

from ditdial import FULL

PROCESSES = 2

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


def split_sequences(model, rank):
    """What ``enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))`` does.

    That method itself divides by the number of accelerators, which is zero on the CPU.
    """
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel

    context = ContextParallelConfig(ulysses_degree=PROCESSES)
    mesh = dist.device_mesh.init_device_mesh(
        "cpu", mesh_shape=context.mesh_shape, mesh_dim_names=context.mesh_dim_names
    )
    config = ParallelConfig(context_parallel_config=context)
    config.setup(rank, PROCESSES, torch.device("cpu"), mesh=mesh)
    model._parallel_config = config
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    apply_context_parallel(model, context, model._cp_plan)
    return model


def check(rank, name):
    call = {**call_of(name), "return_dict": False}  # the gathering hooks know tuples only
    call["encoder_hidden_states"] = call["encoder_hidden_states"][:, :4]  # a whole number each
    if "txt_ids" in call:
        call["txt_ids"] = call["txt_ids"][:4]
    alone = CASES[name].model()(**call)[0]
    expected = split_sequences(CASES[name].model(), rank)(**call)[0]
    torch.testing.assert_close(expected, alone)
    before = elastic(name, split_sequences(CASES[name].model(), rank))
    after = elastic(name)
    split_sequences(after.model, rank)
    for handle in (before, after):
        with handle.using(FULL):
            assert torch.equal(handle.model(**call)[0], expected)
        message = r"context parallelism .*'patch2'.*legal together with it: full mode"
        with pytest.raises(RuntimeError, match=message), handle.using(WEAK):
            handle.model(**call)
        handle.remove()
        assert torch.equal(handle.model(**call)[0], expected)


@torch.no_grad()
def work(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    for name in ("flux", "wan"):
        check(rank, name)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_share_a_sequence_in_full_mode_only(tmp_path):
    torch.multiprocessing.spawn(work, args=(tmp_path / "store",), nprocs=PROCESSES)


def test_enable_parallelism_needs_an_accelerator():
    """As soon as it does not, the test above should use it."""
    from diffusers import ContextParallelConfig

    if torch.accelerator.is_available():
        pytest.skip("there is one")
    model = CASES["flux"].model()
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=PROCESSES))
