from __future__ import annotations

import subprocess
import sys

import pytest
import timm
from timm.models.vision_transformer import VisionTransformer

from geoexplora.bands import SENSORS
from geoexplora.transforms.normalization import Normalization
from geoexplora.weights.sources.addresses import is_secure, parse_address
from geoexplora.weights.sources.shortcuts import SHORTCUTS, Shortcut, looks_fetchable

NAMES = {
    *(f"dinov2-vit{size}14{registers}" for size in "sblg" for registers in ("", "-reg4")),
    *(f"mae-vit{size}{pixels}" for size in ("b16", "l16", "h14") for pixels in ("", "-pixel")),
    "satmae-vitl-fmow-rgb",
    "satmae-vitl-fmow-temporal",
    *(f"satmae-vit{size}-fmow-sentinel{tuned}" for size in "bl" for tuned in ("", "-finetuned")),
    *(f"explora-vit{size}14-fmow-rgb{full}" for size in "bl" for full in ("", "-full")),
    "explora-vitl-fmow-sentinel",
    "explora-vitl-fmow-sentinel-full",
}


def test_importing_needs_no_torch():
    heavy = "{'torch', 'timm', 'torchgeo', 'huggingface_hub'}"
    modules = ", ".join(f"geoexplora.weights.sources.{name}" for name in ("addresses", "shortcuts", "locate"))
    code = f"import sys, {modules}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_shortcuts():
    assert set(SHORTCUTS) == NAMES


@pytest.mark.parametrize("shortcut", SHORTCUTS.values(), ids=SHORTCUTS)
def test_each_shortcut_can_be_fetched_and_is_described(shortcut: Shortcut):
    address = parse_address(shortcut.address, shortcut.sha256)
    assert is_secure(shortcut.address) or address.repo == "samarkhanna/ExPLoRA"
    assert address.name.endswith(".pth")
    assert "?" not in address.name
    assert shortcut.format
    assert shortcut.licence
    assert shortcut.note
    assert shortcut.sha256 is None or len(shortcut.sha256) == 64
    assert SENSORS[shortcut.sensor].select(shortcut.bands) == shortcut.bands
    assert Normalization.from_dict(shortcut.normalization).bands == shortcut.bands
    assert Normalization.from_dict(shortcut.normalization).to_dict() == shortcut.normalization


def test_no_two_shortcuts_share_a_file_or_digest():
    assert len({shortcut.address for shortcut in SHORTCUTS.values()}) == len(SHORTCUTS)
    digests = [shortcut.sha256 for shortcut in SHORTCUTS.values() if shortcut.sha256]
    assert len(set(digests)) == len(digests) == 8


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("dinov2-vitl14", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"),
        ("dinov2-vitg14-reg4", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"),
        ("mae-vith14", "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_huge.pth"),
        ("mae-vitl16-pixel", "https://dl.fbaipublicfiles.com/mae/visualize/mae_visualize_vit_large.pth"),
        ("satmae-vitl-fmow-rgb", "https://zenodo.org/records/7369797/files/fmow_pretrain.pth?download=1"),
        ("satmae-vitl-fmow-temporal", "https://zenodo.org/records/7369797/files/pretrain_fmow_temporal.pth?download=1"),
        (
            "satmae-vitb-fmow-sentinel",
            "https://zenodo.org/records/7338613/files/pretrain-vit-base-e199.pth?download=1",
        ),
        (
            "satmae-vitl-fmow-sentinel-finetuned",
            "https://zenodo.org/records/7338613/files/finetune-vit-large-e7.pth?download=1",
        ),
        (
            "explora-vitb14-fmow-rgb",
            "hf://samarkhanna/ExPLoRA/explora_dinov2_fmow_rgb/explora_dinov2_vit_base_fmow_rgb_encoder_only.pth",
        ),
        (
            "explora-vitl14-fmow-rgb-full",
            "hf://samarkhanna/ExPLoRA/explora_dinov2_fmow_rgb/explora_dinov2_vit_large_fmow_rgb.pth",
        ),
        (
            "explora-vitl-fmow-sentinel",
            "hf://samarkhanna/ExPLoRA/explora_mae_multispectral/explora_mae_fmow_sentinel_encoder_only.pth",
        ),
    ],
)
def test_addresses_are_those_of_the_authors(name: str, address: str):
    assert SHORTCUTS[name].address == address


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/a.pth",
        "http://example.org/a.pth",  # refused later, with the reason
        "hf://owner/name",
        "dinov2-vitl14",
        "dinov2-vitl41",
        "ViTSmall16_Weights.SENTINEL2_ALL_MOCO",
        "vit_small_patch14_dinov2.lvd142m",
        "deit3_small_patch16_224",
        "ViT-B",
        "sample-source",
        "satmae-fmow",  # no shortcut, but near some
    ],
)
def test_what_may_be_fetched(text: str):
    assert looks_fetchable(text)


@pytest.mark.parametrize("text", ["", " ", "runs/vit", "vit.pth", "~", "nowhere", "resnet18", "encoder", "run-1"])
def test_what_cannot_be_fetched(text: str):
    assert not looks_fetchable(text)


def test_every_plain_vision_transformer_of_timm_may_be_fetched():
    """Only modules that know the class can make one."""
    loaded = {name: vars(sys.modules.get(f"timm.models.{name}", object)) for name in timm.list_modules()}
    modules = [name for name, known in loaded.items() if any(one is VisionTransformer for one in known.values())]
    assert {"vision_transformer", "deit"} <= set(modules)
    names = [name for module in modules for name in timm.list_models(module=module)]
    assert [name for name in names if not looks_fetchable(name)] == []
