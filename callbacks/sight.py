"""A planner that has learned to see, written for one that is to learn to plan."""

import lightning as L
import torch

from bernini.planner.module import PlannerModule
from bernini.planner.scale import scale_embeddings
from callbacks.export import SavePlanner


class SaveSight(SavePlanner):
    """Writes a planner as `SavePlanner` does, with ViT embeddings of unit variance, as flow matching wants its data.

    Next-token prediction leaves them at any scale. The language model reads the scaled ones as it read its own. Their
    variance is that of the first validation batch.

    Args:
        folder: As `SavePlanner`.
        dtype: As `SavePlanner`.
    """

    def save(self, module: L.LightningModule, write: bool) -> None:
        """Write the planner; the run's own weights stay as they are."""
        assert isinstance(module, PlannerModule)
        batch = next(iter(module.trainer.datamodule.val_dataloader()))  # type: ignore[attr-defined]
        with torch.no_grad():
            seen = module.planner.see([v for sample in batch.samples for v in module.template(sample).visuals])
        own = {name: tensor.clone() for name, tensor in module.planner.state_dict().items()}
        scale_embeddings(module.planner, 1 / seen.std().item())
        super().save(module, write)
        module.planner.load_state_dict(own)  # dividing again would round
