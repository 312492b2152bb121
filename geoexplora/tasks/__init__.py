"""Lightning tasks on TorchGeo's ``BaseTask``, and what the commands do."""

from geoexplora.tasks.dinov2_task import ExPLoRADINOv2
from geoexplora.tasks.mae_task import ExPLoRAPretrain

__all__ = ["ExPLoRADINOv2", "ExPLoRAPretrain"]
