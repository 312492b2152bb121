"""ExPLoRA: whole blocks, LoRA on Q and V, norms and embeddings of a frozen vision transformer; fine-tuning after it."""

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
from geoexplora.explora.config import ExploraConfig, FinetuneConfig, resolve_blocks
from geoexplora.explora.finetuning import FineTuning, apply_finetuning
from geoexplora.explora.merge import merge_lora, merged_state_dict
from geoexplora.explora.table import PartCount, format_table, parameter_table, table_to_json

__all__ = [
    "ExploraConfig",
    "FineTuning",
    "FinetuneConfig",
    "PartCount",
    "SplitAttention",
    "apply_explora",
    "apply_explora_to_decoder",
    "apply_finetuning",
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
