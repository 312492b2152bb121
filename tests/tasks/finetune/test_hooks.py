"""The fine-tuning tasks under Lightning's trainer: checkpoints, targets that no class stands for, ignored masks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from geoexplora.errors import ConfigError, DataError
from geoexplora.tasks import ExPLoRAClassification, ExPLoRARegression, ExPLoRASegmentation

from .test_task import CLASSES, B, K, S, images_of, settings


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


def test_masks_without_classes_are_refused_after_an_epoch() -> None:
    """Not by a validation before."""
    trainer_of(val_check_interval=1).fit(segmentation(), masks_of(255, 255, 255, 1), masks_of(1))
    trainer = trainer_of(max_epochs=3)
    with pytest.raises(DataError, match="the training masks hold nothing but the ignored value 255"):
        trainer.fit(segmentation(), masks_of(255, 255), masks_of(1))
    assert (trainer.current_epoch, trainer.global_step) == (0, 2)


def test_masks_without_classes_in_the_rest_of_an_epoch(tmp_path: Path) -> None:
    """A run that was resumed there has not seen the epoch."""
    kept = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer_of(enable_checkpointing=True, callbacks=[kept]).fit(segmentation(), masks_of(1, 1, 255, 255))
    resumed = trainer_of()  # a plain loader begins anew
    resumed.fit(segmentation(), masks_of(255, 255, 1, 1), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert resumed.global_step == 4


def test_masks_without_classes_in_one_of_two_processes() -> None:
    trainer_of(strategy="ddp_fork", devices=2).fit(segmentation(), masks_of(255, 255, 255, 1))


def test_masks_without_classes_in_both_processes() -> None:
    with pytest.raises(Exception, match="the training masks hold nothing but the ignored value 255"):
        trainer_of(strategy="ddp_fork", devices=2).fit(segmentation(), masks_of(255, 255, 255, 255))
