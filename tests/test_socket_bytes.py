"""The kernel's byte counts of a connection."""

from __future__ import annotations

import socket
import struct
import sys

import pytest

from shared.socket_bytes import SocketBytes, parse_tcp_info, read_socket_bytes

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP_INFO is Linux'")


@on_linux
def test_counts_are_exact_in_both_directions() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        other, _ = server.accept()
        with other:
            client.sendall(b"x" * 1000)
            other.sendall(b"y" * 77)
            for sock, expected in ((other, 1000), (client, 77)):
                while expected:
                    expected -= len(sock.recv(expected))
            counts = read_socket_bytes(client)
            assert counts is not None
            assert (counts.sent_bytes, counts.received_bytes) == (1000, 77)
            assert counts.sent_segments >= 2
            assert counts.received_segments >= 2
            seen = read_socket_bytes(other)
            assert seen is not None
            assert (seen.sent_bytes, seen.received_bytes) == (77, 1000)


def test_socket_that_cannot_tell_gives_none() -> None:
    closed = socket.socket()
    closed.close()
    assert read_socket_bytes(closed) is None
    assert read_socket_bytes(object()) is None


TIMESTAMPS, SACK, WINDOW_SCALE = 1, 2, 4


def tcp_info(length: int, options: int = TIMESTAMPS | SACK | WINDOW_SCALE) -> bytes:
    info = bytearray(512)
    info[5] = options
    struct.pack_into("=QQII", info, 120, 1001, 77, 5, 6)
    struct.pack_into("=QQ", info, 200, 1300, 300)
    return bytes(info[:length])


def test_retransmissions_are_on_the_wire_but_no_new_payload() -> None:
    expected = SocketBytes(1000, 77, 5, 6, 1300 + 5 * 52 + 8, 77 + 6 * 52 + 8)
    assert parse_tcp_info(tcp_info(232), is_ipv6=False) == expected


def test_old_kernels_lack_the_later_fields() -> None:
    assert parse_tcp_info(tcp_info(192), is_ipv6=False) == SocketBytes(1000, 77, 5, 6, 1000 + 268, 77 + 320)
    assert parse_tcp_info(tcp_info(104), is_ipv6=False) is None


@pytest.mark.parametrize(
    ("options", "is_ipv6", "header", "syn"),
    [
        (TIMESTAMPS | SACK | WINDOW_SCALE, False, 52, 60),
        (TIMESTAMPS | SACK | WINDOW_SCALE, True, 72, 80),
        (SACK | WINDOW_SCALE, False, 40, 52),
        (0, False, 40, 44),
    ],
)
def test_headers_follow_the_options_of_the_connection(options: int, is_ipv6: bool, header: int, syn: int) -> None:
    counts = parse_tcp_info(tcp_info(232, options), is_ipv6=is_ipv6)
    assert counts is not None
    assert counts.ip_sent_bytes == 1300 + syn + 4 * header
    assert counts.ip_received_bytes == 77 + syn + 5 * header


def test_counts_of_connections_add_up() -> None:
    assert SocketBytes(1, 2, 3, 4, 5, 6) + SocketBytes(10, 20, 30, 40, 50, 60) == SocketBytes(11, 22, 33, 44, 55, 66)
