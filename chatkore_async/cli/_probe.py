"""Looks at the way to a server: names, connections, TLS. Thin: what it sees is judged elsewhere.

Everything here ends in time, whatever the other side does, and can be cancelled at any moment.
"""

import asyncio
import contextlib
import os
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from chatkore_async.cli._observed import Certificate, Handshake, Lookup, Reach, Tunnel
from chatkore_async.cli._route import BROKEN, Route, opened
from chatkore_async.cli._troubles import trouble_of
from chatkore_async.cli._wire import Link, RefusedError

CONNECT = 10.0
"""Seconds for one connection, which is what the client allows itself; `--timeout` may allow less."""

_OF_EACH = 2
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, for which the ssl module has no name


async def look_up(host: str, port: int, timeout: float, threads: ThreadPoolExecutor) -> Lookup:
    """Ask the resolver for a host's addresses, each once."""
    began = time.perf_counter()
    found: tuple[str, ...] | Exception
    try:
        async with asyncio.timeout(timeout):
            found = await asyncio.get_running_loop().run_in_executor(threads, _addresses, host, port)
    except TimeoutError as error:
        found = error
    seconds = time.perf_counter() - began
    if isinstance(found, Exception):
        return Lookup(host=host, seconds=seconds, trouble=trouble_of(found, timeout))
    return Lookup(host=host, addresses=found, seconds=seconds)


def _addresses(host: str, port: int) -> tuple[str, ...] | Exception:
    """Return a host's addresses, each once, or why there are none; it blocks."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return error
    return tuple(dict.fromkeys(str(info[4][0]) for info in infos))


async def reach(address: str, port: int, timeout: float) -> Reach:
    """Open a connection, and close it."""
    timeout = min(timeout, CONNECT)
    began = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            link = await Link.open(address, port)
    except BROKEN as error:
        return Reach(
            address=address, port=port, seconds=time.perf_counter() - began, trouble=trouble_of(error, timeout)
        )
    link.close()
    return Reach(address=address, port=port, seconds=time.perf_counter() - began)


async def reach_some(addresses: Sequence[str], port: int, timeout: float) -> list[Reach]:
    """Try two addresses of each family, all at once, and return the attempts in the resolver's order."""
    six = [address for address in addresses if ":" in address][:_OF_EACH]
    four = [address for address in addresses if ":" not in address][:_OF_EACH]
    tried = [address for address in addresses if address in (*six, *four)]
    return await asyncio.gather(*(reach(address, port, timeout) for address in tried))


async def try_tunnel(route: Route, timeout: float) -> Tunnel:
    """Ask the proxy of a route for a way to its host."""
    began = time.perf_counter()
    try:
        async with asyncio.timeout(timeout), opened(route):
            return Tunnel(seconds=time.perf_counter() - began)
    except BROKEN as error:
        trouble = trouble_of(error, timeout)
        if isinstance(error, RefusedError):
            return Tunnel(status=error.status, schemes=error.schemes, trouble=trouble)
        return Tunnel(trouble=trouble)


async def shake_hands(route: Route, context: ssl.SSLContext, timeout: float, environ: Mapping[str, str]) -> Handshake:
    """Begin TLS as the client would; where the certificate does not verify, read it all the same."""
    found = Handshake(**_authorities(environ))
    began = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            try:
                async with opened(route) as link:
                    began = time.perf_counter()
                    await link.start_tls(context, route.host)
                    return msgspec.structs.replace(
                        found,
                        seconds=time.perf_counter() - began,
                        version=link.tls_version,
                        certificate=read_certificate(link.certificate),
                    )
            except ssl.SSLCertVerificationError as error:
                found = msgspec.structs.replace(
                    found, verify_code=error.verify_code, trouble=trouble_of(error, timeout)
                )
            with contextlib.suppress(*BROKEN):
                found = msgspec.structs.replace(found, certificate=await _unverified(route))
            return found
    except BROKEN as error:
        # What was found before the time was over stands.
        return found if found.trouble else msgspec.structs.replace(found, trouble=trouble_of(error, timeout))


async def _unverified(route: Route) -> Certificate | None:
    """Return the certificate of a server that is not trusted. Nothing is sent to it but the handshakes."""
    loose = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    loose.check_hostname = False
    loose.verify_mode = ssl.CERT_NONE
    async with opened(route) as link:
        await link.start_tls(loose, route.host)
        certificate = link.certificate_bytes
    # Python shows the contents of a certificate only when it verifies. This one does when it is its own authority.
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.load_verify_locations(cadata=certificate)
    trusting.verify_flags |= ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME)
    async with opened(route) as link:
        await link.start_tls(trusting, route.host)
        return read_certificate(link.certificate)


def read_certificate(certificate: Mapping[str, Any]) -> Certificate | None:
    """Return what the ssl module says of a certificate, as a record."""
    if "notAfter" not in certificate:
        return None
    issuer = {name: value for part in certificate.get("issuer", ()) for name, value in part}
    words = [issuer.get("organizationName"), issuer.get("commonName") or issuer.get("organizationalUnitName")]
    return Certificate(
        issuer=", ".join(dict.fromkeys(filter(None, words))) or "nobody",
        names=tuple(str(name) for _, name in certificate.get("subjectAltName", ())),
        begins=ssl.cert_time_to_seconds(certificate["notBefore"]),
        ends=ssl.cert_time_to_seconds(certificate["notAfter"]),
    )


def _authorities(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what the environment says about authorities: OpenSSL's variables, and those of other programs."""
    named = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if environ.get(name)), "")
    others = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
    return {
        "authorities": f"{named}={environ[named]}" if named else "",
        # A list of directories is one, too.
        "authorities_missing": bool(named)
        and not any(Path(each).exists() for each in (environ[named], *environ[named].split(os.pathsep))),
        "other_authorities": next((name for name in others if environ.get(name)), ""),
    }
