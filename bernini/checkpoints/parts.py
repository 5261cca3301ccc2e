"""The parts that a model is made of, and where each layout keeps them.

There are two layouts. The released one has planner, both experts and a copy of the text encoder in one set of shards,
``bernini/``, and the configurations beside it. That of diffusers has a folder for each part, as Wan and Bernini-R do;
a planner's lie beside them. The renderers that were released before, one expert each, are a third, with weights alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from bernini.checkpoints.stored import StoredTensor, read_folder
from bernini.errors import CheckpointError

BERNINI = "bernini"
"""The folder of the released shards, and of a planner's weights."""
PLANNER_PREFIXES = ("mllm.", "vit_decoder.", "connector.", "mask_tokens")


@dataclass(frozen=True)
class Place:
    """Where a layout keeps the tensors of a part.

    Attributes:
        folder: Within the model's folder.
        begin: How their names begin there.
        bare: Whether a part's own names are without that.
    """

    folder: str
    begin: tuple[str, ...] = ("",)
    bare: bool = True


@dataclass(frozen=True)
class Part:
    """A part that has weights.

    Attributes:
        name: Its name, and that of its folder in diffusers' layout.
        title: What errors call it.
        stem: How its files of weights begin in diffusers' layout.
        configs: Where its configuration lies in diffusers' layout and in the released one.
        places: Where its tensors may lie.
    """

    name: str
    title: str
    stem: str
    configs: tuple[str, ...]
    places: tuple[Place, ...]

    def find(self, root: Path) -> dict[str, StoredTensor]:
        """Its tensors in a model's folder, by its own names; empty if that has none.

        Raises:
            CheckpointError: Weights are damaged.
        """
        for place in self.places:
            if tensors := read_folder(root / place.folder, place.begin):
                cut = len(place.begin[0]) if place.bare else 0
                return {name[cut:]: tensor for name, tensor in tensors.items()}
        return {}

    def config(self, root: Path) -> Path | None:
        """Its configuration in a model's folder."""
        return first_of(root, self.configs)


def _expert(name: str, level: str, released: str) -> Part:
    alone, prefixes = f"bernini_renderer_{level}", (f"diff_dec.{name}.", f"{name}.")
    return Part(
        name,
        f"{level} expert",
        "diffusion_pytorch_model",
        (f"{name}/config.json", f"{name}_config.json"),
        (
            Place(name),
            Place(BERNINI, (released,)),
            *(Place(alone, (prefix,)) for prefix in (*prefixes, "")),
            *(Place(".", (prefix,)) for prefix in prefixes),
        ),
    )


RELEASED = {
    "transformer": "diff_dec.transformer.",
    "transformer_2": "diff_dec_low.transformer_2.",
    "text_encoder": "t5_text_encoder.",
    "planner": "",
}
"""How the names of each part's tensors begin in the released shards; the planner's own names are those."""
TRANSFORMER = _expert("transformer", "high", RELEASED["transformer"])
TRANSFORMER_2 = _expert("transformer_2", "low", RELEASED["transformer_2"])
TEXT_ENCODER = Part(
    "text_encoder",
    "text encoder",
    "model",
    ("text_encoder/config.json", "t5_text_encoder/config.json"),
    (Place("text_encoder"), Place(BERNINI, (RELEASED["text_encoder"],)), Place("t5_text_encoder")),
)
VAE = Part("vae", "VAE", "diffusion_pytorch_model", ("vae/config.json",), (Place("vae"),))
PLANNER = Part("planner", "planner", "model", ("mllm/config.json",), (Place(BERNINI, PLANNER_PREFIXES, bare=False),))
EXPERTS = {"transformer": TRANSFORMER, "transformer_2": TRANSFORMER_2}
TOKENIZER = ("tokenizer", "t5_tokenizer")


def first_of(root: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files and folders that a model's folder has."""
    return next((root / name for name in names if (root / name).exists()), None)


def read_json(path: Path) -> dict:
    """A JSON file's object.

    Raises:
        CheckpointError: It is none.
    """
    try:
        told = json.loads(path.read_text())
        if not isinstance(told, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise CheckpointError("a configuration cannot be read", where=str(path), why=str(error)) from error
    return told


def expert_boundary(*roots: Path) -> float:
    """Sigma at which the low-noise expert takes over: what the first folder says that is not silent, else 0.875."""
    for root in roots:
        for name, key in (("model_index.json", "boundary_ratio"), ("config.json", "switch_dit_boundary")):
            if (root / name).is_file() and (told := read_json(root / name).get(key)):
                return told
    return 0.875
