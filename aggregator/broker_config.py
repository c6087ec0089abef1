"""A mosquitto configuration with the limits that kseed needs, and the access list of PROTOCOL.md section 2.

Every limit has its reason beside it, in the file. What MQTT can tell of them is checked again on every connection
(`packet_limit_error`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aggregator.spec import Spec
from shared.errors import UnavailableError, UserError
from shared.topics import check_id
from shared.wire import LIMIT_BYTES, encode

PACKET_OVERHEAD_BYTES = 512  # header, topic (at most 144) and properties
MAX_PACKET_BYTES = max(LIMIT_BYTES.values()) + PACKET_OVERHEAD_BYTES
CONF_NAME, ACL_NAME = "kseed.conf", "kseed.acl"

_CONF = """\
# Written by `kseed-aggregator broker-config` for mosquitto 2.0 or later. Put it, or an include_dir for it, into
# mosquitto.conf. Do not set per_listener_settings: 2.0.12 to 2.0.18 forget access rules with it.
{listener}
{access}
# Sessions and retained messages outlive a restart. A broker that is killed forgets at most autosave_interval seconds:
# devices and aggregator send again what was not answered. autosave_on_changes would write everything every time.
persistence true
{location}autosave_interval 10
# A device that stays away loses its session after this, and nothing else; without it sessions are kept for ever.
persistent_client_expiration 14d

# What may wait for a client that is away or busy. The default of 1000 drops QoS 1 messages without a word after
# acknowledging them; 0 drops everything on some versions from 2.0.16 on. Watch $SYS/broker/publish/messages/dropped.
max_queued_messages 1000000
max_queued_bytes 0
# What may be on its way to one client unacknowledged.
max_inflight_messages 1000
# The longest packet of the protocol: the run message, with its manifest. Not message_size_limit, which is older.
max_packet_size {packet}
retain_available true
set_tcp_nodelay true
"""

_ACL = """\
# Topics are tied to the login (%u), never to the client id (%c), which a client chooses freely.
{aggregators}
pattern read kseed/+/run
pattern read kseed/+/plan
pattern read kseed/+/snapshot
pattern read kseed/+/receipt/%u
pattern readwrite kseed/+/presence/%u
pattern write kseed/+/update/%u
"""


@dataclass(frozen=True)
class BrokerFiles:
    """What the generated configuration refers to, and where it listens."""

    folder: Path  # of the files that are written
    runs: tuple[str, ...] = ()  # an aggregator's login is kseed-aggregator-RUN
    users: Path | None = None  # mosquitto's password file; None: no logins, this machine only
    cert: Path | None = None  # PEM; with `key`: TLS
    key: Path | None = None
    port: int | None = None  # None: 8883 with TLS, 1883 without
    data: Path | None = None  # where mosquitto keeps its database; None: where it always does


def write_broker_config(files: BrokerFiles) -> str:
    """Write the configuration and, with logins, the access list; returns what to tell the person.

    Raises UserError where the settings contradict each other, UnavailableError where the folder cannot be written.
    """
    for run in files.runs:
        check_id("a run", run)
    if (files.cert is None) != (files.key is None):
        raise UserError("TLS needs both --cert and --key; give both, or neither.")
    if files.users is not None and not files.runs:
        raise UserError("an access list needs the names of the runs whose aggregators may publish; give them.")
    for path in (files.users, files.cert, files.key):
        if path is not None and not path.is_file():
            raise UserError(
                f"{path}: there is no such file; mosquitto_passwd makes password files, openssl the others."
            )
    written = {CONF_NAME: conf_text(files)}
    if files.users is not None:
        written[ACL_NAME] = acl_text(files.runs)
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        for name, text in written.items():
            (files.folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UnavailableError(f"{files.folder}: {error.strerror}; choose another folder with --output.") from error
    lines = [f"wrote {files.folder / name}" for name in written]
    if files.users is None:
        lines.append("it lets anyone on this machine in, and nobody else; give --users for a fleet")
    return "\n".join([*lines, f"start it: mosquitto -c {files.folder / CONF_NAME}"])


def conf_text(files: BrokerFiles) -> str:
    """mosquitto.conf."""
    port = files.port or (8883 if files.cert else 1883)
    if files.users is None:
        listener, access = f"listener {port} 127.0.0.1", "allow_anonymous true\n"
    else:
        listener = f"listener {port}"
        access = (
            f"allow_anonymous false\npassword_file {files.users.resolve()}\n"
            f"acl_file {(files.folder / ACL_NAME).resolve()}\n"
            "# The login is the client id: nobody takes over another one's session.\nuse_username_as_clientid true\n"
        )
    if files.cert is not None and files.key is not None:
        listener += f"\ncertfile {files.cert.resolve()}\nkeyfile {files.key.resolve()}"
    elif files.users is not None:
        listener += "\n# Without TLS everyone on the way reads logins and updates: --cert and --key."
    location = f"persistence_location {files.data.resolve()}/\n" if files.data is not None else ""
    return _CONF.format(listener=listener, access=access, location=location, packet=MAX_PACKET_BYTES)


def acl_text(runs: Sequence[str]) -> str:
    """The access list: each run's aggregator in its run, each device in its own topics."""
    aggregators = "".join(f"user kseed-aggregator-{run}\ntopic readwrite kseed/{run}/#\n\n" for run in runs)
    return _ACL.format(aggregators=aggregators)


def packet_limit_error(spec: Spec, largest_packet_bytes: int | None) -> UserError | None:
    """Why a broker that takes packets of so many bytes (None: it did not say) cannot carry the run.

    Snapshots have a fixed length, plans at most K levels, a change as long as a snapshot and the listed devices.
    """
    plan_bytes = 5 * spec.facts.seeds + sum(len(device) + 2 for device in spec.config.devices) + 1024
    needed = max(len(encode(spec.facts)), plan_bytes, spec.update_limit_bytes) + PACKET_OVERHEAD_BYTES
    if largest_packet_bytes is None or largest_packet_bytes >= needed:
        return None
    return UserError(
        f"the broker takes packets of up to {largest_packet_bytes} bytes, run {spec.name!r} needs {needed}. "
        f"Set max_packet_size {MAX_PACKET_BYTES} in mosquitto.conf (`kseed-aggregator broker-config` writes one)."
    )
