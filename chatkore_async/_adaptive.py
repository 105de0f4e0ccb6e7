"""Finding out what a server bears: a rate and a concurrency. Numbers in, numbers out: no clock and no I/O.

Both are limits that begin unknown, are cut when the server refuses, and grow while somebody waits for them. Either is
needed: a concurrency alone cannot keep a rate when answers are quick, and a rate alone cannot keep a concurrency when
answers take now one second and now ten.

A refusal does not say which of them was too high. The concurrency was, if more were in flight than ever lately;
otherwise the rate was. Where this is wrong, the next refusal puts it right. Of many refusals that were under way
together one counts; the others only correct what had been taken for accepted.

The growth is that of TCP CUBIC (RFC 9438 §4): quickly up to a fraction of what was accepted, slowly around it, and ever
faster when it is long past and nothing was refused.
"""

from collections import deque
from typing import Final

FRACTION: Final = 0.9
"""What is left of a limit when it is cut."""

SPAN: Final = 8.0
"""Seconds until a limit that was cut is back where it was, at least."""

SPAN_ATTEMPTS: Final = 30
"""Attempts until it is back, at least: each time costs a refusal, which is to stay a small share."""

SPAN_DELAYS: Final = 3
"""The same in delays until a refusal is known: what is refused meanwhile was sent in ignorance."""

SPAN_HOLDS: Final = 20
"""The same in seconds for which the refusal held all back, up to `SPAN_OF_HOLDS`: that time is lost."""

SPAN_OF_HOLDS: Final = 60.0

RETURN: Final = 1.0
"""Attempts a second after an outage before which nothing was known."""

SETTLED: Final = 4.0
"""Seconds after which a number of attempts in flight counts as usual."""

ENOUGH: Final = 0.3
"""The share of a rate that has to have been accepted, if that is to tell where the limit is."""

BEYOND: Final = 4.0
"""How much faster a limit grows above what was accepted than CUBIC lets it: a limit that was raised is found sooner."""

SLOWEST: Final = 1 / 60
"""Attempts a second, below which no cut goes."""

_SAMPLE: Final = 1 / 16  # seconds between two entries of the history
_KEPT: Final = 1200  # entries of the history: a refusal may come more than a minute late
INFINITY: Final = float("inf")


class Climb:
    """A limit that is looked for.

    Args:
        is_rate: whether it counts attempts a second; then it is given the time to be tried with a few of them.

    Attributes:
        value: the limit now; infinite until the first cut.
        ceiling: what is known to be accepted; infinite until it is known.
        span: seconds from the fraction of the ceiling to the ceiling.
        doubling: seconds in which the limit doubles while it is below that fraction.
    """

    __slots__ = ("_clock", "_is_rate", "ceiling", "doubling", "span", "value")

    def __init__(self, *, is_rate: bool = False) -> None:
        self._is_rate = is_rate
        self.value = self.ceiling = INFINITY
        self.span: float = SPAN
        self.doubling: float = 1.0
        self._clock = 0.0  # seconds of growth since it was back at the fraction

    def __repr__(self) -> str:
        return f"<Climb {self.value:.4g}/{self.ceiling:.4g}>"

    def cut(self, value: float, ceiling: float) -> None:
        """Go on from `value`; `ceiling` is what is known to be accepted."""
        self.value, self.ceiling = value, ceiling
        self._clock = 0.0

    def scale(self, share: float) -> None:
        """Correct what the last cut was based on."""
        self.value = max(self.value * share, SLOWEST)
        self.ceiling = max(self.ceiling * share, self.value)

    def grow(self, seconds: float) -> None:
        """Grow, after somebody waited for this limit, so that it is finite, for so long."""
        threshold = self.ceiling * FRACTION
        if self.value < threshold * 0.999:
            doubling = max(self.doubling, 2 / self.value) if self._is_rate else self.doubling
            self.value = min(self.value * 2 ** min(seconds / doubling, 1.0), threshold)
            return
        self._clock += seconds
        span = max(self.span, SPAN_ATTEMPTS / self.ceiling) if self._is_rate else self.span
        bend = (self._clock / span - 1) ** 3
        self.value = self.ceiling * (1 + (1 - FRACTION) * (bend if bend < 0 else bend * BEYOND))


class Sent:
    """An attempt that was let in, as far as the search has to know it.

    Attributes:
        at: the moment it was let in.
        number: counts those let in, from 1.
        level: how many were in flight with it.
        rate: the limit under which it was sent.
    """

    __slots__ = ("at", "level", "number", "rate")

    at: float
    number: int
    level: int
    rate: float


class _Moment:
    """An entry of the history: how many had been let in, and how many were in flight at most until the next entry."""

    __slots__ = ("at", "level", "number")

    def __init__(self, at: float, number: int) -> None:
        self.at = at
        self.number = number
        self.level = 0


class Search:
    """The rate and the concurrency of one endpoint, key and model.

    Attributes:
        rate: attempts a second.
        concurrency: attempts in flight.
        interval: seconds between two attempts, by the rate.
        places: how many may be in flight, by the concurrency.
        delay: seconds until a refusal is known, averaged.
        is_out: whether nothing was accepted between the last two refusals, nor since.
    """

    __slots__ = (
        "_accepted",
        "_binding",
        "_counted_from",
        "_counted_to",
        "_history",
        "_latest",
        "_mark",
        "_since",
        "_since_number",
        "concurrency",
        "delay",
        "interval",
        "is_out",
        "places",
        "rate",
    )

    def __init__(self) -> None:
        self.rate = Climb(is_rate=True)
        self.concurrency = Climb()
        self.interval = 0.0
        self.places = INFINITY
        self.delay = 0.0
        self._history: deque[_Moment] = deque(maxlen=_KEPT)
        self._latest = _Moment(-INFINITY, 0)
        self._binding: Climb | None = None
        self._mark = 0.0
        self._since = -INFINITY  # when the attempts after the last cut begin
        self._since_number = 0  # how many were let in before
        self._accepted = 0.0  # of the attempts that the last cut of the rate counted
        self._counted_from = self._counted_to = 0.0  # their numbers
        self.is_out = False

    def __repr__(self) -> str:
        return f"<Search {self.rate.value:.4g}/s, {self.concurrency.value:.4g} in flight>"

    def note(self, sent: Sent) -> None:
        """Take into account that an attempt goes out."""
        latest = self._latest
        if sent.at - latest.at >= _SAMPLE:
            latest = self._latest = _Moment(sent.at, sent.number - 1)
            self._history.append(latest)
        latest.level = max(latest.level, sent.level)

    @property
    def is_waited_for(self) -> bool:
        """Whether the queue waits for one of the two."""
        return self._binding is not None

    def wait(self, now: float, limit: Climb | None) -> None:
        """Take note that the queue waits for `limit`, or for none of these; what it waited for until now grows."""
        if self._binding is not None:
            self._binding.grow(now - self._mark)
            self._apply()
        self._binding, self._mark = limit, now

    def accepted(self) -> bool:
        """Take into account that an attempt which went out after the last cut was not refused.

        True if that ends an outage. What was accepted before it is not certain to be; half of that is tried.
        """
        if not self.is_out:
            return False
        self.is_out = False
        known = RETURN if self.rate.ceiling == INFINITY else self.rate.ceiling * FRACTION / 2
        self.rate.value = max(self.rate.value, known)
        self._apply()
        return True

    def refused(self, sent: Sent, now: float, hold: float) -> None:
        """Cut one of the two. To be told of the first refusal after a cut.

        Args:
            sent: the attempt that was refused.
            now: the moment.
            hold: seconds for which all are held back now.
        """
        self.wait(now, None)
        self._learn_delay(now - sent.at)
        is_crowded = self._is_crowded(sent, now)
        self._was_refused(sent)
        count, seconds = self._count(sent)
        for climb in (self.rate, self.concurrency):
            climb.span = max(SPAN, SPAN_DELAYS * self.delay, min(SPAN_HOLDS * hold, SPAN_OF_HOLDS))
            climb.doubling = max(1.0, self.delay)
        self._counted_from, self._counted_to, self._accepted = sent.number - count, sent.number, count
        self.is_out = count == 0
        if is_crowded:
            self._accepted = 0.0
            bearable = sent.level - 1.0
            self.concurrency.cut(bearable * FRACTION, bearable)
            if count:
                self.concurrency.span = max(self.concurrency.span, SPAN_ATTEMPTS * seconds / count)
        else:
            self._cut_rate(sent.rate, count / seconds if count else 0.0)
        self._apply()

    def _is_crowded(self, sent: Sent, now: float) -> bool:
        """Tell whether an attempt was refused because of how many were in flight with it.

        More than ever lately, and they had been as many for a while: while their number is still rising towards what
        the rate and long answers make of it, each one is more than ever.
        """
        if self.rate.ceiling == INFINITY or sent.level < 2:
            return False
        known = settled = 0
        for moment in self._history:
            if moment.at > now - 2 * self.delay:
                break  # those may have been refused, too
            known = max(known, moment.level)
            if moment.at < now - SETTLED:
                settled = known
        return sent.level > known and settled >= 0.95 * (sent.level - 1)

    def _cut_rate(self, tried: float, accepted: float) -> None:
        rate = self.rate
        if accepted == 0:
            value, ceiling = min(rate.value, 1.0) / 2, rate.ceiling
        elif accepted >= ENOUGH * tried:
            value = min(accepted, tried) * FRACTION
            # On the way up from nothing it doubles within the second over which what was accepted is averaged.
            ceiling = tried if rate.ceiling == INFINITY else min(accepted, tried)
        else:
            # Nothing was tried, little was sent, or the server bears far less than it did: it has to be looked for.
            value = min(accepted, rate.value) * FRACTION
            ceiling = max(rate.ceiling * FRACTION, value)
        rate.cut(max(value, SLOWEST), ceiling)

    def recount(self, sent: Sent, now: float) -> None:
        """Take into account that an attempt from before the last cut was refused as well."""
        self._learn_delay(now - sent.at)
        self._was_refused(sent)
        if self._counted_from <= sent.number < self._counted_to and self._accepted > 1:
            self.rate.scale((self._accepted - 1) / self._accepted)
            self._accepted -= 1
            self._apply()

    def resume(self, now: float, when: float, number: int) -> None:
        """Take note that all are held back until `when`, and that `number` went out before."""
        self.wait(now, None)
        self._since, self._since_number = when, number

    def _apply(self) -> None:
        self.interval = 1 / self.rate.value
        places = self.concurrency.value
        self.places = places if places == INFINITY else max(1, round(places))

    def _learn_delay(self, delay: float) -> None:
        self.delay = delay if not self.delay else self.delay * 0.8 + delay * 0.2

    def _was_refused(self, sent: Sent) -> None:
        """Forget that so many were in flight: they were not accepted."""
        for moment in reversed(self._history):
            if moment.at <= sent.at:
                moment.level = min(moment.level, sent.level - 1)
                break

    def _count(self, refused: Sent) -> tuple[float, float]:
        """Return how many attempts were let in just before a refused one since the last cut, and in which time."""
        window = max(1.0, 10 / refused.rate)
        start = refused.at - window
        if start < self._since:
            count = refused.number - 1 - self._since_number
            # They were paced: had they come quicker than the limit, it would not be one.
            return count, max(refused.at - self._since, count / refused.rate)
        return refused.number - 1 - self._number_at(start, refused.number - 1), window

    def _number_at(self, moment: float, later: float) -> float:
        """Return how many had been let in at a moment, where `later` is their number at a later one."""
        for entry in reversed(self._history):
            if entry.at <= moment:
                # An entry stands for those of the next sixteenth of a second, drawn evenly.
                return entry.number + (later - entry.number) * min((moment - entry.at) / _SAMPLE, 1.0)
            later = entry.number
        return later
