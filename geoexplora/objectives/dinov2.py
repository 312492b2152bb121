"""DINOv2's objective: a student learns what its averaged teacher says of other crops and of hidden tokens.

Shapes: B images, T global and V - T local crops of each (in this order: all first crops, all second ones, ...), N patch
tokens of a global crop (G * L with G channel groups), R hidden ones in the batch, D width, K prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from geoexplora.models.encoding import embed, transform
from geoexplora.models.projection_head import ProjectionHead
from geoexplora.objectives.distillation import (
    centered_targets,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_targets,
    sum_of_rows,
    target_health,
    token_weights,
    update_center,
)
from geoexplora.objectives.twin import averaged_twin, update_twin

Centering = Literal["softmax", "sinkhorn"]

GLOBAL_CROPS = 2
"""T, as in all of DINO's descendants."""


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of the projection heads; the defaults are DINOv2's.

    Attributes:
        prototypes: K.
        layers: linear layers before the prototypes.
        hidden: their width.
        bottleneck: width before the prototypes.
        separate: whether hidden tokens have a head of their own, or share that of the class tokens.
    """

    prototypes: int = 65536
    layers: int = 3
    hidden: int = 2048
    bottleneck: int = 256
    separate: bool = False

    def build(self, width: int) -> ProjectionHead:
        """A head with new weights for tokens of that width."""
        return ProjectionHead(width, self.prototypes, self.layers, self.hidden, self.bottleneck)


class DINOv2Output(NamedTuple):
    """What a batch says.

    Attributes:
        loss: the weighted sum, scalar.
        parts: detached scalars by name: ``dino_loss``, ``ibot_loss``, ``koleo_loss``, ``teacher_entropy``,
            ``teacher_mean_entropy`` (see ``target_health``), and ``teacher_student_kl``, the divergence between the
            teacher's distributions and the student's for other crops.
        features: (T * B, D), the teacher's class tokens, detached.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    features: Tensor


class Heads(nn.Module):
    """What stands beside the encoder in student and teacher: projection heads and the mask token.

    Args:
        width: D.
        sizes: of the heads.
    """

    def __init__(self, width: int, sizes: HeadSizes) -> None:
        super().__init__()
        self.dino = sizes.build(width)
        self.ibot = sizes.build(width) if sizes.separate else self.dino
        self.mask_token = nn.Parameter(torch.zeros(1, width))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; those of a head that serves for both are named once, as the class tokens'."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if self.ibot is not self.dino or not name.startswith("ibot.")
        }

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> bool:
        """Start from what another training kept: a mask token, and heads if they are of the same sizes.

        Args:
            weights: of the names of ``tensors``; a mask token alone will do.

        Returns:
            Whether the heads were taken.
        """
        own = self.tensors()
        if "mask_token" in weights:
            own["mask_token"].copy_(weights["mask_token"].reshape(1, -1))
        shapes, others = ({n: t.shape for n, t in these.items() if n != "mask_token"} for these in (own, weights))
        if shapes != others:
            return False
        for name in shapes:
            own[name].copy_(weights[name])
        return True

    def forward(self, class_tokens: Tensor, patch_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of class tokens and of hidden tokens, in one pass where they share a head."""
        if self.ibot is not self.dino:
            return self.dino(class_tokens), self.ibot(patch_tokens)
        scores = self.dino(torch.cat([class_tokens, patch_tokens]))
        return scores[: len(class_tokens)], scores[len(class_tokens) :]


class Branch(nn.Module):
    """Student or teacher.

    Args:
        encoder: a timm-style ViT with a class token, built with ``dynamic_img_size``.
        sizes: of the heads.
    """

    def __init__(self, encoder: Any, sizes: HeadSizes) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = Heads(encoder.embed_dim, sizes)


class DINOv2(nn.Module):
    """Student and averaged teacher (Oquab et al. 2023, arXiv 2304.07193, section 4).

    The teacher sees whole global crops; the student global crops with hidden tokens, and local crops. Frozen parameters
    exist once for both.

    Args:
        encoder: the student's ViT, with what is frozen and what is trained settled.
        sizes: of the heads, which start from new weights.
        centering: how the teacher's distributions are kept from collapsing.
        ibot_weight: of the loss of hidden tokens.
        koleo_weight: of KoLeo; 0 leaves it out.

    Raises:
        ValueError: if the encoder has no class token.
    """

    def __init__(
        self,
        encoder: Any,
        sizes: HeadSizes,
        centering: Centering = "softmax",
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
    ) -> None:
        super().__init__()
        if not encoder.has_class_token:
            raise ValueError("needs an encoder with a class token")
        self.centering = centering
        self.ibot_weight = ibot_weight
        self.koleo_weight = koleo_weight
        self.student = Branch(encoder, sizes)
        self.teacher = averaged_twin(self.student)
        self.register_buffer("dino_center", torch.zeros(sizes.prototypes))
        self.register_buffer("ibot_center", torch.zeros(sizes.prototypes))
        self._seen: list[Any] = [
            0.0,
            0.0,
        ]  # no buffers: distributed training would overwrite them by the first process's

    def train(self, mode: bool = True) -> DINOv2:
        """Switch the student; the teacher always evaluates, without stochastic depth."""
        super().train(mode)
        self.teacher.eval()
        return self

    def start_heads(self, weights: Mapping[str, Tensor]) -> bool:
        """Start student and teacher from what another training kept; see ``Heads.take``."""
        taken = self.student.heads.take(weights)
        update_twin(self.teacher, self.student, momentum=0.0)
        return taken

    def update_teacher(self, momentum: float) -> None:
        """Average the student into the teacher, and move the centers, after an optimizer step."""
        update_twin(self.teacher, self.student, momentum)
        self.update_centers()

    def update_centers(self) -> None:
        """Move the centers to the teacher's scores of all batches since the last time."""
        centers: list[Any] = [self.dino_center, self.ibot_center]
        for center, seen in zip(centers, self._seen, strict=True):
            if isinstance(seen, Tensor):
                update_center(center, seen)
        self._seen = [0.0, 0.0]

    def forward(self, global_crops: Tensor, local_crops: Tensor, mask: Tensor, temperature: float) -> DINOv2Output:
        """Losses of a batch.

        Args:
            global_crops: (T * B, C, S, S).
            local_crops: ((V - T) * B, C, s, s); may be empty.
            mask: (T * B, N), bool, on the CPU; True where the student does not see a token.
            temperature: of the teacher.
        """
        hidden = mask.flatten().nonzero().flatten().to(global_crops.device, non_blocking=True)
        weight = token_weights(mask).to(global_crops.device, non_blocking=True)
        dino_targets, ibot_targets, features = self._targets(global_crops, hidden, temperature)
        whole = self._encode(global_crops, local_crops, mask.to(global_crops.device, non_blocking=True))
        class_tokens = torch.cat([tokens[:, 0] for tokens in whole])
        class_scores, patch_scores = self.student.heads(class_tokens, self._patches(whole[0], hidden, len(mask)))

        targets = dino_targets.unflatten(0, (GLOBAL_CROPS, -1))
        images = targets.shape[1]
        dino = dino_loss(class_scores.unflatten(0, (-1, images)), targets)
        ibot = ibot_loss(patch_scores, ibot_targets, weight, len(mask))
        parts = {"dino_loss": dino, "ibot_loss": ibot}
        loss = dino + self.ibot_weight * ibot
        if self.koleo_weight:
            crops = class_tokens[: GLOBAL_CROPS * images].unflatten(0, (GLOBAL_CROPS, images))
            parts["koleo_loss"] = torch.stack([koleo_loss(crop) for crop in crops]).sum()
            loss = loss + self.koleo_weight * parts["koleo_loss"]
        health = target_health(dino_targets)
        parts |= health | {"teacher_student_kl": dino - health["teacher_entropy"]}
        return DINOv2Output(loss, {name: part.detach() for name, part in parts.items()}, features)

    @torch.no_grad()
    def _targets(self, crops: Tensor, hidden: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        encoder: Any = self.teacher.encoder
        tokens = transform(encoder, embed(encoder, crops))
        class_tokens = tokens[:, 0]
        scores = self.teacher.heads(class_tokens, self._patches(tokens, hidden, len(crops)))
        if self.centering == "sinkhorn":
            dino, ibot = (sinkhorn_targets(part, temperature) for part in scores)
        else:
            centers: list[Any] = [self.dino_center, self.ibot_center]
            dino, ibot = (
                centered_targets(part, center, temperature) for part, center in zip(scores, centers, strict=True)
            )
            self._seen = [seen + sum_of_rows(part) for seen, part in zip(self._seen, scores, strict=True)]
        return dino, ibot, class_tokens.float()

    def _encode(self, global_crops: Tensor, local_crops: Tensor, mask: Tensor) -> list[Tensor]:
        """Tokens of global and local crops, in one pass if they are of one size."""
        encoder: Any = self.student.encoder
        parts = [embed(encoder, global_crops, mask, self.student.heads.mask_token)]
        if len(local_crops):
            parts.append(embed(encoder, local_crops))
        if len(parts) == 2 and parts[0].shape[1:] == parts[1].shape[1:]:
            return list(transform(encoder, torch.cat(parts)).split([len(part) for part in parts]))
        return [transform(encoder, part) for part in parts]

    def _patches(self, tokens: Tensor, hidden: Tensor, crops: int) -> Tensor:
        """The hidden tokens (R, D) of the global crops."""
        encoder: Any = self.student.encoder
        return tokens[:crops, encoder.num_prefix_tokens :].flatten(0, 1).index_select(0, hidden)
