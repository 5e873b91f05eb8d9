"""Which models are bags of words: by what their forward does, and not by their class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bag_fleets import AUTOMATIC, CLIPPED, NOISED, Bag, Sayings, task_of, training_of
from live_devices import spec_of
from torch import Tensor, nn

from sottovoce.client import bag_trainer
from sottovoce.client.bag_models import BagModel, bag_model
from sottovoce.client.bag_trainer import make_bag_trainer
from sottovoce.client.examples import Schema
from sottovoce.client.fleet import DeviceOptimizer, ExampleClipping, LocalTraining
from sottovoce.client.models import make_model
from sottovoce.client.tables import sparse_table
from sottovoce.client.task_spec import TaskSpec
from sottovoce.client.tasks import Batch, IntentSlots, Logits, NextWord, Task
from sottovoce.client.vocabulary import HashVocabulary

PLAIN = training_of(None)
TASK = task_of(Sayings())


def test_a_bag_is_known_for_what_it_is() -> None:
    assert bag_model(Bag((9, 8)), TASK, PLAIN) == BagModel(
        "emb.weight", 0, True, tuple((f"linear.{n}.weight", f"linear.{n}.bias") for n in range(3))
    )
    assert bag_model(Bag((), "sum", None, bias=False), TASK, PLAIN) == BagModel(
        "emb.weight", None, False, (("linear.0.weight", None),)
    )


@pytest.mark.parametrize("sizes", [{}, {"layers": 0}, {"layers": 2, "hidden_size": 7}])
def test_the_models_own_bag_is_one(sizes: dict[str, int]) -> None:
    model = make_model("bag", TASK, generator=torch.Generator().manual_seed(1), **sizes)
    found = bag_model(model, TASK, training_of(NOISED))
    assert found is not None and found.table == "embedding.weight" and found.padding == 0
    assert len(found.layers) == sizes.get("layers", 1) + 1


def with_forward(forward: Callable[[Any, Batch], Logits]) -> Bag:
    return type("Other", (Bag,), {"forward": forward})()


def hidden(model: Any, tokens: Tensor) -> Tensor:
    return model.linear[0](model.emb(tokens))


SAME: dict[str, Callable[[Any, Batch], Logits]] = {
    "relu as a method": lambda m, b: {"intent": m.linear[1](hidden(m, b["tokens"]).relu())},
    "relu of torch": lambda m, b: {"intent": m.linear[1](torch.relu(hidden(m, b["tokens"])))},
    "in place": lambda m, b: {"intent": m.linear[1](F.relu(hidden(m, b["tokens"]), inplace=True))},
}
OTHER: dict[str, Callable[[Any, Batch], Logits]] = {
    "no relu": lambda m, b: {"intent": m.linear[1](hidden(m, b["tokens"]))},
    "twice": lambda m, b: {"intent": 2 * m.linear[1](F.relu(hidden(m, b["tokens"])))},
    "gelu": lambda m, b: {"intent": m.linear[1](F.gelu(hidden(m, b["tokens"])))},
    "relu last": lambda m, b: {"intent": F.relu(m.linear[1](F.relu(hidden(m, b["tokens"]))))},
    "residual": lambda m, b: {
        "intent": m.linear[1](F.relu(hidden(m, b["tokens"])) + hidden(m, b["tokens"]))
    },
    "shifted words": lambda m, b: {"intent": m.linear[1](F.relu(hidden(m, b["tokens"] + 1)))},
    "some words": lambda m, b: {"intent": m.linear[1](F.relu(hidden(m, b["tokens"][:, :2])))},
    "looks at lengths": lambda m, b: {
        "intent": m.linear[1](F.relu(hidden(m, b["tokens"]))) * b["lengths"].unsqueeze(1)
    },
    "looks at values": lambda m, b: {
        "intent": m.linear[1](F.relu(hidden(m, b["tokens"])) if b["lengths"].max() > 3 else 0)
    },
    "weights of words": lambda m, b: {
        "intent": m.linear[1](F.relu(m.linear[0](m.emb(
            b["tokens"], per_sample_weights=torch.ones(b["tokens"].shape)))))
    },
    "one output more": lambda m, b: (lambda y: {"intent": y, "more": y})(
        m.linear[1](F.relu(hidden(m, b["tokens"])))),
    "a detour": lambda m, b: (lambda y: {"intent": y if y is None else m.linear[1](y)})(
        F.relu(hidden(m, b["intent"].unsqueeze(1)))),
    "a layer unused": lambda m, b: {"intent": m.linear[0](m.emb(b["tokens"]))[:, :5]},
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_function_in_other_words_is_a_bag(name: str) -> None:
    assert bag_model(with_forward(SAME[name]), TASK, PLAIN) is not None


@pytest.mark.parametrize("name", OTHER)
def test_another_function_is_none(name: str) -> None:
    assert bag_model(with_forward(OTHER[name]), TASK, PLAIN) is None


def changed(change: Callable[[Any], object]) -> Bag:
    model = Bag((6, 6))
    change(model)
    return model


def tie(model: Any) -> None:
    model.linear[1].weight = model.linear[0].weight


class Louder(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


MODELS: dict[str, Callable[[Any], object]] = {
    "frozen": lambda m: m.linear[0].weight.requires_grad_(False),
    "shared": tie,
    "double": lambda m: m.double(),
    "hooked": lambda m: m.linear[0].register_forward_hook(lambda *call: 2 * call[2]),
    "patched": lambda m: setattr(m.linear[0], "forward", lambda x: x),
    "patched as a whole": lambda m: setattr(m, "forward", lambda batch: None),
    "subclassed": lambda m: m.linear.__setitem__(0, Louder(6, 6)),
    "one more parameter": lambda m: setattr(m, "scale", nn.Parameter(torch.ones(1))),
    "by frequency": lambda m: setattr(m.emb, "scale_grad_by_freq", True),
    "cut norms": lambda m: setattr(m.emb, "max_norm", 1.0),
    "largest": lambda m: setattr(m.emb, "mode", "max"),
    "padding elsewhere": lambda m: setattr(m.emb, "padding_idx", 7),
    "no table to cut": lambda m: setattr(m, "sparse_inputs", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_made_otherwise_is_none(name: str) -> None:
    assert bag_model(changed(MODELS[name]), TASK, PLAIN) is None


def test_a_table_whose_padding_would_be_renumbered_is_not_cut() -> None:
    assert sparse_table(Bag(padding=0), PLAIN) == ("emb.weight", "tokens")
    assert sparse_table(Bag(padding=7), PLAIN) == (None, None)


class TwiceTheLoss(IntentSlots):
    def row_losses(self, logits: Logits, batch: Batch) -> Tensor:
        return 2 * super().row_losses(logits, batch)


def task(kind: type[Task], slots: tuple[str, ...] = ()) -> Task:
    return kind(HashVocabulary(40), Schema(("a", "b"), slots), [], max_length=7)


@pytest.mark.parametrize("other", [task(IntentSlots, ("O", "B-x")), task(TwiceTheLoss),
                                   task(NextWord)])
def test_another_task_is_not_trained_so(other: Task) -> None:
    assert bag_model(Bag(), other, PLAIN) is None


def test_training_is_plain_sgd_with_thresholds_that_stand_still() -> None:
    def of(example: ExampleClipping | None, **optimizer: Any) -> LocalTraining:
        return LocalTraining(0.5, PLAIN.plan, example, None, DeviceOptimizer(**optimizer))

    for example in (None, CLIPPED, NOISED, AUTOMATIC):
        assert bag_model(Bag(), TASK, of(example)) is not None
    for optimizer in ({"name": "adam"}, {"momentum": 0.5}, {"proximal": 0.1},
                      {"weight_decay": 0.1}):
        assert bag_model(Bag(), TASK, of(None, **optimizer)) is None
    for example in (ExampleClipping(1.0, 1.0, threshold="quantile"),
                    ExampleClipping(1.0, 1.0, threshold="layer_wise"),
                    ExampleClipping(1.0, 1.0, mode="micro_batch")):
        assert bag_model(Bag(), TASK, of(example)) is None


def test_a_kernel_that_does_not_agree_with_autograd_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kernel_level: Any
) -> None:
    assert make_bag_trainer(Bag(), TASK, PLAIN) is not None
    wrong = BagModel("emb.weight", 0, False, (("linear.0.weight", "linear.0.bias"),
                                              ("linear.1.weight", "linear.1.bias")))
    monkeypatch.setattr(bag_trainer, "bag_model", lambda *parts: wrong)  # a sum, not a mean
    assert make_bag_trainer(Bag(), TASK, PLAIN) is None


@pytest.mark.parametrize("layers", [0, 1])
def test_a_devices_specification_can_say_bag(layers: int) -> None:
    sizes = {"embedding_size": 6, "hidden_size": 5, "layers": layers}
    model = make_model("bag", TASK, generator=torch.Generator().manual_seed(1), **sizes)
    read = TaskSpec.from_bytes(spec_of(TASK, model, "bag", sizes, PLAIN).to_bytes())
    built = read.build_model(task=TASK)
    assert [p.shape for p in built.parameters()] == [p.shape for p in model.parameters()]


def test_the_benchmarks_own_form_of_a_bag_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from simulation_models import FORMS

    peer = SimpleNamespace(emb=nn.Embedding(44, 6), fc1=nn.Linear(6, 7), fc2=nn.Linear(7, 5))
    assert bag_model(FORMS["bag"](peer), TASK, training_of(NOISED)) == BagModel(
        "emb.weight", None, True, (("fc1.weight", "fc1.bias"), ("fc2.weight", "fc2.bias"))
    )
