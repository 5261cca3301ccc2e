"""Models whose architecture comes with another package, which is asked for when it is needed: MUSIQ, NIQE and LPIPS."""

from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.metrics.encoders import BATCH, stored_tensors
from bernini.errors import CheckpointError, ConfigError

SQUEEZENET = "squeezenet1_1-b8a52dc0.pth"  # as torchvision names it


class Musiq:
    """MUSIQ of pyiqa, as it was trained on SPAQ.

    Args:
        file: Its weights.
        device: Where it computes.

    Raises:
        ConfigError: pyiqa is not installed.
        CheckpointError: The file does not hold its weights.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self.device = device
        self.model: Any = required("pyiqa.archs.musiq_arch", "MUSIQ", "pyiqa").MUSIQ(pretrained=False)
        stored = {name.removeprefix("module."): value for name, value in stored_tensors(file).items()}
        fill(self.model, stored, file)
        self.model.to(device).eval()

    @torch.no_grad()
    def ratings(self, frames: Tensor) -> Tensor:
        """A rating ``[T]`` of each frame of ``[T, 3, h, w]`` in [0, 1], from 0 to 100."""
        parts = [self.model(part.to(self.device)).float().cpu().flatten() for part in frames.split(BATCH)]
        return torch.cat(parts)


class Niqe:
    """NIQE of pyiqa.

    Args:
        file: Its parameters, as of Matlab.
        device: Where it computes.

    Raises:
        ConfigError: pyiqa is not installed.
        CheckpointError: The file does not hold its parameters.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self.device, kind = device, required("pyiqa.archs.niqe_arch", "NIQE", "pyiqa").NIQE
        try:
            self.model: Any = kind(pretrained_model_path=str(file)).to(device).eval()
        except Exception as error:  # scipy has errors of its own
            raise CheckpointError(
                "the parameters cannot be read",
                where=str(file),
                why=f"{type(error).__name__}: {error}".splitlines()[0],
                fix="give the file as it is published",
            ) from error

    @torch.no_grad()
    def distance(self, frames: Tensor) -> float:
        """Mean of frames ``[T, 3, H, W]`` in [0, 1]; low is natural."""
        return float(torch.stack([self.model(frame[None].to(self.device)).cpu().double() for frame in frames]).mean())


class Lpips:
    """LPIPS over SqueezeNet, as torchmetrics has it.

    Args:
        file: Weights of torchvision's SqueezeNet 1.1.
        device: Where it computes.

    Raises:
        ConfigError: torchvision is not installed.
        CheckpointError: The file does not hold these weights.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        stored = stored_tensors(file)
        fill(required("torchvision.models", "LPIPS", "torchvision").squeezenet1_1(), stored, file)
        before = torch.hub.get_dir()
        with TemporaryDirectory() as folder:  # torchmetrics takes the backbone from the place of downloads alone
            place = Path(folder) / "checkpoints" / SQUEEZENET
            place.parent.mkdir()
            torch.save(stored, place)
            torch.hub.set_dir(folder)
            try:
                self.metric = LearnedPerceptualImagePatchSimilarity(net_type="squeeze").to(device)
            finally:
                torch.hub.set_dir(before)
        self.device = device

    @torch.no_grad()
    def distance(self, output: Tensor, source: Tensor) -> float:
        """How far two images ``[3, H, W]`` in [-1, 1] are apart; 0 if equal."""
        return float(self.metric(*(image[None].to(self.device) for image in (output, source))).item())


def required(module: str, model: str, package: str) -> Any:
    """A module of a package that may not be installed.

    Raises:
        ConfigError: It is not.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{model} needs {package}", where=module, why=str(error), fix=f"pip install {package}"
        ) from error


def fill(model: Any, stored: dict[str, Tensor], file: Path) -> None:
    """Load tensors into a model.

    Raises:
        CheckpointError: They are not its own.
    """
    try:
        model.load_state_dict(stored)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights are not those of {type(model).__name__}",
            where=str(file),
            why=str(error).strip().splitlines()[-1].strip(),
            fix="give the file as it is published",
        ) from error
