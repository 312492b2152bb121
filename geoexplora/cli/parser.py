"""The jsonargparse parser of a command: types of the settings, and the help. Torch-free."""

from __future__ import annotations

import argparse
import shutil
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jsonargparse

from geoexplora.bands import nearest
from geoexplora.cli.command import Command
from geoexplora.cli.layers import Setting, option
from geoexplora.cli.values import is_null, plain

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with a wide column of names, on lines that stay readable on wide terminals."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 118))


class Parser:
    """Types and help of a command's settings.

    Args:
        command: the command.
    """

    def __init__(self, command: Command) -> None:
        self.command = command
        self.types: dict[str, Any] = get_type_hints(command.options)
        self._parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
        for name, field in command.fields.items():
            self._parser.add_argument(option(name), type=self.types[name], default=field.default)

    def convert(self, name: str, setting: Setting) -> Any:
        """The value of a setting in its type.

        Raises:
            ValueError: if it has another type; says what is expected and what was found.
        """
        field, hint = self.command.fields[name], self.types[name]
        if is_null(setting.value) and type(None) in get_args(hint):
            return None
        read = field.metadata.get("read")
        value = read(setting.value) if read else setting.value
        if is_null(value):
            raise ValueError(f"must not be empty or null; expected {self._expected(name)}")
        try:
            return self._parser.parse_object({name: value}, defaults=False)[name]
        except argparse.ArgumentError:
            choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
            hint = nearest(str(setting.value), choices)
            found = f"{setting.value!r}" if isinstance(setting.value, str) else f"{plain(setting.value)}"
            raise ValueError(f"expected {self._expected(name)}, got {found}. {hint}".rstrip(". ")) from None

    def _expected(self, name: str) -> str:
        hint, said = self.types[name], self.command.fields[name].metadata.get("expects")
        kinds = [kind for kind in (get_args(hint) if _is_union(hint) else [hint]) if kind is not type(None)]
        if said:
            text = said
        elif get_origin(kinds[0]) is Literal:
            text = "one of " + ", ".join(map(str, get_args(kinds[0])))
        else:
            text = TYPE_NAMES[kinds[0]]
        return f"{text} or none" if len(kinds) < len(get_args(hint)) and _is_union(hint) else text

    def format_help(self, values: Mapping[str, Any], prog: str) -> str:
        """The help of the command.

        Args:
            values: what to show as the default of each setting.
            prog: how the program is called.
        """
        command = self.command
        parser = jsonargparse.ArgumentParser(
            prog=f"{prog} {command.name}",
            usage=f"{prog} {command.name} {command.usage}",
            description=command.description,
            epilog="\n".join(["examples:", *(f"  {prog} {example}" for example in command.examples)]),
            formatter_class=_HelpFormatter,
            add_help=False,
        )
        for base, names in command.groups.items():
            title, texts = _documentation(base)
            group = parser.add_argument_group(title)
            for name in names:
                field = command.fields[name]
                positional = field.metadata.get("positional")
                text = texts[name] if positional else self._with_default(name, texts[name], values[name])
                keywords: dict[str, Any] = {"help": text.replace("%", "%%"), "metavar": self._metavar(name)}
                if positional or self.types[name] is bool:
                    keywords["nargs"] = "?"
                group.add_argument(name if positional else option(name), **keywords)
        other = parser.add_argument_group("Settings and help")
        if command.configurable:
            text = "YAML file or recipe with settings; options given here have the last word"
            other.add_argument("--config", metavar="FILE|RECIPE", help=text)
            text = "print all settings, resolved, as YAML and stop"
            other.add_argument("--print-config", action="store_true", help=text)
        other.add_argument("-h", "--help", action="store_true", help="show this help and stop")
        return parser.format_help()

    def _with_default(self, name: str, text: str, value: Any) -> str:
        metadata = self.command.fields[name].metadata
        if metadata.get("known"):
            text += f"; known: {', '.join(metadata['known'])}"
        if value is None and metadata.get("required"):
            return f"{text} (required)"
        if value is None and "(none: " in text:
            return text.replace("(none: ", "(none, the default: ")
        return f"{text} (default: {show(value)})"

    def titles(self) -> dict[str, tuple[str, ...]]:
        """Names of the settings, by the title of their group."""
        return {_documentation(base)[0]: names for base, names in self.command.groups.items()}

    def _metavar(self, name: str) -> str:
        hint = self.types[name]
        given = self.command.fields[name].metadata.get("metavar")
        if given:
            return str(given)
        if bool in (hint, *get_args(hint)):
            return "true|false"
        choices = next((kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal), None)
        return name.upper() if choices is None else "|".join(map(str, get_args(choices)))


def show(value: Any) -> str:
    """A value as one would type it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        groups = value and isinstance(value[0], tuple)
        return ";".join(map(show, value)) if groups else ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in {Union, types.UnionType}


def _documentation(options: type) -> tuple[str, dict[str, str]]:
    """Title and help texts of a dataclass of options, from its docstring."""
    import docstring_parser  # only the help needs it

    parsed = docstring_parser.parse(options.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    title = (parsed.short_description or "Options").rstrip(".")
    return title, {one.arg_name: " ".join((one.description or "").rstrip(".").split()) for one in parsed.params}
