"""The group-channel ViT behaves as timm's feature extractors do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor

from geoexplora.errors import ConfigError, WeightsError
from geoexplora.models import GroupChannelVisionTransformer
from geoexplora.models.embeddings import sincos_1d, sincos_2d
from geoexplora.registry import MODELS

GROUPS = ((2, 0), (1, 3, 5), (4,))
NAME = "group_channel_vit_base"
SIZES = {
    "groups": GROUPS,
    "channel_width": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "img_size": 16,
    "patch_size": 4,
    "num_classes": 0,
}


def build(seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model(NAME, **(SIZES | kwargs)).eval()
    with torch.no_grad():  # no tensor is zero or constant, so that none can go missing unseen
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model() -> Iterator[Any]:
    with torch.no_grad():
        yield build()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 6, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_registered_names_on_the_meta_device(name: str) -> None:
    architecture = MODELS[name]
    assert f"group_channel_{name}" in timm.list_models("group_channel_*")
    with torch.device("meta"):
        model = timm.create_model(f"group_channel_{name}", num_classes=0)
        features = model(torch.empty(2, 10, 96, 96))
    assert isinstance(model, GroupChannelVisionTransformer)
    assert features.shape == (2, architecture.width)
    assert len(model.blocks) == architecture.depth
    assert model.blocks[0].attn.num_heads == architecture.heads
    assert model.channel_embed.shape == (1, 3, architecture.channel_width)
    assert model.pos_embed.shape == (1, 145, architecture.width - architecture.channel_width)
    assert model.patch_embed.groups == ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))


def test_published_sizes() -> None:
    """ViT-B / ViT-L of the paper: their own numbers of parameters outside embeddings are stock timm's."""
    for name in ("vit_base", "vit_large"):
        with torch.device("meta"):
            ours = timm.create_model(f"group_channel_{name}", num_classes=0)
            stock = timm.create_model(f"{name}_patch16_224", num_classes=0)
        blocks = [sum(p.numel() for p in model.blocks.parameters()) for model in (ours, stock)]
        assert blocks[0] == blocks[1]
        assert ours.blocks.state_dict().keys() == stock.blocks.state_dict().keys()


def test_pretrained_is_refused_with_the_remedy() -> None:
    with pytest.raises(WeightsError, match="load_encoder"):
        timm.create_model(NAME, pretrained=True)


def test_unknown_grid_features_are_refused() -> None:
    with pytest.raises(ValueError, match="'mean' or 'concat', not 'sum'"):
        build(grid_features="sum")


def test_a_model_without_class_token_is_refused() -> None:
    with pytest.raises(ValueError, match="class token"):
        build(class_token=False, global_pool="avg")


def test_bands_follow_from_the_groups_and_must_agree() -> None:
    assert build(in_chans=6).in_chans == build().in_chans == 6
    with pytest.raises(ValueError, match="each of the 7 input bands"):
        build(in_chans=7)


@pytest.mark.parametrize("count", [5, 7])
def test_images_of_another_number_of_bands_are_refused(model: Any, count: int) -> None:
    images = torch.randn(2, count, 16, 16)
    for run in (model, model.forward_intermediates, build(dynamic_img_size=True)):
        with pytest.raises(ConfigError, match=f"takes 6 bands, got {count}"):
            run(images)


def test_tokens_and_encodings_against_a_loop(model: Any, images: Tensor) -> None:
    """Group by group, positions row by row; [position | group]; the class token without an encoding."""
    tokens = model._pos_embed(model.patch_embed(images))
    assert tokens.shape == (2, 1 + 3 * 16, 32)
    for sample, image in enumerate(images):
        assert tokens[sample, 0].equal(model.cls_token[0, 0])
        for g, group in enumerate(GROUPS):
            for position in range(16):
                top, left = 4 * (position // 4), 4 * (position % 4)
                patch = image[list(group), top : top + 4, left : left + 4]
                projection = model.patch_embed[g].proj
                expected = projection.weight.flatten(1) @ patch.flatten() + projection.bias
                expected = expected + torch.cat([model.pos_embed[0, 1 + position], model.channel_embed[0, g]])
                torch.testing.assert_close(tokens[sample, 1 + 16 * g + position], expected)


def test_class_token_encoding(images: Tensor) -> None:
    model = build(class_token_encoding=True)
    assert "channel_cls_embed" in model.state_dict()
    first = model._pos_embed(model.patch_embed(images))[0, 0]
    encoding = torch.cat([model.pos_embed[0, 0], model.channel_cls_embed[0, 0]])
    torch.testing.assert_close(first, model.cls_token[0, 0] + encoding)


def test_initial_encodings() -> None:
    model = timm.create_model(NAME, **SIZES)
    assert model.pos_embed.equal(sincos_2d(24, (4, 4), 1))
    assert model.channel_embed[0].equal(sincos_1d(8, torch.arange(3)).float())


def test_the_order_of_bands_in_a_group_matters(model: Any, images: Tensor) -> None:
    swapped = build(groups=((0, 2), *GROUPS[1:]))
    assert not torch.allclose(swapped(images), model(images))
    swapped.patch_embed[0].proj.weight.copy_(model.patch_embed[0].proj.weight.flip(1))
    torch.testing.assert_close(swapped(images), model(images))


def test_one_group_without_a_channel_part_is_a_plain_vit(images: Tensor) -> None:
    """With a single group and an encoding of equal width the blocks, head and norms are stock timm's."""
    model = build(groups=(tuple(range(6)),), num_classes=3)
    plain = timm.create_model(
        "vit_base_patch16_224",
        in_chans=6,
        **{k: v for k, v in SIZES.items() if k not in {"groups", "channel_width"}} | {"num_classes": 3},
    ).eval()
    state = model.state_dict()
    encoding = torch.cat([torch.zeros(1, 1, 32), model.encodings()], dim=1)
    state = {k.replace("patch_embed.0", "patch_embed"): v for k, v in state.items() if k != "channel_embed"}
    plain.load_state_dict(state | {"pos_embed": encoding}, strict=True)
    torch.testing.assert_close(plain(images), model(images))


@pytest.mark.parametrize("pool", ["token", "avg", "max", ""])
def test_classifier_and_pooling(pool: str, images: Tensor) -> None:
    model = build(num_classes=5, global_pool=pool)
    features = model.forward_features(images)
    assert features.shape == (2, 49, 32)
    logits = model.forward_head(features)
    assert logits.shape == ((2, 49, 5) if pool == "" else (2, 5))
    assert logits.equal(model(images))
    assert model.get_classifier() is model.head
    if pool == "avg":
        pooled = model.fc_norm(features[:, 1:].mean(1))
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    if pool == "token":
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])


def test_reset_classifier(model: Any, images: Tensor) -> None:
    assert model(images).shape == (2, 32)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(images).shape == (2, 7)
    model.reset_classifier(4, "avg")
    assert model(images).shape == (2, 4)
    model.reset_classifier(0, "")
    assert model(images).equal(model.forward_features(images))


def test_intermediates_as_tokens(model: Any, images: Tensor) -> None:
    final, taken = model.forward_intermediates(images, output_fmt="NLC")
    assert final.equal(model.forward_features(images))
    assert [tokens.shape for tokens in taken] == [(2, 48, 32)] * 4
    assert model.norm(taken[-1]).equal(final[:, 1:])


@pytest.mark.parametrize("grid_features", ["mean", "concat"])
def test_intermediates_as_maps_against_a_loop(grid_features: str, images: Tensor) -> None:
    model = build(grid_features=grid_features)
    taken = model.forward_intermediates(images, intermediates_only=True)
    tokens = model.forward_intermediates(images, intermediates_only=True, output_fmt="NLC")
    for grid, sequence in zip(taken, tokens, strict=True):
        assert grid.shape == (2, 32 if grid_features == "mean" else 96, 4, 4)
        for row in range(4):
            for column in range(4):
                own = [sequence[:, 16 * g + 4 * row + column] for g in range(3)]
                expected = torch.stack(own).mean(0) if grid_features == "mean" else torch.cat(own, dim=1)
                torch.testing.assert_close(grid[:, :, row, column], expected)


@pytest.mark.parametrize("indices", [1, 2, [0, 2], [-1], (1, 3)])
@pytest.mark.parametrize("stop_early", [True, False])
def test_intermediates_by_index(model: Any, images: Tensor, indices: Any, stop_early: bool) -> None:
    everything = model.forward_intermediates(images, intermediates_only=True)
    taken = model.forward_intermediates(images, indices, intermediates_only=True, stop_early=stop_early)
    wanted = range(4)[-indices:] if isinstance(indices, int) else [i % 4 for i in indices]
    assert len(taken) == len(wanted)
    for grid, index in zip(taken, wanted, strict=True):
        assert grid.equal(everything[index])


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_prefix_tokens_norm_and_dictionary(model: Any, images: Tensor, output_fmt: str) -> None:
    final = model.forward_features(images)
    pairs = model.forward_intermediates(
        images, return_prefix_tokens=True, norm=True, output_fmt=output_fmt, intermediates_only=True
    )
    assert pairs[-1][1].equal(final[:, :1])
    taken = model.forward_intermediates(
        images, return_prefix_tokens=True, norm=True, output_fmt=output_fmt, output_dict=True
    )
    assert taken.keys() == {"image_features", "image_intermediates", "image_intermediates_prefix"}
    assert taken["image_features"].equal(final)
    for (grid, prefix), from_dict, prefix_from_dict in zip(
        pairs, taken["image_intermediates"], taken["image_intermediates_prefix"], strict=True
    ):
        assert grid.equal(from_dict)
        assert prefix.equal(prefix_from_dict)
        assert prefix.shape == (2, 1, 32)
        assert grid.shape == ((2, 32, 4, 4) if output_fmt == "NCHW" else (2, 48, 32))


def test_get_intermediate_layers(model: Any, images: Tensor) -> None:
    (grid,) = model.get_intermediate_layers(images, 1, reshape=True, norm=True)
    (tokens,) = model.get_intermediate_layers(images, 1, norm=True)
    assert tokens.equal(model.forward_features(images)[:, 1:])
    torch.testing.assert_close(grid, tokens.unflatten(1, (3, 4, 4)).mean(1).permute(0, 3, 1, 2))


def test_pruned_to_its_taps(model: Any, images: Tensor) -> None:
    expected = model.forward_intermediates(images, [1], intermediates_only=True)
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.blocks) == 2
    assert model.forward_intermediates(images, [1], intermediates_only=True)[0].equal(expected[0])


@pytest.mark.parametrize(("grid_features", "channels"), [("mean", 32), ("concat", 96)])
def test_features_only(grid_features: str, channels: int, images: Tensor) -> None:
    torch.manual_seed(0)
    extractor = timm.create_model(
        NAME, features_only=True, out_indices=(0, 3), **(SIZES | {"grid_features": grid_features})
    ).eval()
    assert extractor.feature_info.channels() == [channels] * 2
    assert extractor.feature_info.reduction() == [4, 4]
    maps = extractor(images)
    assert [grid.shape for grid in maps] == [(2, channels, 4, 4)] * 2
    expected = extractor.model.forward_intermediates(images, [0, 3], intermediates_only=True)
    assert all(grid.equal(other) for grid, other in zip(maps, expected, strict=True))


def test_set_input_size(model: Any) -> None:
    images = torch.randn(2, 6, 24, 24)
    model.pos_embed.requires_grad_(False)
    model.set_input_size(img_size=24)
    assert model.patch_embed.grid_size == (6, 6)
    assert not model.pos_embed.requires_grad
    assert model.pos_embed.shape == (1, 37, 24)
    assert model.forward_intermediates(images, intermediates_only=True)[0].shape == (2, 32, 6, 6)
    model.set_input_size(patch_size=8)
    assert model.patch_embed[1].proj.weight.shape == (32, 3, 8, 8)
    assert model(images).shape == (2, 32)
    model.set_input_size(img_size=(16, 32))
    assert model.patch_embed.grid_size == (2, 4)
    assert model(torch.randn(1, 6, 16, 32)).shape == (1, 32)


def test_set_input_size_to_the_same_changes_nothing(model: Any, images: Tensor) -> None:
    expected = model(images)
    model.set_input_size(img_size=16, patch_size=4)
    assert model(images).equal(expected)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2}, {"class_token_encoding": True}])
def test_images_of_any_size_at_the_models_own(kwargs: dict[str, Any], images: Tensor) -> None:
    fixed, dynamic = build(**kwargs), build(dynamic_img_size=True, **kwargs)
    assert fixed.state_dict().keys() == dynamic.state_dict().keys()
    assert dynamic(images).equal(fixed(images))
    for one, other in zip(
        dynamic.forward_intermediates(images, intermediates_only=True),
        fixed.forward_intermediates(images, intermediates_only=True),
        strict=True,
    ):
        assert one.equal(other)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2}, {"class_token_encoding": True}])
@pytest.mark.parametrize("size", [(8, 8), (24, 24), (12, 20), (16, 8)])
def test_images_of_any_size_equal_a_model_resampled_to_it(kwargs: dict[str, Any], size: tuple[int, int]) -> None:
    """``set_input_size`` resamples for good what ``dynamic_img_size`` resamples for a batch."""
    fixed, dynamic = build(**kwargs), build(dynamic_img_size=True, **kwargs)
    fixed.set_input_size(img_size=size)
    images = torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(dynamic(images), fixed(images))
    grid = (size[0] // 4, size[1] // 4)
    assert dynamic.encodings(grid).shape == (1, 3 * grid[0] * grid[1], 32)
    (taken,) = dynamic.forward_intermediates(images, 1, intermediates_only=True)
    assert taken.shape == (2, 32, *grid)
    torch.testing.assert_close(taken, fixed.forward_intermediates(images, 1, intermediates_only=True)[0])
    assert dynamic.pos_embed.shape[1] == 16 + dynamic.num_prefix_tokens  # the model's own stay


def test_only_the_position_part_is_resampled(model: Any) -> None:
    encodings = model.encodings((2, 3)).view(3, 6, 32)
    for group in range(3):
        assert encodings[group, :, 24:].equal(model.channel_embed[0, group].expand(6, -1))
        assert encodings[group, :, :24].equal(encodings[0, :, :24])
    assert model.encodings((4, 4)).equal(model.encodings())


def test_encodings_of_another_size_take_gradients() -> None:
    dynamic = build(dynamic_img_size=True)
    dynamic(torch.randn(2, 6, 24, 24)).square().sum().backward()
    for parameter in (dynamic.pos_embed, dynamic.channel_embed):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_patches_keep_the_grid_where_images_are_of_any_size(images: Tensor) -> None:
    fixed, dynamic = build(), build(dynamic_img_size=True)
    grid = dynamic.patch_embed(images)
    assert grid.shape == (2, 3, 4, 4, 32)
    assert grid.flatten(1, 3).equal(fixed.patch_embed(images))


def test_images_that_are_no_multiple_of_the_patch_are_refused() -> None:
    with pytest.raises(AssertionError, match="divisible by patch size"):
        build(dynamic_img_size=True)(torch.randn(2, 6, 18, 16))


def test_gradient_checkpointing_changes_nothing(images: Tensor) -> None:
    plain, checkpointed = build(num_classes=3).train(), build(num_classes=3).train()
    checkpointed.set_grad_checkpointing()
    runs: dict[Any, int] = {}
    for model in (plain, checkpointed):
        model.blocks[0].attn.register_forward_hook(lambda attn, *_: runs.update({attn: runs.get(attn, 0) + 1}))
    outputs = [model(images) for model in (plain, checkpointed)]
    assert outputs[0].equal(outputs[1])
    for output in outputs:
        output.square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert one.grad.equal(other.grad), name
    assert list(runs.values()) == [1, 2]  # run again in the backward pass
    checkpointed.set_grad_checkpointing(False)
    assert not checkpointed.grad_checkpointing


def test_no_weight_decay_names_parameters() -> None:
    model = build(class_token_encoding=True, reg_tokens=2)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_layer_decay_puts_all_embeddings_into_the_stem() -> None:
    model = build(num_classes=3, class_token_encoding=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    stem = {scale for name, scale in scales.items() if "embed" in name or name == "cls_token"}
    assert stem == {min(scales.values())}
    for number in range(4):
        assert scales[f"blocks.{number}.attn.qkv.weight"] == 2 * min(stem) * 2**number
    assert scales["head.weight"] == 1.0


def test_register_tokens(images: Tensor) -> None:
    model = build(reg_tokens=2)
    assert model.num_prefix_tokens == 3
    tokens = model._pos_embed(model.patch_embed(images))
    assert tokens.shape == (2, 3 + 48, 32)
    assert tokens[1, 1:3].equal(model.reg_token[0])
    assert model.forward_intermediates(images, intermediates_only=True)[0].shape == (2, 32, 4, 4)


def test_register_tokens_are_initialized() -> None:
    token = timm.create_model(NAME, **SIZES, reg_tokens=8).reg_token  # timm leaves it as the memory was
    assert 0.015 < token.std() < 0.025


def test_state_dict_round_trip(images: Tensor) -> None:
    one, other = build(0), build(1)
    assert not torch.allclose(one(images), other(images))
    other.load_state_dict(one.state_dict(), strict=True)
    assert one(images).equal(other(images))
