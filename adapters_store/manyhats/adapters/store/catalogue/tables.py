"""The catalogue's tables. Columns are what queries use; the rest of a version is one JSON document.

Writers lock the one row of ``catalogue`` first, and hold it until they commit. So they take turns, and generations
become visible in their order.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

SCHEMA_VERSION = 1

METADATA = MetaData()

# One row.
CATALOGUE = Table(
    "manyhats_catalogue",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("schema_version", Integer, nullable=False),
    # Identifies this catalogue.
    Column("catalogue_id", String(32), nullable=False),
    # Counts writes.
    Column("generation", BigInteger, nullable=False),
)

# A task's row outlives its versions, so that a name like "task@3" never refers to other bytes later.
TASKS = Table(
    "manyhats_tasks",
    METADATA,
    Column("task_id", String(63), primary_key=True),
    Column("last_version", Integer, nullable=False),
    Column("active_version", Integer),
    # The generation of the latest write to the task or its versions.
    Column("generation", BigInteger, nullable=False, index=True),
)

VERSIONS = Table(
    "manyhats_versions",
    METADATA,
    Column("task_id", ForeignKey(TASKS.c.task_id), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(71), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    # Why it cannot be served; empty while it can.
    Column("failure", Text, nullable=False),
    Column("details", JSON, nullable=False),
    UniqueConstraint("task_id", "digest"),
)

# What stays in memory: a version, or with number 0 whichever is the active one.
PINS = Table(
    "manyhats_pins",
    METADATA,
    Column("task_id", ForeignKey(TASKS.c.task_id), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
)

# Which artifacts a version needs: their bytes may be removed when no row names them.
ARTIFACTS = Table(
    "manyhats_version_artifacts",
    METADATA,
    Column("task_id", String(63), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(71), primary_key=True, index=True),
    ForeignKeyConstraint(
        ["task_id", "version"], [VERSIONS.c.task_id, VERSIONS.c.version], ondelete="CASCADE"
    ),
)

# The latest answers by request id.
ANSWERS = Table(
    "manyhats_answered_requests",
    METADATA,
    Column("request_id", String(128), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("created", Boolean, nullable=False),
    Column("record", JSON, nullable=False),
    # The generation of the write that gave the answer; the lowest are dropped first.
    Column("generation", BigInteger, nullable=False, unique=True),
)
