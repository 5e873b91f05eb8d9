"""A running gateway's methods for other processes of its machine, over a unix socket.

Flower starts a short-lived ClientApp process for every message, and an operator's commands are
processes of their own: both speak to the gateway here. The socket (0600, in a folder of 0700) is
for the gateway's own user; callers also show a key that only this user can read, and check that
the socket is theirs. Calls are JSON; a round's tensors follow as safetensors, in pieces.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from sottovoce.client.errors import RunError, SottovoceError
from sottovoce.server.gateway.control_messages import (
    order_pieces,
    read_order,
    read_result,
    result_pieces,
)
from sottovoce.server.gateway.orders import Member, RoundOrder, RoundResult

if TYPE_CHECKING:
    from sottovoce.server.gateway.gateway import Gateway

SERVICE = "sottovoce.gateway.v1.Control"
KEY = "key-bin"
LONGEST_SOCKET = 100  # bytes; the kernel takes 107
METHODS = ("announce", "roster", "finish", "status", "tokens", "revoke", "note_privacy", "devices")
OPTIONS = [("grpc.max_receive_message_length", 64 * 2**20), ("grpc.enable_http_proxy", 0)]


class ControlServer:
    """The gateway's side of the socket. Runs in the gateway's event loop."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self._key = secrets.token_bytes(32)
        self._server: grpc.aio.Server | None = None
        self._address_file = gateway.folder / "control.json"
        self._socket = Path()

    async def open(self) -> None:
        """Listen, and write down where. RunError where that cannot be."""
        unary, stream = (
            grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler,
        )  # fmt: skip
        handler = grpc.method_handlers_generic_handler(
            SERVICE, {"Call": unary(self._call), "Train": stream(self._train)}
        )
        self._socket = _socket_path(self.gateway.folder)
        self._socket.unlink(missing_ok=True)
        self._server = grpc.aio.server(handlers=[handler], options=OPTIONS)
        try:
            self._server.add_insecure_port(f"unix:{self._socket}")
        except RuntimeError as error:
            raise RunError(f"the control socket {self._socket} cannot be made") from error
        await self._server.start()
        os.chmod(self._socket, 0o600)
        found = {"socket": str(self._socket), "key": self._key.hex(), "pid": os.getpid()}
        _write_private(self._address_file, json.dumps(found))

    async def close(self) -> None:
        """Stop listening; running calls are broken off."""
        if self._server is not None:
            await self._server.stop(0.5)  # a broken-off round is still said to who asked for it
        for path in (self._address_file, self._socket):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        if self.gateway.folder.resolve() not in self._socket.parents:
            with suppress(OSError):  # the temporary folder that `_socket_path` made
                self._socket.parent.rmdir()

    async def _call(self, request: bytes, context: Any) -> bytes:
        await self._check(context)
        call = json.loads(request)
        if call["method"] not in METHODS:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"no method {call['method']}")
        try:
            method = getattr(self.gateway, call["method"])
            found = await asyncio.to_thread(method, *call["arguments"])
        except SottovoceError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return json.dumps(_plain(found)).encode()

    async def _train(self, pieces: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await self._check(context)
        received = [piece async for piece in pieces]
        try:
            result = await self.gateway._open.desk.train(read_order(received))
        except SottovoceError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        for piece in result_pieces(result):
            yield piece

    async def _check(self, context: Any) -> None:
        shown = dict(context.invocation_metadata() or ()).get(KEY, b"")
        if not isinstance(shown, bytes) or not hmac.compare_digest(shown, self._key):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "not the key of this gateway")


class GatewayClient:
    """The gateway that serves `folder`, from another process; methods as those of `Gateway`.

    RunError where none serves it, where it is another user's, and for what the gateway refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            found = json.loads((self.folder / "control.json").read_text("utf-8"))
            socket, self._key = str(found["socket"]), bytes.fromhex(found["key"])
            owner = os.stat(socket).st_uid
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"no gateway serves {self.folder}: start it with sottovoce serve") from (
                error
            )
        if owner not in (os.getuid(), 0):
            raise RunError(f"the gateway of {self.folder} is run by another user, number {owner}")
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=OPTIONS)

    def __enter__(self) -> GatewayClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the socket."""
        self._channel.close()

    @property
    def address(self) -> str:
        """HOST:PORT for devices."""
        return str(self.status()["address"])

    def announce(self, run: str) -> None:
        """As `Gateway.announce`."""
        self._call("announce", run)

    def roster(self, run: str) -> list[Member]:
        """As `Gateway.roster`."""
        return [Member(**member) for member in self._call("roster", run)]

    def train(self, order: RoundOrder) -> RoundResult:
        """As `Gateway.train`. If this process ends, so does the round."""
        call = self._channel.stream_stream(f"/{SERVICE}/Train")
        with _said_plainly(self.folder):
            return read_result(list(call(order_pieces(order), metadata=self._metadata)))
        raise AssertionError("unreachable")

    def finish(self, run: str) -> None:
        """As `Gateway.finish`."""
        self._call("finish", run)

    def status(self) -> dict[str, Any]:
        """As `Gateway.status`."""
        found: dict[str, Any] = self._call("status")
        return found

    def tokens(self, number: int = 1, lifetime_s: float = 86400.0) -> list[str]:
        """As `Gateway.tokens`."""
        return [str(token) for token in self._call("tokens", number, lifetime_s)]

    def revoke(self, device: int) -> bool:
        """As `Gateway.revoke`."""
        return bool(self._call("revoke", device))

    def devices(self) -> list[dict[str, Any]]:
        """As `Gateway.devices`, each a mapping."""
        return list(self._call("devices"))

    def note_privacy(self, unit: str, spent: float, budget: float | None) -> None:
        """As `Gateway.note_privacy`."""
        self._call("note_privacy", unit, spent, budget)

    @property
    def _metadata(self) -> tuple[tuple[str, bytes], ...]:
        return ((KEY, self._key),)

    def _call(self, method: str, *arguments: object) -> Any:
        request = json.dumps({"method": method, "arguments": arguments}).encode()
        with _said_plainly(self.folder):
            return json.loads(
                self._channel.unary_unary(f"/{SERVICE}/Call")(request, metadata=self._metadata)
            )


@contextmanager
def _said_plainly(folder: Path) -> Iterator[None]:
    """Errors of a call as the gateway worded them."""
    try:
        yield
    except grpc.RpcError as error:
        code = error.code()
        if code == grpc.StatusCode.FAILED_PRECONDITION:
            raise RunError(error.details()) from None
        raise RunError(f"the gateway of {folder} does not answer ({code.name})") from error


def _plain(found: Any) -> Any:
    """Values of this package as JSON has them."""
    if isinstance(found, list):
        return [_plain(item) for item in found]
    return asdict(found) if is_dataclass(found) and not isinstance(found, type) else found


def _socket_path(folder: Path) -> Path:
    """In `folder`, or in a private temporary folder where that path is too long for a socket."""
    private = folder.resolve() / "control"
    private.mkdir(mode=0o700, exist_ok=True)
    path = private / "socket"
    if len(os.fsencode(path)) <= LONGEST_SOCKET:
        return path
    return Path(tempfile.mkdtemp(prefix="sottovoce-")) / "socket"


def _write_private(path: Path, text: str) -> None:
    """The whole file or none of it, for this user alone."""
    partial = path.with_name(path.name + ".new")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    os.replace(partial, path)
