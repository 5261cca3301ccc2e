from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from factories import build, callback, fit, keep_checkpoints, make_config, write_config
from torch import Tensor

from bernini.errors import CheckpointError, ConfigError
from bernini.lightning_cli import run_lightning
from callbacks import EMA


class Weights(L.Callback):
    """Keeps a copy of one weight after every step, during and after every validation."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []
        self.after: list[Tensor] = []

    @staticmethod
    def copy(module: Any) -> Tensor:
        return module.renderer.transformer.proj_out.weight.detach().clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.trained.append(self.copy(pl_module))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append(self.copy(pl_module))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.after.append(self.copy(pl_module))


@pytest.fixture(scope="module")
def run(wan: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, EMA]:
    """Four steps of two batches each, validated after the second and the fourth."""
    folder = tmp_path_factory.mktemp("ema")
    config = make_config(wan, shards, folder)
    config["trainer"] |= {"max_steps": 4, "accumulate_grad_batches": 2, "val_check_interval": 4, "limit_val_batches": 1}
    cli = run_lightning(["-c", write_config(folder / "c.yaml", config)], run=False)
    weights, ema = Weights(), EMA(decay=0.7, warmup=False)
    cli.trainer.callbacks[:0] = [ema, weights]
    cli.trainer.fit(cli.model, cli.datamodule)
    return weights, ema


def test_average_is_the_closed_form(run: tuple[Weights, EMA], wan: Path) -> None:
    weights, ema = run
    steps = [weights.after[0], *weights.trained[1::2]]  # the weights before the run and after each of the four steps
    shares = [0.7**4, *(0.3 * 0.7 ** (3 - k) for k in range(4))]
    expected = sum(share * w for share, w in zip(shares, steps, strict=True))
    name = "renderer.transformer.proj_out.weight"
    torch.testing.assert_close(ema.state_dict()["average"][name], expected, rtol=0, atol=1e-7)


def test_validation_sees_the_average_and_training_the_live_weights(run: tuple[Weights, EMA]) -> None:
    weights, ema = run
    name = "renderer.transformer.proj_out.weight"
    assert torch.equal(weights.validated[-1], ema.state_dict()["average"][name])
    assert not torch.equal(weights.validated[0], weights.trained[3])
    assert torch.equal(weights.after[4], weights.trained[3])  # the step after the first validation


def test_warmup_starts_with_a_short_memory(wan: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(wan, shards, tmp_path)
    config["trainer"] |= {"max_steps": 1}
    config["trainer"]["callbacks"] = [callback("callbacks.EMA", decay=0.9999)]
    keep_checkpoints(config, tmp_path)
    fit(config)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    name = "renderer.transformer.proj_out.weight"
    before = Weights.copy(build(config, tmp_path))
    expected = before.lerp(state["state_dict"][name], 1 - 2 / 11)
    torch.testing.assert_close(state["callbacks"]["EMA"]["average"][name], expected, rtol=0, atol=1e-7)


def test_checkpoint_is_validated_and_sampled_with_its_average(wan: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(wan, shards, tmp_path)
    config["trainer"]["limit_val_batches"] = 2
    config["trainer"]["callbacks"] = [callback("callbacks.EMA", decay=0.5, warmup=False)]
    keep_checkpoints(config, tmp_path)
    during = fit(config)[0]["metrics"][-1]
    after = fit(config, f"--ckpt_path={tmp_path / 'last.ckpt'}", verb="validate")[0]["metrics"][-1]
    assert after == during
    live = {**config, "trainer": {**config["trainer"], "callbacks": []}}
    assert fit(live, f"--ckpt_path={tmp_path / 'last.ckpt'}", verb="validate")[0]["metrics"][-1] != during


def test_average_of_other_weights_is_refused(wan: Path, shards: Path, tmp_path: Path) -> None:
    module = build(make_config(wan, shards, tmp_path), tmp_path)
    ema = EMA()
    ema.load_state_dict({"average": {"renderer.transformer.proj_out.weight": torch.zeros(3)}})
    with pytest.raises(CheckpointError, match="average"):
        ema.swap_in(module)
    with pytest.raises(ConfigError, match="decay"):
        EMA(decay=1.0)
