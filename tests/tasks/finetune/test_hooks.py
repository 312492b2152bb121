"""The fine-tuning tasks under Lightning's trainer: checkpoints, targets that no class stands for, ignored masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from torchgeo.datasets import NonGeoDataset

from geoexplora.bands import FMOW_RGB_STATISTICS, RGB
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.datasets.tiles import Tile
from geoexplora.errors import ConfigError, DataError
from geoexplora.tasks import ExPLoRAClassification, ExPLoRARegression, ExPLoRASegmentation
from geoexplora.transforms.normalization import Normalization

from .test_task import CLASSES, NORMALIZATION, B, K, S, images_of, settings


def batches(*targets: Tensor, name: str = "label") -> DataLoader[Any]:
    """A batch for each of the targets; in their order."""
    return DataLoader([{"image": images_of(len(target)), name: target} for target in targets], batch_size=None)  # type: ignore[arg-type]


def trainer_of(**more: Any) -> Trainer:
    plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    return Trainer(accelerator="cpu", **plain | {"devices": 1, "enable_model_summary": False} | more)


@pytest.mark.parametrize("method", ["lora", "adalora"])
@pytest.mark.parametrize("task_class", [ExPLoRAClassification, ExPLoRASegmentation, ExPLoRARegression])
def test_a_checkpoint_is_all_it_takes(task_class: Any, method: Any, tmp_path: Path) -> None:
    masks = task_class is ExPLoRASegmentation
    words: dict[str, Any] = {} if task_class is ExPLoRARegression else {"num_classes": K, "class_weights": [1.0] * K}
    words |= {"head": "linear"} if masks else {}
    task = task_class(method=method, rank=2, **words, **settings(total_steps=2))
    target = CLASSES[:, None, None].expand(B, S, S) if masks else CLASSES
    trainer = trainer_of()
    trainer.fit(task, batches(target, target, name=task.target_key))
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    read = task_class.load_from_checkpoint(tmp_path / "it.ckpt", map_location="cpu")
    assert all(value.equal(task.state_dict()[name]) for name, value in read.state_dict().items())
    with torch.inference_mode():
        assert read.eval().model(images_of()).equal(task.eval().model(images_of()))


@pytest.mark.parametrize("classes", [{"classes": "abcde"}, {"train_dataset": SimpleNamespace(classes="abcde")}])
def test_data_of_more_classes(classes: Any) -> None:
    datamodule = LightningDataModule()
    vars(datamodule).update(classes)
    task = ExPLoRAClassification(num_classes=K, **settings())
    with pytest.raises(ConfigError, match="num_classes is 4, but the data have 5 classes\nSet num_classes to 5"):
        trainer_of().fit(task, datamodule=datamodule)


@pytest.mark.parametrize("wrong", [K, 255, -1])
@pytest.mark.parametrize("stage", ["fit", "sanity", "test"])
@pytest.mark.parametrize("task_class", [ExPLoRAClassification, ExPLoRASegmentation])
def test_targets_out_of_range(task_class: Any, stage: str, wrong: int) -> None:
    task = task_class(num_classes=K, method="linear", ignore_index=100, **settings())
    shape = (2, S, S) if task_class is ExPLoRASegmentation else (2,)
    good, bad = torch.full(shape, K - 1), torch.full(shape, 100)
    bad[1] = wrong
    right, other = (batches(good, target, name=task.target_key) for target in (good, bad))
    with pytest.raises(ConfigError, match=f"a {task.target_key} holds {wrong}, which is none of the 4 classes 0 to 3"):
        if stage == "test":
            trainer_of().test(task, other, verbose=False)
        elif stage == "sanity":
            trainer_of().fit(task, right, other)
        else:
            trainer_of(num_sanity_val_steps=0).fit(task, other, right)


def test_another_number_of_labels() -> None:
    task = ExPLoRAClassification(task="multilabel", num_labels=K, **settings())
    with pytest.raises(ConfigError, match="but num_labels is 4"):
        trainer_of().fit(task, batches(torch.ones(B, K + 1)))


def masks_of(*values: int) -> DataLoader[Any]:
    """A batch of one image for each value, all over its mask."""
    return batches(*(torch.full((1, S, S), value) for value in values), name="mask")


def segmentation() -> ExPLoRASegmentation:
    return ExPLoRASegmentation(num_classes=K, head="linear", method="linear", ignore_index=255, **settings())


def test_masks_without_classes_are_refused_after_a_pass() -> None:
    """Not by a validation before."""
    trainer_of(val_check_interval=1).fit(segmentation(), masks_of(255, 255, 255, 1), masks_of(1))
    trainer = trainer_of(max_epochs=3)
    with pytest.raises(DataError, match="the training masks hold nothing but the ignored value 255"):
        trainer.fit(segmentation(), masks_of(255, 255), masks_of(1))
    assert (trainer.current_epoch, trainer.global_step) == (0, 1)


def test_epochs_that_are_cut_short() -> None:
    """Two batches of three tell nothing of the third; three do, whatever an epoch is."""
    trainer_of(limit_train_batches=2).fit(segmentation(), masks_of(255, 255, 1))
    with pytest.raises(DataError, match="nothing but the ignored value 255"):
        trainer_of(limit_train_batches=2, max_epochs=2).fit(segmentation(), masks_of(255, 255, 255))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("labelled", [True, False])
def test_masks_of_a_pass_that_was_interrupted(devices: int, labelled: bool, tmp_path: Path) -> None:
    """What was met before counts, by the first process or another one."""
    more: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
    before = [255] * 4 * devices
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))  # DistributedSampler's
    before[0 if devices == 1 else int(order[1])] = 1 if labelled else 255  # the first one of the last process
    kept = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    started = trainer_of(enable_checkpointing=True, callbacks=[kept], max_epochs=-1, max_steps=2, **more)
    started.fit(segmentation(), masks_of(*before))
    resumed = trainer_of(**more)

    def go_on() -> None:  # a plain loader begins anew
        last = tmp_path / "step=2.ckpt"
        resumed.fit(segmentation(), masks_of(*[255] * 4 * devices), ckpt_path=last, weights_only=True)

    if labelled:
        go_on()
    else:
        with pytest.raises(Exception, match="the training masks hold nothing but the ignored value 255"):
            go_on()


def test_masks_without_classes_in_one_of_two_processes() -> None:
    trainer_of(strategy="ddp_fork", devices=2).fit(segmentation(), masks_of(255, 255, 255, 1))


def test_masks_without_classes_in_both_processes() -> None:
    with pytest.raises(Exception, match="the training masks hold nothing but the ignored value 255"):
        trainer_of(strategy="ddp_fork", devices=2).fit(segmentation(), masks_of(255, 255, 255, 255))


class Masks(TilesDataModule):
    """Two tiles for training; one value all over the second one's mask."""

    def __init__(self, value: int, names: int, classes: int | None, ignored: int | None) -> None:
        super().__init__(
            NonGeoDataset, RGB, RGB.band_names, FMOW_RGB_STATISTICS, image_size=S, batch_size=1, num_workers=0,
            normalization=Normalization.from_dict(NORMALIZATION), antialias=False, crop_scale=(1.0, 1.0), seed=0,
        )  # fmt: skip
        self.value, self.names = value, names
        self.num_classes, self.ignore_index = classes, ignored

    def has_split(self, split: str) -> bool:
        return split == "train"

    def open_split(self, split: str) -> Any:
        def read(index: int) -> Tile:
            return Tile(np.zeros((3, S, S), np.uint8), np.full((S, S), self.value if index else 0), -1)

        return _Source(tuple("abcdefghij"[: self.names]), read)


@dataclass
class _Source:
    classes: tuple[str, ...]
    read: Callable[[int], Tile]
    target: str = "mask"

    def __len__(self) -> int:
        return 2

    def path(self, index: int) -> str:
        return f"tile_{index}.tif"


@pytest.mark.parametrize(
    ("value", "names", "classes", "ignored"),
    [(7, 10, None, None), (7, 0, 10, None), (7, 0, None, None), (255, K, None, 255)],
)
def test_a_loader_that_checked_against_something_else(
    value: int, names: int, classes: int | None, ignored: int | None
) -> None:
    task = ExPLoRASegmentation(num_classes=K, head="linear", method="linear", **settings())
    with pytest.raises(ConfigError, match=f"a mask holds {value}, which is none of the 4 classes"):
        trainer_of(limit_val_batches=0).fit(task, datamodule=Masks(value, names, classes, ignored))


@pytest.mark.parametrize(("names", "classes"), [(K, None), (0, K), (0, K - 1)])
@pytest.mark.parametrize(("value", "ignored"), [(1, None), (255, 255)])
def test_what_the_loader_checked_is_not_checked_again(
    names: int, classes: int | None, value: int, ignored: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That would wait for the device at each step."""
    checked: list[Tensor] = []
    monkeypatch.setattr(ExPLoRASegmentation, "check_target", lambda self, target: checked.append(target))
    task = ExPLoRASegmentation(num_classes=K, head="linear", method="linear", ignore_index=ignored, **settings())
    trainer_of(limit_val_batches=0).fit(task, datamodule=Masks(value, names, classes, ignored))
    assert not checked
    trainer_of().fit(task, masks_of(1))
    assert checked
