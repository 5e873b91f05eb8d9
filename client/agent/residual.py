"""What coarse encodings lost of a device's updates, added to its next one.

Error feedback: Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847. The residual
r' = u - decode(encode(u)) of an accepted update u joins the device's next update in the run, before
that is cut to the bound S again.

*Guarantee*: the norm of what is encoded is at most S, and encoding shrinks it (`wire.encode`), so a
device's contribution to the sum is at most S under add/remove, whatever the residual. Towards its
examples the residual is post-processing of updates with the device's noise.
*Assumes*: there is no noise of the device's own under a device-level claim: such updates travel as
fp32.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from sottovoce.client.agent.files import remove_unfinished, write_whole
from sottovoce.client.wire import decode, encode

HELD, NEXT = ".residual", ".next"


def compensated(
    update: dict[str, Tensor], residual: dict[str, Tensor], clip_norm: float | None
) -> dict[str, Tensor]:
    """The update plus the residual, cut to norm `clip_norm` (None: not at all), float32."""
    total = {name: tensor + residual.get(name, 0.0) for name, tensor in update.items()}
    if clip_norm is None:
        return total
    norm = math.sqrt(sum(float((t.double() ** 2).sum()) for t in total.values()))
    if norm <= clip_norm:
        return total
    factor = clip_norm / norm * (1 - 1e-6)  # float32 may round up, by less than that
    return {name: tensor * factor for name, tensor in total.items()}


def lost(update: dict[str, Tensor], encoding: str) -> dict[str, Tensor]:
    """What encoding an update loses."""
    return {
        name: tensor - decode(encode(tensor, encoding), encoding, tensor.shape)
        for name, tensor in update.items()
    }


class Residuals:
    """Residuals in `folder`: one that counts for the last run, one for an update on its way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_unfinished(folder)

    def of(self, run: str, update: dict[str, Tensor]) -> dict[str, Tensor]:
        """The residual of a run, for an update of these names and shapes; empty if there is none.

        Those of other runs are deleted: they are of another model.
        """
        path = self._path(run, HELD)
        for other in self.folder.glob(f"*{HELD}"):
            if other != path:
                other.unlink(missing_ok=True)
        try:
            found = load(path.read_bytes())
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            return {}
        except Exception:  # safetensors has an error class of its own
            return {}
        fits = found.keys() == update.keys() and all(
            found[name].shape == tensor.shape and found[name].dtype == torch.float32
            and bool(found[name].isfinite().all())
            for name, tensor in update.items()
        )  # fmt: skip
        return found if fits else {}

    def prepare(self, task: str, residual: dict[str, Tensor]) -> None:
        """Keep what will be lost once the update of `task` is accepted."""
        for other in self.folder.glob(f"*{NEXT}"):
            other.unlink(missing_ok=True)
        write_whole(self.folder / f"{task}{NEXT}", [save(residual)])

    def settle(self, task: str, run: str, *, accepted: bool) -> None:
        """The update of `task` was accepted, or was not: its residual counts, or does not."""
        path = self.folder / f"{task}{NEXT}"
        if accepted and path.exists():
            path.replace(self._path(run, HELD))
        path.unlink(missing_ok=True)

    def _path(self, run: str, suffix: str) -> Path:
        return self.folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}{suffix}"
