"""For loops written for Opacus: `make_private` with its names, returning what it returns.

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = EDPSGD.make_private(
        module=model, optimizer=optimizer, data_loader=loader,
        noise_multiplier=1.0, max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.step(F.cross_entropy(model(x), y, reduction="none"))

One thing differs: losses are per example and go to `step`, in place of `loss.backward()`. Names and
defaults: opacus.PrivacyEngine (Yousefpour et al. 2021, arXiv:2109.12298).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader

from sottovoce.privacy.optimizer.batches import poisson_loader
from sottovoce.privacy.optimizer.draws import Randomness, split
from sottovoce.privacy.optimizer.edp_sgd import EDPSGD

Private = tuple[nn.Module, EDPSGD, DataLoader[Any]]

THRESHOLDS = {"flat": "fixed", "per_layer": "layer_wise", "adaptive": "quantile"}


def make_private(
    *,
    module: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    noise_multiplier: float,
    max_grad_norm: float = 1.0,
    poisson_sampling: bool = True,
    clipping: str = "flat",
    noise_generator: Randomness = None,
    **settings: Any,
) -> Private:
    """(model, optimizer, loader): the tracked model, an `EDPSGD` on it, and a Poisson loader.

    `optimizer`: a torch SGD, Adam or AdamW over all trainable parameters, whose learning rate,
    momentum or betas are taken over; its weight decay becomes decoupled. `data_loader`: its
    dataset, collate function and workers are kept; batches become Poisson samples at rate
    1 / len(data_loader). `clipping`: Opacus' flat, per_layer or adaptive, or this package's
    per_example or micro_batch. `settings`: any further argument of `EDPSGD`.

    *Guarantee*, *Assumes*: those of `EDPSGD`, with Poisson sampling provided by the loader.

    Raises ValueError where a setting has no private equivalent.
    """
    if not poisson_sampling:
        raise ValueError(
            "poisson_sampling=False has no epsilon under add/remove: shuffled batches move up when "
            "an example goes; keep the Poisson loader"
        )
    if clipping in THRESHOLDS:
        settings.setdefault("threshold", THRESHOLDS[clipping])
    else:
        settings["clipping"] = clipping
    loader = poisson_loader(data_loader, split(noise_generator))
    rate = 1 / len(data_loader)
    private = EDPSGD(
        module,
        max_grad_norm=max_grad_norm,
        noise_multiplier=noise_multiplier,
        sampling_rate=rate,
        expected_batch_size=len(data_loader.dataset) * rate,  # type: ignore[arg-type]
        generator=noise_generator,
        **_taken_over(module, optimizer),
        **settings,
    )
    return private.model, private, loader


def make_private_with_epsilon(
    *,
    module: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    target_epsilon: float,
    target_delta: float,
    epochs: int,
    clipping: str = "flat",
    **settings: Any,
) -> Private:
    """`make_private` with the least noise that keeps `epochs` epochs within `target_epsilon`.

    Raises ConfigError where no noise is enough, ValueError for noise=decay, whose steps differ.
    """
    from sottovoce.privacy.accounting.calibration import calibrate_noise

    if settings.get("noise", "constant") != "constant":
        raise ValueError("a target epsilon needs noise=constant: for decay, set noise_multiplier")
    steps = epochs * len(data_loader)
    least = calibrate_noise(target_epsilon, target_delta, 1 / len(data_loader), steps)
    sensitivity = 2 if clipping == "micro_batch" else 1
    return make_private(
        module=module, optimizer=optimizer, data_loader=data_loader, clipping=clipping,
        noise_multiplier=least * sensitivity, **settings,
    )


def _taken_over(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The arguments of `EDPSGD` that a torch optimiser stands for."""
    groups = optimizer.param_groups
    own = {id(p) for group in groups for p in group["params"]}
    missing = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in own]
    if missing:
        raise ValueError(
            f"parameter {missing[0]!r} is trainable, but not in the optimizer: freeze it "
            "(requires_grad_(False)) or give it to the optimizer"
        )
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    if any(other != settings[0] for other in settings):
        raise ValueError("parameter groups with different settings are not supported: use one")
    chosen = settings[0]
    if type(optimizer) not in (SGD, Adam, AdamW):
        raise ValueError(
            f"{type(optimizer).__name__} has no private form: choose SGD, Adam or AdamW of "
            "torch.optim"
        )
    odd = [k for k in ("nesterov", "dampening", "amsgrad", "maximize") if chosen.get(k)]
    if odd:
        raise ValueError(f"{odd[0]}={chosen[odd[0]]} is not supported: switch it off")
    taken = {"lr": float(chosen["lr"]), "weight_decay": chosen["weight_decay"]}
    if isinstance(optimizer, SGD):
        return taken | {"momentum": chosen["momentum"]}
    return taken | {"optimizer": "adam", "betas": chosen["betas"]}
