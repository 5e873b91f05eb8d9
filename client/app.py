"""The Flower ClientApp: a node trains the fleet behind it.

The same app serves the in-process grid, Flower's simulation and SuperNodes. Which fleet stands
behind a node follows from its own configuration (`gateway`: real devices) and from the run's
settings, which every request carries.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sottovoce.client.fleet import Fleet
from sottovoce.client.messages import (
    read_clip_norm,
    read_levels,
    read_members,
    read_roster_query,
    read_train_content,
    reply_content,
    roster_content,
)

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the asked devices of this node's fleet and reply with their sum."""
    parameters, devices, server_round, settings = read_train_content(message.content)
    fleet = fleet_of(settings, context)
    fleet.set_clip_norm(read_clip_norm(message.content))
    members = read_members(message.content)
    if members is not None:
        fleet.call(devices, members)
    reply = fleet.train(parameters, devices, server_round, read_levels(message.content))
    return Message(reply_content(reply), reply_to=message)


@app.query()
def roster(message: Message, context: Context) -> Message:
    """Say which devices of this node's gateway are there for a run."""
    from sottovoce.server.gateway.live_fleet import gateway_of

    gateway = gateway_of(context.node_config)
    name, members, levels = gateway.roster(read_roster_query(message.content))
    return Message(roster_content(name, members, levels), reply_to=message)


def fleet_of(settings: str, context: Context) -> Fleet:
    """The fleet behind a node; built once per process and run."""
    if "gateway" in context.node_config:
        from sottovoce.server.gateway.live_fleet import live_fleet

        return live_fleet(settings, str(context.node_config["gateway"]))
    from sottovoce.simulations.experiment import simulated_fleet

    return simulated_fleet(settings, context.node_config, context.run_id)
