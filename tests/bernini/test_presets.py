"""Presets against the released scripts, and who has the last word on a setting."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bernini.errors import CheckpointError, ConfigError
from bernini.presets import PRESETS, Defaults
from bernini.tasks import TASKS

WEIGHTS = ("omega_vid", "omega_img", "omega_txt", "omega_tgt", "omega_scale")


def weights(preset: str, task: str) -> tuple[float, ...]:
    settings = Defaults().settle(task, preset != "r", preset)
    return tuple(getattr(settings, name) for name in WEIGHTS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_settings_that_the_model_takes(preset: str, task: str) -> None:
    settings = Defaults().settle(task, preset != "r", preset)
    sampling, planning = settings.sampling(), settings.planning()
    assert (sampling.mode, sampling.shift, sampling.seed, settings.fps) == (settings.mode, 5.0, 42, 16.0)
    assert (planning.txt, planning.img, planning.order) == (1.2, 1.0, "random")
    assert tuple(asdict(sampling.omegas).values()) == weights(preset, task)


@pytest.mark.parametrize(
    ("preset", "task", "steps", "mode", "omegas"),
    [
        ("r", "v2v", 40, "v2v_apg", (1.25, 4.5, 4.0, 0.5, 0.8)),
        ("r", "t2i", 40, "t2v_apg", (1.25, 4.5, 4.0, 0.5, 0.8)),
        ("v1", "t2v", 50, "vae_txt_vit_wapg", (1.0, 1.0, 4.0, 0.5, 1.0)),
        ("v1", "i2i", 40, "vae_txt_vit_wapg", (1.25, 1.25, 4.0, 0.5, 0.75)),
        ("v1", "ads2v", 40, "vae_txt_vit_wapg", (1.25, 1.25, 4.0, 0.5, 0.75)),
        ("v1", "r2v", 40, "vae_txt_vit_wapg", (1.25, 4.5, 4.0, 1.5, 0.8)),
        ("v1", "rv2v", 40, "rv2v_wapg", (0.75, 3.0, 4.0, 1.5, 0.75)),
        ("v2", "t2v", 50, "vae_txt_vit_wapg", (1.0, 1.0, 5.0, 1.2, 1.0)),
        ("v2", "t2i", 50, "vae_txt_vit_wapg", (1.0, 1.0, 4.0, 0.5, 1.0)),
        ("v2", "mv2v", 40, "vae_txt_vit_wapg", (1.25, 1.25, 4.0, 1.2, 0.75)),
        ("v2", "r2v", 40, "vae_txt_vit_wapg", (1.0, 3.0, 4.5, 1.5, 0.75)),
        ("v2", "rv2v", 40, "rv2v_wapg", (1.75, 4.5, 4.0, 0.5, 0.75)),
    ],
)
def test_presets_are_the_released_ones(
    preset: str, task: str, steps: int, mode: str, omegas: tuple[float, ...]
) -> None:
    settings = Defaults().settle(task, preset != "r", preset)
    assert (settings.steps, settings.mode, weights(preset, task)) == (steps, mode, omegas)
    assert (settings.planning_steps, settings.planning_flow_steps) == ((50, 1) if preset == "v2" else (25, 5))
    square = preset != "r" and TASKS[task].target == "image"
    assert (settings.height, settings.width) == ((512, 512) if square else (480, 848))
    assert settings.min_edge == (1 if preset == "r" else 240)


def test_later_layers_go_before_earlier_ones() -> None:
    told = {"without_plan": {"steps": 16, "mode": "v2v"}, "with_plan": {"preset": "v1", "steps": 8}}
    folder = Defaults(told)
    assert folder.settle("v2v", False, None).mode == "v2v"
    assert folder.settle("v2v", False, None, {"mode": "v2v_chain"}, {"steps": 3}).steps == 3
    first, second = folder.settle("t2v", True, None), folder.settle("t2v", True, "v2")
    assert (first.steps, first.planning_steps) == (8, 25) and (second.steps, second.planning_steps) == (8, 50)
    assert Defaults().settle("t2v", True, None, {"steps": 8}) == second


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"step": 4}, "unknown setting 'step'"),
        ({"omega_txt": "4"}, "omega_txt has the value '4'"),
        ({"steps": True}, "steps has the value True"),
        ({"frames": 80}, "frames is 80"),
        ({"height": 100}, "height is 100"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"solver": "heun"}, "unknown solver 'heun'"),
        ({"planning_order": "raster"}, "unknown planning_order"),
        ({"mode": "vae_txt_vit"}, "needs a plan"),
    ],
)
def test_settings_without_a_meaning_are_refused(given: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Defaults().settle("v2v", False, None, given)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"steps": 4}', '{"with_plan": {"step": 4}}', '{"with_plan": 3}', '{"with_plan": {"preset": ["r"]}}'],
)
def test_damaged_file_of_a_folder_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generate.json").write_text(text)
    with pytest.raises(CheckpointError, match="settings cannot be read") as caught:
        Defaults.of(tmp_path)
    assert str(tmp_path / "generate.json") in str(caught.value)


def test_a_file_survives_saving(tmp_path: Path) -> None:
    told = {"with_plan": {"preset": "v1", "steps": 8}}
    Defaults(told).save(tmp_path)
    assert json.loads((tmp_path / "generate.json").read_text()) == told
    assert Defaults.of(tmp_path).settle("t2v", True, None).steps == 8
    Defaults().save(tmp_path / "none")
    assert not (tmp_path / "none").exists()
