"""Kill a large batch again and again, and look what is left: `python -m benchmarks.killed`.

The whole way is that of a user: `chatkore batch` with its defaults, against `chatkore serve` in a process of its own,
which injects 5 % of faults. Runs are ended by `kill -9` at random shares of the work; then one goes through. After each
kill the lines that were there are still there, once. `tests/test_batch_kill.py` has fifty moments in less time.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

# One request in twenty: three kinds of fault that a retry mends, and an answer that breaks off after it was billed.
FAULTS = {
    "seed": 6,
    "rules": [
        {"share": 0.02, "status": 429, "headers": {"retry-after": "0"}},
        {"share": 0.01, "status": 503, "message": "overloaded"},
        {"share": 0.01, "reset_after": 0},
        {"share": 0.01, "cut_after": 60},
    ],
}
LOOK = 0.05  # seconds between two looks at the output
AGAIN = 3  # runs that ask again what has failed, at most


def write_input(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for number in range(count):
            body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": f"What is {number} + 1?"}]}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            print(json.dumps(line), file=lines)


def named(path: Path) -> dict[str, bytes]:
    """The whole lines of an output by their names; a name that is there twice is an error."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = {json.loads(line)["custom_id"]: line for line in lines}
    assert len(found) == len(lines), "a line is doubled"
    return found


def run(place: Path, url: str, concurrency: int, *more: str, kill_at: int | None = None, seconds: float) -> int:
    """Run the command; kill it once the output has so many lines. Return its exit status."""
    out = place / "out.jsonl"
    command = ["batch", str(place / "in.jsonl"), str(out), "--base-url", url, "--concurrency", str(concurrency), *more]
    with (place / "said").open("wb") as said, ExitStack() as stack:
        process = subprocess.Popen(
            [sys.executable, "-m", "chatkore_async.cli", *command],
            env=os.environ | {"CHATKORE_API_KEY": "sk-killed"},
            stdout=said,
            stderr=said,
        )
        stack.callback(process.kill)  # one that has ended is left alone
        ends = time.monotonic() + seconds
        lines, seen = 0, 0
        while process.poll() is None:
            if time.monotonic() > ends:
                sys.exit(f"it was not done after {seconds:g} s")
            if kill_at is not None:
                size = out.stat().st_size if out.exists() else 0
                if size > seen:
                    with out.open("rb") as written:
                        written.seek(seen)
                        lines += written.read(size - seen).count(b"\n")
                    seen = size
                if lines >= kill_at:
                    process.send_signal(signal.SIGKILL)
                    break
            time.sleep(LOOK)
        return process.wait()


def told(lines: dict[str, bytes], count: int) -> str:
    """Count the lines, of which each request has one."""
    assert lines.keys() == {f"r{number}" for number in range(count)}, "a request has no line"
    answered = sum(b'"error":null' in line and b'"status_code":200' in line for line in lines.values())
    return f"{len(lines):,} lines, {answered:,} of them answers,"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.killed", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--kills", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=6, help="of the moments (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1200, help="when to give up a run (default: %(default)s)")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    moments = sorted(chance.sample(range(1, options.requests), options.kills))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_input(place / "in.jsonl", options.requests)
        (place / "faults.json").write_text(json.dumps(FAULTS), encoding="utf-8")
        serve = ["serve", "--port", "0", "--quiet", "--interval", "0", "--script", str(place / "faults.json")]
        server = subprocess.Popen(
            [sys.executable, "-m", "chatkore_async.cli", *serve], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        try:
            assert server.stdout is not None
            url = next(word for line in server.stdout for word in line.split() if word.startswith("http://"))
            before: dict[str, bytes] = {}
            began = time.monotonic()
            for moment in moments:
                code = run(place, url, options.concurrency, kill_at=moment, seconds=options.seconds)
                assert code == -signal.SIGKILL, "it was done before it could be killed: ask for more requests"
                after = named(place / "out.jsonl")
                assert {name: after.get(name) for name in before} == before, "a line is lost or was changed"
                before = after
                print(f"killed at {len(before):,} lines, {time.monotonic() - began:.0f} s", flush=True)
            run(place, url, options.concurrency, seconds=options.seconds)
            lines = named(place / "out.jsonl")
            assert {name: lines.get(name) for name in before} == before, "a line is lost or was changed"
            print(told(lines, options.requests), f"{time.monotonic() - began:.0f} s", flush=True)
            status = 1
            for _ in range(AGAIN):
                status = run(place, url, options.concurrency, "--retry-failed", seconds=options.seconds)
                print(
                    "with --retry-failed:", told(named(place / "out.jsonl"), options.requests), f"exit status {status}"
                )
                if not status:
                    break
            assert status == 0, "some requests fail again and again"
        finally:
            server.terminate()
            server.communicate(timeout=30)


if __name__ == "__main__":
    main()
