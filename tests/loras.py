"""What tests of LoRAs share: adapters that do something, and what a transformer, diffusers' or ours, then computes."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel

from bernini.renderer.packing import PackedSample, Segment, pack, unpatchify
from bernini.renderer.transformer import PackedWanTransformer3DModel


def predict(model: WanTransformer3DModel) -> torch.Tensor:
    """What a transformer, diffusers' or ours, makes of some latent ``[C, T, H, W]``."""
    generator = torch.Generator().manual_seed(0)
    latent, text = (torch.randn(shape, generator=generator) for shape in ((4, 2, 4, 4), (16, 12)))
    with torch.no_grad():
        if isinstance(model, PackedWanTransformer3DModel):
            rows = model(pack([PackedSample([Segment(latent, 0)], text, 500)], model.patch))
            return unpatchify(rows, (2, 2, 2), model.patch)
        return model(latent[None], torch.tensor([500]), text[None], return_dict=False)[0][0]


def trained(module: Any) -> Any:
    """Random values in a LoRA's up projections, which start at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module
