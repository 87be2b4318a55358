"""Who does a run of a study: one process of any number, on any number of machines that share the study's folder.

A lease is a file `NAME.lease.GENERATION` that its holder touches every few seconds. One that was not touched for
`expiry` seconds, by the clock of the file system that has it, is over: who makes the file of the next generation first,
which the file system lets one do, holds it. On the machine of a holder that has ended there is no need to wait: a lock
that the system takes back tells so. A holder that finds a later generation, because it was stopped for long, ends.
"""

import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import Timeout

from foldrank.data.cache import lock_folder, machine_lock


@contextmanager
def lease(folder: Path, name: str, expiry: float) -> Iterator[bool]:
    """Holds the lease of `name` in a block; what it gives is whether this process does, and not another one.

    Args:
        folder: that all machines see.
        name: of what is done.
        expiry: seconds after which a holder that does not answer has lost it.
    """
    lock = machine_lock("lease", folder.resolve() / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        mine = _take(folder, name, expiry)
        if mine is None:
            yield False
            return
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(mine, expiry / 6, ended), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            ended.set()
            beat.join()
            os.utime(mine, (0, 0))  # over at once; its file stays, so that generations go on
    finally:
        lock.release()


def _take(folder: Path, name: str, expiry: float) -> Path | None:
    """The file of a lease that this process holds from now on; None where another one does."""
    files = _generations(folder, name)
    if files:
        try:
            stat, holder = files[-1].stat(), files[-1].read_text()
        except FileNotFoundError:  # who took it over has taken it away
            return None
        ended_here = holder == _machine()  # or its lock would not be free
        if not ended_here and _now(folder) - stat.st_mtime < expiry:
            return None
    generation = 1 + (_generation(files[-1]) if files else 0)
    mine = folder / f"{name}.lease.{generation}"
    try:
        with mine.open("x") as file:
            file.write(_machine())
    except FileExistsError:
        return None
    for older in files:
        older.unlink(missing_ok=True)
    return mine


def _beat(mine: Path, seconds: float, ended: threading.Event) -> None:
    name = mine.name.rpartition(".lease.")[0]
    while not ended.wait(seconds):
        later = _generations(mine.parent, name)
        if not later or later[-1] != mine:
            print(  # noqa: T201 - the process ends here
                f"foldrank compare: {name} was taken over by another process, since this one did not answer for long",
                file=sys.stderr,
            )
            os.kill(os.getpid(), signal.SIGKILL)  # what it would still write is another process's by now
        os.utime(mine)


def _generations(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}.lease.*"), key=_generation)


def _generation(file: Path) -> int:
    return int(file.name.rpartition(".")[2])


def _now(folder: Path) -> float:
    """Seconds by the clock of the file system, which need not be this machine's."""
    file = folder / f".clock-{uuid.uuid4().hex}"
    file.touch()
    try:
        return file.stat().st_mtime
    finally:
        file.unlink()


def _machine() -> str:
    """Names all processes among which `lock_folder` tells who has ended, until this machine starts anew."""
    file = lock_folder() / "machine"
    if not file.exists():
        mine = file.with_name(f"machine-{uuid.uuid4().hex}")
        mine.write_text(uuid.uuid4().hex)
        with suppress(FileExistsError):
            os.link(mine, file)  # whole, and of the first one
        mine.unlink()
    boot = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text() + (boot.read_text().strip() if boot.exists() else "")
