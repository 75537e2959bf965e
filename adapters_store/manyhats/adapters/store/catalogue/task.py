"""One task in the catalogue, and what can happen to it: pure functions from one state to the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from manyhats.adapters.artifact import AdapterRecord, AdapterState
from manyhats.adapters.errors import DataLossError, NoActiveVersionError, TaskNotFoundError
from manyhats.adapters.taskid import TaskName

PINNED_NAME = 0
"""Among the pins of a task: whichever version its name refers to."""

_NO_VERSIONS: Mapping[int, AdapterRecord] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class CataloguedTask:
    """A task and its versions.

    Attributes:
        task_id: the name callers use.
        generation: of the catalogue's latest write to it; 0 for a task that never existed.
        last_version: the highest version it ever had.
        active_version: the one the task's name refers to, or None.
        versions: by number, oldest first.
        pins: the versions that stay in memory, and maybe ``PINNED_NAME``.
    """

    task_id: str
    generation: int = 0
    last_version: int = 0
    active_version: int | None = None
    versions: Mapping[int, AdapterRecord] = field(default_factory=lambda: _NO_VERSIONS)
    pins: frozenset[int] = frozenset()

    def find(self, name: TaskName) -> AdapterRecord:
        """The version a name refers to: the one it gives, or the active one.

        Raises:
            TaskNotFoundError: the task has no versions, or lacks this one.
            NoActiveVersionError: the name gives no version and none is active.
        """
        self.require_versions()
        version = self.active_version if name.version is None else name.version
        if version is None:
            raise NoActiveVersionError(self.task_id, "none of its versions is active")
        if version not in self.versions:
            raise TaskNotFoundError(str(name), "no such version")
        return self.versions[version]

    def require_versions(self) -> tuple[AdapterRecord, ...]:
        """All versions, oldest first.

        Raises:
            TaskNotFoundError: it has none.
        """
        if not self.versions:
            raise TaskNotFoundError(self.task_id, "no such task")
        return tuple(self.versions.values())

    def find_digest(self, digest: str) -> AdapterRecord | None:
        """The version that has a digest."""
        return next((record for record in self.versions.values() if record.digest == digest), None)

    def added(self, record: AdapterRecord) -> CataloguedTask:
        """With one more version, at the end."""
        version = self.last_version + 1
        added = replace(record, version=version, state=AdapterState.INACTIVE, state_reason="")
        return replace(self, last_version=version, versions=self._with(added))

    def reregistered(self, version: int, record: AdapterRecord) -> CataloguedTask:
        """With a version that was registered again: no longer failed, and for the base of ``record`` too."""
        bases = dict.fromkeys((*self.versions[version].registered_for, *record.registered_for))
        again = replace(self.versions[version], registered_for=tuple(bases))
        return replace(self, versions=self._with(again)).with_failure(version, "")

    def activated(self, version: int) -> CataloguedTask:
        """With the active version changed.

        Raises:
            TaskNotFoundError: there is no such version.
            DataLossError: it has failed.
        """
        record = self.find(TaskName(self.task_id, version))
        if record.state is AdapterState.FAILED:
            raise DataLossError(record.name, f"cannot be activated: {record.state_reason}")
        return replace(self, active_version=version).with_states()

    def with_failure(self, version: int, reason: str) -> CataloguedTask:
        """With a version FAILED for a reason; or, with an empty reason, not failed.

        Raises:
            TaskNotFoundError: there is no such version.
        """
        record = self.find(TaskName(self.task_id, version))
        return replace(self, versions=self._with(replace(record, state_reason=reason))).with_states()

    def pinned(self, name: TaskName) -> CataloguedTask:
        """With a version kept in memory; or, if the name gives none, whichever is active.

        Raises:
            TaskNotFoundError, NoActiveVersionError: the name refers to no version.
        """
        self.find(name)
        return replace(self, pins=self.pins | {name.version or PINNED_NAME}).with_states()

    def unpinned(self, name: TaskName) -> CataloguedTask:
        """With a version not kept in memory for its own sake; or, if the name gives none, with none at all.

        Raises:
            TaskNotFoundError, NoActiveVersionError: the name refers to no version.
        """
        self.find(name)
        pins = frozenset[int]() if name.version is None else self.pins - {name.version}
        return replace(self, pins=pins).with_states()

    def without(self, versions: Collection[int]) -> CataloguedTask:
        """Without some versions."""
        kept = {version: record for version, record in self.versions.items() if version not in versions}
        active = None if self.active_version in versions else self.active_version
        pins = self.pins - set(versions) if kept else frozenset[int]()
        return replace(self, active_version=active, versions=MappingProxyType(kept), pins=pins)

    def _with(self, record: AdapterRecord) -> Mapping[int, AdapterRecord]:
        return MappingProxyType({**self.versions, record.version: record})

    def with_states(self) -> CataloguedTask:
        """With states and pins of versions that follow from the task's own; a failed one stays failed."""
        stated = {version: self._stated(record) for version, record in self.versions.items()}
        return replace(self, versions=MappingProxyType(stated))

    def _stated(self, record: AdapterRecord) -> AdapterRecord:
        state = version_state(record.version, self.active_version, record.state_reason)
        is_active = record.version == self.active_version
        is_pinned = record.version in self.pins or (is_active and PINNED_NAME in self.pins)
        if (record.state, record.is_pinned) == (state, is_pinned):
            return record
        return replace(record, state=state, is_pinned=is_pinned)


def version_state(version: int, active_version: int | None, failure: str) -> AdapterState:
    """A version's state: FAILED if it has a failure, else ACTIVE if it is the active one."""
    if failure:
        return AdapterState.FAILED
    return AdapterState.ACTIVE if version == active_version else AdapterState.INACTIVE
