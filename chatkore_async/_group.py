"""What is known of one endpoint, key and model: may the next attempt go out, and if not, when may it.

Moments are passed in, in seconds of the event loop's clock; no I/O.
"""

from collections.abc import Callable
from typing import Final

from ._adaptive import INFINITY, Search, Sent
from ._config import RateLimit
from ._headers import rate_limit
from ._limiter import Report
from ._meta import RateLimitInfo
from ._pacing import Calibration, Pace

FIRST_HOLD: Final = 0.25
"""Seconds for which all are held back when a server refuses and does not say for how long. Doubled each time that
nothing is accepted in between."""

LONGEST_HOLD: Final = 30.0

FURTHEST_RESET: Final = 60.0
"""A limit that is reset later than this is not spread over the time until then: who has 50 requests left for the day
may want them now."""

AHEAD: Final = 1.0
"""Seconds for which one attempt goes ahead of the others, when an announced limit was reset."""

MOST_TOKENS: Final = 10**8
"""What a usage says beyond this is nonsense."""

DEBT: Final = 60.0
"""Seconds for which tokens that nobody had expected hold back others at most: then the provider's minute is over."""

GLANCE: Final = 0.5
"""Seconds after which a queue that waits for a place looks whether the limit has grown."""

# Most servers announce nothing, and that is to cost little.
_REQUESTS: Final = "x-ratelimit-remaining-requests"
_TOKENS: Final = "x-ratelimit-remaining-tokens"

_REFUSED: Final = (429, 503, 529)  # 529: overloaded, at Anthropic
_NOT_A_MATTER_OF_RATE: Final = ("InsufficientQuotaError", "NoChannelError")


class Permit(Sent):
    """Leave for one attempt. To be given back once; what is given back twice counts once."""

    __slots__ = ("clock", "epoch", "estimate", "group", "interval", "is_back", "tokens")

    clock: Callable[[], float]  # of the event loop that it was given in

    def __init__(self, group: "Group", at: float, estimate: float, tokens: float, interval: float) -> None:
        self.at = at
        self.number = group.sent
        self.level = group.in_flight
        self.rate = INFINITY if group.search is None else group.search.rate.value
        self.epoch = group.epoch  # counts the refusals before it that held the group back
        self.group = group
        self.estimate = estimate
        self.tokens = tokens  # what was spent
        self.interval = interval  # what was spent of the requests
        self.is_back = False

    def __repr__(self) -> str:
        return f"<Permit {self.number}>"


class Group:
    """One endpoint, key and model.

    Attributes:
        in_flight: permits that are out.
        sent: permits that were ever given.
        epoch: counts the refusals that held the group back.
        held_until: nothing goes out before.
        last: when something went out or came back last.
    """

    __slots__ = (
        "_announced",
        "_failures",
        "_first",
        "_interval",
        "_limit",
        "_per_token",
        "_places",
        "_requests",
        "_tokens",
        "calibration",
        "epoch",
        "held_until",
        "in_flight",
        "last",
        "search",
        "sent",
    )

    def __init__(self, limit: RateLimit) -> None:
        self._limit = limit
        self._interval = 60 / limit.requests_per_minute if limit.requests_per_minute else 0.0
        self._per_token = 60 / limit.tokens_per_minute if limit.tokens_per_minute else 0.0
        self._places = limit.max_concurrency or INFINITY
        self._requests = Pace()
        self._tokens = Pace()
        self._announced = Announced()
        self._failures = 0  # refusals with nothing accepted in between
        self._first = 1  # the number of the first permit after the last refusal
        self.calibration = Calibration()
        self.search = Search() if limit.adaptive else None
        self.in_flight = self.sent = self.epoch = 0
        self.held_until = self.last = -INFINITY

    def __repr__(self) -> str:
        return f"<Group {self.in_flight} in flight, {self.search}>"

    def ready_at(self, now: float, estimate: float) -> float:
        """Return when an attempt may go out, as far as is known: not after `now`, if it may go now.

        Infinite, if a permit has to come back first.
        """
        search, waits_for = self.search, None
        if now < self.held_until:
            when = self.held_until
        elif self.in_flight >= self._places:
            when = INFINITY
        elif search is not None and self.in_flight >= search.places:
            when, waits_for = now + GLANCE, search.concurrency
        else:
            interval = self._interval
            if search is not None and search.interval >= interval:
                interval = search.interval
                waits_for = search.rate
            when = self._requests.ready_at(interval) if interval else now
            if self._per_token and (tokens := self._tokens.ready_at(self._spent(estimate) * self._per_token)) > when:
                when, waits_for = tokens, None
            announced = self._announced
            if now < announced.reset_at and announced.due > when:
                when, waits_for = announced.due, None
        if search is not None and (when > now or search.is_waited_for):
            search.wait(now, waits_for if when > now else None)
        return when

    def let_in(self, now: float, estimate: float) -> Permit:
        """Spend what an attempt costs, and return its permit."""
        search = self.search
        interval = self._interval if search is None else max(self._interval, search.interval)
        tokens = 0.0
        if interval:
            self._requests.spend(now, interval)
        if self._per_token:
            tokens = self._spent(estimate)
            self._tokens.spend(now, tokens * self._per_token)
        self._announced.spend(now)
        self.in_flight += 1
        self.sent += 1
        self.last = now
        permit = Permit(self, now, estimate, tokens, interval)
        if search is not None:
            search.note(permit)
        return permit

    def take_back_unused(self, permit: Permit) -> None:
        """Undo what a permit cost that nobody used."""
        permit.is_back = True
        self.in_flight -= 1
        self._requests.correct(-permit.interval, INFINITY)
        self._tokens.correct(-permit.tokens * self._per_token, INFINITY)

    def take_back(self, permit: Permit, report: Report, now: float) -> None:
        """Learn from an attempt that is over."""
        permit.is_back = True
        self.in_flight -= 1
        self.last = now
        self._settle_tokens(permit, report, now)
        is_limited = report.error not in _NOT_A_MATTER_OF_RATE
        is_refused = is_limited and report.status in _REFUSED
        is_new = permit.epoch == self.epoch
        if is_refused:
            self._refused(permit, report, now, is_new=is_new)
        elif is_limited and report.retry_after is not None:
            self._hold(now, report.retry_after)
        if report.status is not None and not is_refused and is_new:
            self._failures = 0
            if self.search is not None and self.search.accepted():
                self._requests.hasten(now, self.search.interval)
        headers = report.headers
        if self.search is None or not (_REQUESTS in headers or _TOKENS in headers):
            return
        # A `Retry-After` is more exact: a reset may be the moment at which the last of many requests is refilled.
        if not (is_refused and report.retry_after is not None) and (info := rate_limit(headers)):
            self._announced.learn(info, permit.at, now, self.sent - permit.number, self.calibration.mean)

    def _spent(self, estimate: float) -> float:
        return estimate * self.calibration.factor

    def _settle_tokens(self, permit: Permit, report: Report, now: float) -> None:
        if report.usage is not None:
            said = report.usage.total_tokens or report.usage.prompt_tokens + report.usage.completion_tokens
            if said <= 0:
                return  # said, but not known
            used = float(min(said, MOST_TOKENS))
            self.calibration.learn(permit.estimate, used)
        elif report.status is not None and report.status >= 400:
            used = 0.0
        else:
            return
        if self._per_token:
            self._tokens.correct((used - permit.tokens) * self._per_token, now + DEBT)

    def _refused(self, permit: Permit, report: Report, now: float, *, is_new: bool) -> None:
        search = self.search
        if not is_new:
            # It was under way when another one was refused.
            if search is not None:
                search.recount(permit, now)
            if report.retry_after is not None:
                self._hold(now, report.retry_after)
            return
        self.epoch += 1
        if permit.number > self._first:
            self._failures = 0  # those let in before it, since the last refusal, were accepted
        self._first = self.sent + 1
        seconds = min(FIRST_HOLD * 2.0 ** min(self._failures, 60), LONGEST_HOLD)
        if report.retry_after is not None:
            seconds = report.retry_after
        self._failures += 1
        if search is not None:
            search.refused(permit, now, seconds)
            search.resume(now, max(now, self.held_until), self.sent)
        self._hold(now, seconds)

    def _hold(self, now: float, seconds: float) -> None:
        until = now + min(seconds, self._limit.max_hold)
        if until < self.held_until:
            return
        self.held_until = until
        interval = self._interval
        if self.search is not None:
            self.search.resume(now, until, self.sent)
            interval = max(interval, self.search.interval)
            if self.search.is_out:
                self._requests.forgive()  # attempts that are refused one by one are spaced by the holds
        self._requests.start(until, interval)


class Announced:
    """What the server said of its limits in headers: so much is left until it is reset.

    What is left is spread evenly over the time until then. Where a server refills all the time and means the moment at
    which its bucket is full (OpenAI does), that settles at a bucket half full and the whole rate.

    Attributes:
        due: when the next attempt may go out, up to `reset_at`.
        reset_at: when this is no longer true.
    """

    __slots__ = ("_at", "_is_over", "_left", "_sent_at", "due", "reset_at")

    def __init__(self) -> None:
        self._at = -INFINITY  # when the attempt went out whose answer said so
        self._sent_at = -INFINITY  # when any went out last
        self._left = 0.0  # requests, less those sent since
        self._is_over = False
        self.reset_at = -INFINITY
        self.due = -INFINITY

    def __repr__(self) -> str:
        return f"<Announced {self._left:.4g} left until {self.reset_at:.4g}>"

    def spend(self, now: float) -> None:
        """Take note that an attempt goes out."""
        self._sent_at = now
        if now < self.reset_at:
            self._left -= 1
            self._plan(now)
        elif self._is_over:
            self.reset_at = -INFINITY
        elif self.reset_at > -INFINITY:
            # It was reset. How much there is now, the answer to this attempt will tell: it goes ahead.
            self._is_over = True
            self.due = self.reset_at = now + AHEAD

    def learn(self, info: RateLimitInfo, at: float, now: float, since: int, mean_tokens: float | None) -> None:
        """Take an announcement into account, unless there was a later one.

        Args:
            info: what the headers say.
            at: when the attempt went out. The server may have counted at any moment since, and this is the first.
            now: the moment.
            since: attempts that went out after it.
            mean_tokens: tokens that a request uses, where that is known.
        """
        if at < self._at:
            return
        self._at = at
        self._is_over = False
        self.reset_at = -INFINITY
        spacing = 0.0
        for remaining, reset, size in (
            (info.remaining_requests, info.reset_requests, 1.0),
            (info.remaining_tokens, info.reset_tokens, mean_tokens),
        ):
            if remaining is None or reset is None or not size or reset > FURTHEST_RESET or at + reset <= now:
                continue
            left = remaining / size - since
            if (needed := (at + reset - now) / (max(left, 0.0) + 1)) > spacing:
                spacing, self._left, self.reset_at = needed, left, at + reset
        self._plan(now)

    def _plan(self, now: float) -> None:
        if self._left < 1:
            self.due = self.reset_at
        else:
            self.due = self._sent_at + (self.reset_at - now) / (self._left + 1)
