"""How many bytes a TCP connection carried, as the kernel counts them (TCP_INFO, Linux 4.2 or later).

Of TCP payload (MQTT with TLS around it) and of IP packets. They need no privilege, and belong to one connection, unlike
`psutil.net_io_counters`, which counts the whole interface.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from dataclasses import astuple, dataclass
from typing import Any

# Offsets in Linux' struct tcp_info (include/uapi/linux/tcp.h); it only ever grows at the end.
_SIZE = 512
_OPTIONS = 5  # u8: what both sides agreed on
_BYTES_ACKED = 120  # u64; counts the SYN too
_BYTES_RECEIVED = 128  # u64
_SEGMENTS_OUT = 136  # u32, those without payload included
_SEGMENTS_IN = 140  # u32
_BYTES_SENT = 200  # u64, retransmissions included; since Linux 4.19
_BYTES_RETRANSMITTED = 208  # u64; since Linux 4.19

_HAS_TIMESTAMPS, _HAS_SACK, _HAS_WINDOW_SCALE = 1, 2, 4
_TIMESTAMPS_BYTES = 12  # in every segment, the SYN too
_SYN_BYTES = 4  # maximum segment size, in the SYN alone
_OPTION_BYTES = 4  # in the SYN alone: window scale; SACK permitted, which has room beside timestamps
_TCP_BYTES = 20
_IPV4_BYTES, _IPV6_BYTES = 20, 40


@dataclass(frozen=True)
class SocketBytes:
    """What connections carried so far.

    The last two are bytes of IP packets: every segment with its headers, the handshake, retransmissions. They leave out
    what no counter of a connection holds: the segments of its end that follow close() (two each way, of headers alone),
    SACK blocks (12 to 36 bytes in an acknowledgement while something is missing), DNS, and frames below IP.
    """

    sent_bytes: int  # TCP payload handed to the network, each byte once
    received_bytes: int
    sent_segments: int  # TCP segments, bare acknowledgements included
    received_segments: int
    ip_sent_bytes: int
    ip_received_bytes: int

    def __add__(self, other: SocketBytes) -> SocketBytes:
        return SocketBytes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def read_socket_bytes(sock: Any) -> SocketBytes | None:
    """The counts of the connected TCP socket `sock` (plain or TLS); None where this platform cannot tell.

    Raises nothing: a socket that is closed or of another kind gives None.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
        # A host name may stand for either; an IPv4 address mapped into IPv6 travels as IPv4.
        is_ipv6 = sock.family == socket.AF_INET6 and not sock.getsockname()[0].startswith("::ffff:")
    except (OSError, AttributeError):
        return None
    return parse_tcp_info(info, is_ipv6=is_ipv6)


def parse_tcp_info(info: bytes, *, is_ipv6: bool) -> SocketBytes | None:
    """The counts in a struct tcp_info, which old kernels return shorter; None where they are not in it."""
    if len(info) < _SEGMENTS_IN + 4:
        return None
    acked, received, sent_segments, received_segments = struct.unpack_from("=QQII", info, _BYTES_ACKED)
    if len(info) >= _BYTES_RETRANSMITTED + 8:
        all_sent, again = struct.unpack_from("=QQ", info, _BYTES_SENT)
        sent = all_sent - again
    else:
        sent = all_sent = max(acked - 1, 0)  # the SYN
    options = info[_OPTIONS]
    header = (_IPV6_BYTES if is_ipv6 else _IPV4_BYTES) + _TCP_BYTES
    header += _TIMESTAMPS_BYTES if options & _HAS_TIMESTAMPS else 0
    syn = _SYN_BYTES + (_OPTION_BYTES if options & _HAS_WINDOW_SCALE else 0)
    syn += _OPTION_BYTES if options & _HAS_SACK and not options & _HAS_TIMESTAMPS else 0
    return SocketBytes(
        sent,
        received,
        sent_segments,
        received_segments,
        all_sent + header * sent_segments + syn,
        received + header * received_segments + syn,
    )


class SocketMeter:
    """The bytes of one socket after the other. `total` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._past: SocketBytes | None = SocketBytes(0, 0, 0, 0, 0, 0)
        self._current: Any = None

    def opened(self, sock: Any) -> None:
        """Count `sock` from now on, with what it has carried so far."""
        with self._lock:
            self._current = sock

    def closing(self, sock: Any) -> None:
        """Take the final counts of `sock`, which is still open; does nothing if it is not the one being counted."""
        with self._lock:
            if sock is not None and sock is self._current:
                self._past = self._sum()
                self._current = None

    def total(self) -> SocketBytes | None:
        """All sockets so far; None where this platform cannot tell."""
        with self._lock:
            return self._sum()

    def _sum(self) -> SocketBytes | None:
        if self._current is None or self._past is None:
            return self._past
        current = read_socket_bytes(self._current)
        return None if current is None else self._past + current
