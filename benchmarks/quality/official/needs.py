"""What a score needs that no benchmark ships: weights, and models that judge."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Weights:
    """Weights of a model that measures.

    Attributes:
        name: Repository on the hub, or the file's name where ``origin`` is given.
        revision: Branch, tag or commit on the hub.
        origin: Where the file is fetched; empty for the hub.
    """

    name: str
    revision: str = "main"
    origin: str = ""

    def __str__(self) -> str:
        """Name, revision and where to fetch it."""
        return f"weights {self.name} ({self.origin or f'hub, revision {self.revision}'})"


@dataclass(frozen=True)
class Judge:
    """A multimodal model that answers questions about outputs.

    Attributes:
        model: Its name, dated where the provider dates its models.
        answers: Questions about one output, repeats counted.
    """

    model: str
    answers: int = 1

    def __str__(self) -> str:
        """Name and the number of questions."""
        return f"judge {self.model} ({self.answers} answer{'s' * (self.answers > 1)} an item)"


Need = Weights | Judge
Needs = Mapping[str, tuple[Need, ...]]
"""What each score needs, by its name; a score that is not listed needs nothing but pixels."""


def inventory(needs: Needs, present: Callable[[Need], bool]) -> Iterator[str]:
    """A line for each thing that is wanted, ``there`` or ``missing``, with the scores that want it.

    Args:
        needs: What each score needs.
        present: Whether something is there, e.g. `is_cached`.
    """
    wanted: dict[Need, list[str]] = {}
    for metric, own in needs.items():
        for need in own:
            wanted.setdefault(need, []).append(metric)
    for need, metrics in wanted.items():
        yield f"{'there' if present(need) else 'missing'}: {need}, for {', '.join(metrics)}"


def is_cached(need: Need, folder: Path | None = None) -> bool:
    """Whether weights lie on this machine; nothing is fetched. A judge is never found here.

    Args:
        need: What is looked for.
        folder: Folder of weights; it may hold a file or a folder of that name, with or without the owner's. The hub's
            cache is looked through in any case.
    """
    if isinstance(need, Judge):
        return False
    places = [folder / need.name, folder / Path(need.name).name] if folder is not None else []
    return any(place.exists() for place in places) or (not need.origin and _in_hub_cache(need))


def _in_hub_cache(weights: Weights) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    repository = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=weights.name, repo_type="model")
    reference = repository / "refs" / weights.revision
    commit = reference.read_text().strip() if reference.is_file() else weights.revision
    return (repository / "snapshots" / commit).is_dir()


# Weights that several benchmarks measure with.
CLIP_B32 = Weights("openai/clip-vit-base-patch32")
CLIP_L14 = Weights("openai/clip-vit-large-patch14")
DINO_B16 = Weights("facebook/dino-vitb16")
DINO_B8 = Weights("facebook/dino-vitb8")
DINOV2_B = Weights("facebook/dinov2-base")
LAION_LINEAR = Weights("sa_0_4_vit_l_14_linear.pth", origin="github.com/LAION-AI/aesthetic-predictor")
MUSIQ_SPAQ = Weights("musiq_spaq_ckpt-358bb6af.pth", origin="github.com/chaofengc/IQA-PyTorch")
AMT_S = Weights("amt-s.pth", origin="hub, lalala125/AMT")
AMT_G = Weights("amt-g.pth", origin="hub, lalala125/AMT")
RAFT = Weights("raft-things.pth", origin="github.com/princeton-vl/RAFT")
VICLIP = Weights("ViClip-InternVid-10M-FLT.pth", origin="hub, OpenGVLab/VBench_Used_Models")
COTRACKER2 = Weights("cotracker2.pth", origin="torch hub, facebookresearch/co-tracker")
COTRACKER3 = Weights("scaled_offline.pth", origin="hub, facebook/cotracker3")
