"""What the client costs beside plain aiohttp. See README.md."""
