"""Plans of validation samples as pictures."""

from pathlib import Path

import lightning as L

from bernini.media import write_image
from bernini.planner.measuring import PlansMeasured
from callbacks.samples import of_all_ranks, show


class PlanPictures(L.Callback):
    """Shows what validation planned: ``folder/step-000500/KEY.png``, and ``plans`` in W&B.

    Each picture has the frames of the true target, and below them the plan: in the place of every token the most
    similar patch of the planned samples' true targets.

    Args:
        folder: Where to.
        count: How many plans, the first ones.
    """

    def __init__(self, folder: str, count: int = 8) -> None:
        self.folder, self.count = Path(folder), count

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the plans that the module still holds."""
        assert isinstance(pl_module, PlansMeasured)
        if trainer.sanity_checking or pl_module.plans is None:
            return
        folder = self.folder / f"step-{trainer.global_step:06d}"
        rows = []
        for picture in pl_module.plans.pictures(-(-self.count // trainer.world_size)):
            write_image(folder / f"{picture.key}.png", picture.pixels)
            rows.append({"key": picture.key, "prompt": picture.prompt, "file": f"{picture.key}.png"})
        rows = of_all_ranks(trainer, rows)
        if trainer.is_global_zero:
            show(trainer, folder, rows, {".png": "plans"})
