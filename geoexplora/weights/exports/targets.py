"""What weights can be exported as, and whether a request for it can be met. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Format = Literal["timm", "torchgeo", "hf-dinov2", "satmae", "safetensors", "onnx"]
Task = Literal["classification", "segmentation"]
Dtype = Literal["float32", "float16", "bfloat16"]

_WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".onnx")


@dataclass(frozen=True)
class Target:
    """A format to export to.

    Attributes:
        suffixes: what a file of the format may end in; none if it is always a folder.
        folder: whether it is a folder of several files where no file is named.
    """

    suffixes: tuple[str, ...]
    folder: bool = False

    def is_folder(self, output: Path) -> bool:
        """Whether a path is meant as a folder of several files."""
        return self.folder and output.suffix not in self.suffixes

    def place(self, output: Path) -> Path:
        """What to write: where a format of one file is given a folder, ``encoder`` in it."""
        if self.folder or output.suffix in _WEIGHTS_SUFFIXES:
            return output
        return output / f"encoder{self.suffixes[0]}"

    @property
    def wanted(self) -> str:
        """What to name, for messages."""
        file = f"a file that ends in {' or '.join(self.suffixes)}, or " if self.suffixes else ""
        return f"{file}a folder"


TARGETS: dict[str, Target] = {
    "timm": Target((".safetensors", ".pth"), folder=True),
    "torchgeo": Target((".ckpt", ".pth")),
    "hf-dinov2": Target((), folder=True),
    "satmae": Target((".pth",)),
    "safetensors": Target((".safetensors",)),
    "onnx": Target((".onnx",)),
}


class Objection(NamedTuple):
    """Why a request cannot be met.

    Attributes:
        key: the setting to change.
        problem: what is wrong.
        remedy: what to do about it.
    """

    key: str
    problem: str
    remedy: str


def objections(form: Format, output: str | Path, task: Task | None, dtype: Dtype) -> Iterator[Objection]:
    """What stands against an export, as far as it shows without the weights.

    Args:
        form: the format.
        output: where to write.
        task: TorchGeo's task, for ``torchgeo``.
        dtype: type of the stored weights.
    """
    target = TARGETS[form]
    path = target.place(Path(output))
    folder = target.is_folder(path)
    if task is not None and form != "torchgeo":
        remedy = f"Leave out --task: weights of format {form} serve every task."
        yield Objection("task", "only TorchGeo's files differ between tasks", remedy)
    if dtype != "float32" and form == "onnx":
        problem = "weights of format onnx stay float32: onnxruntime computes in the type that they have"
        yield Objection("dtype", problem, "Leave out --dtype, and convert the result with onnxconverter-common.")
    if path.suffix in _WEIGHTS_SUFFIXES if folder else path.suffix not in target.suffixes:
        yield Objection("output", f"{output} cannot hold weights of format {form}", f"Name {target.wanted}.")
        return
    beside = [path.with_name(f"{path.name}.data")] if form == "onnx" else []  # where ONNX keeps large weights
    for place in (path, *beside):
        if _occupied(place, empty_folder_will_do=folder):
            yield Objection("output", f"{place} exists already", "Name another place, or move it away.")


def _occupied(path: Path, empty_folder_will_do: bool) -> bool:
    try:
        return path.exists() and not (empty_folder_will_do and path.is_dir() and not any(path.iterdir()))
    except OSError:  # writing will tell, such as that the name is too long
        return False
