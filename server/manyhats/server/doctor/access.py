"""TLS and tokens: whether their files can be used, for how long, and who else may change them."""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path

from manyhats.server.access.addresses import is_loopback
from manyhats.server.access.errors import ConfigError
from manyhats.server.access.tls import Condition, Validity, read_identity
from manyhats.server.access.tokens import Role, Scope, read_tokens
from manyhats.server.doctor.finding import Finding, failure, ok, warning
from manyhats.server.lifetime.config import ServeConfig


def look_at_tls(config: ServeConfig, now: datetime | None = None) -> Iterator[Finding]:
    """Whether certificate and key fit, and how many days are left."""
    files = config.tls_files
    if files is None:
        if is_loopback(config.host):
            yield ok("TLS", "off; only this machine can connect")
        else:
            advice = "give --tls-cert and --tls-key, unless a proxy before it does this"
            yield warning("TLS", f"off: anyone between callers and {config.host} can read everything", advice)
        return
    try:
        identity = read_identity(files)
    except ConfigError as error:
        advice = "both must be PEM, the key that of the certificate, and this user allowed to read them"
        yield failure("TLS", str(error), advice)
        return
    for validity in identity.validities:
        yield _days(validity, now or datetime.now(UTC))
    if _is_open(files.key, stat.S_IRWXG | stat.S_IRWXO) and not _is_mounted(files.key):
        yield warning("TLS", f"other users may read {files.key}", f"chmod 600 {files.key}")


def _days(validity: Validity, now: datetime) -> Finding:
    subject, days = "TLS", (validity.ends - now).days
    place = f"--{validity.setting.replace('_', '-')}"
    match validity.condition(now):
        case Condition.EXPIRED:
            return failure(
                subject, f"{place} expired {-days} days ago", "renew it; a running server takes the new one"
            )
        case Condition.NOT_YET_VALID:
            begins = validity.begins.isoformat()
            return failure(subject, f"{place} is valid only from {begins}", "check this machine's clock")
        case Condition.EXPIRES_SOON:
            return warning(
                subject, f"{place} expires in {days} days", "renew it; a running server takes the new one"
            )
    return ok(subject, f"{place}: {days} days left")


def look_at_tokens(config: ServeConfig, tasks: Collection[str] | None) -> Iterator[Finding]:
    """Whether tokens can be read, who may change them, and whether what they are for exists.

    Args:
        config: the settings.
        tasks: those in the store; None if that is not known.
    """
    file = config.token_file
    if file is None:
        if is_loopback(config.host):
            yield ok("tokens", "none; everyone on this machine may do everything")
        else:
            advice = "make one with `manyhats token new`, and give --token-file"
            yield warning("tokens", f"none: whoever reaches {config.host} may do everything", advice)
        return
    try:
        callers = read_tokens(file).callers
    except ConfigError as error:
        yield failure(
            "tokens", str(error), "`manyhats token new` writes such a file; its user must be able to read it"
        )
        return
    if _is_open(file, stat.S_IWGRP | stat.S_IWOTH) and not _is_mounted(file):
        yield warning("tokens", f"other users may add tokens to {file}", f"chmod go-w {file}")
    if not callers:
        yield warning("tokens", f"{file} has none: nobody may call", "make one with `manyhats token new`")
        return
    num_managers = sum(Role.MANAGE in caller.roles for caller in callers)
    yield ok("tokens", f"{len(callers)}, of which {num_managers} may manage adapters")
    for caller in callers if tasks is not None else ():
        idle = [glob for glob in caller.scope.globs or () if not _reaches_any(glob, tasks or ())]
        names = [glob for glob in idle if not set(glob) & set("*?[")]
        patterns = [glob for glob in idle if glob not in names]  # often for tasks to come
        if patterns:
            yield ok("tokens", f"{caller.name} is for {', '.join(patterns)}, which no task is called yet")
        if names:
            yield warning(
                "tokens",
                f"{caller.name} is for {', '.join(names)}, but the store has no such task",
                "register the task, or correct the token file",
            )


def _reaches_any(glob: str, tasks: Collection[str]) -> bool:
    scope = Scope((glob,))
    return any(scope.reaches(task_id) for task_id in ("", *tasks))


def _is_open(file: Path, mode: int) -> bool:
    """Whether others than its owner have one of these rights."""
    return bool(file.stat().st_mode & mode)


def _is_mounted(file: Path) -> bool:
    """Whether it is a Secret's file in Kubernetes, linked by ``..data``: the pod's group may read it."""
    return (file.parent / "..data").is_symlink()
