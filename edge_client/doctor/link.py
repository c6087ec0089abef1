"""The way to the broker below MQTT: its name, a connection, TLS and its certificate."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

from edge_client.doctor.check import Seen, Trouble
from shared.config import BrokerConfig
from shared.mqtt_settings import tls_context

ANSWER_S = 5.0
FEW_DAYS = 14
DAY_S = 86_400
# OpenSSL's verify codes (x509_vfy.h).
EXPIRED, NOT_YET_VALID, WRONG_NAME, WRONG_ADDRESS = 10, 9, 62, 64
UNKNOWN_SIGNER = (18, 19, 20, 21)


class Way:
    """The checks, which learn from each other. now_s: unix seconds."""

    def __init__(self, broker: BrokerConfig, now_s: Callable[[], float] = time.time) -> None:
        self._broker = broker
        self._now_s = now_s
        self._where = f"{broker.host}:{broker.port}"
        self.certificate: dict[str, Any] | None = None  # of the broker, as `ssl` reads it, once it is trusted

    def name(self) -> Seen:
        """DNS."""
        host = self._broker.host
        try:
            found = socket.getaddrinfo(host, self._broker.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Trouble(
                f"the name {host} is not known here: {error}",
                "Check host under [broker], and this machine's network and name server.",
            ) from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        return Seen(f"{host} is an address" if addresses == [host] else f"{host} is {', '.join(addresses)}")

    def connection(self) -> Seen:
        """TCP."""
        began_s = time.perf_counter()
        with self._connected():
            return Seen(f"{self._where} answers in {(time.perf_counter() - began_s) * 1000:.3g} ms")

    def _connected(self) -> socket.socket:
        try:
            return socket.create_connection((self._broker.host, self._broker.port), timeout=ANSWER_S)
        except ConnectionRefusedError as error:
            raise Trouble(
                f"nothing listens on {self._where}",
                "Start the broker there, or correct host and port under [broker] (usual: 1883, with TLS 8883).",
            ) from error
        except TimeoutError as error:
            raise Trouble(
                f"no answer from {self._where} in {ANSWER_S:.0f} s",
                "A firewall may drop the packets, or the machine is off; try the same port from another network.",
            ) from error
        except OSError as error:
            raise Trouble(f"no connection to {self._where}: {error}", "Check this machine's network.") from error

    def tls(self) -> Seen:
        """The certificate's chain, name and dates."""
        context = tls_context(self._broker)
        if context is None:
            return self._without_tls()
        try:
            with self._connected() as raw, context.wrap_socket(raw, server_hostname=self._broker.host) as wrapped:
                self.certificate = dict(wrapped.getpeercert() or {})
                version = wrapped.version()
        except ssl.SSLCertVerificationError as error:
            raise self._mistrust(error) from error
        except (ssl.SSLError, ConnectionError, TimeoutError) as error:
            why = getattr(error, "reason", None) or error
            raise Trouble(
                f"no TLS with {self._where}: {why}",
                "Check that the port is the broker's TLS port (usual: 8883), and that no proxy stands between.",
            ) from error
        end = str(self.certificate["notAfter"])
        days = (ssl.cert_time_to_seconds(end) - self._now_s()) / DAY_S
        text = f"{version}, certificate for {_names(self.certificate)}, valid until {end} ({days:.0f} days)"
        return Seen(text, "Have the broker's certificate renewed." if days < FEW_DAYS else "")

    def _without_tls(self) -> Seen:
        if self._broker.host == "localhost" or self._broker.host.startswith(("127.", "::1")):
            return Seen("off; the broker is on this machine")
        return Seen(
            "off: who is between here and the broker reads the password, and can change messages",
            "Set tls = true under [broker], and ca_file where the broker's certificate is its own.",
        )

    def _mistrust(self, error: ssl.SSLCertVerificationError) -> Trouble:
        text = f"the certificate of {self._where} is not trusted: {error.verify_message}"
        here = f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(self._now_s()))} UTC"
        if error.verify_code == EXPIRED:
            return Trouble(text, f"Have it renewed; or set this machine's clock, which says {here}.")
        if error.verify_code == NOT_YET_VALID:
            return Trouble(
                text, f"Set this machine's clock, which says {here}; or wait until the certificate is valid."
            )
        if error.verify_code in (WRONG_NAME, WRONG_ADDRESS):
            names = self._other_names()
            return Trouble(
                text, f"Reach the broker under a name that is in it{names}, or have one made for {self._broker.host}."
            )
        if error.verify_code in UNKNOWN_SIGNER:
            given = f"ca_file is {self._broker.ca_file}" if self._broker.ca_file else "ca_file is not given"
            return Trouble(text, f"Set ca_file under [broker] to the certificate that signed the broker's ({given}).")
        return Trouble(text, "Check the broker's certificate and ca_file under [broker].")

    def _other_names(self) -> str:
        """Of a certificate that is good but for its name."""
        context = tls_context(self._broker)
        assert context is not None
        context.check_hostname = False
        try:
            with self._connected() as raw, context.wrap_socket(raw) as wrapped:
                return f" ({_names(dict(wrapped.getpeercert() or {}))})"
        except (OSError, Trouble):
            return ""


def _names(certificate: dict[str, Any]) -> str:
    names = [str(value) for _, value in certificate.get("subjectAltName", ())]
    return ", ".join(names[:4]) or "no name"
