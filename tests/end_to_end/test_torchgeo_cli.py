"""Our tasks, models and datamodules under TorchGeo's own command line, and each recipe of recipes/torchgeo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torchgeo.datasets import SSL4EOS12
from torchgeo.main import main
from torchgeo.tasks import MAE

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_STATISTICS, SENTINEL2
from geoexplora.cli.recipe_files import recipe_file, recipe_names
from geoexplora.errors import ConfigError
from geoexplora.tasks import ExPLoRAClassification, ExPLoRAMAE, ExPLoRAPretrain, ExPLoRASegmentation
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import build_encoder, load_encoder
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import save_encoder

from ..datasets.torchgeo_trees import write_eurosat, write_loveda, write_resisc45, write_ssl4eo_s12

RECIPES = [name for name in recipe_names() if name.startswith("torchgeo/")]
TRAINER = {
    "max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "accelerator": "cpu", "devices": 1,
    "precision": "32-true", "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip
GROUPS = [["B2", "B3", "B4", "B8"], ["B5", "B6", "B7", "B8A"], ["B11", "B12"]]
SMALL = {
    "ExPLoRAPretrain": {
        "model": "vit_pico", "image_size": 16, "rank": 4, "init": None, "decoder_width": 32, "decoder_depth": 1,
        "decoder_heads": 4,
    },
    "ExPLoRADINOv2": {
        "model": "vit_pico", "image_size": 28, "local_size": 14, "rank": 4, "prototypes": 16, "head_hidden": 8,
        "head_bottleneck": 4, "local_crops": 2, "freeze_last_steps": 0, "warmup_steps": 0,
    },
    "ExPLoRAMAE": {
        "model": "vit_tiny_patch16_224", "size": 32, "decoder_dim": 16, "decoder_num_heads": 2, "rank": 4,
    },
    "ExPLoRAClassification": {},
    "ExPLoRASegmentation": {"image_size": 32, "head": "linear"},
    "Classification": {"model": "group_channel_vit_pico.s16_p8_g0-1-2-6_g3-4-5-7_g8-9"},
    "SemanticSegmentation": {"backbone": "tu-plain_vit_pico.s32_p8_c3"},
}  # fmt: skip
"""What makes a recipe small, by its task."""


def rgb_weights(path: Path, model: str = "vit_pico", patch_size: int = 8, image_size: int = 32) -> Path:
    """An encoder of random weights for photographs by ImageNet's statistics."""
    torch.manual_seed(0)
    statistics = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
    spec = EncoderSpec.of(
        model, image_size=image_size, patch_size=patch_size, sensor="rgb", bands=["R", "G", "B"],
        normalization={"method": "standardize", "bands": ["R", "G", "B"], **statistics},
    )  # fmt: skip
    save_encoder(path, build_encoder(spec).state_dict(), spec)
    return path


def sentinel_weights(path: Path) -> Path:
    """A group-channel encoder of random weights by fMoW-Sentinel's statistics."""
    torch.manual_seed(0)
    spec = EncoderSpec.of(
        "vit_pico", image_size=16, patch_size=8, sensor="sentinel-2", bands=FMOW_SENTINEL_BANDS, groups=GROUPS,
        normalization=FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS).normalization("clip-uint8"),
    )  # fmt: skip
    save_encoder(path, build_encoder(spec).state_dict(), spec)
    return path


@pytest.fixture(scope="module")
def roots(fmow_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("torchgeo")
    return {
        "EuroSATDataModule": write_eurosat(folder / "eurosat"),
        "RESISC45DataModule": write_resisc45(folder / "resisc45"),
        "SSL4EOS12DataModule": write_ssl4eo_s12(folder / "ssl4eo", 2),
        "LoveDADataModule": write_loveda(folder / "loveda"),
        "FMoWSentinelDataModule": fmow_tree,
        "EuroSAT": folder / "eurosat",
        "LoveDA": folder / "loveda",
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    return {
        "ExPLoRADINOv2": rgb_weights(folder / "a.safetensors", patch_size=14, image_size=28),
        "ExPLoRAMAE": rgb_weights(folder / "b.safetensors", "vit_tiny", 16),
        "ExPLoRAClassification": sentinel_weights(folder / "c.safetensors"),
        "ExPLoRASegmentation": rgb_weights(folder / "d.safetensors"),
    }


@pytest.fixture(autouse=True)
def two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["torchgeo"])
    monkeypatch.setattr(SSL4EOS12, "__len__", lambda self: 2)  # TorchGeo counts 251,079, whatever is there


def run(config: dict[str, Any], folder: Path, *words: str, command: str = "fit") -> Path:
    """``torchgeo fit --config FILE`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config["trainer"] = config.get("trainer", {}) | {"default_root_dir": str(folder)}
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    main([command, "--config", str(file), *words])
    return folder


def small(name: str, roots: dict[str, Path], weights: dict[str, Path], folder: Path) -> dict[str, Any]:
    """A recipe, made small enough for a test."""
    config = yaml.safe_load(recipe_file(name).read_text())
    task = config["model"]["class_path"].rpartition(".")[2]
    data = config["data"]
    config["model"]["init_args"] |= SMALL[task]
    if task in weights:
        config["model"]["init_args"]["weights" if task == "ExPLoRAMAE" else "init"] = str(weights[task])
    data["init_args"] |= {"batch_size": 2, "num_workers": 0}
    if "image_size" in data["init_args"]:
        data["init_args"]["image_size"] = 32 if task == "SemanticSegmentation" else 16
    root = str(roots[data["init_args"].get("name", data["class_path"].rpartition(".")[2])])
    data["dict_kwargs" if "dict_kwargs" in data else "init_args"]["root"] = root
    config["trainer"] |= TRAINER | {"accumulate_grad_batches": 1}
    for callback in config["trainer"].get("callbacks", []):
        if "path" in callback["init_args"]:
            callback["init_args"]["path"] = str(folder / "encoder")
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_a_step(roots: dict[str, Path], weights: dict[str, Path], tmp_path: Path, name: str) -> None:
    config = small(name, roots, weights, tmp_path)
    run(config, tmp_path)
    (checkpoint,) = {path for path in tmp_path.rglob("*.ckpt") if path.name != "last.ckpt"}
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 1
    logged = next(tmp_path.rglob("config.yaml")).read_text()
    assert config["model"]["class_path"] in logged
    if any(callback["class_path"].endswith("EncoderExport") for callback in config["trainer"].get("callbacks", [])):
        _, spec = load_encoder(tmp_path / "encoder" / "encoder.safetensors")
        assert spec.normalization["bands"] == list(spec.bands)


def test_recipes_there() -> None:
    wanted = {"explora-pretrain-eurosat", "explora-pretrain-ssl4eo-s12", "dinov2-resisc45", "mae-eurosat"}
    wanted |= {"classification-group-channel", "segmentation-dpt", "finetune-eurosat", "explora-pretrain-fmow-sentinel"}
    assert {f"torchgeo/{name}" for name in wanted} <= set(RECIPES)


def pretrain(root: Path, **settings: Any) -> dict[str, Any]:
    init = {"patch_size": 8, "groups": GROUPS} | SMALL["ExPLoRAPretrain"] | settings
    return {
        "seed_everything": 0,
        "model": {"class_path": "geoexplora.tasks.ExPLoRAPretrain", "init_args": init},
        "data": {
            "class_path": "EuroSATDataModule", "init_args": {"batch_size": 2}, "dict_kwargs": {"root": str(root)},
        },
        "trainer": dict(TRAINER),
    }  # fmt: skip


def test_root_on_the_command_line(roots: dict[str, Path], tmp_path: Path) -> None:
    root = str(roots["EuroSATDataModule"])
    run(pretrain(Path("nowhere")), tmp_path, "--data.dict_kwargs.root", root)


def test_epochs_metrics_checkpoint_and_probe(
    geoexplora: Callable[..., Any], roots: dict[str, Path], tmp_path: Path
) -> None:
    root = roots["EuroSATDataModule"]
    config = pretrain(root)
    config["trainer"] |= {"max_epochs": 2, "limit_train_batches": 2, "log_every_n_steps": 1}
    config["trainer"]["callbacks"] = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"monitor": "train_loss", "dirpath": str(tmp_path), "filename": "best"},
        },
        {
            "class_path": "geoexplora.tasks.EncoderExport",
            "init_args": {"path": str(tmp_path / "mine.safetensors"), "every_n_epochs": 1},
        },
    ]
    run(config, tmp_path)
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert {"train_loss_step", "train_loss_epoch"} <= set(header.split(","))
    hparams = yaml.safe_load(next(tmp_path.rglob("hparams.yaml")).read_text())
    assert hparams["bands"] == list(FMOW_SENTINEL_BANDS), "what setup settled is recorded"

    task = ExPLoRAPretrain.load_from_checkpoint(tmp_path / "best.ckpt", map_location="cpu")
    assert task.hparams["normalization"]["method"] == "standardize"
    source = read_weights(tmp_path / "mine.safetensors")
    assert source.step == 4
    assert source.told
    assert "LoRA" in {part["part"] for part in source.trained}
    got = geoexplora("inspect", tmp_path / "mine.safetensors")
    assert got.status == 0, got.err
    words = ("--dataset", "eurosat", "--root", root, "--init", tmp_path / "mine.safetensors")
    got = geoexplora("probe", *words, "--output", tmp_path / "probe", "--accelerator", "cpu", "--test-split", "val")
    assert got.status == 0, got.err


def test_a_warm_up_longer_than_the_run_is_cut(
    roots: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the command line, so that the last step has the full rate; a resumed run has the same rates."""
    rates: list[float] = []
    step = ExPLoRAPretrain.optimizer_step

    def watch(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        rates.append(max(group["lr"] for group in optimizer.param_groups))
        step(self, epoch, batch_idx, optimizer, closure)

    monkeypatch.setattr(ExPLoRAPretrain, "optimizer_step", watch)
    config = pretrain(roots["EuroSATDataModule"], lr=0.01, warmup_steps=500)
    config["trainer"] |= {"max_epochs": 2, "limit_train_batches": 2}
    config["trainer"]["callbacks"] = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(tmp_path), "filename": "{step}", "save_top_k": -1},
        }
    ]
    run(config, tmp_path)
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])
    assert caplog.text.count("the warm-up of 500 steps is cut to 3: there are only 4 steps") == 1
    run(config, tmp_path, "--ckpt_path", str(tmp_path / "step=2.ckpt"))
    assert rates[4:] == rates[2:4]


def test_fewer_images_than_a_batch(roots: dict[str, Path], tmp_path: Path) -> None:
    config = pretrain(roots["EuroSATDataModule"])
    config["data"]["init_args"]["batch_size"] = 500
    with pytest.raises(ConfigError, match="fewer training images on a device than a batch of 500 takes\nLower"):
        run(config, tmp_path)
    config["trainer"]["max_steps"] = 0
    config["data"]["init_args"]["batch_size"] = 2
    run(config, tmp_path)  # nothing to do, as asked


def test_resumed_by_torchgeo(roots: dict[str, Path], tmp_path: Path) -> None:
    """A run goes on where it stood; TorchGeo's datamodules shuffle anew, so an uninterrupted one is not repeated."""
    folder = tmp_path / "run"

    def config(epochs: int, **settings: Any) -> dict[str, Any]:
        made = pretrain(roots["EuroSATDataModule"], total_steps=8, **settings)
        export = {"class_path": "geoexplora.tasks.EncoderExport", "init_args": {"path": str(folder)}}
        made["trainer"] |= {"max_epochs": epochs, "limit_train_batches": 4, "callbacks": [export]}
        return made

    run(config(1), folder)
    first = load_file(folder / "encoder.safetensors")
    checkpoint = next(folder.rglob("*.ckpt"))
    run(config(1, seed=1), folder, "--ckpt_path", str(checkpoint))
    same = load_file(folder / "encoder.safetensors")
    assert all(torch.equal(same[name], value) for name, value in first.items()), "not from other random weights"
    run(config(2), folder, "--ckpt_path", str(checkpoint))
    assert read_weights(folder / "encoder.safetensors").step == 8
    later = load_file(folder / "encoder.safetensors")
    assert not torch.equal(later["blocks.7.mlp.fc1.weight"], first["blocks.7.mlp.fc1.weight"])
    assert torch.equal(later["blocks.3.mlp.fc1.weight"], first["blocks.3.mlp.fc1.weight"]), "frozen, also after that"


def test_weights_of_the_same_sensor_say_what_the_input_is(roots: dict[str, Path], tmp_path: Path) -> None:
    file = sentinel_weights(tmp_path / "s.safetensors")
    config = pretrain(roots["EuroSATDataModule"], init=str(file))
    config["trainer"]["callbacks"] = [
        {"class_path": "geoexplora.tasks.EncoderExport", "init_args": {"path": str(tmp_path)}}
    ]
    run(config, tmp_path)
    _, spec = load_encoder(tmp_path / "encoder.safetensors")
    assert spec.normalization == FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS).normalization("clip-uint8")
    assert spec.source is not None


def test_wrong_bands_say_so(roots: dict[str, Path], tmp_path: Path) -> None:
    config = pretrain(roots["EuroSATDataModule"])
    config["data"]["dict_kwargs"]["bands"] = ["B04", "B03", "B02"]
    with pytest.raises(ConfigError, match="EuroSAT has no band B5, B6, B7, B8, B8A, B11, B12"):
        run(config, tmp_path)


def test_torchgeo_test_of_a_fine_tuned_encoder(
    roots: dict[str, Path], weights: dict[str, Path], tmp_path: Path
) -> None:
    root = roots["EuroSATDataModule"]
    (root / "eurosat-test.txt").write_text((root / "eurosat-val.txt").read_text())
    config = small("torchgeo/finetune-eurosat", roots, weights, tmp_path)
    run(config, tmp_path)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    run(config, tmp_path, "--ckpt_path", str(checkpoint), command="test")
    task = ExPLoRAClassification.load_from_checkpoint(checkpoint, map_location="cpu")
    assert task.spec.bands == FMOW_SENTINEL_BANDS


@pytest.mark.parametrize(
    ("name", "task_class"), [("finetune-eurosat", ExPLoRAClassification), ("finetune-loveda", ExPLoRASegmentation)]
)
def test_adalora_plans_its_ranks_over_the_trainers_steps(
    roots: dict[str, Path], weights: dict[str, Path], tmp_path: Path, name: str, task_class: Any
) -> None:
    """The model waits for the length of the training; its checkpoint does not."""
    config = small(f"torchgeo/{name}", roots, weights, tmp_path)
    config["model"]["init_args"] |= {"method": "adalora", "rank": 2}
    run(config, tmp_path)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    task = task_class.load_from_checkpoint(checkpoint, map_location="cpu")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert task.hparams["total_steps"] == 1
    assert any(".lora_E." in key for key in saved)
    assert all(value.equal(saved[key]) for key, value in task.state_dict().items())


def test_classes_that_the_task_does_not_have(roots: dict[str, Path], weights: dict[str, Path], tmp_path: Path) -> None:
    config = small("torchgeo/finetune-eurosat", roots, weights, tmp_path)
    del config["model"]["init_args"]["num_classes"]
    with pytest.raises(ValueError, match="two classes or more, but num_classes is None"):  # jsonargparse's, of ours
        run(config, tmp_path)
    config = small("torchgeo/finetune-loveda", roots, weights, tmp_path)
    config["model"]["init_args"]["num_classes"] = 3
    config["trainer"]["num_sanity_val_steps"] = 0
    with pytest.raises(ConfigError, match=r"a mask holds \d, which is none of the 3 classes 0 to 2\nSet num_classes"):
        run(config, tmp_path)


def mae(**settings: Any) -> ExPLoRAMAE:
    words = {
        "model": "vit_tiny_patch16_224", "size": 32, "decoder_dim": 16, "decoder_num_heads": 2,
        "whole_blocks": [1, "L"], "rank": 4, "in_channels": 13, "bands": SENTINEL2.band_names,
        "normalization": {
            "method": "standardize", "bands": list(SENTINEL2.band_names), "mean": [0.0] * 13, "std": [1e4] * 13,
        },
    }  # fmt: skip
    return ExPLoRAMAE(**(words | settings))


def test_torchgeos_mae_starts_from_the_weights_and_trains_what_explora_trains(weights: dict[str, Path]) -> None:
    task = mae(weights=str(weights["ExPLoRAMAE"]))
    assert isinstance(task, MAE)
    source = load_file(weights["ExPLoRAMAE"])
    kept = task.encoder.state_dict()
    for name in ("blocks.0.mlp.fc1.weight", "blocks.11.attn.qkv.weight", "blocks.5.attn.proj.weight", "cls_token"):
        assert torch.equal(kept[name], source[name]), f"{name} is lightly's initial value, not the source's"
    trained = {name for name, value in task.encoder.named_parameters() if value.requires_grad}
    within = {name for name in trained if name.startswith(("blocks.0.", "blocks.11.", "patch_embed.", "pos_embed"))}
    rest = trained - within - {"cls_token", "norm.weight", "norm.bias"}
    assert all(".lora_" in name or ".norm" in name for name in rest)
    assert sum(".lora_" in name for name in rest) == 10 * 4
    assert all(value.requires_grad == ("pos_embed" not in name) for name, value in task.decoder.named_parameters())
    assert {part.part for part in task.parameter_table() if part.trainable} >= {"LoRA", "whole blocks", "decoder"}


def test_torchgeos_mae_leaves_frozen_weights_as_they_are(
    roots: dict[str, Path], weights: dict[str, Path], tmp_path: Path
) -> None:
    config = small("torchgeo/mae-eurosat", roots, weights, tmp_path)
    config["trainer"] |= {"limit_train_batches": 2}
    config["model"]["init_args"] |= {"warmup_epochs": 0, "lr": 1e-2}
    run(config, tmp_path)
    before, after = load_file(weights["ExPLoRAMAE"]), load_file(tmp_path / "encoder" / "encoder.safetensors")
    for block in range(1, 11):
        for name in ("attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.bias"):
            assert torch.equal(before[f"blocks.{block}.{name}"], after[f"blocks.{block}.{name}"])
        query, key, value = (
            torch.equal(old, new)
            for old, new in zip(
                before[f"blocks.{block}.attn.qkv.weight"].chunk(3),
                after[f"blocks.{block}.attn.qkv.weight"].chunk(3),
                strict=True,
            )
        )
        assert (query, key, value) == (False, True, False), "LoRA on Q and V is merged"
    assert not torch.equal(before["blocks.11.mlp.fc1.weight"], after["blocks.11.mlp.fc1.weight"])
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=13, num_classes=0)
    model.load_state_dict(after, strict=True)

    checkpoint = next(tmp_path.rglob("*.ckpt"))
    task = ExPLoRAMAE.load_from_checkpoint(checkpoint, map_location="cpu")
    assert torch.equal(task.encoder.blocks[11].mlp.fc1.weight, after["blocks.11.mlp.fc1.weight"])


def test_torchgeos_mae_from_random_weights_trains_all() -> None:
    frozen = {name for name, value in mae().named_parameters() if not value.requires_grad}
    assert frozen == {"backbone.mask_token", "decoder.decoder_pos_embed"}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"in_channels": 3}, "in_channels is 3, but the images have the bands B1,"),
        ({"model": "group_channel_vit_pico"}, "is no plain vision transformer"),
        ({"model": "resnet18"}, "is no plain vision transformer"),
        ({"model": "vit_nothing"}, "model vit_nothing"),
    ],
)
def test_torchgeos_mae_refuses(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        mae(**settings)


def test_export_needs_a_task_of_ours(roots: dict[str, Path], tmp_path: Path) -> None:
    config = pretrain(roots["EuroSATDataModule"])
    config["model"] = {
        "class_path": "Classification",
        "init_args": {"model": "resnet18", "in_channels": 13, "num_classes": 2},
    }
    config["trainer"]["callbacks"] = [{"class_path": "geoexplora.tasks.EncoderExport"}]
    with pytest.raises(ConfigError, match="Classification has no encoder"):
        run(config, tmp_path)
