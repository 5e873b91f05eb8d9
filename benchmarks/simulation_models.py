"""The synthetic users and the three models of the peer's bench, as parts of a `simulate` run.

The bench is a folder beside the repository: `synth_users.py` makes any user of a population of any
size from (seed, user id), `models.py` has the three models in plain PyTorch. Here are the same
users as a `Population`, the same losses as tasks, and the same functions of the same weights as
modules whose leaves can be grouped: `EmbeddingBag` for `F.embedding_bag`, an `Embedding` of
positions for a bare parameter, a tied `Linear` for `h @ weight.t()`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.examples import Examples, Schema, gather_ranges
from sottovoce.client.tasks import Batch, IntentSlots, Logits, NextWord, Task
from sottovoce.client.vocabulary import Vocabulary
from sottovoce.simulations.population import Population

TASK = {"bag": "intent", "lstm": "intent", "lm": "lm"}
HELD_OUT = 100  # users of another seed, on which the peer's bench evaluates
AT_ONCE = 20_000  # users made in one call


def bench_module(folder: Path, name: str) -> Any:
    """`synth_users` or `models` of the bench in `folder`, as it is."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return import_module(name)


class Numbered(Vocabulary):
    """Words that are their own ids, as the bench's users speak them."""

    source = "numbers"
    has_unknown = False

    def __init__(self, size: int) -> None:
        self.size, self.description = size, f"the numbers below {size}"

    def pieces(self, word: str) -> list[int]:
        return [int(word)]

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "size": self.size}

    @classmethod
    def _restore(cls, values: Mapping[str, Any]) -> Numbered:
        return cls(values["size"])


class SyntheticUsers(Population):
    """The bench's population of `users`, every one of which trains.

    `task`: intent (12 tokens and a label) or lm (21 tokens). `prepared`: users whose examples are
    made now and gathered later; all others are made each time that they are asked for.
    """

    name = "synth_users"
    public_words = True
    held_out = HELD_OUT

    def __init__(
        self,
        synth: Any,
        seed: int,
        users: int,
        task: str,
        prepared: NDArray[np.int64] | None = None,
    ) -> None:
        self._synth, self._seed, self._task = synth, seed, task
        self.words = [str(number) for number in range(synth.VOCAB_SIZE)]
        labels = tuple(str(label) for label in range(synth.NUM_CLASSES))
        self.schema = Schema(intents=labels if task == "intent" else ())
        starts = range(0, users, 1_000_000)
        self.activity = np.concatenate([
            synth.user_sizes(seed, np.arange(start, min(users, start + 1_000_000))).astype(np.uint8)
            for start in starts
        ])
        wanted = np.zeros(0, dtype=np.int64) if prepared is None else np.unique(prepared)
        self._ids, self._kept = wanted, self._made(seed, wanted)

    def examples(
        self, devices: NDArray[np.int64], indices: Sequence[NDArray[np.int64]] | None = None
    ) -> Examples:
        at = np.minimum(np.searchsorted(self._ids, devices), max(len(self._ids) - 1, 0))
        known = len(self._ids) > 0 and bool((self._ids[at] == devices).all())
        found = self._kept if known else self._made(self._seed, devices)
        at = at if known else np.arange(len(devices))
        if indices is None:
            rows, bounds = gather_ranges(found.device_offsets, at)
        else:
            counts = [len(chosen) for chosen in indices]
            bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            first = np.repeat(found.device_offsets[at], counts)
            rows = first + np.concatenate([*indices, np.zeros(0, np.int64)])
        taken = found.take(rows)
        return Examples(taken.tokens, taken.offsets, bounds, taken.intent)

    def held_out_devices(self, limit: int | None = None) -> Examples:
        number = HELD_OUT if limit is None else min(HELD_OUT, limit)
        return self._made(self._seed + 1, np.arange(number))

    def held_out_examples(self, limit: int | None = None) -> Examples | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"source": self.name, "devices": len(self), "seed": self._seed}

    def _made(self, seed: int, users: NDArray[np.int64]) -> Examples:
        parts = [
            self._synth.make_users(seed, users[start : start + AT_ONCE], self._task)
            for start in range(0, max(len(users), 1), AT_ONCE)
        ]
        sizes = np.concatenate([np.diff(part.offsets) for part in parts])
        inputs = np.concatenate([part.inputs for part in parts])
        targets = np.concatenate([part.targets for part in parts])
        intent = targets.astype(np.int32) if self._task == "intent" else None
        tokens = inputs if intent is not None else np.hstack([inputs, targets[:, -1:]])
        width = tokens.shape[1]
        return Examples(
            tokens=tokens.astype(np.int32).ravel(),
            offsets=np.arange(len(tokens) + 1, dtype=np.int64) * width,
            device_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            intent=intent,
        )


class NextOfWindow(NextWord):
    """The next token at every position of a window of equal length, without <bos> and <eos>."""

    def collate(self, examples: Examples) -> Batch:
        rows = torch.from_numpy(examples.tokens.astype(np.int64).reshape(len(examples), -1))
        lengths = torch.full((len(rows),), rows.shape[1] - 1)
        return {
            "tokens": rows[:, :-1].contiguous(),
            "targets": rows[:, 1:].contiguous(),
            "lengths": lengths,
        }


def make_bench_task(synth: Any, population: SyntheticUsers, task: str) -> Task:
    """The task of bag and lstm, or that of lm."""
    kind = IntentSlots if task == "intent" else NextOfWindow
    length = synth.TOKENS_PER_UTTERANCE if task == "intent" else synth.LM_SEQ_LEN + 1
    vocabulary = Numbered(synth.VOCAB_SIZE)
    return kind(vocabulary, population.schema, population.words, max_length=length)


class Bag(nn.Module):
    sparse_inputs = {"emb": "tokens"}

    def __init__(self, peer: Any) -> None:
        super().__init__()
        self.emb = nn.EmbeddingBag(
            peer.emb.num_embeddings, peer.emb.embedding_dim, mode="mean"
        )
        self.fc1 = nn.Linear(peer.fc1.in_features, peer.fc1.out_features)
        self.fc2 = nn.Linear(peer.fc2.in_features, peer.fc2.out_features)

    def forward(self, batch: Batch) -> Logits:
        return {"intent": self.fc2(F.relu(self.fc1(self.emb(batch["tokens"]))))}


class LastState(nn.Module):
    sparse_inputs = {"emb": "tokens"}

    def __init__(self, peer: Any) -> None:
        super().__init__()
        self.emb = nn.Embedding(*peer.emb.weight.shape)
        self.lstm = nn.LSTM(peer.lstm.input_size, peer.lstm.hidden_size, batch_first=True)
        self.fc = nn.Linear(peer.fc.in_features, peer.fc.out_features)

    def forward(self, batch: Batch) -> Logits:
        return {"intent": self.fc(self.lstm(self.emb(batch["tokens"]))[0][:, -1])}


class Block(nn.Module):
    def __init__(self, peer: Any) -> None:
        super().__init__()
        width, wide = peer.up.in_features, peer.up.out_features
        self.heads = peer.heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)

    def forward(self, h: Tensor) -> Tensor:
        rows, length, width = h.shape
        q, k, v = (
            self.qkv(self.ln1(h))
            .view(rows, length, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.proj(mixed.transpose(1, 2).reshape(rows, length, width))
        narrow: Tensor = self.down(F.gelu(self.up(self.ln2(h))))
        return h + narrow


class TinyLM(nn.Module):
    sparse_inputs = {"emb": "tokens"}

    def __init__(self, peer: Any) -> None:
        super().__init__()
        self.emb = nn.Embedding(*peer.emb.weight.shape)
        self.pos = nn.Embedding(*peer.pos.shape)
        self.blocks = nn.ModuleList(Block(block) for block in peer.blocks)
        self.ln = nn.LayerNorm(peer.pos.shape[1])
        self.out = nn.Linear(peer.emb.embedding_dim, peer.emb.num_embeddings, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, batch: Batch) -> Logits:
        tokens = batch["tokens"]
        h = self.emb(tokens) + self.pos(torch.arange(tokens.shape[1]).expand_as(tokens))
        for block in self.blocks:
            h = block(h)
        return {"words": self.out(self.ln(h))}


FORMS: dict[str, type[nn.Module]] = {"bag": Bag, "lstm": LastState, "lm": TinyLM}


def our_name(name: str) -> str:
    """Our name of a parameter of the bench's model."""
    return "pos.weight" if name == "pos" else name


def our_form(name: str, peer: nn.Module) -> nn.Module:
    """The bench's model `name` with groupable leaves and the weights of `peer`."""
    model = FORMS[name](peer)
    load(model, {our_name(key): value for key, value in peer.named_parameters()})
    return model


def load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the parameters of the same names; both must have all of them."""
    own = dict(model.named_parameters())
    if own.keys() != tensors.keys():
        raise KeyError(f"parameters {sorted(own.keys() ^ tensors.keys())} are on one side only")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
