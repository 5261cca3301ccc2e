"""What a planner's folder says besides weights and shapes: the numbers that it was trained with and no weight tells."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bernini.errors import CheckpointError
from bernini.files import replacing
from bernini.planner.model import FOLDER, PlannerConfig
from bernini.planner.vision import VisionConfig

FILE = "planner.json"


@dataclass(frozen=True)
class PlannerSettings:
    """Numbers of a trained planner; the defaults are the released planner's, whose folder does not tell them.

    Attributes:
        flow_shift: Flow-matching shift of the flow head's sigmas.
        vision: How pixels became patches.
    """

    flow_shift: float = PlannerConfig.flow_shift
    vision: VisionConfig = field(default_factory=VisionConfig)

    def save(self, folder: Path) -> None:
        """Write ``bernini/planner.json``."""
        with replacing(folder / FOLDER / FILE) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def of(cls, folder: Path) -> "PlannerSettings":
        """Those of a planner's folder; the released ones if it has none.

        Raises:
            CheckpointError: The file is damaged, or of another version.
        """
        path = folder / FOLDER / FILE
        if not path.is_file():
            return cls()
        try:
            told = json.loads(path.read_text())
            return cls(vision=VisionConfig.from_json(told.pop("vision")), **told)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                "the planner's settings cannot be read",
                where=str(path),
                why=f"{type(error).__name__}: {error}",
                fix="write the folder again with SavePlanner",
            ) from error
