from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

from geoexplora.bands import SENTINEL2
from geoexplora.errors import WeightsError
from geoexplora.models.decoder import MAEDecoder
from geoexplora.weights.contract import Allowed
from geoexplora.weights.convert import convert_bands, resample_kernel, rgb_to_groups
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import build_encoder, load_decoder_into, load_encoder, load_into
from geoexplora.weights.source_weights import SourceWeights
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import save_decoder, save_encoder

from .conftest import meta_mae, plain_vit
from .reference import random_state


@pytest.fixture
def visualize(tmp_path: Path) -> Path:
    torch.save(meta_mae(decoder=True), tmp_path / "mae_visualize.pth")
    return tmp_path / "mae_visualize.pth"


@pytest.fixture
def source(visualize: Path) -> SourceWeights:
    return read_weights(visualize)


def test_saved_encoder_gives_the_same_output(tmp_path: Path, rgb_spec: EncoderSpec) -> None:
    model = plain_vit()
    save_encoder(tmp_path / "encoder.safetensors", model.state_dict(), rgb_spec)
    loaded, spec = load_encoder(tmp_path)
    image = torch.randn(2, 3, 64, 64)
    assert spec == rgb_spec
    assert not loaded.training
    assert loaded(image).equal(model(image))


def test_saved_group_channel_encoder_gives_the_same_output(tmp_path: Path, group_spec: EncoderSpec) -> None:
    model = build_encoder(group_spec).eval()
    save_encoder(tmp_path / "encoder.safetensors", model.state_dict(), group_spec)
    loaded, spec = load_encoder(tmp_path / "encoder.safetensors")
    image = torch.rand(2, 10, 48, 48)
    assert spec == group_spec
    assert loaded(image).equal(model(image))


def test_rgb_file_loads_into_stock_timm(tmp_path: Path, rgb_spec: EncoderSpec) -> None:
    from safetensors.torch import load_file

    model = plain_vit()
    save_encoder(tmp_path / "encoder.safetensors", model.state_dict(), rgb_spec)
    stock = timm.create_model(rgb_spec.timm_name, **rgb_spec.timm_args).eval()
    stock.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    image = torch.randn(1, 3, 64, 64)
    assert stock(image).equal(model(image))


def test_half_precision_file(tmp_path: Path, rgb_spec: EncoderSpec) -> None:
    model = plain_vit()
    save_encoder(tmp_path / "encoder.safetensors", model.state_dict(), rgb_spec, dtype=torch.float16)
    loaded, _ = load_encoder(tmp_path)
    assert all(value.dtype == torch.float32 for value in loaded.parameters())
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(image), model(image), rtol=0.02, atol=0.02)


def test_meta_mae_gives_the_same_output(source: SourceWeights) -> None:
    assert source.spec is not None
    model = build_encoder(source.spec).eval()
    report = load_into(model, source, spec=source.spec)
    assert len(report.matched) == len(model.state_dict())
    assert not (report.converted or report.resampled or report.kept or report.missing or report.unexpected)
    image = torch.randn(2, 3, 64, 64)
    assert model(image).equal(plain_vit()(image))


def test_to_another_image_and_patch_size(source: SourceWeights, rgb_spec: EncoderSpec) -> None:
    wanted = EncoderSpec.of(
        "vit_pico",
        image_size=48,
        patch_size=8,
        sensor="rgb",
        bands=("R", "G", "B"),
        normalization=rgb_spec.normalization,
    )
    model = build_encoder(wanted)
    report = load_into(model, source, spec=wanted)
    assert report.resampled == {"patch_embed.proj.weight": "patch 16 to 8 (pseudo-inverse)", "pos_embed": "4x4 to 6x6"}
    assert report.band_init is None
    assert torch.isfinite(model(torch.rand(1, 3, 48, 48))).all()


def test_to_channel_groups(source: SourceWeights, group_spec: EncoderSpec) -> None:
    assert group_spec.groups is not None
    wide = replace(group_spec, timm_args={**group_spec.timm_args, "patch_size": 16}, patch_size=16)
    model = build_encoder(wide)
    positions = model.pos_embed.clone()
    report = load_into(model, source, spec=wide, policy="nearest-wavelength")
    kernels = rgb_to_groups(
        source.tensors["patch_embed.proj.weight"], SENTINEL2, group_spec.groups, policy="nearest-wavelength"
    )
    for index, kernel in enumerate(kernels):
        torch.testing.assert_close(model.patch_embed[index].proj.weight.data, kernel)
        assert model.patch_embed[index].proj.bias.equal(source.tensors["patch_embed.proj.bias"])
    assert model.cls_token.equal(source.tensors["cls_token"])
    assert model.blocks[7].mlp.fc2.weight.equal(source.tensors["blocks.7.mlp.fc2.weight"])
    assert model.pos_embed.equal(positions)
    assert set(report.kept) == {"pos_embed", "channel_embed"}
    assert report.band_init == "nearest-wavelength"
    assert "B11,B12" in report.converted["patch_embed.2.proj.weight"]
    assert len(report.matched) + len(report.converted) + len(report.kept) == len(model.state_dict())


def test_groups_to_groups_of_another_size(tmp_path: Path, group_spec: EncoderSpec) -> None:
    model = build_encoder(group_spec)
    save_encoder(tmp_path / "encoder.safetensors", model.state_dict(), group_spec)
    wanted = replace(group_spec, image_size=64, timm_args={**group_spec.timm_args, "img_size": 64})
    larger = build_encoder(wanted)
    report = load_into(larger, read_weights(tmp_path), spec=wanted)
    assert report.resampled == {"pos_embed": "6x6 to 8x8"}
    assert larger.channel_embed.equal(model.channel_embed)


def test_other_channel_groups_are_refused(tmp_path: Path, group_spec: EncoderSpec) -> None:
    save_encoder(tmp_path / "encoder.safetensors", build_encoder(group_spec).state_dict(), group_spec)
    wanted = EncoderSpec.of(
        "vit_pico",
        image_size=48,
        patch_size=8,
        sensor="sentinel-2",
        bands=("B2", "B3", "B4"),
        groups=(("B2",), ("B3", "B4")),
        normalization={},
    )
    with pytest.raises(WeightsError, match=r"B2,B3,B4,B8;B5.*the model has B2;B3,B4"):
        load_into(build_encoder(wanted), read_weights(tmp_path), spec=wanted)


def test_plain_vit_for_other_bands(source: SourceWeights) -> None:
    wanted = EncoderSpec.of(
        "vit_pico", image_size=64, patch_size=16, sensor="sentinel-2", bands=("B4", "B3", "B2", "B8"), normalization={}
    )
    model = build_encoder(wanted)
    report = load_into(model, source, spec=wanted)
    kernel = source.tensors["patch_embed.proj.weight"]
    expected = torch.cat([kernel, kernel.mean(1, keepdim=True)], dim=1) * 3 / 4
    torch.testing.assert_close(model.patch_embed.proj.weight.data, expected)
    assert report.converted == {"patch_embed.proj.weight": "rgb-by-name: R,G,B to B4,B3,B2,B8"}


def test_same_number_of_other_bands_is_converted_by_name(source: SourceWeights) -> None:
    """Three bands in another order would fit by shape: the silent mistake this loader must not make."""
    wanted = EncoderSpec.of(
        "vit_pico", image_size=64, patch_size=16, sensor="sentinel-2", bands=("B2", "B3", "B4"), normalization={}
    )
    model = build_encoder(wanted)
    load_into(model, source, spec=wanted)
    torch.testing.assert_close(model.patch_embed.proj.weight.data, source.tensors["patch_embed.proj.weight"].flip(1))


def damaged(source: SourceWeights, **changes: torch.Tensor | None) -> SourceWeights:
    names = {name.replace("__", "."): value for name, value in changes.items()}
    kept = {name: value for name, value in source.tensors.items() if name not in names}
    return replace(source, tensors=kept | {name: value for name, value in names.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cls_token": None}, r"1 missing: cls_token"),
        ({"surprise": torch.zeros(2)}, r"1 unexpected: surprise"),
        ({"norm__weight": torch.zeros(3)}, r"1 of another shape: norm.weight \(\(3,\), the model has \(128,\)\)"),
        ({"norm__bias": torch.full((128,), float("nan"))}, r"NaN or Inf: norm.bias"),
        ({"norm__bias": torch.full((128,), float("inf"))}, r"NaN or Inf: norm.bias"),
    ],
)
def test_strict(source: SourceWeights, changes: dict[str, torch.Tensor | None], message: str) -> None:
    assert source.spec is not None
    model = build_encoder(source.spec)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_into(model, damaged(source, **changes), spec=source.spec)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_every_problem_is_told_at_once(source: SourceWeights) -> None:
    assert source.spec is not None
    bad = damaged(source, cls_token=None, norm__weight=torch.zeros(3), surprise=torch.zeros(1))
    with pytest.raises(WeightsError, match=r"norm.weight.*missing: cls_token.*unexpected: surprise"):
        load_into(build_encoder(source.spec), bad, spec=source.spec)


def test_allowed_by_name(source: SourceWeights) -> None:
    assert source.spec is not None
    model = timm.create_model(source.spec.timm_name, **{**source.spec.timm_args, "num_classes": 5})
    with pytest.raises(WeightsError, match=r"2 missing: head.weight, head.bias"):
        load_into(model, source, spec=source.spec)
    extra = damaged(source, fc_norm__weight=torch.zeros(2))
    report = load_into(model, extra, spec=source.spec, allow_missing=["head.*"], allow_unexpected=["fc_norm.weight"])
    assert report.missing == ("head.weight", "head.bias")
    assert report.unexpected == ("fc_norm.weight",)
    assert "missing head.weight: left as initialized" in report.summary()
    assert report.to_dict()["matched"] == len(report.matched)


def test_nothing_fits(source: SourceWeights) -> None:
    with pytest.raises(WeightsError, match="nothing in the state dict fits"):
        load_into(build_encoder(source.spec), {"layer.weight": torch.zeros(2)})  # type: ignore[arg-type]


def test_another_architecture(source: SourceWeights, rgb_spec: EncoderSpec) -> None:
    tiny = EncoderSpec.of(
        "vit_tiny", image_size=64, patch_size=16, sensor="rgb", bands=("R", "G", "B"), normalization={}
    )
    with pytest.raises(
        WeightsError, match=r"is a vit_pico, the model a vit_tiny: width 128 instead of 192(.|\n)*--model vit_pico"
    ):
        load_into(build_encoder(tiny), source, spec=tiny)
    heads = replace(rgb_spec, heads=8, timm_args={**rgb_spec.timm_args, "num_heads": 8})
    with pytest.raises(WeightsError, match="heads 4 instead of 8"):
        load_into(build_encoder(heads), source, spec=heads)


def test_other_normalization_is_told(tmp_path: Path, group_spec: EncoderSpec, caplog: pytest.LogCaptureFixture) -> None:
    model = build_encoder(group_spec)
    save_encoder(tmp_path / "encoder.safetensors", model.state_dict(), group_spec)
    with caplog.at_level(logging.WARNING):
        load_into(model, read_weights(tmp_path), spec=group_spec)
        assert not caplog.records
        other = replace(group_spec, normalization={**group_spec.normalization, "method": "clip-float"})
        with pytest.raises(
            WeightsError, match=r"method clip-uint8, now clip-float(.|\n)*--allow-normalization-mismatch"
        ):
            load_into(model, read_weights(tmp_path), spec=other)
        assert not caplog.records
        load_into(model, read_weights(tmp_path), spec=other, allowed=Allowed(normalization=True))
    assert "another normalization than asked for: method clip-uint8, now clip-float" in caplog.text


def test_other_statistics_are_told(tmp_path: Path, group_spec: EncoderSpec) -> None:
    model = build_encoder(group_spec)
    save_encoder(tmp_path / "encoder.safetensors", model.state_dict(), group_spec)
    means = [1000.0, *group_spec.normalization["mean"][1:]]
    other = replace(group_spec, normalization={**group_spec.normalization, "mean": means})
    with pytest.raises(WeightsError, match=r"mean of B2 1184.38, now 1000"):
        load_into(model, read_weights(tmp_path), spec=other)


@pytest.mark.parametrize("bands", [("B4", "B3", "B2"), ("B4", "B3"), ("B4", "B3", "B2", "B8")])
def test_own_weights_of_other_bands(tmp_path: Path, bands: tuple[str, ...]) -> None:
    """The same bands in another order are matched by name; other bands need to be allowed."""
    sizes = {"image_size": 32, "patch_size": 8, "sensor": "sentinel-2", "normalization": {}}
    first = EncoderSpec.of("vit_pico", bands=("B2", "B3", "B4"), **sizes)
    wanted = EncoderSpec.of("vit_pico", bands=bands, **sizes)
    model = build_encoder(first)
    save_encoder(tmp_path / "encoder.safetensors", model.state_dict(), first)
    target = build_encoder(wanted)
    if len(bands) == 3:
        load_into(target, read_weights(tmp_path), spec=wanted)
        assert target.patch_embed.proj.weight.equal(model.patch_embed.proj.weight.flip(1))
        return
    with pytest.raises(WeightsError, match=r"--bands B2,B3,B4(.|\n)*--allow-band-mismatch"):
        load_into(target, read_weights(tmp_path), spec=wanted)
    report = load_into(target, read_weights(tmp_path), spec=wanted, allowed=Allowed(bands=True))
    assert report.band_init == ("rgb-by-name" if "B8" in bands else None)
    torch.testing.assert_close(
        target.patch_embed.proj.weight[:, 1], model.patch_embed.proj.weight[:, 1] * 3 / len(bands)
    )


@pytest.mark.parametrize("policy", ["mean", "nearest-wavelength", "random", "rgb-by-name"])
def test_bands_that_the_source_has_keep_their_slices(policy: str) -> None:
    kernel = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    source = [SENTINEL2.band(name) for name in ("B5", "B6", "B12")]
    other = convert_bands(kernel, source, [source[2], source[0], source[1]], policy)
    torch.testing.assert_close(other, kernel[:, [2, 0, 1]])
    more = convert_bands(kernel, source, [*source, SENTINEL2.band("B2")], policy)
    torch.testing.assert_close(more[:, :3], kernel * 3 / 4)
    assert not torch.allclose(more[:, 3], torch.zeros(4))


def test_unusual_sizes_need_the_number_of_heads(tmp_path: Path) -> None:
    model = plain_vit(embed_dim=96, depth=2, num_heads=3)
    torch.save({"model": model.state_dict()}, tmp_path / "odd.pth")
    assert read_weights(tmp_path / "odd.pth").spec is None
    with pytest.raises(WeightsError, match="how many attention heads that has does not show"):
        load_encoder(tmp_path / "odd.pth")
    encoder, spec = load_encoder(read_weights(tmp_path / "odd.pth", heads=3))
    image = torch.randn(1, 3, 64, 64)
    assert spec.heads == 3
    torch.testing.assert_close(encoder(image), model(image))


def test_unknown_bands_are_told(tmp_path: Path) -> None:
    torch.save({"model": plain_vit(in_chans=4).state_dict()}, tmp_path / "four.pth")
    with pytest.raises(WeightsError, match="takes 4 bands and does not tell which"):
        load_encoder(tmp_path / "four.pth")


@pytest.mark.parametrize(("method", "tolerance"), [("pseudo-inverse", 0.1), ("bilinear", 0.2)])
def test_a_picture_resized_along_with_the_patches_is_embedded_alike(method: str, tolerance: float) -> None:
    """For kernels and pictures without detail finer than the smaller patch."""
    coarse = torch.randn(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    fine = F.interpolate(coarse, (16, 16), mode="bicubic")
    kernel, picture = fine[:8], fine[8]
    small = F.interpolate(picture.unsqueeze(0), (8, 8), mode="bilinear", antialias=True)[0]
    before, after = (kernel * picture).sum((1, 2, 3)), (resample_kernel(kernel, 8, method) * small).sum((1, 2, 3))
    torch.testing.assert_close(after, before, rtol=0, atol=tolerance * float(before.abs().max()))


def test_resizing_patches_bilinearly_is_recorded(source: SourceWeights, rgb_spec: EncoderSpec) -> None:
    sizes = {"image_size": 48, "patch_size": 8, "sensor": "rgb", "bands": ("R", "G", "B")}
    wanted = EncoderSpec.of("vit_pico", normalization=rgb_spec.normalization, **sizes)
    model = build_encoder(wanted)
    report = load_into(model, source, spec=wanted, patch_resize="bilinear")
    assert report.patch_resize == "bilinear"
    expected = resample_kernel(source.tensors["patch_embed.proj.weight"], 8, "bilinear")
    torch.testing.assert_close(model.patch_embed.proj.weight.data, expected)


def test_style_is_not_dropped(tmp_path: Path, rgb_spec: EncoderSpec) -> None:
    torch.save(random_state(128, 8, patch=16, grid=4), tmp_path / "dinov2.pth")
    source = read_weights(tmp_path / "dinov2.pth", heads=4)
    with pytest.raises(WeightsError, match="another style than the model: layer scale True instead of False"):
        load_into(build_encoder(rgb_spec), source, spec=rgb_spec)


def test_decoder_of_meta(source: SourceWeights) -> None:
    decoder = MAEDecoder(128, (4, 4), 16, None, 3, width=64, depth=2, heads=4)
    report = load_decoder_into(decoder, source, spec=source.spec)
    assert len(report.matched) == len(decoder.state_dict())
    assert decoder.blocks[1].attn.qkv.weight.equal(source.tensors["decoder_blocks.1.attn.qkv.weight"])
    assert decoder.mask_token.equal(source.tensors["mask_token"])


def test_decoder_for_channel_groups(source: SourceWeights, group_spec: EncoderSpec) -> None:
    decoder = MAEDecoder(
        128, (6, 6), 8, group_spec.timm_args["groups"], 10, width=64, depth=2, heads=4, channel_width=16
    )
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    report = load_decoder_into(decoder, source, spec=group_spec)
    new = {"pos_embed", "channel_embed", *(f"pred.{group}.{part}" for group in range(3) for part in ("weight", "bias"))}
    assert set(report.kept) == new
    assert all(decoder.state_dict()[name].equal(before[name]) for name in new)
    assert decoder.embed.weight.equal(source.tensors["decoder_embed.weight"])


def test_own_decoder_round_trip(tmp_path: Path, group_spec: EncoderSpec) -> None:
    sizes = {"width": 64, "depth": 1, "heads": 4, "channel_width": 16}
    decoder = MAEDecoder(128, (6, 6), 8, group_spec.timm_args["groups"], 10, **sizes)
    save_encoder(tmp_path / "encoder.safetensors", build_encoder(group_spec).state_dict(), group_spec, step=4)
    save_decoder(tmp_path / "decoder.safetensors", decoder.state_dict(), group_spec, sizes, step=4)
    source = read_weights(tmp_path)
    assert source.decoder == sizes
    assert source.step == 4
    other = MAEDecoder(128, (6, 6), 8, group_spec.timm_args["groups"], 10, **sizes)
    report = load_decoder_into(other, source, spec=group_spec)
    assert not report.kept
    assert all(value.equal(decoder.state_dict()[name]) for name, value in other.state_dict().items())


def test_no_decoder(tmp_path: Path) -> None:
    torch.save(meta_mae(decoder=False), tmp_path / "mae_pretrain.pth")
    with pytest.raises(WeightsError, match="has no decoder"):
        load_decoder_into(
            MAEDecoder(128, (4, 4), 16, None, 3, width=64, depth=2, heads=4),
            read_weights(tmp_path / "mae_pretrain.pth"),
        )


def test_decoder_of_another_size(source: SourceWeights) -> None:
    with pytest.raises(WeightsError, match=r"the decoder of .*of another shape"):
        load_decoder_into(MAEDecoder(128, (4, 4), 16, None, 3, width=32, depth=2, heads=4), source, spec=source.spec)
