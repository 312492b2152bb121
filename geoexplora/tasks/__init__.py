"""Lightning tasks on TorchGeo's ``BaseTask``, and what the commands do."""

from geoexplora.tasks.classification_task import ExPLoRAClassification, ExPLoRARegression
from geoexplora.tasks.dinov2_task import ExPLoRADINOv2
from geoexplora.tasks.encoder_export import EncoderExport
from geoexplora.tasks.mae_task import ExPLoRAPretrain
from geoexplora.tasks.segmentation_task import ExPLoRASegmentation
from geoexplora.tasks.torchgeo_mae import ExPLoRAMAE

__all__ = [
    "EncoderExport",
    "ExPLoRAClassification",
    "ExPLoRADINOv2",
    "ExPLoRAMAE",
    "ExPLoRAPretrain",
    "ExPLoRARegression",
    "ExPLoRASegmentation",
]
