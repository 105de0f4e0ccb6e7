"""The applications that are compared: one service, written with our integrations and by hand.

All of them answer `POST /chat` with the model's answer as server-sent events. Each module has `make(base_url)`, which
returns the application; `serve.py` runs one.
"""

MODEL = "gpt-4o-mini"

RELAYS = {
    "fastapi": ("fastapi_ours", "fastapi_by_hand", "fastapi_pipe"),
    "aiohttp": ("aiohttp_ours", "aiohttp_by_hand", "aiohttp_pipe"),
}
"""Framework: ours, what ours is compared with, and the floor."""
