"""The fine-tuning tasks: losses and metrics of TorchGeo, what is trained and counted, and edge cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torchgeo.tasks import Classification, Regression, SemanticSegmentation

from geoexplora.errors import ConfigError, WeightsError
from geoexplora.tasks import ExPLoRAClassification, ExPLoRARegression, ExPLoRASegmentation
from geoexplora.weights.load import build_encoder
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import save_encoder

B, K, S = 5, 4, 16
RGB = ("R", "G", "B")
NORMALIZATION = {"method": "standardize", "bands": list(RGB), "mean": [0.0] * 3, "std": [1.0] * 3}
METRICS = ("Accuracy", "Precision", "Recall", "F1Score", "JaccardIndex")


def spec_of(model: str = "vit_pico", groups: Any = None, image_size: int = S) -> EncoderSpec:
    return EncoderSpec.of(
        model, image_size=image_size, patch_size=8, sensor="rgb", bands=RGB, normalization=NORMALIZATION, groups=groups
    )


def settings(**more: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    spec = spec_of()
    return {"encoder": build_encoder(spec), "spec": spec.to_metadata(), "total_steps": 10} | more


def images_of(count: int = B) -> Tensor:
    return torch.randn(count, 3, S, S, generator=torch.Generator().manual_seed(3))


def scores_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


CLASSES = torch.tensor([0, 3, 1, 1, 2])


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 3.0, 0.5]])
@pytest.mark.parametrize("loss", ["ce", "focal", "jaccard"])
def test_classes_as_torchgeo(loss: Any, weights: Any) -> None:
    ours = ExPLoRAClassification(num_classes=K, loss=loss, class_weights=weights, **settings())
    theirs = Classification(model="resnet18", num_classes=K, loss=loss, class_weights=None if weights is None else
                            torch.tensor(weights))  # fmt: skip
    output = scores_of(B, K)
    torch.testing.assert_close(ours.compare(output, CLASSES), theirs.criterion(output, CLASSES))
    torch.testing.assert_close(ours.predicted(output), output.softmax(1))
    ours.val_metrics(ours.predicted(output), CLASSES)
    theirs.val_metrics(output, CLASSES)
    one, other = ours.val_metrics.compute(), theirs.val_metrics.compute()
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    assert ours.new_metrics().compute is not None
    assert {f"val_{name}" for name in ours.new_metrics()} >= {f"val_Overall{name}" for name in METRICS}


def test_labels_as_torchgeo() -> None:
    ours = ExPLoRAClassification(task="multilabel", num_labels=K, **settings())
    theirs = Classification(model="resnet18", task="multilabel", num_labels=K, loss="bce")
    output, target = scores_of(B, K), (scores_of(B, K).flip(0) > 0).long()
    torch.testing.assert_close(ours.compare(output, target), theirs.criterion(output, target.float()))
    ours.val_metrics(ours.predicted(output), target)
    theirs.val_metrics(output, target)
    one, other = ours.val_metrics.compute(), theirs.val_metrics.compute()
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name]) for name in one)
    assert ours.monitor == "val_OverallF1Score"


@pytest.mark.parametrize("ignored", [None, 255, 0])
@pytest.mark.parametrize("loss", ["ce", "focal", "dice"])
def test_masks_as_torchgeo(loss: Any, ignored: int | None) -> None:
    ours = ExPLoRASegmentation(num_classes=K, head="linear", loss=loss, ignore_index=ignored, **settings())
    theirs = SemanticSegmentation(backbone="resnet18", model="unet", num_classes=K, loss=loss, ignore_index=ignored)
    output, target = scores_of(B, K, S, S), torch.randint(0, K, (B, S, S), generator=torch.Generator().manual_seed(5))
    if ignored is not None:
        target[:, :5] = ignored
    torch.testing.assert_close(ours.compare(output, target), theirs.criterion(output, target))
    ours.val_metrics(ours.predicted(output), target)
    theirs.val_metrics(output, target)
    one, other = ours.val_metrics.compute(), theirs.val_metrics.compute()
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name]) for name in one)


@pytest.mark.parametrize("loss", ["mse", "mae"])
def test_values_as_torchgeo(loss: Any) -> None:
    """Metrics in the labels' units; the loss of standardized values."""
    ours = ExPLoRARegression(loss=loss, target_mean=50.0, target_std=4.0, **settings())
    theirs = Regression(model="resnet18", num_outputs=1, loss=loss)
    output, target = scores_of(B, 1), 50 + 4 * scores_of(B).flip(0)
    wanted = theirs.criterion(output, ((target - 50) / 4)[:, None])
    torch.testing.assert_close(ours.compare(output, target), wanted, rtol=1e-5, atol=1e-5)
    told = ours.predicted(output)
    torch.testing.assert_close(told, 50 + 4 * output[:, 0])
    ours.val_metrics(told, target)
    found = ours.val_metrics.compute()
    torch.testing.assert_close(found["val_RMSE"], (told - target).square().mean().sqrt())
    torch.testing.assert_close(found["val_MAE"], (told - target).abs().mean())
    assert ours.mode == "min"


def test_label_smoothing_and_weights() -> None:
    weights = [0.5, 1.0, 2.0, 1.5]
    task = ExPLoRAClassification(num_classes=K, label_smoothing=0.2, class_weights=weights, **settings())
    output = scores_of(B, K)
    log, share = output.log_softmax(1), torch.tensor(weights)
    loss = weight = 0.0
    for row, label in zip(log, CLASSES.tolist(), strict=True):
        loss += 0.8 * -row[label] * share[label] + 0.2 / K * float((-row * share).sum())
        weight += float(share[label])
    torch.testing.assert_close(task.compare(output, CLASSES), torch.as_tensor(loss / weight))


@pytest.mark.parametrize("loss", ["ce", "focal", "dice"])
def test_a_batch_of_ignored_pixels_only(loss: Any) -> None:
    task = ExPLoRASegmentation(num_classes=K, head="linear", loss=loss, ignore_index=255, method="full", **settings())
    task.train()
    step = task.run_step({"image": images_of(), "mask": torch.full((B, S, S), 255)}, training=True)
    assert step is not None
    assert float(step.loss.detach()) == 0
    step.loss.backward()
    trained = [weight for weight in task.model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("task_class", [ExPLoRAClassification, ExPLoRASegmentation])
def test_a_batch_of_classes_without_weight(task_class: Any, smoothing: float) -> None:
    words = {"class_weights": [0.0, 1.0, 3.0, 0.0], "label_smoothing": smoothing, "ignore_index": 2}
    task = task_class(num_classes=K, method="linear", **words, **settings())
    masks = task_class is ExPLoRASegmentation
    shape = (B, S, S) if masks else (B,)
    output = scores_of(B, K, *shape[1:]).requires_grad_()
    target = torch.tensor([0, 3, 2, 0, 3]).view(B, *[1] * (len(shape) - 1)).expand(shape)
    loss = task.compare(output, target)
    loss.backward()
    assert float(loss.detach()) == 0
    assert output.grad is not None
    assert not output.grad.any()
    mixed = target.clone()
    mixed[0] = 1
    plain = nn.CrossEntropyLoss(torch.tensor(words["class_weights"]), ignore_index=2, label_smoothing=smoothing)
    torch.testing.assert_close(task.compare(output, mixed), plain(output, mixed))


def test_unreadable_images_are_left_out_of_evaluation() -> None:
    task = ExPLoRAClassification(num_classes=K, **settings()).eval()
    images, stand_in = images_of(), torch.tensor([-1, 1, -1, -1, 4])
    batch = {"image": images, "label": CLASSES, "unreadable": stand_in, "index": torch.arange(B)}
    step = task.run_step(batch, training=False)
    assert step is not None
    assert step.index is not None
    assert step.index.tolist() == [0, 2, 3]
    assert step.target.tolist() == [0, 1, 1]
    torch.testing.assert_close(step.output, task.model(images[[0, 2, 3]]))
    assert task.run_step(batch | {"unreadable": torch.arange(B)}, training=False) is None
    trained = task.run_step(batch, training=True)
    assert trained is not None
    assert len(trained.output) == B, "another image stands in, with its own label"


@pytest.mark.parametrize("task_class", [ExPLoRAClassification, ExPLoRASegmentation])
def test_a_linear_head_leaves_the_encoder_alone(task_class: Any) -> None:
    more = {"head": "linear"} if task_class is ExPLoRASegmentation else {}
    task = task_class(num_classes=K, method="linear", drop_path=0.5, **more, **settings())
    before = {name: value.clone() for name, value in task.encoder.state_dict().items()}
    task.train()
    assert not any(module.training for module in task.encoder.modules())
    assert task.model.head.training
    target = {"label": CLASSES, "mask": torch.zeros(B, S, S, dtype=torch.long)}
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
    head = {name: value.clone() for name, value in task.model.head.state_dict().items()}
    for _ in range(2):
        step = task.run_step({"image": images_of(), **target}, training=True)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
    assert all(value.equal(before[name]) for name, value in task.encoder.state_dict().items())
    assert not any(weight.requires_grad or weight.grad is not None for weight in task.encoder.parameters())
    assert any(not value.equal(head[name]) for name, value in task.model.head.state_dict().items())


@pytest.mark.parametrize("method", ["linear", "lora", "full"])
def test_a_new_task_is_in_training_mode(method: Any) -> None:
    """Lightning does not call ``train``, and encoders are read in evaluation mode."""
    given = settings(method=method, drop_path=0.5)
    given["encoder"].eval()
    task = ExPLoRAClassification(num_classes=K, **given)
    assert task.model.head.training
    assert {module.training for module in task.encoder.modules()} == {method != "linear"}
    first, second = (task.model.features(images_of()) for _ in range(2))
    assert first.equal(second) == (method == "linear"), "stochastic depth is for what trains"


def test_lora_of_rank_8_on_a_large_encoder() -> None:
    """The paper's 0.8 M: 2 x 8 x 1024 x 2 for Q and V in each of 24 blocks."""
    with torch.device("meta"):
        encoder = build_encoder(spec_of("vit_large", image_size=32))
    task = ExPLoRAClassification(
        num_classes=62, pool="cls", rank=8, encoder=encoder, spec=spec_of("vit_large", image_size=32).to_metadata()
    )
    trained = {part.part: part.trainable for part in task.parameter_table() if part.trainable}
    assert trained == {"LoRA": 786_432, "head": 62 * 1024 + 62}
    count = sum(weight.numel() for weight in task.parameters() if weight.requires_grad)
    assert count == 786_432 + 62 * 1024 + 62


def test_stochastic_depth_rises_from_block_to_block() -> None:
    task = ExPLoRAClassification(num_classes=K, drop_path=0.35, **settings())
    rates = [[block.drop_path1.drop_prob, block.drop_path2.drop_prob] for block in task.encoder.blocks]
    for number, pair in enumerate(rates):
        assert pair == pytest.approx([0.35 * number / 7] * 2)


def test_learning_rates_by_layer() -> None:
    task = ExPLoRAClassification(num_classes=K, method="full", layer_decay=0.5, lr=1.0, weight_decay=0.1, **settings())
    found = task.configure_optimizers()["optimizer"].param_groups  # type: ignore[index]
    rate, decay = {}, {}
    names = {id(weight): name for name, weight in task.named_parameters()}
    for group in found:
        for weight in group["params"]:
            assert id(weight) not in rate, "once"
            rate[names[id(weight)]], decay[names[id(weight)]] = group["initial_lr"], group["weight_decay"]
    assert set(rate) == {name for name, weight in task.named_parameters() if weight.requires_grad}
    for name, value in rate.items():
        if "blocks." in name:
            block = int(name.split("blocks.")[1].split(".")[0])
            assert value == pytest.approx(0.5 ** (8 - block)), name
        elif "head" in name or ".norm." in name:
            assert value == 1.0, name
        else:
            assert value == pytest.approx(0.5**9), name
    for name, value in decay.items():
        vector = dict(task.named_parameters())[name].ndim == 1 or name.endswith(("cls_token", "pos_embed"))
        assert value == (0.0 if vector else 0.1), name


@pytest.mark.parametrize("method", ["linear", "lora", "adalora", "dora", "full"])
def test_the_method_does_not_change_what_is_told_at_first(method: Any) -> None:
    """Adapters start at nothing, and the head is the same whatever the method."""
    plain = ExPLoRAClassification(num_classes=K, method="linear", seed=7, **settings()).eval()
    other = ExPLoRAClassification(num_classes=K, method=method, seed=7, rank=2, **settings()).eval()
    with torch.no_grad():
        torch.testing.assert_close(other.model(images_of()), plain.model(images_of()), rtol=1e-4, atol=1e-5)
    assert plain.model.head.weight.equal(other.model.head.weight)
    third = ExPLoRAClassification(num_classes=K, method=method, seed=8, rank=2, **settings())
    assert not third.model.head.weight.equal(plain.model.head.weight)


def test_new_metrics_are_empty_and_apart() -> None:
    task = ExPLoRAClassification(num_classes=K, labels=["a", "b", "c", "d"], **settings())
    first = task.new_metrics()
    first(F.one_hot(CLASSES, K).float(), CLASSES)
    assert float(first.compute()["OverallAccuracy"]) == 1.0
    second = task.new_metrics()
    second(F.one_hot((CLASSES + 1) % K, K).float(), CLASSES)
    found = second.compute()
    assert float(found["OverallAccuracy"]) == 0.0
    assert {f"ClasswiseAccuracy_{name}" for name in "abcd"} <= found.keys()


def test_mixed_labels() -> None:
    torch.manual_seed(0)
    task = ExPLoRAClassification(num_classes=K, mixup=0.8, cutmix=1.0, label_smoothing=0.1, **settings())
    step = task.train().run_step({"image": images_of(), "label": CLASSES}, training=True)
    assert step is not None
    assert step.target.shape == (B, K)
    loss = -(step.target * 0.9 + 0.1 / K) * step.output.log_softmax(1)
    torch.testing.assert_close(step.loss, loss.sum(1).mean())
    plain = task.eval().run_step({"image": images_of(), "label": CLASSES}, training=False)
    assert plain is not None
    assert plain.target.equal(CLASSES)


def test_groups() -> None:
    spec = spec_of(groups=(("R", "B"), ("G",)))
    task = ExPLoRAClassification(num_classes=K, encoder=build_encoder(spec), spec=spec.to_metadata())
    assert isinstance(task.model.head, nn.Linear)
    assert task.model.head.in_features == 2 * 128
    assert task.model(images_of()).shape == (B, K)


@pytest.fixture
def source(tmp_path: Path) -> str:
    spec = spec_of()
    save_encoder(tmp_path / "encoder.safetensors", build_encoder(spec).state_dict(), spec)
    return str(tmp_path / "encoder.safetensors")


def saved_and_read(task: Any, path: Path) -> Any:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, fast_dev_run=True, enable_model_summary=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    return type(task).load_from_checkpoint(path, map_location="cpu")


def test_another_normalization_must_be_allowed(source: str, tmp_path: Path) -> None:
    own = NORMALIZATION | {"mean": [0.5] * 3}
    given: dict[str, Any] = {"num_classes": K, "init": source, "normalization": own, "total_steps": 1}
    with pytest.raises(WeightsError, match=r"mean of R 0, now 0.5.*\n.* allow_normalization_mismatch \(--allow-norm"):
        ExPLoRAClassification(**given)
    task = ExPLoRAClassification(allow_normalization_mismatch=True, **given)
    assert task.spec.normalization == own
    read = saved_and_read(task, tmp_path / "it.ckpt")
    assert read.spec == task.spec
    assert read.hparams["allow_normalization_mismatch"]


def test_other_bands_must_be_allowed(source: str) -> None:
    fewer = {"method": "standardize", "bands": ["R", "G"], "mean": [0.0] * 2, "std": [1.0] * 2}
    given: dict[str, Any] = {
        "num_classes": K,
        "init": source,
        "sensor": "rgb",
        "bands": ["R", "G"],
        "normalization": fewer,
    }
    with pytest.raises(WeightsError, match=r"B would be missing\n.* allow_band_mismatch \(--allow-band-mismatch"):
        ExPLoRAClassification(**given)
    assert ExPLoRAClassification(allow_band_mismatch=True, **given).spec.bands == ("R", "G")


@pytest.mark.parametrize("loss", ["ce", "jaccard", "focal", "dice"])
def test_a_model_that_waits_for_data(loss: Any) -> None:
    task = ExPLoRASegmentation(num_classes=K, bands=RGB, sensor="rgb", loss=loss, labels=list("abcd"))
    assert not hasattr(task, "model")
    assert "OverallAccuracy" in task.new_metrics()


@pytest.mark.parametrize("words", [{}, {"num_classes": 1}, {"task": "multilabel", "num_classes": K}])
def test_a_number_of_classes_is_needed(words: Any) -> None:
    with pytest.raises(ConfigError, match="the task needs two classes or more, but num_"):
        ExPLoRAClassification(**words, **settings())
