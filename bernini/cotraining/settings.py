"""What co-training starts from, and what its losses weigh."""

from dataclasses import dataclass

from bernini.planner.learning import LossConfig


@dataclass
class InitFrom:
    """Folders with weights to start from; they may be one.

    Attributes:
        planner: Bernini folder with ``bernini/`` and ``mllm/``.
        renderer: Diffusers folder with ``transformer/`` and, for two experts, ``transformer_2/``.
    """

    planner: str
    renderer: str


@dataclass
class CoTrainingLoss(LossConfig):
    """Weights of the losses (paper, eq. 3) and what is hidden.

    Attributes:
        ntp: Weight of the next-token loss.
        visual: Weight of the flow head's loss on hidden target tokens.
        ratios: Share of a target that is hidden: each task's own Beta distribution (paper, table 3), or uniform.
        dit: Weight of the renderer's loss.
    """

    dit: float = 1.0
