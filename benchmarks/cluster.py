"""How many permits a second the limiter of a cluster hands out, and what that costs: `python -m benchmarks.cluster`.

A local Ray, one limiter without a limit, and processes in which many calls ask at once and give back at once; nothing
is sent. It needs the extra `ray`. Beside permits a second: messages a second, and the CPU time of the limiter's process
for each permit.
"""

import argparse
import asyncio
import os
import resource
import time
from pathlib import Path
from typing import Any

import ray

from chatkore_async import Demand, RateLimit, Report
from chatkore_async.integrations.ray import ClusterLimiter, _LimiterActor
from chatkore_async.types import Usage

DEMAND = Demand(endpoint="https://host/v1", key="0123456789abcdef", model="m", size=700, attempt=1)
REPORT = Report(status=200, headers={"content-type": "x"}, usage=Usage(total_tokens=200), retry_after=None)


class Client:
    """A process that asks."""

    async def ask(self, limiter: ClusterLimiter, calls: int, seconds: float) -> int:
        limiter.release(await limiter.acquire(DEMAND), REPORT)
        ends = time.monotonic() + seconds
        done = 0

        async def worker() -> None:
            nonlocal done
            while time.monotonic() < ends:
                limiter.release(await limiter.acquire(DEMAND), REPORT)
                done += 1

        await asyncio.gather(*(worker() for _ in range(calls)))
        return done


class Measured(_LimiterActor):
    """The limiter's actor, which counts."""

    messages = 0

    async def exchange(self, message: bytes) -> bytes:
        self.messages += 1
        return await super().exchange(message)

    async def used(self) -> tuple[int, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return self.messages, usage.ru_utime + usage.ru_stime


def measure(processes: int, calls: int, seconds: float) -> None:
    limiter: Any = ClusterLimiter()
    limiter._actor = ray.remote(Measured).options(num_cpus=0, max_concurrency=10_000).remote(RateLimit())
    clients = [ray.remote(Client).options(num_cpus=0).remote() for _ in range(processes)]
    ray.get([client.ask.remote(limiter, 1, 0.1) for client in clients])
    messages, cpu = ray.get(limiter._actor.used.remote())
    done = sum(ray.get([client.ask.remote(limiter, calls, seconds) for client in clients]))
    messages_after, cpu_after = ray.get(limiter._actor.used.remote())
    print(
        f"{processes} processes, {calls} calls each: {done / seconds:.0f} permits/s, "
        f"{(messages_after - messages) / seconds:.0f} messages/s, "
        f"{(cpu_after - cpu) / done * 1e6:.0f} µs CPU of the limiter for a permit, "
        f"which was busy {(cpu_after - cpu) / seconds:.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 8])
    parser.add_argument("--calls", type=int, nargs="*", default=[1, 64, 500], help="at once in each process")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path.cwd())}},
    )
    for processes in options.processes:
        for calls in options.calls:
            measure(processes, calls, options.seconds)


if __name__ == "__main__":
    main()
