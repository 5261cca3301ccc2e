"""Latents of the Wan VAE in the form in which the renderer works with them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from bernini.errors import DataError
from bernini.pretrained import load_pretrained


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] to uint8, rounded and clipped."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


PIXELS_AT_ONCE, LATENTS_AT_ONCE = 2**24, 2**18
"""Values of clips, and of latents, that share a call of the VAE: some ninety toy clips, or a single one of 480p."""


class LatentCodec(nn.Module):
    """A frozen ``AutoencoderKLWan`` with its latent statistics.

    Args:
        vae: The autoencoder; its configuration holds ``latents_mean`` and ``latents_std``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False).eval()
        for name in ("mean", "std"):
            values = torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "LatentCodec":
        """Read a diffusers VAE folder, or the ``vae`` folder within a pipeline folder.

        Raises:
            CheckpointError: There is no VAE, or its weights do not fit.
        """
        path = Path(folder)
        if (path / "vae").is_dir():
            path = path / "vae"
        fix = "point vae at a diffusers AutoencoderKLWan folder"
        return cls(load_pretrained(AutoencoderKLWan, path, dtype, what="VAE", fix=fix))

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.vae.config["z_dim"]

    @property
    def temporal(self) -> int:
        """Frames per latent frame; the first latent frame holds one."""
        return self.vae.config["scale_factor_temporal"]

    @property
    def spatial(self) -> int:
        """Pixels per latent cell and side."""
        return self.vae.config["scale_factor_spatial"]

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """``(C, t, h, w)`` of a clip's latent.

        Raises:
            DataError: The size does not fit the autoencoder.
        """
        if (frames - 1) % self.temporal or height % self.spatial or width % self.spatial:
            raise DataError(
                f"a clip of {frames} frames of {width}x{height} pixels does not fit the VAE",
                why=f"it wants {self.temporal}k + 1 frames and sides that are multiples of {self.spatial}",
                fix="let `bernini prepare` resize and cut the clips, and set sampling.frames, height and width so",
            )
        return self.channels, (frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> Tensor:
        """Encode a clip.

        Args:
            pixels: ``[3, T, H, W]`` uint8, or ``[B, 3, T, H, W]``; T is 4k + 1, H and W multiples of 8.

        Returns:
            ``[2C, t, h, w]`` (or with a batch) mean and log-variance, fp32, not normalised.

        Raises:
            DataError: The size does not fit the autoencoder.
        """
        self.latent_shape(*pixels.shape[-3:])
        batched = pixels if pixels.ndim == 5 else pixels[None]
        out = self.vae.encode(to_unit(batched).to(self.vae.dtype)).latent_dist.parameters.float()
        return out if pixels.ndim == 5 else out[0]

    def normalize(self, posterior: Tensor, noise: Tensor | None = None) -> Tensor:
        """A normalised latent from posterior parameters.

        Args:
            posterior: ``[2C, t, h, w]``, or with a batch.
            noise: ``[C, t, h, w]`` standard normal, for a sample as in training; the mode, as in inference, without.

        Returns:
            ``[C, t, h, w]`` fp32, or with a batch.
        """
        mean, logvar = posterior.float().chunk(2, dim=-4)
        latent = mean if noise is None else mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
        return (latent - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decode a normalised latent ``[C, t, h, w]``, or with a batch, into ``[3, T, H, W]`` uint8 pixels."""
        raw = (latent.float() * self.std + self.mean).to(self.vae.dtype)
        batched = raw if raw.ndim == 5 else raw[None]
        pixels = to_uint8(self.vae.decode(batched).sample)
        return pixels if raw.ndim == 5 else pixels[0]


def latent_statistics(posteriors: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel over the modes of posteriors ``[2C, t, h, w]``."""
    means = torch.cat([p.chunk(2)[0].flatten(1) for p in posteriors], dim=1).double()
    return means.mean(1).tolist(), means.std(1).tolist()
