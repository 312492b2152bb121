"""The command line in process, tiny settings, and a few runs that several tests read."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from geoexplora.cli.main import main
from geoexplora.datasets.sample_tree import write_fmow_tree
from geoexplora.runs.metrics import TIMING_COLUMNS, read_metrics

TINY = (
    "--model", "vit_pico", "--image-size", "16", "--patch-size", "8", "--decoder-width", "32", "--decoder-depth", "1",
    "--decoder-heads", "4", "--rank", "4", "--decoder-rank", "2", "--batch-size", "4", "--effective-batch-size", "8",
    "--max-steps", "4", "--warmup-steps", "1", "--lr", "1e-2", "--log-every", "1", "--checkpoint-every", "2",
    "--probe-every", "0", "--accelerator", "cpu", "--precision", "32", "--num-workers", "0",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a command answered."""

    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums come out bit by bit the same only with as many threads; several processes share few cores here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_command(*words: object) -> Outcome:
    """A command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(word) for word in words])
    return Outcome(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def geoexplora() -> Run:
    return run_command


@pytest.fixture(scope="session")
def command(fmow_tree: Path) -> Callable[..., list[str]]:
    """The words of a tiny pre-training on the labelled tree; further words change the settings."""

    def words(output: Path, *more: object, root: Path = fmow_tree) -> list[str]:
        first = ("pretrain", "--dataset", "fmow-sentinel", "--root", root, "--output", output)
        return [str(word) for word in (*first, *TINY, *more)]

    return words


@pytest.fixture(scope="session")
def pretrain(command: Callable[..., list[str]]) -> Run:
    """Run that command line."""

    def run(output: Path, *more: object, **settings: Any) -> Outcome:
        return run_command(*command(output, *more, **settings))

    return run


@pytest.fixture(scope="session")
def varied_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled tree of tiles of 20 to 40 px. Read only."""
    return write_fmow_tree(tmp_path_factory.mktemp("varied") / "data", (20, 40), limit=2)


@pytest.fixture(scope="session")
def photo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source weights: a run on the photographs, RGB, with a decoder. Read only."""
    output = tmp_path_factory.mktemp("photographs") / "run"
    words = ("--dataset", "photographs", "--output", output, *TINY, "--patch-size", "4", "--max-steps", "2")
    outcome = run_command("pretrain", *words)
    assert outcome.status == 0, outcome.err
    return output


@pytest.fixture(scope="session")
def explora_run(tmp_path_factory: pytest.TempPathFactory, pretrain: Run, photo_run: Path) -> Path:
    """ExPLoRA from the photographs to ten bands of Sentinel-2, four steps. Read only."""
    output = tmp_path_factory.mktemp("explora") / "run"
    outcome = pretrain(output, "--init", photo_run, "--probe-every", "2")
    assert outcome.status == 0, outcome.err
    (output / "stderr.txt").write_text(outcome.err)
    return output


@pytest.fixture
def comparable() -> Callable[[Path], list[dict[str, Any]]]:
    """The metrics of a run without the columns that measure the machine."""

    def read(run: Path) -> list[dict[str, Any]]:
        rows = read_metrics(run / "metrics.csv")
        return [{name: value for name, value in row.items() if name not in TIMING_COLUMNS} for row in rows]

    return read


def _work(words: list[str], err: Path) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as from a terminal: where the tests run in the
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # background, a shell has them ignore Ctrl-C
    with err.open("w") as stream, redirect_stdout(stream), redirect_stderr(stream):
        status = main(words)
    os._exit(status)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[str]], Any]]:
    """Start a command line in a process of its own, which a test may kill; its output goes to ``err.txt``."""
    started = []

    def run(words: list[str]) -> Any:
        process = multiprocessing.get_context("fork").Process(target=_work, args=(words, tmp_path / "err.txt"))
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


GEOEXPLORA = (sys.executable, "-m", "geoexplora")


@pytest.fixture(scope="session")
def console() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command as its users do, in a process of its own."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        line = [*GEOEXPLORA, *(str(word) for word in words)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)

    return run
