"""What a run that learns to see leaves for one that learns to plan."""

from pathlib import Path

import pytest
import torch
from factories import callback, fit
from planners import SIZE, make_planner, make_planner_config, make_planner_samples

from bernini.planner.model import load_planner
from bernini.planner.module import PlannerModule
from bernini.planner.scale import scale_embeddings
from bernini.planner.template import pack
from datamodules.toyworld.data import ToyWorld


def look(module: PlannerModule) -> tuple[torch.Tensor, ...]:
    """ViT embeddings, logits and both conditions of some samples."""
    packed = pack([module.template(sample) for sample in make_planner_samples()])
    with torch.no_grad():
        output = module.planner(packed)
        hidden = output.hidden
        conditions = module.planner.connector.for_gen(hidden), module.planner.connector.for_vit(hidden)
        return module.planner.see(packed.visuals), output.logits, *conditions


@pytest.mark.parametrize("factor", [0.05, 7.0])
def test_scaled_embeddings_are_read_as_before(factor: float) -> None:
    module = make_planner()
    for norm in module.planner.text.modules():
        if hasattr(norm, "variance_epsilon"):
            norm.variance_epsilon = 0.0
    torch.nn.init.normal_(module.planner.connector.proj_gen[-1].weight)
    seen, *before = look(module)
    scale_embeddings(module.planner, factor)
    scaled, *after = look(module)
    torch.testing.assert_close(scaled, factor * seen)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_fit_leaves_embeddings_of_unit_variance_and_its_own_weights(tmp_path: Path) -> None:
    config = make_planner_config(tmp_path, 4, train_vit=True)
    folders = {name: tmp_path / name for name in ("SavePlanner", "SaveSight", "after")}
    names = ("SavePlanner", "SaveSight", "SavePlanner")
    config["trainer"]["callbacks"] += [
        callback(f"callbacks.{name}", folder=str(folder)) for name, folder in zip(names, folders.values(), strict=True)
    ]
    fit(config)
    world, template = ToyWorld(config["data"]["init_args"]["tasks"], **SIZE, split="held_out"), make_planner().template
    visuals = [visual for number in range(6) for visual in template(world[number]).visuals]
    plain, sight, after = (load_planner(folder) for folder in folders.values())
    with torch.no_grad():
        assert plain.see(visuals).std().item() != pytest.approx(1, abs=0.1)
        assert sight.see(visuals).std().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(after.state_dict(), plain.state_dict(), rtol=0, atol=0)
