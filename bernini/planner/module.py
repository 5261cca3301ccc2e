"""PlannerModule: conversations -> tokens -> masked planning and next-token losses, and plans in validation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLConfig

from bernini.conversation import Batch, Conversation
from bernini.dropout import DropoutConfig
from bernini.errors import CheckpointError, ConfigError
from bernini.lora import Adaptable, add_lora
from bernini.means import MeanTable
from bernini.planner.conversations import ConversationPlanner
from bernini.planner.flow_head import CHUNK, Draws
from bernini.planner.lora import LoRAConfig
from bernini.planner.masking import MASK_RATIOS, TARGET, UNIFORM, SourceAttention, draw_masked
from bernini.planner.model import PlannerConfig, PlannerOutput, build, load_planner
from bernini.planner.planning import Plan, PlanningConfig
from bernini.planner.template import IGNORED, PlannerSample, PlannerTemplate, pack
from bernini.planner.validation import PlanMeter, PlanValidation, right_tokens, true_target
from bernini.planner.vision import TargetSize, VisionConfig
from bernini.seeds import draw_seed
from bernini.sharding import data_rank, shard
from bernini.tasks import TASKS

_NAMES = ["visual", "ntp", "accuracy", "answers", *(f"visual_{task}" for task in TASKS)]


@dataclass
class MLLMConfig:
    """Shape of a multimodal LLM that starts from random weights.

    Attributes:
        text: Fields of transformers' ``Qwen2_5_VLTextConfig``.
        vision: Fields of transformers' ``Qwen2_5_VLVisionConfig``.
    """

    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)


@dataclass
class LossConfig:
    """Weights of the losses (paper, eq. 3) and what is hidden.

    Attributes:
        ntp: Weight of the next-token loss.
        visual: Weight of the flow head's loss on hidden target tokens; at 0, what serves it alone is frozen.
        ratios: Share of a target that is hidden: each task's own Beta distribution (paper, table 3), or uniform.
    """

    ntp: float = 0.2
    visual: float = 1.0
    ratios: Literal["beta", "uniform"] = "beta"


class PlannerModule(Adaptable):
    """Trains the planner.

    Args:
        tokenizer: Folder of Qwen2.5-VL's tokenizer.
        init_from: Bernini folder with weights to start from. To continue a run, pass ``--ckpt_path`` instead.
        mllm: Shape of a multimodal LLM that starts from random weights.
        planner: Shape of the rest; of ``init_from`` the shapes are the weights', and flow_shift and batch_mul these.
        vision: How pixels become patches.
        loss: Losses and masks.
        dropout: How conditions are dropped, for the guidance of planning.
        sources: Attention among the tokens of a source.
        train_vit: Train the vision tower too, whose outputs are then no fixed space for plans.
        lora: Train a LoRA of the text model instead of all the multimodal LLM. The connector's ``pred_vit``, the flow
            head and the mask token stay fully trained, as does the vision tower under ``train_vit``.
        planning: How `plan` plans.
        validation: Plans in validation.
        optimizer: Optimizer of the trainable parameters.
        lr_scheduler: Learning rate schedule, stepped every optimizer step.
        gradient_checkpointing: Recompute layers in the backward pass.
        seed: Seed of masks, noise and dropout.
    """

    moves_batches = True  # what is packed of the samples goes to the device at once

    def __init__(
        self,
        tokenizer: str,
        init_from: str | None = None,
        mllm: MLLMConfig | None = None,
        planner: PlannerConfig = PlannerConfig(),  # noqa: B008  dataclass defaults are copied by the parser
        vision: VisionConfig = VisionConfig(),  # noqa: B008
        loss: LossConfig = LossConfig(),  # noqa: B008
        dropout: DropoutConfig = DropoutConfig(),  # noqa: B008
        sources: SourceAttention = "causal",
        train_vit: bool = False,
        lora: LoRAConfig | None = None,
        planning: PlanningConfig = PlanningConfig(),  # noqa: B008
        validation: PlanValidation = PlanValidation(),  # noqa: B008
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(lora)
        if (init_from is None) == (mllm is None):
            raise ConfigError(
                "give the planner either weights or a shape",
                where="model.init_args",
                fix="set init_from to train from weights, or mllm to train from scratch",
            )
        if not (Path(tokenizer) / "tokenizer_config.json").is_file():
            raise CheckpointError(
                "no tokenizer here", where=tokenizer, fix="point at a folder of Qwen2.5-VL's tokenizer"
            )
        self.template = PlannerTemplate(AutoTokenizer.from_pretrained(tokenizer, local_files_only=True), vision)
        self.init_from, self.mllm, self.config = init_from, mllm, planner
        self.loss, self.dropout, self.sources, self.train_vit = loss, dropout, sources, train_vit
        self.planning, self.validation = planning, validation
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.gradient_checkpointing, self.seed = gradient_checkpointing, seed
        self.plans: PlanMeter | None = None

    def configure_model(self) -> None:
        """Build the planner, sharded over the mesh if the strategy brings one; random weights depend on the seed."""
        if hasattr(self, "planner"):
            return
        if self.init_from:
            self.planner = load_planner(self.init_from, config=self.config)
        else:
            assert self.mllm is not None
            torch.manual_seed(draw_seed(self.seed, "weights"))
            config = Qwen2_5_VLConfig(text_config=self.mllm.text, vision_config=self.mllm.vision)
            self.planner = build(self.config, config)
        self.planner.train()
        if self.lora:
            self.planner.mllm.requires_grad_(False)
            torch.manual_seed(draw_seed(self.seed, "lora"))
            add_lora(self.planner.text, self.lora)
        self.planner.tower.requires_grad_(self.train_vit)
        self.planner.connector.proj_gen.requires_grad_(False)  # it feeds the renderer, which is not here
        if not self.loss.visual:  # nothing would teach these, and weight decay wear them down
            for part in (self.planner.connector.pred_vit, self.planner.vit_decoder, self.planner.mask_tokens):
                part.requires_grad_(False)
        if self.gradient_checkpointing:
            self.planner.mllm.gradient_checkpointing_enable()
            self.planner.vit_decoder.net.gradient_checkpointing = self.device_mesh is not None
        self.planner.vit_decoder.config.chunk = CHUNK  # sharded, it goes without and recomputes instead
        if self.device_mesh is not None:
            shard(self.planner, self.planner.blocks, self.device_mesh)
            if self.validation.samples:
                rank_zero_warn("a sharded planner cannot plan: validation measures losses alone")

    # -- training --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Begin to gather losses, too."""
        super().on_train_start()
        self._trained = MeanTable(_NAMES, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One packed forward of the multimodal LLM for both losses."""
        key = ("train", self.global_step, batch_idx % self.trainer.accumulate_grad_batches)
        first = data_rank(self) * len(batch)  # so that a sample's draws do not depend on the number of ranks
        torch.manual_seed(draw_seed(self.seed, *key, first))
        loss, table = self.losses(batch.samples, [(*key, first + i) for i in range(len(batch))])
        self._trained += table
        self.log("train/loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(batch))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Every ``log_every_n_steps`` steps, log means over all samples of all ranks since the last time."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            table, self._trained = self._trained, MeanTable(_NAMES, self.device)
            means = self._means(table)
            for logger in self.loggers:
                values = {f"train/{name}": value.item() for name, value in means.items()}
                logger.log_metrics({**values, "epoch": self.current_epoch}, self.global_step)
                logger.save()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The losses, and plans of the first samples, under masks and noise that are the same at every validation."""
        self._measured += self.losses(batch.samples, [("validate", s.key) for s in batch.samples], train=False)[1]
        if self.plans and (chosen := self.plans.choose(batch.samples)):
            made = self.plan(chosen, [draw_seed(self.seed, "plan", s.key) % 2**32 for s in chosen])
            visuals = [true_target(s, self.template.vision) for s in chosen]
            self.plans.add(chosen, [plan.embeds for plan in made], visuals, self.planner.see(visuals))

    def on_validation_epoch_start(self) -> None:
        """Begin to gather."""
        self._measured = MeanTable(_NAMES, self.device)
        if self.validation.samples and self.device_mesh is None:
            share = math.ceil(self.validation.samples / self.trainer.world_size)
            width = self.planner.embedding.embedding_dim
            self.plans = PlanMeter(share, width, self.device)

    def on_validation_epoch_end(self) -> None:
        """Log means over all samples of all ranks: ``val/loss``, or ``test/loss``, its parts, and quality of plans."""
        stage = "test" if self.trainer.testing else "val"
        found = {**self._means(self._measured), **(self.plans.compute(self.trainer.strategy) if self.plans else {})}
        self.log_dict({f"{stage}/{name}": value for name, value in found.items()}, sync_dist=True)
        self.plans = None

    test_step, on_test_epoch_start = validation_step, on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def _means(self, table: MeanTable) -> dict[str, Tensor]:
        """Means over all ranks, with ``loss``, the weighted sum of its parts."""
        means = table.over_ranks(self.trainer.strategy).means()
        weights = {"visual": self.loss.visual, "ntp": self.loss.ntp}
        parts = [weight * means[name] for name, weight in weights.items() if name in means]
        return {"loss": torch.stack(parts).sum(), **means} if parts else means

    def losses(
        self, samples: Sequence[Conversation], keys: Sequence[tuple[str | int, ...]], train: bool = True
    ) -> tuple[Tensor, MeanTable]:
        """Losses of some samples; with several ranks all have to call.

        The visual loss is the mean over all hidden tokens of the batch, the next-token loss that over all labels.

        Args:
            samples: Conversations with visual targets or texts to learn, of any tasks and sizes.
            keys: What the randomness of each sample depends on, besides the seed.
            train: Whether conditions are dropped.

        Returns:
            The weighted sum of both losses, and means of its parts. The mean of this sum over ranks, and so that of its
            gradients, is the loss of all their samples in one batch.
        """
        seeds = [draw_seed(self.seed, *key) for key in keys]
        hosts = [torch.Generator().manual_seed(seed) for seed in seeds]
        if train:
            samples = [self.dropout.apply(s, host) if s.targets else s for s, host in zip(samples, hosts, strict=True)]
        written = [self.template(sample) for sample in samples]
        masked = [self._hide(s, w.token_type, host) for s, w, host in zip(samples, written, hosts, strict=True)]
        draws = Draws.cat([self._draw(int(m.sum()), seed) for m, seed in zip(masked, seeds, strict=True)])
        packed, hidden = pack(written).to(self.device), torch.cat(masked).to(self.device)
        output = self.planner(packed, masked=hidden, draws=draws, sources=self.sources)
        return self._weigh(output, samples, [int(m.sum()) for m in masked], [_labels(w) for w in written])

    def _hide(self, sample: Conversation, token_type: Tensor, generator: torch.Generator) -> Tensor:
        """Bool ``[n]``: target tokens that are hidden."""
        masked = token_type == TARGET
        if sample.targets:
            ratio = MASK_RATIOS.get(sample.task, UNIFORM) if self.loss.ratios == "beta" else UNIFORM
            masked[masked.clone()] = draw_masked(int(masked.sum()), ratio, generator)
        return masked

    def _draw(self, count: int, seed: int) -> Draws:
        """Timesteps and noises of a sample's hidden tokens."""
        return self.planner.vit_decoder.draw(count, torch.Generator(self.device).manual_seed(seed), self.device)

    def _weigh(
        self, output: PlannerOutput, samples: Sequence[Conversation], hidden: Sequence[int], labelled: Sequence[int]
    ) -> tuple[Tensor, MeanTable]:
        """The loss, and sums of each sample's hidden tokens and labels, whose numbers are given."""
        assert output.visual is not None
        ntp = F.cross_entropy(output.logits.float(), output.labels, reduction="none")
        counts = torch.tensor([sum(labelled), sum(hidden)], device=self.device, dtype=torch.float32)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            counts /= dist.get_world_size()
        ntp_mean, visual_mean = torch.stack([ntp.sum(), output.visual.sum()]) / counts.clamp(min=1e-6)
        table = MeanTable(_NAMES, self.device)
        right = right_tokens(output, labelled)
        for parts, names in (
            (
                output.visual.detach().split(list(hidden)),
                [("visual", f"visual_{s.task}") if s.targets else () for s in samples],
            ),
            (ntp.detach().split(list(labelled)), [("ntp",)] * len(samples)),
            (right, [("accuracy",)] * len(samples)),
            ([own.all().expand(min(len(own), 1)) for own in right], [("answers",)] * len(samples)),
        ):
            sums = torch.stack([own.sum(dtype=torch.float32) for own in parts])
            counted = [_counted(s, *own) for s, own in zip(samples, names, strict=True)]
            table.add(sums, counted, [len(part) for part in parts])
        return self.loss.ntp * ntp_mean + self.loss.visual * visual_mean, table

    # -- planning --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def plan(
        self, conversations: Sequence[Conversation], seeds: Sequence[int], size: TargetSize | None = None
    ) -> list[Plan]:
        """Plan the targets of conversations; what known ones show is not looked at.

        Args:
            conversations: What to plan.
            seeds: Seed of each plan's order and noise.
            size: Size of targets that nothing else gives one.
        """
        was_training = self.planner.training
        self.planner.eval()
        planner = ConversationPlanner(self.planner, self.template)
        plans = planner(conversations, seeds, self.planning, [size] * len(conversations))
        self.planner.train(was_training)
        return plans


def _counted(sample: Conversation, *rows: str) -> tuple[str, ...]:
    """The rows that a sample's values belong to: none if it only keeps a rank in step with the others."""
    return () if sample.info.get("padding") else rows


def _labels(sample: PlannerSample) -> int:
    """How many tokens are learned."""
    return int((sample.labels != IGNORED).sum())
