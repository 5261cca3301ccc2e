import json

import pytest
import torch

from benchmarks.speed import data_decode
from benchmarks.speed.data import main
from bernini.errors import ConfigError


def test_decoding_is_timed_after_its_pixels_were_compared(tmp_path, capsys):
    figures = main(
        f"decode --frames 5 --size 64 96 --max-edge 48 --rounds 2 --json {tmp_path / 'figures.json'}".split()
    )
    assert json.loads((tmp_path / "figures.json").read_text())["contestants"].keys() == figures["contestants"].keys()
    assert figures["contestants"][data_decode.BARE]["of_bare"] == 1
    assert figures["contestants"][data_decode.OURS]["frames_per_second"] > 0
    assert figures["clip"]["resized"] == (32, 48)
    assert "of bare" in capsys.readouterr().out


def test_other_pixels_are_not_timed(monkeypatch):
    monkeypatch.setattr(data_decode, "bare", lambda data: torch.zeros(3, 5, 64, 96, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="makes other pixels than bare PyAV"):
        data_decode.measure(5, (64, 96), 48, 1, 1, lambda text: None)


def test_bad_numbers():
    with pytest.raises(ConfigError, match="--rounds is 0"):
        main(["decode", "--rounds", "0"])
