"""The connector: from the multimodal LLM's hidden states to the renderer's context and the flow head's condition."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import rms_norm

from bernini.errors import ConfigError


@dataclass
class ConnectorConfig:
    """Shape of a connector; the defaults are the released ones.

    Attributes:
        hidden: Width of the multimodal LLM.
        vit_dim: Width of the flow head's condition.
        gen_dim: Width of the renderer's text features.
        zero_init_gen: Start with the renderer's rows at zero, which disturbs a renderer that never saw a plan the
            least. Without it they start at the scale of any linear layer.
    """

    hidden: int = 3584
    vit_dim: int = 3584
    gen_dim: int = 4096
    zero_init_gen: bool = True

    def __post_init__(self) -> None:
        for name in ("hidden", "vit_dim", "gen_dim"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} of the connector is {getattr(self, name)}", why="it has to be positive")


class Connector(nn.Module):
    """The released ``MLPConnector``: two small MLPs, ``proj_gen`` for the renderer and ``pred_vit`` for the flow head.

    Each is run by calling it, so each can be sharded by itself.

    Args:
        config: Shape.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        hidden, vit, gen = config.hidden, config.vit_dim, config.gen_dim
        self.proj_gen = nn.Sequential(nn.Linear(hidden, gen), nn.GELU(), RMSNorm(gen), nn.Linear(gen, gen))
        self.pred_vit = nn.Sequential(
            nn.Linear(hidden, vit), nn.GELU(), nn.Linear(vit, vit), RMSNorm(vit), nn.Linear(vit, vit)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; the last layer of ``proj_gen`` is zero if the configuration says so."""
        for layer in (*self.proj_gen, *self.pred_vit):
            if isinstance(layer, nn.Linear | nn.RMSNorm):
                layer.reset_parameters()
        if self.config.zero_init_gen:
            for parameter in self.proj_gen[-1].parameters():
                nn.init.zeros_(parameter)

    def for_gen(self, hidden: Tensor) -> Tensor:
        """Rows ``[..., gen_dim]`` of the renderer's context, from hidden states ``[..., hidden]``."""
        return self.proj_gen(hidden.to(next(self.proj_gen.parameters()).dtype))

    def for_vit(self, hidden: Tensor) -> Tensor:
        """Conditions ``[..., vit_dim]`` of the flow head, from hidden states ``[..., hidden]``."""
        return self.pred_vit(hidden.to(next(self.pred_vit.parameters()).dtype))


class RMSNorm(nn.RMSNorm):
    """RMSNorm in fp32 whatever the dtypes of input and weight, which mixed precision lets differ.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., width]``."""
        return rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)
