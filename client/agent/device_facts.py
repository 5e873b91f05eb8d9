"""What `sottovoce device list` shows: counts, participations, epsilon; never an example's word."""

from __future__ import annotations

import math
import time
from contextlib import closing
from typing import Any

from sottovoce.client.agent.journal import Journal
from sottovoce.client.agent.logs import plain
from sottovoce.client.agent.policy import Policy
from sottovoce.client.agent.spending import epsilon_spent
from sottovoce.client.agent.store import DeviceStore

LATEST = 20
"""Participations that are shown one by one."""


def facts(store: DeviceStore) -> dict[str, Any]:
    """What a device holds and took part in. `epsilon`: None where it is infinite."""
    policy = Policy.load(store.folder)
    with closing(Journal(store.folder)) as journal:
        span, costs = store.span(), journal.costs()
        spent = epsilon_spent(costs, policy.delta)
        return {
            "store": str(store.folder),
            "examples": store.count(),
            "oldest": span and span[0],
            "newest": span and span[1],
            "participations": sum(count for _, count in costs),
            "epsilon": spent if math.isfinite(spent) else None,
            "delta": policy.delta,
            "max_epsilon": policy.max_epsilon,
            "latest": [
                {
                    "run": line.run, "round": line.round, "begun": line.begun, "state": line.state,
                    "noise_multiplier": line.cost.noise_multiplier,
                    "sampling_rate": line.cost.sampling_rate, "steps": line.cost.steps,
                }
                for line in journal.participations(LATEST)
            ],
        }


def listing(facts: dict[str, Any]) -> str:
    """The same as lines for a person."""
    lines = [f"{examples(facts['examples'])} in {facts['store']}"]
    if facts["oldest"] is not None:
        lines[0] += f", from {day(facts['oldest'])} to {day(facts['newest'])}"
    spent = "infinite: some had no noise" if facts["epsilon"] is None else f"{facts['epsilon']:.3g}"
    budget = "no max_epsilon" if facts["max_epsilon"] is None else f"of {facts['max_epsilon']:g}"
    taken = facts["participations"]
    lines.append(f"{taken} participation{'s' * (taken != 1)}")
    lines.append(
        f"epsilon of each example {spent} ({budget}), delta {facts['delta']:g}, add/remove of an "
        "example, against whoever sees this device's updates"
    )
    if facts["latest"]:
        lines += ["", f"{'began':16}  {'run':24}  round  {'noise':>6}  {'rate':>8}  steps  state"]
    for line in facts["latest"]:
        noise = "none" if line["noise_multiplier"] is None else f"{line['noise_multiplier']:.4g}"
        run = plain(line["run"])[:24]
        lines.append(
            f"{_minute(line['begun']):16}  {run:24}  {line['round']:>5}  {noise:>6}  "
            f"{line['sampling_rate']:>8.4g}  {line['steps']:>5}  {line['state']}"
        )
    return "\n".join(lines)


def day(seconds: float) -> str:
    """A day of local time."""
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _minute(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def examples(number: int) -> str:
    """A number of them, in words."""
    return f"{number} example{'s' * (number != 1)}"
