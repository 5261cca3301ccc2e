"""What plans show: a small reader, trained on true embeddings."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from bernini.errors import DataError
from bernini.planner.quality import check_pair


class Probe:
    """A small reader of plans, trained on true embeddings: what it cannot read from a plan, the plan does not show.

    A slot is a question with a closed list of answers. Tokens are standardised by the mean and deviation of those that
    the probe is trained on, and go through one layer, ``h_i = GELU(A x_i + a)``. Every slot has a linear head on all
    h_i end to end, so a probe reads plans of one grid. It is no `torch.nn.Module`, lest it end up among the parameters
    of a model that keeps it.

    Args:
        net: Embeddings ``[B, N, D]``, standardised, to logits ``[B, slots * answers]``.
        mean: ``[D]``.
        std: ``[D]``.
        slots: Number of answers of every slot.
        tokens: Number N of tokens of a plan.
    """

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor, slots: Mapping[str, int], tokens: int) -> None:
        self.net, self.mean, self.std, self.slots = net, mean, std, dict(slots)
        self.shape = (tokens, len(mean))
        sizes = torch.tensor(list(self.slots.values()), device=mean.device)
        self._void = torch.arange(int(sizes.max()), device=mean.device) >= sizes[:, None]

    @classmethod
    def fit(
        cls,
        embeds: Tensor,
        labels: Tensor,
        slots: Mapping[str, int],
        *,
        hidden: int = 64,
        steps: int = 400,
        batch: int = 256,
        seed: int = 0,
    ) -> "Probe":
        """Train a probe with AdamW, on the device of the embeddings; the same arguments give the same probe.

        It reads better the more examples there are; a few thousand make the toy world's rarer slots readable.

        Args:
            embeds: ``[B, N, D]`` true embeddings of targets of one grid.
            labels: ``[B, slots]`` int64 answers, -1 where the question does not arise.
            slots: Name and number of answers of every slot, in the order of the labels.
            hidden: Width of h.
            steps: Optimizer steps.
            batch: Examples of a step, drawn with replacement.
            seed: Of initialisation and draws.

        Raises:
            DataError: Embeddings and labels do not fit each other or the slots.
        """
        _check_labels(embeds, labels, slots)
        if ((labels < -1) | (labels >= torch.tensor(list(slots.values()), device=labels.device))).any():
            raise DataError("a label that its slot does not have", why="labels number answers from 0, or are -1")
        generator = torch.Generator().manual_seed(seed)
        # Validation runs in inference mode, and perhaps under autocast.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(embeds.device.type, enabled=False):
            values = embeds.detach().float()
            std, mean = torch.std_mean(values, dim=(0, 1), correction=0)
            answers = max(slots.values())
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                net = nn.Sequential(
                    nn.Linear(embeds.shape[2], hidden, dtype=torch.float32),
                    nn.GELU(),
                    nn.Flatten(),
                    nn.Linear(embeds.shape[1] * hidden, len(slots) * answers, dtype=torch.float32),
                ).to(embeds.device)
            probe = cls(net, mean, std.clamp(min=1e-6), slots, embeds.shape[1])
            optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(steps):
                rows = torch.randint(len(values), (batch,), generator=generator).to(embeds.device)
                logits, asked = probe._logits(values[rows]).flatten(0, 1), labels[rows].flatten()
                optimizer.zero_grad()
                # A mean over nothing, were no question asked, would be NaN.
                (cross_entropy(logits, asked, ignore_index=-1, reduction="sum") / len(asked)).backward()
                optimizer.step()
                schedule.step()
            net.requires_grad_(False)
        return probe

    def _logits(self, embeds: Tensor) -> Tensor:
        """``[B, slots, answers]``."""
        logits = self.net((embeds.float() - self.mean) / self.std)
        return logits.view(len(embeds), *self._void.shape).masked_fill(self._void, -torch.inf)

    @torch.no_grad()
    def read(self, embeds: Tensor) -> Tensor:
        """Answer every slot.

        Args:
            embeds: ``[B, N, D]`` plans, or true embeddings.

        Returns:
            ``[B, slots]`` int64; -1 from embeddings that are not finite.

        Raises:
            DataError: The plans have another grid or width than those that the probe is trained on.
        """
        if embeds.shape[1:] != self.shape:
            raise DataError(
                f"the probe cannot read embeddings of shape {tuple(embeds.shape)}",
                why=f"it is trained on {self.shape[0]} tokens of {self.shape[1]} values",
                fix="train one for every grid",
            )
        with torch.autocast(embeds.device.type, enabled=False):
            logits = self._logits(embeds)
        return logits.argmax(2).masked_fill(logits.isnan().any(2), -1)

    def right(self, embeds: Tensor, labels: Tensor) -> Tensor:
        """Right answers by slot, ``[slots]`` int64; see `accuracy`."""
        _check_labels(embeds, labels, self.slots)
        return ((self.read(embeds) == labels) & (labels >= 0)).sum(0)

    def accuracy(self, embeds: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of right answers.

        Args:
            embeds: ``[B, N, D]`` plans, or true embeddings.
            labels: ``[B, slots]`` int64, -1 where the question does not arise.

        Returns:
            By slot, without those that no label answers, and their mean as ``overall``.

        Raises:
            DataError: Embeddings and labels do not fit each other or the slots.
        """
        shares = self.right(embeds, labels) / (labels >= 0).sum(0)
        named = {name: share for name, share in zip(self.slots, shares.tolist(), strict=True) if not math.isnan(share)}
        return {**named, "overall": shares.nanmean().item()}


def _check_labels(embeds: Tensor, labels: Tensor, slots: Mapping[str, int]) -> None:
    if embeds.ndim != 3 or labels.shape != (len(embeds), len(slots)):
        raise DataError(
            f"labels of shape {tuple(labels.shape)} for {len(slots)} slots of embeddings {tuple(embeds.shape)}",
            why="embeddings are [B, N, D], labels [B, slots]",
        )


class ProbeAccuracy(Metric):
    """What a `Probe` reads from plans, beside what it reads from the true embeddings of the same targets.

    An accuracy is the mean over slots of their shares of right answers. That of plans is told relative to that of true
    embeddings, too: a plan cannot show more than they do.

    Args:
        slots: Number of slots.
    """

    higher_is_better = True
    full_state_update = False
    planned: Tensor
    true: Tensor
    asked: Tensor

    def __init__(self, slots: int) -> None:
        super().__init__()
        for name in ("planned", "true", "asked"):
            self.add_state(name, torch.zeros(slots, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probe: Probe, planned: Tensor, true: Tensor, labels: Tensor) -> None:
        """Add plans.

        Args:
            probe: A probe for their grid; the same one all along, but for other grids.
            planned: ``[B, N, D]`` plans.
            true: ``[B, N, D]`` true embeddings.
            labels: ``[B, slots]`` int64, -1 where the question does not arise.

        Raises:
            DataError: The shapes do not fit each other.
        """
        check_pair(planned, true)
        self.planned += probe.right(planned, labels)
        self.true += probe.right(true, labels)
        self.asked += (labels >= 0).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """``probe`` and ``probe_true``, the accuracies in [0, 1], and ``probe_relative``; NaN without labels."""
        planned, true = ((right / self.asked).nanmean() for right in (self.planned, self.true))
        return {"probe": planned, "probe_true": true, "probe_relative": planned / true}
