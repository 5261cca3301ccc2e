"""Training with matrix products in float8, by torchao."""

from typing import Any

import torch
from torch import nn

from bernini.errors import ConfigError

MULTIPLE = 16  # of which the products want their widths to be
FEW_ROWS = ("attn2.to_k", "attn2.to_v")  # of text: to bring the weights to float8 takes longer than the product
CAPABILITY = (8, 9)  # of the first GPUs that multiply in float8


def compute_in_float8(module: Any) -> None:
    """Have linear layers multiply in float8, forward and backward, with scales per tensor that are taken each time.

    Weights keep their dtype and names, so that checkpoints are those of a run without. On a machine without CUDA the
    products are those of the rounded values in the weights' own dtype.

    Args:
        module: Transformer blocks; layers of odd widths, and those that see few rows, stay as they are.

    Raises:
        ConfigError: torchao is not installed, or the GPU cannot multiply in float8.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            "float8 takes torchao", where="model.init_args.float8", why=str(error), fix="pip install 'bernini[low-bit]'"
        ) from error
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.get_device_capability() < CAPABILITY:
        raise ConfigError(
            "this GPU cannot multiply in float8",
            where="model.init_args.float8",
            why=f"its compute capability is below {'.'.join(map(str, CAPABILITY))}",
            fix="leave float8 out",
        )

    def chosen(layer: nn.Module, name: str) -> bool:
        fits = isinstance(layer, nn.Linear) and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)
        return fits and not name.endswith(FEW_ROWS)

    # Weights' gradients sum over tokens, of which there may be any number.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=not cuda)
    convert_to_float8_training(module, module_filter_fn=chosen, config=config)
