"""Places in the pool: first come, first served, and none is lost."""

import asyncio
import random

import pytest

from chatkore_async._slots import Slots


async def turns(count: int = 3) -> None:
    """Let the other tasks go on."""
    for _ in range(count):
        await asyncio.sleep(0)


async def waiters(slots: Slots, count: int) -> tuple[list[asyncio.Task[None]], list[int]]:
    """Tasks that wait for a place, and the list in which they note their number when they have it."""
    served: list[int] = []

    async def wait(number: int) -> None:
        if not slots.take():
            await slots.wait()
        served.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(count)]
    await turns(1)
    return tasks, served


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_there_are_as_many_places_as_the_limit_says(limit: int) -> None:
    """And not one more; a place given back can be taken again."""
    slots = Slots(limit)
    assert [slots.take() for _ in range(limit + 1)] == [True] * limit + [False]
    assert slots.in_use == limit
    slots.release()
    assert (slots.in_use, slots.take(), slots.take()) == (limit - 1, True, False)


def test_none_disables_the_limit() -> None:
    """Places are counted all the same."""
    slots = Slots(None)
    assert all(slots.take() for _ in range(5000))
    slots.release()
    assert (slots.in_use, slots.waiting) == (4999, 0)


async def test_who_waits_longest_is_served_first() -> None:
    """A place goes from hand to hand: nobody who comes later gets in between."""
    slots = Slots(1)
    assert slots.take()
    tasks, served = await waiters(slots, 3)
    assert (slots.waiting, slots.in_use) == (3, 1)
    for count in (1, 2, 3):
        slots.release()
        assert not slots.take()
        await turns()
        assert served == list(range(count))
    slots.release()
    assert (slots.waiting, slots.in_use) == (0, 0)
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("order", ["cancel, then release", "release, then cancel", "cancel, run, release"])
@pytest.mark.parametrize("count", [1, 3])
async def test_a_cancelled_waiter_leaves_no_hole(order: str, count: int) -> None:
    """Also when it is cancelled in the moment it was given the place, or given it in the moment it was cancelled."""
    slots = Slots(1)
    assert slots.take()
    tasks, served = await waiters(slots, count)
    if order.startswith("release"):
        slots.release()
    tasks[0].cancel()
    if "run" in order:
        await turns()
        assert slots.waiting == count - 1
    if order.endswith("release"):
        slots.release()
    await turns()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert served == list(range(1, min(count, 2)))
    while slots.in_use:
        slots.release()
        await turns()
    assert served == list(range(1, count))
    assert slots.waiting == 0
    assert slots.take()


async def test_all_waiters_may_be_cancelled() -> None:
    """The place is free then, for whoever comes."""
    slots = Slots(1)
    assert slots.take()
    tasks, served = await waiters(slots, 5)
    for task in tasks:
        task.cancel()
    slots.release()
    assert slots.waiting == 0
    assert slots.take()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ended] == [asyncio.CancelledError] * 5
    assert (served, slots.in_use) == ([], 1)


async def test_a_waiter_that_is_closed_leaves_no_hole() -> None:
    """A coroutine may be closed without being cancelled, by a framework or at the end of a loop."""
    slots = Slots(1)
    assert slots.take()
    waiter = slots.wait()
    waiter.send(None)
    assert slots.waiting == 1
    waiter.close()
    slots.release()
    assert (slots.waiting, slots.in_use) == (0, 0)


@pytest.mark.parametrize("backwards", [False, True])
async def test_ten_thousand_may_wait(backwards: bool) -> None:
    """They are served in order, or cancelled from either end, in a time that does not grow with the square."""
    slots = Slots(10)
    tasks, served = await waiters(slots, 10_010)
    assert slots.waiting == 10_000
    leavers = tasks[10:5_010]
    for task in reversed(leavers) if backwards else leavers:
        task.cancel()
    await turns()
    assert slots.waiting == 5_000
    for _ in range(5_000):
        slots.release()
    await turns()
    assert served == [*range(10), *range(5_010, 10_010)]
    assert (slots.waiting, slots.in_use) == (0, 10)


def test_it_says_how_it_is() -> None:
    """For whoever debugs a pool that is full."""
    slots = Slots(3)
    slots.take()
    assert repr(slots) == "<Slots 1/3 waiting 0>"


@pytest.mark.parametrize("seed", range(10))
async def test_no_place_is_lost_or_made(seed: int) -> None:
    """Calls that come, wait, work and are cancelled at random never exceed the limit, and leave all places free."""
    dice = random.Random(seed)
    slots, working = Slots(3), 0

    async def call() -> None:
        nonlocal working
        if not slots.take():
            await slots.wait()
        working += 1
        try:
            assert working <= 3
            await turns(dice.randrange(4))
        finally:
            working -= 1
            slots.release()

    tasks: list[asyncio.Task[None]] = []
    for _ in range(500):
        tasks.append(asyncio.create_task(call()))
        if dice.random() < 0.5:
            dice.choice(tasks[-8:]).cancel()
        if dice.random() < 0.5:
            await turns(1)
        assert slots.in_use <= 3
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ended} <= {type(None), asyncio.CancelledError}
    assert (slots.in_use, slots.waiting) == (0, 0)
