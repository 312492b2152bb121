"""From a command line to checked options: recipe, configuration files, command line, in rising order. Torch-free."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from geoexplora.cli.command import Command
from geoexplora.cli.layers import Layer, read_arguments, read_yaml
from geoexplora.cli.options import Options
from geoexplora.cli.parser import Parser
from geoexplora.cli.recipe_files import read_config, recipe_names
from geoexplora.cli.resuming import compare, saved_config
from geoexplora.cli.values import is_null
from geoexplora.errors import ConfigError
from geoexplora.registry import DATASETS

REPLACED = {
    "epochs": "max_steps",
    "warmup_epochs": "warmup_steps",
    "teacher_warmup_epochs": "teacher_warmup_steps",
    "freeze_last_epochs": "freeze_last_steps",
}
"""Lengths in epochs, and the lengths in steps that would hide them: who sets the first no longer wants the second."""


@dataclass(frozen=True)
class Request:
    """What the user asks of a command.

    Attributes:
        parser: the command's types and help.
        options: the settings.
        help: show the help, with these settings as the defaults, and stop.
        print_config: print the settings and stop.
        warnings: what the user should know about the settings.
    """

    parser: Parser
    options: Options
    help: bool
    print_config: bool
    warnings: tuple[str, ...] = ()


def resolve(command: Command, argv: Sequence[str]) -> Request:
    """Settle all settings of a command.

    Args:
        command: the command.
        argv: its command line, without the command's name.

    Raises:
        ConfigError: if anything is wrong; the message lists all of it.
    """
    parser = Parser(command)
    arguments = read_arguments(command, argv)
    layers = [*(_config_layer(command, name) for name in arguments.configs), arguments.layer]
    output, resuming = _text(layers, "output"), _text(layers, "resume").lower() in {"true", "yes", "on"}
    run = saved_config(output, command.name) if resuming and output else None
    settled = _Settled(command, parser)
    if run is not None:
        settled.apply(read_yaml(run.text, run.label, list(command.fields), command.name))
        before = dict(settled.values)
    else:
        variant = _text(layers, "objective") or _text(layers, "task")
        settled.apply(_recipe_layer(command, _text(layers, "dataset"), variant))
    for layer in layers:
        settled.apply(layer)
    request = Request(parser, command.options(**settled.values), arguments.help, arguments.print_config)
    if request.help:
        return request
    warnings = settled.check(request.options, complete=not request.print_config)
    if run is not None and not settled.problems:
        refused, allowed = compare(before, settled.values)
        settled.problems += refused
        warnings += allowed
    if settled.problems and resuming and run is None and output:
        settled.problems.insert(
            0, f"there is no run in {output} to resume. Check the path; to start it, mend the rest."
        )
    if settled.problems:
        raise ConfigError(numbered(settled.problems))
    return dataclasses.replace(request, warnings=tuple(warnings))


class _Settled:
    """The values settled so far, and everything found wrong with them."""

    def __init__(self, command: Command, parser: Parser) -> None:
        self.command = command
        self.parser = parser
        self.values: dict[str, Any] = {name: field.default for name, field in command.fields.items()}
        self.origins: dict[str, str] = {}
        self.broken: set[str] = set()
        self.problems: list[str] = []

    def apply(self, layer: Layer) -> None:
        """Lay a layer over what is settled."""
        self.problems += layer.problems
        for epochs, steps in REPLACED.items():
            if epochs in layer.settings and steps not in layer.settings and steps in self.values:
                self.values[steps] = None
        for name, setting in layer.settings.items():
            self.origins[name] = setting.where
            try:
                self.values[name] = self.parser.convert(name, setting)
            except ValueError as problem:
                self.broken.add(name)
                key = f"{name}: " if " line " in setting.where else ""
                self.problems.append(f"{setting.where}: {key}{problem}")

    def check(self, options: Options, complete: bool) -> list[str]:
        """Check the combinations of settings; returns the warnings.

        Args:
            options: the settings.
            complete: whether settings that only running needs must be there.
        """
        warnings = []
        for check, reads in self.command.checks.items():
            if self.broken & set(reads):
                continue  # reported already; what follows from it would only mislead
            for finding in check(options):
                files = [f"{key}: {self.origins[key]}" for key in finding.keys if " line " in self.origins.get(key, "")]
                text = finding.text + (f" [{'; '.join(files)}]" if files else "")
                if finding.kind == "warning":
                    warnings.append(text)
                elif finding.kind == "error" or complete:
                    self.problems.append(text)
        return warnings


def _text(layers: Sequence[Layer], name: str) -> str:
    """The last word of the layers on a setting, as written; empty if there is none."""
    values = [layer.settings[name].value for layer in layers if name in layer.settings]
    return values[-1] if values and isinstance(values[-1], str) and not is_null(values[-1]) else ""


def _config_layer(command: Command, name: str) -> Layer:
    try:
        text, label = read_config(name)
    except ConfigError as problem:
        return Layer(problems=[str(problem).replace("\n", ". ", 1)])
    return read_yaml(text, label, list(command.fields), command.name)


def _recipe_layer(command: Command, dataset: str, variant: str) -> Layer:
    """The recipe that ``--dataset`` stands for, where the command has one: for its objective or task, or in general.

    All of TorchGeo's datasets share ``torchgeo``, where there is none of their own name.
    """
    known = recipe_names() if command.configurable else []
    entry = DATASETS.get(dataset)
    families = (dataset.partition(":")[0], *(["torchgeo"] if entry and entry.is_torchgeo else []))
    names = [f"{command.name}/{family}{end}" for family in families for end in (f"-{variant}", "")]
    return next((_config_layer(command, name) for name in names if name in known), Layer())


def numbered(problems: Sequence[str]) -> str:
    """One message of several problems."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, start=1)]
    return "\n".join([f"{len(problems)} settings are wrong", *lines])


def to_yaml(request: Request) -> str:
    """The settings as YAML, by groups, such that ``--config`` reads them back."""
    config = request.options.to_config()
    sections = []
    for title, names in request.parser.titles().items():
        lines = [f"{name}: {_inline(config[name])}\n" for name in names if name in config]
        sections.append(f"# {title}\n{''.join(lines)}")
    return "\n".join(sections)


def _inline(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()
