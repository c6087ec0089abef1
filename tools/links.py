"""Network namespaces joined by lines that lose, delay and throttle IP packets: netem, where the kernel has none.

Each line is a pair of TUN devices, one in each namespace, and a thread here that carries packets from one to the other.
Needs root, iproute2 and /dev/net/tun; all traffic stays inside the namespaces.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import selectors
import shutil
import struct
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET_BYTES = 65_536
_LONGEST_QUEUE_S = 4.0  # more than this waits nowhere: the line drops it, as a router does


@dataclass(frozen=True)
class Line:
    """What a line does to each IP packet."""

    loss: float  # part of the packets, in either direction
    delay_s: float  # one way
    up_bits_per_s: float  # from the device to the hub
    down_bits_per_s: float


# Nominal rates and round trips with their sources: docs/bandwidth.md. The losses are guesses: radio links repeat what
# they lose themselves, so IP sees little of it.
PROFILES = {
    "nb-iot": Line(loss=0.01, delay_s=0.8, up_bits_per_s=62_000, down_bits_per_s=26_000),
    "lte-m": Line(loss=0.005, delay_s=0.05, up_bits_per_s=375_000, down_bits_per_s=300_000),
    "3g": Line(loss=0.005, delay_s=0.15, up_bits_per_s=768_000, down_bits_per_s=1_600_000),
    "satellite": Line(loss=0.01, delay_s=0.3, up_bits_per_s=384_000, down_bits_per_s=384_000),
    "wifi": Line(loss=0.001, delay_s=0.001, up_bits_per_s=15_000_000, down_bits_per_s=30_000_000),
}


def missing() -> str | None:
    """Why there can be no such network on this machine; None: there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    if not os.access(_TUN, os.R_OK | os.W_OK):
        return f"{_TUN} is not there"
    name = f"kseed-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"a network namespace cannot be made here: {tried.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


def inside(namespace: str, command: list[str]) -> list[str]:
    """The command line that runs `command` in a namespace."""
    return ["ip", "netns", "exec", namespace, *command]


class Network:
    """A hub and devices around it, each with a line of its own. `close` takes it all away."""

    def __init__(self, devices: int, line: Line, seed: int) -> None:
        self.hub = f"kseed-{os.getpid()}-hub"
        self.devices = [f"kseed-{os.getpid()}-{number}" for number in range(devices)]
        self.lost = self.carried = 0
        self._line = line
        self._source = random.Random(seed)
        self._selector = selectors.DefaultSelector()
        self._peer: dict[int, int] = {}
        self._rates: dict[int, float] = {}  # of what comes from an end, bits per second
        self._made: list[str] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="lines", daemon=True)
        try:
            for name in (self.hub, *self.devices):
                _ip("netns", "add", name)
                self._made.append(name)
                _ip("-n", name, "link", "set", "lo", "up")
            for number, name in enumerate(self.devices):
                near = _device(f"ks{os.getpid() % 100_000}h{number}", self.hub, f"10.77.{number}.1/30")
                far = _device(f"ks{os.getpid() % 100_000}d{number}", name, f"10.77.{number}.2/30")
                self._peer |= {near: far, far: near}
                self._rates |= {near: line.down_bits_per_s, far: line.up_bits_per_s}
        except BaseException:
            self.close()
            raise
        for end in self._peer:
            self._selector.register(end, selectors.EVENT_READ)
        self._thread.start()

    def hub_address(self, device: int) -> str:
        """The hub, as a device sees it."""
        return f"10.77.{device}.1"

    def device_bytes(self, device: int) -> tuple[int, int]:
        """Bytes of IP packets that the kernel counted on a device's interface: sent, received."""
        name = f"ks{os.getpid() % 100_000}d{device}"
        said = _ip("-n", self.devices[device], "-s", "-j", "link", "show", "dev", name)
        counts = json.loads(said)[0]["stats64"]
        return counts["tx"]["bytes"], counts["rx"]["bytes"]

    def close(self) -> None:
        """Take the namespaces and their devices away."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()
        for end in self._peer:
            os.close(end)
        for name in self._made:
            _ip("netns", "delete", name)

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []  # due, order, to, packet
        free_s = dict.fromkeys(self._peer, 0.0)  # when each direction has sent what it holds
        while not self._is_over.is_set():
            now_s = time.monotonic()
            while waiting and waiting[0][0] <= now_s:
                _, _, to, packet = heapq.heappop(waiting)
                os.write(to, packet)
            wait_s = min(0.2, waiting[0][0] - now_s) if waiting else 0.2
            for key, _ in self._selector.select(max(0.0, wait_s)):
                packet = os.read(key.fd, _PACKET_BYTES)
                now_s = time.monotonic()
                start_s = max(now_s, free_s[key.fd])
                if self._source.random() < self._line.loss or start_s - now_s > _LONGEST_QUEUE_S:
                    self.lost += 1
                    continue
                self.carried += 1
                free_s[key.fd] = start_s + 8 * len(packet) / self._rates[key.fd]
                due_s = free_s[key.fd] + self._line.delay_s
                heapq.heappush(waiting, (due_s, self.carried, self._peer[key.fd], packet))


def _device(name: str, namespace: str, address: str) -> int:
    """A TUN device in a namespace; returns the file descriptor of its other side."""
    import fcntl  # not on Windows, where `missing` says why

    end = os.open(_TUN, os.O_RDWR)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    _ip("link", "set", name, "netns", namespace)
    _ip("-n", namespace, "link", "set", name, "addrgenmode", "none")  # no IPv6 of its own, which would talk
    _ip("-n", namespace, "address", "add", address, "dev", name)
    _ip("-n", namespace, "link", "set", name, "up")
    return end


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
