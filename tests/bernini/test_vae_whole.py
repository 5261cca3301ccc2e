"""The autoencoder over whole clips in one pass: the numbers of diffusers' passes, and gradients."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from bernini.errors import ConfigError
from bernini.vae.module import VAEArchitecture
from bernini.vae.whole import decode, encode, for_whole_clips

TINY = VAEArchitecture(
    base_dim=8, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True], z_dim=4, patch_size=2
)
ARCHITECTURES = {
    "patched": TINY,
    "late frames": replace(TINY, dim_mult=[1, 1, 2, 2], temperal_downsample=[False, True, True], patch_size=None),
    "early frames": replace(TINY, dim_mult=[1, 1, 2, 2], temperal_downsample=[True, True, False], patch_size=None),
    "deep, wide decoder": replace(TINY, num_res_blocks=2, decoder_base_dim=12, patch_size=None),
}


def build(architecture: VAEArchitecture) -> AutoencoderKLWan:
    """Random weights in all places, the branches that a new autoencoder leaves out included."""
    torch.manual_seed(0)
    vae = architecture.build()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return for_whole_clips(vae)


def clips(frames: int) -> Tensor:
    return torch.rand(2, 3, frames, 32, 16, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
@torch.no_grad()
def test_one_pass_gives_what_steps_of_four_frames_give(architecture: VAEArchitecture, frames: int) -> None:
    vae = build(architecture)
    posterior = encode(vae, clips(frames))
    torch.testing.assert_close(
        posterior.parameters, vae.encode(clips(frames)).latent_dist.parameters, rtol=0, atol=1e-5
    )
    latents = 0.3 * torch.randn_like(posterior.mean)
    decoded = decode(vae, latents)
    assert decoded.shape == (2, 3, frames, 32, 16)
    torch.testing.assert_close(decoded.clamp(-1, 1), vae.decode(latents).sample, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_is_decoded_is_not_clamped() -> None:
    vae = build(TINY)
    latents = 20 * torch.randn(1, 4, 2, 4, 4)
    assert decode(vae, latents).abs().max() > 1 == vae.decode(latents).sample.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_weight_and_pixel_gets_a_gradient(architecture: VAEArchitecture) -> None:
    vae, given = build(architecture), clips(9).requires_grad_()
    decode(vae, encode(vae, given).mean).square().mean().backward()
    assert given.grad is not None and (given.grad.abs().sum(dim=(1, 3, 4)) > 0).all()
    logvar = {"quant_conv.weight", "quant_conv.bias"}  # half of them, as the mean alone was decoded
    missing = {
        n for n, p in vae.named_parameters() if p.grad is None or not p.grad.flatten(1 if p.ndim > 1 else 0).any()
    }
    assert not missing - logvar


def test_residual_autoencoders_are_refused() -> None:
    vae = AutoencoderKLWan(
        base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, z_dim=4, is_residual=True, in_channels=12, out_channels=12
    )
    with pytest.raises(ConfigError, match="cannot be trained"):
        for_whole_clips(vae)
