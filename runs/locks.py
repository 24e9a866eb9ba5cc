"""File locks, taken without waiting, and reported if their holder seems dead.

Also on disks without file locks.
"""

import errno
import os
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from evaluation.files import RunFiles
from system.terminal import print_warning
from utils import UserError, require

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
PATIENCE = 600.0  # seconds without a sign of life after which a lock is questioned, at least ...
UPDATES = 5  # ... or as many updates of the class
ANOTHER_DISK = "give an --output_path on a disk that has file locks"


def try_lock(lock: BaseFileLock) -> bool:
    """Take a lock, unless another process holds it.

    The system drops the lock of a process that dies.

    Raises:
        UserError: a link in its place, or a disk on which nothing can be locked.
    """
    path = Path(lock.lock_file)
    require(not path.is_symlink(), f"'{path}' is a link, not a lock: remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            # filelock's, of a disk without locks: `warn_without_locks` says more
            warnings.simplefilter("ignore")
            lock.acquire(blocking=False)
    except Timeout:
        return False
    except NotImplementedError as error:  # older releases of filelock
        raise UserError(
            f"'{path}' cannot be locked: {ANOTHER_DISK}, or pip install --upgrade filelock"
        ) from error
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise UserError(
                f"'{path}' cannot be locked ({error.strerror}): {ANOTHER_DISK}"
            ) from error
        raise
    return True


def is_marker(path: Path) -> bool:
    """Return whether a lock is only a file that names its holder, and stays when that dies."""
    with suppress(OSError):
        return path.stat().st_size > 0
    return False


def warn_without_locks(output_path: str):
    """Try a lock on the disk of `output_path`, and warn if it has none."""
    absolute = Path(output_path).absolute()
    folder = next(parent for parent in (absolute, *absolute.parents) if parent.is_dir())
    probe = FileLock(folder / f".class-tokens.{os.getpid()}.lock")
    try_lock(probe)
    has_none = is_marker(Path(probe.lock_file))
    probe.release()
    Path(probe.lock_file).unlink(missing_ok=True)
    if has_none:
        print_warning(
            f"'{output_path}' is on a disk without file locks, so a process that dies on another "
            "machine keeps its classes until its lock is removed"
        )


def describe_silence(lock_file: Path, files: Iterable[Path], patience: float = PATIENCE) -> str:
    """Describe the lock, its age and what to do if its holder seems dead; else return ''.

    That is if none of the holder's files was written for `patience` seconds, by the clock of the
    disk: those of machines differ.
    """
    signs = [*files, lock_file] if is_marker(lock_file) else list(files)
    written = []
    for file in signs or [lock_file]:
        with suppress(OSError):  # a process that lives has just renamed it
            written.append(file.stat().st_mtime)
    with tempfile.TemporaryFile(dir=lock_file.parent) as now:
        age = os.fstat(now.fileno()).st_mtime - max(written, default=0)
    if not written or age <= patience:
        return ""
    return (
        f"'{lock_file}' has shown no sign of life for {describe_duration(age)}: if no process works"
        " there any more, remove that file and run the same command again"
    )


def describe_duration(seconds: float) -> str:
    """Format a duration in the largest unit of which there are two or more."""
    for unit, length in (("days", 86_400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 60:.0f} minutes"


def find_patience(files: RunFiles) -> float:
    """Find how long a class may be silent: as long as some of its updates take."""
    with suppress(OSError):
        updates = len(files.history_file.read_bytes().splitlines())
        seconds = files.history_file.stat().st_mtime - files.config_file.stat().st_mtime
        return max(PATIENCE, UPDATES * seconds / max(1, updates))
    return PATIENCE
