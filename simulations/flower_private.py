"""The few Flower internals that an in-process grid needs, all in one place.

Flower has no public constructor for a run's identity or for a message's id; a test fails when a
new Flower release moves them.
"""

from __future__ import annotations

import uuid

from flwr.app import Message
from flwr.supercore.run import Run as Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1


def enter_run(run_id: int) -> Run:
    """Make this process the server side of run `run_id`, so that it can create messages."""
    TaskIdentity.task_id = run_id
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE
    return Run.create_empty(run_id)


def stamp(message: Message) -> str:
    """Give a message the id that a SuperLink would give it."""
    message_id = uuid.uuid4().hex
    message.metadata.__dict__["_message_id"] = message_id
    return message_id
