"""The commands and settings of docs/cotraining.md as they are written there, with tiny models and samples."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from bernini.cli import main

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "cotraining.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", GUIDE, re.DOTALL)
TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=1",
    "--data.batch_size=2",
    "--data.frames=5",
    "--data.height=32",
    "--data.width=32",
    "--data.val_length=2",
    "--model.sampling.steps=1",
    "--model.planning.steps=1",
    "--model.lr_scheduler.init_args.total_steps=3",
]


def test_the_toy_family_is_trained_as_the_guide_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUN", raising=False)
    for name in ("configs", "assets"):
        Path(name).symlink_to(ROOT / name)
    commands = [shlex.split(line) for block in BLOCKS for line in block.splitlines() if line.startswith("bernini")]
    assert [command[3] for command in commands] == [f"configs/toy/{x}.yaml" for x in ("warmup", "cotrain", "cotrain")]
    for command in commands:
        assert main([*command[1:], *TINY]) == 0
    left = {path.name for path in Path("runs/toy-cotrain/model").iterdir()}
    assert left == {"bernini", "mllm", "transformer", "transformer_2"}
    exposure = yaml.safe_load(Path("runs/toy-cotrain/config.yaml").read_text())["model"]["init_args"]["exposure"]
    assert exposure["visible"] == exposure["noised"] == 0.5

    (settings,) = (block for block in BLOCKS if block.startswith("stages"))
    given = {"model": {"init_args": yaml.safe_load(settings)}, "trainer": {"max_steps": 1}}
    del given["model"]["init_args"]["rates"]  # one rate for all is what OneCycleLR makes
    Path("stages.yaml").write_text(yaml.safe_dump(given))
    assert main(["fit", "-c", "configs/toy/cotrain.yaml", "-c", "stages.yaml", *TINY]) == 0


@pytest.mark.parametrize("line", [line for line in GUIDE.splitlines() if line.startswith("| `")])
def test_what_the_tables_name_exists(line: str) -> None:
    from bernini.cotraining.conditions import ConditionDropout
    from bernini.cotraining.exposure import PlanExposure
    from bernini.cotraining.stages import Part

    known = {*Part.__args__, *vars(ConditionDropout()), *vars(PlanExposure())}
    assert {*re.findall(r"`(\w+)`", line.split("|")[1])} <= known
