import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import build, fit, keep_checkpoints, make_config
from test_swapping import make_pack

from bernini.errors import ConfigError
from bernini.float8 import compute_in_float8


def test_gradients_are_those_of_rounded_products_and_names_stay(
    tiny_model: Any, randn: Any, relative_error: Any
) -> None:
    linear = pytest.importorskip("torchao.float8.float8_linear").Float8Linear
    plain = tiny_model()
    rounded = copy.deepcopy(plain)
    compute_in_float8(rounded.blocks)
    assert list(rounded.state_dict()) == list(plain.state_dict())
    changed = {n for n, m in rounded.named_modules() if isinstance(m, linear)}
    assert len(changed) == 2 * 8 and not any("attn2.to_k" in n or "attn2.to_v" in n for n in changed)
    packed = make_pack(randn)
    outputs, gradients = [], []
    for model in (plain, rounded):
        outputs.append(model(packed))
        outputs[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.blocks.parameters()]))
    for values in (outputs, gradients):
        assert 1e-3 < relative_error(values[1], values[0]) < 0.1


def test_run_in_float8_is_resumed_and_checkpoints_fit_one_without(wan: Path, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao.float8")
    losses = {}
    for name, stops in (("whole", [3]), ("broken", [1, 3])):
        config = make_config(wan, shards, tmp_path / name, float8=True)
        keep_checkpoints(config, tmp_path / name)
        runs = [fit(config, "--ckpt_path", "auto", f"--trainer.max_steps={stop}")[0]["losses"] for stop in stops]
        losses[name] = [loss for run in runs for loss in run]
    assert losses["whole"] == losses["broken"] and len(losses["whole"]) == 3
    stored = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["state_dict"]
    build(make_config(wan, shards, tmp_path), tmp_path).load_state_dict(stored)


def test_float8_is_refused_where_it_cannot_be(
    wan: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="float8 is for training all weights"):
        build(make_config(wan, shards, tmp_path, float8=True, lora={"rank": 2}), tmp_path)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="float8 takes torchao"):
        build(make_config(wan, shards, tmp_path, float8=True), tmp_path)
