"""ToyCoTrainBankDataModule: toy samples drawn, written and encoded once, then trained from the device's memory."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset

from bernini.conversation import Batch
from bernini.cotraining.bank import NUMBERS, CoBank, CoStack, load_costacks, save_costacks
from bernini.cotraining.module import CoTrainingModule
from bernini.errors import ConfigError
from bernini.planner.bank import PlanStack, join, write
from bernini.planner.template import PlannerTemplate
from bernini.reasoning import unfold
from datamodules.loading import Loader
from datamodules.order import Request
from datamodules.toyworld.bank import Encoder, Kind, check_alone, in_parts, kind_of, rows_loader, shares, weights_of
from datamodules.toyworld.data import ToyWorld, ToyWorldDataModule
from datamodules.toyworld.plan_bank import words_of


class Pairs(Dataset[tuple[PlanStack, Batch]]):
    """Draws the samples of a request: as the planner reads them, and as they are.

    Args:
        world: Where they come from.
        template: Writes them.
    """

    def __init__(self, world: ToyWorld, template: PlannerTemplate) -> None:
        self.world, self.template = world, template

    def __getitem__(self, request: Request) -> tuple[PlanStack, Batch]:
        parts = [part for number in request.samples for part in unfold(self.world[number])]
        written = join([write(part, self.template) for part in parts])
        for part in parts:
            for media in part.media():
                media.visual = None  # it is in what was written
        return written, Batch(parts)


class ToyCoTrainBankDataModule(ToyWorldDataModule):
    """Draws toy samples once, writes and encodes them for planner and renderer, and keeps them on their device.

    For `bernini.cotraining.banked.BankedCoTrainingModule`. Every batch holds the same number of samples of each kind
    (task and number of sources; what has no target is one kind), about in proportion to what was drawn. Which ones is
    a function of the seed and the batch's number alone. Texts have at most as many rows as the module's ``text.rows``,
    as in sampling. Validation batches are the parent's.

    Args:
        *args: As `ToyWorldDataModule`, but ``length`` samples are all there are, and an epoch goes over them once.
        vae: Folder of the VAE.
        text: Folder with ``text_encoder/`` and ``tokenizer/``.
        folder: Where the samples are kept for further runs of the same settings; null keeps them in memory alone.
        **kwargs: As `ToyWorldDataModule`.
    """

    def __init__(self, *args: Any, vae: str, text: str, folder: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vae, self.text = vae, text
        self.folder = Path(folder) if folder else None
        self.bank: CoBank | None = None

    def setup(self, stage: str) -> None:
        """Draw, write and encode the training samples.

        Raises:
            ConfigError: There are several ranks, nothing to render, or more kinds than samples in a batch.
        """
        super().setup(stage)
        check_alone(self)
        if stage != "fit" or self.bank:
            return
        assert self.trainer is not None
        module, device = cast(CoTrainingModule, self.trainer.lightning_module), self.trainer.strategy.root_device
        made_from = self._made_from(module)
        if self.folder and (self.folder / NUMBERS).is_file():
            plans, stacks = load_costacks(self.folder, device, made_from)
        else:
            plans, stacks = self._make(module, device)
            if self.folder:
                save_costacks(self.folder, plans, stacks, made_from)
        if stacks[0].clips is None:
            raise ConfigError(
                "no sample has a target",
                where="data.init_args.tasks",
                why="a renderer learns from targets",
                fix="add a task that makes an image or a clip",
            )
        if len(stacks) > self.batch_size:
            raise ConfigError(
                f"{len(stacks)} kinds of samples in a batch of {self.batch_size}",
                where="data.init_args.batch_size",
                why="a batch has some of every kind",
                fix=f"{len(stacks)} or more, or fewer tasks",
            )
        self.bank = CoBank(tuple(stacks), tuple(shares([len(stack) for stack in stacks], self.batch_size)), plans)

    def _make(self, module: CoTrainingModule, device: torch.device) -> tuple[PlanStack, list[CoStack]]:
        """All samples, and those of each kind."""
        requests = in_parts(self.length)
        drawn: Iterable[tuple[PlanStack, Batch]] = self.loader(
            Pairs(self._train, module.template), lambda: requests, len(requests), self.seed
        )
        written: list[PlanStack] = []
        alone: list[int] = []
        numbers: dict[Kind, list[int]] = defaultdict(list)

        def with_targets() -> Iterator[Batch]:
            for sheet, batch in drawn:
                first = sum(map(len, written))
                # Copies: what workers send lies in memory that is shared with them, of which there is little.
                written.append(sheet.map(lambda x: x.to(device, copy=True)))
                for number, sample in enumerate(batch.samples, first):
                    (numbers[kind_of(sample)] if sample.targets else alone).append(number)
                yield Batch([sample for sample in batch.samples if sample.targets])

        encoded = Encoder(self.vae, self.text, module.text.rows, device).stacks(with_targets())
        own = [torch.tensor(numbers[kind], device=device) for kind in sorted(numbers)]
        stacks = [CoStack(*pair) for pair in zip(own, encoded, strict=True)]
        return join(written), stacks + ([CoStack(torch.tensor(alone, device=device))] if alone else [])

    def _made_from(self, module: CoTrainingModule) -> str:
        """The world, how many samples of it, and how they are written and encoded."""
        given = f"{self._train}, {self.length} samples, {module.template.vision}, tokenizer {words_of(module.template)}"
        return f"{given}, {module.text.rows} rows, {weights_of(self.vae, self.text)}"

    def train_dataloader(self) -> Loader:
        """Rows of the bank, from the cursor on; an epoch is one pass over as many samples as were drawn."""
        assert self.bank is not None
        return rows_loader(self, self.bank, self.length, self.seed)
