"""Addresses of files and of models on the Hugging Face hub. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from geoexplora.errors import WeightsError

SECURE = ("https",)
"""Schemes over which nobody on the way can exchange the file."""

_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".onnx")
_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/?]+))?(?:/(?P<file>[^?]+))?/?")
_HUB_PAGE = re.compile(
    r"https://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)/(?:resolve|blob)"
    r"/(?P<revision>[^/?]+)/(?P<file>[^?]+)(?:\?.*)?"
)


@dataclass(frozen=True)
class Address:
    """A readable address.

    Attributes:
        text: the address, without the digest.
        name: the file's name; of a whole model on the Hugging Face hub the model's.
        sha256: the digest that the file must have, or how it must start.
        repo: ``owner/name`` on the Hugging Face hub; None elsewhere.
        revision: branch, tag or commit there; None is the main branch.
        file: the file's path there; None is the whole model.
    """

    text: str
    name: str
    sha256: str | None = None
    repo: str | None = None
    revision: str | None = None
    file: str | None = None


def exists(path: Path) -> bool:
    """Whether a path is there and may be looked at."""
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder that may not be read
        return False


def looks_like_path(text: str) -> bool:
    """Whether a text that is no address can only be meant as a file or folder."""
    return "/" in text or "\\" in text or text.startswith((".", "~")) or text.lower().endswith(_SUFFIXES)


def is_secure(address: str) -> bool:
    """Whether an address is one of a secure scheme."""
    return address.partition("://")[0].lower() in SECURE


def _is_strange(address: str) -> bool:
    """Whether an address holds blanks, or control characters, be they escaped."""
    return any(ord(character) <= 32 for character in address) or any(ord(one) < 32 for one in unquote(address))


def parse_address(text: str, sha256: str | None = None) -> Address:
    """Read ``https://...``, ``hf://owner/name[@revision][/path/to/file]``, either with ``#sha256=...`` behind it.

    Args:
        text: the address.
        sha256: the digest if the address tells none.

    Raises:
        WeightsError: if it is none of these.
    """
    plain, _, fragment = text.partition("#")
    if fragment:
        digest = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
        if digest is None:
            raise WeightsError(
                f"cannot read #{fragment} in {plain}",
                "Write #sha256= and the 64 hexadecimal digits of the file's digest, or leave it out.",
            )
        sha256 = digest[1].lower()
    scheme = plain.partition("://")[0].lower()
    if scheme == "hf" or _HUB_PAGE.fullmatch(plain):
        return _hub_address(plain, sha256)
    if not is_secure(plain):
        if scheme == "http":
            problem = f"{plain} is not secure: the file could be exchanged on its way"
            raise WeightsError(problem, "Take its https:// address, or download the file and name its path.")
        problem = f"cannot fetch {plain}: {scheme}:// is not known"
        raise WeightsError(problem, "Known are https:// and hf://; or download the file and name its path.")
    try:
        parts = urlsplit(plain)
    except ValueError as problem:
        raise WeightsError(f"cannot read the address {plain}: {problem}", "Check it.") from problem
    name = PurePosixPath(unquote(parts.path)).name
    if not parts.hostname or name in {"", ".."} or _is_strange(plain):
        raise WeightsError(f"{plain} is no address of a file", "Write https://, the server, and the path of the file.")
    return Address(plain, name, sha256)


def _hub_address(plain: str, sha256: str | None) -> Address:
    found = _HUB.fullmatch(plain) or _HUB_PAGE.fullmatch(plain)
    if found is None:
        forms = "hf://owner/name, hf://owner/name/path/to/file or hf://owner/name@revision/path/to/file"
        raise WeightsError(f"cannot read the address {plain}", f"Write {forms}.")
    repo, revision, file = found["repo"], found["revision"], found["file"]
    if not plain.startswith("hf://"):
        file = unquote(file)
    if file is None and sha256:
        raise WeightsError(f"{plain} is a folder, which has no digest", "Name a file in it, or leave out #sha256=.")
    if file is not None and any(part in {"", ".", ".."} for part in file.split("/")):
        raise WeightsError(f"{plain} is no address of a file", "Write the file's path as the hub shows it.")
    name = (file or repo).rpartition("/")[2]
    return Address(plain, name, sha256, repo, unquote(revision) if revision else None, file)
