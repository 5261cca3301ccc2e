"""Throughput: what it logs adds up, it names who is slow, and training does not notice it."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from factories import callback, fit, keep_checkpoints, log_to_csv, logged_rows, make_config

from bernini.errors import ConfigError
from callbacks import Throughput
from callbacks.speeds import Counted, slowest, summarize
from callbacks.throughput import _compiled
from callbacks.timeline import SECTIONS
from datamodules.loading import Clips

SPEED = callback("callbacks.Throughput", peak_tflops=0.01)
NO_DROPOUT = dict.fromkeys(("text", "image", "video"), 0.0)


class Dawdling(L.Callback):
    """Has one rank lose time before every batch."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank:
            time.sleep(self.seconds)


def configure(wan: Path, shards: Path, run: Path, steps: int, *callbacks: Any, every: int = 2) -> dict[str, Any]:
    config = make_config(wan, shards, run, expert="both", dropout=NO_DROPOUT)
    config["trainer"] |= {"max_steps": steps, "limit_val_batches": 1, "callbacks": list(callbacks)}
    config["trainer"] |= {"accumulate_grad_batches": 2, "val_check_interval": 2, "num_sanity_val_steps": 1}
    log_to_csv(config, run, every=every)
    return config


def test_training_goes_on_as_without_it_and_figures_add_up(wan: Path, shards: Path, tmp_path: Path) -> None:
    (plain,) = fit(configure(wan, shards, tmp_path / "plain", 4))
    began = time.perf_counter()
    (watched,) = fit(configure(wan, shards, tmp_path / "watched", 4, SPEED))
    took = time.perf_counter() - began
    assert watched == plain, "losses and validations, to the bit"

    rows = logged_rows(tmp_path / "watched", "speed")
    assert [row["step"] for row in rows] == [1, 3]
    seconds = [2 * row["speed/step_s"] for row in rows]
    assert 0 < sum(seconds) < took
    for row, window in zip(rows, seconds, strict=True):
        assert sum(row[f"speed/time/{name}_s"] for name in SECTIONS) == pytest.approx(row["speed/step_s"], rel=1e-4)
        assert row["speed/samples_per_s"] * window == pytest.approx(4, rel=1e-4)
        assert row["speed/mfu"] == pytest.approx(row["speed/tflops"] / 0.01, rel=1e-4)
        assert row["speed/data_wait"] == pytest.approx(row["speed/time/data_s"] / row["speed/step_s"], rel=1e-4)
        assert row["speed/time/backward_s"] > 0 and row["speed/time/optimizer_s"] > 0
    # Four edits of 8 + 8 tokens and four clips of 8, each of them noised for both experts.
    tokens, made = (sum(row[f"speed/renderer/{k}_per_s"] * s for row, s in zip(rows, seconds, strict=True))
                    for k in ("tokens", "target_tokens"))  # fmt: skip
    assert (tokens, made) == pytest.approx((2 * 96, 2 * 64), rel=1e-4)


def test_padding_is_what_packs_leave_of_their_budget(wan: Path, shards: Path, tmp_path: Path) -> None:
    config = configure(wan, shards, tmp_path, 3, SPEED, every=1)
    config["data"]["init_args"]["pack"] = {"tokens": 40, "window": 2}
    config["trainer"] |= {"accumulate_grad_batches": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    fit(config)
    left = [row["data/padding"] for row in logged_rows(tmp_path, "data")]
    assert [row["speed/padding"] for row in logged_rows(tmp_path, "speed")] == pytest.approx(left, abs=1e-6)
    assert len(left) == 3 and max(left) > 0


def test_a_resumed_run_logs_on(wan: Path, shards: Path, tmp_path: Path) -> None:
    for steps in (2, 4):
        config = configure(wan, shards, tmp_path, steps, SPEED)
        keep_checkpoints(config, tmp_path / "kept")
        fit(config, *(["--ckpt_path", str(tmp_path / "kept" / "last.ckpt")] if steps == 4 else []))
    assert [row["step"] for row in logged_rows(tmp_path, "speed")] == [1, 3]


def test_waiting_for_data_is_told_apart(
    wan: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Clips.__getitem__
    monkeypatch.setattr(Clips, "__getitem__", lambda self, request: (time.sleep(0.2), read(self, request))[1])
    fit(configure(wan, shards, tmp_path, 4, SPEED))
    last = logged_rows(tmp_path, "speed")[-1]
    assert last["speed/time/data_s"] > 2 * 0.2
    assert last["speed/data_wait"] > 0.3


def test_ranks_are_summed_and_the_slow_one_is_named(wan: Path, shards: Path, tmp_path: Path) -> None:
    dawdling = callback("test_throughput.Dawdling", rank=1, seconds=0.3)  # as if its batches came late
    config = configure(wan, shards, tmp_path, 4, dawdling, SPEED)
    config["trainer"] |= {"devices": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    config["trainer"]["strategy"] = callback(
        "lightning.pytorch.strategies.DDPStrategy", process_group_backend="gloo", find_unused_parameters=False
    )
    fit(config, ranks=2)
    last = logged_rows(tmp_path, "speed")[-1]
    assert last["speed/samples_per_s"] * 2 * last["speed/step_s"] == pytest.approx(2 * 2 * 2, rel=1e-4)
    assert last["speed/slowest/rank"] == 1
    assert last["speed/slowest/data_s"] > 2 * 0.3 > last["speed/slowest/optimizer_s"]
    assert last["speed/slowest/behind"] > 0.3


COUNTED = Counted(
    samples=4, steps=2, flop=6e12, compiled=0, memory=2**31, packs=2, renderer_tokens=180, renderer_targets=90,
    planner_tokens=0, planner_targets=0, data=0.1, forward=1.0, backward=2.0, optimizer=0.5, rest=0.4,
)  # fmt: skip


def rank(**other: float) -> Counted:
    return Counted(**{**asdict(COUNTED), **other})


def test_figures_of_several_ranks() -> None:
    figures = summarize([rank(), rank(compiled=3, memory=2**30, forward=2.0)], copies=1, peak=10.0, budget=100)
    assert figures["speed/samples_per_s"] == pytest.approx(8 / 5)
    assert figures["speed/tflops"] == pytest.approx(12 / 5 / 2)
    assert figures["speed/mfu"] == pytest.approx(0.12)
    assert figures["speed/padding"] == pytest.approx(0.1)
    assert figures["speed/compiles"] == 3
    assert [figures[f"speed/{name}"] for name in ("peak_gib", "peak_gib_rank_0", "peak_gib_rank_1")] == [2, 2, 1]
    assert "speed/planner/tokens_per_s" not in figures
    shared = summarize([rank(), rank()], copies=2, peak=None, budget=None)
    assert shared["speed/samples_per_s"] == pytest.approx(1) and shared["speed/tflops"] == pytest.approx(6 / 4 / 2)
    assert shared.keys().isdisjoint({"speed/mfu", "speed/padding"})


@pytest.mark.parametrize(
    ("late", "others", "section"),
    [
        ({"data": 0.9}, {"forward": 1.8}, "data"),  # they wait for the count of targets, in the forward pass
        ({"forward": 1.8, "backward": 3.6}, {"backward": 4.4}, "forward"),  # they wait for its gradients
        ({"optimizer": 1.3}, {"rest": 1.2}, "optimizer"),  # they wait in Lightning's look for a signal
    ],
)
def test_the_rank_that_others_wait_for(late: dict[str, float], others: dict[str, float], section: str) -> None:
    found, what, seconds = slowest([rank(**others), rank(**others), rank(**late)])
    assert (found, what) == (2, section) and seconds == pytest.approx(0.8)


def test_compilations_are_counted() -> None:
    before = _compiled()
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    for size in (2, 3, 3):
        double(torch.ones(size))
    assert _compiled() - before == 2


def test_a_peak_is_positive() -> None:
    with pytest.raises(ConfigError, match="peak_tflops is 0"):
        Throughput(peak_tflops=0)
