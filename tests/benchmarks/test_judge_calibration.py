"""Calibration: a judge that says what it said passes in silence, one that does not is named."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from judges import MODEL, Scorer, make_judge, make_question
from servers import Server, chat_server, say, send

from benchmarks.quality.judging.calibration import Change, calibrate
from bernini.errors import ConfigError, DataError

QUESTIONS = [make_question(n) for n in range(3)]  # scored 1, 2 and 3


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


@pytest.fixture
def stored(server: Server, tmp_path: Path) -> Path:
    Scorer(server)
    assert calibrate(make_judge(server.url), QUESTIONS, tmp_path / "set.json") is None
    return tmp_path / "set.json"


def test_a_judge_that_says_the_same_has_not_drifted(server: Server, stored: Path) -> None:
    scorer, kept = Scorer(server), stored.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drift = calibrate(make_judge(server.url), QUESTIONS, stored)
    assert drift is not None and drift.is_none and drift.asked == 3 and drift.means == {"quality": (2, 2)}
    assert len(scorer.asked) == 3 and stored.read_bytes() == kept  # asked anew, and compared with what was first


def test_what_changed_is_named(server: Server, stored: Path) -> None:
    server.replies = [say("1"), say("5"), say("many"), say("many")]
    with pytest.warns(UserWarning, match="the judge is not what it was") as caught:
        drift = calibrate(make_judge(server.url, workers=1), QUESTIONS, stored)
    assert drift is not None
    assert drift.changes == (Change("q1", "quality", 2, 5), Change("q2", "quality", 3, None))
    assert drift.means == {"quality": (1.5, 3)}
    (text,) = (str(one.message) for one in caught)
    assert "2 of 3 scores" in text and "q1 quality: was 2, is 5" in text and "q2 quality: was 3, is missing" in text


def test_another_judge_is_named_even_where_it_agrees(server: Server, stored: Path) -> None:
    Scorer(server)
    with pytest.warns(UserWarning, match=f"model: was {MODEL}, is other-2026-02-28"):
        drift = calibrate(make_judge(server.url, model="other-2026-02-28"), QUESTIONS, stored)
    assert drift is not None and not drift.changes and not drift.is_none


def test_another_model_behind_the_name_is_named(server: Server, stored: Path) -> None:
    server.replies = [send(json.dumps({"model": "swapped", "choices": [{"message": {"content": "1"}}]}))]
    with pytest.warns(UserWarning, match=r"served: was \[''\], is \['swapped'\]"):
        calibrate(make_judge(server.url), QUESTIONS, stored)


def test_another_set_is_refused(server: Server, stored: Path) -> None:
    asked = len(server.asked)
    few, reworded = QUESTIONS[:2], [*QUESTIONS[:2], make_question(2, version="2")]
    for other in (few, reworded, [make_question(n) for n in (0, 1, 3)]):
        with pytest.raises(ConfigError, match="not the one that was stored"):
            calibrate(make_judge(server.url), other, stored)
    assert len(server.asked) == asked


def test_a_set_that_cannot_be_scored_is_not_stored(server: Server, tmp_path: Path) -> None:
    server.replies = [say("many")]
    with pytest.raises(DataError, match="scored 0 of 3"):
        calibrate(make_judge(server.url), QUESTIONS, tmp_path / "set.json")
    assert not (tmp_path / "set.json").exists()
