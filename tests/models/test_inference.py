"""The copy for frozen use computes what the encoder does."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from timm.layers import SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from geoexplora.models import inference
from geoexplora.models.attention import use_fast_attention
from geoexplora.models.group_channel_vit import GroupChannelVisionTransformer
from geoexplora.models.inference import inference_copy
from geoexplora.models.linear import use_fast_linears

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
GROUPS = ((0, 2), (1, 3, 4))

plain = partial(VisionTransformer, num_classes=0, **SIZES)
ENCODERS = {
    "plain": plain,
    "registers and LayerScale": partial(plain, init_values=0.7, reg_tokens=2),
    "packed SwiGLU": partial(plain, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, init_values=0.7),
    "SwiGLU": partial(plain, mlp_layer=SwiGLU, act_layer=nn.SiLU),
    "no biases": partial(plain, qkv_bias=False, proj_bias=False, init_values=0.7),
    "norm after pooling": partial(plain, global_pool="avg", fc_norm=True),
    "any size": partial(plain, dynamic_img_size=True),
    "approximate GELU": partial(plain, act_layer=partial(nn.GELU, approximate="tanh")),
    "normalized queries and keys": partial(plain, qk_norm=True, init_values=0.7),
    "normalized in the MLP": partial(plain, scale_mlp_norm=True, init_values=0.7),
    "other blocks": partial(plain, block_fn=ParallelScalingBlock, init_values=0.7),
    "groups": partial(GroupChannelVisionTransformer, GROUPS, 16, class_token_encoding=True, num_classes=0, **SIZES),
    "fast layers": lambda: use_fast_linears(use_fast_attention(plain(init_values=0.7))),
}
every = pytest.mark.parametrize("kind", ENCODERS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def built(kind: str) -> Any:
    """An encoder none of whose parameters is trivial."""
    encoder = ENCODERS[kind]()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "gamma" in name or "norm" in name or parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "blocks" in name:
                nn.init.xavier_uniform_(parameter)
    return encoder.eval()


def images(encoder: Any, count: int = 3) -> Tensor:
    return torch.randn(count, 5 if hasattr(encoder, "num_groups") else 3, 32, 32)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@every
def test_float32_features_are_the_encoders(kind: str) -> None:
    encoder = built(kind)
    x = images(encoder)
    copied = inference_copy(encoder)
    with torch.no_grad():
        wanted = encoder.forward_features(x)
        assert relative_error(copied.forward_features(x), wanted.double()) < 1e-6
        assert relative_error(copied.forward_head(wanted), encoder.forward_head(wanted).double()) < 1e-6
        for output in ("NLC", "NCHW"):
            take = {"indices": [0, 1, 2], "intermediates_only": True, "output_fmt": output}
            levels = copied.forward_intermediates(x, **take), encoder.forward_intermediates(x, **take)
            assert len(levels[0]) == 3
            for found, level in zip(*levels, strict=True):  # as they were when their block was done
                assert found.shape == level.shape
                assert relative_error(found, level.double()) < 1e-6


@every
def test_bf16_is_no_worse_than_twice_the_error_of_autocast(kind: str) -> None:
    encoder = built(kind)
    x = images(encoder, 8)
    with torch.no_grad():
        wanted = copy.deepcopy(encoder).double().forward_features(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            autocast = encoder.forward_features(x)
        found = inference_copy(encoder, torch.bfloat16).forward_features(x)
    assert found.dtype == torch.float32
    assert 0 < relative_error(found, wanted) < 2 * relative_error(autocast, wanted)


@every
def test_the_encoder_stays_as_it_was(kind: str) -> None:
    encoder = built(kind).train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    types = [type(module) for module in encoder.modules()]
    copied = inference_copy(encoder, torch.bfloat16)
    copied.forward_features(images(encoder))
    assert encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert [type(module) for module in encoder.modules()] == types
    assert encoder.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    own = {parameter.data_ptr() for parameter in encoder.parameters()}
    for plain_copy in (copied, inference_copy(encoder)):
        assert not own & {parameter.data_ptr() for parameter in plain_copy.parameters()}


def test_copy_is_frozen_and_keeps_attributes() -> None:
    encoder = built("groups")
    copied = inference_copy(encoder, torch.bfloat16)
    assert not copied.training
    assert isinstance(copied, GroupChannelVisionTransformer)
    for name in ("num_prefix_tokens", "num_groups", "embed_dim", "num_features", "depth"):
        assert getattr(copied, name, None) == getattr(encoder, name, None)
    assert copied.patch_embed.groups == GROUPS
    assert copied.patch_embed.grid_size == (4, 4)
    features = copied.forward_features(images(encoder).requires_grad_())
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert not features.requires_grad


def test_products_are_cast_and_norms_are_not() -> None:
    copied = inference_copy(built("registers and LayerScale"), torch.bfloat16)
    cast = {name for name, parameter in copied.named_parameters() if parameter.dtype == torch.bfloat16}
    layers = {name.rsplit(".", 1)[0].split(".", 2)[-1] for name in cast if name.startswith("blocks")}
    assert layers == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert {name for name in cast if not name.startswith("blocks")} == {
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    assert not any("gamma" in name for name in copied.state_dict())


@pytest.mark.parametrize("scores", [1, 60, 1 << 20])
@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize(("count", "heads", "width"), [(1, 1, 16), (3, 2, 8), (2, 5, 24)])
def test_attention_by_products(
    scores: int, tokens: int, count: int, heads: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "_SCORES", scores)
    q, k, v = torch.randn(3, count, tokens, heads, width).bfloat16().transpose(2, 3)
    found = inference._attend_by_products(q, k, v)
    assert found.shape == q.shape
    for b in range(count):
        for h in range(heads):
            weights = (q[b, h].double() @ k[b, h].double().T / width**0.5).softmax(-1)
            assert relative_error(found[b, h], weights @ v[b, h].double()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_onednn(dtype: torch.dtype) -> None:
    encoder = built("registers and LayerScale")
    x = images(encoder)
    copied = inference_copy(encoder, dtype)
    fast = copied.forward_features(x)
    with torch.backends.mkldnn.flags(enabled=False):
        slow = copied.forward_features(x)
    assert relative_error(fast, slow.double()) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_no_images() -> None:
    encoder = built("plain")
    assert inference_copy(encoder, torch.bfloat16).forward_features(images(encoder, 0)).shape == (0, 17, 64)


def test_attention_mask() -> None:
    encoder = built("plain")
    x = images(encoder)
    mask = torch.rand(17, 17) > 0.3
    mask.fill_diagonal_(True)
    with torch.no_grad():
        wanted = encoder.forward_features(x, attn_mask=mask).double()
        assert relative_error(encoder.forward_features(x), wanted) > 0.05
        assert relative_error(inference_copy(encoder).forward_features(x, attn_mask=mask), wanted) < 1e-6
        assert (
            relative_error(inference_copy(encoder, torch.bfloat16).forward_features(x, attn_mask=mask), wanted) < 0.03
        )


@pytest.mark.parametrize("target", ["qkv", "proj", "fc1", "fc2"])
@pytest.mark.parametrize(("dtype", "limit"), [(None, 1e-6), (torch.bfloat16, 0.02)])
def test_lora_that_is_not_merged(target: str, dtype: torch.dtype | None, limit: float) -> None:
    encoder = inject_adapter_in_model(LoraConfig(r=2, target_modules=[target]), built("plain"))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    x = images(encoder)
    with torch.no_grad():
        found, wanted = inference_copy(encoder, dtype).forward_features(x), encoder.forward_features(x)
    assert relative_error(found, wanted.double()) < limit
