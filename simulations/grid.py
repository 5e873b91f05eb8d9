"""An in-process implementation of Flower's `Grid`: one process, no sockets, no polling.

The same ServerApp and ClientApp run here as on a SuperLink. A node is a `Context`; a message is
handed to the ClientApp when it is pushed and its reply is kept until it is pulled.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from sottovoce.simulations.flower_private import Run, enter_run, stamp


class LocalGrid(Grid):
    """Nodes of one ClientApp in this process.

    `node_configs`: one mapping per node, as `flower-supernode --node-config` would give it. An
    exception in the ClientApp is not turned into an error reply: it reaches the caller.
    """

    def __init__(
        self, client: ClientApp, run_config: UserConfig, node_configs: list[UserConfig]
    ) -> None:
        self._client = client
        self._run = enter_run(1)
        self._nodes = {
            number: Context(self._run.run_id, number, config, RecordDict(), run_config)
            for number, config in enumerate(node_configs, start=2)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = stamp(message)
            context = self._nodes[message.metadata.dst_node_id]
            self._replies[message_id] = self._client(message, context)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))
