"""What a limiter costs a call that does not have to wait: `python -m benchmarks.limiter`.

The median of rounds of `acquire` and `release`, in CPU time of this process; nothing is sent.
"""

import asyncio
import statistics
import time

from chatkore_async import Demand, RateLimit, RateLimiter, Report
from chatkore_async.types import Usage

BODY = b'{"model":"m","messages":[{"role":"user","content":"%s"}],"max_tokens":50}' % (b"hello " * 100)
DEMAND = Demand(endpoint="https://host/v1", key="0123456789abcdef", model="m", size=len(BODY), attempt=1, body=BODY)
REPORT = Report(status=200, headers={"content-type": "x"}, usage=Usage(total_tokens=200), retry_after=None)
LIMITS = {
    "adaptive alone": RateLimit(),
    "requests": RateLimit(requests_per_minute=1e9),
    "requests, tokens and concurrency": RateLimit(requests_per_minute=1e9, tokens_per_minute=1e12, max_concurrency=100),
    "concurrency, not adaptive": RateLimit(max_concurrency=100, adaptive=False),
}


async def microseconds(limiter: RateLimiter) -> float:
    rounds = []
    for _ in range(15):
        began = time.process_time()
        for _ in range(5000):
            limiter.release(await limiter.acquire(DEMAND), REPORT)
        rounds.append((time.process_time() - began) / 5000 * 1e6)
    return statistics.median(rounds)


async def main() -> None:
    for name, limit in LIMITS.items():
        print(f"{name}: {await microseconds(RateLimiter(limit)):.1f} µs")


if __name__ == "__main__":
    asyncio.run(main())
