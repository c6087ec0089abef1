"""A systemd unit: its text, where it lies, and files that are replaced only where nobody has changed them.

What each setting does is in systemd.exec(5), systemd.service(5) and systemd.resource-control(5).
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import UserError

LOGIN = "kseed"  # of a system service
SYSTEM_FOLDER = Path("/etc/systemd/system")
HOMES = (Path("/home"), Path("/root"), Path("/run/user"))  # what ProtectHome= closes
TEMPORARY = (Path("/tmp"), Path("/var/tmp"))  # what PrivateTmp= replaces
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,100}")
_MARK = re.compile(r"# Written by kseed\. SHA-256 of the lines below: ([0-9a-f]{64})\n")

# What the kernel refuses to an unprivileged process's children as well: it works in a user's own service manager.
ANYWHERE = (
    "NoNewPrivileges=yes",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "LockPersonality=yes",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallErrorNumber=EPERM",
    "UMask=0077",
)
# These need mounts or capabilities to drop. In a user's manager they are ignored, or the service does not start
# (status 226/NAMESPACE, 218/CAPABILITIES), as the version of systemd will have it.
SYSTEM_ONLY = (
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "ProtectSystem=strict",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "KeyringMode=private",
    "RemoveIPC=yes",
)


@dataclass(frozen=True, kw_only=True)
class Service:
    """A program that systemd keeps running. Folders of `writes` may be missing; `reads` are files and folders."""

    name: str
    description: str
    command: Sequence[str]
    user: str | None = None  # a system service under this login; None: a service of whoever installs it
    groups: Sequence[str] = ()  # a system service's further groups
    environment: Mapping[str, str] = field(default_factory=dict)  # values are systemd's, with its % specifiers
    settings: Sequence[str] = ()  # further lines of [Service]
    folder: Path | None = None  # that relative paths of the configuration start from
    reads: Sequence[Path] = ()
    writes: Sequence[Path] = ()

    def __post_init__(self) -> None:
        """Check the names. Raises UserError."""
        _check_name("--name", self.name)
        _check_name("--user", self.user or LOGIN)

    def text(self) -> str:
        """The unit, with a first line that shows whether somebody has changed it."""
        body = "\n".join((*self._unit(), "", *self._service(), "", *self._install())) + "\n"
        return f"# Written by kseed. SHA-256 of the lines below: {hashlib.sha256(body.encode()).hexdigest()}\n{body}"

    def _unit(self) -> list[str]:
        online = ["Wants=network-online.target", "After=network-online.target"] if self.user is not None else []
        return [
            "[Unit]",
            f"Description={self.description}",
            *online,
            "StartLimitIntervalSec=15min",
            "StartLimitBurst=5",
        ]

    def _service(self) -> list[str]:
        return [
            "[Service]",
            "Type=exec",
            f"ExecStart={' '.join(quoted(word).replace('$', '$$') for word in self.command)}",
            "Restart=on-failure",
            "RestartSec=30",
            "# 2: the configuration is wrong; 3: the run has no use for this device. Neither mends itself.",
            "RestartPreventExitStatus=2 3",
            "TimeoutStopSec=2min",
            *(f"Environment={quoted(f'{name}={value}', expand=True)}" for name, value in self.environment.items()),
            *([] if self.folder is None else [f"WorkingDirectory={_escaped(str(self.folder))}"]),
            *self.settings,
            *ANYWHERE,
            *(self._system() if self.user is not None else ()),
        ]

    def _system(self) -> list[str]:
        paths = (*self.reads, *self.writes)
        is_home_used, is_tmp_used = (
            any(path.is_relative_to(folder) for path in paths for folder in folders) for folders in (HOMES, TEMPORARY)
        )
        lines = [f"User={self.user}", "StateDirectory=kseed", "CacheDirectory=kseed", *SYSTEM_ONLY]
        if self.groups:
            lines.append(f"SupplementaryGroups={' '.join(self.groups)}")
        lines.append(f"ProtectHome={'read-only' if is_home_used else 'yes'}")
        lines.append("ReadWritePaths=/tmp /var/tmp" if is_tmp_used else "PrivateTmp=yes")
        lines += [f"ReadWritePaths={quoted(f'-{path}')}" for path in self.writes]  # -: it need not be there
        return lines

    def _install(self) -> list[str]:
        return ["[Install]", f"WantedBy={target(self.user is not None)}"]


def _check_name(what: str, value: str) -> None:
    if not _NAME.fullmatch(value):
        raise UserError(f"{what} is {value!r}; allowed are letters, digits, '-', '_' and '.'. Choose another.")


def quoted(word: str, *, expand: bool = False) -> str:
    """A word of a unit's line that systemd reads as it is; with `expand`, %S and the like still mean something."""
    plain = (word if expand else _escaped(word)).replace("\\", "\\\\").replace('"', '\\"')
    return plain if re.fullmatch(r"[A-Za-z0-9_@$%+=:,./-]+", plain) else f'"{plain}"'


def _escaped(text: str) -> str:
    if any(ord(character) < 32 for character in text):
        raise UserError(f"{text!r} cannot stand in a systemd unit; rename it so that it has no control characters.")
    return text.replace("%", "%%")


def login(is_system: bool, user: str | None) -> str | None:
    """Whose service it is: None for that of the person who installs it. Raises UserError."""
    if user and not is_system:
        raise UserError(f"--user is {user!r}, but only a --system service runs under another login; add --system.")
    return (user or LOGIN) if is_system else None


def target(is_system: bool) -> str:
    """What pulls the service in when the machine, or the user's manager, starts."""
    return "multi-user.target" if is_system else "default.target"


def unit_file(name: str, is_system: bool, env: Mapping[str, str]) -> Path:
    """Where the unit lies: with the system's, or with those of this user. env: the environment."""
    folder = Path(env.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"
    return (SYSTEM_FOLDER if is_system else folder) / f"{name}.service"


def install(service: Service, env: Mapping[str, str], *, force: bool) -> str:
    """Write the unit; returns what to tell the person. Raises UserError where somebody's work would be lost."""
    if sys.platform != "linux":
        raise UserError(
            f"this system is {sys.platform}; services of systemd need Linux. Start the program another way."
        )
    file, text = unit_file(service.name, service.user is not None, env), service.text()
    try:
        before = file.read_text(encoding="utf-8") if file.exists() else None
        if before not in (None, text) and not force:
            _check_ours(file, before or "", "give --force to replace it")
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f".{file.name}.new")
        new.write_text(text, encoding="utf-8")
        new.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}. {_WHO}") from error
    done = {None: "wrote", text: "unchanged:"}.get(before, "wrote again")
    return "\n".join((f"{done} {file}", "", *_next_steps(service)))


def uninstall(name: str, is_system: bool, env: Mapping[str, str], *, force: bool) -> str:
    """Remove a unit and the links that start it; returns what to tell the person. Raises UserError."""
    _check_name("--name", name)  # it becomes a path, and a pattern of paths
    file = unit_file(name, is_system, env)
    links = sorted(link for link in file.parent.glob(f"*.wants/{file.name}") if link.is_symlink())
    if not file.exists() and not links:
        raise UserError(f"there is no {file}; look at --name and --system.")
    try:
        if file.exists():
            if not force:
                _check_ours(file, file.read_text(encoding="utf-8"), "give --force to remove it")
            links.append(file)
        for one in links:
            one.unlink()
    except OSError as error:
        raise UserError(f"{file} cannot be removed: {error.strerror}. {_WHO}") from error
    run = _systemctl(is_system)
    return "\n".join((*(f"removed {one}" for one in links), "", f"{run} stop {name}", f"{run} daemon-reload"))


_WHO = "A system service needs root (sudo), a user's own does not."


def _systemctl(is_system: bool) -> str:
    return "sudo systemctl" if is_system else "systemctl --user"


def _next_steps(service: Service) -> list[str]:
    """The commands that start it. They are left to the person: what runs here is the owner's decision."""
    is_system = service.user is not None
    run = _systemctl(is_system)
    steps = [f"{run} daemon-reload", f"{run} enable --now {service.name}"]
    if is_system:
        login = f"sudo useradd --system --home-dir /var/lib/kseed --shell /usr/sbin/nologin {service.user}"
        steps.insert(0, f"id {service.user} || {login}")
        steps.append(f"journalctl -u {service.name} -f")
        needed = ", ".join(dict.fromkeys(map(str, service.reads)))
        return ["Now run:", *steps, "", f"{service.user} must be able to read {needed}."]
    return ["Now run:", *steps, "loginctl enable-linger   # it then also runs while you are logged out"]


def _check_ours(file: Path, text: str, advice: str) -> None:
    mark = _MARK.match(text)
    if mark is None:
        raise UserError(f"{file} was not written by kseed; choose another --name, or {advice}.")
    if mark[1] != hashlib.sha256(text[mark.end() :].encode()).hexdigest():
        raise UserError(
            f"{file} has been changed since kseed wrote it; move the changes to {file.name}.d/own.conf beside it, "
            f"which stays, or {advice}."
        )
