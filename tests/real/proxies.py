"""nginx and HAProxy as children of a test: configured in its folder, on a port of their own, gone when it ends.

Each is handed a socket that listens already. So nobody else can take its port in between, and who connects before the
program is ready waits in the socket's queue.
"""

import asyncio
import os
import shutil
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, TypeAlias

import trustme

from chatkore_async import AsyncChatKore, RetryPolicy

PATIENCE = 30.0
"""Seconds after which what has to happen is taken not to happen. They bound failures, and are never waited for."""


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a state that nobody announces."""
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110 - a state, not an event
            await asyncio.sleep(0.005)


class Certificate:
    """A certificate for the loopback address, and the authority behind it."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        issued = self._authority.issue_cert("127.0.0.1")
        self.file = folder / "certificate.pem"
        self.file.touch(mode=0o600)
        for part in (issued.private_key_pem, *issued.cert_chain_pems):
            part.write_to_path(self.file, append=True)

    def trusting(self) -> ssl.SSLContext:
        """Return a client's context that trusts the authority."""
        context = ssl.create_default_context()
        self._authority.configure_trust(context)
        return context


class Proxy:
    """A program in front of a relay, and the clients that talk to it.

    Args:
        folder: Where its configuration and its log are written.
        upstream: The relay's port.
        answer_timeout: Seconds for which the relay may say nothing.
        idle_timeout: Seconds after which an idle connection of a client's is closed.
        tls: For https.

    """

    package: ClassVar[str]

    def __init__(
        self,
        folder: Path,
        upstream: int,
        *,
        answer_timeout: float = 60.0,
        idle_timeout: float = 60.0,
        tls: Certificate | None = None,
    ) -> None:
        self.folder = folder
        self.upstream = upstream
        self.answer_timeout = f"{round(answer_timeout * 1000)}ms"
        self.idle_timeout = f"{round(idle_timeout * 1000)}ms"
        self.tls = tls
        self.generation = 0
        """How often it was configured; each answer tells it in `x-generation`."""
        self.children: list[asyncio.subprocess.Process] = []
        self.clients: list[AsyncChatKore] = []
        self.listener = listen()
        self.port: int = self.listener.getsockname()[1]
        self._log = folder / f"{self.package}-{self.port}.log"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.base_url}>"

    @property
    def base_url(self) -> str:
        """What a client takes as its base URL."""
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/v1"

    @property
    def output(self) -> str:
        """What the program said so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def client(self, **options: object) -> AsyncChatKore:
        """Return a client of the proxy. It does not wait between retries, and is closed before the proxy is stopped."""
        usual: dict[str, object] = {"api_key": "sk-test-secret", "retry": RetryPolicy(initial_delay=0)}
        if self.tls is not None:
            usual["ssl"] = self.tls.trusting()
        client = AsyncChatKore(**{**usual, "base_url": self.base_url, **options})
        self.clients.append(client)
        return client

    # What differs.

    def configuration(self) -> str:
        """Return the text of the configuration file."""
        raise NotImplementedError

    def command(self, file: Path) -> tuple[list[str], dict[str, str]]:
        """Return the arguments for a configuration file, and what is added to the environment."""
        raise NotImplementedError

    async def reload(self) -> None:
        """Have a new generation take over; the old one ends its requests first."""
        raise NotImplementedError

    # Life.

    def configure(self) -> Path:
        """Write the configuration of the next generation."""
        self.generation += 1
        file = self.folder / f"{self.package}-{self.port}.conf"
        file.write_text(self.configuration())
        return file

    async def start(self) -> None:
        """Start the program, and wait until it answers.

        Raises:
            RuntimeError: If it is not installed, or does not start; then the error has what it said.

        """
        program = find(self.package)
        arguments, environment = self.command(self.configure())
        with self._log.open("ab") as log:
            child = await asyncio.create_subprocess_exec(
                program,
                *arguments,
                env={**os.environ, **environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self.listener.fileno()],
                start_new_session=True,  # so one signal reaches its workers, too
            )
        self.children.append(child)
        answered, ended = asyncio.create_task(self._probe()), asyncio.create_task(child.wait())
        await asyncio.wait({answered, ended}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        ready = answered.done() and answered.exception() is None
        for task in (answered, ended):
            task.cancel()
        await asyncio.wait({answered, ended})
        if not ready:
            await self.kill()
            raise RuntimeError(f"{self.package} does not start: {program} {' '.join(arguments)}\n{self.output}")

    async def _probe(self) -> None:
        """Ask for what the program answers by itself."""
        context = None if self.tls is None else self.tls.trusting()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context)
        writer.write(b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        try:
            line = await reader.readline()
            if b" 204 " not in line:
                raise RuntimeError(f"not ready: {line!r}")
        finally:
            writer.close()

    async def stop(self) -> None:
        """Close the clients, stop the program, and wait until it has ended. Doing so twice is fine."""
        in_use = [client.pool.in_use for client in self.clients if not client.closed]
        for client in self.clients:
            await client.close()
        self.listener.close()
        self.tell(signal.SIGCONT)
        await self._end(signal.SIGTERM)
        await self._end(signal.SIGKILL)  # whoever did not listen
        assert not any(in_use), "a connection is in use: a call runs on, or has left it behind"

    async def kill(self) -> None:
        """Kill the program: its connections and its port are closed at once, and nobody takes leave."""
        self.listener.close()
        await self._end(signal.SIGKILL)
        # A worker may take longer to die than its master.
        await until(lambda: LISTEN not in {state for port, _, state in connections() if port == self.port})

    async def restart(self) -> None:
        """Start the program again, on the same port, after it was killed."""
        self.children.clear()
        self.listener = listen(self.port)
        await self.start()

    async def freeze(self) -> None:
        """Stop the program's clock: its connections stay open, and nothing comes."""
        self.tell(signal.SIGSTOP)
        await until(lambda: all(state == "T" for child in self.children for state in thread_states(child.pid)))

    def thaw(self) -> None:
        """Let it go on."""
        self.tell(signal.SIGCONT)

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to the program and all its workers."""
        for child in self.children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)

    async def _end(self, number: signal.Signals) -> None:
        self.tell(number)
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                for child in self.children:
                    await child.wait()


ESTABLISHED, LISTEN = "01", "0A"


def connections() -> Iterator[tuple[int, int, str]]:
    """Return local port, remote port and state of this machine's TCP sockets, as Linux names them (`man 5 proc`)."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *_ = line.split()
        yield int(local.partition(":")[2], 16), int(remote.partition(":")[2], 16), state


def thread_states(pid: int) -> Iterator[str]:
    """Return the states of all threads of a process and of its workers, as Linux names them (`man 5 proc`)."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        yield (thread / "stat").read_text().rpartition(")")[2].split()[0]
        for worker in (thread / "children").read_text().split():
            yield from thread_states(int(worker))


Start: TypeAlias = Callable[..., Awaitable[Proxy]]
"""What the fixtures give: takes the options of a proxy, and returns it running."""


def listen(port: int = 0) -> socket.socket:
    """Return a socket that listens on the loopback interface, on a port that is free unless it is given."""
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    # nginx takes an inherited socket as it is. With one that blocks, of two workers that are woken by one connection
    # one waits in `accept` and serves nobody any more.
    listener.setblocking(False)
    return listener


def find(program: str) -> str:
    """Return a program's path.

    Raises:
        RuntimeError: If it is not installed.

    """
    # Debian keeps them where only root's path leads.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which(program, path=path)
    if found is None:
        raise RuntimeError(f"{program} is missing: apt-get install {program}")
    return found


class Nginx(Proxy):
    """nginx, with a master and one worker. It speaks HTTP/1.0 to the relay, unless `location` says otherwise.

    Args:
        folder: As for `Proxy`.
        upstream: As for `Proxy`.
        buffering: Whether it holds an answer back until a buffer is full or the answer ends, as it does by default.
        http: Lines of the block `http`.
        location: Lines of the block `location /`.
        proxy_pass: Where requests go, when it is not just the relay's port.
        **options: As for `Proxy`.

    """

    package = "nginx"

    def __init__(
        self,
        folder: Path,
        upstream: int,
        *,
        buffering: bool = False,
        http: str = "",
        location: str = "",
        proxy_pass: str = "",
        **options: object,
    ) -> None:
        super().__init__(folder, upstream, **options)
        self.buffering = "on" if buffering else "off"
        self.http = http
        self.location = location
        self.proxy_pass = proxy_pass or f"http://127.0.0.1:{upstream}"

    def configuration(self) -> str:
        """Return the text of the configuration file."""
        folder, tls = self.folder, self.tls
        return f"""
daemon off;
worker_processes 1;
# the folder of a test is its owner's only
{"user root root;" if os.geteuid() == 0 else ""}
pid {folder}/nginx-{self.port}.pid;
error_log stderr info;
events {{ worker_connections 1024; }}
http {{
    access_log /dev/stderr;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    client_max_body_size 0;
    keepalive_timeout {self.idle_timeout};
    add_header X-Generation {self.generation} always;
    {f"ssl_certificate {tls.file}; ssl_certificate_key {tls.file};" if tls else ""}
    {self.http}
    server {{
        listen 127.0.0.1:{self.port} {"ssl" if tls else ""};
        location = /ready {{ return 204; }}
        location / {{
            proxy_pass {self.proxy_pass};
            proxy_read_timeout {self.answer_timeout};
            proxy_buffering {self.buffering};
            {self.location}
        }}
    }}
}}
"""

    def command(self, file: Path) -> tuple[list[str], dict[str, str]]:
        """Return the arguments, and the variable by which one nginx hands its sockets to the next."""
        return ["-e", "stderr", "-p", str(self.folder), "-c", str(file)], {"NGINX": f"{self.listener.fileno()};"}

    async def reload(self) -> None:
        """Have the master start a new worker; the old one ends its requests first."""
        self.configure()
        os.kill(self.children[-1].pid, signal.SIGHUP)


class HAProxy(Proxy):
    """HAProxy, as it is set up for streams: no delta waits for the next, and a client that leaves is passed on.

    Args:
        folder: As for `Proxy`.
        upstream: As for `Proxy`.
        defaults: Lines of the section `defaults`; a later one wins.
        frontend: Lines of the frontend.
        backend: Lines of the backend.
        server: More words of the line that names the relay, such as `disabled`.
        **options: As for `Proxy`.

    """

    package = "haproxy"

    def __init__(
        self,
        folder: Path,
        upstream: int,
        *,
        defaults: str = "",
        frontend: str = "",
        backend: str = "",
        server: str = "",
        **options: object,
    ) -> None:
        super().__init__(folder, upstream, **options)
        self.defaults = defaults
        self.frontend = frontend
        self.backend = backend
        self.server = server

    def configuration(self) -> str:
        """Return the text of the configuration file."""
        return f"""
global
log stdout format raw local0
maxconn 1000
defaults
mode http
log global
option httplog
option http-no-delay
option abortonclose
timeout connect 30s
timeout client 60s
timeout server {self.answer_timeout}
timeout http-keep-alive {self.idle_timeout}
# of connections; HAProxy would wait a second before each
retries 0
{self.defaults}
frontend front
bind fd@{self.listener.fileno()} {f"ssl crt {self.tls.file}" if self.tls else ""}
http-request return status 204 if {{ path /ready }}
http-after-response set-header x-generation {self.generation}
{self.frontend}
default_backend relay
backend relay
{self.backend}
server relay 127.0.0.1:{self.upstream} {self.server}
"""

    def command(self, file: Path) -> tuple[list[str], dict[str, str]]:
        """Return the arguments; a successor tells its predecessors to end."""
        before = [str(child.pid) for child in self.children]
        return ["-db", "-f", str(file), *(["-sf", *before] if before else [])], {}

    async def reload(self) -> None:
        """Start a successor on the same socket; the old process ends its requests first."""
        await self.start()
