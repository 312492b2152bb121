"""Settings of ``geoexplora finetune`` that make no sense together: all told at once, before anything heavy."""

from __future__ import annotations

from typing import Any

import pytest

from geoexplora.cli import main as cli
from geoexplora.cli.command import Command
from geoexplora.cli.finetune import FinetuneOptions

FULL = ("finetune", "--dataset", "sample", "--output", "runs/a")
INIT = ("--init", "dinov2-vitb14")


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> Any:
    """Answer (status, standard error, options) of a command line that does no work."""
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    load = cli.load_command

    def without_work(name: str) -> Command:
        command = load(name)
        fields = {key: getattr(command, key) for key in command.__dataclass_fields__}
        return Command(**fields | {"run": lambda options: seen.append(options) or 0})

    monkeypatch.setattr(cli, "load_command", without_work)

    def run(*words: str) -> tuple[int, str, Any]:
        seen.clear()
        status = cli.main(words)
        return status, capsys.readouterr().err, seen[0] if seen else None

    return run


def test_defaults(finetune: Any) -> None:
    """The paper's fine-tuning, where no recipe of the dataset says otherwise."""
    status, err, options = finetune(*FULL, *INIT)
    assert status == 0, err
    assert (options.task, options.method, options.rank) == ("classification", "lora", 8)
    plain = FinetuneOptions()
    assert (plain.lr, plain.drop_path, plain.weight_decay, plain.layer_decay) == (1e-3, 0.2, 0.0, 1.0)
    assert (plain.mixup, plain.cutmix, plain.label_smoothing) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((*INIT, "--model", "vit_base"), "--init gives weights. Leave one out"),
        ((), "--init is missing"),
        (("--model", "vit_base"), "--method lora adapts trained weights"),
        (("--model", "vit_base", "--method", "adalora"), "--method adalora adapts trained weights"),
        (("--model", "vit_bsae", "--method", "full"), "vit_base"),
        ((*INIT, "--rank", "0"), "--rank must be at least 1, not 0"),
        ((*INIT, "--alpha", "0"), "--alpha must be above 0"),
        ((*INIT, "--layer-decay", "0.75"), "--layer-decay 0.75 is for --method full"),
        ((*INIT, "--task", "segmentation", "--mixup", "0.8"), "--mixup means nothing for --task segmentation"),
        ((*INIT, "--task", "regression", "--cutmix", "1"), "--cutmix means nothing for --task regression"),
        ((*INIT, "--task", "segmentation", "--pool", "cls"), "--pool means nothing for --task segmentation"),
        ((*INIT, "--head", "dpt"), "--head means nothing for --task classification"),
        ((*INIT, "--levels", "2,L"), "--levels means nothing for --task classification"),
        ((*INIT, "--ignore-index", "255"), "--ignore-index means nothing for --task classification"),
        ((*INIT, "--task", "regression", "--num-classes", "3"), "--num-classes means nothing for --task regression"),
        ((*INIT, "--loss", "dice"), "--loss dice does not suit --task classification"),
        ((*INIT, "--task", "regression", "--loss", "ce"), "--loss ce does not suit --task regression"),
        ((*INIT, "--task", "multilabel", "--class-weights", "balanced"), "--class-weights belongs to --loss ce"),
        ((*INIT, "--loss", "focal", "--label-smoothing", "0.1"), "--label-smoothing belongs to --loss ce"),
        ((*INIT, "--num-classes", "1"), "--num-classes must be at least 2"),
        ((*INIT, "--task", "multilabel", "--num-classes", "1"), "--num-classes must be at least 2"),
        ((*INIT, "--eval-every", "0"), "--eval-every must be at least 1"),
        ((*INIT, "--patience", "0"), "--patience must be at least 1"),
        ((*INIT, "--mixup", "-1"), "--mixup must be at least 0"),
        ((*INIT, "--label-smoothing", "1"), "--label-smoothing must be at least 0 and below 1"),
        ((*INIT, "--random-erasing", "1.5"), "--random-erasing must be"),
        ((*INIT, "--crop-scale", "0.8,0.2"), "--crop-scale 0.8,0.2"),
        ((*INIT, "--class-weights", "1,-1,1,1,1"), "--class-weights must be at least 0"),
        ((*INIT, "--class-weights", "blanced"), "--class-weights"),
        ((*INIT, "--drop-path", "1"), "--drop-path"),
        ((*INIT, "--lr", "0"), "--lr"),
        ((*INIT, "--method", "lroa"), "lora"),
        ((*INIT, "--task", "detection"), "--task"),
        ((*INIT, "--bands", "B2,B99"), "B99"),
        ((*INIT, "--mixup", "nan"), "--mixup"),
        ((*INIT, "--class-weights", "1,nan,1,1,1"), "--class-weights"),
        ((*INIT, "--alpha", "inf"), "--alpha"),
    ],
)
def test_refused(finetune: Any, words: tuple[str, ...], text: str) -> None:
    status, err, options = finetune(*FULL, *words)
    assert status == 2
    assert options is None
    assert text in err
    assert "Traceback" not in err


def test_all_at_once(finetune: Any) -> None:
    status, err, _ = finetune(*FULL, *INIT, "--rank", "0", "--head", "dpt", "--loss", "mse", "--eval-every", "0")
    assert status == 2
    for text in ("4 settings are wrong", "--rank", "--head", "--loss", "--eval-every"):
        assert text in err


@pytest.mark.parametrize("method", ["linear", "full"])
def test_settings_of_low_rank_updates_that_change_nothing(finetune: Any, method: str) -> None:
    status, err, options = finetune(*FULL, *INIT, "--method", method)
    assert (status, options.rank) == (0, 8), "the recipe's rank is not the user's"
    assert "changes nothing" not in err
    status, err, _ = finetune(*FULL, *INIT, "--method", method, "--rank", "4", "--alpha", "2.5")
    assert status == 0
    assert f"warning: --rank 4 changes nothing here: --method {method} has no low-rank updates." in err
    assert "warning: --alpha 2.5 changes nothing here" in err


@pytest.mark.parametrize("method", ["lora", "adalora", "dora"])
def test_settings_of_low_rank_updates(finetune: Any, method: str) -> None:
    status, err, _ = finetune(*FULL, *INIT, "--method", method, "--rank", "4", "--alpha", "2.5")
    assert status == 0
    assert "changes nothing" not in err
