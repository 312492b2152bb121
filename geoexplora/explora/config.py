"""What ExPLoRA trains, as a plain description."""

from __future__ import annotations

from dataclasses import dataclass

from geoexplora.errors import ConfigError
from geoexplora.registry import resolve_blocks

__all__ = ["ExploraConfig", "resolve_blocks"]


@dataclass(frozen=True)
class ExploraConfig:
    """What of a vision transformer ExPLoRA trains (Khanna et al., ICML 2025, arXiv 2406.10973, section 4).

    Attributes:
        whole_blocks: 1-based numbers of the blocks that are trained whole (the paper's U).
        rank: LoRA rank r on the other blocks; 0 leaves them without LoRA.
        alpha: LoRA alpha; the update is scaled by alpha / rank. ``None`` means alpha = rank.
        targets: the projections that carry LoRA. The paper finds the key, output and MLP projections harmful.
        norms: train all normalization layers.
        class_token: train the class token.
        embeddings: train the patch embeddings and the position and channel encodings: needed where bands are new.
        decoder_rank: LoRA rank on the queries and values of a pre-trained MAE decoder.
    """

    whole_blocks: tuple[int, ...] = ()
    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    norms: bool = True
    class_token: bool = True
    embeddings: bool = False
    decoder_rank: int = 8

    def __post_init__(self) -> None:
        if not set(self.targets) <= {"q_proj", "k_proj", "v_proj"}:
            raise ConfigError(f"unknown LoRA targets {self.targets}", "Choose among q_proj, k_proj and v_proj.")
        if len(set(self.targets)) < max(1, len(self.targets)):
            raise ConfigError(f"LoRA targets {self.targets} are none or repeated", "Name each projection once.")
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigError(f"LoRA alpha {self.alpha} is not positive", "Leave it out for alpha = rank.")
        if self.rank < 0 or self.decoder_rank < 0:
            raise ConfigError(f"negative LoRA rank {min(self.rank, self.decoder_rank)}", "Use 0 for no LoRA.")

    @property
    def name(self) -> str:
        """The paper's short name without its first letter, such as ``[1,24]-r32``."""
        return f"[{','.join(map(str, self.whole_blocks))}]-r{self.rank}"
