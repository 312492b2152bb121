"""DINOv2 pre-training as a TorchGeo task.

Shapes: B batch, C bands, S side of a global crop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from geoexplora.bands import SENSORS
from geoexplora.datamodules.sampling import generator
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.objectives.block_masking import block_masks
from geoexplora.objectives.dinov2 import GLOBAL_CROPS, Centering, DINOv2, HeadSizes
from geoexplora.tasks.optimization import cosine
from geoexplora.tasks.pretrain.task import PretrainTask
from geoexplora.transforms.multi_crop import MultiCrop
from geoexplora.transforms.normalization import Normalization
from geoexplora.transforms.photometric import photometric
from geoexplora.weights.files import read_heads
from geoexplora.weights.source_weights import SourceWeights

log = logging.getLogger(__name__)


def load_size(image_size: int, global_scale: Sequence[float]) -> int:
    """Side of whole tiles at which the smallest global crop needs no enlarging."""
    return math.ceil(image_size / math.sqrt(global_scale[0]))


class ExPLoRADINOv2(PretrainTask):
    """DINOv2 pre-training of a plain or group-channel ViT (ExPLoRA, ICML 2025, arXiv 2406.10973; arXiv 2304.07193).

    Student and teacher both carry what ExPLoRA trains; the rest exists once. The encoder that counts is the teacher's.
    Batches hold ``image`` (B, C, H, H), whole tiles, normalized, and ``size`` (B, 2), height and width that the tiles
    had before they were made square (if missing, they were square); crops are cut on the device.

    Args:
        local_size: side of a local crop in pixels.
        local_crops: number of local crops of an image.
        global_scale: smallest and largest share of a tile's area in a global crop.
        local_scale: the same for a local crop.
        augmentation: see ``geoexplora.transforms.photometric``.
        prototypes: K, of the heads.
        head_layers: linear layers of a head before the prototypes.
        head_hidden: their width.
        head_bottleneck: width before the prototypes.
        separate_heads: whether hidden tokens have a head of their own.
        centering: ``softmax`` with a moving center, or ``sinkhorn``.
        ibot_weight: of the loss of hidden tokens.
        koleo_weight: of KoLeo; 0 leaves it out.
        mask_probability: share of global crops with hidden tokens.
        mask_range: smallest and largest share of hidden tokens in them.
        teacher_momentum: of the moving average at the start; it rises to 1 by a cosine.
        teacher_temperature: after its warm-up.
        teacher_temperature_start: before it.
        teacher_warmup_steps: optimizer steps in which it rises.
        freeze_last_steps: optimizer steps in which the heads' prototypes stay.
        kwargs: as for ``PretrainTask``.

    Raises:
        ConfigError: for settings that do not fit each other.
        WeightsError: if ``init`` cannot be used.
    """

    betas = (0.9, 0.999)
    pool = "cls"

    def __init__(
        self,
        *,
        local_size: int = 98,
        local_crops: int = 8,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        augmentation: str = "auto",
        prototypes: int = 65536,
        head_layers: int = 3,
        head_hidden: int = 2048,
        head_bottleneck: int = 256,
        separate_heads: bool = False,
        centering: Centering = "softmax",
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        mask_probability: float = 0.5,
        mask_range: tuple[float, float] = (0.1, 0.5),
        teacher_momentum: float = 0.992,
        teacher_temperature: float = 0.07,
        teacher_temperature_start: float = 0.04,
        teacher_warmup_steps: int = 0,
        freeze_last_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    @property
    def encoder(self) -> Any:
        """The teacher's encoder."""
        return self.model.teacher.encoder

    @property
    def trained_encoder(self) -> Any:
        """The student's encoder."""
        return self.model.student.encoder

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The student's projection heads and mask token."""
        return {"heads": self.model.student.heads}

    def setup(self, stage: str) -> None:
        """Have a datamodule of this package give whole tiles, where nobody has said so."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, TilesDataModule) and datamodule.whole_tiles is None:
            datamodule.whole_tiles = load_size(self.hparams["image_size"], self.hparams["global_scale"])
            datamodule.setup(stage)
        super().setup(stage)

    def build_objective(self, encoder: Any, decoder: nn.Module | None, source: SourceWeights | None) -> DINOv2:
        """Student and teacher; crops and augmentation."""
        h = self.hparams
        self.multi_crop = MultiCrop(
            global_size=h["image_size"],
            local_size=h["local_size"],
            global_scale=tuple(h["global_scale"]),
            local_scale=tuple(h["local_scale"]),
            global_crops=GLOBAL_CROPS,
            local_crops=h["local_crops"],
            antialias=h["antialias"],
        )
        normalization = Normalization.from_dict(self.spec.normalization)
        self.photometric = photometric(h["augmentation"], SENSORS[self.spec.sensor], normalization)
        sizes = HeadSizes(
            h["prototypes"], h["head_layers"], h["head_hidden"], h["head_bottleneck"], h["separate_heads"]
        )
        model = DINOv2(encoder, sizes, h["centering"], h["ibot_weight"], h["koleo_weight"])
        kept = {} if source is None else read_heads(source)
        if kept and not model.start_heads(kept) and set(kept) != {"mask_token"}:
            log.warning(
                "the source's projection heads have other sizes: they start from random weights. Set --prototypes, "
                "--head-layers, --head-hidden, --head-bottleneck and --separate-heads to take them over."
            )
        return model

    def draw_mask(self, crops: int, *seeds: int) -> Tensor:
        """Draw the hidden tokens of global crops (crops, N), bool, on the CPU; depends on the seeds only."""
        h = self.hparams
        side = h["image_size"] // h["patch_size"]
        draws = generator(h["seed"], *seeds, 2)  # another stream than that of the crops
        random = Random(int(torch.randint(2**62, (1,), generator=draws)))
        return block_masks(crops, (side, side), self.num_groups, h["mask_probability"], tuple(h["mask_range"]), random)

    def temperature(self, step: int) -> float:
        """The teacher's temperature: linear from its start, then constant (DINO, section 3.2)."""
        h = self.hparams
        share = min(1.0, step / h["teacher_warmup_steps"]) if h["teacher_warmup_steps"] else 1.0
        start, end = h["teacher_temperature_start"], h["teacher_temperature"]
        return float(start + (end - start) * share)

    def momentum(self, step: int) -> float:
        """The momentum of the teacher's average, rising to 1 by a cosine (DINO, section 3.1)."""
        return cosine(self.hparams["teacher_momentum"], 1.0, step / self.total_steps)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Crops, one pass of teacher and student, losses; see ``PretrainTask``."""
        seeds, step = self.batch_seeds(), self.trainer.global_step
        batch = self.adapted(batch)
        images = batch["image"]
        sizes = batch["size"].cpu() if "size" in batch else torch.tensor([images.shape[-2:]] * len(images))
        draws = generator(self.hparams["seed"], *seeds)
        crops = self.photometric(self.multi_crop(images, sizes, draws), draws)
        mask = self.draw_mask(len(crops.global_), *seeds)
        temperature = self.temperature(step)
        output = self.model(crops.global_, crops.local, mask, temperature)
        parts = dict(output.parts) | {
            "teacher_temperature": torch.tensor(temperature),
            "teacher_momentum": torch.tensor(self.momentum(step)),
        }
        return {"loss": output.loss, "value": output.loss.detach(), "parts": parts, "features": output.features}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A step of the student, then of teacher and centers after it."""
        step = self.trainer.global_step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.model.update_teacher(self.momentum(step))

    def rate_factor(self, group: str, factor: Any) -> Any:
        """Prototypes stay for the first steps: they start at random and would pull the features after them."""
        frozen = self.hparams["freeze_last_steps"]
        return (lambda step: 0.0 if step < frozen else factor(step)) if group.startswith("prototypes") else factor
