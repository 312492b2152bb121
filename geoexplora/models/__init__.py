"""Models; importing this package registers the group-channel ViTs with timm."""

from geoexplora.models.decoder import MAEDecoder
from geoexplora.models.group_channel_vit import GroupChannelVisionTransformer
from geoexplora.models.masked_autoencoder import MAEOutput, MaskedAutoencoder

__all__ = ["GroupChannelVisionTransformer", "MAEDecoder", "MAEOutput", "MaskedAutoencoder"]
