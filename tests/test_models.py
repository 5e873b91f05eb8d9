"""Laws of the models: rows alone, padding nowhere, weights from the generator that was passed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sottovoce.client.errors import ConfigError
from sottovoce.client.examples import Schema
from sottovoce.client.models import MODELS, TextModel, make_model
from sottovoce.client.tasks import Batch, Task, make_task
from sottovoce.client.vocabulary import HashVocabulary

SMALL = {"bilstm": {"embedding_size": 8, "hidden_size": 6, "layers": 2}}
SMALL["lstm"] = SMALL["bilstm"]
SMALL["transformer"] = SMALL["causal_transformer"] = {"hidden_size": 8, "layers": 2, "heads": 2}
SMALL["bag"] = {"embedding_size": 8, "hidden_size": 6, "layers": 2}
LEAVES = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.LSTM)
every_model = pytest.mark.parametrize("name", list(MODELS))


def task_of(name: str) -> Task:
    schema = Schema(("a", "b", "c"), () if name == "bag" else ("O", "B-x", "I-x"))
    return make_task(
        "next_word" if MODELS[name].causal else "intent_slots",
        vocabulary=HashVocabulary(16),
        schema=schema,
        words=[],
        max_length=12,
    )


def small(name: str, seed: int = 0) -> TextModel:
    generator = torch.Generator().manual_seed(seed)
    return make_model(name, task_of(name), generator=generator, **SMALL[name])


def random_batch(lengths: list[int], width: int = 0, seed: int = 1) -> Batch:
    """Random ids and labels, the same in every real position whatever the `width`."""
    draw = torch.Generator().manual_seed(seed)
    count, longest = torch.tensor(lengths), max(lengths)
    tokens = torch.randint(4, 20, (len(lengths), longest), generator=draw)
    slots = torch.randint(0, 3, tokens.shape, generator=draw)
    outside = torch.arange(longest) >= count[:, None]
    extra = (0, max(0, width - longest))
    pad = nn.functional.pad
    return {
        "tokens": pad(tokens.masked_fill(outside, 0), extra, value=0),
        "slots": pad(slots.masked_fill(outside, -100), extra, value=-100),
        "targets": pad(tokens.masked_fill(outside, -100), extra, value=-100),
        "intent": torch.randint(0, 3, (len(lengths),), generator=draw),
        "lengths": count,
    }


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    return {name: values[rows] for name, values in batch.items()}


def assert_same_where_real(a: dict[str, Tensor], b: dict[str, Tensor], lengths: Tensor) -> None:
    for name in a:
        for row, length in enumerate(lengths.tolist()):
            if a[name].dim() == 2:
                torch.testing.assert_close(a[name][row], b[name][row])
            else:
                torch.testing.assert_close(a[name][row, :length], b[name][row, :length])


@every_model
def test_logits_and_losses_do_not_depend_on_padding(name: str) -> None:
    model, task = small(name), task_of(name)
    narrow, wide = random_batch([5, 2, 7]), random_batch([5, 2, 7], width=31)
    assert_same_where_real(model(narrow), model(wide), narrow["lengths"])
    torch.testing.assert_close(task.losses(model, narrow), task.losses(model, wide))


@every_model
def test_a_rows_loss_does_not_depend_on_other_rows(name: str) -> None:
    model, task = small(name), task_of(name)
    batch = random_batch([5, 2, 7, 1])
    together = task.losses(model, batch)
    alone = torch.cat([task.losses(model, rows_of(batch, [row])) for row in range(4)])
    torch.testing.assert_close(together, alone)


@every_model
def test_a_rows_loss_has_no_gradient_in_other_rows(name: str) -> None:
    model, task = small(name), task_of(name)
    seen: list[Tensor] = []
    model.embedding.register_forward_hook(lambda *call: seen.append(call[2]))
    losses = task.losses(model, random_batch([5, 2, 7]))
    (gradient,) = torch.autograd.grad(losses[1], seen[0])
    assert gradient[1, :2].abs().min() > 0
    assert name == "bag" or gradient[1, 2:].abs().max() == 0
    assert gradient[[0, 2]].abs().max() == 0


@every_model
def test_rows_of_length_zero_lose_nothing_and_leave_gradients_as_they_are(name: str) -> None:
    model, task = small(name), task_of(name)
    batch = random_batch([4, 3])
    zeros = {key: torch.zeros_like(values) for key, values in batch.items()}
    filled = {key: torch.cat([batch[key], zeros[key]]) for key in batch}
    losses = task.losses(model, filled)
    assert losses[2:].tolist() == [0.0, 0.0]
    assert all(values.isfinite().all() for values in model(filled).values())
    padded = torch.autograd.grad(losses.sum(), list(model.parameters()))
    plain = torch.autograd.grad(task.losses(model, batch).sum(), list(model.parameters()))
    torch.testing.assert_close(padded, plain)
    assert task.losses(model, zeros).sum().item() == 0.0


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].causal])
def test_causal_models_do_not_see_what_comes_next(name: str) -> None:
    model, batch = small(name), random_batch([8])
    changed = {**batch, "tokens": batch["tokens"].clone()}
    changed["tokens"][0, 5:] = 4
    before, after = model(batch)["words"], model(changed)["words"]
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_bilstm_equals_torchs_bidirectional_lstm_on_packed_rows() -> None:
    model = make_model(
        "bilstm", task_of("bilstm"), generator=torch.Generator().manual_seed(0), hidden_size=6
    )
    reference = nn.LSTM(64, 6, batch_first=True, bidirectional=True)
    weights = dict(model.onward[0].state_dict())  # type: ignore[union-attr,index]
    for key, value in model.back[0].state_dict().items():  # type: ignore[union-attr,index]
        weights[f"{key}_reverse"] = value
    reference.load_state_dict(weights)
    lengths = torch.tensor([3, 7, 1])
    embedded = torch.linspace(-99, 99, 3 * 7 * 64).sin().view(3, 7, 64)
    pack, unpack = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
    packed = pack(embedded, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = unpack(reference(packed)[0], batch_first=True)
    features = model.encode(embedded, lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(features[row, :length], expected[row, :length])


@pytest.mark.parametrize("name", ["transformer", "causal_transformer"])
def test_transformer_blocks_equal_torchs_encoder_layer(name: str) -> None:
    model = small(name)
    block = model.blocks[0]  # type: ignore[index]
    layer = nn.TransformerEncoderLayer(
        8, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    own = block.state_dict()  # type: ignore[union-attr]
    renamed = {"mix": "self_attn.out_proj", "widen": "linear1", "narrow": "linear2"}
    renamed |= {"attention_norm": "norm1", "forward_norm": "norm2"}
    state = {
        f"{theirs}.{kind}": own[f"{ours}.{kind}"]
        for ours, theirs in renamed.items()
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        parts = [own[f"{part}.{kind}"] for part in ("query", "key", "value")]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
    layer.load_state_dict(state)
    x, lengths = torch.linspace(-9, 9, 80).sin().view(2, 5, 8), torch.tensor([5, 3])
    hidden = torch.arange(5) >= lengths[:, None]
    if MODELS[name].causal:
        ahead = torch.ones(5, 5, dtype=torch.bool).triu(1)
        expected, mask = layer(x, src_mask=ahead), None
    else:
        expected, mask = layer(x, src_key_padding_mask=hidden), ~hidden[:, None, None, :]
    got = block(x, mask)  # type: ignore[operator]
    torch.testing.assert_close(got[~hidden], expected[~hidden])


@every_model
def test_weights_come_from_the_generator_and_the_global_one_is_left_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, third = small(name, 0), small(name, 0), small(name, 1)
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in first.state_dict().items():
        assert value.isfinite().all()
        assert torch.equal(value, second.state_dict()[key])
    assert not torch.equal(first.embedding.weight, third.embedding.weight)


@every_model
def test_parameters_belong_to_plain_leaves_that_see_the_rows_first(name: str) -> None:
    model, batch = small(name), random_batch([5, 2, 7])
    rows: list[int] = []
    owned = 0
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own:
            assert type(module) in LEAVES
            owned += len(own)
            module.register_forward_hook(lambda *call: rows.append(call[1][0].shape[0]))
    model(batch)
    assert set(rows) == {3}
    assert owned == len(list(model.parameters())) == len(model.state_dict())
    ((module_name, key),) = model.sparse_inputs.items()
    table = model.get_submodule(module_name)
    assert isinstance(table, (nn.Embedding, nn.EmbeddingBag)) and key in batch


@every_model
def test_dropout_acts_in_training_only(name: str) -> None:
    sizes = {**SMALL[name], "dropout": 0.5}
    model = make_model(name, task_of(name), generator=torch.Generator().manual_seed(0), **sizes)
    batch = random_batch([5, 2])
    output = model.outputs[0].name
    assert not torch.equal(model.train()(batch)[output], model(batch)[output])
    assert torch.equal(model.eval()(batch)[output], small(name)(batch)[output])


def toy_batch(task: Task, rows: int, seed: int) -> Batch:
    """Rows under a rule: one word tells the intent, word 5 tags what follows; or a cycle."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (rows,), generator=draw)
    inside = torch.arange(8) < lengths[:, None]
    if task.causal:
        start = torch.randint(0, 16, (rows, 1), generator=draw)
        words = 4 + (start + 3 * torch.arange(9)) % 16
        targets = words[:, 1:].masked_fill(~inside, -100)
        return {"tokens": words[:, :-1] * inside, "targets": targets, "lengths": lengths}
    tokens = torch.randint(7, 20, (rows, 8), generator=draw)
    tokens.masked_fill_(torch.rand(tokens.shape, generator=draw) < 0.2, 5)
    intent = torch.randint(0, 3, (rows,), generator=draw)
    tokens[torch.arange(rows), torch.randint(0, 3, (rows,), generator=draw)] = 17 + intent
    tokens[:, 3:].clamp_(max=16)
    tokens.masked_fill_((tokens > 16) & (tokens != 17 + intent[:, None]), 7)
    slots = torch.zeros_like(tokens)
    slots[:, 1:] = (tokens[:, :-1] == 5).long()
    return {
        "tokens": tokens * inside,
        "lengths": lengths,
        "intent": intent,
        "slots": slots.masked_fill(~inside, -100),
    }


@every_model
def test_each_model_learns_a_toy_problem(name: str) -> None:
    task = task_of(name)
    model = make_model(name, task, generator=torch.Generator().manual_seed(0), hidden_size=32)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(80):
        adam.zero_grad()
        torch.autograd.backward(task.losses(model, toy_batch(task, 64, step)).mean())
        adam.step()
    test = toy_batch(task, 300, 1000)
    logits = model(test)
    if name != "bag":
        label = "targets" if task.causal else "slots"
        real = test[label] != -100
        right = logits["words" if task.causal else "slots"].argmax(2) == test[label]
        assert right[real].float().mean() > 0.95
    if not task.causal:
        assert (logits["intent"].argmax(1) == test["intent"]).float().mean() > 0.95


@pytest.mark.parametrize(
    ("name", "other", "sizes", "message"),
    [
        ("lstm", "bilstm", {}, "model=lstm is for next_word; for intent_slots use bilstm or tr"),
        ("bilstm", "lstm", {}, "for next_word use lstm or causal_transformer"),
        ("gru", "lstm", {}, "model=gru does not exist: choose one of bilstm, transformer, lstm"),
        ("bilstm", "bilstm", {"heads": 4}, "model=bilstm has no model.heads=4: it takes dropout"),
        ("lstm", "lstm", {"layers": 0}, "model.layers=0 must be at least 1"),
        ("lstm", "lstm", {"dropout": 1.0}, "model.dropout=1.0 must be at least 0 and below 1"),
        ("transformer", "bilstm", {"heads": 7}, "model.hidden_size=64 must be a multiple of"),
        ("bag", "bilstm", {}, "model=bag sees no order of words and cannot tag slots: use a pop"),
        ("bag", "lstm", {}, "model=bag is for intent_slots; for next_word use lstm or causal_tr"),
        ("bag", "bag", {"layers": -1}, "model.layers=-1 must be at least 0"),
    ],
)
def test_impossible_models_are_refused_in_one_line(
    name: str, other: str, sizes: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make_model(name, task_of(other), generator=torch.Generator(), **sizes)
    assert "\n" not in str(error.value)


def test_a_size_of_none_takes_the_default() -> None:
    model = make_model(
        "lstm", task_of("lstm"), generator=torch.Generator(), heads=None, layers=None
    )
    assert model.embedding.weight.shape == (20, 64)
