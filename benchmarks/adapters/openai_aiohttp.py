"""The official client with aiohttp below, as its own documentation advises for many calls at once."""

import aiohttp  # noqa: F401 - what the transport needs; without it, the error comes with the first client
from openai import DefaultAioHttpClient

from benchmarks.adapters import openai


class Client(openai.Client):
    def __init__(self, base_url: str) -> None:
        super().__init__(base_url, DefaultAioHttpClient(limits=openai.NO_LIMITS, timeout=openai.PATIENT))
