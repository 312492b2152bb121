"""Lightning tasks on TorchGeo's ``BaseTask``, and what the commands do."""

from geoexplora.tasks.pretrain_task import ExPLoRAPretrain

__all__ = ["ExPLoRAPretrain"]
