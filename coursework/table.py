"""The exercises, and the tests that grade them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exercise:
    """A function, and the tests that a body of it must pass."""

    file: str
    function: str  # with its class
    minutes: int  # an estimate
    names: tuple[str, ...]  # of tests: the first is the definition, without which there are no points
    unpaid: int = 0  # so many of the first tests bring no points; the others have equal parts
    given: str = ""  # a body with faults, instead of none

    @property
    def tests(self) -> list[str]:
        """What pytest calls the tests."""
        return [f"tests/test_{name.replace('::', '.py::', 1)}" for name in self.names]


FAULTY = """\
ranks = scores.half().argsort(descending=True).argsort()  # [L, N]: 0 for the most important
kept = ranks < counts[:, None]
kept[:, :start] = True
return kept
"""

MODEL, METHODS = "minillava/model.py", "minillava/compressors.py"
EXERCISES = {
    "rope": Exercise(
        MODEL, "apply_rope", 10,
        ("coursework::test_number_i_and_number_i_plus_half_are_turned_as_a_complex_number",
         "coursework::test_a_query_and_a_key_feel_only_their_distance"),
    ),
    "attention": Exercise(
        MODEL, "manual_attention", 30,
        ("attention::test_a_whole_prompts_fused_attention_is_the_definition",
         "attention::test_a_single_token_sees_every_key",
         "attention::test_each_group_of_query_heads_reads_its_own_key_head",
         "attention::test_padded_prompts_fused_attention_is_the_definition_and_nobody_else_sees_padding",
         "attention::test_a_key_with_the_logarithm_of_n_added_to_its_score_counts_as_n_keys"),
    ),
    "patches": Exercise(
        MODEL, "VisionTower.forward", 30,
        ("coursework::test_the_tower_puts_a_class_token_before_the_patches",
         "coursework::test_a_tower_of_siglip_has_patches_only",
         "coursework::test_layers_above_the_chosen_one_are_not_run"),
    ),
    "scoring": Exercise(
        "prefixkv.py", "attention_weights", 30,
        ("coursework::test_attention_weights_are_those_of_the_definition_under_every_mask",
         "compressors::test_attention_of_the_last_queries_does_not_see_padding",
         "compressors::test_attention_of_the_last_queries_is_finite_where_products_are_too_large_for_float16",
         "compressors::test_attention_of_the_last_queries_takes_no_room_for_the_others"),
    ),
    "published": Exercise(
        "coursework/published.py", "compress", 15,
        ("coursework::test_the_most_important_tokens_stay_in_every_layer",
         "coursework::test_no_layer_keeps_more_tokens_than_it_may",
         "coursework::test_of_two_tokens_that_are_nearly_level_the_more_important_stays"),
        unpaid=1, given=FAULTY,
    ),
    "eviction": Exercise(
        "prefixkv.py", "PrefixKV.victim", 40,
        ("prefixkv::test_eviction_is_a_queue_behind_pinned_tokens",
         "prefixkv::test_the_oldest_token_behind_the_pinned_ones_goes_first",
         "coursework::test_each_text_of_each_layer_gives_up_its_own_oldest_queued_token"),
    ),
    "importance": Exercise(
        "prefixkv.py", "importance", 60,
        ("prefixkv::test_block_wise_importance_is_the_naive_one_for_every_block_size",
         "prefixkv::test_importance_is_accumulated_in_float32_whatever_the_dtype",
         "coursework::test_importance_never_holds_the_weights_of_all_queries"),
    ),
    "cache": Exercise(
        MODEL, "KVCache.take_slot", 60,
        ("coursework::test_a_token_takes_the_next_free_slot_of_every_layer",
         "prefixkv::test_eviction_is_a_queue_behind_pinned_tokens",
         "cache::TestTheCacheInPlaceIsOneThatCutsAndConcatenates"),
    ),
    "search": Exercise(
        "prefixkv.py", "search", 90,
        ("prefixkv::test_the_threshold_is_the_largest_that_fits",
         "prefixkv::test_the_total_kept_is_the_budget_exactly",
         "prefixkv::test_no_other_allocation_has_a_larger_smallest_prefix",
         "prefixkv::test_tokens_left_over_go_where_a_larger_threshold_would_put_them",
         "prefixkv::test_a_larger_budget_keeps_a_superset_in_every_layer_and_never_lowers_the_threshold"),
    ),
    "allocator": Exercise(
        METHODS, "divide", 40,
        ("coursework::test_a_budget_is_divided_in_proportion",
         "coursework::test_no_layer_gets_more_tokens_than_there_are_nor_fewer_than_are_protected",
         "compressors::test_uniform_layers_differ_by_one_token_at_most_and_choose_as_prefixkv_does",
         "compressors::test_the_total_kept_is_prefixkvs_budget_exactly"),
    ),
    "second": Exercise(
        "coursework/second.py", "answers", 60,
        ("coursework::test_the_answers_are_those_of_whole_conversations_and_nothing_is_read_twice",
         "coursework::test_a_question_does_not_know_of_the_others"),
    ),
}  # fmt: skip
