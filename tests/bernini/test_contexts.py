"""What the full model's renderer reads: text first, then the planner's rows, of real lengths or filled up."""

import pytest
import torch

from bernini.contexts import join_context, planned_contexts
from bernini.errors import ConfigError
from bernini.flow.guidance import Context
from bernini.planner.planning import Plan


@pytest.mark.parametrize(("at_least", "rows"), [(0, 7), (7, 7), (10, 10), (5, 7)])
def test_a_context_is_text_then_plan_then_zeros(randn, at_least: int, rows: int) -> None:
    text, plan = randn(0)(3, 6).bfloat16(), randn(1)(4, 6)
    joined = join_context(text, plan, at_least)
    assert joined.shape == (rows, 6) and joined.dtype == torch.float32
    assert torch.equal(joined[:3], text.float()) and torch.equal(joined[3:7], plan) and not joined[7:].any()


def test_the_four_contexts_have_their_released_rows(randn) -> None:
    given, planned = randn(0)(5, 6), randn(1)(2, 6)
    plan = Plan(randn(2)(2, 8), torch.cat([given, planned]), given, planned, randn(3)(4, 6))
    positive, negative = randn(4)(3, 6), randn(5)(1, 6)
    contexts = planned_contexts(plan, positive, negative)
    assert {context: len(rows) for context, rows in contexts.items()} == {
        Context("positive", plan=True): 3 + 7,
        Context("positive", plan=False): 3 + 5,
        Context("negative", plan=True): 1 + 2,
        Context("negative", plan=False): 1 + 4,
    }
    assert torch.equal(contexts[Context("negative", plan=True)], torch.cat([negative, planned]))
    assert torch.equal(contexts[Context("negative", plan=False)], torch.cat([negative, plan.wotxt_wovit]))
    padded = planned_contexts(plan, positive, negative, at_least=9)
    assert [len(rows) for rows in padded.values()] == [10, 9, 9, 9]


def test_parts_that_do_not_fit_are_named(randn) -> None:
    with pytest.raises(ConfigError, match="do not fit") as error:
        join_context(randn(0)(3, 6), randn(1)(4, 8))
    assert "rows of 8 channels" in str(error.value) and "takes 6" in str(error.value)
