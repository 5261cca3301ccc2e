"""Fixtures that several test files share: the goldens, and models small enough for a CPU."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import hypothesis
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bernini.renderer.experts import Architecture
from bernini.renderer.transformer import PackedWanTransformer3DModel

# No test is timed: another job on the machine would make it fail.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def empty_hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No weights of this machine take part: a benchmark measures with those that lie in the hub's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "no hub cache"))
        yield


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder with the released implementation's inputs and outputs; ``BERNINI_GOLDENS`` points elsewhere."""
    return Path(os.environ.get("BERNINI_GOLDENS", Path(__file__).parent / "goldens"))


@pytest.fixture(scope="session")
def golden_model(goldens: Path) -> Callable[[str], PackedWanTransformer3DModel]:
    """Builds the ``high`` or ``low`` golden expert in fp32."""

    def build(expert: str) -> PackedWanTransformer3DModel:
        model = PackedWanTransformer3DModel.from_config(json.loads((goldens / "transformer_config.json").read_text()))
        model.load_state_dict(load_file(goldens / f"transformer_{expert}.safetensors"))
        return model.float()

    return build


@pytest.fixture(scope="session")
def tiny_architecture() -> Architecture:
    """A Wan transformer of some 20,000 parameters."""
    return Architecture(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=48, text_dim=12, freq_dim=16, in_channels=4
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_architecture: Architecture) -> Callable[..., PackedWanTransformer3DModel]:
    """Builds the tiny transformer with weights drawn from a seed."""

    def build(seed: int = 0) -> PackedWanTransformer3DModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = tiny_architecture.build()
            with torch.no_grad():  # biases and norms start at constants, under which a swap of two would not show
                for p in model.parameters():
                    p.add_(0.1 * torch.randn_like(p))
        return model

    return build


@pytest.fixture(scope="session")
def randn() -> Callable[..., Callable[..., Tensor]]:
    """``randn(seed)`` is a ``torch.randn`` with a generator of its own."""

    def source(seed: int = 0) -> Callable[..., Tensor]:
        return partial(torch.randn, generator=torch.Generator().manual_seed(seed))

    return source


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Relative L2 error of the first tensor against the second."""

    def error(a: Tensor, b: Tensor) -> float:
        assert a.shape == b.shape
        return ((a - b).norm() / b.norm()).item()

    return error


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan folder."""
    from factories import make_wan_folder

    return make_wan_folder(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight tiny samples of two tasks."""
    from factories import make_shards

    return make_shards(tmp_path_factory.mktemp("shards"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of the long tests is run."""
    parser.addoption("--reads", type=int, default=400, help="reads from a faulty server; 10000 is the full count")
    parser.addoption("--saves", action="store_true", help="a run is resumed after each of its 60 steps")
    parser.addoption("--start-methods", action="store_true", help="each launcher, and every way to start workers")
    parser.addoption("--kills", type=int, default=2, help="times that preparing is killed; 10 is the full count")
