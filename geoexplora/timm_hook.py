"""Makes the models known to timm when both are imported, in whichever order, without importing torch before."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def register_with_timm() -> None:
    """Register the models now if timm is imported already, and otherwise as soon as it is.

    wrapt's import hooks would do the same, for 0.1 s at every start of the command line.
    """
    if "timm" in sys.modules:
        importlib.import_module("geoexplora.models")
    else:
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(MetaPathFinder):
    """Has the models registered with timm as soon as timm is imported; importing it for that would import torch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("geoexplora.models")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
