"""A lock on a run folder, so that two processes never write to the same run."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path

from geoexplora.errors import RunError

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_PATIENCE = 5.0  # seconds for a child that was just forked to drop the lock of its killed parent


class FolderLock:
    """A lock file that says who holds it (process id and host).

    The lock itself is the operating system's (``flock``): it ends with the process, however that dies, so a file left
    by a killed run is stale by itself and is taken over. Worker processes forked from the holder do not keep it.
    On a file system without locks, the process id in the file decides. Windows is not locked.

    Args:
        folder: the folder to lock.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._descriptor: int | None = None
        self._owner = 0

    @property
    def held(self) -> bool:
        """Whether this object, in this process, holds the lock."""
        return self._descriptor is not None and self._owner == os.getpid()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunError: if another process, or another object in this one, holds it.
            OSError: if the lock file cannot be written.
        """
        if self.held or sys.platform == "win32":
            return
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._lock(descriptor)
                if self._is_current(descriptor):  # else: its last holder removed it between open and lock
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        self._descriptor, self._owner = descriptor, os.getpid()
        _HELD.add(self)
        owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)

    def release(self) -> None:
        """Give the lock back and remove its file. Harmless if it is not held."""
        if self._descriptor is None:
            return
        if self.held:
            with suppress(OSError):  # a folder turned read-only keeps the file, which is harmless
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def forget(self) -> None:
        """Drop this process's copy of a lock that its parent holds: the lock then ends with the parent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _lock(self, descriptor: int) -> None:
        deadline = time.monotonic() + _PATIENCE
        try:
            while True:
                try:
                    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as problem:
                    pid, host = self._holder(descriptor)
                    if not _ended(pid, host) or time.monotonic() > deadline:
                        raise self._in_use(pid, host) from problem
                    time.sleep(0.05)
        except OSError as problem:
            if problem.errno not in _UNSUPPORTED:
                raise
            pid, host = self._holder(descriptor)
            if pid is not None and host == socket.gethostname() and not _ended(pid, host):
                raise self._in_use(pid, host) from problem
            log.warning("%s cannot be locked on this file system; make sure that one process uses it", self.path.parent)

    def _holder(self, descriptor: int) -> tuple[int | None, str]:
        try:
            owner = json.loads(os.pread(descriptor, 4096, 0))
            return int(owner["pid"]), str(owner["host"])
        except (ValueError, KeyError, TypeError):  # its holder has not written it yet
            return None, socket.gethostname()

    def _in_use(self, pid: int | None, host: str) -> RunError:
        who = f"process {pid} on {host}" if pid is not None else "another process"
        return RunError(
            f"{self.path.parent} is in use by {who}",
            "Wait for it or stop it, or name another folder with --output.",
        )


_HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget_inherited() -> None:
    for lock in list(_HELD):
        lock.forget()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_inherited)


def _ended(pid: int | None, host: str) -> bool:
    """Whether the process is known to have ended."""
    if pid is None or host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
