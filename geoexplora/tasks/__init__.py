"""Lightning tasks on TorchGeo's ``BaseTask``, and what the commands do."""

from geoexplora.tasks.encoder_export import EncoderExport
from geoexplora.tasks.finetune.classification import ExPLoRAClassification, ExPLoRARegression
from geoexplora.tasks.finetune.segmentation import ExPLoRASegmentation
from geoexplora.tasks.pretrain.dinov2 import ExPLoRADINOv2
from geoexplora.tasks.pretrain.mae import ExPLoRAPretrain
from geoexplora.tasks.pretrain.torchgeo_mae import ExPLoRAMAE

__all__ = [
    "EncoderExport",
    "ExPLoRAClassification",
    "ExPLoRADINOv2",
    "ExPLoRAMAE",
    "ExPLoRAPretrain",
    "ExPLoRARegression",
    "ExPLoRASegmentation",
]
