"""From raw tiles to network input: normalization, crops, augmentation."""

from geoexplora.transforms.crop import EvaluationCrop, TrainCrop, WholeTile, random_box, resize, resize_mask
from geoexplora.transforms.multi_crop import Crops, MultiCrop
from geoexplora.transforms.normalization import METHODS, Normalization
from geoexplora.transforms.photometric import BandAugmentation, Blur, ColourAugmentation, Photometric

__all__ = [
    "METHODS",
    "BandAugmentation",
    "Blur",
    "ColourAugmentation",
    "Crops",
    "EvaluationCrop",
    "MultiCrop",
    "Normalization",
    "Photometric",
    "TrainCrop",
    "WholeTile",
    "random_box",
    "resize",
    "resize_mask",
]
