"""Many requests on many machines: a data set of Ray Data is answered by actors with a client each, under one limit.

It needs the extra `ray`: `pip install 'chatkore-async[ray]'`, on every machine of the cluster.
"""

import importlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, Literal, TypeVar
from uuid import uuid4

import msgspec

from chatkore_async import ConfigurationError, Demand, Limiter, RateLimit, Report
from chatkore_async.integrations._cluster_desk import Desk
from chatkore_async.integrations._cluster_queue import LimiterLostError, RemoteLimiter, Unreachable
from chatkore_async.integrations._cluster_rows import COLUMNS, WHOLE
from chatkore_async.integrations._cluster_worker import Key, Worker, check_client, check_params

try:
    # As values: the types of neither are known where Ray is not installed.
    ray: Any = importlib.import_module("ray")
    pyarrow: Any = importlib.import_module("pyarrow")
except ImportError as cause:
    raise ImportError("chatkore_async.integrations.ray needs Ray Data: pip install 'chatkore-async[ray]'") from cause

__all__ = ["ClusterLimiter", "Completer", "LimiterLostError", "complete"]

D = TypeVar("D")

NAMESPACE: Final = "chatkore"

AT_A_TIME: Final = 10_000
"""Messages that the limiter's actor has before it. Nearly all of them wait, one for each process."""


class ClusterLimiter:
    """One limit for the whole cluster: a `Limiter` whose numbers are kept by an actor.

        limiter = ClusterLimiter(RateLimit(requests_per_minute=6000))

    It is pickled and given to tasks and actors, whose clients take it as their `rate_limit`. The actor asks for no CPU
    and is started again when it dies. Meanwhile calls wait, and attempts in flight are no longer counted afterwards.
    A process that dies with permits holds them for half a minute.

    Args:
        limit: what all of them keep to. `estimate` is run in the process that asks, and is pickled with it.
        name: of the actor, in the namespace `chatkore`: who gives the same name shares the limit, in other jobs too.
            Default: a name of its own.
        detached: whether the actor outlives the job that started it; end it with `stop`.

    Raises:
        ConfigurationError: an actor of this name keeps to another limit.
    """

    def __init__(self, limit: RateLimit = RateLimit(), *, name: str | None = None, detached: bool = False) -> None:  # noqa: B008 - frozen
        self._name = f"limiter-{uuid4().hex}" if name is None else name
        kept = msgspec.structs.replace(limit, estimate=None)
        actor = ray.remote(_LimiterActor).options(
            name=self._name,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached" if detached else None,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=AT_A_TIME,
        )
        self._set_up(limit, actor.remote(kept))
        there = ray.get(self._actor.limit.remote())
        if there != kept:
            raise ConfigurationError(f"the limiter {self._name!r} of this cluster keeps to another limit: {there}")

    def _set_up(self, limit: RateLimit, actor: Any) -> None:
        self._limit = limit
        self._actor = actor
        self._remote = RemoteLimiter(limit, self._exchange)

    def __repr__(self) -> str:
        return f"<ClusterLimiter {self._name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (self._name, self._limit, self._actor)

    async def acquire(self, demand: Demand, /) -> object:
        """Wait until the attempt may be made, and return a permit. May be cancelled.

        Raises:
            LimiterLostError: the actor was stopped, or its job is over.
        """
        return await self._remote.acquire(demand)

    def release(self, permit: object, report: Report, /) -> None:
        """Take a permit back, with how the attempt went; the actor hears of it later."""
        self._remote.release(permit, report)

    async def counts(self) -> tuple[int, int]:
        """Return how many attempts are in flight, and how many wait, as far as the actor heard."""
        in_flight, waiting = await self._actor.counts.remote()
        return in_flight, waiting

    def stop(self) -> None:
        """End the actor. Whoever asks it from now on gets a `LimiterLostError`."""
        ray.kill(self._actor)

    async def _exchange(self, message: bytes) -> bytes:
        try:
            answer: bytes = await self._actor.exchange.remote(message)
        except ray.exceptions.ActorUnavailableError as error:  # started again, or there is no way to it
            raise Unreachable(f"the actor {self._name!r} is started again, or there is no way to it") from error
        except ray.exceptions.ActorDiedError as error:
            raise LimiterLostError(f"the actor {self._name!r} that kept the cluster's limit is gone") from error
        return answer


def _revive(name: str, limit: RateLimit, actor: Any) -> ClusterLimiter:
    limiter = object.__new__(ClusterLimiter)
    limiter._name = name
    limiter._set_up(limit, actor)
    return limiter


class _LimiterActor:
    """The process that keeps the limit."""

    def __init__(self, limit: RateLimit) -> None:
        self._limit = limit
        self._desk = Desk(limit)

    async def exchange(self, message: bytes) -> bytes:
        return await self._desk.exchange(message)

    async def limit(self) -> RateLimit:
        return self._limit

    async def counts(self) -> tuple[int, int]:
        return self._desk.in_flight, self._desk.waiting


class Completer:
    """An actor class for `Dataset.map_batches`: it answers the messages of each row of a batch.

        dataset.map_batches(
            Completer, fn_constructor_kwargs={"model": "gpt-4o-mini"}, batch_format="pyarrow", batch_size=256,
            compute=ray.data.ActorPoolStrategy(size=8),
        )

    Batches have to be pyarrow's tables. `complete` does all this; see there for the arguments.
    """

    def __init__(
        self,
        *,
        model: str,
        column: str = "messages",
        params: Mapping[str, Any] | None = None,
        concurrency: int = 64,
        api_key: Any = None,
        rate_limit: Limiter | None = None,
        client: Mapping[str, Any] | None = None,
        prefix: str = "",
        whole: bool = False,
    ) -> None:
        self._column = column
        self._prefix = prefix
        self._types = {**COLUMNS, WHOLE: str} if whole else COLUMNS
        options = {**check_client(client or {}), "api_key": api_key, "rate_limit": rate_limit}
        self._worker = Worker(check_params(model, params or {}), concurrency, whole=whole, client=options)

    # A generator, since Ray before 2.50 takes no other coroutine here.
    async def __call__(self, batch: Any) -> AsyncIterator[Any]:
        """Give the batch with its new columns."""
        rows = await self._worker.answer(batch.column(self._column).to_pylist())
        for name, kind in self._types.items():
            values = pyarrow.array([row[name] for row in rows], type=_arrow_type(kind))
            place = batch.schema.get_field_index(self._prefix + name)
            if place >= 0:
                batch = batch.set_column(place, self._prefix + name, values)
            else:
                batch = batch.append_column(self._prefix + name, values)
        yield batch

    def __del__(self) -> None:
        worker: Worker | None = getattr(self, "_worker", None)
        if worker is not None:
            worker.close()


def _arrow_type(kind: type) -> Any:
    # Large, since a block may hold more than 2 GiB of answers.
    return {str: pyarrow.large_string(), int: pyarrow.int64(), float: pyarrow.float64()}[kind]


def complete(
    dataset: D,
    *,
    model: str,
    column: str = "messages",
    params: Mapping[str, Any] | None = None,
    actors: int | tuple[int, int] = 1,
    concurrency: int = 64,
    batch_size: int | None = None,
    api_key: Any = None,
    rate_limit: RateLimit | Limiter | None = None,
    client: Mapping[str, Any] | None = None,
    prefix: str = "",
    whole: bool = False,
    **options: Any,
) -> D:
    """Return a data set in which each row has the answer to its messages, or the error in its place.

    It is lazy, as all of Ray Data: requests are made when its rows are read, and made again each time.

    New columns: `completion` (text), `finish_reason`, `error` (one line, null if there was none), `error_type` (the
    error's class), `prompt_tokens`, `completion_tokens`, `latency` (seconds from the start of the call to its end, with
    its wait for the limiter and its retries), `attempts` and `request_id`. A column that has such a name is replaced.

    Args:
        dataset: a `ray.data.Dataset`.
        model: which model answers.
        column: holds the messages of each row: a list of them, the same as JSON, or a prompt. A string is JSON if it
            begins with a `[` and a `{`. Keys of a list's messages that are null are not sent.
        params: what else `create` takes, the same for all: fields of the request, and options of the call.
        actors: how many, or the fewest and the most.
        concurrency: calls at a time in each actor.
        batch_size: rows; twice `concurrency` by default. An actor works on up to four batches at once.
        api_key: the key, or a function that returns it, called in the actor. Default: `CHATKORE_API_KEY` there. A key
            given here is part of the job, which Ray stores.
        rate_limit: a `RateLimit` for all actors together, or a `ClusterLimiter` to share it with others as well.
        client: what else `AsyncChatKore` takes, such as `base_url` or `timeout`. It has to be something that pickle
            takes.
        prefix: put before the names of the new columns.
        whole: adds the column `completion_json`, the answer as it came.
        **options: what else `map_batches` takes, such as `num_cpus` of an actor.

    Raises:
        InvalidRequestError: `params` has a name that no request has.
        ConfigurationError: a `ClusterLimiter` cannot be made, or `client` has a key or a limit.
    """
    size: dict[Literal["size", "min_size", "max_size"], int] = (
        {"size": actors} if isinstance(actors, int) else {"min_size": actors[0], "max_size": actors[1]}
    )
    check_params(model, params or {})
    check_client(client or {})
    arguments: dict[str, Any] = {
        "model": model,
        "column": column,
        "params": params,
        "concurrency": concurrency,
        "api_key": Key(api_key) if isinstance(api_key, str) else api_key,
        "rate_limit": ClusterLimiter(rate_limit) if isinstance(rate_limit, RateLimit) else rate_limit,
        "client": client,
        "prefix": prefix,
        "whole": whole,
    }
    data: Any = dataset
    result: D = data.map_batches(
        Completer,
        fn_constructor_kwargs=arguments,
        batch_format="pyarrow",
        batch_size=2 * concurrency if batch_size is None else batch_size,
        compute=ray.data.ActorPoolStrategy(**size),
        **options,
    )
    return result
