"""RendererModule: data -> noise -> model -> loss, and sampling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from bernini.attention import AttentionBackend
from bernini.conversation import Batch, Conversation
from bernini.dropout import DropoutConfig
from bernini.errors import ConfigError
from bernini.flow.noise import Expert, NoiseConfig, velocity_losses
from bernini.lora import Adaptable, add_lora
from bernini.means import MeanTable
from bernini.renderer.experts import Architecture, Experts, load_transformer
from bernini.renderer.latents import NoisedSample, encode_media, noise_samples
from bernini.renderer.lora import LoRAConfig, load_lora
from bernini.renderer.losses import add_losses, loss_table
from bernini.renderer.packing import pack, pad_context
from bernini.renderer.rendering import Prediction, Renderer, text_rows
from bernini.renderer.sampling import SamplingConfig
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.seeds import draw_seed
from bernini.sharding import data_rank, shard
from bernini.stacking import map_stacked
from bernini.text.encoder import MAX_TOKENS, TextFeatures
from bernini.vae.codec import LatentCodec


@dataclass
class TextConfig:
    """Where text features come from.

    Attributes:
        encoder: Folder of a Wan checkpoint with ``text_encoder/`` and ``tokenizer/``; may be null for prepared data.
        table: Table of features that ``bernini prepare`` writes beside the shards.
        rows: Context rows of a sample; shorter texts are filled with zero rows, which are attended.
    """

    encoder: str | None = None
    table: str | None = None
    rows: int = MAX_TOKENS


class RendererModule(Adaptable):
    """Trains and samples the renderer.

    Args:
        vae: Folder of the frozen VAE.
        expert: Noise levels to train: ``high`` or ``low`` of two experts, ``single`` for a model without experts, or
            ``both`` experts at once, each with its own noise.
        init_from: Diffusers folder with weights to start from. To continue a run, pass ``--ckpt_path`` instead.
        architecture: Shape of a model that starts from random weights.
        text: Where text features come from.
        noise: How timesteps are drawn.
        dropout: How conditions are dropped.
        lora: Train a LoRA instead of all weights.
        sampling: How clips are sampled in validation and prediction.
        optimizer: Optimizer of the trainable parameters.
        lr_scheduler: Learning rate schedule, stepped every optimizer step.
        attention: Attention backend.
        gradient_checkpointing: Recompute blocks in the backward pass.
        compile: Compile the blocks with ``torch.compile``.
        frozen_dtype: Dtype of weights that are not trained: the VAE, the text encoder, the base of a LoRA.
        max_latent_frames: Longer latents are cut.
        seed: Seed of noise, timesteps and dropout.
    """

    renderer: Experts
    lora: LoRAConfig | None

    def __init__(
        self,
        vae: str,
        expert: Literal["high", "low", "single", "both"] = "single",
        init_from: str | None = None,
        architecture: Architecture | None = None,
        text: TextConfig = TextConfig(),  # noqa: B008  dataclass defaults are copied by the parser
        noise: NoiseConfig = NoiseConfig(),  # noqa: B008
        dropout: DropoutConfig = DropoutConfig(),  # noqa: B008
        lora: LoRAConfig | None = None,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        attention: AttentionBackend = "auto",
        gradient_checkpointing: bool = True,
        compile: bool = False,
        frozen_dtype: Literal["float32", "bfloat16"] = "float32",
        max_latent_frames: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(lora)
        if (init_from is None) == (architecture is None):
            raise ConfigError(
                "give the renderer either weights or a shape",
                where="model.init_args",
                fix="set init_from to train from weights, or architecture to train from scratch",
            )
        self.expert, self.init_from, self.architecture = expert, init_from, architecture
        self.text, self.noise, self.dropout, self.sampling = text, noise, dropout, sampling
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.attention, self.gradient_checkpointing, self.compile_blocks = attention, gradient_checkpointing, compile
        self.max_latent_frames, self.seed = max_latent_frames, seed
        # Frozen helpers live in a plain dict: they belong neither in checkpoints nor in the optimizer.
        dtype = getattr(torch, frozen_dtype)
        self._frozen: dict[str, Any] = {
            "dtype": dtype,
            "device": torch.device("cpu"),
            "codec": LatentCodec.from_pretrained(vae, dtype),
            "features": TextFeatures(text.encoder, text.table, dtype),
        }

    # -- model -----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the transformers; sharded over the mesh if the strategy brings one."""
        if hasattr(self, "renderer"):
            return
        models = {name: self._build(expert) for name, expert in self._experts().items()}
        self.renderer = Experts(**models, boundary=0.0 if self.expert == "single" else self.noise.boundary)
        if self.lora and self.lora.init_from:
            load_lora(self.renderer, self.lora.init_from)
        for model in self.renderer.models.values():
            if self.device_mesh is not None:
                shard(model, model.blocks, self.device_mesh, methods=["keys_values"])
            model.train()  # from_pretrained leaves it in eval mode, in which a LoRA's dropout does nothing
            if self.compile_blocks:
                model.compile_repeated_blocks()

    def _experts(self) -> dict[str, Expert | None]:
        both = self.expert == "both"
        return {
            "transformer": "high" if both else None if self.expert == "low" else self.expert,
            "transformer_2": "low" if both or self.expert == "low" else None,
        }

    def _build(self, expert: Expert | None) -> PackedWanTransformer3DModel | None:
        if expert is None:
            return None
        if self.init_from:
            model = load_transformer(self.init_from, expert, self._frozen["dtype"] if self.lora else torch.float32)
        else:
            assert self.architecture is not None
            model = self.architecture.build()
        model.attention = self.attention
        model.gradient_checkpointing = self.gradient_checkpointing
        if self.lora:
            add_lora(model, self.lora)
        return model

    @property
    def codec(self) -> LatentCodec:
        """The frozen VAE, on the module's device."""
        return self._helper("codec")

    @property
    def features(self) -> TextFeatures:
        """The frozen text encoder and its tables, on the module's device."""
        return self._helper("features")

    def _helper(self, name: Literal["codec", "features"]) -> Any:
        if self._frozen["device"] != self.device:  # to look through all weights in every step would take milliseconds
            for helper in ("codec", "features"):
                self._frozen[helper].to(self.device)
            self._frozen["device"] = self.device
        return self._frozen[name]

    # -- training --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Begin to gather losses, too."""
        super().on_train_start()
        self._trained = loss_table(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One packed forward; the loss weighs every target alike."""
        key = ("train", self.global_step, batch_idx % self.trainer.accumulate_grad_batches)
        first = data_rank(self) * len(batch)  # so that a sample's draws do not depend on the number of ranks
        torch.manual_seed(draw_seed(self.seed, *key, first))  # for what layers draw themselves, as a LoRA's dropout
        loss, table = self.losses(batch.samples, [(*key, first + i) for i in range(len(batch))])
        self._trained += table
        self.log("train/loss", table.means()["loss"], prog_bar=True, logger=False, batch_size=len(batch))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Every ``log_every_n_steps`` steps, log means over all targets of all ranks since the last time.

        The loggers get ``train/loss`` and its parts from here: Lightning would log one rank's last step, and repeat the
        last loss of a task that has not come up since.
        """
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            means = {f"train/{name}": value.item() for name, value in self._trained_means().items()}
            for logger in self.loggers:
                logger.log_metrics({**means, "epoch": self.current_epoch}, self.global_step)
                logger.save()

    def _trained_means(self) -> dict[str, Tensor]:
        """Mean losses of training since the last call, of all ranks."""
        table, self._trained = self._trained, loss_table(self.device)
        return table.over_ranks(self.trainer.strategy).means()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss under noise that is the same at every validation and, whatever `noise` is, in every run.

        Each task has its own shift and density, so that ``val/loss`` compares runs that train under different ones; the
        expert and ``noise.boundary`` still decide which noise levels are measured.
        """
        self._measured += self.losses(batch.samples, [("validate", s.key) for s in batch.samples], train=False)[1]

    def on_validation_epoch_start(self) -> None:
        """Begin to gather."""
        self._measured = loss_table(self.device)

    def on_validation_epoch_end(self) -> None:
        """Log means over all targets of all ranks: ``val/loss``, or ``test/loss``, and its parts."""
        stage = "test" if self.trainer.testing else "val"
        means = self._measured.over_ranks(self.trainer.strategy).means()
        self.log_dict({f"{stage}/{name}": value for name, value in means.items()}, sync_dist=True)

    test_step, on_test_epoch_start = validation_step, on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def losses(
        self, samples: Sequence[Conversation], keys: Sequence[tuple[str | int, ...]], train: bool = True
    ) -> tuple[Tensor, MeanTable]:
        """Loss of some samples.

        Args:
            samples: Conversations with targets, of any tasks and sizes.
            keys: What the randomness of each sample depends on, besides the seed.
            train: Whether conditions are dropped and noise is as configured, or the tasks' own as in validation.

        Returns:
            The loss, for ``both`` the sum of the experts' losses, and the losses of all targets.
        """
        draws = [self._generators(key) for key in keys]
        samples = [s.check() for s in samples]
        if train:
            samples = [self.dropout.apply(s, host) for s, (host, _) in zip(samples, draws, strict=True)]
        latents = self._latents(samples, [device for _, device in draws])
        contexts = self._contexts(samples)
        noise = self.noise if train else self.noise.tasks_own()
        total, table = torch.zeros((), device=self.device), loss_table(self.device)
        for name, model in self.renderer.models.items():
            expert: Expert = self._experts()[name] or "single"
            sigmas = noise.draw_sigmas([s.spec for s in samples], expert, [host for host, _ in draws])
            noised = noise_samples(samples, latents, contexts, sigmas, model.patch, [device for _, device in draws])
            # Neighbours of equal lengths share one call of attention.
            noised.sort(key=lambda one: [math.prod(s.latent.shape) for s in one.packed.segments])
            loss = self._velocity_loss(model, noised)
            total = total + loss.mean()
            add_losses(table, noised, loss.detach())
        return total, table

    def _velocity_loss(self, model: PackedWanTransformer3DModel, noised: Sequence[NoisedSample]) -> Tensor:
        packed = pack([n.packed for n in noised], model.patch)
        predicted = model(packed)[packed.target_index]
        return velocity_losses(predicted, torch.cat([v for n in noised for v in n.velocity]), packed.target_lengths)

    def _latents(self, samples: Sequence[Conversation], generators: Sequence[torch.Generator]) -> list[list[Tensor]]:
        """Sampled, normalised latents of all visual messages."""
        codec, device = self.codec, self.device
        posteriors = encode_media(codec, [m for s in samples for m in s.media()])
        owners = [g for s, g in zip(samples, generators, strict=True) for _ in s.media()]
        noise = [
            torch.randn((codec.channels, *p.shape[1:]), generator=g, device=device)
            for p, g in zip(posteriors, owners, strict=True)
        ]
        latents = iter(map_stacked(codec.normalize, posteriors, noise))
        return [[next(latents)[:, : self.max_latent_frames] for _ in s.media()] for s in samples]

    def _contexts(self, samples: Sequence[Conversation]) -> list[Tensor]:
        """Text context ``[rows, dim]`` of each sample: prepared features, else the text's."""
        return [pad_context(rows, self.text.rows) for rows in text_rows(samples, self.features, self.device)]

    def _generators(self, key: tuple[str | int, ...]) -> tuple[torch.Generator, torch.Generator]:
        """A host generator for choices that shape the batch, and a device generator for noise."""
        seed = draw_seed(self.seed, *key)
        return torch.Generator("cpu").manual_seed(seed), torch.Generator(self.device).manual_seed(seed)

    # -- sampling --------------------------------------------------------------------------------------------------

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Prediction]:
        """Sample what each conversation asks for; padding is sampled too, as a sharded model needs all ranks."""
        first = self.sampling.seed + batch.cursor.get("sample", 0)
        made = self.sample(batch.samples, range(first, first + len(batch)))
        return [p for p in made if not p.conversation.info.get("padding")]

    @torch.no_grad()
    def sample(
        self,
        conversations: Sequence[Conversation],
        seeds: Sequence[int] | None = None,
    ) -> list[Prediction]:
        """Sample clips; but for rounding, none depends on what else is in the batch.

        A target in the conversation only gives the size, except for a lone low-noise expert, which starts from it.

        Args:
            conversations: What to make; sources may be pixels or prepared latents.
            seeds: Seed of each clip's noise; counted on from ``sampling.seed`` if not given.
        """
        if seeds is None:
            seeds = range(self.sampling.seed, self.sampling.seed + len(conversations))
        renderer = Renderer(self.renderer, self.codec, self.features, self.text.rows)
        made = renderer(conversations, self.sampling, seeds)
        return [Prediction(c, pixels) for c, pixels in zip(conversations, made, strict=True)]
