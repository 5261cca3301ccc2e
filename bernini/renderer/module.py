"""RendererModule: data -> noise -> model -> loss, and sampling."""

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from bernini.attention import AttentionBackend
from bernini.conversation import Batch, Conversation
from bernini.dropout import DropoutConfig
from bernini.errors import ConfigError
from bernini.float8 import compute_in_float8
from bernini.flow.noise import Expert, NoiseConfig
from bernini.lora import Adaptable, add_lora, ignore_frozen_in_ddp
from bernini.means import MeanTable, mean_over_ranks
from bernini.measuring import Measured
from bernini.memory import Choice as RecomputeChoice
from bernini.memory import settle
from bernini.quantizing import Quantization, quantize
from bernini.renderer.experts import Architecture, Choice, Experts, experts_of, load_transformer
from bernini.renderer.frozen import Frozen, TextConfig
from bernini.renderer.learning import draw_latents, target_losses
from bernini.renderer.lora import LoRAConfig, load_lora
from bernini.renderer.losses import add_losses, loss_table
from bernini.renderer.packing import pad_context
from bernini.renderer.rendering import Prediction, Renderer, text_rows
from bernini.renderer.sampling import SamplingConfig
from bernini.renderer.transformer import PackedWanTransformer3DModel
from bernini.rope.op import Saves
from bernini.seeds import draw_seed
from bernini.sharding import shard, weights_mesh
from bernini.swapping import BlockSwapping
from bernini.text.encoder import TextFeatures
from bernini.ulysses import Axis
from bernini.vae.codec import LatentCodec


class RendererModule(Measured, Adaptable):
    """Trains and samples the renderer.

    Args:
        vae: Folder of the frozen VAE.
        expert: Noise levels to train: ``high`` or ``low`` of two experts, ``single`` for a model without experts, or
            ``both`` experts at once, each with its own noise.
        init_from: Diffusers or released folder with weights to start from. To continue a run, pass ``--ckpt_path``
            instead.
        architecture: Shape of a model that starts from random weights.
        text: Where text features come from.
        noise: How timesteps are drawn.
        dropout: How conditions are dropped.
        lora: Train a LoRA instead of all weights.
        quantize: Keep the linear layers below the LoRA in eight bits: ``int8`` or ``fp8``.
        swap_blocks: Keep the frozen weights of this many blocks in host memory, from where they come when it is their
            turn; all but two of them take no device memory.
        float8: Multiply matrices in float8 while all weights are trained; takes torchao, and a GPU as of Ada or Hopper.
        offload_frozen: Keep the VAE and the text encoder in host memory but while they work.
        sampling: How clips are sampled in validation and prediction.
        optimizer: Optimizer of the trainable parameters.
        lr_scheduler: Learning rate schedule, stepped every optimizer step.
        attention: Attention backend.
        rope_saves: What the fused rotation of queries and keys keeps for the backward pass: its inputs, or its outputs,
            which attention keeps as well.
        recompute: What blocks keep for the backward pass (docs/performance.md); ``auto`` takes the fastest way that
            fits.
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
        expert: Choice = "single",
        init_from: str | None = None,
        architecture: Architecture | None = None,
        text: TextConfig = TextConfig(),  # noqa: B008  dataclass defaults are copied by the parser
        noise: NoiseConfig = NoiseConfig(),  # noqa: B008
        dropout: DropoutConfig = DropoutConfig(),  # noqa: B008
        lora: LoRAConfig | None = None,
        quantize: Quantization | None = None,
        swap_blocks: int = 0,
        float8: bool = False,
        offload_frozen: bool = False,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        attention: AttentionBackend = "auto",
        rope_saves: Saves = "inputs",
        recompute: RecomputeChoice = "full",
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
        if (quantize or swap_blocks) and lora is None:
            raise ConfigError(
                "only frozen weights can be in eight bits or in host memory",
                where="model.init_args.quantize, swap_blocks",
                fix="train a LoRA (lora: {rank: 32}), or leave both out",
            )
        if swap_blocks and recompute in ("none", "auto"):
            raise ConfigError(
                "swap_blocks saves nothing unless blocks are recomputed",
                where="model.init_args",
                why=f"recompute is {recompute}; what is kept for the backward pass may hold on to the weights",
                fix="set recompute: full, or offload",
            )
        if float8 and lora is not None:
            raise ConfigError(
                "float8 is for training all weights",
                where="model.init_args.float8",
                fix="quantize: fp8, for a LoRA's base",
            )
        self.quantize, self.swap_blocks, self.float8 = quantize, swap_blocks, float8
        self.expert, self.init_from, self.architecture = expert, init_from, architecture
        self.text, self.noise, self.dropout, self.sampling = text, noise, dropout, sampling
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.attention, self.rope_saves = attention, rope_saves
        self.recompute, self.compile_blocks = recompute, compile
        self.max_latent_frames, self.seed = max_latent_frames, seed
        self._frozen = Frozen(vae, text, getattr(torch, frozen_dtype), offload_frozen)

    # -- model -----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the transformers; sharded over the mesh if the strategy brings one."""
        if hasattr(self, "renderer"):
            return
        if self.device_mesh is not None and (self.quantize or self.swap_blocks):
            raise ConfigError(
                "sharded weights can be neither in eight bits nor in host memory",
                where="model.init_args.quantize, swap_blocks",
                fix="leave both out, or train with trainer.strategy: ddp",
            )
        models = {name: self._build(expert) for name, expert in experts_of(self.expert).items()}
        boundary = 0.0 if self.expert == "single" else self.noise.boundary
        self.renderer = Experts(models.get("transformer"), models.get("transformer_2"), boundary)
        if self.lora and self.lora.init_from:
            load_lora(self.renderer, self.lora.init_from)
        for model in self.renderer.models.values():
            if self.device_mesh is not None:
                shard(model, model.blocks, weights_mesh(self), methods=["keys_values"])
                model.axis = Axis.of(self.device_mesh, model.config["num_attention_heads"])
            model.train()  # from_pretrained leaves it in eval mode, in which a LoRA's dropout does nothing
            if self.swap_blocks:
                BlockSwapping(model, self.swap_blocks)
            if self.compile_blocks:
                model.compile_repeated_blocks()
        if self.lora:  # the same everywhere from the start, and not all on the device
            ignore_frozen_in_ddp(self)

    def _build(self, expert: Expert) -> PackedWanTransformer3DModel:
        if self.init_from:
            model = load_transformer(self.init_from, expert, self._frozen.dtype if self.lora else torch.float32)
        else:
            assert self.architecture is not None
            model = self.architecture.build()
        model.attention, model.rope_saves = self.attention, self.rope_saves
        model.recompute = "full" if self.recompute == "auto" else self.recompute
        if self.lora:
            add_lora(model, self.lora)
        if self.float8:
            compute_in_float8(model.blocks)
        if self.quantize:
            quantize(model.blocks, self.quantize)
        return model

    @property
    def codec(self) -> LatentCodec:
        """The frozen VAE, on the module's device."""
        return self._frozen.codec(self.device)

    @property
    def features(self) -> TextFeatures:
        """The frozen text encoder and its tables, on the module's device."""
        return self._frozen.features(self.device)

    # -- training --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Begin to gather losses; choose what is recomputed."""
        super().on_train_start()
        if self.recompute == "auto":
            settle(self, list(self.renderer.models.values()), self.compile_blocks)

    def empty_table(self) -> MeanTable:
        """Losses in all, by task and by noise level."""
        return loss_table(self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss under noise that is the same at every validation and, whatever `noise` is, in every run.

        Each task has its own shift and density, so that ``val/loss`` compares runs that train under different ones; the
        expert and ``noise.boundary`` still decide which noise levels are measured.
        """
        super().validation_step(batch, batch_idx)

    def losses(
        self, samples: Sequence[Conversation], keys: Sequence[tuple[str | int, ...]], train: bool = True
    ) -> tuple[Tensor, MeanTable]:
        """Loss of some samples, a mean over all ranks' targets; with several ranks all have to call.

        Args:
            samples: Conversations with targets, of any tasks and sizes.
            keys: What the randomness of each sample depends on, besides the seed.
            train: Whether conditions are dropped and noise is as configured, or the tasks' own as in validation.

        Returns:
            The loss, for ``both`` the sum of the experts' losses, and the losses of all targets.
        """
        seeds = [draw_seed(self.seed, *key) for key in keys]
        # Host generators make the choices that shape the batch, those on the device noise.
        hosts, generators = ([torch.Generator(d).manual_seed(seed) for seed in seeds] for d in ("cpu", self.device))
        samples = [s.check() for s in samples]
        if train:
            samples = [self.dropout.apply(s, host) for s, host in zip(samples, hosts, strict=True)]
        latents = draw_latents(self.codec, samples, generators, self.max_latent_frames)
        contexts = self._contexts(samples)
        noise = self.noise if train else self.noise.tasks_own()
        total, table = torch.zeros((), device=self.device), self.empty_table()
        (count,) = mean_over_ranks([sum(len(s.targets) for s in samples)], self.device)
        for name, model in self.renderer.models.items():
            expert = experts_of(self.expert)[name]
            loss, noised = target_losses(model, expert, samples, latents, contexts, noise, hosts, generators)
            total = total + loss.sum() / count
            add_losses(table, noised, loss.detach())
        return total, table

    def _contexts(self, samples: Sequence[Conversation]) -> list[Tensor]:
        """Text context ``[rows, dim]`` of each sample."""
        return [pad_context(rows, self.text.rows) for rows in text_rows(samples, self.features, self.device)]

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
