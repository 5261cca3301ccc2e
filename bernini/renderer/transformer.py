"""Wan's diffusion transformer with a packed forward: diffusers' weights, names and loaders, our sequence layout."""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanTimeTextImageEmbedding,
    WanTransformer3DModel,
    WanTransformerBlock,
)
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo import maybe_mark_dynamic

from bernini.attention import AttentionBackend, Lengths, packed_attention, resolve_backend
from bernini.errors import ConfigError
from bernini.renderer.packing import Pack
from bernini.renderer.pointwise import gated_residual, modulated_norm, spread
from bernini.renderer.recompute import Recompute, caller, recomputing
from bernini.renderer.segments import SegmentEmbedding, SegmentEncoding, without_ids
from bernini.rope.op import Saves, Segments, full_width_norm, prepare_segments, sa3d_qk_norm_rope
from bernini.ulysses import ALONE, Axis, KeysValues, Slice

GRAPHS = 64  # that are kept of a block


@dataclass(frozen=True)
class Kept:
    """What forwards of one pack share while only its latents and timesteps change.

    Attributes:
        segments: Rotation of the pack.
        keys_values: For each block, keys and values of the contexts that the pack reads, one after another.
        cross_lengths: Tokens that read each context, and its rows, or ``None`` for a single one.
    """

    segments: Segments
    keys_values: Sequence[KeysValues]
    cross_lengths: Lengths | None


@dataclass(frozen=True)
class Ways:
    """Which of several ways to compute the same thing the blocks of a forward take.

    Attributes:
        attention: Resolved attention backend.
        saves: What the rotation of queries and keys keeps for the backward pass.
        recompute: What is computed again in the backward pass.
        slice: Which of the pack's tokens this rank computes.
    """

    attention: str
    saves: Saves
    recompute: Recompute = "none"
    slice: Slice = ALONE


def _vary(*tensors: Tensor | None) -> None:
    """Tell compilers that the number of rows is not always the same; a single one is a case of its own."""
    for tensor in tensors:
        if tensor is not None and tensor.shape[0] > 1:
            maybe_mark_dynamic(tensor, 0)


class PackedBlock(WanTransformerBlock):
    """A Wan block over a packed sequence; parameters and names are those of ``WanTransformerBlock``."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | KeysValues,
        modulation: Tensor,
        sample_index: Tensor | None,
        segments: Segments,
        self_lengths: Lengths | None,
        cross_lengths: Lengths | None,
        ways: Ways,
    ) -> Tensor:
        """Self-attention, cross-attention and feed-forward.

        Args:
            x: ``[tokens, dim]``.
            context: ``[rows, dim]`` embedded text, or its keys and values.
            modulation: ``[samples, 6, dim]`` projected timestep embedding.
            sample_index: ``[tokens]``, or ``None`` for a single sample.
            segments: Rotation of the pack.
            self_lengths: Query and key tokens of each sample, or ``None`` for a single sample.
            cross_lengths: Query tokens and rows of each context, or ``None`` for a single one.
            ways: Ways to compute it.

        Returns:
            ``[tokens, dim]``.
        """
        args = (x, context, modulation, sample_index, segments, self_lengths, cross_lengths, ways)
        # Inside what is compiled, so that the partitioner knows of it.
        return recomputing(ways.recompute, self._compute, *args)

    def _compute(
        self,
        x: Tensor,
        context: Tensor | KeysValues,
        modulation: Tensor,
        sample_index: Tensor | None,
        segments: Segments,
        self_lengths: Lengths | None,
        cross_lengths: Lengths | None,
        ways: Ways,
    ) -> Tensor:
        table = (self.scale_shift_table + modulation.float()).unbind(1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (spread(row, sample_index) for row in table)

        eps = self.norm1.eps  # all norms of a block share it
        y = modulated_norm(x, scale, shift, eps)
        y = self._self_attention(y, segments, self_lengths, ways)
        x = gated_residual(x, y, gate)

        y = self.norm2(x.float()).to(x.dtype)
        x = x + self._cross_attention(y, context, cross_lengths, ways.attention)

        y = modulated_norm(x, ffn_scale, ffn_shift, eps)
        return gated_residual(x, self.ffn(y), ffn_gate)

    def _self_attention(self, y: Tensor, segments: Segments, lengths: Lengths | None, ways: Ways) -> Tensor:
        attn: WanAttention = self.attn1
        q, k, v = (project(y).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v))
        weights, save_outputs = (attn.norm_q.weight, attn.norm_k.weight), ways.saves == "outputs"
        q, k = sa3d_qk_norm_rope(q, k, *weights, segments, self.norm1.eps, save_outputs)
        q, k, v = ways.slice.swap_tokens_for_heads(q, k, v)
        y = ways.slice.swap_heads_for_tokens(packed_attention(q, k, v, lengths, ways.attention))
        return attn.to_out[0](y.flatten(1))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of cross-attention, ahead of forwards.

        Args:
            context: ``[rows, dim]`` embedded text.

        Returns:
            Two of ``[rows, heads, head_dim]``.
        """
        return self._keys_values(context)

    def _keys_values(self, context: Tensor) -> KeysValues:
        """The same within a forward: called by its own name, a sharded block would drop its weights after it."""
        attn: WanAttention = self.attn2
        k = full_width_norm(attn.to_k(context), attn.norm_k.weight, self.norm1.eps)
        return k.unflatten(-1, (attn.heads, -1)), attn.to_v(context).unflatten(-1, (attn.heads, -1))

    def _cross_attention(
        self, y: Tensor, context: Tensor | KeysValues, lengths: Lengths | None, backend: str
    ) -> Tensor:
        attn: WanAttention = self.attn2
        q = full_width_norm(attn.to_q(y), attn.norm_q.weight, self.norm1.eps).unflatten(-1, (attn.heads, -1))
        k, v = self._keys_values(context) if isinstance(context, Tensor) else context
        return attn.to_out[0](packed_attention(q, k, v, lengths, backend).flatten(1))


class PackedWanTransformer3DModel(WanTransformer3DModel):
    """``WanTransformer3DModel`` whose forward takes a :class:`~bernini.renderer.packing.Pack`.

    ``from_pretrained`` reads any Wan or Bernini-R ``transformer`` folder, ``save_pretrained`` writes one that diffusers
    loads. With one sample of one segment of source id 0 it computes what diffusers' model computes.

    Args:
        *args: As ``WanTransformer3DModel``.
        segment_encoding: How tokens are told which segment they belong to: ``sa3d`` rotates them by its source id, as
            the released models do; ``plain`` is Wan's 3D RoPE, blind to ids; ``embedding`` adds a learned vector per id
            to that. Only models other than ``sa3d`` name it in their ``config.json``; diffusers has none of these.
        **kwargs: As ``WanTransformer3DModel``.

    Attributes:
        attention: Attention backend, ``auto`` unless set.
        rope_saves: What the fused rotation of queries and keys keeps for the backward pass.
        recompute: What the blocks keep; ``enable_gradient_checkpointing`` makes ``full`` of ``none``.
        axis: Ranks that compute a forward together, each a slice of the tokens.
    """

    _repeated_blocks = ["PackedBlock"]  # noqa: RUF012
    _no_split_modules = ["PackedBlock"]  # noqa: RUF012
    attention: AttentionBackend = "auto"
    rope_saves: Saves = "inputs"
    recompute: Recompute = "none"
    axis: Axis = Axis()

    @functools.wraps(WanTransformer3DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, segment_encoding: SegmentEncoding = "sa3d", **kwargs: Any) -> None:
        if segment_encoding not in get_args(SegmentEncoding):
            raise ConfigError(
                f"unknown segment encoding {segment_encoding!r}", fix=f"one of {', '.join(get_args(SegmentEncoding))}"
            )
        super().__init__(*args, **kwargs)
        for block in self.blocks:
            block.__class__ = PackedBlock  # same parameters, another forward
        self.segment_encoding = segment_encoding
        if segment_encoding != "sa3d":
            self.register_to_config(segment_encoding=segment_encoding)
        if segment_encoding == "embedding":
            self.segment_embedding = SegmentEmbedding(self.patch_embedding.out_channels)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Keys of a ``config.json`` that reach the constructor."""
        return WanTransformer3DModel._get_init_keys(input_class) | {"segment_encoding"}

    @property
    def patch(self) -> tuple[int, int, int]:
        """Patch size (pt, ph, pw)."""
        pt, ph, pw = self.config["patch_size"]
        return pt, ph, pw

    def rotation(self, pack: Pack) -> Segments:
        """How this rank's tokens of a pack are rotated."""
        table = pack.segments if self.segment_encoding == "sa3d" else without_ids(pack.segments)
        own = self.axis.slice(pack.tokens)
        return prepare_segments(table, own.size, self.config["attention_head_dim"], own.start, checked=True)

    @apply_forward_hook  # so that weights that are offloaded come for it
    def keys_values(self, context: Tensor) -> list[KeysValues]:
        """Keys and values of every block's cross-attention, for :class:`Kept`.

        Args:
            context: ``[rows, text_dim]`` text (and plan).
        """
        embedder: WanTimeTextImageEmbedding = self.condition_embedder
        embedded = embedder.text_embedder(context.to(self.patch_embedding.weight.dtype))
        return [block.keys_values(embedded) for block in cast(Iterable[PackedBlock], self.blocks)]

    def forward(self, pack: Pack, kept: Kept | None = None) -> Tensor:
        """Predict the velocity of every token.

        Args:
            pack: Packed samples.
            kept: What is known of the pack from an earlier forward; its context is not looked at then.

        Returns:
            ``[tokens, pt * ph * pw * C]``, channel fastest, for all tokens; only target rows mean anything.
        """
        weight = self.patch_embedding.weight
        own = self.axis.slice(pack.tokens)
        # The embedding is a convolution whose stride is its kernel, that is, one linear map of each patch.
        x = F.linear(own.cut(pack.patches).to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)
        text = self.axis.shared(pack.context if kept is None else pack.context[:0]).to(weight.dtype)
        temb, modulation, context, _ = self.condition_embedder(pack.timesteps, text)
        modulation = modulation.unflatten(1, (6, -1))
        sample_index = self_lengths = cross_lengths = None
        if len(pack.token_lengths) > 1 or pack.token_seen is not None or pack.context_seen is not None:
            sample_index = own.cut(pack.sample_index, fill=len(pack.token_lengths) - 1)
            tokens, rows, starts = pack.token_lengths, pack.context_lengths, pack.token_starts
            self_lengths = Lengths(tuple((n, n) for n in tokens), starts, starts, pack.token_seen)
            pairs = tuple(zip(tokens, rows, strict=True))
            cross_lengths = Lengths(pairs, starts, pack.context_starts, pack.context_seen)
        if self.segment_encoding == "embedding":
            x = x + own.cut(self.segment_embedding(pack.segments, pack.tokens))
        contexts: Sequence[Tensor | KeysValues] = [context] * len(self.blocks)
        if kept is None:
            segments = self.rotation(pack)
        else:
            segments, contexts, cross_lengths = kept.segments, kept.keys_values, kept.cross_lengths
        cross_lengths, contexts = own.readers(cross_lengths, contexts)

        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        attention = resolve_backend(self.attention, x.device, dtype, self.config["attention_head_dim"])
        recompute = "full" if self.gradient_checkpointing and self.recompute == "none" else self.recompute
        recompute = recompute if torch.is_grad_enabled() else "none"
        ways = Ways(attention, self.rope_saves, recompute, own)
        shared = (modulation, sample_index, segments, self_lengths, cross_lengths, ways)
        call = caller(recompute, x.device)
        _vary(modulation, sample_index, segments.table, *(segments.constants if segments.kernel != "fused" else ()))
        _vary(*(x for lengths in (self_lengths, cross_lengths) if lengths is not None for x in lengths.tensors))
        for block, read in zip(self.blocks, contexts, strict=True):
            _vary(x, *(read if isinstance(read, tuple) else (read,)))
            x = call(block, x, read, *shared)

        shift, scale = (self.scale_shift_table + temb[:, None]).unbind(1)
        shift, scale = spread(shift, sample_index), spread(scale, sample_index)
        return own.whole(self.proj_out(modulated_norm(x, scale, shift, self.norm_out.eps)))

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks, as diffusers does.

        Any number of tokens, rows and samples is one graph. Others are made for: one sample or several; one segment or
        several; gradients or none, of the block's input, too; keys that are not seen.
        """
        dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, GRAPHS)
        for block in self.blocks:  # by place: sharding gives their class another name, by which diffusers looks
            block.compile(*args, **kwargs)

    def to_json_string(self) -> str:
        """The configuration under diffusers' class name, so that diffusers loads every model it can compute."""
        config = json.loads(super().to_json_string())
        if self.segment_encoding == "sa3d":
            config["_class_name"] = WanTransformer3DModel.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
