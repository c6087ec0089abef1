"""The MQTT transport over TLS: certificates that are good, missing, or of others."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.config import BrokerConfig
from shared.errors import UserError
from shared.mqtt import MqttTransport
from shared.transport import TAKEN_OVER, Disconnected, Received
from tests.brokers import needs_mosquitto, running_mosquitto
from tests.scripted_broker import CONNACK, read_packet, scripted_broker, until_closed
from tests.scripted_broker import TAKEN_OVER as TAKEN_OVER_PACKET
from tests.transport_clients import client, connected, final, subscribed, wait_for
from tools.broker import RunningBroker

NEW_KEY = ("-newkey", "rsa:2048", "-nodes", "-subj")


def certificates(folder: Path) -> None:
    """ca.pem, and server.pem and device.pem signed by it, each with its .key; other.pem signs nothing."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")

    def run(*arguments: object) -> None:
        subprocess.run([openssl, *map(str, arguments)], check=True, capture_output=True)

    usage = ("-addext", "keyUsage=critical,keyCertSign")  # Python 3.13 refuses an authority without it
    for name in ("ca", "other"):
        files = ("-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem")
        run("req", "-x509", *NEW_KEY, f"/CN={name}", *usage, *files)
    # The key identifier, too, is what Python 3.13 asks for.
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n")
    for name in ("server", "device"):
        run("req", *NEW_KEY, f"/CN={name}", "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.csr")
        signed_by = ("-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-CAcreateserial")
        files = ("-in", folder / f"{name}.csr", "-extfile", folder / "names", "-out", folder / f"{name}.pem")
        run("x509", "-req", *signed_by, *files)


@pytest.mark.broker
@needs_mosquitto
def test_tls_with_client_certificates(tmp_path: Path) -> None:
    certificates(tmp_path)
    extra = (
        f"cafile {tmp_path}/ca.pem\ncertfile {tmp_path}/server.pem\nkeyfile {tmp_path}/server.key\n"
        "require_certificate true"
    )
    with running_mosquitto(tmp_path, extra_config=extra) as broker:

        def config(trusted: str, own: str | None) -> BrokerConfig:
            return BrokerConfig(
                broker.host,
                broker.port,
                tls=True,
                ca_file=tmp_path / f"{trusted}.pem",
                cert_file=tmp_path / f"{own}.pem" if own else None,
                key_file=tmp_path / f"{own}.key" if own else None,
            )

        good = subscribed(connected(client(config("ca", "device"))), "news/+")
        good.publish("news/x", b"x" * 100_000)  # many TLS records
        assert wait_for(good, Received).payload == b"x" * 100_000
        traffic = good.traffic()
        if sys.platform.startswith("linux"):
            assert traffic.socket_sent_bytes is not None
            assert traffic.socket_received_bytes is not None
            assert 100_000 < traffic.socket_sent_bytes < 105_000
            assert 100_000 < traffic.socket_received_bytes < 105_000
        good.close()

        wary = client(config("other", "device"))
        wary.start()
        assert final(wary).startswith(f"the certificate of 127.0.0.1:{broker.port} is not trusted: ")
        nameless = client(config("ca", None))
        nameless.start()
        assert wait_for(nameless, Disconnected).reason.endswith("does it want a client certificate?")
        nameless.close(0.0)
        plain = client(BrokerConfig(broker.host, broker.port))
        plain.start()
        assert wait_for(plain, Disconnected).reason.endswith(
            "closed the connection before it answered; does it want TLS?"
        )
        plain.close(0.0)


def test_packets_that_share_a_tls_record_are_all_read(tmp_path: Path) -> None:
    certificates(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")

    def one_record(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            read_packet(secure)
            secure.sendall(CONNACK + TAKEN_OVER_PACKET)
            until_closed(secure)

    with scripted_broker(one_record) as config:
        transport = client(BrokerConfig(config.host, config.port, tls=True, ca_file=tmp_path / "ca.pem"))
        before = time.monotonic()
        transport.start()
        assert final(transport) == TAKEN_OVER
        assert time.monotonic() - before < 10.0  # at once, and not when the peer has run out of patience


@pytest.mark.broker
@needs_mosquitto
def test_tls_to_a_port_without_it_says_so(mosquitto: RunningBroker) -> None:
    transport = client(BrokerConfig(mosquitto.host, mosquitto.port, tls=True))
    transport.start()
    reason = wait_for(transport, Disconnected).reason
    assert reason.startswith(f"TLS with 127.0.0.1:{mosquitto.port} failed: ")
    assert reason.endswith("; does this port speak TLS?")
    transport.close(0.0)


def test_files_that_are_no_certificates_are_refused_before_connecting(tmp_path: Path) -> None:
    file = tmp_path / "junk.pem"
    file.write_text("junk")
    with pytest.raises(UserError, match=r"junk.pem cannot be used: .*; they must be PEM and belong together"):
        MqttTransport(BrokerConfig(tls=True, ca_file=file), "client")
