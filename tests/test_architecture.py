"""The floors of the house: what may import what. Drawn in docs/explanation/architecture.md, proved here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import chatkore_async

PACKAGE = Path(chatkore_async.__file__).parent

FLOORS = [
    ["_version", "_json", "_meta", "_responses", "_requests"],
    ["errors", "types", "_limiter", "_pacing", "_adaptive"],
    ["_config", "_tolerant", "_sse", "_hooks", "_headers", "_words", "_estimate"],
    ["_codec", "_reports", "_options", "_accumulate", "_notes", "_group"],
    ["_classify", "_batch_lines", "_batch_writer"],
    ["_protocol", "_batch_plan", "_batch_files"],
    ["_retry", "_slots", "_deadlines", "_proxies", "_foreign", "_ratelimiter"],
    ["_cork", "_sending"],
    ["_connector"],
    ["_transport"],
    ["_route"],
    ["_call", "_manager"],
    ["_events", "_workers"],
    ["_stream", "_fanout"],
    ["_client", "batch"],
    ["__init__"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Rooms of one floor may build on each other only where this says so.
NEIGHBOURS = {("_responses", "_json"), ("_responses", "_meta"), ("_requests", "_responses")}
BUILT_ON_TOP = ("testing", "cli", "integrations")

FREE_OF_IO = {
    *(
        "_json",
        "_meta",
        "_responses",
        "_requests",
        "errors",
        "types",
        "_config",
        "_tolerant",
        "_sse",
        "_hooks",
        "_codec",
    ),
    *("_headers", "_words", "_reports", "_notes", "_classify", "_accumulate", "_protocol", "_options"),
    *("_limiter", "_pacing", "_adaptive", "_estimate", "_group", "_batch_lines", "_batch_plan"),
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in BUILT_ON_TOP)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether the import stands inside a function or a TYPE_CHECKING block."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top_level = set(tree.body)
    for node in ast.walk(tree):
        hidden = node not in top_level
        if isinstance(node, ast.Import):
            yield from ((name.name, hidden) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "chatkore_async" if node.level else ""
            base = ".".join(part for part in (package, node.module) if part)
            if node.module is None:  # from . import _codec
                yield from ((f"{base}.{name.name}", hidden) for name in node.names)
            else:
                yield base, hidden


def own(name: str) -> str | None:
    return name.split(".")[1] if name.startswith("chatkore_async.") else None


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_a_module_imports_only_from_lower_floors(path: Path) -> None:
    """A room builds on the rooms below it, in plain sight: no cycle, nothing hidden in a function or in TYPE_CHECKING."""
    room = path.stem
    assert room in FLOOR_OF, f"give {room} a floor, here and in the architecture page"
    for name, hidden in imports(path):
        other = own(name)
        if other is None:
            continue
        assert not hidden, f"{room} hides its import of {other}"
        assert FLOOR_OF[other] < FLOOR_OF[room] or (room, other) in NEIGHBOURS, f"{room} may not import {other}"


def test_every_floor_names_rooms_that_exist() -> None:
    """The drawing shows the house as it is."""
    assert {path.stem for path in modules()} == set(FLOOR_OF)


@pytest.mark.parametrize(
    "library,rooms",
    [
        (
            "aiohttp",
            {
                *("_foreign", "_sending", "_connector", "_transport", "_route"),
                "testing",
                "integrations/aiohttp_web",
            },
        ),
        ("tenacity", {"_retry"}),
    ],
)
def test_a_library_is_known_in_one_place(library: str, rooms: set[str]) -> None:
    """A foreign library is imported where its room is, so that its changes and its exceptions stop there."""
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).with_suffix("").as_posix()
        known = place in rooms or place.split("/")[0] in rooms
        assert known or library not in {name.split(".")[0] for name, _ in imports(path)}, place


@pytest.mark.parametrize("room", sorted(FREE_OF_IO))
def test_what_claims_to_be_free_of_io_is(room: str) -> None:
    """Decisions are made by functions from values to values, which need no event loop, socket or clock."""
    text = (PACKAGE / f"{room}.py").read_text(encoding="utf-8")
    found = {name.split(".")[0] for name, _ in imports(PACKAGE / f"{room}.py")}
    assert not found & {"asyncio", "socket", "aiohttp", "time", "threading", "selectors"}
    assert not any(isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith) for node in ast.walk(ast.parse(text)))


@pytest.mark.parametrize("top", BUILT_ON_TOP)
def test_what_stands_on_top_uses_public_names(top: str) -> None:
    """Testing support, integrations and the command line are built as a user would build them."""
    for path in (PACKAGE / top).rglob("*.py"):
        for name, _ in imports(path):
            parts = name.split(".")
            if parts[0] == "chatkore_async" and len(parts) > 1 and parts[1] != top:
                assert not any(part.startswith("_") for part in parts[1:]), f"{path.name} imports {name}"
