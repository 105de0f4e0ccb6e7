"""The official client with aiohttp below, as its own documentation advises for many calls at once."""

import aiohttp  # noqa: F401 - what the transport needs; without it, the error comes with the first client
import httpx2
from openai import DefaultAioHttpClient

from benchmarks.adapters import openai

# 0 is no limit in aiohttp, to which it goes; with None, aiohttp's own of 100 would stay.
NO_LIMITS = httpx2.Limits(max_connections=0)


class Client(openai.Client):
    def __init__(self, base_url: str) -> None:
        super().__init__(base_url, DefaultAioHttpClient(limits=NO_LIMITS, timeout=openai.PATIENT))
