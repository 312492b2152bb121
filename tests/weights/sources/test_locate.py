from __future__ import annotations

from pathlib import Path

import pytest

from geoexplora.datasets.sample import source_weights
from geoexplora.errors import WeightsError
from geoexplora.weights.sources import locate as module
from geoexplora.weights.sources.addresses import Address, parse_address
from geoexplora.weights.sources.fetch import MissingError
from geoexplora.weights.sources.libraries import from_timm, from_torchgeo
from geoexplora.weights.sources.locate import Located, locate
from geoexplora.weights.sources.shortcuts import SHORTCUTS, Hints

DIGEST = "0123456789abcdef" * 4

# Local files


def test_a_local_file_or_folder_wins(tmp_path: Path):
    (tmp_path / "dinov2-vits14").mkdir()
    (tmp_path / "a.pth").touch()
    assert locate("dinov2-vits14") == Located(Path("dinov2-vits14"), "dinov2-vits14", None)
    assert locate(tmp_path / "a.pth") == Located(tmp_path / "a.pth", "a.pth", None, Hints(), None)
    assert locate(".").name == tmp_path.name


@pytest.mark.parametrize("text", ["a.pth", "runs/a", Path("a"), "x" * 300 + ".pth"])
def test_no_such_file(text: str | Path):
    with pytest.raises(WeightsError, match="no such file or folder"):
        locate(text)


def test_a_name_on_the_hub_is_told_from_a_path():
    with pytest.raises(WeightsError, match="is hf://facebook/dinov2-small"):
        locate("facebook/dinov2-small")


@pytest.mark.parametrize("text", ["", "  "])
def test_nothing_named(text: str):
    with pytest.raises(WeightsError, match="no weights are named"):
        locate(text)


# Names


def test_the_bundled_weights_have_a_name():
    located = locate("sample-source")
    assert located.path == source_weights()
    assert (located.path / "encoder.safetensors").is_file()
    assert (located.name, located.address) == ("sample-source", None)


def test_a_mistyped_name_of_the_bundled_weights():
    with pytest.raises(WeightsError, match="Did you mean sample-source"):
        locate("sample-sorce")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Address]:
    """Stands for fetching: remembers the addresses."""
    addresses: list[Address] = []

    def fetch(address: Address) -> Path:
        addresses.append(address)
        return Path("/fetched") / address.name

    monkeypatch.setattr(module, "fetch", fetch)
    return addresses


@pytest.mark.parametrize("name", SHORTCUTS)
def test_shortcuts(name: str, fetched: list[Address]):
    known, located = SHORTCUTS[name], locate(name)
    assert (located.name, located.address, located.licence) == (name, known.address, known.licence)
    assert located.hints == Hints(known.sensor, known.bands, known.normalization, known.format)
    assert fetched[0].sha256 == known.sha256
    assert located.path == Path("/fetched") / fetched[0].name


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/a.pth",
        "hf://owner/name@v1/a.pth",
        "https://huggingface.co/owner/name/resolve/main/a.pth",
    ],
)
def test_an_address_is_called_by_itself(address: str, fetched: list[Address]):
    assert locate(f"{address}#sha256={DIGEST}") == Located(Path("/fetched/a.pth"), address, address)
    assert fetched == [parse_address(address, DIGEST)]


def test_a_signed_address_keeps_its_signature_to_itself(fetched: list[Address]):
    address = "https://example.org/a.pth?signature=secret"
    assert locate(address) == Located(Path("/fetched/a.pth"), "https://example.org/a.pth", "https://example.org/a.pth")
    assert fetched == [parse_address(address)]


@pytest.mark.parametrize("text", ["http://example.org/a.pth", "file:///a.pth"])
def test_insecure_addresses_are_refused(text: str, fetched: list[Address]):
    with pytest.raises(WeightsError):
        locate(text)
    assert not fetched


def test_unknown_names():
    with pytest.raises(WeightsError, match="unknown weights dinov2-vitl41\nDid you mean dinov2-vitl14") as error:
        locate("dinov2-vitl41")
    for form in ("weights file", "run folder", "https://", "hf://", "shortcut", "TorchGeo", "timm"):
        assert form in str(error.value)


@pytest.mark.parametrize("name", ["vit_base_patch16_224.mae", "ViTSmall16_Weights.SENTINEL2_ALL_MOCO"])
def test_names_of_libraries(name: str, fetched: list[Address]):
    located, known = locate(name), (from_torchgeo if "_Weights." in name else from_timm)(name)
    assert (located.name, located.hints, located.licence) == (known.name, known.hints, known.licence)
    assert located.address == fetched[0].text
    assert fetched == [known.addresses[0]]


def test_the_next_address_counts_where_nothing_is_at_the_first(monkeypatch: pytest.MonkeyPatch):
    def fetch(address: Address) -> Path:
        if address.name not in there:
            raise MissingError(f"{address.text} is not there", "Check it.")
        return Path(address.name)

    monkeypatch.setattr(module, "fetch", fetch)
    there = {"pytorch_model.bin"}
    located = locate("vit_base_patch16_224.mae")
    assert located.path == Path("pytorch_model.bin")
    assert located.address == "hf://timm/vit_base_patch16_224.mae/pytorch_model.bin"
    there = set()
    with pytest.raises(MissingError, match=r"pytorch_model\.bin is not there"):
        locate("vit_base_patch16_224.mae")


@pytest.mark.parametrize("name", ["resnet18", "ResNet50_Weights.SENTINEL2_ALL_MOCO"])
def test_nothing_is_fetched_that_cannot_be_used(name: str, fetched: list[Address]):
    with pytest.raises(WeightsError, match="vision transformer"):
        locate(name)
    assert not fetched
