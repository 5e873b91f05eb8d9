"""What a device pays: peak memory of the agent, bytes and seconds of a round, by encoding.

    .venv/bin/python benchmarks/device_agent.py [rounds=5] [tasks=bilstm,bilstm_dp,minilm_lora]

A real gateway with TLS serves one real `sottovoce join` process on loopback. Beside each agent a
process that imports torch (and transformers, where the task needs it) and does as much plain
training, nothing else: the agent's overhead is the difference of the two peaks. MiniLM-L6 stands
there in its own sizes with weights drawn at random, which take the same memory. Prints JSON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from simulation_measure import machine

from sottovoce.client.agent.store import DeviceStore
from sottovoce.client.task_spec import TaskSpec, task_spec
from sottovoce.server.gateway.gateway import Gateway, GatewaySettings, RoundOrder
from sottovoce.server.settings import compose
from sottovoce.simulations.experiment import Experiment, build_experiment

RUN = "benchmark"
TASKS = {
    "bilstm": ["model=bilstm", "privacy=device"],
    "bilstm_dp": ["model=bilstm", "privacy=example"],
    "minilm_lora": ["model=pretrained", "privacy=device"],
}
ENCODINGS = {"bilstm": ("fp32", "fp16", "int8"), "minilm_lora": ("fp32", "fp16", "int8")}
EXAMPLES = 60  # about, of the device

AGENT = """
import sys
from sottovoce.client.agent.join_cli import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""

PLAIN = """
import json, sys
import numpy, torch
kind, batch, steps, width, model = json.loads(sys.argv[1])
torch.set_num_threads(1)
if kind == "minilm_lora":
    from transformers import AutoModel
    base = AutoModel.from_pretrained(model).requires_grad_(False)
    layers = [block.attention.self for block in base.encoder.layer]
    down = [torch.nn.Linear(384, 8) for _ in range(2 * len(layers))]
    up = [torch.nn.Linear(8, 384) for _ in down]
    for k, layer in enumerate(layers):
        for part, name in enumerate(("query", "value")):
            def adapted(x, out, a=down[2 * k + part], b=up[2 * k + part]):
                return out + b(a(x[0]))
            getattr(layer, name).register_forward_hook(lambda m, x, out, f=adapted: f(x, out))
    head = torch.nn.Linear(384, 80)
    weights = [p for part in (*down, *up, head) for p in part.parameters()]
    forward = lambda x: head(base(input_ids=x).last_hidden_state)
else:
    table, lstm = torch.nn.Embedding(4100, 64), torch.nn.LSTM(64, 64, batch_first=True)
    back, head = torch.nn.LSTM(64, 64, batch_first=True), torch.nn.Linear(128, 80)
    weights = [p for part in (table, lstm, back, head) for p in part.parameters()]
    def forward(x):
        e = table(x)
        return head(torch.cat([lstm(e)[0], back(e.flip(1))[0].flip(1)], 2))
for _ in range(steps):
    x, y = torch.randint(0, 4000, (batch, width)), torch.randint(0, 80, (batch * width,))
    loss = torch.nn.functional.cross_entropy(forward(x).flatten(0, 1), y)
    for p, g in zip(weights, torch.autograd.grad(loss, weights)):
        p.data -= 0.1 * g
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def minilm_folder(folder: Path) -> Path:
    """A BERT of MiniLM-L6's sizes and a WordPiece tokenizer of as many pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
    pieces += [f"unused{k}" for k in range(30522 - len(pieces))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, pad_token_id=0,
    )  # fmt: skip
    BertModel(sizes).save_pretrained(folder)
    return folder


def experiment(name: str, model: Path | None) -> Experiment:
    """The experiment of a task, on SNIPS."""
    more = [] if model is None else [f"model.path={model}"]
    config = compose([
        "population=snips", "population.index=null", "privacy.device.epsilon=null",
        "privacy.device.noise_multiplier=1", *TASKS[name], *more,
    ])  # fmt: skip
    if model is not None:
        from sottovoce.client.models.hub_files import weights_sha256

        config.model.sha256 = weights_sha256(model)
    from omegaconf import OmegaConf

    return build_experiment(OmegaConf.to_yaml(config))


def fill(store: Path, found: Experiment) -> int:
    """Put the examples of one usual device into a store; how many."""
    population = found.population
    device = int(np.abs(population.activity.astype(int) - EXAMPLES).argmin())
    examples, schema = population.examples(np.array([device])), population.schema
    rows = []
    for k in range(len(examples)):
        span = slice(examples.offsets[k], examples.offsets[k + 1])
        assert examples.intent is not None and examples.slots is not None
        rows.append({
            "tokens": [population.words[w] for w in examples.tokens[span]],
            "intent": schema.intents[examples.intent[k]],
            "slots": [schema.slots[tag] for tag in examples.slots[span]],
        })
    opened = DeviceStore(store)
    opened.add(rows)
    opened.close()
    return len(rows)


def agent_rounds(
    spec: TaskSpec, found: Experiment, folder: Path, encoding: str, rounds: int, models: Path
) -> dict[str, Any]:
    """Peak memory of an agent over some rounds, and what a round takes."""
    examples = fill(folder / "store", found)
    gateway = Gateway(folder / "gateway", GatewaySettings(port=0, come_back_s=0.05, hold_s=5.0))
    gateway.start()
    (folder / "token").write_text(gateway.tokens(1)[0])
    parameters = {
        n: p.detach().clone() for n, p in found.initial_model().named_parameters()
        if p.requires_grad
    }
    gateway.announce(RUN)
    child = subprocess.Popen(
        [sys.executable, "-c", AGENT, gateway.address, "--store", str(folder / "store"),
         "--token-file", str(folder / "token"), "--ca", str(gateway.ca_file), "--nice", "0",
         "--models", str(models)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    results, seconds = [], []
    try:
        while not (members := gateway.roster(RUN)):
            threading.Event().wait(0.05)
        draw = torch.Generator().manual_seed(0)
        for number in range(1, rounds + 1):
            began = time.perf_counter()
            results.append(gateway.train(RoundOrder(
                RUN, number, spec.to_bytes(), parameters,
                np.array([members[0].device]), [0], np.array([members[0].level], dtype=np.uint8),
                deadline_s=120, upload_encoding=encoding, download_encoding=encoding,
            )))  # fmt: skip
            seconds.append(time.perf_counter() - began)
            parameters = {
                n: p + 1e-3 * torch.randn(p.shape, generator=draw) for n, p in parameters.items()
            }
    finally:
        child.terminate()
        out, errors = child.communicate(timeout=30)
        gateway.stop(1)
    if any(result.accepted != 1 for result in results):
        raise SystemExit(f"a round without an update:\n{errors}")
    later = results[1:] or results
    return {
        "encoding": encoding, "examples": examples, "peak_mb": int(out.split()[-1]) / 1024,
        "first_down_bytes": results[0].bytes_down,
        "down_bytes": float(np.mean([result.bytes_down for result in later])),
        "up_bytes": float(np.mean([result.bytes_up for result in later])),
        "round_s": float(np.median(seconds[1:] or seconds)),
    }


def plain_peak_mb(name: str, found: Experiment, rounds: int, model: Path | None) -> float:
    """Peak memory of a process that imports torch and does as much plain training."""
    plan = found.training.plan
    work = [name, plan.batch_size, rounds * plan.steps(5, EXAMPLES), found.task.max_length,
            str(model)]  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(work)], check=True, capture_output=True,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip
    return int(out.split()[-1]) / 1024


def main(words: list[str]) -> None:
    asked = dict(word.split("=", 1) for word in words)
    rounds = int(asked.get("rounds", "5"))
    names = asked.get("tasks", ",".join(TASKS)).split(",")
    report: dict[str, Any] = {
        "machine": machine(), "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "grpcio", "numpy", "transformers")},
        "tasks": {},
    }  # fmt: skip
    with TemporaryDirectory() as place:
        for name in names:
            models = Path(place, "models")
            model = None
            if name == "minilm_lora":
                model = models / "minilm"
                model = model if model.is_dir() else minilm_folder(model)
            models.mkdir(exist_ok=True)
            found = experiment(name, model)
            spec = task_spec(found, RUN)
            plain = plain_peak_mb(name, found, rounds, model)
            rows = [
                agent_rounds(spec, found, Path(place, name + encoding), encoding, rounds, models)
                for encoding in ENCODINGS.get(name, ("fp32",))
            ]
            for row in rows:
                row["overhead_mb"] = row["peak_mb"] - plain
            report["tasks"][name] = {
                "trained_bytes": spec.model_bytes, "spec_bytes": len(spec.to_bytes()),
                "plain_peak_mb": plain, "agent": rows,
            }  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
