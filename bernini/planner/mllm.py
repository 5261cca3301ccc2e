"""Qwen2.5-VL as transformers ships it, driven layer by layer: own mask, own positions, and only the layers it takes.

The planner reads the hidden states behind the last layer but one, without the final norm. The last layer, the norm and
``lm_head`` serve the language loss alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2_5_VLTextModel
from transformers.masking_utils import sdpa_mask

from bernini.errors import ConfigError, DataError
from bernini.ulysses import Axis, Slice

ATTENTION = "bernini"
"""``attn_implementation`` under which the text model takes block masks (FlexAttention) and tables (SDPA) alike."""


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    own: Slice | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    attend = _BACKENDS["flex_attention" if isinstance(attention_mask, BlockMask) else "sdpa"]
    if own is None:
        return attend(module, query, key, value, attention_mask, **options)
    (q,) = own.swap_tokens_for_heads(query[0].transpose(0, 1))
    k, v = own.swap_tokens_for_heads(key[0].transpose(0, 1), value[0].transpose(0, 1))  # fewer heads than queries have
    out, _ = attend(module, *(x.transpose(0, 1)[None] for x in (q, k, v)), attention_mask, **options)
    return own.swap_heads_for_tokens(out[0])[None], None


_BACKENDS = AttentionInterface()
AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for transformers' own forward and `generate`


@dataclass(frozen=True)
class HiddenStates:
    """What a forward of the text model leaves behind.

    Attributes:
        penultimate: ``[B, n, D]`` output of the last layer but one, which the planner reads.
        final: ``[B, n, D]`` output of the last layer, normed: what ``lm_head`` takes. Null unless asked for.
    """

    penultimate: Tensor
    final: Tensor | None = None


class PrefixCache:
    """Keys (after RoPE) and values of tokens that do not see what comes later; stands in for a cache of transformers.

    The first forward that is given the cache fills it. Later ones attend to ``[prefix; their own tokens]`` and leave
    the cache as it is.

    Args:
        layers: ``[B, kv_heads, n, head_dim]`` keys and values of each layer.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.layers = list(layers)

    @classmethod
    def stack(cls, caches: Sequence["PrefixCache"], length: int) -> "PrefixCache":
        """Put caches into one batch, prefixes filled up to ``length`` behind; the mask has to hide the filling."""

        def batch(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([pad(tensor, (0, 0, 0, length - tensor.shape[2])) for tensor in tensors])

        layers = zip(*(cache.layers for cache in caches), strict=True)
        return cls([(batch([k for k, _ in layer]), batch([v for _, v in layer])) for layer in layers])

    def split(self, lengths: Sequence[int]) -> list["PrefixCache"]:
        """Caches of so many tokens each, in the same memory."""
        parts = [(keys.split(lengths, 2), values.split(lengths, 2)) for keys, values in self.layers]
        return [PrefixCache([(keys[n], values[n]) for keys, values in parts]) for n in range(len(lengths))]

    def first(self, rows: int) -> "PrefixCache":
        """The first rows of the batch, in the same memory."""
        return PrefixCache([(keys[:rows], values[:rows]) for keys, values in self.layers])

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Called by each attention layer with its own keys and values; gives those to attend to."""
        if layer == len(self.layers):
            self.layers.append((keys, values))
            return keys, values
        before = self.layers[layer]
        return torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)


def run_text(
    model: Qwen2_5_VLTextModel,
    embeds: Tensor,
    position_ids: Tensor,
    mask: Tensor | BlockMask,
    cache: PrefixCache | None = None,
    final: bool = False,
    axis: Axis = Axis(),  # noqa: B008  it is frozen
) -> HiddenStates:
    """Run the text model, up to the last layer but one unless the final hidden states are asked for.

    Args:
        model: The text model, in any attention implementation that takes the mask: tables work in ``eager``, ``sdpa``
            and `ATTENTION`, block masks in ``flex_attention`` and `ATTENTION`.
        embeds: ``[B, n, D]`` input embeddings.
        position_ids: ``[3, B, n]`` positions in time, height and width.
        mask: Who sees whom: bool ``[n, keys]`` or ``[B, n, keys]``, the same as an `additive_mask`, or a block mask.
            Keys are the n tokens, behind those of a filled cache.
        cache: Keys and values of a prefix, to fill or to use.
        final: Run the last layer and the norm as well.
        axis: Ranks that run it together, each on a slice of the tokens of a batch of one; with them, `ATTENTION` has to
            be the implementation, and there is no cache.

    Raises:
        ConfigError: A block mask under an attention implementation that takes none.
    """
    implementation = model.config._attn_implementation
    if isinstance(mask, Tensor):
        mask = additive_mask(mask, embeds.dtype) if mask.dtype == torch.bool else mask
    elif implementation not in ("flex_attention", ATTENTION):
        raise ConfigError(
            f"attention {implementation!r} takes no block mask",
            why="block masks are FlexAttention's",
            fix=f"load the text model with attn_implementation={ATTENTION!r}, or give the mask as a table",
        )
    options: dict[str, Any] = {}
    if axis.ranks > 1:
        own = options["own"] = axis.slice(embeds.shape[1])
        embeds, position_ids = own.cut(embeds, dim=1), own.cut(position_ids, dim=2)
    rotary = model.rotary_emb(embeds, position_ids)

    def run(layer: nn.Module, hidden: Tensor) -> Tensor:
        return layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, **options)

    *layers, last = model.layers
    hidden = embeds
    for layer in layers:
        hidden = run(layer, hidden)
    ends = [hidden, model.norm(run(last, hidden))] if final else [hidden]
    if axis.ranks > 1:
        ends = [own.whole(x[0])[None] for x in ends]
    return HiddenStates(*ends)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, 1, n, keys]`` to add to attention logits, from a bool mask ``[n, keys]`` or ``[B, n, keys]``."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:])
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def embed_inputs(
    embedding: nn.Embedding,
    ids: Tensor,
    visual: Tensor,
    features: Tensor,
    masked: Tensor | None = None,
    mask_token: Tensor | None = None,
) -> Tensor:
    """Input embeddings: text by its ids, visuals by their ViT features, hidden target tokens by the mask token.

    Args:
        embedding: The text model's embeddings.
        ids: ``[n]`` token ids.
        visual: Bool ``[n]``, true where features belong; a target whose features are not known is left out.
        features: ``[m, D]`` of the m visual tokens, in their order.
        masked: Bool ``[n]``, true where the mask token goes; it may cover features.
        mask_token: ``[D]``.

    Returns:
        ``[n, D]`` in the dtype of the embeddings.

    Raises:
        DataError: Features that differ from the visual tokens in number, or from the model in width.
    """
    embeds = embedding(ids)
    wanted = (int(visual.sum()), embeds.shape[-1])
    if tuple(features.shape) != wanted:
        raise DataError(
            f"ViT features have shape {list(features.shape)}, expected {list(wanted)}",
            why="there is one feature per visual token, as wide as the language model",
            fix="prepare the features with the vision tower and the pixel limits of this planner",
        )
    embeds = embeds.masked_scatter(visual[:, None], features.to(embeds.dtype))
    if masked is None or mask_token is None:
        return embeds
    return torch.where(masked[:, None], mask_token.to(embeds.dtype), embeds)
