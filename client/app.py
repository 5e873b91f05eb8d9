"""The Flower ClientApp: a node trains the fleet behind it.

The same app serves the in-process grid, Flower's simulation and SuperNodes; which fleet stands
behind a node follows from the run's settings, which every request carries.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sottovoce.client.fleet import Fleet
from sottovoce.client.messages import (
    read_clip_norm,
    read_levels,
    read_train_content,
    reply_content,
)

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the asked devices of this node's fleet and reply with their sum."""
    parameters, devices, server_round, settings = read_train_content(message.content)
    fleet = fleet_of(settings, context)
    fleet.set_clip_norm(read_clip_norm(message.content))
    reply = fleet.train(parameters, devices, server_round, read_levels(message.content))
    return Message(reply_content(reply), reply_to=message)


def fleet_of(settings: str, context: Context) -> Fleet:
    """The fleet behind a node; built once per process and run."""
    from sottovoce.simulations.experiment import simulated_fleet

    return simulated_fleet(settings, context.node_config, context.run_id)
