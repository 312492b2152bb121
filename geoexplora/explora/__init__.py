"""ExPLoRA: whole blocks, LoRA on Q and V, norms and embeddings of a frozen vision transformer."""

from geoexplora.explora.adapter import (
    is_adapter,
    load_adapted_encoder,
    load_adapter,
    read_adapter,
    save_adapter,
    trained_names,
)
from geoexplora.explora.apply import apply_explora, apply_explora_to_decoder
from geoexplora.explora.attention import SplitAttention
from geoexplora.explora.config import ExploraConfig, resolve_blocks
from geoexplora.explora.merge import merge_lora, merged_state_dict
from geoexplora.explora.table import PartCount, format_table, parameter_table, table_to_json

__all__ = [
    "ExploraConfig",
    "PartCount",
    "SplitAttention",
    "apply_explora",
    "apply_explora_to_decoder",
    "format_table",
    "is_adapter",
    "load_adapted_encoder",
    "load_adapter",
    "merge_lora",
    "merged_state_dict",
    "parameter_table",
    "read_adapter",
    "resolve_blocks",
    "save_adapter",
    "table_to_json",
    "trained_names",
]
