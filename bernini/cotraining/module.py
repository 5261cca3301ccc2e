"""CoTrainingModule: planner and renderer learn from one forward of the multimodal LLM."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from bernini.attention import AttentionBackend
from bernini.contexts import check_widths, join_context
from bernini.conversation import Batch, Conversation
from bernini.cotraining.conditions import ConditionDropout
from bernini.cotraining.examples import Example, make_example
from bernini.cotraining.exposure import PlanExposure
from bernini.cotraining.settings import CoTrainingLoss, InitFrom
from bernini.cotraining.stages import (
    TEACHES,
    Part,
    Parts,
    Stage,
    check_stages,
    stage_at,
    stages_before,
    step_of,
)
from bernini.errors import ConfigError
from bernini.flow.noise import NoiseConfig
from bernini.means import MeanTable, mean_over_ranks
from bernini.planner.learning import NAMES, draw_noises, labels, weigh, with_sum
from bernini.planner.masking import SourceAttention
from bernini.planner.measuring import PlansMeasured
from bernini.planner.model import PlannerConfig, Telling, load_planner
from bernini.planner.planning import PlanningConfig
from bernini.planner.template import PlannerTemplate, pack
from bernini.planner.validation import PlanValidation
from bernini.planner.vision import VisionConfig
from bernini.reasoning import unfold
from bernini.renderer.experts import Choice, Experts, experts_of, load_transformer
from bernini.renderer.frozen import Frozen, TextConfig
from bernini.renderer.learning import draw_latents, idle_pass, target_losses
from bernini.renderer.losses import add_losses, loss_names
from bernini.renderer.recompute import Recompute
from bernini.renderer.rendering import Prediction, Renderer, text_rows
from bernini.renderer.sampling import SamplingConfig
from bernini.rope.op import Saves
from bernini.seeds import draw_seed
from bernini.sharding import shard, weights_mesh
from bernini.tasks import UNDERSTANDING
from bernini.text.encoder import TextFeatures
from bernini.ulysses import Axis
from bernini.vae.codec import LatentCodec


class CoTrainingModule(PlansMeasured):
    """Trains planner and renderer on ``0.2 L_ntp + L_visual + L_dit``, and samples with plans.

    Args:
        tokenizer: Folder of Qwen2.5-VL's tokenizer.
        vae: Folder of the frozen VAE.
        init_from: Weights to start from. To continue a run, pass ``--ckpt_path`` instead.
        stages: What is trained when.
        expert: Experts that the renderer has, each with its own noise: ``high`` or ``low`` of two, ``both``, or the
            ``single`` one of a model without experts.
        planner: Of this only ``flow_shift`` and ``batch_mul`` count; shapes are those of the weights.
        vision: How pixels become patches.
        text: Where text features come from; in training their rows are as many as they are, in sampling ``rows``.
        loss: Losses and masks.
        dropout: How conditions are dropped.
        exposure: Which plan the renderer reads.
        noise: How timesteps are drawn.
        sources: Attention among the planner's tokens of a source.
        planning: How `plan` plans.
        validation: Plans in validation.
        sampling: How clips are sampled in validation and prediction.
        optimizer: Optimizer of all that is trained in any stage.
        lr_scheduler: Learning rate schedule, stepped every optimizer step.
        rates: Learning rate of parts, where it is not the optimizer's own.
        attention: Attention backend of the renderer.
        rope_saves: What the fused rotation of queries and keys keeps for the backward pass: its inputs, or its outputs,
            which attention keeps as well.
        recompute: What the renderer's blocks keep for the backward pass (docs/performance.md). The planner's layers
            keep their input alone, unless it is ``none``.
        compile: Compile the renderer's blocks with ``torch.compile``.
        frozen_dtype: Dtype of the VAE and the text encoder.
        max_latent_frames: Longer latents are cut.
        seed: Seed of masks, noise, timesteps and dropout.
    """

    renderer: Experts

    def __init__(
        self,
        tokenizer: str,
        vae: str,
        init_from: InitFrom,
        stages: list[Stage],
        expert: Choice = "both",
        planner: PlannerConfig = PlannerConfig(),  # noqa: B008  dataclass defaults are copied by the parser
        vision: VisionConfig = VisionConfig(),  # noqa: B008
        text: TextConfig = TextConfig(),  # noqa: B008
        loss: CoTrainingLoss = CoTrainingLoss(),  # noqa: B008
        dropout: ConditionDropout = ConditionDropout(),  # noqa: B008
        exposure: PlanExposure = PlanExposure(),  # noqa: B008
        noise: NoiseConfig = NoiseConfig(),  # noqa: B008
        sources: SourceAttention = "causal",
        planning: PlanningConfig = PlanningConfig(),  # noqa: B008
        validation: PlanValidation = PlanValidation(),  # noqa: B008
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        rates: dict[Part, float] | None = None,
        attention: AttentionBackend = "auto",
        rope_saves: Saves = "inputs",
        recompute: Recompute = "full",
        compile: bool = False,
        frozen_dtype: Literal["float32", "bfloat16"] = "float32",
        max_latent_frames: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._weights: dict[str, float] = {"ntp": loss.ntp, "visual": loss.visual, "dit": loss.dit}
        check_stages(stages, self._weights)
        self.template = PlannerTemplate.from_pretrained(tokenizer, vision)
        self.init_from, self.stages, self.expert, self.config = init_from, stages, expert, planner
        self.text, self.loss, self.dropout, self.exposure, self.noise = text, loss, dropout, exposure, noise
        self.sources, self.planning, self.validation, self.sampling = sources, planning, validation, sampling
        self.optimizer, self.lr_scheduler, self.rates = optimizer, lr_scheduler, rates or {}
        self.attention, self.rope_saves = attention, rope_saves
        self.recompute, self.compile_blocks = recompute, compile
        self.max_latent_frames, self.seed = max_latent_frames, seed
        self._frozen = Frozen(vae, text, getattr(torch, frozen_dtype))

    # -- model -----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Read planner and renderer; sharded over the mesh if the strategy brings one."""
        if hasattr(self, "planner"):
            return
        if self.device_mesh is not None and self.exposure.planned:
            raise ConfigError(
                "a sharded planner cannot plan",
                where="model.init_args.exposure.planned",
                fix="train on noised plans (exposure.noised) instead, or with DDP",
            )
        models = {name: load_transformer(self.init_from.renderer, e) for name, e in experts_of(self.expert).items()}
        boundary = 0.0 if self.expert == "single" else self.noise.boundary
        self.renderer = Experts(models.get("transformer"), models.get("transformer_2"), boundary)
        self.planner = load_planner(self.init_from.planner, config=self.config).train()
        for model in models.values():
            check_widths(self.planner.config.gen_dim, model.config["text_dim"])
        self.prepare_planner(self.recompute != "none")
        for model in models.values():
            model.attention, model.rope_saves = self.attention, self.rope_saves
            model.recompute = self.recompute
            if self.device_mesh is not None:
                shard(model, model.blocks, weights_mesh(self))
                model.axis = Axis.of(self.device_mesh, model.config["num_attention_heads"])
            model.train()
            if self.compile_blocks:
                model.compile_repeated_blocks()
        self._train(self.stages[:1])

    @property
    def parts(self) -> Parts:
        """Parameters by part."""
        return Parts(self.planner, self.renderer, self.expert)

    @property
    def codec(self) -> LatentCodec:
        """The frozen VAE, on the module's device."""
        return self._frozen.codec(self.device)

    @property
    def features(self) -> TextFeatures:
        """The frozen text encoder and its tables, on the module's device."""
        return self._frozen.features(self.device)

    # -- stages ----------------------------------------------------------------------------------------------------

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that any stage trains, by name."""
        parts = self.parts
        ever = {p for part in self._ever(parts) for p in parts.parameters[part]}
        return {name: p for name, p in self.named_parameters() if p in ever}

    def _ever(self, parts: Parts) -> list[str]:
        found = parts.expand([part for stage in self.stages for part in stage.train])
        return [part for part in parts.parameters if part in found]

    def param_groups(self) -> list[dict[str, Any]]:
        """A group for each part that any stage trains.

        Raises:
            ConfigError: A part has a learning rate and is never trained.
        """
        parts = self.parts
        ever, rates = self._ever(parts), self._rates(parts)
        if idle := rates.keys() - {*ever}:
            raise ConfigError(
                f"{min(idle)} has a learning rate, and no stage trains it",
                where="model.init_args.rates",
                fix="take it out, or add the part to a stage",
            )
        return [
            {"params": parts.parameters[part], "name": part, **({"lr": rates[part]} if part in rates else {})}
            for part in ever
        ]

    def _rates(self, parts: Parts) -> dict[str, float]:
        return {part: rate for name, rate in self.rates.items() for part in parts.expand([name])}

    def on_fit_start(self) -> None:
        """Before a sharded checkpoint is read: it has optimizer states of what was trained so far, and no others."""
        if self.device_mesh is not None and self.resumes_from:
            self._train(stages_before(self.stages, step_of(self.resumes_from)))

    def on_train_start(self) -> None:
        """Begin to gather losses.

        Raises:
            ConfigError: A sharded checkpoint was read without its optimizer states.
        """
        if self.device_mesh is not None and self.global_step and not self.resumes_from:
            raise ConfigError(
                "a sharded run goes on without what its optimizer had gathered",
                why="this module was not told of the checkpoint before it was read",
                fix="resume with `bernini fit --ckpt_path`, or set the module's resumes_from to the checkpoint",
            )
        super().on_train_start()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Go on to another stage where it begins."""
        now = [stage_at(self.stages, self.global_step)]
        if now != self._now:
            self._train(now)
            strategy = self.trainer.strategy
            if isinstance(strategy, DDPStrategy):  # it would wait for the gradients of the stage before
                strategy.model = self
                strategy.configure_ddp()

    def _train(self, stages: list[Stage]) -> None:
        """Train what some stages do, freeze all else."""
        self._now = stages
        self._learned = self.parts.expand([part for stage in stages for part in stage.train])
        self.parts.freeze_all_but(self._learned)

    # -- training --------------------------------------------------------------------------------------------------

    def empty_table(self) -> MeanTable:
        """The planner's losses, and ``dit``, the renderer's, also by task and noise level."""
        return MeanTable([*NAMES, *loss_names("dit")], self.device)

    def _means(self, table: MeanTable) -> dict[str, Tensor]:
        """Means over all ranks, with ``loss``, the weighted sum of its parts."""
        return with_sum(super()._means(table), self._weights)

    def losses(
        self, samples: Sequence[Conversation], keys: Sequence[tuple[str | int, ...]], train: bool = True
    ) -> tuple[Tensor, MeanTable]:
        """Losses of some samples, from one forward of the planner; with several ranks all have to call.

        Each loss is a mean over all ranks: of all hidden tokens, of all labels, of all targets.

        Args:
            samples: Conversations with visual targets or texts to learn, of any tasks and sizes; with both, see
                `unfold`.
            keys: What the randomness of each sample depends on, besides the seed.
            train: Whether conditions are dropped, noise and plans are as configured, and losses that teach nothing in
                this stage are left out.

        Returns:
            The weighted sum, in which several experts' losses add up, and means of its parts.
        """
        wanted = self._wanted(train)
        parts = [(part, key) for s, key in zip(samples, keys, strict=True) for part in unfold(s)]
        samples, seeds = [part for part, _ in parts], [draw_seed(self.seed, *key) for _, key in parts]
        drawn = (self.dropout, self.exposure) if train else ()
        examples = [
            make_example(sample, self.template, self.loss.ratios, torch.Generator().manual_seed(seed), *drawn)
            for sample, seed in zip(samples, seeds, strict=True)
        ]
        masked = [e.masked for e in examples]
        draws = draw_noises(self.planner.vit_decoder, masked, self._generators(seeds)) if "visual" in wanted else None
        output = self.planner(
            pack([e.written for e in examples]).to(self.device),
            masked=torch.cat(masked).to(self.device),
            draws=draws,
            sources=self.sources,
            telling=self._tell(examples, seeds) if "dit" in wanted else None,
        )
        table = self.empty_table()
        counts = [int(m.sum()) for m in masked], [labels(e.written) for e in examples]
        ntp, visual = weigh(output, [e.planner for e in examples], *counts, table)
        total = self.loss.ntp * ntp + self.loss.visual * visual
        if output.rows is not None:
            total = total + self.loss.dit * self._render(examples, output.rows, seeds, train, table)
        return total, table

    def _wanted(self, train: bool) -> set[str]:
        """Losses with a weight and, in training, with something to teach."""
        own = {loss: taught for loss, taught in TEACHES.items() if self._weights[loss]}
        return {loss for loss, taught in own.items() if not (train and taught.isdisjoint(self._learned))}

    def _generators(self, seeds: Sequence[int]) -> list[torch.Generator]:
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    def _tell(self, examples: Sequence[Example], seeds: Sequence[int]) -> Telling:
        """What the planner's forward tells the renderer, with the plans that it does not see itself."""
        width = self.planner.embedding.embedding_dim
        levels, values = [torch.zeros(0)], [torch.zeros(0, width, device=self.device)]
        for example, seed in zip(examples, seeds, strict=True):
            if count := int(example.second.sum()):
                if example.kind == "planned":
                    (plan,) = self.plan([example.planner], [seed % 2**32], config=self.exposure.planning)
                    values.append(plan.embeds.float())
                else:
                    (generator,) = self._generators([draw_seed(seed, "plan")])
                    values.append(torch.randn(count, width, generator=generator, device=self.device))
                levels.append(torch.full((count,), example.level))
        told, second = torch.cat([e.told for e in examples]), torch.cat([e.second for e in examples])
        return Telling(*(x.to(self.device) for x in (told, second, torch.cat(levels), torch.cat(values))))

    def _render(
        self, examples: Sequence[Example], rows: Tensor, seeds: Sequence[int], train: bool, table: MeanTable
    ) -> Tensor:
        """The renderer's loss, each expert's a mean over all ranks' targets."""
        split = rows.split([int(e.told.sum()) for e in examples])
        shown = [
            (example.renderer, own, draw_seed(seed, "render"))
            for example, own, seed in zip(examples, split, seeds, strict=True)
            if example.renderer is not None
        ]
        samples, told = [sample for sample, *_ in shown], [own for _, own, _ in shown]
        (count,) = mean_over_ranks([sum(len(sample.targets) for sample in samples)], self.device)
        if not samples:
            context = join_context(torch.zeros(1, rows.shape[-1], device=self.device), rows)
            return torch.stack([idle_pass(model, context) for model in self.renderer.models.values()]).sum()
        generators = self._generators([seed for *_, seed in shown])
        hosts = [torch.Generator().manual_seed(seed) for *_, seed in shown]
        latents = draw_latents(self.codec, samples, generators, self.max_latent_frames)
        texts = text_rows(samples, self.features, self.device)
        contexts = [join_context(text, own) for text, own in zip(texts, told, strict=True)]
        noise, total = self.noise if train else self.noise.tasks_own(), torch.zeros((), device=self.device)
        for name, expert in experts_of(self.expert).items():
            model = self.renderer.models[name]
            loss, noised = target_losses(model, expert, samples, latents, contexts, noise, hosts, generators)
            total = total + loss.sum() / count
            add_losses(table, noised, loss.detach(), "dit")
        return total

    # -- sampling --------------------------------------------------------------------------------------------------

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Prediction]:
        """Plan and sample what each conversation asks for."""
        first = self.sampling.seed + batch.cursor.get("sample", 0)
        made = self.sample(batch.samples, range(first, first + len(batch)))
        return [p for p in made if not p.conversation.info.get("padding")]

    @torch.no_grad()
    def sample(
        self,
        conversations: Sequence[Conversation],
        seeds: Sequence[int] | None = None,
    ) -> list[Prediction]:
        """Plan and sample clips; but for rounding, none depends on what else is in the batch.

        A target in the conversation only gives the size, except for a lone low-noise expert, which starts from it.

        Args:
            conversations: What to make; those that ask for no image or clip are left out.
            seeds: Seed of each clip's plan and noise; counted on from ``sampling.seed`` if not given.

        Raises:
            ConfigError: The planner is sharded.
        """
        if self.device_mesh is not None:
            raise ConfigError("a sharded planner cannot plan", fix="sample with the weights that the run has saved")
        if seeds is None:
            seeds = range(self.sampling.seed, self.sampling.seed + len(conversations))
        asked = [(c, seed) for c, seed in zip(conversations, seeds, strict=True) if c.task not in UNDERSTANDING]
        if not asked:
            return []
        chosen, own = [c for c, _ in asked], [seed for _, seed in asked]
        renderer = Renderer(self.renderer, self.codec, self.features, self.text.rows)
        sizes = [renderer.target_size(conversation, self.sampling) for conversation in chosen]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            plans = self.plan(chosen, [seed % 2**32 for seed in own], sizes, negative=self.sampling.negative_prompt)
        clips = renderer(chosen, self.sampling, own, plans)
        return [Prediction(c, pixels) for c, pixels in zip(chosen, clips, strict=True)]
