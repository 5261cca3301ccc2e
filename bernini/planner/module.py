"""PlannerModule: conversations -> tokens -> masked planning and next-token losses, and plans in validation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from bernini.conversation import Conversation
from bernini.dropout import DropoutConfig
from bernini.errors import ConfigError
from bernini.lora import Adaptable, add_lora
from bernini.means import MeanTable
from bernini.planner.learning import NAMES, LossConfig, draw_noises, hide, labels, weigh, with_sum
from bernini.planner.lora import LoRAConfig
from bernini.planner.masking import SourceAttention
from bernini.planner.measuring import PlansMeasured
from bernini.planner.model import PlannerConfig, build, load_planner
from bernini.planner.planning import PlanningConfig
from bernini.planner.template import PlannerTemplate, pack
from bernini.planner.validation import PlanValidation
from bernini.planner.vision import VisionConfig
from bernini.reasoning import unfold
from bernini.seeds import draw_seed


@dataclass
class MLLMConfig:
    """Shape of a multimodal LLM that starts from random weights.

    Attributes:
        text: Fields of transformers' ``Qwen2_5_VLTextConfig``.
        vision: Fields of transformers' ``Qwen2_5_VLVisionConfig``.
    """

    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)


class PlannerModule(PlansMeasured, Adaptable):
    """Trains the planner.

    Args:
        tokenizer: Folder of Qwen2.5-VL's tokenizer.
        init_from: Bernini folder with weights to start from, or that of a Qwen2.5-VL, beside which the rest is drawn.
            To continue a run, pass ``--ckpt_path`` instead.
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
        recompute: ``full`` keeps the input of each layer alone, and computes the rest again in the backward pass.
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
        recompute: Literal["none", "full"] = "full",
        seed: int = 0,
    ) -> None:
        super().__init__(lora)
        if (init_from is None) == (mllm is None):
            raise ConfigError(
                "give the planner either weights or a shape",
                where="model.init_args",
                fix="set init_from to train from weights, or mllm to train from scratch",
            )
        self.template = PlannerTemplate.from_pretrained(tokenizer, vision)
        self.init_from, self.mllm, self.config = init_from, mllm, planner
        self.loss, self.dropout, self.sources, self.train_vit = loss, dropout, sources, train_vit
        self.planning, self.validation = planning, validation
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.recompute, self.seed = recompute, seed

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
        self.prepare_planner(self.recompute == "full")

    # -- training --------------------------------------------------------------------------------------------------

    def empty_table(self) -> MeanTable:
        """Both losses, the visual one also by task, and right tokens and answers."""
        return MeanTable(NAMES, self.device)

    def _means(self, table: MeanTable) -> dict[str, Tensor]:
        """Means over all ranks, with ``loss``, the weighted sum of its parts."""
        return with_sum(super()._means(table), {"visual": self.loss.visual, "ntp": self.loss.ntp})

    def losses(
        self, samples: Sequence[Conversation], keys: Sequence[tuple[str | int, ...]], train: bool = True
    ) -> tuple[Tensor, MeanTable]:
        """Losses of some samples; with several ranks all have to call.

        The visual loss is the mean over all hidden tokens of the batch, the next-token loss that over all labels.

        Args:
            samples: Conversations with visual targets or texts to learn, of any tasks and sizes; with both, see
                `unfold`.
            keys: What the randomness of each sample depends on, besides the seed.
            train: Whether conditions are dropped.

        Returns:
            The weighted sum of both losses, and means of its parts. The mean of this sum over ranks, and so that of its
            gradients, is the loss of all their samples in one batch.
        """
        parts = [(part, key) for s, key in zip(samples, keys, strict=True) for part in unfold(s)]
        samples, seeds = [part for part, _ in parts], [draw_seed(self.seed, *key) for _, key in parts]
        hosts = [torch.Generator().manual_seed(seed) for seed in seeds]
        if train:
            samples = [self.dropout.apply(s, host) if s.targets else s for s, host in zip(samples, hosts, strict=True)]
        written = [self.template(sample) for sample in samples]
        masked = [hide(s, w, self.loss.ratios, host) for s, w, host in zip(samples, written, hosts, strict=True)]
        heads = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        draws = draw_noises(self.planner.vit_decoder, masked, heads)
        packed, hidden = pack(written).to(self.device), torch.cat(masked).to(self.device)
        output = self.planner(packed, masked=hidden, draws=draws, sources=self.sources)
        table = self.empty_table()
        ntp, visual = weigh(output, samples, [int(m.sum()) for m in masked], [labels(w) for w in written], table)
        return self.loss.ntp * ntp + self.loss.visual * visual, table
