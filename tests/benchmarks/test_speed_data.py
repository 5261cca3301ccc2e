import json
import time

import pytest
import torch

from benchmarks.speed import data_decode
from benchmarks.speed.data import main
from bernini.errors import ConfigError
from datamodules.shards import Shards


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


def test_reading_is_timed(tmp_path, capsys):
    figures = main(
        f"read --samples 3 --latent 3 4 4 --text-rows 2 --rounds 2 --json {tmp_path / 'figures.json'}".split()
    )
    assert json.loads((tmp_path / "figures.json").read_text())["bytes"] == figures["bytes"]
    assert figures["bytes"] > 3 * 2 * (32 * 3 * 4 * 4 + 2 * 4096)  # bf16
    assert figures["mb_per_second"] == pytest.approx(figures["bytes"] / figures["ms"]["median"] / 1e3)
    assert f"{figures['mb_per_second']:.0f} MB/s" in capsys.readouterr().out


def test_waiting_is_timed(tmp_path, capsys, monkeypatch):
    """Of a run whose samples come late, nearly all is waiting."""
    tiny = "wait --device cpu --model tiny --samples 3 --latent 3 4 4 --text-rows 8 --workers 0 --rounds 3 --warmup 1"
    figures = main([*tiny.split(), "--json", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text())["wait"] == figures["wait"]
    assert 0 < figures["wait"] < 0.5
    assert f"{figures['wait']:.2%} of all steps is waiting" in capsys.readouterr().out
    read = Shards.read
    monkeypatch.setattr(Shards, "read", lambda *args: time.sleep(0.3) or read(*args))
    late = main(tiny.split())
    assert late["wait_ms"]["fastest"] > 300 and late["wait"] > 2 * figures["wait"]


def test_bad_numbers():
    with pytest.raises(ConfigError, match="--rounds is 0"):
        main(["decode", "--rounds", "0"])
    with pytest.raises(ConfigError, match="--samples is 0"):
        main(["read", "--samples", "0"])
