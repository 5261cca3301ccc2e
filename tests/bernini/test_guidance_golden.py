"""Guidance projections against numbers of the released implementation."""

import pytest
import torch
from safetensors.torch import load_file

from bernini.flow.guidance import APG, MODES, Arm, Guide, Omegas, decompose


@pytest.fixture(scope="module")
def golden(goldens):
    """Predictions ``[C, T, H, W]`` of the clean latent, and what the released projections make of them."""
    return {name: x[0] for name, x in load_file(goldens / "guidance.safetensors").items()}


def test_golden_delta_projection(golden, relative_error):
    delta = decompose(golden["cond"] - golden["uncond"], golden["cond"], (0, 1, 2, 3), parallel=0.2)
    assert relative_error(delta, golden["apg_delta"]) < 1e-5


@pytest.mark.parametrize(
    ("mode", "omegas", "arms", "expected"),
    [
        ("t2v_apg", Omegas(txt=4.0), {("none", "negative"): "uncond", ("none", "positive"): "cond"}, "normalized"),
        (
            "r2v_apg",
            Omegas(img=2.5, txt=4.0),
            {("none", "negative"): "uncond", ("images", "negative"): "mid", ("images", "positive"): "cond"},
            "chain",
        ),
    ],
)
@pytest.mark.parametrize("sigma", [1.0, 0.25])
def test_golden_apg_guidance(golden, relative_error, randn, mode, omegas, arms, expected, sigma):
    x = randn(0)(golden["cond"].shape)
    guide = Guide(MODES[mode], omegas, APG(eta=0.5, threshold=5.0))
    velocities = {Arm(*arm): (x - golden[name]) / sigma for arm, name in arms.items()}
    guided = x - sigma * guide.combine(velocities, x, sigma, low=False)
    assert relative_error(guided, golden[expected]) < 1e-5


def test_golden_deltas_exceed_the_threshold(golden):
    norms = torch.linalg.vector_norm(golden["cond"] - golden["uncond"], dim=(0, 2, 3))
    assert (norms > 5).all(), "the goldens above would not show a missing clip"
