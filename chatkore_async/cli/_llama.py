"""llama.cpp's own server, in a process of its own: `python -m chatkore_async.cli._llama`, which `_llm` starts.

Loading a model holds Python's lock for as long as it takes, and a server that is generating cannot be stopped from
within before its clients have left. A process can be ended at any moment.
"""

import os
import sys
from importlib import import_module
from typing import Any

import msgspec


class ModelServer(msgspec.Struct, frozen=True):
    """What is served, and where.

    Attributes:
        model: the path of a GGUF file.
        name: what `GET /models` calls it.
        host: the address.
        port: the port; 0 picks a free one.
        slots: how many answers are generated at a time.
        context: tokens of prompt and answer together, for each slot.
        threads: of the processor; `None` leaves it to llama.cpp.
        key: the only bearer token that is let in; `None` lets everyone in.
        verbosity: of llama.cpp: 2 is errors and warnings, 3 is all that it does.
    """

    model: str
    name: str
    host: str
    port: int
    slots: int
    context: int
    threads: int | None
    key: str | None
    verbosity: int


def start(xllamacpp: Any, asked: ModelServer) -> Any:
    """Load the model and listen; return the server, which lives as long as it is referred to.

    Args:
        xllamacpp: the module, which has no types.
        asked: what is served.

    Raises:
        RuntimeError: llama.cpp could not; what it says about it is on standard error.
    """
    params = xllamacpp.CommonParams()
    params.model.path = asked.model
    params.model_alias = {asked.name}
    params.hostnames = [asked.host]
    params.port = asked.port
    params.n_parallel = asked.slots
    params.n_ctx = asked.slots * asked.context
    if asked.threads is not None:
        params.cpuparams.n_threads = asked.threads
    if asked.key is not None:
        params.api_keys = [asked.key]
    params.verbosity = asked.verbosity
    # A thread waits at each connection that is kept alive; with none to spare, new ones wait until old ones idle out.
    params.n_threads_http = 256
    # Nothing is fetched, and one client is not told what another is asking.
    params.offline = True
    params.endpoint_slots = False
    # As the embedded server has it: every page may ask, without cookies. The star does not stand for Authorization.
    params.cors_credentials = False
    params.cors_headers = "Authorization, *"
    return xllamacpp.Server(params)


def main() -> None:
    """Serve what the first line of standard input asks for, until there is no more of it; say where in a line."""
    asked = msgspec.json.decode(sys.stdin.buffer.readline(), type=ModelServer)
    server = start(import_module("xllamacpp"), asked)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()  # ends when the process that started this one does, however it does
    # Not the interpreter's way out, on which the server would wait for its clients.
    os._exit(0)


if __name__ == "__main__":  # pragma: no branch
    main()
