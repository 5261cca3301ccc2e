"""What watches a run: moving averages, samples, exports and the saved configuration."""

from callbacks.config import SaveConfig
from callbacks.ema import EMA
from callbacks.export import SaveRenderer
from callbacks.samples import PredictionWriter, SampleVideos

__all__ = ["EMA", "PredictionWriter", "SampleVideos", "SaveConfig", "SaveRenderer"]
