"""Plans as pictures."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from bernini.errors import DataError
from bernini.planner.vision import Grid, Visual


def token_patches(visual: Visual) -> Tensor:
    """Pixels that the tokens of a visual cover, in the first frame of their temporal patch.

    Args:
        visual: What `bernini.planner.vision.prepare` made of the pixels.

    Returns:
        ``[tokens, 3, merge * patch, merge * patch]`` uint8, the bytes of the resized frames.

    Raises:
        DataError: Only its features are left.
    """
    if visual.patches is None:
        raise DataError("a visual without patches cannot be shown", fix="give the data pixels, or plan for no pictures")
    (t, h, w), config = visual.grid, visual.config
    merge, patch = config.merge, config.patch
    rows = visual.patches.reshape(t * h * w // merge**2, merge, merge, 3, config.temporal_patch, patch, patch)
    pixels = rows[:, :, :, :, 0].permute(0, 3, 1, 4, 2, 5).reshape(len(rows), 3, merge * patch, merge * patch)
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def lay_out(patches: Tensor, grid: Grid) -> Tensor:
    """Patches of tokens as the frames that they make.

    Args:
        patches: ``[N, 3, p, p]``.
        grid: ``(t, h, w)`` of the tokens.

    Returns:
        ``[3, h * p, t * w * p]``, the frames side by side.
    """
    (t, h, w), edge = grid, patches.shape[-1]
    return patches.view(t, h, w, 3, edge, edge).permute(3, 1, 4, 0, 2, 5).reshape(3, h * edge, t * w * edge)


def plan_picture(
    embeds: Tensor, grid: Grid, gallery_embeds: Tensor, gallery_patches: Tensor, chunk: int = 256
) -> Tensor:
    """Show a plan: in the place of each token the patch of a gallery whose embedding has the largest cosine with it.

    Args:
        embeds: ``[N, D]`` planned embeddings.
        grid: ``(t, h, w)`` of the plan, in tokens.
        gallery_embeds: ``[M, D]`` true embeddings of some targets.
        gallery_patches: ``[M, 3, p, p]`` uint8 what they show, see `token_patches`.
        chunk: Tokens that are compared at a time.

    Returns:
        ``[3, h * p, t * w * p]`` uint8, the frames side by side.

    Raises:
        DataError: The grid has another number of tokens, or the gallery is empty or does not fit.
    """
    t, h, w = grid
    if len(embeds) != t * h * w:
        raise DataError(f"a plan of {len(embeds)} tokens", where=f"grid {grid}", why=f"that has {t * h * w}")
    if not len(gallery_embeds) or len(gallery_embeds) != len(gallery_patches):
        raise DataError(f"a gallery of {len(gallery_embeds)} embeddings and {len(gallery_patches)} patches")
    if embeds.shape[1] != gallery_embeds.shape[1]:
        raise DataError(f"a plan {embeds.shape[1]} wide and a gallery {gallery_embeds.shape[1]} wide")
    gallery = normalize(gallery_embeds.float(), dim=1).T
    with torch.autocast(embeds.device.type, enabled=False):  # the plan's own length does not change what is nearest
        nearest = torch.cat([(rows.float() @ gallery).argmax(1) for rows in embeds.split(chunk)])
    return lay_out(gallery_patches[nearest.to(gallery_patches.device)], grid)


def one_above_other(pictures: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Join pictures ``[3, h, w]`` uint8 of equal width into one ``[3, 1, H, w]``, white between them."""
    rows = [pad(picture, (0, 0, 0, gap), value=255) for picture in pictures[:-1]]
    return torch.cat([*rows, pictures[-1]], dim=1)[:, None]
