"""Models; importing this package makes them known to timm."""

from geoexplora.models import registration as registration
from geoexplora.models.decoder import MAEDecoder
from geoexplora.models.group_channel_vit import GroupChannelVisionTransformer
from geoexplora.models.masked_autoencoder import MAEOutput, MaskedAutoencoder

__all__ = ["GroupChannelVisionTransformer", "MAEDecoder", "MAEOutput", "MaskedAutoencoder"]
