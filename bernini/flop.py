"""Model FLOPs of a training step, counted from what the models are given, without running anything.

Matrix products alone are counted, a multiply-add as two operations. A product has a forward pass, a gradient of its
input where something before it learns, and one of its weights where these learn: three times the forward pass in full
training, and once for what is frozen with nothing to learn before it, such as the vision tower. Under a LoRA the base
passes gradients on and has none of its own. Attention counts the pairs of tokens that see each other; its backward pass
is two forward ones. What is recomputed is not counted, nor are the frozen VAE and text encoder.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from bernini.planner.flow_head import Draws
from bernini.planner.masking import SOURCE, TARGET, SourceAttention
from bernini.planner.model import PlannerModel, PlannerOutput
from bernini.planner.template import PlannerPack
from bernini.planner.tower import layout
from bernini.planner.vision import Visual
from bernini.renderer.packing import Pack
from bernini.renderer.transformer import PackedWanTransformer3DModel


@dataclass
class Work:
    """What one forward with its backward pass does.

    Attributes:
        part: ``renderer`` or ``planner``.
        flop: Floating-point operations; a tensor on the device where only that knows, so that nobody waits for it.
        tokens: Tokens that the model is given.
        targets: Those of them that it learns to make.
    """

    part: str
    flop: float | Tensor
    tokens: int
    targets: int


@singledispatch
def work(model: nn.Module, output: Any, *args: Any, **kwargs: Any) -> Work | None:
    """What a training forward of a model, and its backward pass, do; null for models that are not known.

    Register a function for a class to have `callbacks.Throughput` count it.

    Args:
        model: The model.
        output: What its forward has returned.
        *args: What its forward was given.
        **kwargs: The same, by name.
    """
    return None


def is_known(model: nn.Module) -> bool:
    """Whether `work` knows the class of a model."""
    return work.dispatch(type(model)) is not work.dispatch(nn.Module)


class Meter:
    """Gathers what a module's known models do while it trains.

    It sits on their forwards; modules and models know nothing of it, and forwards without a gradient do not count.

    Args:
        module: Where to look for models.

    Attributes:
        done: Work since it was last cleared.
    """

    def __init__(self, module: nn.Module) -> None:
        self.done: list[Work] = []
        known = [model for model in module.modules() if is_known(model)]
        self._hooks = [model.register_forward_hook(self._count, with_kwargs=True) for model in known]

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled() and (found := work(model, output, *args, **kwargs)):
            self.done.append(found)

    def remove(self) -> None:
        """Leave the models."""
        for hook in self._hooks:
            hook.remove()


def learns(*modules: nn.Module) -> bool:
    """Whether any parameter of modules is trained."""
    return any(p.requires_grad for module in modules for p in module.parameters())


class Count:
    """Sums up the operations of linear maps and attention.

    What is computed is told by flags: whether the input of a map needs a gradient; what is returned says so of its
    output.

    Attributes:
        flop: So far.
    """

    def __init__(self) -> None:
        self.flop = 0.0

    def linear(self, layer: Any, rows: int, needs: bool) -> bool:
        """Rows through a linear map, a convolution whose stride is its kernel, or either of them with a LoRA."""
        if hasattr(layer, "base_layer"):
            learned = self.linear(layer.base_layer, rows, needs)
            for name in layer.active_adapters:
                down = self.linear(layer.lora_A[name], rows, needs)
                learned |= self.linear(layer.lora_B[name], rows, down)
            return learned
        size = layer.in_features * layer.out_features if hasattr(layer, "in_features") else layer.weight.numel()
        trained = any(p.requires_grad for p in layer.parameters(recurse=False))
        self.flop += 2.0 * rows * size * (1 + needs + trained)
        return needs or trained

    def sequence(self, layers: nn.Module, rows: int, needs: bool) -> bool:
        """Rows through the linear maps of a sequence, and what is between them."""
        for layer in layers.children():
            if hasattr(layer, "base_layer") or isinstance(layer, nn.Linear):
                needs = self.linear(layer, rows, needs)
            else:
                needs |= learns(layer)
        return needs

    def attention(self, width: int, pairs: float, needs: bool) -> bool:
        """Scores and sums of pairs of tokens that see each other; ``width`` is that of all heads."""
        self.flop += 4.0 * width * pairs * (1 + 2 * needs)
        return needs


@work.register
def _renderer_work(model: PackedWanTransformer3DModel, output: Tensor, pack: Pack, *_: Any, **__: Any) -> Work:
    parts: Any = model
    count, embedder = Count(), parts.condition_embedder
    tokens, rows, samples = pack.tokens, sum(pack.context_lengths), len(pack.token_lengths)
    width = model.config["num_attention_heads"] * model.config["attention_head_dim"]
    own = float(sum(n * n for n in pack.token_lengths))
    cross = float(sum(n * m for n, m in zip(pack.token_lengths, pack.context_lengths, strict=True)))

    x = count.linear(parts.patch_embedding, tokens, False)
    x |= model.segment_encoding == "embedding" and learns(parts.segment_embedding)
    time = count.sequence(embedder.time_embedder, samples, False)
    modulation = count.linear(embedder.time_proj, samples, time)
    context = count.sequence(embedder.text_embedder, rows, pack.context.requires_grad)
    for block in parts.blocks:
        gate = modulation or block.scale_shift_table.requires_grad
        q, k, v = (count.linear(p, tokens, x or gate) for p in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v))
        seen = count.attention(width, own, q or k or v or learns(block.attn1.norm_q, block.attn1.norm_k))
        x |= count.linear(block.attn1.to_out[0], tokens, seen) or gate

        attn = block.attn2
        q = count.linear(attn.to_q, tokens, x or learns(block.norm2))
        k, v = (count.linear(p, rows, context) for p in (attn.to_k, attn.to_v))
        seen = count.attention(width, cross, q or k or v or learns(attn.norm_q, attn.norm_k))
        x |= count.linear(attn.to_out[0], tokens, seen)

        inner = count.linear(block.ffn.net[0].proj, tokens, x or gate)
        x |= count.linear(block.ffn.net[2], tokens, inner)
    count.linear(parts.proj_out, tokens, x or time or parts.scale_shift_table.requires_grad)
    return Work("renderer", count.flop, tokens, len(pack.target_index))


@work.register
def _planner_work(
    model: PlannerModel,
    output: PlannerOutput,
    pack: PlannerPack,
    features: Tensor | None = None,
    masked: Tensor | None = None,
    draws: Draws | None = None,
    sources: SourceAttention = "causal",
    *_: Any,
    **__: Any,
) -> Work:
    count, tokens = Count(), len(pack.ids)
    raw = [v for v in pack.visuals if v.features is None] if features is None else []
    seen = _see(count, model.tower, raw) if raw else features is not None and features.requires_grad
    x = seen or model.embedding.weight.requires_grad or (masked is not None and model.mask_tokens.requires_grad)
    pairs, coefficient, penultimate = visible_pairs(pack, sources), 0.0, x
    text: Any = model.text
    for layer in text.layers:
        penultimate, attn, mlp = x, layer.self_attn, layer.mlp
        y = x or learns(layer.input_layernorm)
        states = [count.linear(p, tokens, y) for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
        coefficient += 4.0 * text.config.hidden_size * (1 + 2 * any(states))  # of all heads together
        x |= count.linear(attn.o_proj, tokens, any(states))
        y = x or learns(layer.post_attention_layernorm)
        gates = [count.linear(p, tokens, y) for p in (mlp.gate_proj, mlp.up_proj)]
        x |= count.linear(mlp.down_proj, tokens, any(gates))
    count.linear(model.mllm.lm_head, len(output.logits), x or learns(text.norm))
    hidden = 0
    if draws is not None and masked is not None:
        hidden = draws.index.shape[1]
        condition = count.sequence(model.connector.pred_vit, hidden, penultimate)
        _flow(count, model.vit_decoder.net, draws.index.numel(), hidden, condition)
    if output.rows is not None:
        count.sequence(model.connector.proj_gen, len(output.rows), penultimate)
    return Work("planner", count.flop + coefficient * pairs, tokens, hidden)


def _see(count: Count, tower: Any, visuals: Sequence[Visual]) -> bool:
    """The vision tower; without a gradient unless it is trained."""
    config, trained = tower.config, learns(tower)
    patches = sum(math.prod(visual.grid) for visual in visuals)
    known = layout([visual.grid for visual in visuals], config, torch.device("cpu"))
    frames, windows = (float(known[f"cu_{kind}"].diff().square().sum()) for kind in ("seqlens", "window_seqlens"))
    count.linear(tower.patch_embed.proj, patches, False)
    for number, block in enumerate(tower.blocks):
        needs = trained and (number > 0 or learns(tower.patch_embed))
        seen = count.linear(block.attn.qkv, patches, needs)
        pairs = frames if number in config.fullatt_block_indexes else windows
        count.linear(block.attn.proj, patches, count.attention(config.hidden_size, pairs, seen))
        for layer in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            count.linear(layer, patches, trained)
    return count.sequence(tower.merger.mlp, patches // config.spatial_merge_size**2, trained)


def _flow(count: Count, net: Any, rows: int, tokens: int, condition: bool) -> None:
    """The flow head: rows are draws times tokens, and the condition of a token is embedded once for all draws."""
    x = count.linear(net.input_proj, rows, False)
    y = count.sequence(net.time_embed["mlp"], rows, False)
    y |= count.linear(net.cond_embed, tokens, condition)
    for block in net.res_blocks:
        modulation = count.sequence(block.adaLN_modulation, rows, y)
        x |= count.sequence(block.mlp, rows, x or modulation or learns(block.in_ln)) or modulation
    modulation = count.sequence(net.final_layer.adaLN_modulation, rows, y)
    count.linear(net.final_layer.linear, rows, x or modulation)


def visible_pairs(pack: PlannerPack, sources: SourceAttention) -> Tensor:
    """How many pairs of tokens of a pack see each other (`bernini.planner.masking`): float64, on the pack's device.

    The same as the sum of the mask, from lengths alone: nothing is quadratic, and nothing waits for the device.
    """
    kind, sample = pack.token_type, pack.sample
    index = torch.arange(len(kind), device=kind.device)
    shown = (kind != TARGET).long()
    before = shown.cumsum(0) - shown  # those in front of each token, in all samples
    causal = before + shown - before[torch.searchsorted(sample, sample)]
    # The tokens of a visual stand side by side: it ends where any of the three changes.
    changes = (kind.diff() != 0) | (pack.segment_id.diff() != 0) | (sample.diff() != 0)
    run = torch.cat([torch.zeros_like(sample[:1]), changes.cumsum(0)])
    first, end = torch.searchsorted(run, run), torch.searchsorted(run, run, right=True)
    pairs = causal.sum() + torch.where(kind == TARGET, end - first, 0).sum()
    if sources == "bidirectional":
        pairs = pairs + torch.where(kind == SOURCE, end - 1 - index, 0).sum()
    return pairs.double()
