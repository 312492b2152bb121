"""fMoW-RGB through the command line: both objectives from Meta's kinds of weights, probing, lists, bad annotations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from geoexplora.datasets.sample_rgb_tree import write_fmow_rgb_tree
from geoexplora.models.decoder import MAEDecoder
from geoexplora.runs.metrics import read_metrics

SMALL = (
    "--model", "vit_pico", "--batch-size", "4", "--effective-batch-size", "4", "--max-steps", "2", "--rank", "4",
    "--log-every", "1", "--accelerator", "cpu", "--precision", "32", "--num-workers", "0", "--probe-every", "2",
)  # fmt: skip
MAE = (
    *SMALL, "--objective", "mae", "--image-size", "32", "--decoder-width", "32", "--decoder-depth", "1",
    "--decoder-heads", "4", "--decoder-rank", "2",
)  # fmt: skip
DINOV2 = (
    *SMALL, "--image-size", "56", "--local-size", "28", "--local-crops", "2", "--prototypes", "32", "--head-hidden",
    "16", "--head-bottleneck", "8",
)  # fmt: skip

Pretrain = Callable[..., Any]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Boxes of 24 to 40 px, two a class and block. Read only."""
    return write_fmow_rgb_tree(tmp_path_factory.mktemp("fmow-rgb") / "data", (24, 40), limit=2)


@pytest.fixture
def own(tree: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(tree, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))


@pytest.fixture(scope="module")
def pretrain(geoexplora: Any, tree: Path) -> Pretrain:
    def run(output: Path, *words: object, root: Path = tree) -> Any:
        return geoexplora("pretrain", "--dataset", "fmow-rgb", "--root", root, "--output", output, *words)

    return run


def meta(path: Path, patch: int, **settings: Any) -> dict[str, torch.Tensor]:
    """A ViT of Meta's layout at another image size."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=4 * patch, patch_size=patch, embed_dim=128, depth=8, num_heads=4,
        num_classes=0, **settings,
    )  # fmt: skip
    return dict(vit.state_dict())


def parts(run: Path) -> dict[str, tuple[int, int]]:
    rows = json.loads((run / "run.json").read_text())["parameters"]
    return {row["part"]: (row["trainable"], row["frozen"]) for row in rows}


def test_mae_with_the_released_decoder(pretrain: Pretrain, tmp_path: Path) -> None:
    """M-[L]-r: Meta's ``mae_visualize_*`` brings a decoder, which gets LoRA of its own rank."""
    state = meta(tmp_path, 16)
    decoder = MAEDecoder(128, (4, 4), 16, None, 3, width=32, depth=1, heads=4).state_dict()
    state |= {name if name == "mask_token" else f"decoder_{name}": value for name, value in decoder.items()}
    torch.save({"model": state}, tmp_path / "mae_visualize.pth")
    got = pretrain(tmp_path / "r", *MAE, "--init", tmp_path / "mae_visualize.pth")
    assert got.status == 0, got.err
    source = json.loads((tmp_path / "r/run.json").read_text())["source"]
    assert source["decoder_loaded"]
    assert not source["new_outputs"]
    found = parts(tmp_path / "r")
    assert found["decoder"][0] == 2 * 2 * 32 * 2 + (2 * 2 + 2) * 32, "LoRA on Q and V, and the norms"
    assert found["LoRA"] == (7 * 2 * 2 * 128 * 4, 0)
    assert found["patch embedding"][0] == 0
    assert [row["step"] for row in read_metrics(tmp_path / "r/metrics.csv")] == [0, 1, 2]
    stock = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=128, depth=8, num_heads=4, num_classes=0)
    stock.load_state_dict(load_file(tmp_path / "r/encoder.safetensors"), strict=True)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_from_metas_layout(pretrain: Pretrain, geoexplora: Any, tree: Path, tmp_path: Path, registers: int):
    settings = {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    state = meta(tmp_path, 14, init_values=1.0, **settings)
    names = {"reg_token": "register_tokens"}
    state = {names.get(name, name): value for name, value in state.items()}
    if registers:  # Meta's positions have a row for the class token
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 128), state["pos_embed"]], dim=1)
    torch.save(state | {"mask_token": torch.randn(1, 128)}, tmp_path / "dinov2.pth")
    got = pretrain(tmp_path / "r", *DINOV2, "--init", tmp_path / "dinov2.pth")
    assert got.status == 0, got.err
    found = parts(tmp_path / "r")
    assert found["class token"] == (128, 0)
    assert found["LoRA"] == (7 * 2 * 2 * 128 * 4, 0)
    assert found["patch embedding"][0] == found["position encoding"][0] == 0
    stock = timm.create_model(
        "vit_tiny_patch16_224", img_size=56, patch_size=14, embed_dim=128, depth=8, num_heads=4, num_classes=0,
        init_values=1.0, **settings,
    )  # fmt: skip
    stock.load_state_dict(load_file(tmp_path / "r/encoder.safetensors"), strict=True)
    got = geoexplora("probe", "--init", tmp_path / "r", "--dataset", "fmow-rgb", "--root", tree, "--k", "3")
    assert got.status == 0, got.err
    assert "accuracy" in got.out


@pytest.mark.parametrize("words", [("--crop", "tight"), ("--crop", "full"), ("--variant", "msrgb")])
def test_what_a_sample_shows(pretrain: Pretrain, tmp_path: Path, words: tuple[str, ...]) -> None:
    got = pretrain(tmp_path / "r", *DINOV2, *words, "--max-steps", "1")
    assert got.status == 0, got.err


def annotations(root: Path) -> list[Path]:
    return sorted((root / "fmow-rgb/train").rglob("*_rgb.json"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: found.update(bounding_boxes=[]), "box"),
        (lambda found: found.pop("bounding_boxes"), "box"),
        (lambda found: found["bounding_boxes"][0].update(box=[5, 5, 0, 9]), "area"),
        (lambda found: found["bounding_boxes"][0].update(box=[9000, 9000, 20, 20]), "outside"),
    ],
)
def test_bad_annotations(pretrain: Pretrain, own: Path, tmp_path: Path, change: Any, reason: str) -> None:
    file = annotations(own)[0]
    found = json.loads(file.read_text())
    change(found)
    good = file.read_text()
    file.write_text(json.dumps(found))
    got = pretrain(tmp_path / "r", *DINOV2, root=own)
    assert got.status == 2, got.err
    assert file.name in got.err
    assert reason in got.err
    assert "--missing skip" in got.err
    assert "Traceback" not in got.err
    assert not (tmp_path / "r").exists()
    got = pretrain(tmp_path / "r", *DINOV2, "--missing", "skip", "--max-steps", "1", root=own)
    assert got.status == 0, got.err
    assert "warning" in got.err
    assert file.name in got.err
    file.write_text(good)
    got = pretrain(tmp_path / "mended", *DINOV2, "--max-steps", "1", root=own)
    assert got.status == 0, "a corrected file is read again"


def test_a_list_of_satmaes_kind(pretrain: Pretrain, own: Path, tmp_path: Path) -> None:
    images = sorted((own / "fmow-rgb/train").rglob("*_rgb.jpg"))[:6]
    rows = [f"{path.parent.parent.name},{path.relative_to(own / 'fmow-rgb')},2016-01-01T00:00:00Z" for path in images]
    (own / "train_62classes.csv").write_text("\n".join(["category,image_path,timestamp", *rows]) + "\n")
    got = pretrain(tmp_path / "r", *DINOV2, "--probe-every", "0", "--crop", "full", root=own)
    assert got.status == 0, got.err
    assert "6 images, 2 steps" in got.err
