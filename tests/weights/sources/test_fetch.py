from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from geoexplora.errors import WeightsError
from geoexplora.weights.sources import addresses
from geoexplora.weights.sources import fetch as module
from geoexplora.weights.sources.addresses import parse_address
from geoexplora.weights.sources.fetch import fetch

CONTENT = os.urandom(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = "0" * 64


def fetched(text: str) -> Path:
    return fetch(parse_address(text))


def kept(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]


# Over HTTP


class Server:
    """Serves over plain HTTP on this machine what ``answer`` does."""

    def __init__(self) -> None:
        self.requests = 0
        self.answer: Callable[[BaseHTTPRequestHandler], None] = send
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                outer.answer(self)

            def log_message(self, *parts: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/files/a.pth?download=1"


def send(handler: BaseHTTPRequestHandler, sent: bytes = CONTENT, kind: str = "application/octet-stream") -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(CONTENT)))
    handler.end_headers()
    handler.wfile.write(sent)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(addresses, "SECURE", ("https", "http"))
    running = Server()
    thread = threading.Thread(target=running.server.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.server.shutdown()
    thread.join()
    running.server.server_close()


def test_a_file_is_fetched_once(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    path = fetched(f"{server.url}#sha256={DIGEST}")
    folder = hashlib.sha256(server.url.encode()).hexdigest()[:12]
    assert path == tmp_path / "torch/hub/geoexplora" / folder / "a.pth"
    assert path.read_bytes() == CONTENT
    assert f"fetching {server.url} to {path}" in caplog.text
    assert fetched(server.url) == path
    assert server.requests == 1
    assert kept(tmp_path) == [path]


def test_no_progress_bar_without_a_terminal(server: Server, capfd: pytest.CaptureFixture[str]):
    fetched(server.url)
    assert capfd.readouterr() == ("", "")


def test_a_download_that_breaks_off_leaves_nothing(server: Server, tmp_path: Path):
    server.answer = lambda handler: send(handler, CONTENT[:100_000])
    with pytest.raises(WeightsError, match=r"broke off after 100,000 of 300,000 bytes.*\nNothing was kept"):
        fetched(server.url)
    assert not kept(tmp_path)
    server.answer = send
    assert fetched(server.url).read_bytes() == CONTENT


def test_a_server_that_falls_silent(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    over = threading.Event()

    def stall(handler: BaseHTTPRequestHandler) -> None:
        send(handler, CONTENT[:1000])
        over.wait(10)

    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    server.answer = stall
    try:
        with pytest.raises(WeightsError, match=r"broke off after .*timed out"):
            fetched(server.url)
    finally:
        over.set()
    assert not kept(tmp_path)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "is not there"),
        (410, "is not there"),
        (401, "refused"),
        (403, "refused"),
        (503, "server answers HTTP 503"),
    ],
)
def test_http_errors(server: Server, tmp_path: Path, status: int, said: str):
    server.answer = lambda handler: handler.send_error(status)
    with pytest.raises(WeightsError, match=said) as error:
        fetched(server.url)
    assert server.url in str(error.value)
    assert not kept(tmp_path)


def test_a_web_page_is_no_file(server: Server, tmp_path: Path):
    server.answer = lambda handler: send(handler, kind="text/html; charset=utf-8")
    with pytest.raises(WeightsError, match="is a web page"):
        fetched(server.url)
    assert not kept(tmp_path)


def test_another_digest(server: Server, tmp_path: Path):
    with pytest.raises(WeightsError, match=f"{DIGEST}, not {OTHER}\nNothing was kept"):
        fetched(f"{server.url}#sha256={OTHER}")
    assert not kept(tmp_path)
    path = fetched(server.url)
    with pytest.raises(WeightsError, match=f"{DIGEST}, not {OTHER}\n.*delete {path}"):
        fetched(f"{server.url}#sha256={OTHER}")
    path.write_bytes(b"changed since")
    with pytest.raises(WeightsError, match=f"not {DIGEST}"):
        fetched(f"{server.url}#sha256={DIGEST}")


def test_redirections_stay_secure(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def redirect(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    target = "ftp://127.0.0.1/a.pth"
    server.answer = redirect
    with pytest.raises(WeightsError, match=f"leads to {target}, which is not secure"):
        fetched(server.url)
    target = server.url
    server.answer = lambda handler: redirect(handler) if server.requests < 3 else send(handler)
    assert fetched(server.url).read_bytes() == CONTENT


def test_fetching_the_same_at_once(server: Server, tmp_path: Path):
    both = threading.Barrier(2, timeout=10)

    def together(handler: BaseHTTPRequestHandler) -> None:
        both.wait()  # neither is done before the other has begun
        send(handler)

    server.answer = together
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetched(server.url))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2
    assert kept(tmp_path) == [paths[0]] == [paths[1]]
    assert paths[0].read_bytes() == CONTENT


def test_what_killed_processes_left_is_no_download_and_goes_in_time(server: Server, tmp_path: Path):
    path = fetched(server.url)
    path.unlink()
    old, new = path.with_name(".a.pth.1-00.tmp"), path.with_name(".a.pth.2-00.tmp")
    for left in (old, new):
        left.write_bytes(CONTENT[:10])
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    assert fetched(server.url).read_bytes() == CONTENT
    assert sorted(kept(tmp_path)) == sorted([path, new])


def test_a_full_disk(server: Server, tmp_path: Path, file_size_limit: Callable[[int], Any]):
    with file_size_limit(1000), pytest.raises(WeightsError, match=r"cannot keep .*: File too large\n.*TORCH_HOME"):
        fetched(server.url)
    assert not kept(tmp_path)


def test_a_cache_that_cannot_be_made(server: Server, tmp_path: Path):
    (tmp_path / "torch").touch()
    with pytest.raises(WeightsError, match=r"cannot keep .*\n.*TORCH_HOME"):
        fetched(server.url)


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def nowhere(*parts: Any, **settings: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    with pytest.raises(WeightsError, match=r"cannot fetch .*: no network .*Name or service not known") as error:
        fetched("https://example.org/a.pth")
    assert "path" in str(error.value)
    assert f"{tmp_path}/torch/hub/geoexplora" in str(error.value)
    assert not kept(tmp_path)


def test_a_certificate_that_is_not_trusted(monkeypatch: pytest.MonkeyPatch):
    def refuse(*parts: Any, **settings: Any) -> Any:
        raise ssl.SSLCertVerificationError("self-signed certificate")

    monkeypatch.setattr("http.client.HTTPSConnection.connect", refuse)
    with pytest.raises(WeightsError, match=r"no trusted connection \(.*self-signed"):
        fetched("https://example.org/a.pth")


def test_no_one_listens(server: Server):
    server.server.server_close()
    with pytest.raises(WeightsError, match=r"no network \(.*refused"):
        fetched(server.url)


# From the Hugging Face hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Stands for the hub: what it was asked, which files it has, how it fails, and what is in the cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    state = SimpleNamespace(asked=[], failure=None, cached=False, folder=tmp_path / "snapshot")
    state.folder.mkdir()
    (state.folder / "a.pth").write_bytes(CONTENT)

    def download(repo: str, file: str, *, revision: str | None = None, local_files_only: bool = False) -> str:
        if local_files_only and not state.cached:
            raise LocalEntryNotFoundError("not cached")
        state.asked.append((repo, file, revision, local_files_only))
        if state.failure and not local_files_only:
            raise state.failure
        return str(state.folder / file)

    def snapshot(repo: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        state.asked.append((repo, tuple(allow_patterns), revision))
        if state.failure:
            raise state.failure
        return str(state.folder)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return state


def test_a_file_of_the_hub(hub: SimpleNamespace):
    assert fetched(f"hf://owner/name@v1/a.pth#sha256={DIGEST}") == hub.folder / "a.pth"
    assert hub.asked == [("owner/name", "a.pth", "v1", False)]


def test_a_file_of_the_hub_that_is_at_hand(hub: SimpleNamespace):
    hub.cached, hub.failure = True, ConnectionError("no way")
    assert fetched("hf://owner/name/a.pth") == hub.folder / "a.pth"
    assert hub.asked == [("owner/name", "a.pth", None, True)]


def test_the_hubs_pages(hub: SimpleNamespace):
    assert fetched("https://huggingface.co/owner/name/resolve/main/a.pth") == hub.folder / "a.pth"
    assert hub.asked == [("owner/name", "a.pth", "main", False)]


def test_another_digest_on_the_hub(hub: SimpleNamespace):
    with pytest.raises(WeightsError, match=f"{DIGEST}, not {OTHER}"):
        fetched(f"hf://owner/name/a.pth#sha256={OTHER}")


def test_a_folder_of_the_hub(hub: SimpleNamespace):
    with pytest.raises(WeightsError, match=r"has no .safetensors file\n.*hf://owner/name@main/FILE"):
        fetched("hf://owner/name@main")
    (hub.folder / "model.safetensors").touch()
    assert fetched("hf://owner/name@main") == hub.folder
    assert hub.asked[-1] == ("owner/name", ("*.json", "*.safetensors"), "main")


def failure(kind: str, status: int | None = None) -> Exception:
    from huggingface_hub import errors

    error = getattr(errors, kind)
    if status is None:
        return error("said by the hub")
    return error("said by the hub", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        (
            "GatedRepoError",
            403,
            "access to hf://owner/name.* is refused.*\n.*https://huggingface.co/owner/name.*hf auth",
        ),
        ("RepositoryNotFoundError", 401, "refused.*\nCheck the name"),
        ("RepositoryNotFoundError", 404, "is not there"),
        ("RevisionNotFoundError", 404, "is not there"),
        ("RemoteEntryNotFoundError", 404, "is not there"),
        ("EntryNotFoundError", None, "is not there"),
        ("HfHubHTTPError", 503, "server answers HTTP 503"),
        ("LocalEntryNotFoundError", None, r"no network .*\n.*models--owner--name"),
        ("OfflineModeIsEnabled", None, "no network"),
        ("HFValidationError", None, "cannot fetch .*HFValidationError: said by the hub"),
    ],
)
@pytest.mark.parametrize("address", ["hf://owner/name", "hf://owner/name/a.pth"])
def test_failures_of_the_hub(hub: SimpleNamespace, address: str, kind: str, status: int | None, said: str):
    hub.failure = failure(kind, status)
    with pytest.raises(WeightsError, match=said):
        fetched(address)


def test_the_hubs_reason_is_told(hub: SimpleNamespace):
    hub.failure = failure("LocalEntryNotFoundError")
    hub.failure.__cause__ = socket.gaierror(-2, "Name or service not known")
    with pytest.raises(WeightsError, match=r"no network \(.*Name or service not known"):
        fetched("hf://owner/name/a.pth")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_of_the_hub_that_cannot_be_written(hub: SimpleNamespace, number: int):
    hub.failure = OSError(number, os.strerror(number))
    with pytest.raises(WeightsError, match=f"cannot keep .*: {os.strerror(number)}\n.*HF_HOME"):
        fetched("hf://owner/name/a.pth")
