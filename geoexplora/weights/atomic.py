"""Writing files so that a reader sees the old one or the new one, never a part: kill, full disk, power cut."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from geoexplora.errors import RunError

_UNFINISHED = re.compile(r"\..*\.tmp|\.tmp[A-Za-z0-9]{6}")
"""Names of unfinished files: our own, and those of safetensors, which writes to one more beside ours."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


def write_failure(path: Path, problem: OSError, *, resumable: bool = True) -> RunError:
    """The error to raise when writing failed, with a remedy for the usual reasons.

    Args:
        path: what was to be written.
        problem: what the operating system said.
        resumable: whether it is a run, which can be gone on with.
    """
    reason = problem.strerror or str(problem)
    again = "go on with --resume. What was written before is untouched."
    if not resumable:
        again = "try again, or name another place with --output."
    if problem.errno in _FULL:
        remedy = f"Free some space or raise the quota, then {again}"
    elif problem.errno in _FORBIDDEN:
        remedy = "Make the folder writable, or name another one with --output."
    elif problem.errno in {errno.ENOTDIR, errno.EEXIST}:
        remedy = "A file stands where a folder is needed: move it away, or name another folder with --output."
    else:
        remedy = f"Check the disk and the path, then {again}"
    return RunError(f"cannot write {path}: {reason}", remedy)


def operating_system_error(problem: BaseException) -> OSError | None:
    """The operating system's error behind an exception of torch's or safetensors' writers, which hide it.

    ``torch.save`` raises a RuntimeError whose context is the OSError of the file it wrote to; safetensors puts the
    error number into the text of its own error.
    """
    link: BaseException | None = problem
    while link is not None:
        if isinstance(link, OSError):
            return link
        number = re.search(r"os error (\d+)", str(link)) if isinstance(link, SafetensorError) else None
        if number:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        link = link.__cause__ or link.__context__
    return None


@contextmanager
def atomic_path(target: Path, *, before_replace: Callable[[], None] | None = None) -> Iterator[Path]:
    """Give a temporary path beside ``target`` to write to; afterwards sync it to disk and put it in place.

    If anything fails, ``target`` stays as it was and the temporary file is removed. A killed process leaves the
    temporary file behind: :func:`remove_leftovers`.

    Args:
        target: the file to write; its folder is made if need be.
        before_replace: called when the new file is safe on disk and about to replace the old one.

    Yields:
        Where to write.

    Raises:
        RunError: if the disk is full, the folder unwritable, or writing failed otherwise.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that nobody else may read
        _sync(temporary)
        if before_replace is not None:
            before_replace()
        temporary.replace(target)
        with suppress(OSError):  # not every file system syncs folders; the file itself is synced
            _sync(target.parent)
    except (OSError, RuntimeError, SafetensorError) as problem:
        cause = operating_system_error(problem)
        if cause is None:
            raise
        raise write_failure(target, cause) from problem
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a small text file (UTF-8) atomically.

    Raises:
        RunError: if it cannot be written.
    """
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files that killed processes left in a folder, and return their paths.

    Only for a folder that no other process is writing to.
    """
    left = [path for path in folder.glob(".*") if _UNFINISHED.fullmatch(path.name) and path.is_file()]
    for path in left:
        with suppress(OSError):
            path.unlink()
    return left


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
