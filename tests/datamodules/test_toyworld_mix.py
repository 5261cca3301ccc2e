"""Mixes of toy tasks."""

import pytest

from bernini.errors import ConfigError
from datamodules.toyworld.data import ToyWorld


def test_a_part_of_a_task_can_have_one_kind_of_edit() -> None:
    world = ToyWorld({"v2v/reason": 2, "v2v": 1, "i2i/remove": 1}, frames=1, height=32, width=32)
    samples = [world[number] for number in range(40)]
    kinds = [(sample.task, sample.info["truth"]["edit"]) for sample in samples]
    assert kinds.count(("v2v", "reason")) == pytest.approx(20, abs=1)  # none of them is of plain v2v
    assert {kind for task, kind in kinds if task == "i2i"} == {"remove"}
    assert len({kind for task, kind in kinds if task == "v2v"}) > 2
    with pytest.raises(ConfigError, match="do not fit task i2i"):
        ToyWorld({"i2i/motion": 1}, frames=1, height=32, width=32)[0]
