"""Certificates made on the spot, for a broker that only a measurement or a test talks to: openssl's command line."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UnavailableError

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj")


@dataclass(frozen=True)
class Certificates:
    """PEM files."""

    ca: Path
    cert: Path  # the broker's
    key: Path


def make_certificates(folder: Path, addresses: Sequence[str]) -> Certificates:
    """An authority, and a broker's certificate that it signed for these IP addresses.

    Raises UnavailableError where openssl is not installed or fails.
    """
    openssl = shutil.which("openssl")
    if openssl is None:
        raise UnavailableError("TLS needs a certificate, and openssl is not installed; install it, or use --no-tls.")
    folder.mkdir(parents=True, exist_ok=True)
    files = Certificates(folder / "ca.pem", folder / "broker.pem", folder / "broker.key")

    def run(*words: object) -> None:
        done = subprocess.run([openssl, *map(str, words)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"openssl cannot make a certificate: {done.stderr.strip()[-300:]}")

    ca_key, request, names = folder / "ca.key", folder / "broker.csr", folder / "names"
    usage = ("-addext", "keyUsage=critical,keyCertSign")  # Python 3.13 refuses an authority without it
    run("req", "-x509", *_NEW_KEY, "/CN=kseed", *usage, "-keyout", ca_key, "-out", files.ca)
    listed = ",".join(f"IP:{address}" for address in addresses)
    names.write_text(f"subjectAltName={listed}\nauthorityKeyIdentifier=keyid\n")  # 3.13 asks for the identifier too
    run("req", *_NEW_KEY, "/CN=broker", "-keyout", files.key, "-out", request)
    signed_by = ("-CA", files.ca, "-CAkey", ca_key, "-CAcreateserial")
    run("x509", "-req", *signed_by, "-in", request, "-extfile", names, "-out", files.cert)
    return files
