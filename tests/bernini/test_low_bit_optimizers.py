import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import fit, keep_checkpoints, make_config

GUIDE = (Path(__file__).parents[2] / "docs" / "small-gpus.md").read_text()


def test_run_with_eight_bit_states_is_resumed_to_the_bit(wan: Path, shards: Path, tmp_path: Path) -> None:
    optimizers = pytest.importorskip("torchao.optim")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    given: dict[str, Any] = yaml.safe_load(block)
    losses = {}
    for name, stops in (("whole", [4]), ("broken", [2, 4])):
        config = make_config(wan, shards, tmp_path / name, **given["model"]["init_args"])
        config["trainer"] |= given["trainer"]
        keep_checkpoints(config, tmp_path / name)
        losses[name] = []
        for stop in stops:
            with torch.compiler.set_stance("force_eager"):  # compiling the optimizer takes longer than the run
                losses[name] += fit(config, "--ckpt_path", "auto", f"--trainer.max_steps={stop}")[0]["losses"]
    assert losses["whole"] == losses["broken"] and len(losses["whole"]) == 4
    kept = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True, map_location="cpu")
    states = [v for state in kept["optimizer_states"][0]["state"].values() for v in state.values()]
    assert any(isinstance(state, optimizers.subclass_8bit.OptimState8bit) for state in states)
