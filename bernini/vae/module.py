"""VAEModule: trains a Wan video autoencoder from scratch."""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from bernini.conversation import Batch
from bernini.errors import ConfigError, DataError
from bernini.optimizing import ConfiguredOptimizer
from bernini.vae.codec import LatentCodec, latent_statistics, to_unit
from bernini.vae.whole import decode, encode, for_whole_clips

INITIAL_LOGVAR = -6.0  # of the latents' noise; at 0 it would drown what the encoder has to say


PARTS = ("loss", "l1", "squared", "kl", "psnr")
"""What a step measures: the loss, its parts without their weights, and the PSNR in dB."""


@dataclass
class VAEArchitecture:
    """Shape of an ``AutoencoderKLWan``; the defaults are those of the Wan 2.1 VAE.

    Attributes:
        base_dim: Channels of the encoder at full resolution.
        decoder_base_dim: Channels of the decoder at full resolution; the encoder's if null.
        dim_mult: Factor on the channels at each resolution.
        num_res_blocks: Residual blocks at each resolution.
        temperal_downsample: For each halving of height and width, whether it halves the frame rate too; two of them do.
        z_dim: Latent channels.
        patch_size: Pixels per side that are folded into channels before the first convolution, as in the Wan 2.2 VAE.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_res_blocks: int = 2
    temperal_downsample: list[bool] = field(default_factory=lambda: [False, True, True])
    z_dim: int = 16
    patch_size: int | None = None

    def __post_init__(self) -> None:
        halvings = len(self.temperal_downsample)
        if len(self.dim_mult) != halvings + 1:
            raise ConfigError(
                f"dim_mult has {len(self.dim_mult)} entries, temperal_downsample {halvings}",
                where="model.init_args.architecture",
                why="there is one resolution more than there are halvings",
            )
        if sum(self.temperal_downsample) != 2:
            raise ConfigError(
                f"temperal_downsample halves the frame rate {sum(self.temperal_downsample)} times",
                where="model.init_args.architecture",
                why="AutoencoderKLWan works through clips in steps of four frames",
                fix="set two of its entries to true",
            )

    def build(self) -> AutoencoderKLWan:
        """An autoencoder of this shape with random weights, see `initialize`."""
        patch = self.patch_size or 1
        vae = AutoencoderKLWan(
            **asdict(self),
            in_channels=3 * patch**2,
            out_channels=3 * patch**2,
            scale_factor_spatial=patch * 2 ** len(self.temperal_downsample),
            latents_mean=[0.0] * self.z_dim,
            latents_std=[1.0] * self.z_dim,
        )
        initialize(vae)
        return vae


@torch.no_grad()
def initialize(vae: AutoencoderKLWan) -> None:
    """Weights from which the autoencoder learns quickly.

    PyTorch's own ones shrink what differs between places until the decoder sees none of it, and training stays for long
    at the background. Orthogonal convolutions keep it, and residual branches that start at zero let it pass.
    Convolutions look at the newest frame alone, so that a clip starts as a row of images; latents start with little
    noise.

    Args:
        vae: The autoencoder, changed in place.
    """
    for name, parameter in vae.named_parameters():
        if name.endswith(("bias", "conv2.weight", "proj.weight")):
            parameter.zero_()
        elif name.endswith("weight"):
            newest = parameter if parameter.ndim == 4 else parameter[:, :, -1]
            start = nn.init.orthogonal_(torch.empty_like(newest))
            parameter.zero_()
            newest.copy_(start)
    vae.get_parameter("quant_conv.bias")[vae.config["z_dim"] :] = INITIAL_LOGVAR


@dataclass
class VAELoss:
    """Weights of the loss; the mean absolute error of the pixels, in [-1, 1], has weight 1.

    Attributes:
        contrast: Further weight of a pixel per unit that it differs from its row's median: small things on large
            backgrounds are learned sooner. Weights are scaled to mean 1.
        squared: Weight of the mean squared error. The absolute error alone is content with the median, an empty scene.
        kl: Weight of the divergence from a standard normal, the mean over latent values.
    """

    contrast: float = 0.0
    squared: float = 0.0
    kl: float = 1e-6

    def __call__(self, clips: Tensor, decoded: Tensor, posterior: DiagonalGaussianDistribution) -> dict[str, Tensor]:
        """Loss of clips of one size.

        Args:
            clips: ``[B, 3, T, H, W]`` in [-1, 1].
            decoded: The same, out of the autoencoder.
            posterior: Of the latents ``[B, C, t, h, w]``.

        Returns:
            ``loss`` and its parts ``l1``, ``squared`` and ``kl``, scalars, the parts without their weights.
        """
        error = decoded.float() - clips
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        difference = (clips - clips.median(dim=-1, keepdim=True).values).abs().amax(1, keepdim=True)
        weight = 1 + self.contrast * difference
        weight = weight / weight.mean()
        l1, squared = (error.abs() * weight).mean(), (error.square() * weight).mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return {"loss": l1 + self.squared * squared + self.kl * kl, "l1": l1, "squared": squared, "kl": kl}


def psnr(clips: Tensor, decoded: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB, ``[B]``, for ``[B, 3, T, H, W]`` in [-1, 1]."""
    error = (decoded.float() - clips).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


class TrainingPass(nn.Module):
    """Encode, draw latents, decode and compare: all that is repeated in every step.

    Args:
        vae: The autoencoder, from `for_whole_clips`.
        loss: Weights of the loss.
    """

    def __init__(self, vae: AutoencoderKLWan, loss: VAELoss) -> None:
        super().__init__()
        self.vae, self.loss = vae, loss

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Compare clips with what comes out.

        Args:
            pixels: ``[B, 3, T, H, W]`` uint8.
            noise: ``[B, C, t, h, w]`` standard normal.

        Returns:
            The scalars `PARTS`, and the posteriors' parameters ``[B, 2C, t, h, w]``.
        """
        clips = to_unit(pixels)
        posterior = encode(self.vae, clips)
        decoded = decode(self.vae, posterior.mean + posterior.std * noise)
        parts = self.loss(clips, decoded, posterior) | {"psnr": psnr(clips, decoded.detach()).mean()}
        return *(parts[name] for name in PARTS), posterior.parameters.detach().float()


class VAEModule(ConfiguredOptimizer):
    """Trains an autoencoder on every image and clip of its batches.

    Args:
        architecture: Shape of an autoencoder that starts from random weights.
        init_from: Diffusers folder with weights to start from. To continue a run, pass ``--ckpt_path`` instead.
        output: Folder that the trained autoencoder is written to at the end of a fit, with the statistics of its
            latents; null writes nothing.
        loss: Weights of the loss.
        optimizer: Optimizer of all parameters.
        lr_scheduler: Learning rate schedule, stepped every optimizer step.
        statistics: Clips, the last ones trained on, whose latents the statistics are measured on.
        dtype: Dtype of the written weights.
        channels_last: Keep channels innermost in memory.
        cuda_graphs: Record the pass over each shape of batch as a CUDA graph, on CUDA, which saves its launches.
        seed: Seed of the latents' noise.

    Raises:
        ConfigError: There is neither a shape nor weights, or both.
        CheckpointError: The weights cannot be read.
    """

    def __init__(
        self,
        architecture: VAEArchitecture | None = None,
        init_from: str | None = None,
        output: str | None = None,
        loss: VAELoss = VAELoss(),  # noqa: B008  dataclass defaults are copied by the parser
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        statistics: int = 2048,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        channels_last: bool = False,
        cuda_graphs: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if architecture and not init_from:
            self.vae = architecture.build()
        elif init_from and not architecture:
            self.vae = LatentCodec.from_pretrained(init_from).vae.requires_grad_(True).train()
        else:
            raise ConfigError(
                "give the autoencoder either weights or a shape",
                where="model.init_args",
                fix="set init_from to train from weights, or architecture to train from scratch",
            )
        for_whole_clips(self.vae)
        if channels_last:
            for module in self.vae.modules():
                if isinstance(module, nn.Conv2d | nn.Conv3d):
                    nested = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
                    module.weight.data = module.weight.data.contiguous(memory_format=nested)
        self.output, self.loss, self.optimizer, self.lr_scheduler = output, loss, optimizer, lr_scheduler
        self.weights_dtype, self.seed, self.cuda_graphs = getattr(torch, dtype), seed, cuda_graphs
        self._passes: dict[torch.Size, Callable[..., tuple[Tensor, ...]]] = {}
        self._posteriors: deque[Tensor] = deque(maxlen=statistics)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Encode, draw latents, decode; every image and clip weighs alike."""
        key = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        generator = torch.Generator(self.device).manual_seed(hash(key))  # of integers: the same in every process
        groups = stack_media(batch)
        count = sum(map(len, groups))
        total: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        noises = [torch.randn(self._latent_shape(x), generator=generator, device=self.device) for x in groups]
        # All before the first runs: nothing that waits for its backward may be there when a graph is recorded.
        passes = [self._pass(pixels, noise) for pixels, noise in zip(groups, noises, strict=True)]
        for one, pixels, noise in zip(passes, groups, noises, strict=True):
            *parts, posterior = one(pixels, noise)
            for name, value in zip(PARTS, parts, strict=True):
                total[name] = total[name] + value * (len(pixels) / count)
            self._posteriors.extend(posterior.clone())  # a graph will write over it
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in total.items()}, prog_bar=True, batch_size=count
        )
        return total["loss"]

    def _pass(self, pixels: Tensor, noise: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        if pixels.shape not in self._passes:
            one: Any = TrainingPass(self.vae, self.loss)
            graph = self.cuda_graphs and self.device.type == "cuda"
            if graph:  # convolutions over time have no part in images
                one = torch.cuda.make_graphed_callables(one, (pixels, noise), allow_unused_input=True)
            self._passes[pixels.shape] = cast(Callable[..., tuple[Tensor, ...]], one)
        return self._passes[pixels.shape]

    def _latent_shape(self, pixels: Tensor) -> tuple[int, ...]:
        frames, height, width = pixels.shape[2:]
        temporal, spatial = (self.vae.config[f"scale_factor_{axis}"] for axis in ("temporal", "spatial"))
        return len(pixels), self.vae.config["z_dim"], (frames - 1) // temporal + 1, height // spatial, width // spatial

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """PSNR of the most likely latents, decoded."""
        for pixels in stack_media(batch):
            clips = to_unit(pixels)
            decoded = decode(self.vae, encode(self.vae, clips).mode()).clamp(-1, 1)
            self.log(
                "val/psnr",
                psnr(clips, decoded).mean(),
                batch_size=len(pixels),
                on_epoch=True,
                prog_bar=True,
                sync_dist=True,
            )

    @rank_zero_only
    def on_train_end(self) -> None:
        """Write the autoencoder as a diffusers folder."""
        if not self.output or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        mean, std = latent_statistics(list(self._posteriors))
        vae = AutoencoderKLWan.from_config({**self.vae.config, "latents_mean": mean, "latents_std": std})
        weights = {name: tensor.to("cpu", self.weights_dtype) for name, tensor in self.vae.state_dict().items()}
        vae.load_state_dict(weights, assign=True)
        vae.save_pretrained(self.output)


def stack_media(batch: Batch) -> Sequence[Tensor]:
    """Every image and clip of a batch, those of one size together: ``[B, 3, T, H, W]`` uint8 tensors.

    Raises:
        DataError: A sample has latents but no pixels.
    """
    groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for sample in batch.samples:
        for media in sample.media() if not sample.info.get("padding") else ():
            if media.pixels is None:
                raise DataError(
                    "a sample has no pixels",
                    where=sample.key,
                    why="an autoencoder is trained on pixels, not on prepared latents",
                    fix="train on raw shards",
                )
            groups[media.pixels.shape].append(media.pixels)
    return [torch.stack(clips) for clips in groups.values()]
