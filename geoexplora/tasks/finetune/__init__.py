"""``geoexplora finetune``: tasks for classes, pixels and values on top of an encoder."""
