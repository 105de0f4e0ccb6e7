"""Measure what this client costs beside others: `python -m benchmarks`. See README.md."""

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from benchmarks import report
from benchmarks.adapters import ADAPTERS
from benchmarks.figures import Results
from benchmarks.options import positive
from benchmarks.rows import LOOPS, ROWS
from benchmarks.runner import ROOT, Plan, measure
from benchmarks.targets import TARGETS, judge, status, told

RESULTS = ROOT / "benchmarks" / "results"
BUSY = 0.5  # processes that want a core, beside these


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing and are not kept")
    parser.add_argument(
        "--only", action="append", choices=ROWS, metavar="ROW", help=f"one of {', '.join(ROWS)}; repeatable"
    )
    parser.add_argument(
        "--adapters", metavar="A,B", help=f"some of {','.join(ADAPTERS)} (default: all that are installed)"
    )
    parser.add_argument("--rounds", type=positive, help="rounds of every row (default: the row's own)")
    parser.add_argument("--loop", choices=LOOPS, help="one event loop (default: both, where uvloop is installed)")
    parser.add_argument("--check", action="store_true", help="compare with the targets: exit 1 missed, 2 not measured")
    parser.add_argument("--from", dest="stored", type=Path, metavar="FILE", help="take stored results; measure nothing")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where results are written (default: benchmarks/results after a whole run, else nowhere)",
    )
    version = ".".join(platform.python_version_tuple()[:2])
    parser.add_argument("--name", default=f"cpython-{version}", help="of the results (default: %(default)s)")
    return parser


def wanted(options: argparse.Namespace) -> Plan:
    """What the arguments ask for."""
    adapters = options.adapters.split(",") if options.adapters else list(ADAPTERS)
    if unknown := sorted(set(adapters) - set(ADAPTERS)):
        sys.exit(f"there is no adapter {unknown[0]}; there are {', '.join(ADAPTERS)}")
    there = [loop for loop in LOOPS if importlib.util.find_spec(loop)]
    if options.loop and options.loop not in there:
        sys.exit("uvloop is not installed; the extra uvloop has it: pip install 'chatkore-async[uvloop]'")
    return Plan(
        rows=[ROWS[name] for name in ROWS if not options.only or name in options.only],
        adapters=[name for name in ADAPTERS if name in adapters],
        loops=[options.loop] if options.loop else there,
        rounds=options.rounds,
        quick=options.quick,
    )


def write(results: Results, page: str, name: str, place: Path) -> None:
    """Write results, the page, and the charts where there is something to draw them with."""
    place.mkdir(parents=True, exist_ok=True)
    text = msgspec.json.format(msgspec.json.encode(results), indent=0)
    (place / f"{name}.json").write_bytes(text + b"\n")
    (place / "table.md").write_text(page, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no charts: matplotlib is not installed; the extra bench has it: pip install 'chatkore-async[bench]'")
        return
    subprocess.run([sys.executable, "-m", "benchmarks.charts", place / f"{name}.json", place], cwd=ROOT, check=True)


def main() -> int:
    """Parse arguments, measure, write, judge."""
    parser = arguments()
    options = parser.parse_args()
    if options.quick and (options.check or options.stored):
        parser.error("figures of --quick mean nothing: there is nothing to check or to keep of them")
    plan = wanted(options)
    began = time.monotonic()
    if options.stored:
        results = msgspec.json.decode(options.stored.read_bytes(), type=Results)
    else:
        if hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY and not plan.quick:
            print(f"this machine is busy (load {os.getloadavg()[0]:.1f}); the spread will show it", flush=True)
        results = measure(plan, lambda line: print(line, flush=True))
    asked = [target for target in TARGETS if not target.needs - set(plan.adapters)]
    verdicts = judge(results, [row.name for row in plan.rows], [options.loop] if options.loop else list(LOOPS), asked)
    page = report.page(results, [] if plan.quick else verdicts)
    if options.stored and options.check:
        print("\n".join(map(told, verdicts)))
    else:
        print(f"\n{page}")
    if plan.quick:
        with tempfile.TemporaryDirectory() as nowhere:
            write(results, page, "quick", Path(nowhere))
        print(f"a smoke run of {time.monotonic() - began:.0f} s: all works, and none of these figures means anything")
        return 0
    is_whole = not (options.stored or options.only or options.adapters or options.loop or options.rounds)
    if options.out or is_whole:
        write(results, page, options.stored.stem if options.stored else options.name, options.out or RESULTS)
    if not options.stored:
        print(f"{time.monotonic() - began:.0f} s")
    return status(verdicts) if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
