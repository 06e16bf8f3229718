"""What docs/ecosystem.md says of each row is what tests show: no row is without one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ECOSYSTEM, WILD = "tests/ecosystem", "tests/wild"
TOGETHER, STORAGE = f"{ECOSYSTEM}/test_together.py", f"{ECOSYSTEM}/test_storage.py"
CACHES, OFFLOAD = f"{ECOSYSTEM}/test_caches.py", f"{ECOSYSTEM}/test_offload.py"
EXPECTED, INPUTS = f"{ECOSYSTEM}/test_diffusers_expectations.py", f"{ECOSYSTEM}/test_inputs.py"
CACHE_DIT = ("test_cache_dit_put_on_an_elastic_pipeline", "test_cache_dit_on_the_other_classes")

ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "`model.compile": (TOGETHER, ("test_whole_model_compiles_to_one_graph_per_mode",)),
    "A larger graph": (EXPECTED, ("test_an_export_keeps_the_mode_and_leaves_nothing_behind",)),
    "`compile_repeated": (TOGETHER, ("test_repeated_blocks_compile_to_few_graphs",)),
    "LoRA: load": (
        f"{WILD}/test_loras_first.py",
        ("test_a_lora_that_was_there_first_and_goes_leaves_the_coarse_picture_right",),
    ),
    "Control LoRA": (
        f"{WILD}/test_loras_first.py",
        ("test_a_control_lora_after_elastify_is_refused_by_name_in_coarse_modes",),
    ),
    "LoRA on the modules": (TOGETHER, ("test_a_later_lora_on_a_seam_module_is_no_silent_no_op",)),
    "First-block cache": (
        CACHES,
        (
            "test_full_mode_is_the_stock_model_with_the_same_cache",
            "test_seacache_keeps_a_state_per_mode",
        ),
    ),
    "Pyramid": (
        CACHES,
        (
            "test_caches_with_one_state_serve_runs_of_one_mode",
            "test_a_text_cache_refuses_coarse_modes",
        ),
    ),
    "cache-dit, enabled after": (CACHES, CACHE_DIT),
    "cache-dit, enabled before": (CACHES, ("test_a_pipeline_that_cache_dit_has_changed_already",)),
    "A fork of a step cache": (TOGETHER, ("test_a_forward_put_over_ours_is_refused_when_it_runs",)),
    "accelerate and diffusers hooks": (
        TOGETHER,
        ("test_hooks_put_on_before_still_run_and_modes_still_change",),
    ),
    "torchao int8": (STORAGE, ("test_int8_weights", "test_int8_weights_are_never_merged")),
    "torchao with a method": (STORAGE, ("test_retrained_bases_are_quantised_afterwards_only",)),
    "bitsandbytes, GGUF": (STORAGE, ("test_weights_of_an_unknown_kind_are_refused",)),
    "Layerwise casting": (STORAGE, ("test_eight_bit_storage_leaves_the_adapter_alone",)),
    "Sequential, disk": (OFFLOAD, ("test_offloading_after_elastify",)),
    "The same before": (OFFLOAD, ("test_offloading_before_elastify_is_refused",)),
    "`type(model).from_pretrained": (EXPECTED, ("test_a_device_map_places_the_new_tensors_too",)),
    "Shards": (EXPECTED, ("test_shards_hold_the_stock_model",)),
    "`torch.save": (EXPECTED, ("test_a_whole_model_is_pickled",)),
    "`EMAModel`": (EXPECTED, ("test_an_average_of_weights_is_saved_and_loaded_by_the_class",)),
    "Model offloading": (OFFLOAD, ("test_a_model_that_is_moved_as_a_whole",)),
    "Latents of another": (
        STORAGE,
        (
            "test_a_latent_of_another_dtype_is_refused_in_coarse_modes",
            "test_a_latent_on_another_device_is_refused_in_coarse_modes",
        ),
    ),
    "An adapter of another": (STORAGE, ("test_an_adapter_takes_the_dtype_of_its_base",)),
    "bfloat16": (TOGETHER, ("test_sixteen_bits",)),
    "IP-adapters": (INPUTS, ("test_ip_adapters",)),
    "Gradient checkpointing": (
        TOGETHER,
        ("test_gradient_checkpointing_gives_the_same_gradients",),
    ),
    "`fuse_qkv": (TOGETHER, ("test_fused_projections_give_the_same_in_every_mode",)),
    "ControlNet residuals": (
        INPUTS,
        (
            "test_controlnet_residuals_act_in_coarse_modes",
            "test_controlnet_residuals_refuse_sparse_grids",
        ),
    ),
    "Reference pictures": ("tests/backbones/test_references.py", ()),
    "Context parallelism": (
        f"{ECOSYSTEM}/test_parallel.py",
        ("test_two_processes_share_a_sequence_in_full_mode_only",),
    ),
    "`save_pretrained` of a model": (
        TOGETHER,
        ("test_an_elastic_model_saves_as_the_stock_model_with_its_adapter_inside",),
    ),
    "`DiffusionPipeline.from_pipe`": (
        EXPECTED,
        ("test_a_pipeline_made_of_an_elastic_model_is_a_stock_one_to_others",),
    ),
    "Several pipelines": (
        f"{WILD}/test_calling_pipeline.py",
        (
            "test_a_guide_stays_coarse_in_a_pipeline_that_outlives_the_first",
            "test_a_pipeline_with_a_scheduler_of_its_own_runs_the_plan_of_its_own_timesteps",
        ),
    ),
    "A pipeline's call inside": (
        f"{WILD}/test_two_requests.py",
        (
            "test_a_run_inside_the_callback_of_another_leaves_it_as_it_was",
            "test_runs_that_take_turns_by_model_calls_each_equal_the_run_alone",
        ),
    ),
    "Requests from several threads": (
        f"{WILD}/test_threads.py",
        ("test_requests_at_once_on_every_class", "test_forty_of_forty"),
    ),
    "Modular pipelines": (
        f"{WILD}/test_branch_layouts.py",
        ("test_modular_blocks_give_the_picture_of_the_stock_pipeline_or_refuse",),
    ),
    "Perturbed-attention": (
        f"{WILD}/test_branch_layouts.py",
        ("test_the_coarse_guide_of_three_row_groups_acts_or_is_refused",),
    ),
    "Image-to-image": (
        f"{WILD}/test_budget_holds.py",
        (
            "test_a_budget_holds_for_the_steps_that_an_image_to_image_run_makes",
            "test_a_budget_holds_with_skip_layer_guidance",
        ),
    ),
    "Rows with times": (EXPECTED, ("test_rows_with_times_of_their_own_are_as_if_alone",)),
    "`copy.deepcopy`": (TOGETHER, ("test_a_copy_is_elastic_by_itself",)),
    "Another scheduler": ("tests/backbones/test_stock_pipelines.py", ()),
    "Weights, LoRAs or hooks": ("tests/layers/test_merged_weights.py", ()),
}
"""Beginning of a row -> a file of tests, and those in it that show what the row says; none for all
of the file."""


def rows():
    """First cells of the page's first table."""
    table = (ROOT / "docs/ecosystem.md").read_text().split("## Models")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [line.split(" | ")[0].removeprefix("| ") for line in lines[1:] if "---" not in line]


def test_every_row_has_tests_and_every_entry_a_row():
    found = {row: [start for start in ROWS if row.startswith(start)] for row in rows()}
    assert {row: starts for row, starts in found.items() if len(starts) != 1} == {}
    assert sorted(start for starts in found.values() for start in starts) == sorted(ROWS)


@pytest.mark.parametrize("start", ROWS)
def test_the_tests_of_a_row_are_there(start):
    file, names = ROWS[start]
    tree = ast.parse((ROOT / file).read_text())
    known = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert any(name.startswith("test_") for name in known)
    assert set(names) <= known


def test_no_row_says_that_it_is_not_tested():
    page = (ROOT / "docs/ecosystem.md").read_text()
    assert not re.search(r"\|\s*not tested\s*\|", page)
