"""What timm builds from a name alone, and that it knows the names whichever library is imported first."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from geoexplora.errors import WeightsError
from geoexplora.models import GroupChannelVisionTransformer
from geoexplora.models.geometry import Geometry
from geoexplora.registry import MODELS, Style

PLAIN = "plain_vit_pico.s32_p8_c10"
GROUPED = "group_channel_vit_pico.s32_p8_g0-1-2-6_g3-4-5-7_g8-9"


def numbers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    patch = draw(numbers(1, 40))
    channels = draw(numbers(1, 120))
    grouped = draw(st.booleans())
    groups = None
    if grouped:
        order = draw(st.permutations(range(channels)))
        cuts = sorted(draw(st.sets(numbers(1, channels), max_size=5)) | {channels})
        groups = tuple(tuple(order[a:b]) for a, b in zip([0, *cuts], cuts, strict=False))
    heads = draw(numbers(1, 20))
    sizes = st.tuples(numbers(1, 30).map(lambda n: n * heads), numbers(1, 50), st.just(heads))
    style = Style(
        layer_scale=draw(st.booleans()),
        registers=draw(numbers(0, 16)),
        swiglu=draw(st.booleans()),
        mlp_width=draw(st.none() | numbers(1, 9000)),
        channel_width=draw(st.none() | numbers(1, 900)) if grouped else None,
        class_token_encoding=grouped and draw(st.booleans()),
        pooled_norm=draw(st.booleans()),
    )
    return Geometry(patch * draw(numbers(1, 90)), patch, channels, groups, draw(st.none() | sizes), style)


@given(geometries())
def test_a_tag_tells_the_geometry(geometry: Geometry) -> None:
    assert Geometry.parse(geometry.tag) == geometry
    model, tag = timm.models.split_model_name_tag(geometry.name("vit_tiny"))
    assert timm.is_model(geometry.name("vit_tiny"))
    assert model in {"plain_vit_tiny", "group_channel_vit_tiny"}
    assert tag == geometry.tag


@given(st.text(alphabet="spcgwdhelr0123456789-_", max_size=20) | st.text(max_size=8))
def test_other_tags_are_refused_or_mean_what_they_say(tag: str) -> None:
    try:
        assert Geometry.parse(tag).tag == tag
    except WeightsError as problem:
        assert "Write for example s224_p16_c3" in str(problem)


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        ("", "cannot read ''"),
        ("s32_p8", "lacks the part 'c'"),
        ("s32_c3", "lacks the part 'p'"),
        ("s33_p8_c3", "images of 33 px do not divide into patches of 8 px"),
        ("s32_p8_c3_c4", "is no tag of a model; the nearest is 's32_p8_c3'"),
        ("p8_s32_c3", "the nearest is 's32_p8_c3'"),
        ("s032_p8_c3", "the nearest is 's32_p8_c3'"),
        ("s32_p8_c3_rgb", "the nearest is 's32_p8_c3'"),
        ("s32_p8_c3_g0-1-2", "the nearest is 's32_p8_g0-1-2'"),
        ("s32_p8_g0-1_g1-2", "do not hold each of 4 bands exactly once"),
        ("s32_p8_g0-1_g3", "do not hold each of 3 bands exactly once"),
        ("s32_p8_c3_w100_d2_h3", "the width does not divide by the heads"),
        ("s32_p8_c3_w64", "lacks the part 'd'"),
        ("s32_p8_c3_cls", "for models with channel groups"),
        ("S32_p8_c3", "cannot read 'S32'"),
        ("augreg_in21k", "cannot read 'in21k'"),
    ],
)
def test_ill_formed_tags(tag: str, text: str) -> None:
    with pytest.raises(WeightsError) as caught:
        Geometry.parse(tag)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_plain_names_without_a_tag(name: str) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(f"plain_{name}")
        stock: Any = timm.create_model(
            "vit_base_patch16_224",
            embed_dim=MODELS[name].width,
            depth=MODELS[name].depth,
            num_heads=MODELS[name].heads,
            num_classes=0,
        )
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, stock)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", [PLAIN, GROUPED])
def test_what_other_libraries_pass_and_ask(name: str) -> None:
    image = torch.zeros(2, 10, 32, 32)
    assert timm.create_model(name)(image).shape == (2, 128)
    model: Any = timm.create_model(name, num_classes=7, in_chans=10, pretrained=False)
    assert model(image).shape == (2, 7)
    assert model.pretrained_cfg["input_size"] == (10, 32, 32)
    assert model.pretrained_cfg["fixed_input_size"]
    assert model.get_classifier() is model.head
    features = timm.create_model(name, features_only=True, out_indices=(1, 7))(image)
    assert [part.shape for part in features] == [(2, 128, 4, 4)] * 2
    assert not timm.models.is_model_pretrained(name)


@pytest.mark.parametrize("name", [PLAIN, GROUPED])
def test_the_wrong_number_of_bands(name: str) -> None:
    with pytest.raises(WeightsError, match="takes 10 bands, not 3\nGive in_channels=10 to TorchGeo's tasks"):
        timm.create_model(name, in_chans=3, num_classes=7)


def test_tags_of_the_other_kind_and_missing_weights() -> None:
    with pytest.raises(WeightsError, match=r"plain_vit_pico cannot have the sizes s32_p8_g0\nThey are of a group_chan"):
        timm.create_model("plain_vit_pico.s32_p8_g0")
    with pytest.raises(WeightsError, match=r"They are of a plain_\* model"):
        timm.create_model("group_channel_vit_pico.s32_p8_c3")
    for name in (PLAIN, GROUPED, "plain_vit_pico"):
        with pytest.raises(WeightsError, match="has no weights of its own"):
            timm.create_model(name, pretrained=True)


def test_a_tag_may_be_overridden() -> None:
    model: Any = timm.create_model(GROUPED, img_size=48, drop_path_rate=0.1)
    assert isinstance(model, GroupChannelVisionTransformer)
    assert model.patch_embed.grid_size == (6, 6)
    assert model.pretrained_cfg["input_size"] == (10, 48, 48)


KNOWN = f"assert timm.is_model({PLAIN!r}) and timm.is_model({GROUPED!r})"
ORDERS = (
    f"import geoexplora, timm; {KNOWN}",
    f"import timm, geoexplora; {KNOWN}",
    f"import geoexplora.models.embeddings, timm; {KNOWN}",
    f"from geoexplora.weights.load import load_encoder; from timm.layers import Mlp; import timm; {KNOWN}",
    # looking whether timm is there, as transformers does, is not importing it
    f"import geoexplora, importlib.util; importlib.util.find_spec('timm'); import timm; {KNOWN};"
    f" importlib.reload(timm); {KNOWN}",
    "import geoexplora, sys; assert not {'timm', 'geoexplora.models'} & set(sys.modules)",
    f"from torchgeo.tasks import Classification; import geoexplora\n"
    f"Classification({PLAIN!r}, in_channels=10, num_classes=3)",
)
RUN_EACH = """
import os, sys, torch, torchvision, huggingface_hub, torch._dynamo, torch.fx  # what takes most of the time, once
for code in sys.argv[1:]:
    if (child := os.fork()) == 0:
        exec(code)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(code)
"""


def test_the_order_of_imports_does_not_matter() -> None:
    command = [sys.executable, "-W", "error::UserWarning", "-c", RUN_EACH, *ORDERS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
