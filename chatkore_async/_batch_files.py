"""The files of a batch. Everything here blocks, and is called in a thread."""

import contextlib
import gzip
import io
import os
import stat
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

from ._batch_lines import MAX_LINE, LineError, read_result
from ._hooks import logger
from ._json import BOM
from .errors import BatchError

if sys.platform == "win32":  # pragma: no cover
    fcntl = None
else:
    import fcntl

Source: TypeAlias = str | os.PathLike[str] | BinaryIO
"""Where requests come from: a path, or a binary file that can be sought."""

_GZIP = b"\x1f\x8b"  # RFC 1952 §2.3.1


class Input:
    """The requests, which are read twice: to see that all is well, and to ask.

    Args:
        source: where they come from; a file of the caller's is read from its beginning, and not closed.

    Attributes:
        name: for messages.

    Raises:
        BatchError: it cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self._owned = isinstance(source, str | os.PathLike)
        if isinstance(source, str | os.PathLike):
            self.name = os.fspath(source)
            with refusing(f"{self.name} cannot be read"):
                self._file: BinaryIO = Path(source).open("rb")  # noqa: SIM115 - `close` does
        else:
            name: object = getattr(source, "name", None)  # a number, where the file has no name
            self._file, self.name = source, name if isinstance(name, str) else "the input"
        try:
            with refusing(f"{self.name} cannot be read"):
                self._file.seek(0)
                self._is_gzip = self._file.read(2) == _GZIP
                self._stamp = self._look()
        except BaseException:
            self.close()
            raise

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line that is not blank, with its number from 1.

        Raises:
            BatchError: the file cannot be read on, or changed since it was opened.
        """
        self._file.seek(0)
        plain = gzip.GzipFile(fileobj=self._file) if self._is_gzip else self._file
        number = 0
        with refusing(f"{self.name} cannot be read"):
            while line := plain.readline(MAX_LINE + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(BOM)
                if len(line) > MAX_LINE:
                    raise BatchError(f"{self.name}, line {number}: it is longer than {MAX_LINE} bytes")
                if not line.isspace():
                    yield number, line
        self.check()

    def check(self) -> None:
        """See that the file is the one that was opened.

        Raises:
            BatchError: somebody has written to it.
        """
        if self._look() != self._stamp:
            raise BatchError(f"{self.name} was changed while it was read: run it again, to see what is missing now")

    def is_same_file(self, other: os.stat_result) -> bool:
        """Tell whether this file is another one's."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), other)
        except OSError:  # it is in memory
            return False

    def close(self) -> None:
        """Close what was opened here."""
        if self._owned:
            self._file.close()

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.fstat(self._file.fileno())
        except OSError:  # it is in memory
            return None
        return found.st_size, found.st_mtime_ns


class Output:
    """The results: locked against other runs, looked through, and appended to.

    The lock is the system's (`flock`) on the file itself, so that it ends with the process, however that ends. Windows
    has none that lets others read meanwhile: there, nobody keeps two runs apart.

    Args:
        path: made if it is missing.

    Attributes:
        name: for messages.

    Raises:
        BatchError: it is no file that can be written, or another run has it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self._path = Path(path).resolve()  # a link stays one when the file is replaced
        with refusing(f"{self.name} cannot be written"):
            try:
                self._file, self._is_provisional = _opened(self._path, os.O_EXCL), True
            except FileExistsError:
                self._file, self._is_provisional = _opened(self._path), False
        try:
            self._claim()
        except BaseException:
            self._file.close()
            raise

    @property
    def status(self) -> os.stat_result:
        """What the system knows of the file."""
        return os.fstat(self._file.fileno())

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line with its number from 1; the last one may have no line end."""
        with refusing(f"{self.name} cannot be read"), open(self._file.fileno(), "rb", closefd=False) as reader:
            reader.seek(0)
            number = 0
            while line := reader.readline(MAX_LINE + 1):
                number += 1
                yield number, line

    def mend(self, tail: bytes) -> None:
        """Cut off a last line that was not written to its end; end one that lacks nothing but its line end.

        Args:
            tail: what stands after the last line end: a result, or the beginning of one.

        Raises:
            BatchError: the file cannot be written.
        """
        with refusing(f"{self.name} cannot be written"):
            try:
                read_result(tail)
            except LineError:
                self._file.truncate(self.status.st_size - len(tail))
            else:
                _write(self._file, b"\n")

    def rewrite(self, keeps: Callable[[bytes], bool]) -> Iterator[None]:
        """Leave out lines; a generator, for it takes its time.

        What is kept is written to a new file, which then takes the place of the old one: whenever this is killed, the
        output is as it was or as it is to be.

        Args:
            keeps: tells whether to keep a line.

        Raises:
            BatchError: the new file cannot be written. The old one is as it was.
        """
        new_path = self._path.with_name(f".{self._path.name}.rewritten")
        with refusing(f"{self.name} cannot be written anew"):
            new_path.unlink(missing_ok=True)  # what a killed run left
            new = _opened(new_path, os.O_EXCL)
            try:
                for _, line in self.lines():
                    if keeps(line):
                        _write(new, line)
                    yield
                os.fsync(new.fileno())
                new_path.chmod(stat.S_IMODE(self.status.st_mode))
                new = self._replace(new, new_path)
            except BaseException:
                new.close()
                new_path.unlink(missing_ok=True)
                raise
        self._file = new

    def _replace(self, new: io.FileIO, new_path: Path) -> io.FileIO:
        if fcntl is None:  # pragma: no cover - Windows renames no open file, nor over one
            new.close()
            self._file.close()
            new_path.replace(self._path)
            return _opened(self._path)
        # Locked before it has the name, and the old one until then: nobody gets hold of either in between.
        fcntl.flock(new, fcntl.LOCK_EX)
        new_path.replace(self._path)
        self._file.close()
        return new

    def keep(self) -> None:
        """Let the file stay: the batch is run."""
        self._is_provisional = False

    def append(self, data: bytes) -> None:
        """Write whole lines.

        Raises:
            OSError: they cannot be written; what was written before is there.
        """
        try:
            _write(self._file, data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from error

    def sync(self) -> None:
        """Wait until the disk has it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file, and remove it if it was made for a batch that was refused."""
        if self._is_provisional:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _claim(self) -> None:
        if not stat.S_ISREG(self.status.st_mode):
            raise BatchError(f"{self.name} is no regular file, which could be gone on with")
        if fcntl is None:  # pragma: no cover
            return
        held = BatchError(f"another run writes to {self.name}: wait for it, or stop it")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise held from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s): see to it that no other run writes to it", self.name, error)
        # A run that replaced or removed the file had the lock of what was opened here.
        try:
            if not os.path.samestat(self._path.stat(), self.status):
                raise held
        except FileNotFoundError as error:
            raise held from error


@contextlib.contextmanager
def refusing(what: str) -> Generator[None, None, None]:
    """Turn what the system or a broken archive raises into a `BatchError`."""
    try:
        yield
    except OSError as error:
        raise BatchError(f"{what}: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise BatchError(f"{what}: {error}") from error


def _opened(path: Path, flags: int = 0) -> io.FileIO:
    binary: int = getattr(os, "O_BINARY", 0)  # of Windows
    return io.FileIO(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | binary | flags, 0o666), "a+b")


def _write(file: io.FileIO, data: bytes) -> None:
    """Write all of it: the system may take a part, and give its reason only for the rest."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
