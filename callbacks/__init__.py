"""What watches a run: moving averages, samples, exports and the saved configuration."""

from callbacks.benchmark import BenchmarkCallback
from callbacks.config import SaveConfig
from callbacks.ema import EMA
from callbacks.export import SavePlanner, SaveRenderer
from callbacks.samples import PredictionWriter, SampleVideos
from callbacks.tracking import Wandb

__all__ = [
    "EMA",
    "BenchmarkCallback",
    "PredictionWriter",
    "SampleVideos",
    "SaveConfig",
    "SavePlanner",
    "SaveRenderer",
    "Wandb",
]
