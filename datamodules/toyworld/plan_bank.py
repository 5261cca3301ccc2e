"""ToyPlanBankDataModule: toy samples drawn and written once, then planners trained from the device's memory."""

import hashlib
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset

from bernini.bank import Bank
from bernini.planner.bank import PlanStack, join, write
from bernini.planner.module import PlannerModule
from bernini.planner.template import PlannerTemplate
from bernini.reasoning import unfold
from datamodules.loading import Loader
from datamodules.order import Request
from datamodules.toyworld.bank import check_alone, in_parts, rows_loader
from datamodules.toyworld.data import ToyWorld, ToyWorldDataModule


class Sheets(Dataset[PlanStack]):
    """Draws the samples of a request and writes them as one stack.

    Args:
        world: Where they come from.
        template: Writes them.
    """

    def __init__(self, world: ToyWorld, template: PlannerTemplate) -> None:
        self.world, self.template = world, template

    def __getitem__(self, request: Request) -> PlanStack:
        parts = (part for number in request.samples for part in unfold(self.world[number]))
        return join([write(part, self.template) for part in parts])


class ToyPlanBankDataModule(ToyWorldDataModule):
    """Draws toy samples once, writes them as the trained planner reads them and keeps them on its device.

    For `bernini.planner.banked.BankedPlannerModule`. The tasks of a batch vary around their parts; which samples it
    has is a function of the seed and the batch's number alone. Validation batches are the parent's.

    Args:
        *args: As `ToyWorldDataModule`, but ``length`` samples are all there are, and an epoch goes over them once.
        file: Where the written samples are kept for further runs of the same settings; null keeps them in memory alone.
        **kwargs: As `ToyWorldDataModule`.
    """

    def __init__(self, *args: Any, file: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.file = Path(file) if file else None
        self.bank: Bank[PlanStack] | None = None

    def setup(self, stage: str) -> None:
        """Draw and write the training samples.

        Raises:
            ConfigError: There are several ranks.
        """
        super().setup(stage)
        check_alone(self)
        if stage != "fit" or self.bank:
            return
        assert self.trainer is not None
        template = cast(PlannerModule, self.trainer.lightning_module).template
        device = self.trainer.strategy.root_device
        made_from = self._made_from(template)
        if self.file and self.file.is_file():
            stack = PlanStack.load(self.file, device, made_from)
        else:
            requests = in_parts(self.length)
            drawn = self.loader(Sheets(self._train, template), lambda: requests, len(requests), self.seed)
            # Copies: what workers send lies in memory that is shared with them, of which there is little.
            stack = join([part.map(lambda x: x.to(device, copy=True)) for part in drawn])
            if self.file:
                stack.save(self.file, made_from)
        self.bank = Bank((stack,), (self.batch_size,))

    def _made_from(self, template: PlannerTemplate) -> str:
        """The world, how many samples of it, and how they are written."""
        return f"{self._train}, {self.length} samples, {template.vision}, tokenizer {words_of(template)}"

    def train_dataloader(self) -> Loader:
        """Rows of the bank, from the cursor on; an epoch is one pass over as many samples as were drawn."""
        assert self.bank is not None
        return rows_loader(self, self.bank, self.length, self.seed)


def words_of(template: PlannerTemplate) -> str:
    """A hash of the tokenizer that writes samples."""
    return hashlib.sha256(template.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
