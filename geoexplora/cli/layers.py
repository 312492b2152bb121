"""Where settings come from: the command line, and YAML files with the line of each setting. Torch-free.

Both are read into layers of texts, before any type is known, so that every problem can be reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import yaml

from geoexplora.bands import nearest
from geoexplora.cli.command import Command
from geoexplora.cli.values import Tree

SWITCH_WORDS = ("true", "false", "yes", "no", "on", "off")


@dataclass(frozen=True)
class Setting:
    """One value as written, and where: an option such as ``--rank``, or a file and its line."""

    value: Tree
    where: str


@dataclass
class Layer:
    """Settings of one source, by underscored name, with the problems found on reading it."""

    settings: dict[str, Setting] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass
class Arguments:
    """A command line, taken apart.

    Attributes:
        layer: the settings.
        configs: values of ``--config``, in order.
        help: whether ``--help`` stands anywhere.
        print_config: whether ``--print-config`` stands anywhere.
    """

    layer: Layer = field(default_factory=Layer)
    configs: list[str] = field(default_factory=list)
    help: bool = False
    print_config: bool = False


def option(name: str) -> str:
    """``whole_blocks`` -> ``--whole-blocks``."""
    return "--" + name.replace("_", "-")


def read_arguments(command: Command, argv: Sequence[str]) -> Arguments:
    """Take a command line apart without giving up at the first problem.

    ``--name value`` and ``--name=value`` both do, and so does the underscored spelling; ``--name`` and ``--no-name``
    switch. Names are never abbreviated, so that a new option cannot change what an old command line means. Of
    an option given twice the last counts, as scripts that append to a command line expect.
    """
    fields = command.fields
    named = [name for name, spec in fields.items() if not spec.metadata.get("positional")]
    switches = {name for name in named if fields[name].type in {"bool", bool}}
    positional = [name for name in fields if name not in named]
    by_name = {*named, *positional}  # what may stand without a name may also be named
    arguments = Arguments()
    settings, problems = arguments.layer.settings, arguments.layer.problems
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in {"-h", "--help"}:
            arguments.help = True
            continue
        if not word.startswith("--"):
            if positional:
                name = positional.pop(0)
                settings[name] = Setting(word, name)
            else:
                hint = "Join the items of a list by commas." if named and settings else ""
                problems.append(f"unexpected argument {word!r}. {hint}".rstrip())
            continue
        head, equals, value = word.partition("=")
        name = head[2:].replace("-", "_")
        following = words[0] if words and not words[0].startswith("--") else None
        if name == "print_config" and command.configurable:
            arguments.print_config = True
        elif name == "resume" and name in switches:
            folder = value if equals else words.pop(0) if following is not None else "true"
            settings[name] = Setting(folder, "--resume")
        elif name in switches and not equals:
            says_so = following is not None and following.lower() in SWITCH_WORDS
            settings[name] = Setting(words.pop(0) if says_so else "true", option(name))
        elif name.startswith("no_") and name[3:] in switches and not equals:
            settings[name[3:]] = Setting("false", head)
        elif name not in by_name and not (name == "config" and command.configurable):
            known = [option(one) for one in named] + ["--config", "--print-config"] * command.configurable
            problems.append(f"unknown option {head}. {nearest(head, known)}".rstrip())
            if not equals and following is not None and not positional:
                words.pop(0)  # its value, which would only be reported a second time
        elif not equals and following is None:
            problems.append(f"{head} needs a value")
        else:
            value = value if equals else words.pop(0)
            if name == "config":
                arguments.configs.append(value)
            else:
                settings[name] = Setting(value, option(name))
                positional = [one for one in positional if one != name]
    if "resume" in settings:
        _settle_resume(arguments.layer)
    return arguments


def _settle_resume(layer: Layer) -> None:
    """``--resume`` alone goes on in ``--output``; ``--resume RUN`` names the folder in the same breath."""
    folder = layer.settings["resume"].value
    if not isinstance(folder, str) or folder.lower() in SWITCH_WORDS:
        return
    layer.settings["resume"] = Setting("true", "--resume")
    output = layer.settings.setdefault("output", Setting(folder, "--resume")).value
    if output != folder:
        layer.problems.append(f"--output {output} and --resume {folder} name two folders. Give one of them.")


def read_yaml(text: str, source: str, known: Sequence[str], command: str) -> Layer:
    """Read the settings of a YAML file.

    Args:
        text: its content.
        source: its name, for messages.
        known: names of the settings there are.
        command: the command whose settings they are, for messages.
    """
    layer = Layer()
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        at = f"{source} line {mark.line + 1}, column {mark.column + 1}" if mark else source
        layer.problems.append(f"{at}: not valid YAML: {problem.problem or problem.context}")
        return layer
    except yaml.YAMLError as problem:
        layer.problems.append(f"{source}: not valid YAML: {problem}")
        return layer
    if root is None:
        return layer
    if not isinstance(root, yaml.MappingNode):
        layer.problems.append(f"{source}: expected lines such as 'rank: 32', found {_kind(root)}")
        return layer
    for key, node in root.value:
        where = f"{source} line {key.start_mark.line + 1}"
        name = str(key.value).replace("-", "_")
        if not isinstance(key, yaml.ScalarNode) or name not in known:
            nested = isinstance(node, yaml.MappingNode)
            hint = "Settings are not nested: leave out the section." if nested else nearest(name, known)
            layer.problems.append(f"{where}: unknown key {name!r} for {command}. {hint}".rstrip())
        elif name in layer.settings:
            layer.problems.append(f"{where}: {name} is set twice (before in {layer.settings[name].where})")
        else:
            layer.settings[name] = Setting(_tree(node), where)
    return layer


def _tree(node: yaml.Node) -> Tree:
    """A YAML node with its scalars as texts: their type is the setting's business, not YAML's."""
    if isinstance(node, yaml.SequenceNode):
        return [_tree(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _tree(value) for key, value in node.value}
    return None if node.tag == "tag:yaml.org,2002:null" else str(node.value)


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
