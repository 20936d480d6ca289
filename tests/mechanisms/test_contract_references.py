"""Each mechanism has an independent reference: a plain definition, a library run alone, or the model written by hand.

Where a fast path stands beside a plain one, the second name is the test that compares gradients.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mismatch.mechanisms import MECHANISMS

HERE = Path(__file__).parent
ADAPTERS = ("test_adapters:test_outputs_and_gradients_are_those_of_the_published_definition",)
MIXERS = (
    "test_mixers:test_output_and_state_are_those_of_the_definition",
    "test_mixers:test_gradients_are_those_of_the_definition",
)
LIBRARY = ("test_mixers:test_it_is_the_librarys_mixer_run_alone",)
CHOSEN = (
    "test_chosen_keys:test_it_is_what_loops_over_tokens_choose",
    "test_chosen_keys:test_gradients_are_those_of_the_attention_over_what_was_chosen",
)
ROPE = ("test_rope:test_it_is_the_model_that_was_built_with_it",)
REFERENCES = {
    "adapterplus": ADAPTERS,
    "dyt": ("test_dyt:test_formula_with_the_norms_own_gain_and_bias",),
    "gated_attention": ("test_gated_attention:test_it_is_the_attention_with_gates_written_by_hand",),
    "gated_deltanet": MIXERS,
    "gqa": ("test_gqa:test_it_is_the_model_that_was_built_with_fewer_kv_heads",),
    "houlsby": ADAPTERS,
    "identity": ("test_mechanism_contract:test_at_its_identity_limit_the_student_is_the_teacher_to_the_bit",),
    "infini": (
        "test_infini:test_output_and_memory_are_those_of_the_definition",
        "test_infini:test_gradients_are_those_of_the_definition",
    ),
    "kda": MIXERS,
    "kv_slots": (
        "test_kv_slots:test_it_is_the_definition",
        "test_kv_slots:test_gradients_are_those_of_the_definition",
    ),
    "linear": ("test_linear:test_in_its_slot_it_is_what_numpy_fits_to_the_bulk_tokens_of_the_part",),
    "linear_attention": (
        "test_linear_attention:test_output_and_memory_are_those_of_the_definition",
        "test_linear_attention:test_gradients_are_those_of_the_definition",
    ),
    "lora": ("test_lora:test_it_is_the_model_with_merged_weights_in_outputs_and_gradients",),
    "low_rank_mlp": ("test_low_rank_mlp:test_it_is_the_model_with_truncated_matrices",),
    "mamba": LIBRARY,
    "mamba2": MIXERS,
    "mean": ("test_controls:test_mean_is_the_calibration_mean_over_bulk_tokens_at_every_position",),
    "mla": ("test_mla:test_it_is_the_definition",),
    "moba": CHOSEN,
    "nope": ("test_nope:test_it_is_smollm3_built_without_rotary_in_that_layer",),
    "parallel": ("test_controls:test_parallel_is_the_sum_of_both_paths",),
    "parallel_adapter": ADAPTERS,
    "partial_rope": ("test_rope:test_partial_rope_written_out_by_complex_numbers",),
    "qlora": ("test_qlora:test_it_is_the_model_with_rounded_weights_and_lora_merged",),
    "quantized": ("test_quantized:test_it_is_the_model_with_rounded_matrices",),
    "random": ("test_controls:test_random_keeps_mean_and_std_of_every_tensor_and_nothing_else",),
    "ring": (
        "test_ring:test_outputs_and_gradients_are_those_of_softmax_attention",
        "test_ring:test_over_several_processes_it_is_one_attention",
    ),
    "rope": ROPE,
    "rwkv": (
        "test_rwkv:test_the_layer_is_its_definition",
        "test_rwkv:test_its_gradients_are_those_of_the_definition",
    ),
    "short_conv": LIBRARY,
    "skip": ("test_controls:test_skip_leaves_the_layer_out",),
    "sliding_window": ("test_sliding_window:test_it_is_the_model_under_a_mask_written_by_hand",),
    "topk": CHOSEN,
    "yarn": ROPE,
    "zero": ("test_controls:test_zero_is_zeros_and_the_cache_is_the_teachers",),
}  # fmt: skip


def test_every_mechanism_names_its_reference():
    assert REFERENCES.keys() == MECHANISMS.keys()


@pytest.mark.parametrize(
    "place", sorted({place for places in REFERENCES.values() for place in places})
)
def test_the_reference_is_there(place):
    file, _, test = place.partition(":")
    tree = ast.parse((HERE / f"{file}.py").read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
