"""Many deadlines behind one timer, on a clock that the test moves."""

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest

from chatkore_async._deadlines import NEVER, PATIENCE, Deadline, Deadlines


class Timer:
    """What `call_at` returns."""

    def __init__(self, when: float, run: Callable[[], None]) -> None:
        self.at = when
        self.run = run
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def when(self) -> float:
        return self.at


class Loop:
    """A loop of timers only, whose time is what the test says."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []
        self.made = 0

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, run: Callable[[], None]) -> Timer:
        self.made += 1
        self.timers.append(Timer(when, run))
        return self.timers[-1]

    @property
    def waiting(self) -> list[float]:
        self.timers = [timer for timer in self.timers if not timer.cancelled]
        return sorted(timer.at for timer in self.timers)

    def go_to(self, when: float) -> None:
        """Let the time come, and every timer before it."""
        while self.waiting and self.waiting[0] <= when:
            timer = min(self.timers, key=Timer.when)
            self.timers.remove(timer)
            self.now = max(self.now, timer.at)
            timer.run()
        self.now = max(self.now, when)


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def deadlines(loop: Loop) -> Deadlines:
    return Deadlines(loop)  # type: ignore[arg-type]


@pytest.fixture
def passed() -> list[object]:
    return []


def noting(passed: list[object], name: object) -> Callable[[], None]:
    return lambda: passed.append(name)


def test_deadlines_pass_in_their_order(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """Each in its time, those of one moment as they were set, all behind a single timer."""
    for when in (3, 1, 2, 1):
        deadlines.set(when, noting(passed, (when, len(deadlines))))
        assert len(loop.waiting) == 1
    loop.go_to(0.99)
    assert passed == []
    loop.go_to(1)
    assert passed == [(1, 1), (1, 3)]
    loop.go_to(9)
    assert passed == [(1, 1), (1, 3), (2, 2), (3, 0)]
    assert (len(deadlines), loop.waiting) == (0, [])


def test_a_deadline_that_never_comes_is_no_entry(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """A call without a limit costs nothing until it gets one."""
    deadline = deadlines.set(NEVER, noting(passed, "a"))
    assert (len(deadlines), loop.waiting) == (0, [])
    deadline.when = 5
    deadlines.watch(deadline)
    assert (len(deadlines), loop.waiting) == (1, [5])
    loop.go_to(5)
    assert passed == ["a"]


def test_moving_a_deadline_later_is_an_assignment(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """The timer finds out when it gets there; no timer is made for it before."""
    deadline = deadlines.set(1, noting(passed, "a"))
    deadline.when = 2
    deadline.when = 3
    assert loop.made == 1
    loop.go_to(2.9)
    assert passed == []
    assert loop.waiting == [3]
    loop.go_to(3)
    assert passed == ["a"]


def test_a_deadline_moved_to_never_does_not_pass(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """It can be set again, and passes then."""
    deadline = deadlines.set(1, noting(passed, "a"))
    deadline.when = NEVER
    loop.go_to(10)
    assert (passed, loop.waiting) == ([], [])
    deadline.when = 11
    deadlines.watch(deadline)
    loop.go_to(11)
    assert passed == ["a"]


def test_moving_a_deadline_earlier_has_to_be_told(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """It passes at the earlier time, once."""
    deadline = deadlines.set(10, noting(passed, "a"))
    deadline.when = 2
    deadlines.watch(deadline)
    assert (len(deadlines), loop.waiting) == (1, [2])
    loop.go_to(20)
    assert passed == ["a"]
    assert len(deadlines) == 0


def test_a_deadline_moved_there_and_back_passes_once(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """Earlier and later again, to the very moment it had: a stream's idle time within its total does that."""
    deadline = deadlines.set(10, noting(passed, "a"))
    deadline.when = 2
    deadlines.watch(deadline)
    deadline.when = 10
    loop.go_to(2)
    assert (passed, len(deadlines)) == ([], 1)
    loop.go_to(100)
    assert passed == ["a"]
    assert (len(deadlines), loop.waiting) == (0, [])


def test_a_cancelled_deadline_does_not_pass(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """Cancelling twice, or after it passed, or one that never was set to a time, is fine."""
    first, second, never = (deadlines.set(when, noting(passed, when)) for when in (1, 2, NEVER))
    for _ in range(2):
        deadlines.cancel(first)
        deadlines.cancel(never)
        assert len(deadlines) == 1
    loop.go_to(5)
    deadlines.cancel(second)
    assert passed == [2]
    assert (len(deadlines), loop.waiting) == (0, [])


@pytest.mark.parametrize("end", ["cancelled", "passed"])
def test_what_is_over_stays_over(loop: Loop, deadlines: Deadlines, passed: list[object], end: str) -> None:
    """A stream that is read on after its deadline passed moves a deadline that is no more."""
    deadline = deadlines.set(1, noting(passed, "a"))
    if end == "passed":
        loop.go_to(2)
    deadlines.cancel(deadline)
    count = len(passed)
    deadline.when = 0
    loop.go_to(10)
    assert (len(passed), len(deadlines), loop.waiting) == (count, 0, [])


def test_an_earlier_deadline_brings_the_timer_forward(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """Only an earlier one does; the others wait behind it."""
    deadlines.set(5, noting(passed, 5))
    deadlines.set(9, noting(passed, 9))
    assert loop.made == 1
    deadlines.set(2, noting(passed, 2))
    assert (loop.made, loop.waiting) == (2, [2])


def test_one_that_passes_may_set_and_cancel_others(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """An idle time that passed sets the total anew."""

    def expire() -> None:
        passed.append("first")
        deadlines.cancel(other)
        deadlines.set(3, noting(passed, "set by it"))

    deadlines.set(1, expire)
    other = deadlines.set(2, noting(passed, "other"))
    loop.go_to(10)
    assert passed == ["first", "set by it"]
    assert len(deadlines) == 0


def test_one_that_passes_may_cancel_another_of_the_same_moment(
    loop: Loop, deadlines: Deadlines, passed: list[object]
) -> None:
    """What is cancelled does not pass, even if it was due already."""
    deadlines.set(1, lambda: deadlines.cancel(other))
    other = deadlines.set(1, noting(passed, "other"))
    loop.go_to(2)
    assert (passed, len(deadlines)) == ([], 0)


def test_a_deadline_says_itself_what_happens_then() -> None:
    """The base class knows of nothing that could."""
    with pytest.raises(NotImplementedError):
        Deadline(1).expire()


def test_one_that_raises_does_not_stop_the_others(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """It must not; if it does, the loop is told, and the deadlines of other calls pass all the same."""

    def expire() -> None:
        raise RuntimeError("boom")

    deadlines.set(1, expire)
    deadlines.set(1, noting(passed, "same moment"))
    deadlines.set(2, noting(passed, "later"))
    with pytest.raises(RuntimeError, match="boom"):
        loop.go_to(1)
    loop.go_to(2)
    assert passed == ["same moment", "later"]


def test_a_timer_that_comes_early_waits_on(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """Clocks have a resolution: asyncio may run a timer a little before its time."""
    deadlines.set(1, noting(passed, "a"))
    loop.timers.pop().run()
    assert (passed, loop.waiting) == ([], [1])


def test_what_is_cancelled_does_not_fill_the_memory(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """A hundred thousand calls that ended in time leave nothing but one timer."""
    kept = [deadlines.set(1000 + n, noting(passed, n)) for n in range(10)]
    for n in range(100_000):
        deadlines.cancel(deadlines.set(600 + n, noting(passed, "never")))
    assert len(deadlines) == len(kept)
    assert sys.getsizeof(deadlines._set) < 2000
    assert len(loop.waiting) == 1
    loop.go_to(2000)
    assert passed == list(range(10))


def test_looking_at_many_does_not_take_all_the_time(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """Ten thousand that pass one after another, a millisecond apart: they are not looked at each time."""
    count = 10_000
    for n in range(count):
        deadlines.set(n / 1000, lambda: passed.append(loop.now))
    for n in range(count // 100):
        loop.go_to(n / 10)
    late = [at - n / 1000 for n, at in enumerate(passed)]
    assert loop.made < count / 5
    assert max(late) <= PATIENCE * count


def test_after_closing_nothing_passes(loop: Loop, deadlines: Deadlines, passed: list[object]) -> None:
    """The timer is gone, what was set is over, and closing twice is fine."""
    deadline = deadlines.set(1, noting(passed, "a"))
    deadlines.set(2, noting(passed, "b"))
    for _ in range(2):
        deadlines.close()
        deadlines.cancel(deadline)
        assert (len(deadlines), loop.waiting) == (0, [])
    loop.go_to(5)
    assert passed == []


def test_they_say_how_they_are(deadlines: Deadlines) -> None:
    """For whoever debugs a hanging call."""
    deadline = deadlines.set(1.5, lambda: None)
    assert (repr(deadline), repr(deadlines)) == ("<Deadline 1.5>", "<Deadlines 1 set>")
    deadlines.cancel(deadline)
    assert repr(deadlines) == "<Deadlines 0 set>"


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_done_each_passes_once_in_its_time(
    loop: Loop, deadlines: Deadlines, passed: list[object], seed: int
) -> None:
    """A thousand moves at random, against a list that is looked through at every step."""
    dice = random.Random(seed)
    living: dict[int, Deadline] = {}
    expected: list[int] = []

    def do(step: int) -> Any:
        name = dice.choice(list(living)) if living else -1
        move = dice.random()
        if move < 0.4 or name < 0:
            when = loop.now + dice.choice([1, 2, 5, 10, 10, 50, NEVER])
            living[step] = deadlines.set(when, noting(passed, step))
        elif move < 0.55:
            deadlines.cancel(living.pop(name))
        elif move < 0.85:
            deadline = living[name]
            before, deadline.when = deadline.when, loop.now + dice.choice([1, 2, 5, 10, 50, NEVER])
            if deadline.when < before:
                deadlines.watch(deadline)
        else:
            now = loop.now + dice.choice([1, 1, 3, 20])
            due = sorted(name for name, deadline in living.items() if deadline.when <= now)
            for one in due:
                del living[one]
            expected.extend(due)
            loop.go_to(now)

    for step in range(1000):
        do(step)
        assert sorted(passed) == sorted(expected)  # type: ignore[type-var]
        assert len(deadlines) >= sum(deadline.when != NEVER for deadline in living.values())
        assert len(loop.waiting) <= 1
    for deadline in living.values():
        deadlines.cancel(deadline)
    assert len(deadlines) == 0
