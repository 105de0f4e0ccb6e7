"""Even pacing, and what estimates are worth. Numbers in, numbers out: no clock and no I/O.

The pacing is the generic cell rate algorithm (ITU-T I.371), a token bucket in two additions: it keeps one moment,
`due`, at which the bucket would be full again.
"""

from typing import Final

BURST: Final = 0.1
"""Seconds' worth that may be sent at once after a pause.

It makes up for an event loop that wakes late. It is not the whole second that a provider may grant, since one that
counts by slices would see that second and the next one in the same slice.
"""


class Pace:
    """How often something may happen. A cost is in seconds: how long the allowance for it takes to come back."""

    __slots__ = ("due",)

    def __init__(self) -> None:
        self.due = float("-inf")

    def __repr__(self) -> str:
        return f"<Pace due {self.due}>"

    def ready_at(self, cost: float) -> float:
        """Return the first moment at which `cost` may be spent.

        What costs more than the burst has to find the bucket full, and is then let through: it would never fit.
        """
        return self.due - BURST + cost if cost < BURST else self.due

    def spend(self, now: float, cost: float) -> None:
        """Spend `cost`, whether there is enough or not."""
        self.due = max(self.due, now) + cost

    def correct(self, cost: float, latest: float) -> None:
        """Spend `cost` more, or give some back when it is negative: what was spent turned out to be different.

        Args:
            cost: the difference.
            latest: later than this nobody has to wait for it.
        """
        self.due = min(self.due + cost, max(self.due, latest))

    def forgive(self) -> None:
        """Forget what was spent."""
        self.due = float("-inf")

    def start(self, when: float, cost: float) -> None:
        """Let nothing through before `when`, the first `cost` then, and nothing all at once."""
        self.due = max(self.due, when + max(0.0, BURST - cost))

    def hasten(self, now: float, cost: float) -> None:
        """Let the next `cost` through no later than if it were spent now: costs were higher, and are not any more."""
        self.due = min(self.due, now + cost + BURST)


class Calibration:
    """How far the estimates of tokens are off on average, by what the last answers used.

    Attributes:
        mean: tokens that one request uses, or `None` before the first answer.
    """

    __slots__ = ("_estimated", "_used", "mean")

    _MEMORY: Final = 0.95  # the last twenty answers, more or less
    _LIMIT: Final = 20.0  # usage that is nonsense is not to stop a queue, nor to open it

    def __init__(self) -> None:
        self._estimated = self._used = 0.0
        self.mean: float | None = None

    def __repr__(self) -> str:
        return f"<Calibration x{self.factor:.2f}>"

    @property
    def factor(self) -> float:
        """What an estimate is to be multiplied by."""
        if self._estimated == 0 or self._used == 0:
            return 1.0
        return min(max(self._used / self._estimated, 1 / self._LIMIT), self._LIMIT)

    def learn(self, estimated: float, used: float) -> None:
        """Take an answer into account.

        Args:
            estimated: tokens, before they were multiplied by `factor`.
            used: tokens.
        """
        if self.mean is None:
            self.mean = used
            # The first answer alone may be the exception: the estimate counts as much as it.
            self._estimated = self._used = estimated
        self.mean += (used - self.mean) * (1 - self._MEMORY)
        self._estimated = self._estimated * self._MEMORY + estimated
        self._used = self._used * self._MEMORY + used
