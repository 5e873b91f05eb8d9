"""What a device allows: its owner's policy, which no server can talk it out of.

`policy.toml` in the store's folder, every key optional:

    require_example_privacy = true    # train only with noise on the device
    min_noise_multiplier = 0.8        # at least so much of it
    max_epsilon = 8.0                 # for each example, over all that the device ever took part in
    delta = 1e-5                      # at which that epsilon is meant
    require_device_privacy = false    # only runs that claim device-level privacy
    max_clip_norm = 1.0               # only updates that are clipped to this norm
    tasks = ["intent_slots"]          # only these
    max_model_mb = 512
    max_steps = 100000                # of one participation
    max_participations = 1000         # ever
    retention_days = 30               # examples older than this are deleted
    [eligibility]                     # when to take part: sottovoce.client.agent.eligibility
    charging = true

A policy counts from the moment it is read; the journal of what was spent before stays.

*Guarantee*: with `max_epsilon`, all that a device sends is (max_epsilon, delta)-DP for each of its
examples under add/remove, against whoever sees its updates, whatever servers ask for; the
participation that would exceed it is declined, and never depends on the examples.
*Assumes*: the device trains as `StepCost` says, with secret coins and noise of its own; the journal
is whole (`sottovoce.client.agent.journal`).
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sottovoce.client.agent.eligibility import Conditions
from sottovoce.client.agent.journal import StepCost
from sottovoce.client.agent.spending import epsilon_spent
from sottovoce.client.agent.toml_fields import Kinds, checked_fields
from sottovoce.client.errors import ConfigError

if TYPE_CHECKING:
    from sottovoce.client.task_spec import TaskSpec

FILE = "policy.toml"
Complaint = tuple[str, str]
"""One of `sottovoce.client.protocol.REASONS`, and a sentence for the device's log."""


@dataclass(frozen=True)
class Policy:
    """What a device does and does not take part in; see the module. None: no such bound."""

    require_example_privacy: bool = False
    min_noise_multiplier: float = 0.0
    max_epsilon: float | None = None
    delta: float = 1e-5
    require_device_privacy: bool = False
    max_clip_norm: float | None = None
    tasks: tuple[str, ...] | None = None
    max_model_mb: float = 512.0
    max_steps: int = 100_000
    retention_days: float | None = None
    max_participations: int | None = None
    eligibility: Conditions = field(default_factory=Conditions)

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta={self.delta} must be above 0 and below 1: 1e-5 is usual")
        for name in ("min_noise_multiplier", "max_steps", "max_participations", "max_epsilon"):
            _check_least(name, getattr(self, name), 0, open=False)
        for name in ("max_clip_norm", "max_model_mb", "retention_days"):
            _check_least(name, getattr(self, name), 0, open=True)

    @classmethod
    def load(cls, folder: Path) -> Policy:
        """The policy in a store's folder; the defaults where it has no `policy.toml`.

        Raises ConfigError, one line with the file, the key and the remedy.
        """
        path = folder / FILE
        try:
            return cls.from_values(tomllib.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}): check who owns it"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML ({error}): write key = value") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Policy:
        """The policy of parsed TOML."""
        plain = dict(values)
        conditions = plain.pop("eligibility", {})
        if not isinstance(conditions, dict):
            raise ConfigError("eligibility is a table: write [eligibility] and its keys below it")
        fields = checked_fields(plain, _KINDS, "")
        return cls(**fields, eligibility=Conditions.from_values(conditions))

    def complaint(
        self,
        spec: TaskSpec,
        cost: StepCost,
        costs_so_far: Sequence[tuple[StepCost, int]],
        clip_norm: float | None = None,
    ) -> Complaint | None:
        """Why the device declines a task, or None.

        `cost`: of the participation. `costs_so_far`: the journal's. `clip_norm`: what the task sets
        in place of the specification's bound on the update, or None. The device declines for the
        policy first, then for the model's size, then for what was spent.
        """
        return (
            self._about_privacy(spec, cost)
            or self._about_work(spec, cost, clip_norm)
            or self._about_size(spec)
            or self._about_spending(cost, costs_so_far)
        )

    def _about_privacy(self, spec: TaskSpec, cost: StepCost) -> Complaint | None:
        noise, plan = cost.noise_multiplier, spec.training["plan"]
        wants = self.require_example_privacy or self.min_noise_multiplier > 0
        if noise is None and (wants or self.max_epsilon is not None):
            return "policy", "the task has no noise on the device, which the policy asks for"
        if noise is not None and noise < self.min_noise_multiplier:
            return "policy", (
                f"noise_multiplier={noise:g} is below min_noise_multiplier="
                f"{self.min_noise_multiplier:g}"
            )
        if noise is not None and cost.sampling_rate < 1 and plan["poisson"] is not True:
            return "policy", "its batches are not drawn by coins, as its privacy would need"
        if self.require_device_privacy and not _protects_devices(spec.privacy["device"]):
            return "policy", "the run claims no device-level privacy, which the policy asks for"
        return None

    def _about_work(
        self, spec: TaskSpec, cost: StepCost, clip_norm: float | None
    ) -> Complaint | None:
        bound = spec.training["update_clip_norm"] if clip_norm is None else clip_norm
        if self.max_clip_norm is not None and not (bound or math.inf) <= self.max_clip_norm:
            return "policy", f"update_clip_norm={bound} is above {self.max_clip_norm:g}"
        if self.tasks is not None and spec.task["name"] not in self.tasks:
            return "policy", f"task={spec.task['name']} is not among the policy's tasks"
        if cost.steps > self.max_steps:
            return "policy", f"steps={cost.steps} is above max_steps={self.max_steps}"
        return None

    def _about_size(self, spec: TaskSpec) -> Complaint | None:
        size_mb = 4e-6 * sum(math.prod(shape) for _, shape in spec.parameters)
        if size_mb > self.max_model_mb:
            return "memory", f"{size_mb:.1f} MB of parameters: max_model_mb={self.max_model_mb:g}"
        return None

    def _about_spending(
        self, cost: StepCost, costs_so_far: Sequence[tuple[StepCost, int]]
    ) -> Complaint | None:
        taken = sum(count for _, count in costs_so_far)
        if self.max_participations is not None and taken >= self.max_participations:
            return "budget", f"max_participations={self.max_participations} are all taken"
        if self.max_epsilon is None:
            return None
        after = epsilon_spent([*costs_so_far, (cost, 1)], self.delta)
        if not after <= self.max_epsilon:
            return "budget", (
                f"epsilon would be {after:.3g}, above max_epsilon={self.max_epsilon:g} "
                f"at delta={self.delta:g}"
            )
        return None


_KINDS: Kinds = {
    "require_example_privacy": bool, "min_noise_multiplier": float, "max_epsilon": float,
    "delta": float, "require_device_privacy": bool, "max_clip_norm": float, "tasks": list,
    "max_model_mb": float, "max_steps": int, "retention_days": float, "max_participations": int,
}


def _protects_devices(claim: Mapping[str, Any] | None) -> bool:
    """Whether a run's device-level claim has a bound on updates and noise on their sum."""
    return claim is not None and all(
        isinstance(claim.get(name), int | float) and 0 < claim[name] < math.inf
        for name in ("noise_multiplier", "clip_norm")
    )


def _check_least(name: str, value: float | None, least: float, *, open: bool) -> None:
    if value is not None and not (value > least if open else value >= least):
        word = "above" if open else "at least"
        raise ConfigError(f"{name}={value} must be {word} {least:g}: change it or leave it out")
