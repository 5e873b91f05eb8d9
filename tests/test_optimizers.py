"""Server optimisers are torch's own on the negative mean update."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sottovoce.client.errors import ConfigError
from sottovoce.server.checkpoints import RunState, load_checkpoint, save_checkpoint
from sottovoce.strategies.optimizers import FedAdam, FedAvg, ServerOptimizer, make_server_optimizer

Tensors = dict[str, Tensor]
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": ()}
rates = st.floats(1e-4, 2.0)
decays = st.floats(0.0, 0.99)


def tensors(seed: int, scale: float = 1.0) -> Tensors:
    generator = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(np.asarray(generator.normal(0, scale, shape), dtype=np.float32))
        for name, shape in SHAPES.items()
    }


def moved(optimizer: ServerOptimizer, rounds: int = 6) -> Tensors:
    parameters = tensors(0)
    for number in range(rounds):
        parameters = optimizer.step(parameters, update(number))
    return parameters


def update(number: int) -> Tensors:
    return tensors(100 + number, scale=10.0 ** -(number % 4))


def torch_moved(kind: type[torch.optim.Optimizer], rounds: int = 6, **settings: object) -> Tensors:
    parameters = {name: tensor.requires_grad_() for name, tensor in tensors(0).items()}
    optimizer = kind(parameters.values(), **settings)  # type: ignore[call-arg]
    for number in range(rounds):
        for name, tensor in update(number).items():
            parameters[name].grad = -tensor
        optimizer.step()
    return parameters


def assert_close(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name].detach(), rtol=2e-5, atol=2e-6)


@given(rate=rates)
def test_fedavg_is_sgd_on_the_negative_update(rate: float) -> None:
    assert_close(moved(FedAvg(rate)), torch_moved(torch.optim.SGD, lr=rate))


@given(rate=rates, beta1=decays, beta2=decays, tau=st.floats(1e-6, 0.1))
def test_fedadam_is_adam_on_the_negative_update(
    rate: float, beta1: float, beta2: float, tau: float
) -> None:
    ours = moved(FedAdam(rate, beta1, beta2, tau))
    assert_close(ours, torch_moved(torch.optim.Adam, lr=rate, betas=(beta1, beta2), eps=tau))


def test_fedavg_at_rate_1_adds_the_mean_update() -> None:
    parameters, delta = tensors(0), update(3)
    after = FedAvg().step(parameters, delta)
    assert_close(after, {name: parameters[name] + delta[name] for name in parameters})


def test_the_first_step_of_fedadam_has_the_learning_rate_in_every_coordinate() -> None:
    """Bias correction makes both moments exact after one step, whatever the decays."""
    optimizer, parameters = FedAdam(0.25, 0.9, 0.99, tau=1e-12), tensors(0)
    after = optimizer.step(parameters, update(0))
    for name, tensor in after.items():
        step = (tensor - parameters[name]) * update(0)[name].sign()
        torch.testing.assert_close(step, torch.full_like(step, 0.25))


def test_tau_bounds_how_far_a_quiet_coordinate_moves() -> None:
    optimizer, parameters = FedAdam(1.0, 0.0, 0.0, tau=0.1), {"w": torch.zeros(2)}
    after = optimizer.step(parameters, {"w": torch.tensor([1e-3, 10.0])})["w"]
    torch.testing.assert_close(after, torch.tensor([1e-3 / 0.101, 10 / 10.1]))


@pytest.mark.parametrize("make", [lambda: FedAvg(0.5), lambda: FedAdam(0.5, tau=1e-3)])
def test_a_step_changes_neither_parameters_nor_update(make: type[ServerOptimizer]) -> None:
    optimizer, parameters, delta = make(), tensors(0), update(0)
    optimizer.step(parameters, delta)
    assert_close(parameters, tensors(0))
    assert_close(delta, update(0))


@pytest.mark.parametrize("make", [lambda: FedAvg(0.5), lambda: FedAdam(0.5, tau=1e-3)])
def test_state_survives_a_checkpoint_and_is_not_moved_by_later_steps(
    make: type[ServerOptimizer], tmp_path: object
) -> None:
    first = make()
    parameters = tensors(0)
    for number in range(3):
        parameters = first.step(parameters, update(number))
    state = RunState(3, parameters, optimizer=first.state())
    expected = first.step(parameters, update(3))
    saved = save_checkpoint(tmp_path / "c", state, keep=1)  # type: ignore[operator]
    second = make()
    second.load(load_checkpoint(saved).optimizer)
    after = second.step(load_checkpoint(saved).parameters, update(3))
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_optimizers_are_made_by_name() -> None:
    settings = {"learning_rate": 0.5, "beta1": 0.8, "beta2": 0.9, "tau": 0.01}
    assert isinstance(make_server_optimizer("fedavg", **settings), FedAvg)
    adam = make_server_optimizer("fedadam", **settings)
    assert isinstance(adam, FedAdam)
    assert vars(adam) == vars(FedAdam(0.5, 0.8, 0.9, 0.01))
    with pytest.raises(ConfigError, match="fedsgd.*fedavg or fedadam"):
        make_server_optimizer("fedsgd", **settings)
