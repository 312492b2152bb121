"""What ExPLoRA and fine-tuning train, as plain descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from geoexplora.errors import ConfigError
from geoexplora.registry import resolve_blocks

__all__ = ["ExploraConfig", "FinetuneConfig", "Method", "resolve_blocks"]

Method = Literal["linear", "lora", "adalora", "dora", "full"]


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
        _check_lora(self.targets, self.alpha)
        if self.rank < 0 or self.decoder_rank < 0:
            raise ConfigError(f"negative LoRA rank {min(self.rank, self.decoder_rank)}", "Use 0 for no LoRA.")

    @property
    def name(self) -> str:
        """The paper's short name without its first letter, such as ``[1,24]-r32``."""
        return f"[{','.join(map(str, self.whole_blocks))}]-r{self.rank}"


@dataclass(frozen=True)
class FinetuneConfig:
    """What of a vision transformer is fine-tuned for a task, on top of merged weights: W_S + Delta_T + Delta_task.

    Attributes:
        method: ``linear`` trains nothing of the encoder, ``full`` all of it, ``lora`` (Hu et al., arXiv 2106.09685),
            ``dora`` (Liu et al., arXiv 2402.09353) and ``adalora`` (Zhang et al., arXiv 2303.10512) adapters on the
            targets of all blocks and nothing else.
        rank: rank r of the adapters; of AdaLoRA's their average in the end.
        alpha: the update is scaled by alpha / rank. ``None`` means alpha = rank.
        targets: the projections that carry adapters.
        total_steps: number of optimizer steps of the run, which AdaLoRA's budget follows.
    """

    method: Method
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(f"unknown method {self.method!r}", f"Choose among {', '.join(get_args(Method))}.")
        _check_lora(self.targets, self.alpha)
        if self.rank < 1:
            raise ConfigError(f"LoRA rank {self.rank} is not positive", "Use method linear to train no adapters.")
        if self.method == "adalora" and (self.total_steps is None or self.total_steps < 1):
            raise ConfigError(
                f"AdaLoRA plans its ranks over the run, but total_steps is {self.total_steps}",
                "Give the number of optimizer steps.",
            )

    @property
    def has_adapters(self) -> bool:
        """Whether the method adds adapters to frozen weights."""
        return self.method not in {"linear", "full"}

    @property
    def name(self) -> str:
        """A short name, such as ``lora-r8``, ``full``."""
        return f"{self.method}-r{self.rank}" if self.has_adapters else self.method


def _check_lora(targets: tuple[str, ...], alpha: float | None) -> None:
    if not set(targets) <= {"q_proj", "k_proj", "v_proj"}:
        raise ConfigError(f"unknown LoRA targets {targets}", "Choose among q_proj, k_proj and v_proj.")
    if len(set(targets)) < max(1, len(targets)):
        raise ConfigError(f"LoRA targets {targets} are none or repeated", "Name each projection once.")
    if alpha is not None and alpha <= 0:
        raise ConfigError(f"LoRA alpha {alpha} is not positive", "Leave it out for alpha = rank.")
