"""The example tasks, by name."""

from __future__ import annotations

from examples.tasks.captains_log import CAPTAINS_LOG
from examples.tasks.contact_json import CONTACT_JSON
from examples.tasks.intent import INTENT
from examples.tasks.iso_date import ISO_DATE
from examples.tasks.language import LANGUAGE
from examples.tasks.negation import NEGATION
from examples.tasks.past_tense import PAST_TENSE
from examples.tasks.pirate import PIRATE
from examples.tasks.polite import POLITE
from examples.tasks.question import QUESTION
from examples.tasks.sentiment import SENTIMENT
from examples.tasks.spam import SPAM
from examples.tasks.sql import SQL
from examples.tasks.task import ExampleTask
from examples.tasks.topic import TOPIC

TASKS: dict[str, ExampleTask] = {
    task.name: task
    for task in (
        CAPTAINS_LOG,
        CONTACT_JSON,
        INTENT,
        ISO_DATE,
        LANGUAGE,
        NEGATION,
        PAST_TENSE,
        PIRATE,
        POLITE,
        QUESTION,
        SENTIMENT,
        SPAM,
        SQL,
        TOPIC,
    )
}
"""Task id → task."""
