"""Two processes side by side, for comparisons that are no row of the table: what `steps` and `loops` have in common."""

from contextlib import ExitStack

import msgspec

from benchmarks.arithmetic import Spread, every, ratios, spread
from benchmarks.rows import Row
from benchmarks.runner import Child, Part, command, in_turn, serving


class Side(msgspec.Struct, frozen=True):
    """A library on an event loop."""

    adapter: str
    loop: str


def over(row: Row, one: Side, other: Side, rounds: int) -> Spread:
    """The CPU that one side takes, over that of the other, in turns of the row."""
    cpu: tuple[dict[int, float], dict[int, float]] = ({}, {})
    with serving() as server:
        for number in range(rounds):
            with ExitStack() as stack:
                sides = [
                    (found, stack.enter_context(Child(command(part, row, side.loop, server))))
                    for found, side in zip(cpu, (one, other), strict=True)
                    for part in [Part(adapter=side.adapter, load=row.points[0], turns=row.turns)]
                ]
                for turn, (found, child) in in_turn(sides if number % 2 == 0 else sides[::-1], row.turns):
                    figure = child.turn().cpu
                    assert figure is not None
                    found[number * row.turns + turn] = figure
    result = spread(every(ratios(row, *cpu)))
    assert result is not None
    return result
