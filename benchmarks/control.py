"""Ask the server what it counted, or tell it to go on. Blocking, since nothing is measured meanwhile."""

import http.client

import msgspec


class Counts(msgspec.Struct, frozen=True):
    connections: int
    requests: int
    held: int
    cpu: float


def ask(port: int, what: str = "counts") -> Counts:
    """Ask for the counts; with "release", let go first what is held."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", f"/control/{what}")
        return msgspec.json.decode(connection.getresponse().read(), type=Counts)
    finally:
        connection.close()
