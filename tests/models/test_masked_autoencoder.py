"""Masked autoencoders against a slow one written from the papers, one sample, head and token at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from geoexplora.models import MAEDecoder, MaskedAutoencoder
from geoexplora.models.embeddings import sincos_2d
from geoexplora.models.linear import use_fast_linears
from geoexplora.objectives.mae import mae_loss
from geoexplora.objectives.masking import mask_from_noise

GROUPS = ((2, 0), (1, 3, 5), (4,))
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def randomized(model: MaskedAutoencoder) -> MaskedAutoencoder:
    """Every tensor random, encodings too, so that none can be left out unseen."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def plain(image: int = 12, patch: int = 4, bands: int = 3, **kwargs: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = timm.create_model(
        "vit_tiny_patch16_224", img_size=image, patch_size=patch, in_chans=bands, embed_dim=16, depth=2, num_heads=2,
        num_classes=0, **kwargs,
    )  # fmt: skip
    decoder = MAEDecoder(16, (image // patch, image // patch), patch, None, bands, width=12, depth=1, heads=3)
    return randomized(MaskedAutoencoder(encoder, decoder))


def grouped(groups: Any = GROUPS, image: int = 12, patch: int = 4, **kwargs: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = timm.create_model(
        "group_channel_vit_base", groups=groups, channel_width=4, img_size=image, patch_size=patch, embed_dim=16,
        depth=2, num_heads=2, num_classes=0, **kwargs,
    )  # fmt: skip
    grid, bands = (image // patch, image // patch), sum(map(len, groups))
    decoder = MAEDecoder(16, grid, patch, groups, bands, width=12, depth=1, heads=3, channel_width=4)
    return randomized(MaskedAutoencoder(encoder, decoder))


def inputs(model: MaskedAutoencoder, ratio: float = 0.6, spatial: bool = False) -> tuple[Tensor, Any]:
    decoder, groups = model.decoder, len(model.decoder.group_sizes)
    side = round(decoder.positions**0.5) * decoder.patch_size
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, decoder.in_chans, side, side, generator=generator, dtype=torch.float64)
    count = decoder.positions * (1 if spatial else groups)
    noise = torch.rand(2, count, generator=generator, dtype=torch.float64)
    return images, mask_from_noise(noise, ratio, groups, spatial)


# The slow model: written from He et al. 2022 and SatMAE 2022.


def slow_attention(attention: Any, tokens: list[Tensor]) -> list[Tensor]:
    width, heads = tokens[0].numel(), attention.num_heads
    size = width // heads
    rows = [attention.qkv.weight @ token + attention.qkv.bias for token in tokens]
    result = []
    for row in rows:
        heads_out = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            query = row[:width][part]
            scores = torch.stack([query @ other[width : 2 * width][part] / math.sqrt(size) for other in rows])
            weights = scores.softmax(0)
            heads_out.append(sum(w * other[2 * width :][part] for w, other in zip(weights, rows, strict=True)))
        result.append(attention.proj.weight @ torch.cat(heads_out) + attention.proj.bias)
    return result


def slow_norm(norm: nn.LayerNorm, token: Tensor) -> Tensor:
    centred = token - token.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * norm.weight + norm.bias


def slow_block(block: Any, tokens: list[Tensor]) -> list[Tensor]:
    attended = slow_attention(block.attn, [slow_norm(block.norm1, token) for token in tokens])
    tokens = [token + other for token, other in zip(tokens, attended, strict=True)]
    result = []
    for token in tokens:
        hidden = block.mlp.fc1.weight @ slow_norm(block.norm2, token) + block.mlp.fc1.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        result.append(token + block.mlp.fc2.weight @ hidden + block.mlp.fc2.bias)
    return result


def slow_encoder(model: MaskedAutoencoder, image: Tensor, keep: list[int]) -> list[Tensor]:
    encoder, patch = model.encoder, model.decoder.patch_size
    columns = image.shape[-1] // patch
    groups = model.decoder.groups
    first = encoder.cls_token[0, 0] + (encoder.pos_embed[0, 0] if groups is None else 0)
    tokens = [first]
    for index in keep:
        group, position = divmod(index, model.decoder.positions)
        top, left = patch * (position // columns), patch * (position % columns)
        pixels = image[:, top : top + patch, left : left + patch]
        projection = encoder.patch_embed.proj if groups is None else encoder.patch_embed[group].proj
        pixels = pixels if groups is None else pixels[list(groups[group])]
        encoding = encoder.pos_embed[0, 1 + position]
        if groups is not None:
            encoding = torch.cat([encoding, encoder.channel_embed[0, group]])
        tokens.append(projection.weight.flatten(1) @ pixels.flatten() + projection.bias + encoding)
    for block in encoder.blocks:
        tokens = slow_block(block, tokens)
    return [slow_norm(encoder.norm, token) for token in tokens]


def slow_decoder(model: MaskedAutoencoder, latent: list[Tensor], keep: list[int]) -> list[Tensor]:
    """The head's raw output for each of the N tokens."""
    decoder = model.decoder
    embedded = [decoder.embed.weight @ token + decoder.embed.bias for token in latent]
    groups = 1 if decoder.groups is None else len(decoder.groups)
    tokens = [embedded[0]]
    for index in range(groups * decoder.positions):
        tokens.append(embedded[1 + keep.index(index)] if index in keep else decoder.mask_token[0, 0])
    for number in range(len(tokens)):
        group, position = divmod(number - 1, decoder.positions) if number else (groups, -1)
        encoding = decoder.pos_embed[0, 1 + position]
        if decoder.groups is not None:
            encoding = torch.cat([encoding, decoder.channel_embed[0, group]])
        tokens[number] = tokens[number] + encoding
    for block in decoder.blocks:
        tokens = slow_block(block, tokens)
    outputs = []
    for number, token in enumerate(tokens[1:]):
        head = decoder.pred if decoder.groups is None else decoder.pred[number // decoder.positions]
        outputs.append(head.weight @ slow_norm(decoder.norm, token) + head.bias)
    return outputs


BUILDS = {
    "plain": plain,
    "plain, 5 bands, patch 2": lambda: plain(8, 2, 5),
    "groups": grouped,
    "groups of one band": lambda: grouped(((1,), (0,)), 8, 4),
    "one group, patch 2": lambda: grouped(((1, 0, 2),), 8, 2),
}


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("name", BUILDS)
def test_against_the_slow_model(name: str, spatial: bool) -> None:
    model = BUILDS[name]()
    images, mask = inputs(model, spatial=spatial)
    decoder = model.decoder
    with torch.no_grad():
        output = model(images, mask.keep)
        for sample, image in enumerate(images):
            keep = mask.keep[sample].tolist()
            latent = slow_encoder(model, image, keep)
            torch.testing.assert_close(output.latent[sample], torch.stack(latent), **EXACT)
            raw = slow_decoder(model, latent, keep)
            pixels = decoder.patch_size**2
            predicted = 0
            for group, size in enumerate(decoder.group_sizes):
                for member in range(size):
                    for position in range(decoder.positions):
                        row = raw[group * decoder.positions + position]
                        # Meta's plain decoder: channels last. Channel groups: channel by channel.
                        own = row[member::size] if decoder.groups is None else row[pixels * member :][:pixels]
                        torch.testing.assert_close(output.pred[sample, predicted, position], own, **EXACT)
                    predicted += 1


@pytest.mark.parametrize("norm_pix", [False, True])
def test_plain_loss_in_the_published_layout(norm_pix: bool) -> None:
    """He et al.: predictions (L, P*P*3), pixel by pixel with channels last, compared with patches cut the same way."""
    model = plain()
    images, mask = inputs(model)
    decoder, patch = model.decoder, model.decoder.patch_size
    raw: list[Tensor] = []
    decoder.pred.register_forward_hook(lambda *call: raw.append(call[2]))
    with torch.no_grad():
        output = model(images, mask.keep)
        total, count = 0.0, 0
        for sample, image in enumerate(images):
            for position in range(decoder.positions):
                if not mask.removed[sample, 0, position]:
                    continue
                top, left = patch * (position // 3), patch * (position % 3)
                target = torch.stack(
                    [image[c, top + y, left + x] for y in range(patch) for x in range(patch) for c in range(3)]
                )
                if norm_pix:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                total += (raw[0][sample, position] - target).square().mean()
                count += 1
        loss = mae_loss(output.pred, images, mask.removed, decoder.channel_order, decoder.group_sizes, norm_pix)
    torch.testing.assert_close(loss, total / count, **EXACT)


@pytest.mark.parametrize("build", [plain, grouped])
def test_only_visible_pixels_reach_the_latent(build: Any) -> None:
    model = build()
    images, mask = inputs(model)
    decoder, patch = model.decoder, model.decoder.patch_size
    columns = images.shape[-1] // patch
    groups = decoder.groups or (tuple(range(decoder.in_chans)),)
    with torch.no_grad():
        before = model(images, mask.keep)
        hidden, visible = images.clone(), images.clone()
        for sample, group, position in mask.removed.nonzero().tolist():
            top, left = patch * (position // columns), patch * (position % columns)
            for band in groups[group]:
                hidden[sample, band, top : top + patch, left : left + patch] = 1e3
        after = model(hidden, mask.keep)
        assert after.latent.equal(before.latent)
        assert after.pred.equal(before.pred)
        group, position = divmod(int(mask.keep[0, 0]), decoder.positions)
        visible[0, groups[group][0], patch * (position // columns), patch * (position % columns)] += 1
        after = model(visible, mask.keep)
        assert not torch.allclose(after.latent[0], before.latent[0])
        assert after.latent[1].equal(before.latent[1])


@pytest.mark.parametrize("build", [plain, grouped])
def test_only_visible_tokens_are_computed(build: Any) -> None:
    model = build()
    images, mask = inputs(model)
    seen = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    latent = model(images, mask.keep).latent
    assert seen == [1 + mask.keep.shape[1]]
    assert latent.shape[1] == seen[0]


@pytest.mark.parametrize("build", [plain, grouped])
def test_all_visible_equals_forward_features(build: Any) -> None:
    model = build().eval()
    images, _ = inputs(model)
    groups = len(model.decoder.group_sizes)
    keep = torch.arange(groups * model.decoder.positions).expand(2, -1)
    torch.testing.assert_close(model.encode(images, keep), model.encoder.forward_features(images), **EXACT)


@pytest.mark.parametrize("build", [plain, grouped])
def test_the_order_of_visible_tokens_does_not_matter(build: Any) -> None:
    model = build()
    images, mask = inputs(model)
    output, turned = model(images, mask.keep), model(images, mask.keep.flip(1))
    torch.testing.assert_close(turned.pred, output.pred, **EXACT)
    torch.testing.assert_close(turned.latent[:, 1:].flip(1), output.latent[:, 1:], **EXACT)


@pytest.mark.parametrize("build", [plain, grouped])
def test_gradient_checkpointing_changes_nothing(build: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        model.encoder.set_grad_checkpointing(checkpointing)
        calls: list[int] = []
        model.encoder.blocks[0].attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        images, mask = inputs(model)
        output = model(images, mask.keep)
        decoder = model.decoder
        mae_loss(output.pred, images, mask.removed, decoder.channel_order, decoder.group_sizes).backward()
        assert len(calls) == 1 + checkpointing
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.equal(gradients[1][name]), name


def test_every_trainable_tensor_gets_a_gradient() -> None:
    """A parameter left out would break training on several processes."""
    for build in (plain, grouped):
        model = build()
        images, mask = inputs(model)
        decoder = model.decoder
        output = model(images, mask.keep)
        mae_loss(output.pred, images, mask.removed, decoder.channel_order, decoder.group_sizes).backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        assert decoder.pos_embed.grad is None


@pytest.mark.parametrize("build", [plain, grouped])
def test_fast_linears_and_bf16(build: Any) -> None:
    model = build().float()
    images, mask = inputs(model)
    images = images.float()
    expected = model(images, mask.keep)
    use_fast_linears(model)
    output = model(images, mask.keep)
    torch.testing.assert_close(output.pred, expected.pred, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, mask.keep)
    torch.testing.assert_close(half.pred.float(), expected.pred, rtol=0.1, atol=0.1)
    half.pred.float().square().mean().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int) -> None:
    model = use_fast_linears(grouped().float())
    images, mask = inputs(model)
    output = model(images[:batch].float(), mask.keep[:batch])
    assert output.pred.shape == (batch, 6, 9, 16)
    output.pred.sum().backward()


def test_register_tokens_see_the_image_and_are_not_decoded() -> None:
    model = grouped(reg_tokens=2)
    images, keep = torch.randn(2, model.encoder.in_chans, 12, 12).double(), torch.tensor([[0, 3, 5], [1, 2, 7]])
    latent = model.encode(images, keep)
    assert latent.shape[1] == 1 + 3
    with torch.no_grad():
        model.encoder.reg_token.add_(torch.randn_like(model.encoder.reg_token))
    assert not torch.allclose(model.encode(images, keep), latent)


def test_an_encoder_without_class_token_is_refused() -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="needs an encoder with a class token"):
        MaskedAutoencoder(encoder, plain().decoder)


def test_channel_order_and_group_sizes() -> None:
    assert grouped().decoder.channel_order == (2, 0, 1, 3, 5, 4)
    assert grouped().decoder.group_sizes == (2, 3, 1)
    assert plain().decoder.channel_order == (0, 1, 2)
    assert plain().decoder.group_sizes == (3,)


def test_decoder_state_has_the_published_names() -> None:
    """Meta's ``mae_visualize`` files and SatMAE's, without ``decoder_``."""
    names = set(plain().decoder.state_dict())
    assert {"mask_token", "pos_embed", "embed.weight", "norm.bias", "pred.weight", "blocks.0.attn.qkv.bias"} <= names
    assert "channel_embed" not in names
    assert {"channel_embed", "pred.0.weight", "pred.2.bias"} <= set(grouped().decoder.state_dict())


def test_group_encoding_of_the_class_token_follows_the_last_group() -> None:
    decoder = MAEDecoder(16, (2, 2), 4, GROUPS, 6, width=16, depth=1, heads=2, channel_width=4)
    encodings = decoder.encodings()
    assert encodings.shape == (1, 1 + 3 * 4, 16)
    assert encodings[0, 0].equal(torch.cat([torch.zeros(12), decoder.channel_embed[0, 3]]))
    assert encodings[0, 1 + 4 + 2].equal(torch.cat([sincos_2d(12, (2, 2))[0, 2], decoder.channel_embed[0, 1]]))
