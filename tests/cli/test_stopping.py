"""Commands that a signal stops outside of training, where Lightning has no part in it."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest

from geoexplora.cli import main as cli
from geoexplora.cli.stopping import way_on
from geoexplora.runs.folder import RunFolder


def test_sigterm_at_work(monkeypatch, capsys):
    load = cli.load_command
    at_work = {"run": lambda options: os.kill(os.getpid(), signal.SIGTERM)}
    monkeypatch.setattr(cli, "load_command", lambda name: dataclasses.replace(load(name), **at_work))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["demo"]) == 143
    assert capsys.readouterr().err == "geoexplora demo: stopped by SIGTERM.\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_only_the_first_process_speaks(monkeypatch, capsys):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_command", interrupt)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["pretrain"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["last_checkpoint", "previous_checkpoint"])
def test_way_on(tmp_path, name):
    path = tmp_path / "my run"
    resume = f"geoexplora finetune --resume '{path}'"
    assert way_on("geoexplora finetune", path) == "There is nothing to resume yet: start again."
    with RunFolder(path).create() as folder:
        folder.write_config({})
        assert way_on("geoexplora finetune", path) == f"There is no checkpoint yet. Start again with: {resume}"
        getattr(folder, name).touch()
        assert way_on("geoexplora finetune", path) == f"Go on with: {resume}"
