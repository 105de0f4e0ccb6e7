"""The steps of `chatkore doctor` in their order: what is looked at, and when there is no use in going on."""

import ssl
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import msgspec

from chatkore_async import AsyncChatKore, ChatKoreError, ConfigurationError, Timeout
from chatkore_async.cli._account import KEYLESS
from chatkore_async.cli._chart import Chart
from chatkore_async.cli._examine_answers import (
    KEYS_FAULT,
    choose_model,
    examine_call,
    examine_headers,
    examine_key,
    examine_models,
    examine_no_models,
    why_no_call,
)
from chatkore_async.cli._examine_errors import remark_on_error, told
from chatkore_async.cli._examine_proxy import choose_proxy, examine_proxy, secrets_of
from chatkore_async.cli._examine_settings import examine_settings, examine_url, key_to_send, read_account, signs
from chatkore_async.cli._examine_stream import examine_stream
from chatkore_async.cli._examine_way import examine_dns, examine_tcp, examine_tls, examine_tunnel
from chatkore_async.cli._finding import STEPS, Finding, Mask, found, skipped
from chatkore_async.cli._observed import ProxyChoice
from chatkore_async.cli._probe import CONNECT, look_up, reach, reach_some, shake_hands, try_tunnel
from chatkore_async.cli._questions import Ear, Questions, read_headers
from chatkore_async.cli._route import Route
from chatkore_async.cli._watch import watch_stream


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the doctor was asked to do.

    Attributes:
        base_url: of `--base-url`, or `None`.
        timeout: seconds for each step.
        model: of `--model`, or `None`.
        calls: whether calls that cost money may be made.
    """

    base_url: str | None = None
    timeout: float = 30.0
    model: str | None = None
    calls: bool = True


class Examination:
    """Looks at a server step by step, and shows what it finds as it goes.

    Attributes:
        base_url: as the client has it, without secrets; `""` when it refuses what was given.
        findings: one for each of `STEPS` in the end.

    Args:
        asked: what to look at.
        chart: where findings are shown.
        environ: the environment.
        threads: where what blocks is done.
    """

    def __init__(self, asked: Asked, chart: Chart, environ: Mapping[str, str], threads: ThreadPoolExecutor) -> None:
        self.base_url = ""
        self.findings: list[Finding] = []
        self._asked = asked
        self._chart = chart
        self._environ = environ
        self._threads = threads
        self._account = read_account(asked.base_url, environ)
        self._proxies = urllib.request.getproxies()
        self._mask = Mask(
            [self._account.key, *(secret for url in self._proxies.values() for secret in secrets_of(url))]
        )
        # The client is given the same, so that both trust the same authorities.
        self._context = ssl.create_default_context()

    async def run(self) -> None:
        """Take all steps, the last ones perhaps by saying why they are left out."""
        self._note(examine_settings(self._account))
        route, why = await self._way()
        if route is not None:
            why = await self._answers(route)
        for step in STEPS[len(self.findings) :]:
            self._note(skipped(step, why))

    def _note(self, finding: Finding) -> bool:
        """Keep a finding and show it; tell whether there is a use in going on."""
        assert finding.step == STEPS[len(self.findings)]
        finding = self._mask.finding(finding)
        self.findings.append(finding)
        self._chart.show(finding)
        return finding.status != "fail"

    async def _way(self) -> tuple[Route | None, str]:
        """Take the steps up to TLS; return the way to the server, or why it ends before it."""
        try:
            base_url = AsyncChatKore(api_key=KEYLESS, base_url=self._account.url).base_url
        except ConfigurationError as error:
            self._note(examine_url(self._account.url, None, str(error)))
            return None, "the base URL is none"
        self.base_url = self._mask(base_url)
        self._note(examine_url(self._account.url, base_url))
        choice = choose_proxy(base_url, self._proxies, self._environ, urllib.request.proxy_bypass)
        parts = urlsplit(base_url)
        tls = parts.scheme == "https"
        host = parts.hostname or ""
        route = Route(host=host, port=parts.port or (443 if tls else 80), tls=tls, path=parts.path, proxy=choice.proxy)
        if not await self._proxy(choice):
            return None, "the proxy cannot be used"
        connected = await (self._through(route, choice) if choice.proxy else self._straight(route))
        if connected is None:
            return None, "there is no connection"
        route = connected
        if not tls:
            self._note(skipped("tls", "plain http has none"))
            return route, ""
        with self._chart.working("tls"):
            shake = await shake_hands(route, self._context, self._asked.timeout, self._environ)
        well = self._note(examine_tls(host, route.port, shake, time.time()))
        return (route, "") if well else (None, "there is no TLS")

    async def _proxy(self, choice: ProxyChoice) -> bool:
        if choice.proxy is None:
            return self._note(examine_proxy(choice))
        with self._chart.working("proxy"):
            reached = await reach(choice.proxy.host, choice.proxy.port, self._asked.timeout)
        return self._note(examine_proxy(choice, reached))

    async def _straight(self, route: Route) -> Route | None:
        with self._chart.working("dns"):
            lookup = await look_up(route.host, route.port, self._asked.timeout, self._threads)
        if self._note(examine_dns(lookup)):
            with self._chart.working("tcp"):
                attempts = await reach_some(lookup.addresses, route.port, self._asked.timeout)
            if self._note(examine_tcp(route.host, attempts)):
                address = next(each.address for each in attempts if each.trouble is None)
                return msgspec.structs.replace(route, address=address)
        return None

    async def _through(self, route: Route, choice: ProxyChoice) -> Route | None:
        self._note(skipped("dns", f"the proxy looks up {route.host}"))
        if not route.tls:
            self._note(skipped("tcp", "to the proxy only, which connects for each request"))
            return route
        with self._chart.working("tcp"):
            tunnel = await try_tunnel(route, self._asked.timeout)
        return route if self._note(examine_tunnel(route.host, route.port, choice.source, tunnel)) else None

    async def _answers(self, route: Route) -> str:
        """Take the steps from the models on; return why those that are left cannot be taken."""
        key, timeout = key_to_send(self._account), self._asked.timeout
        if key is None:
            return "no request can carry the key"
        ear = Ear()
        async with AsyncChatKore(
            api_key=key,
            base_url=self._account.url,
            timeout=Timeout(total=timeout, connect=min(timeout, CONNECT), idle=timeout),
            max_retries=0,
            hooks=[ear],
            ssl=self._context,
        ) as client:
            questions = Questions(client, self._mask)
            listed, error = await self._models(questions)
            errors = [error]
            model = choose_model(self._asked.model, listed)
            stop = why_no_call(error) if self._asked.calls else "--no-call"
            call: Finding | None = None
            if not stop:
                with self._chart.working("call"):
                    call, error = await self._call(questions, model)
                errors.append(error)
                stop = "" if error is None else "the call failed"
            self._note(examine_key(self._account, errors, signs(self._account)))
            self._note(call or skipped("call", stop))
            if stop:
                self._note(skipped("stream", stop))
            else:
                with self._chart.working("stream"):
                    stream = await self._stream(questions, model, route, key)
                self._note(stream)
        self._note(examine_headers(read_headers(ear.heard, self._mask)))
        return ""

    async def _models(self, questions: Questions) -> tuple[list[str], ChatKoreError | None]:
        listed: list[str] = []
        failed: ChatKoreError | None = None
        with self._chart.working("models"):
            try:
                listed, seconds = await questions.models()
                finding = examine_models(listed, seconds, self._asked.model)
            except ChatKoreError as error:
                failed = error
                finding = examine_no_models(error, self.base_url, calls=self._asked.calls)
        self._note(finding)
        return listed, failed

    async def _call(self, questions: Questions, model: str) -> tuple[Finding, ChatKoreError | None]:
        try:
            return examine_call(await questions.call(model)), None
        except KEYS_FAULT as error:
            return skipped("call", f"{model}: {told(error)} See key."), error
        except ChatKoreError as error:
            return self._failed("call", model, error), error

    async def _stream(self, questions: Questions, model: str, route: Route, key: str) -> Finding:
        try:
            answered = await questions.stream(model)
        except ChatKoreError as error:
            return self._failed("stream", model, error)
        raw = await watch_stream(route, self._context, key, questions.body(model), self._asked.timeout)
        return examine_stream(answered, raw)

    def _failed(self, step: str, model: str, error: ChatKoreError) -> Finding:
        return found(step, [f"{model}: {told(error)}"], [remark_on_error(error, self.base_url)])
