"""Segmentation of any ViT with every head: sizes, alignment, no checkerboard, gradients, and what it computes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from geoexplora.errors import ConfigError
from geoexplora.models.pyramid import feature_maps
from geoexplora.models.segmentation import SegmentationModel
from geoexplora.models.segmentation_heads import build_head

HEADS = ("linear", "upernet", "dpt")
GROUPS = ((2, 0), (1, 3, 5), (4,))
SIZES = {"embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 0, "dynamic_img_size": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True, "init_values": 1.0}),
    "pooled norm": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "groups": ("group_channel_vit_base", {"groups": GROUPS, "channel_width": 8}),
    "groups, pooled norm": (
        "group_channel_vit_base",
        {"groups": GROUPS, "channel_width": 8, "global_pool": "avg", "class_token_encoding": True},
    ),
}


def build_encoder(kind: str = "plain", patch: int = 4, side: int = 16, **kwargs: Any) -> Any:
    name, settings = KINDS[kind]
    return timm.create_model(name, **(SIZES | {"patch_size": patch, "img_size": side} | settings | kwargs))


def build(head: Any = "linear", kind: str = "plain", seed: int = 0, **kwargs: Any) -> Any:
    """A model with every weight random, those that start as 0 or 1 too."""
    torch.manual_seed(seed)
    settings = {key: kwargs.pop(key) for key in ("levels", "group_features", "num_classes") if key in kwargs}
    model = SegmentationModel(
        build_encoder(kind, **kwargs), **({"num_classes": 3} | settings), head=head, width=8  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images_for(model: Any, height: int = 16, width: int = 16, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, model.encoder.in_chans, height, width, generator=generator)


# Sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("kind", "group_features"), [("plain", "mean"), ("groups", "mean"), ("groups", "concat")])
@pytest.mark.parametrize("patch", [4, 8, 14, 16])
@torch.no_grad()
def test_output_has_the_size_of_the_input(head: str, kind: str, group_features: str, patch: int) -> None:
    model = build(head, kind, patch=patch, side=2 * patch, group_features=group_features)
    sizes = [(2 * patch, 2 * patch), (3 * patch, 2 * patch), (patch, patch), (2 * patch + 1, 3 * patch - 1), (3, 5)]
    for size in sizes:
        logits = model(images_for(model, *size))
        assert logits.shape == (2, 3, *size)
        assert logits.isfinite().all()


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_odd_sizes_are_filled_up_by_the_edge_and_cut(head: str) -> None:
    model = build(head)
    images = images_for(model, 13, 10)
    filled = torch.from_numpy(np.pad(images.numpy(), ((0, 0), (0, 0), (0, 3), (0, 2)), mode="edge"))
    assert model(images).equal(model(filled)[:, :, :13, :10])


@torch.no_grad()
def test_an_encoder_of_one_size() -> None:
    model = build(side=16, dynamic_img_size=False)
    assert model(images_for(model)).shape == (2, 3, 16, 16)
    assert model(images_for(model, 15, 14)).shape == (2, 3, 15, 14)
    with pytest.raises(
        ConfigError, match=r"images of 24 x 15 px do not fit an encoder for 16 x 16 px\n.*dynamic_img_si"
    ):
        model(images_for(model, 24, 15))
    sized = build(side=16)
    sized.load_state_dict(model.state_dict())
    assert sized(images_for(model)).equal(model(images_for(model)))


# What it computes ---------------------------------------------------------------------------------------------------


def slow_bilinear(x: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """Bilinear interpolation between pixel centres (K, h, w) -> (K, height, width), pixel by pixel."""
    _, rows, columns = x.shape
    out = np.zeros((len(x), height, width))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
            z = min(max((j + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = math.floor(y), math.floor(z)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            a, b = y - top, z - left
            upper = (1 - b) * x[:, top, left] + b * x[:, top, right]
            lower = (1 - b) * x[:, bottom, left] + b * x[:, bottom, right]
            out[:, i, j] = (1 - a) * upper + a * lower
    return out


@pytest.mark.parametrize(("kind", "group_features"), [("registers", "mean"), ("groups", "mean"), ("groups", "concat")])
@pytest.mark.parametrize("levels", [None, (2,), (1, 3)])
@torch.no_grad()
def test_linear_against_a_loop(kind: str, group_features: str, levels: Any) -> None:
    model = build("linear", kind, levels=levels, group_features=group_features).double()
    encoder, images = model.encoder, images_for(model, 12, 8).double()
    x = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))
    taken = []
    for number, block in enumerate(encoder.blocks, start=1):
        x = block(x)
        if number in (levels or (1, 2, 3, 4)):
            taken.append(encoder.norm(x)[:, encoder.num_prefix_tokens :])
    weight, bias = model.head.classifier.weight[..., 0, 0], model.head.classifier.bias
    logits = model(images)
    for sample in range(2):
        scores = np.zeros((3, 3, 2))
        for row in range(3):
            for column in range(2):
                features = []
                for tokens in taken:
                    own = [tokens[sample, 6 * g + 2 * row + column] for g in range(getattr(encoder, "num_groups", 1))]
                    features += own if group_features == "concat" else [sum(own) / len(own)]
                scores[:, row, column] = weight @ torch.cat(features) + bias
        np.testing.assert_allclose(logits[sample].numpy(), slow_bilinear(scores, 12, 8), atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
@torch.no_grad()
def test_nothing_is_shifted(head: Any, grid: tuple[int, int]) -> None:
    """With symmetric kernels, mirrored features give mirrored scores, on grids of odd sides too."""
    torch.manual_seed(0)
    made = build_head(head, 6, 4, 3, 8).double().eval()
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_((module.weight + module.weight.flip(2)) / 2)
            module.weight.copy_((module.weight + module.weight.flip(3)) / 2)
    features = [torch.randn(2, 6, *grid).double() for _ in range(4)]
    scores = made(features)
    for side in (2, 3):
        torch.testing.assert_close(made([x.flip(side) for x in features]).flip(side), scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("head", "scale"), [("linear", 1), ("upernet", 4), ("dpt", 4)])
@torch.no_grad()
def test_heads_end_at_their_finest_map(head: Any, scale: int) -> None:
    features = [torch.randn(2, 6, 5, 3) for _ in range(4)]
    assert build_head(head, 6, 4, 7, 8)(features).shape == (2, 7, scale * 5, scale * 3)


# No checkerboard ----------------------------------------------------------------------------------------------------


def unevenness(made: nn.Module, border: int) -> float:
    """The largest difference between interior pixels where all positions are alike; scores are around 1."""
    generator = torch.Generator().manual_seed(4)
    features = [torch.randn(1, 6, 1, 1, generator=generator).expand(1, 6, 36, 36) for _ in range(4)]
    with torch.no_grad():
        scores = made(features)
        scores = F.interpolate(scores, (36 * 8, 36 * 8), mode="bilinear", align_corners=False)
    inner = scores[..., 8 * border : -8 * border, 8 * border : -8 * border].flatten(2)
    assert inner.abs().max() > 0.1
    return float((inner.amax(2) - inner.amin(2)).max())


@pytest.mark.parametrize(("head", "border"), [("linear", 1), ("upernet", 8), ("dpt", 15)])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_checkerboard(head: Any, border: int, seed: int) -> None:
    """Zeros around the maps reach as far as the convolutions do: that far no further."""
    torch.manual_seed(seed)
    made = build_head(head, 6, 4, 3, 8).eval()
    nn.init.normal_(made.classifier.weight, std=0.5)
    assert unevenness(made, border) < 1e-5
    assert not [module for module in made.modules() if isinstance(module, nn.ConvTranspose2d)]


def test_transposed_convolutions_would_be_seen() -> None:
    """Segmentation-models-pytorch's own DPT decoder has them."""
    torch.manual_seed(0)
    decoder = DPTDecoder([6] * 4, [16] * 4, False, "ignore", [8] * 4, 8).eval()
    prefix: list[Tensor | None] = [None] * 4

    class Own(nn.Module):
        def forward(self, features: list[Tensor]) -> Tensor:
            return decoder(features, prefix)

    assert unevenness(Own(), 15) > 0.01


# Training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [None, (4,), (1,), (1, 3)])
def test_gradients_reach_every_trainable_parameter(head: str, kind: str, levels: Any) -> None:
    model = build(head, kind, levels=levels).train()
    images = images_for(model, 12, 8)
    F.cross_entropy(model(images), torch.randint(3, (2, 12, 8))).backward()
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert [name for name, value in trainable.items() if value.grad is None or not value.grad.any()] == []
    last = levels[-1] if levels else 4
    frozen = {name.split(".")[2] for name, _ in model.named_parameters() if name not in trainable}
    assert frozen == {str(number) for number in range(last, 4)}


@pytest.mark.parametrize(("settings", "unused"), [({"num_classes": 7}, "head"), ({"global_pool": "map"}, "attn_pool")])
def test_what_comes_behind_the_levels_is_frozen_and_may_be_again(settings: dict[str, Any], unused: str) -> None:
    encoder = build_encoder(**settings)
    model = SegmentationModel(encoder, 3, levels=(2,))
    frozen = {name for name, value in encoder.named_parameters() if not value.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"blocks", unused}
    assert {name.split(".")[1] for name in frozen if name.startswith("blocks")} == {"2", "3"}
    encoder.requires_grad_(True)
    model.freeze_unused()
    assert {name for name, value in encoder.named_parameters() if not value.requires_grad} == frozen


@pytest.mark.parametrize("head", HEADS)
def test_a_frozen_encoder_has_no_graph(head: str) -> None:
    model = build(head)
    model.encoder.requires_grad_(False)
    before = {key: value.clone() for key, value in model.encoder.state_dict().items()}
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    model(images_for(model)).square().mean().backward()
    optimizer.step()
    assert len(seen) == 4
    assert not any(x.requires_grad for x in seen)
    assert all(value.equal(before[key]) for key, value in model.encoder.state_dict().items())
    assert all(value.grad is None for value in model.encoder.parameters())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("side", [4, 16])
def test_training_with_a_batch_of_one_is_as_evaluation(head: str, side: int) -> None:
    """Even where a map is one pixel; nothing depends on the batch."""
    model = build(head)
    images = images_for(model, side, side)
    together = model(images)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(model(images[:1]), together[:1])
    assert not [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]


@pytest.mark.parametrize("head", HEADS)
def test_scores_start_small_and_without_a_preference(head: str) -> None:
    torch.manual_seed(0)
    model = SegmentationModel(build_encoder(), 5, head=head)  # type: ignore[arg-type]
    assert not model.head.classifier.bias.any()
    loss = F.cross_entropy(model(images_for(model)), torch.randint(5, (2, 16, 16)))
    assert loss.item() == pytest.approx(math.log(5), abs=0.1)


def slanted(batch: int = 4, side: int = 32) -> tuple[Tensor, Tensor]:
    """Images of two classes that meet in slanted lines, which no patch's border follows, with noise."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    offsets = torch.randint(8, 24, (batch, 1, 1), generator=generator)
    masks = (rows + 0.4 * columns - 6 > offsets).long()
    images = (2.0 * masks - 1).unsqueeze(1) + 0.3 * torch.randn(batch, 3, side, side, generator=generator)
    return images, masks


@pytest.mark.parametrize("head", HEADS)
def test_learns(head: Any) -> None:
    torch.manual_seed(0)
    images, masks = slanted()
    model = SegmentationModel(build_encoder(side=32), 2, head=head, width=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images), masks).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model.eval()(images).argmax(1) == masks).float().mean()
    assert accuracy > 0.95


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["plain", "groups"])
def test_bf16_autocast(head: str, kind: str) -> None:
    model = build(head, kind).train()
    images = images_for(model, 13, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
        loss = F.cross_entropy(logits, torch.zeros(2, 13, 16, dtype=torch.long))
    loss.backward()
    assert logits.shape == (2, 3, 13, 16)
    assert loss.isfinite()
    assert all(value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_state_dict_round_trip(head: str) -> None:
    model, other = build(head, "groups"), build(head, "groups", seed=1)
    images = images_for(model)
    assert not other(images).equal(model(images))
    assert {key.split(".")[0] for key in model.state_dict()} == {"encoder", "head"}
    other.load_state_dict(model.state_dict(), strict=True)
    assert other(images).equal(model(images))


@torch.no_grad()
def test_the_encoder_is_shared_and_keeps_its_own_ways() -> None:
    encoder = build_encoder("groups", grid_features="mean")
    models = [SegmentationModel(encoder, 3, group_features=way) for way in ("concat", "mean")]  # type: ignore[arg-type]
    images = images_for(models[0])
    own = encoder.forward_intermediates(images, norm=True, intermediates_only=True)
    assert all(model(images).shape == (2, 3, 16, 16) for model in models)
    assert all(model.encoder is encoder for model in models)
    assert [model.head.classifier.in_channels for model in models] == [4 * 3 * 32, 4 * 32]
    for a, b in zip(feature_maps(encoder, images, (1, 2, 3, 4)), own, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"head": "fcn"}, "unknown segmentation head 'fcn'\nChoose among linear, upernet, dpt."),
        ({"group_features": "sum"}, "unknown group_features 'sum'"),
        ({"levels": (5,)}, "level 5 is out of range: the model has 4 blocks"),
        ({"levels": (2, 1)}, r"levels \[2, 1\] are not rising"),
        ({"num_classes": 0}, "cannot tell 0 classes"),
        ({"width": 0}, "with a head 0 wide"),
        ({"head": "dpt", "levels": (1, 2, 3, 4, 5), "depth": 5}, "4 scales cannot use 5 levels"),
        ({"head": "upernet", "levels": (1, 2, 3, 4, 5), "depth": 5}, "4 scales cannot use 5 levels"),
    ],
)
def test_bad_settings(settings: dict[str, Any], text: str) -> None:
    depth = settings.pop("depth", 4)
    with pytest.raises(ConfigError, match=text):
        SegmentationModel(build_encoder(depth=depth), **({"num_classes": 3} | settings))


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_shallow_encoders(head: str, depth: int) -> None:
    model = build(head, depth=depth)
    assert len(model.levels) == min(depth, 4)
    assert model(images_for(model)).shape == (2, 3, 16, 16)
