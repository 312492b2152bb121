from __future__ import annotations

import pytest

from geoexplora.errors import WeightsError
from geoexplora.weights.sources.addresses import looks_like_path, parse_address

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "text", ["weights.pth", "runs/a", "a\\b", "x.SAFETENSORS", "./a", "..", "~", "m.onnx", "owner/name"]
)
def test_what_can_only_be_a_path(text: str):
    assert looks_like_path(text)


@pytest.mark.parametrize("text", ["", "a", "dinov2-vitl14", "vit_small_patch14_dinov2.lvd142m", "A_Weights.B"])
def test_what_may_be_a_name(text: str):
    assert not looks_like_path(text)


@pytest.mark.parametrize(
    ("text", "repo", "revision", "file", "name"),
    [
        ("hf://owner/a.name-1", "owner/a.name-1", None, None, "a.name-1"),
        ("hf://owner/name/", "owner/name", None, None, "name"),
        ("hf://owner/name@v1.0", "owner/name", "v1.0", None, "name"),
        ("hf://owner/name@refs%2Fpr%2F1/in/it.pth", "owner/name", "refs/pr/1", "in/it.pth", "it.pth"),
        ("hf://owner/name/it.pth", "owner/name", None, "it.pth", "it.pth"),
        ("https://huggingface.co/o/n/resolve/main/a%20b.pth?download=true", "o/n", "main", "a b.pth", "a b.pth"),
        ("https://hf.co/o/n/blob/1c88bb5/in/it.pth", "o/n", "1c88bb5", "in/it.pth", "it.pth"),
    ],
)
def test_addresses_on_the_hub(text: str, repo: str, revision: str | None, file: str | None, name: str):
    address = parse_address(text)
    assert (address.repo, address.revision, address.file, address.name) == (repo, revision, file, name)
    assert address.text == text


def test_other_addresses():
    address = parse_address(f"https://example.org/in/a%20b.pth?download=1#sha256={DIGEST.upper()}", "00")
    assert (address.text, address.name) == ("https://example.org/in/a%20b.pth?download=1", "a b.pth")
    assert (address.sha256, address.repo) == (DIGEST, None)
    assert parse_address("https://huggingface.co/datasets/o/n/resolve/main/a.pth").repo is None
    assert parse_address("https://example.org/a.pth", "0123").sha256 == "0123"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://example.org/a.pth", "not secure"),
        ("file:///etc/passwd", "file:// is not known"),
        ("s3://bucket/a.pth", "s3:// is not known"),
        ("hf://owner", "hf://owner/name"),
        ("hf://owner/name/../../a", "no address of a file"),
        ("hf://owner/name/a.pth?x", "cannot read"),
        (f"hf://owner/name#sha256={DIGEST}", "folder"),
        ("https://example.org/a.pth#md5=1", "#md5=1"),
        ("https://example.org/a.pth#sha256=123", "64"),
        ("https://example.org/", "no address of a file"),
        ("https:///a.pth", "no address of a file"),
        ("https://example.org/a/..", "no address of a file"),
        ("https://example.org/a b.pth", "no address of a file"),
        ("https://[::1/a.pth", "cannot read"),
    ],
)
def test_what_is_no_address(text: str, said: str):
    with pytest.raises(WeightsError) as error:
        parse_address(text)
    assert said in str(error.value)
    assert "\n" in str(error.value)
