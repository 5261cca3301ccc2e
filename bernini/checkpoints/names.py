"""Names in a Wan text-to-video transformer: diffusers', and those of the original code, which ComfyUI keeps."""

import re

ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
IN_BLOCK = {
    **{f"attn1.{ours}": f"self_attn.{original}" for ours, original in ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{original}" for ours, original in ATTENTION.items()},
    "norm2": "norm3",  # both stand before the cross-attention; the other norms have no weights
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}


def _underscored(table: dict[str, str]) -> dict[str, str]:
    return {original.replace(".", "_"): ours for ours, original in table.items()}


_OURS_IN_BLOCK, _OURS_OUTSIDE = _underscored(IN_BLOCK), _underscored(OUTSIDE)


def original_name(name: str) -> str | None:
    """The original name of a layer or tensor that diffusers calls ``name``; ``None`` if Wan has none such."""
    block, layer, kind = _parts(name)
    original = (IN_BLOCK if block else OUTSIDE).get(layer)
    return original and block + original + kind


def diffusers_name(name: str) -> str | None:
    """The inverse of :func:`original_name`; the name may have underscores for dots, as kohya's trainers write it."""
    block, layer, kind = _parts(name)
    ours = (_OURS_IN_BLOCK if block else _OURS_OUTSIDE).get(layer.replace(".", "_"))
    return ours and block.replace("_", ".") + ours + kind


def _parts(name: str) -> tuple[str, str, str]:
    """``blocks.0.``, a layer of it, and ``.weight`` or ``.bias``; the first and last may be empty."""
    match = re.fullmatch(r"(blocks[._]\d+[._])?(.+?)(\.weight|\.bias)?", name)
    return (match[1] or "", match[2], match[3] or "") if match else ("", name, "")
