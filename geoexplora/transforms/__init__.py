"""From raw tiles to network input: normalization and crops."""

from geoexplora.transforms.crop import EvaluationCrop, TrainCrop, random_box, resize
from geoexplora.transforms.normalization import METHODS, Normalization

__all__ = ["METHODS", "EvaluationCrop", "Normalization", "TrainCrop", "random_box", "resize"]
