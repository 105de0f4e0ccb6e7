"""What of a batch is done and what is to do, decided line by line. No I/O.

Names and requests are remembered as marks of 15 bytes: a million of them take about 80 MB while the files are looked
through, and one bit each after that.
"""

from typing import Final

from ._batch_lines import LineError, Told, name_mark, read_task, task_mark

HANDFUL: Final = 10
"""How many faults are told; nobody reads more."""


class Plan:
    """Give it every line of the output, then every line of the input, then `conclude`.

    Args:
        retry_failed: whether failures are asked again.

    Attributes:
        total: requests in the input.
        completed: those that have an answer in the output.
        failed: those that have failed there, and are not asked again.
        again: lines of the output that are to be replaced.
        faults: why the batch cannot be run, each a line.
    """

    def __init__(self, *, retry_failed: bool) -> None:
        self._retry_failed = retry_failed
        self.total = self.completed = self.failed = self.again = 0
        self.faults: list[str] = []
        self._done: set[bytes] = set()
        self._again: set[bytes] = set()
        self._names: set[bytes] = set()
        self._todo = bytearray()

    @property
    def gives_up(self) -> bool:
        """Whether there are faults enough to stop looking."""
        return len(self.faults) >= HANDFUL

    def drops(self, told: Told) -> bool:
        """Tell whether a line of the output is to be replaced."""
        return self._retry_failed and told.failed

    def add_result(self, place: str, told: Told) -> None:
        """Take note of a line of the output.

        Args:
            place: of the line, for whoever has to look it up.
            told: what it tells.
        """
        if self.drops(told):
            marks, mark = self._again, name_mark(told.custom_id)
            self.again += 1
        else:
            marks, mark = self._done, told.mark
            self.failed += told.failed
            self.completed += not told.failed
        if mark in marks:
            self.faults.append(f"{place}: custom_id {told.custom_id!r} has a line already")
        marks.add(mark)

    def add_request(self, place: str, line: bytes) -> None:
        """Take note of a line of the input."""
        if not self.total & 7:
            self._todo.append(0)
        index, self.total = self.total, self.total + 1
        try:
            task = read_task(line)
        except LineError as error:
            self.faults.append(f"{place}: {error}")
            return
        name, whole = name_mark(task.custom_id), task_mark(task)
        if name in self._names:
            self.faults.append(f"{place}: custom_id {task.custom_id!r} has a line already")
        self._names.add(name)
        lines = [marks for marks, mark in self._places(name, whole) if mark in marks]
        if len(lines) > 1:
            self.faults.append(f"custom_id {task.custom_id!r} has two lines in the output")
        for marks, mark in self._places(name, whole):
            marks.discard(mark)
        if not lines or lines[0] is self._again:
            self._todo[index >> 3] |= 1 << (index & 7)

    def _places(self, name: bytes, whole: bytes) -> tuple[tuple[set[bytes], bytes], ...]:
        return (self._done, whole), (self._done, name), (self._again, name)

    @property
    def has_strangers(self) -> bool:
        """Whether the output has lines that answer no request of the input: `add_stranger` tells which."""
        return bool(self._done or self._again)

    def add_stranger(self, place: str, told: Told) -> None:
        """Look at a line of the output once more, now that all requests are known."""
        name = name_mark(told.custom_id)
        if told.mark not in self._done and name not in self._again:
            return
        if name not in self._names:
            self.faults.append(f"{place}: custom_id {told.custom_id!r} is not in the input")
        elif told.failed:
            self.faults.append(f"{place}: custom_id {told.custom_id!r} failed, and has another request now: retry it")
        else:
            self.faults.append(f"{place}: custom_id {told.custom_id!r} was answered, and has another request now")

    def conclude(self) -> None:
        """Forget all but what is to do."""
        self._done, self._again, self._names = set(), set(), set()

    def is_todo(self, index: int) -> bool:
        """Tell whether the request at a place in the input, from 0, is to be asked."""
        return bool(self._todo[index >> 3] >> (index & 7) & 1)
