"""What the way to the server is like: names, connections, TLS. From observations to findings, without I/O."""

import ipaddress
from collections.abc import Sequence

from chatkore_async.cli._account import is_loopback
from chatkore_async.cli._finding import Finding, Remark, found
from chatkore_async.cli._observed import Certificate, Handshake, Lookup, Reach, Tunnel
from chatkore_async.cli._troubles import milliseconds, remark_on

SLOW = 1.0
"""Seconds from which a look-up or a connection, which take milliseconds, is worth a warning."""

SOON = 14
"""Days before its end from which a certificate that nobody renewed is worth a warning."""

_SHOWN = 6
_DAY = 86400.0


def examine_dns(lookup: Lookup) -> Finding:
    """Judge what the resolver said."""
    if lookup.trouble is not None:
        return found("dns", [f"{lookup.host}: {lookup.trouble.text}"], [remark_on(lookup.trouble, lookup.host, 0)])
    if lookup.addresses == (lookup.host,):
        return found("dns", [f"{lookup.host} is an address"])
    shown = ", ".join(lookup.addresses[:_SHOWN])
    more = len(lookup.addresses) - _SHOWN
    seen = f"{shown}{f' and {more} more' if more > 0 else ''} in {milliseconds(lookup.seconds)}"
    remarks: list[Remark | None] = []
    if lookup.seconds >= SLOW:
        means = "The resolver is slow, and each new connection may wait for it."
        remarks.append(Remark("warn", means, "Check the DNS servers of this machine: the first may not answer."))
    if any(map(_is_here, lookup.addresses)) and not is_loopback(f"//{lookup.host}"):
        means = "The name leads to this machine: a line in the file of hosts, or a resolver that blocks it."
        remarks.append(Remark("warn", means, f"If that is not meant, look for {lookup.host} there."))
    return found("dns", [seen], remarks)


def _is_here(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return parsed.is_loopback or parsed.is_unspecified


def examine_tcp(host: str, attempts: Sequence[Reach]) -> Finding:
    """Judge the attempts to connect to a host's addresses."""
    seen = [
        f"{each.address} port {each.port} ({each.family}) "
        + (f"in {milliseconds(each.seconds)}" if each.trouble is None else f"did not work: {each.trouble.text}")
        for each in attempts
    ]
    failed = [each for each in attempts if each.trouble is not None]
    if len(failed) == len(attempts):
        # Where one address gives a plainer answer than the others, it is the one to explain.
        worst = min(failed, key=lambda each: each.trouble is not None and each.trouble.kind == "unreachable")
        assert worst.trouble is not None
        remark = remark_on(worst.trouble, host, worst.port)
        if worst.trouble.kind == "refused" and _is_here(worst.address):
            start = "Start the server (`chatkore serve` is one), or mend the port of the base URL."
            remark = Remark("fail", f"Nothing listens at port {worst.port} of this machine.", start)
        return found("tcp", seen, [remark])
    remarks: list[Remark | None] = []
    # One that says no at once costs nothing, and is usual: servers often listen at one of localhost's addresses.
    if hanging := [each.family for each in failed if each.trouble is not None and each.trouble.kind == "timeout"]:
        means = f"Some addresses ({', '.join(dict.fromkeys(hanging))}) do not answer: connections that try them wait."
        change = "Have the network's IPv6, or the host's DNS, put right; connections over the others work."
        remarks.append(Remark("warn", means, change))
    if (fastest := min(each.seconds for each in attempts if each.trouble is None)) >= SLOW:
        means = f"To connect takes {milliseconds(fastest)}, on top of the first answer over each connection."
        remarks.append(Remark("warn", means, "Keep one client for all calls, so that connections are used again."))
    return found("tcp", seen, remarks)


# What a proxy means by refusing.
_REFUSALS: dict[int, tuple[str, str]] = {
    407: (
        "The proxy asks for a user name and a password, and does not take those it was given, if any.",
        "Write them into {source}: http://user:password@host:port, special characters as %40 and the like.",
    ),
    403: (
        "The proxy does not allow connections to {host}.",
        "Ask whoever runs it to allow {host}, or exempt it with NO_PROXY if it can be reached without.",
    ),
    405: (
        "The proxy knows no CONNECT: it may be a web server, or a proxy for plain http alone.",
        "Check {source}.",
    ),
    502: ("The proxy could not reach {host} itself.", "Check the host's name; ask whoever runs the proxy."),
}
_ALIKE = {400: 405, 404: 405, 501: 405, 503: 502, 504: 502}
_REFUSED = ("The proxy does not open a way to {host}.", "Ask whoever runs it, and check {source}.")
_OTHER_LOGIN = ("ntlm", "negotiate", "kerberos", "digest")


def examine_tunnel(host: str, port: int, source: str, tunnel: Tunnel) -> Finding:
    """Judge what a proxy answered to CONNECT.

    Args:
        host: to which a way was asked for.
        port: the same.
        source: the variable that names the proxy.
        tunnel: the answer.
    """
    if tunnel.trouble is None:
        return found("tcp", [f"the proxy opened a way to {host} port {port} in {milliseconds(tunnel.seconds)}"])
    if tunnel.status is None:
        return found("tcp", [tunnel.trouble.text], [remark_on(tunnel.trouble, f"the proxy of {source}", port)])
    means, change = _REFUSALS.get(_ALIKE.get(tunnel.status, tunnel.status), _REFUSED)
    if tunnel.schemes and "basic" not in tunnel.schemes and set(tunnel.schemes) & set(_OTHER_LOGIN):
        means = f"The proxy asks for a login of another kind ({', '.join(tunnel.schemes)}) than the client has (basic)."
        change = "Put a proxy in between that logs in at this one, or have {host} exempted."
    means, change = (text.format(host=host, source=source) for text in (means, change))
    return found("tcp", [tunnel.trouble.text], [Remark("fail", means, change)])


# OpenSSL's numbers of what can be wrong with a certificate, X509_V_ERR_*.
_EXPIRED, _NOT_YET = 10, 9
_WRONG_NAME = (62, 64)
_UNKNOWN = (2, 18, 19, 20, 21)
_STRICT = range(79, 95)
"""What is wrong only by the letter of RFC 5280, on which Python insists since 3.13."""


def examine_tls(host: str, port: int, shake: Handshake, now: float) -> Finding:
    """Judge how TLS began. `now` is the Unix time."""
    certificate = shake.certificate
    seen = [f"{shake.version} in {milliseconds(shake.seconds)}"] if shake.trouble is None else [shake.trouble.text]
    if certificate is not None:
        days = (certificate.ends - now) / _DAY
        end = f"expires in {days:.0f} days" if days >= 0 else f"expired {-days:.0f} days ago"
        seen.append(f"issued by {certificate.issuer} for {_names(certificate)}, {end}")
    if shake.authorities:
        seen.append(f"{shake.authorities} names the authorities{', and is missing' * shake.authorities_missing}")
    if shake.trouble is None:
        soon = certificate is not None and certificate.ends - now < SOON * _DAY
        means = "The certificate ends soon, and then no client connects any more."
        remark = Remark("warn", means, f"Tell whoever runs {host}: it should have been renewed.") if soon else None
        return found("tls", seen, [remark])
    if shake.trouble.kind != "certificate":
        return found("tls", seen, [remark_on(shake.trouble, host, port)])
    return found("tls", seen, [_on_certificate(host, shake, now)])


def _on_certificate(host: str, shake: Handshake, now: float) -> Remark:
    certificate, code = shake.certificate, shake.verify_code
    if code == _EXPIRED:
        means = "The certificate has expired, or the clock of this machine is ahead."
        return Remark("fail", means, f"Check the date of this machine; if it is right, tell whoever runs {host}.")
    if code == _NOT_YET:
        late = "" if certificate is None else f" by {(certificate.begins - now) / _DAY:.1f} days or more"
        means = f"The certificate is not valid yet: the clock of this machine is probably behind{late}."
        return Remark("fail", means, "Set the clock of this machine.")
    if code in _WRONG_NAME:
        means = (
            f"The certificate is for {'other names' if certificate is None else _names(certificate)}, not for {host}."
        )
        return Remark("fail", means, "Write the base URL with a name that the certificate has.")
    issuer = "unknown" if certificate is None else certificate.issuer
    if code in _UNKNOWN:
        means = (
            f"The authority ({issuer}) is not among those this machine trusts. It is usual where a company's proxy "
            "inspects TLS, or a server signs for itself."
        )
        change = (
            "If it is your company's: SSL_CERT_FILE=company.pem for this command, and in a program "
            "ssl=ssl.create_default_context(cafile=...)."
        )
        if shake.authorities_missing:
            change = f"Mend {shake.authorities.partition('=')[0]}: what it names does not exist."
        elif shake.authorities:
            change = (
                f"If it is your company's: add its certificate to what {shake.authorities.partition('=')[0]} names."
            )
        elif shake.other_authorities:
            change += f" {shake.other_authorities} is set, but only other programs read it: name its file."
        return Remark("fail", means, change)
    if code in _STRICT:
        means = "The certificate, or its authority's, is not made by the rules, on which Python insists since 3.13."
        return Remark("fail", means, f"Have {issuer} issue it anew; a context of your own (ssl=) may insist on less.")
    return Remark("fail", "The certificate does not verify.", f"Ask whoever runs {host}.")


def _names(certificate: Certificate) -> str:
    more = len(certificate.names) - _SHOWN
    return ", ".join(certificate.names[:_SHOWN]) + (f" and {more} more" if more > 0 else "") or "no name"
