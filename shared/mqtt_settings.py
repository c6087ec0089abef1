"""What all connections of one MQTT client have in common, and what to tell a person when one fails."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

from shared.config import BrokerConfig
from shared.errors import UserError
from shared.mqtt_link import Cause, Ended

UNSUPPORTED_VERSION = 0x84
REFUSED_CREDENTIALS = frozenset({0x85, 0x86, 0x87, 0x8A, 0x8C})  # id, password, not authorized, banned, method


@dataclass(frozen=True)
class Settings:
    """What every connection of a transport has in common."""

    broker: BrokerConfig
    password: str | None
    tls: ssl.SSLContext | None
    client_id: str
    will: tuple[str, bytes] | None
    session_expiry_s: int
    answer_timeout_s: float
    saves_bytes: bool = False  # acknowledgements wait a little for others to go with

    @property
    def address(self) -> str:
        return f"{self.broker.host}:{self.broker.port}"


def tls_context(broker: BrokerConfig) -> ssl.SSLContext | None:
    """TLS as `broker` wants it; raises UserError where its files are unusable."""
    if not broker.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=broker.ca_file)
        if broker.cert_file and broker.key_file:
            # An empty password, for without one OpenSSL asks for an encrypted key's on the terminal and waits.
            context.load_cert_chain(broker.cert_file, broker.key_file, password="")
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(f) for f in (broker.ca_file, broker.cert_file, broker.key_file) if f)
        raise UserError(
            f"the TLS files {files} cannot be used: {error}; they must be PEM and belong together."
        ) from None
    return context


def explain_silence(settings: Settings) -> tuple[Cause, str]:
    """Why the broker closed the connection before its CONNACK."""
    reason = f"{settings.address} closed the connection before it answered"
    if not settings.tls:
        reason += "; does it want TLS?"
    elif not settings.broker.cert_file:
        reason += "; does it want a client certificate?"
    return Cause.UNANSWERED, reason


def explain_refusal(code: int, name: str, settings: Settings) -> Ended:
    """Why the broker's CONNACK refused, from its reason code and the code's name."""
    if code == UNSUPPORTED_VERSION:
        return Ended(Cause.WRONG_VERSION, f"the broker {settings.address} speaks neither MQTT 5 nor 3.1.1")
    if code in REFUSED_CREDENTIALS:
        hint = "check username, password_file and the broker's rules for this client id"
        return Ended(Cause.CREDENTIALS, f"the broker {settings.address} refused {settings.client_id}: {name}; {hint}")
    return Ended(Cause.LOST, f"the broker {settings.address} refused the connection: {name}")


def explain_error(error: Exception, settings: Settings) -> tuple[Cause, str]:
    """Why no TCP or TLS connection came about, from what paho raised."""
    where = settings.address
    if isinstance(error, ssl.SSLCertVerificationError):
        return Cause.CREDENTIALS, f"the certificate of {where} is not trusted: {error.verify_message}; check ca_file"
    if isinstance(error, ssl.SSLError) or (settings.tls and isinstance(error, ConnectionResetError)):
        detail = getattr(error, "reason", None) or error
        return Cause.UNREACHABLE, f"TLS with {where} failed: {detail}; does this port speak TLS?"
    if isinstance(error, (socket.gaierror, ValueError)):
        return Cause.UNREACHABLE, f"the host name {settings.broker.host} is not known here; check it and the network"
    if isinstance(error, ConnectionRefusedError):
        return Cause.UNREACHABLE, f"nothing listens on {where}; is the broker running?"
    if isinstance(error, TimeoutError):
        return Cause.UNREACHABLE, f"no answer from {where} in {settings.answer_timeout_s:g} s; is it reachable?"
    return Cause.UNREACHABLE, f"cannot connect to {where}: {error}"
