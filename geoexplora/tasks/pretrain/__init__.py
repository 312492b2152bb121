"""``geoexplora pretrain``: masked autoencoders and DINOv2 as TorchGeo tasks."""
