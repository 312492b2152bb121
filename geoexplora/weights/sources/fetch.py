"""Fetching files over https and from the Hugging Face hub, each kept in a cache and checked."""

from __future__ import annotations

import errno
import hashlib
import logging
import ssl
import sys
import time
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from geoexplora.errors import RunError, WeightsError
from geoexplora.weights.atomic import atomic_path, operating_system_error
from geoexplora.weights.sources.addresses import Address, exists, is_secure

log = logging.getLogger(__name__)

TIMEOUT = 30.0
"""Seconds that a server may keep silent."""

_CHUNK = 1 << 20
_ABANDONED = 24 * 3600.0
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_ELSEWHERE = "Download the file elsewhere and name its path"


class MissingError(WeightsError):
    """There is no such file at the address."""


def fetch(address: Address) -> Path:
    """Fetch a file, or a model's folder from the hub, unless it is at hand.

    Args:
        address: where it lies.

    Returns:
        Where it is kept: in the Hugging Face cache, or in ``geoexplora`` in torch's hub folder.

    Raises:
        MissingError: if there is no such file.
        WeightsError: if it cannot be fetched or kept, or has another digest.
    """
    return _fetch_https(address) if address.repo is None else _fetch_hub(address)


class _SecureRedirects(HTTPRedirectHandler):
    """Follows no redirection to where the file could be exchanged on its way."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if not is_secure(newurl):
            raise WeightsError(f"{req.full_url} leads to {newurl}, which is not secure", f"{_ELSEWHERE}.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch_https(address: Address) -> Path:
    import torch

    folder = hashlib.sha256(address.text.encode()).hexdigest()[:12]
    target = Path(torch.hub.get_dir()) / "geoexplora" / folder / address.name
    if exists(target):
        log.info("%s is at hand: %s", address.text, target)
        _check_kept(address, target)
        return target
    log.info("fetching %s to %s", address.text, target)
    _remove_abandoned(target.parent)
    try:
        with atomic_path(target) as temporary:
            _download(address, temporary, target)
    except RunError as problem:
        raise _cannot_keep(address, target, operating_system_error(problem) or problem) from problem
    return target


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left; a download that goes on, perhaps on another machine, changes its file."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()


def _download(address: Address, temporary: Path, target: Path) -> None:
    """Stream a file; torch's own function takes one that breaks off for whole, and waits for ever."""
    request = Request(address.text, headers={"User-Agent": "geoexplora"})
    try:
        response = build_opener(_SecureRedirects).open(request, timeout=TIMEOUT)
    except HTTPError as problem:
        raise _refused(address, problem.code) from problem
    except (OSError, HTTPException, ValueError) as problem:
        reason = problem.reason if isinstance(problem, URLError) else problem
        network = isinstance(problem, OSError)
        raise _unreachable(address, reason, network, f"put it into the cache as {target}") from problem
    digest, total, done = hashlib.sha256(), response.length, 0
    hidden = not sys.stderr.isatty()
    with (
        response,
        temporary.open("wb") as file,
        tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=address.name, disable=hidden) as bar,
    ):
        if response.headers.get_content_type() == "text/html":
            raise WeightsError(f"{address.text} is a web page, not a file", "Take the address of the file itself.")
        while chunk := _next(address, response, done, total):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            bar.update(len(chunk))
    if total is not None and done < total:
        raise _broken_off(address, done, total, "the server closed the connection")
    _check_digest(address, digest.hexdigest(), "Nothing was kept. Compare it with the digest that the authors publish.")


def _next(address: Address, response: Any, done: int, total: int | None) -> bytes:
    try:
        return bytes(response.read(_CHUNK))
    except (OSError, HTTPException) as problem:
        raise _broken_off(address, done, total, str(problem) or type(problem).__name__) from problem


def _fetch_hub(address: Address) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, revision, file = str(address.repo), address.revision, address.file
    path: Path | None = None
    try:
        if file is not None:
            with suppress(LocalEntryNotFoundError):
                path = Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
        if path is not None:
            log.info("%s is at hand: %s", address.text, path)
        else:
            log.info("fetching %s to %s", address.text, HF_HUB_CACHE)
            if file is not None:
                path = Path(hf_hub_download(repo, file, revision=revision))
            else:
                wanted = ["*.json", "*.safetensors"]
                path = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except Exception as problem:  # its HTTP library, and with it the exceptions, changed more than once
        raise _hub_failure(address, Path(HF_HUB_CACHE), problem) from problem
    if file is None and not any(path.glob("*.safetensors")):
        raise WeightsError(
            f"{address.text} has no .safetensors file", f"Name a weights file in it: {address.text}/FILE."
        )
    _check_kept(address, path)
    return path


# Failures


def _check_kept(address: Address, path: Path) -> None:
    if address.sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        _check_digest(address, found, f"Correct the digest, or delete {path.resolve()} to fetch the file again.")


def _check_digest(address: Address, found: str, remedy: str) -> None:
    if address.sha256 is not None and not found.startswith(address.sha256):
        raise WeightsError(f"{address.text} has the SHA-256 digest {found}, not {address.sha256}", remedy)


def _cannot_keep(address: Address, place: Path, problem: BaseException) -> WeightsError:
    reason = getattr(problem, "strerror", None) or str(problem)
    return WeightsError(
        f"cannot keep {address.text} as {place}: {reason}",
        "Free some space there, or name another folder by the environment variable"
        f" {'TORCH_HOME' if address.repo is None else 'HF_HOME'}; or download the file elsewhere and name its path.",
    )


def _broken_off(address: Address, done: int, total: int | None, reason: str) -> WeightsError:
    size = f"{done:,} bytes" if total is None else f"{done:,} of {total:,} bytes"
    return WeightsError(
        f"fetching {address.text} broke off after {size}: {reason}", f"Nothing was kept: try again. {_ELSEWHERE}."
    )


def _unreachable(address: Address, reason: Any, network: bool, cache: str) -> WeightsError:
    why = f"{type(reason).__name__}: {reason}"
    if isinstance(reason, ssl.SSLError):
        why = f"no trusted connection ({reason})"
    elif network:
        why = f"no network ({reason})"
    return WeightsError(f"cannot fetch {address.text}: {why}", f"{_ELSEWHERE}, or {cache}.")


def _refused(address: Address, status: int) -> WeightsError:
    if status in {404, 410}:
        return MissingError(
            f"{address.text} is not there (HTTP {status})", "Check the address; the file may have moved."
        )
    if status in {401, 403}:
        remedy = f"Log in there with a browser. {_ELSEWHERE}."
        if address.repo is not None:
            page = f"https://huggingface.co/{address.repo}"
            remedy = f"Check the name. If it is right, accept the conditions at {page} and log in: hf auth login."
        return WeightsError(f"access to {address.text} is refused (HTTP {status})", remedy)
    return WeightsError(
        f"cannot fetch {address.text}: the server answers HTTP {status}", f"Try again later. {_ELSEWHERE}."
    )


def _hub_failure(address: Address, cache: Path, problem: Exception) -> WeightsError:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    links: list[BaseException] = []
    link: BaseException | None = problem
    while link is not None:
        links.append(link)
        link = link.__cause__ or link.__context__
    for link in links:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if status is not None:
            return _refused(address, int(status))
        if isinstance(link, PermissionError) or getattr(link, "errno", None) in _UNWRITABLE:
            return _cannot_keep(address, cache, link)
    if isinstance(problem, EntryNotFoundError) and not isinstance(problem, LocalEntryNotFoundError):
        return _refused(address, 404)
    folder = f"models--{str(address.repo).replace('/', '--')}"
    network = any(isinstance(link, OSError) for link in links)
    return _unreachable(address, links[-1], network, f"copy {folder} from another machine's cache into {cache}")
