"""LoRA of the planner's text model."""

from dataclasses import dataclass, field

from bernini.lora import AdapterConfig


@dataclass
class LoRAConfig(AdapterConfig):
    """Which layers of the text model get low-rank updates.

    Attributes:
        rank: Rank of the updates.
        alpha: Their scale times the rank; equal to the rank if null.
        dropout: Dropout before the down projection.
        targets: Names, or ends of names, of the linear layers.
    """

    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
