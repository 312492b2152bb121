"""Exact agreement, in float64, with the numbers in ``tests/data/parity`` (its README says what they are)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from geoexplora.models import GroupChannelVisionTransformer, MAEDecoder, MaskedAutoencoder
from geoexplora.objectives.mae import mae_loss
from geoexplora.objectives.masking import mask_from_noise

PARITY = Path(__file__).parents[1] / "data" / "parity"
PRETRAINING = ("satmae_group_channel", "satmae_group_channel_norm_pix")
EXACT = {"rtol": 1e-9, "atol": 1e-12}
ENCODINGS = {"pos_embed", "channel_embed"}


class Reference:
    """One file of reference numbers."""

    def __init__(self, name: str) -> None:
        arrays = np.load(PARITY / f"{name}.npz")
        self.config: dict[str, Any] = json.loads(str(arrays["config"]))
        self.values = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "config"}
        state = {key.removeprefix("state."): value for key, value in self.values.items() if key.startswith("state.")}
        self.decoder = {key.removeprefix("decoder_"): value for key, value in state.items() if _of_decoder(key)}
        self.encoder = {key: value for key, value in state.items() if not _of_decoder(key)}

    def __getitem__(self, key: str) -> Tensor:
        return self.values[key]

    def build_encoder(self, **kwargs: Any) -> GroupChannelVisionTransformer:
        c = self.config
        return GroupChannelVisionTransformer(
            groups=c["channel_groups"],
            channel_width=c["channel_embed_dim"],
            img_size=c["image_size"],
            patch_size=c["patch_size"],
            embed_dim=c["embed_dim"],
            depth=c["depth"],
            num_heads=c["num_heads"],
            mlp_ratio=c["mlp_ratio"],
            **kwargs,
        ).double()

    def build(self) -> MaskedAutoencoder:
        c = self.config
        encoder = self.build_encoder(num_classes=0)
        decoder = MAEDecoder(
            c["embed_dim"],
            encoder.patch_embed.grid_size,
            c["patch_size"],
            c["channel_groups"],
            10,
            width=c["decoder_embed_dim"],
            depth=c["decoder_depth"],
            heads=c["decoder_num_heads"],
            channel_width=c["decoder_channel_embed_dim"],
            mlp_ratio=c["mlp_ratio"],
        ).double()
        return MaskedAutoencoder(encoder, decoder)

    def load(self) -> MaskedAutoencoder:
        model = self.build()
        model.encoder.load_state_dict(self.encoder, strict=True)
        model.decoder.load_state_dict(self.decoder, strict=True)
        for name in ENCODINGS:
            getattr(model.encoder, name).requires_grad_(False)
        return model


def _of_decoder(key: str) -> bool:
    return key.startswith("decoder_") or key == "mask_token"


@pytest.fixture(params=PRETRAINING)
def reference(request: pytest.FixtureRequest) -> Reference:
    return Reference(request.param)


def forward(reference: Reference, model: MaskedAutoencoder) -> tuple[Any, Any]:
    groups = len(reference.config["channel_groups"])
    mask = mask_from_noise(reference["input.noise"], reference.config["mask_ratio"], groups)
    return mask, model(reference["input.image"], mask.keep)


def loss(reference: Reference, model: MaskedAutoencoder, pairing: Any = "own") -> Tensor:
    mask, output = forward(reference, model)
    decoder = model.decoder
    return mae_loss(
        output.pred,
        reference["input.image"],
        mask.removed,
        decoder.channel_order,
        decoder.group_sizes,
        reference.config["norm_pix_loss"],
        pairing,
    )


@pytest.mark.parametrize("training", [True, False])
def test_latent_mask_and_prediction(reference: Reference, training: bool) -> None:
    mask, output = forward(reference, reference.load().train(training))
    torch.testing.assert_close(mask.removed, reference["expected.mask"].double(), rtol=0, atol=0)
    torch.testing.assert_close(output.latent, reference["expected.latent"], **EXACT)
    torch.testing.assert_close(output.pred, reference["expected.pred"], **EXACT)


def test_own_pairing_loss(reference: Reference) -> None:
    torch.testing.assert_close(loss(reference, reference.load()), reference["expected.loss"], **EXACT)


def test_reference_pairing_loss(reference: Reference) -> None:
    expected = reference["expected.loss_reference_pairing"]
    torch.testing.assert_close(loss(reference, reference.load(), "reference"), expected, **EXACT)
    # The defect shows: a test on sorted groups would not tell the pairings apart.
    assert not torch.isclose(expected, reference["expected.loss"], rtol=1e-4)


def test_gradient_norm_of_every_trainable_tensor(reference: Reference) -> None:
    model = reference.load()
    loss(reference, model).backward()
    ours = {name: p.grad.norm().item() for name, p in model.encoder.named_parameters() if p.grad is not None}
    for name, parameter in model.decoder.named_parameters():
        if parameter.grad is not None:
            ours[name if name == "mask_token" else f"decoder_{name}"] = parameter.grad.norm().item()
    expected = reference.config["grad_norms"]
    assert ours.keys() == expected.keys()
    assert ours == pytest.approx(expected, rel=1e-9)


def test_encodings_are_the_reference_s(reference: Reference) -> None:
    """The reference rounds its sin-cos tables to float32, as ours are in a float32 model: equal to the last bit."""
    model = reference.build().float()
    for name in ENCODINGS:
        for ours, theirs in ((model.encoder, reference.encoder), (model.decoder, reference.decoder)):
            assert theirs[name].equal(theirs[name].float().double())
            assert ours.state_dict()[name].equal(theirs[name].float())
        assert not model.decoder.get_parameter(name).requires_grad


@pytest.fixture(scope="module")
def classifier() -> tuple[Reference, GroupChannelVisionTransformer]:
    reference = Reference("satmae_encoder_cls")
    model = reference.build_encoder(num_classes=5, class_token_encoding=True)
    model.load_state_dict(reference.encoder, strict=True)
    return reference, model.eval()


def test_features_and_logits_of_the_fine_tuning_encoder(classifier: tuple[Reference, Any]) -> None:
    reference, model = classifier
    image = reference["input.image"]
    features = model.forward_features(image)
    torch.testing.assert_close(features[:, 0], reference["expected.features"], **EXACT)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), reference["expected.features"], **EXACT)
    torch.testing.assert_close(model(image), reference["expected.logits"], **EXACT)


def test_fine_tuning_encodings_all_get_gradients(classifier: tuple[Reference, Any]) -> None:
    reference, model = classifier
    model.zero_grad()
    model(reference["input.image"]).square().sum().backward()
    for name in ("pos_embed", "channel_embed", "channel_cls_embed", "cls_token"):
        assert model.get_parameter(name).grad.abs().sum() > 0
    model.zero_grad()


def test_registered_model_takes_the_same_weights(classifier: tuple[Reference, Any]) -> None:
    """``timm.create_model`` with the file's sizes is the same model as the class."""
    reference, model = classifier
    c = reference.config
    registered = timm.create_model(
        "group_channel_vit_base",
        groups=c["channel_groups"],
        channel_width=c["channel_embed_dim"],
        img_size=c["image_size"],
        patch_size=c["patch_size"],
        embed_dim=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        num_classes=c["num_classes"],
        class_token_encoding=True,
    ).double()
    registered.load_state_dict(reference.encoder, strict=True)
    image = reference["input.image"]
    assert registered.eval()(image).equal(model(image))
