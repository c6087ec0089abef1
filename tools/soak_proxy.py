"""A TCP proxy in front of a broker that is as bad as its weather: it delays, throttles, doubles and cuts.

It understands MQTT as far as where a packet ends, so a connection can be cut inside one, and a publication can be
doubled, as a client does that saw no answer. Order within a connection is kept, but for a late double.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import threading
from dataclasses import dataclass, field

from shared.errors import UnavailableError
from tools.soak_packets import CONNECT, PUBLISH, Packets, doubled, kind_of, published, version_of
from tools.soak_schedule import Weather
from tools.soak_witness import Witness

HOST = "127.0.0.1"
READ_BYTES = 65_536
LATE_DOUBLE_S = (0.2, 3.0)
START_TIMEOUT_S = 10.0


@dataclass
class ProxyCount:
    """What the proxy has done."""

    connections: int = 0
    old_connections: int = 0  # of them MQTT 3.1.1
    refused: int = 0  # while the broker was away
    cuts: int = 0
    torn: int = 0  # of them in the middle of a packet
    doubled: int = 0
    up_bytes: int = 0  # towards the broker
    down_bytes: int = 0


@dataclass(eq=False)
class _Link:
    """One connection through the proxy: two streams."""

    number: int
    source: random.Random
    client: asyncio.StreamWriter
    broker: asyncio.StreamWriter
    version: int = 5
    must_tear: bool = False
    is_over: bool = False

    def abort(self) -> None:
        """Both ends lose it at once, without a goodbye."""
        self.is_over = True
        self.client.transport.abort()
        self.broker.transport.abort()


@dataclass(eq=False)
class _Pipe:
    """One direction of a link: packets and when each is due, in order."""

    writer: asyncio.StreamWriter
    is_up: bool
    due_s: float = 0.0
    queue: asyncio.Queue[tuple[float, bytes | None]] = field(default_factory=lambda: asyncio.Queue(10_000))


class Proxy:
    """Listens on a free port of this machine, on a thread of its own. Use `start` and `close`."""

    def __init__(
        self, broker_port: int, seed: int, weather: Weather, witness: Witness, tls: ssl.SSLContext | None = None
    ) -> None:
        """tls: of the server that clients see; to the broker it is plain."""
        self.count = ProxyCount()
        self.weather = weather
        self.port = 0
        self._broker_port = broker_port
        self._seed = seed
        self._witness = witness
        self._tls = tls
        self._links: list[_Link] = []
        self._loop = asyncio.new_event_loop()
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="soak proxy", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()
        if not self._is_up.wait(START_TIMEOUT_S):
            raise UnavailableError("the soak's proxy did not start to listen; is the loopback interface up?")

    def close(self) -> None:
        """Drop every connection and stop."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def change(self, weather: Weather) -> None:
        """From now on."""
        self.weather = weather

    def cut(self, share: float | None, is_torn: bool) -> None:
        """Break one connection (`share` in [0, 1) of the list) or all (None); torn: inside its next packet."""
        self._loop.call_soon_threadsafe(self._cut, share, is_torn)

    def _cut(self, share: float | None, is_torn: bool) -> None:
        if not self._links:
            return
        for link in list(self._links) if share is None else [self._links[int(share * len(self._links))]]:
            if is_torn:
                link.must_tear = True
            else:
                self.count.cuts += 1
                link.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, HOST, 0, ssl=self._tls))
        self.port = server.sockets[0].getsockname()[1]
        self._is_up.set()
        try:
            self._loop.run_forever()
        finally:
            server.close()
            for link in list(self._links):
                link.abort()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            broker_reader, broker_writer = await asyncio.open_connection(HOST, self._broker_port)
        except OSError:
            self.count.refused += 1
            writer.transport.abort()
            return
        self.count.connections += 1
        number = self.count.connections
        link = _Link(number, random.Random(f"{self._seed}/{number}"), writer, broker_writer)
        self._links.append(link)
        up, down = _Pipe(broker_writer, is_up=True), _Pipe(writer, is_up=False)
        try:
            work = (
                self._read(link, reader, up),
                self._read(link, broker_reader, down),
                self._write(link, up),
                self._write(link, down),
            )
            await asyncio.gather(*work)
        except (OSError, ValueError, IndexError):
            pass  # an end is gone
        finally:
            link.abort()
            self._links.remove(link)

    async def _read(self, link: _Link, reader: asyncio.StreamReader, pipe: _Pipe) -> None:
        """Cut what comes into packets and queue each for its time."""
        packets = Packets()
        try:
            while data := await reader.read(READ_BYTES):
                for packet in packets.feed(data):
                    if pipe.is_up:
                        self._look(link, packet, pipe)
                    await self._put(link, pipe, packet)
        except OSError:  # reset: what was under way still arrives, as on a real line
            pass
        await pipe.queue.put((pipe.due_s, None))

    def _look(self, link: _Link, packet: bytes, pipe: _Pipe) -> None:
        if kind_of(packet) == CONNECT:
            link.version = version_of(packet)
            self.count.old_connections += link.version < 5
        elif kind_of(packet) == PUBLISH:
            sent = published(packet, link.version)
            self._witness.see(sent)
            if sent.quality == 1 and link.source.random() < self.weather.doubled:
                # A retained message comes twice at once or not: no client sends an old one behind a newer one.
                late_s = 0.0 if sent.is_retained or link.source.random() < 0.5 else link.source.uniform(*LATE_DOUBLE_S)
                self._loop.call_later(late_s, self._double, link, pipe, doubled(packet))

    def _double(self, link: _Link, pipe: _Pipe, packet: bytes) -> None:
        if not link.is_over and not pipe.queue.full():
            self.count.doubled += 1
            pipe.queue.put_nowait((max(pipe.due_s, self._loop.time()), packet))

    async def _put(self, link: _Link, pipe: _Pipe, packet: bytes) -> None:
        weather = self.weather
        due_s = max(pipe.due_s, self._loop.time() + link.source.uniform(*weather.delay_s))
        if weather.bytes_per_s is not None:
            due_s += len(packet) / weather.bytes_per_s
        pipe.due_s = due_s
        await pipe.queue.put((due_s, packet))

    async def _write(self, link: _Link, pipe: _Pipe) -> None:
        while True:
            due_s, packet = await pipe.queue.get()
            if (wait_s := due_s - self._loop.time()) > 0:
                await asyncio.sleep(wait_s)
            if link.is_over or pipe.writer.is_closing():
                return
            if packet is None:
                # The others see the end, too, once all has arrived.
                pipe.writer.close()
                return
            if link.must_tear and len(packet) > 1:
                self.count.cuts += 1
                self.count.torn += 1
                pipe.writer.write(packet[: link.source.randrange(1, len(packet))])
                await asyncio.sleep(0.01)  # or the reset would overtake the half packet
                link.abort()
                return
            pipe.writer.write(packet)
            self._counted(pipe, len(packet))
            await pipe.writer.drain()

    def _counted(self, pipe: _Pipe, size: int) -> None:
        if pipe.is_up:
            self.count.up_bytes += size
        else:
            self.count.down_bytes += size
