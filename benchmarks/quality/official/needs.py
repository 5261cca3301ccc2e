"""What a score needs that no benchmark ships: weights, and models that judge."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Weights:
    """Weights of a model that measures.

    Attributes:
        name: Repository on the hub, or the file's name where ``origin`` is given.
        revision: Branch, tag or commit on the hub.
        origin: Where the file is fetched; empty for the hub.
        processor: Whether of a repository its processor and tokenizer are enough.
    """

    name: str
    revision: str = "main"
    origin: str = ""
    processor: bool = False

    @property
    def repository(self) -> str:
        """Repository on the hub; empty if the file lies elsewhere."""
        place = self.origin.removeprefix("hub, ")
        return "" if place.count("/") > 1 or (self.origin and place == self.origin) else place or self.name

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


@dataclass(frozen=True)
class Places:
    """Where weights are looked for, in this order; nothing is fetched.

    Attributes:
        named: File or folder of weights by their name.
        folders: Folders that may hold a file or a folder of a name, with or without the owner's. The hub's cache is
            looked through in any case.
    """

    named: Mapping[str, Path] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()

    def find(self, weights: Weights) -> Path | None:
        """File or folder of weights; none if they do not lie on this machine."""
        if weights.name in self.named:
            return self.named[weights.name]
        places = (folder / name for folder in self.folders for name in (weights.name, Path(weights.name).name))
        found = next((place for place in places if place.exists()), None)
        return found or (_in_hub_cache(weights) if weights.repository else None)

    def has(self, need: Need) -> bool:
        """Whether something is there; a judge never is."""
        return isinstance(need, Weights) and self.find(need) is not None


def is_cached(need: Need, folder: Path | None = None) -> bool:
    """Whether weights lie on this machine: in a folder as of `Places`, or in the hub's cache.

    Args:
        need: What is looked for; a judge is never found.
        folder: Folder of weights.
    """
    return Places(folders=() if folder is None else (folder,)).has(need)


def _in_hub_cache(weights: Weights) -> Path | None:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    repository = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=weights.repository, repo_type="model")
    reference = repository / "refs" / weights.revision
    commit = reference.read_text().strip() if reference.is_file() else weights.revision
    snapshot = repository / "snapshots" / commit
    if weights.origin:
        return snapshot / weights.name if (snapshot / weights.name).is_file() else None
    # Other programs may have fetched no more than a tokenizer.
    needed = ["preprocessor_config.json"] if weights.processor else ["*.safetensors", "*.bin", "*.pt", "*.pth"]
    return snapshot if any(next(snapshot.rglob(pattern), None) for pattern in needed) else None


# Weights that several benchmarks measure with.
CLIP_B32 = Weights("openai/clip-vit-base-patch32")
CLIP_L14 = Weights("openai/clip-vit-large-patch14")
DINO_B16 = Weights("facebook/dino-vitb16")
DINO_B8 = Weights("facebook/dino-vitb8")
DINOV2_B = Weights("facebook/dinov2-base")
PICKSCORE = Weights("yuvalkirstain/PickScore_v1")
CLIP_H14 = Weights("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", processor=True)
LAION_LINEAR = Weights("sa_0_4_vit_l_14_linear.pth", origin="github.com/LAION-AI/aesthetic-predictor")
MUSIQ_SPAQ = Weights("musiq_spaq_ckpt-358bb6af.pth", origin="github.com/chaofengc/IQA-PyTorch")
AMT_S = Weights("amt-s.pth", origin="hub, lalala125/AMT")
AMT_G = Weights("amt-g.pth", origin="hub, lalala125/AMT")
RAFT = Weights("raft-things.pth", origin="github.com/princeton-vl/RAFT")
VICLIP = Weights("ViClip-InternVid-10M-FLT.pth", origin="hub, OpenGVLab/VBench_Used_Models")
COTRACKER2 = Weights("cotracker2.pth", origin="torch hub, facebookresearch/co-tracker")
COTRACKER3 = Weights("scaled_offline.pth", origin="hub, facebook/cotracker3")
