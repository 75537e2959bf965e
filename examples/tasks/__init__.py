"""The example tasks, by name."""

from __future__ import annotations

from examples.tasks.contact_json import CONTACT_JSON
from examples.tasks.pirate import PIRATE
from examples.tasks.sentiment import SENTIMENT
from examples.tasks.sql import SQL
from examples.tasks.task import ExampleTask

TASKS: dict[str, ExampleTask] = {task.name: task for task in (CONTACT_JSON, PIRATE, SENTIMENT, SQL)}
"""Task id → task."""
