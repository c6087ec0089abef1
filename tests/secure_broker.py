"""A mosquitto as a fleet has it: TLS, logins, and the access list of `kseed-aggregator broker-config`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from aggregator.broker_config import BrokerFiles, write_broker_config
from shared.config import BrokerConfig
from tools.broker import find_mosquitto, free_port

PASSWORD = "correct horse"
NEW_KEY = ("-newkey", "rsa:2048", "-nodes", "-subj")
needs_tools = pytest.mark.skipif(
    not (find_mosquitto() and shutil.which("mosquitto_passwd") and shutil.which("openssl")),
    reason="mosquitto, mosquitto_passwd or openssl is not installed",
)


@dataclass(frozen=True)
class SecureBroker:
    """Where it listens, and where its files are: ca.pem, password (of everyone)."""

    folder: Path
    port: int

    def config(self, user: str, **more: object) -> BrokerConfig:
        """How `user` gets in."""
        return BrokerConfig(**{**self.settings(user), **more})  # type: ignore[arg-type]

    def settings(self, user: str) -> dict[str, object]:
        """The same, for a configuration file."""
        return {
            "host": "localhost",
            "port": self.port,
            "tls": True,
            "ca_file": self.folder / "ca.pem",
            "username": user,
            "password_file": self.folder / "password",
        }


def certificates(folder: Path, *, names: str = "DNS:localhost,IP:127.0.0.1", days: int = 30) -> None:
    """ca.pem, and server.pem with server.key signed by it, for `names`, valid from now for `days`."""

    def run(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

    # Python 3.13 refuses an authority without the usage, and a certificate without the key identifier.
    usage = ("-addext", "keyUsage=critical,keyCertSign")
    run("req", "-x509", *NEW_KEY, "/CN=an authority", *usage, "-keyout", folder / "ca.key", "-out", folder / "ca.pem")
    (folder / "names").write_text(f"subjectAltName={names}\nauthorityKeyIdentifier=keyid\n")
    run("req", *NEW_KEY, "/CN=broker", "-keyout", folder / "server.key", "-out", folder / "server.csr")
    signed_by = ("-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-CAcreateserial", "-days", days)
    files = ("-in", folder / "server.csr", "-extfile", folder / "names", "-out", folder / "server.pem")
    run("x509", "-req", *signed_by, *files)


@contextmanager
def running(
    folder: Path,
    *users: str,
    run: str = "spring",
    names: str = "DNS:localhost,IP:127.0.0.1",
    days: int = 30,
    extra: str = "",
) -> Iterator[SecureBroker]:
    """The broker, with the logins `users` and the aggregator's; `extra` lines of configuration."""
    folder.mkdir()
    certificates(folder, names=names, days=days)
    (folder / "password").write_text(f"{PASSWORD}\n")
    (folder / "users").touch()
    for user in (*users, f"kseed-aggregator-{run}"):
        subprocess.run(["mosquitto_passwd", "-b", folder / "users", user, PASSWORD], check=True)
    port = free_port()
    write_broker_config(
        BrokerFiles(
            folder, (run,), folder / "users", folder / "server.pem", folder / "server.key", port=port, data=folder
        )
    )
    conf = folder / "run.conf"
    user = "user root\n" if os.geteuid() == 0 else ""
    conf.write_text(f"{user}{(folder / 'kseed.conf').read_text()}\n{extra}\n")
    with (folder / "mosquitto.log").open("wb") as log:
        process = subprocess.Popen([str(find_mosquitto()), "-c", str(conf)], stdout=log, stderr=subprocess.STDOUT)
    try:
        until_s = time.monotonic() + 20
        while time.monotonic() < until_s and process.poll() is None:
            try:
                socket.create_connection(("localhost", port), timeout=1.0).close()
            except OSError:
                time.sleep(0.01)  # between attempts; a refused connection returns at once
            else:
                break
        assert process.poll() is None, (folder / "mosquitto.log").read_text()
        yield SecureBroker(folder, port)
    finally:
        process.terminate()
        process.wait()
