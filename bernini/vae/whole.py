"""The Wan autoencoder over whole clips.

Diffusers' own passes go through a clip in steps of four frames with a cache, which suits long videos. Short clips, as
an autoencoder is trained on, are done in one pass, with the same results: a training step of the toy VAE (96 clips of 9
frames, float32) took 43 ms instead of 183 ms on one H100.
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanResample, patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from bernini.errors import ConfigError


class WholeClipResample(WanResample):
    """``WanResample`` that changes the frame rate without a cache too; the first frame stays a frame of its own."""

    def forward(self, x: Tensor, feat_cache: list | None = None, feat_idx: list[int] | None = None) -> Tensor:
        """Resample.

        Args:
            x: ``[B, C, T, H, W]``.
            feat_cache: Diffusers' cache, for its own passes.
            feat_idx: Position in it.
        """
        if feat_cache is not None:
            return super().forward(x, feat_cache, feat_idx)
        if self.mode == "upsample3d" and x.shape[2] > 1:
            pairs = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # [B, 2, C, T - 1, H, W]
            x = torch.cat([x[:, :, :1], pairs.movedim(1, 3).flatten(2, 3)], dim=2)
        x = super().forward(x)
        if self.mode == "downsample3d" and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
        return x


def for_whole_clips(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Let an autoencoder be used by `encode` and `decode`; its own methods do as before.

    Raises:
        ConfigError: It is one with residual resampling (Wan 2.2's 5B model).
    """
    if vae.config["is_residual"]:
        raise ConfigError("this autoencoder cannot be trained", why="its resampling is residual, as that of Wan 2.2 5B")
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.__class__ = WholeClipResample  # same parameters
    return vae


def encode(vae: AutoencoderKLWan, clips: Tensor) -> DiagonalGaussianDistribution:
    """Posterior of clips.

    Args:
        vae: From `for_whole_clips`.
        clips: ``[B, 3, T, H, W]`` in [-1, 1].
    """
    patch = vae.config["patch_size"]
    folded = patchify(clips, patch_size=patch) if patch else clips
    return DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(folded)))


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clips of latents, not clamped to [-1, 1]: beyond a clamp no gradient would call a pixel back.

    Args:
        vae: From `for_whole_clips`.
        latents: ``[B, C, t, h, w]``.

    Returns:
        ``[B, 3, T, H, W]``.
    """
    decoded, patch = vae.decoder(vae.post_quant_conv(latents)), vae.config["patch_size"]
    return unpatchify(decoded, patch_size=patch) if patch else decoded
