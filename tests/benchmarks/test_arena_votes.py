"""Bradley-Terry from votes."""

import math
import random

import numpy as np
import pytest

from benchmarks.quality.published.tables import published
from benchmarks.quality.totals.arena import Vote, standings, win_percent
from bernini.errors import DataError


def votes_of(strengths: dict[str, float], number: int, seed: int = 0) -> list[Vote]:
    draw, votes = random.Random(seed), []
    for _ in range(number):
        first, second = draw.sample(sorted(strengths), 2)
        chance = win_percent(1000 + strengths[first] - strengths[second]) / 100
        outcome = "tie" if draw.random() < 0.1 else "first" if draw.random() < chance else "second"
        votes.append(Vote(first, second, outcome))  # type: ignore[arg-type]
    return votes


def test_win_percentages_are_the_published_ones() -> None:
    (table,) = (t for t in published() if t.benchmark == "arena")
    for row in table.rows.values():
        assert win_percent(row["score"]) == pytest.approx(row["win_pct"], abs=0.13)  # scores are rounded  # type: ignore
    columns = {name: [row[name] for row in table.rows.values()] for name in table.decimals}
    assert sum(columns["score"]) / 5 == 1000 and sum(columns["W"]) == sum(columns["L"]) == 225  # type: ignore[arg-type]


def test_two_models_stand_by_their_odds() -> None:
    found = standings([Vote("a", "b", "first")] * 30 + [Vote("b", "a", "first")] * 10)
    assert list(found) == ["a", "b"]
    assert found["a"].score - found["b"].score == pytest.approx(400 * math.log10(3))
    assert (found["a"].wins, found["a"].losses, found["b"].wins, found["b"].ties) == (30, 10, 10, 0)
    ties = standings([Vote("a", "b", "first")] * 20 + [Vote("a", "b", "tie")] * 20)
    assert ties["a"].score == pytest.approx(found["a"].score) and ties["b"].ties == 20


def test_scores_make_expected_wins_the_wins_that_were() -> None:
    """At the largest likelihood, each model's expected wins over its comparisons are those that it has."""
    votes = votes_of({"a": 150, "b": 60, "c": 0, "d": -40, "e": -120}, 400)
    found = standings(votes, draws=200)
    assert np.mean([s.score for s in found.values()]) == pytest.approx(1000)
    for name, standing in found.items():
        rivals = [v.second if v.first == name else v.first for v in votes if name in (v.first, v.second)]
        expected = sum(win_percent(1000 + standing.score - found[rival].score) / 100 for rival in rivals)
        assert expected == pytest.approx(standing.wins + standing.ties / 2, abs=1e-6)
        assert standing.low < standing.score < standing.high
        assert standing.wins + standing.losses + standing.ties == len(rivals)
    assert sum(s.wins for s in found.values()) == sum(s.losses for s in found.values())


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    strengths = {"a": 100.0, "b": 0.0, "c": -100.0}
    inside = 0
    for seed in range(60):
        found = standings(votes_of(strengths, 150, seed), draws=200, seed=seed)
        inside += sum(found[n].low <= 1000 + strength <= found[n].high for n, strength in strengths.items())
    assert 0.88 <= inside / 180 <= 1


def test_sides_and_order_of_votes_do_not_matter() -> None:
    votes = votes_of({"a": 50, "b": 0, "c": -50}, 120)
    turned = {"first": "second", "second": "first", "tie": "tie"}
    other = [Vote(v.second, v.first, turned[v.better]) for v in reversed(votes)]  # type: ignore[arg-type]
    a, b = standings(votes, draws=50), standings(other, draws=50)
    assert list(a) == list(b)
    assert all(a[name].score == pytest.approx(b[name].score, abs=1e-6) for name in a)


def test_what_cannot_be_compared_is_refused() -> None:
    chain = [Vote("a", "b", "first"), Vote("b", "a", "first")]
    for votes, told in (
        ([], "no votes"),
        ([Vote("a", "a", "tie")], "with itself"),
        ([Vote("a", "b", "first")] * 5, "cannot be compared"),
        ([*chain, Vote("c", "d", "first"), Vote("d", "c", "first")], "cannot be compared"),
        ([*chain, Vote("a", "c", "first"), Vote("b", "c", "first")], "cannot be compared"),
        ([*chain, *chain], "too few votes"),
    ):
        with pytest.raises(DataError, match=told):
            standings(votes)
