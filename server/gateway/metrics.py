"""What an operator watches, as Prometheus metrics. Counts of the whole gateway, never of a device.

Served as plain HTTP on a port of their own, on loopback unless the operator says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from sottovoce.client.errors import RunError
from sottovoce.server.gateway.orders import RoundResult

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """One gateway's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.connected = self._gauge("devices_connected", "Devices heard of lately")
        self.enrolled = self._gauge("devices_enrolled", "Devices enrolled and not revoked")
        self.sessions = self._gauge("sessions", "Open sessions")
        self.cohort = self._gauge("cohort_asked", "Devices asked in the last round")
        self.in_sum = self._gauge("cohort_accepted", "Devices in the last round's sum")
        self.rounds = self._counter("rounds", "Rounds that ended", "outcome")
        self.updates = self._counter("updates", "Devices of ended rounds", "outcome")
        self.refused = self._counter("refused", "Updates that were not valid", "reason")
        self.declined = self._counter("declined", "Tasks that devices declined", "reason")
        self.receipts = self._counter("receipts", "Answers to uploads", "outcome")
        self.sent_bytes = self._counter("bytes", "Of blobs and updates on the wire", "direction")
        self.denied = self._counter("denied", "Calls turned away", "reason")
        self.round_seconds = Histogram(
            "sottovoce_round_seconds", "From a round's start to its end", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.spent = self._gauge("epsilon_spent", "Epsilon of all releases so far", "unit")
        self.budget = self._gauge("epsilon_budget", "Epsilon at which training stops", "unit")
        self._server: WSGIServer | None = None

    def follow(self, gauge: Gauge, value: Callable[[], float]) -> None:
        """Let `gauge` read `value` whenever it is looked at."""
        gauge.set_function(value)

    def ended(self, result: RoundResult, asked: int, seconds: float) -> None:
        """A round ended with a result."""
        self.rounds.labels("done").inc()
        self.round_seconds.observe(seconds)
        self.cohort.set(asked)
        self.in_sum.set(result.accepted)
        for name in ("accepted", "declined", "late", "silent"):
            self.updates.labels(name).inc(getattr(result, name))
        self.updates.labels("refused").inc(sum(result.refused.values()))
        for reason, count in result.refused.items():
            self.refused.labels(reason).inc(count)

    def note_privacy(self, unit: str, spent: float, budget: float | None) -> None:
        """Epsilon spent and the budget (None: there is none) for a unit, device or example."""
        self.spent.labels(unit).set(spent)
        if budget is not None:
            self.budget.labels(unit).set(budget)

    def serve(self, host: str, port: int) -> int:
        """Serve at `host`; the port. RunError where it is taken."""
        try:
            self._server, _ = start_http_server(port, host, self.registry)
        except OSError as error:
            raise RunError(
                f"metrics_port={port} on {host} cannot be used ({error.strerror or error}): choose "
                "another one"
            ) from error
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"sottovoce_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sottovoce_{name}", text, labels, registry=self.registry)
