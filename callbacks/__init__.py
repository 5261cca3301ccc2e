"""What watches a run: moving averages, samples, plans, exports, speed and the saved configuration."""

from callbacks.benchmark import BenchmarkCallback
from callbacks.config import SaveConfig
from callbacks.ema import EMA
from callbacks.export import SavePlanner, SaveRenderer
from callbacks.plans import PlanPictures
from callbacks.samples import PredictionWriter, SampleVideos
from callbacks.sight import SaveSight
from callbacks.throughput import Throughput
from callbacks.tracking import Wandb

__all__ = [
    "EMA",
    "BenchmarkCallback",
    "PlanPictures",
    "PredictionWriter",
    "SampleVideos",
    "SaveConfig",
    "SavePlanner",
    "SaveRenderer",
    "SaveSight",
    "Throughput",
    "Wandb",
]
