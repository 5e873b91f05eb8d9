"""Runs on pretrained models: what trains and travels, what is pinned, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import clipped_loop
from safetensors.torch import load_file
from small_runs import FIXED_NOISE, Killed, metrics, model, resume, summary

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from tiny_models import WORDS, causal_folder, encoder_folder
from torch import Tensor, nn

from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.models import hub_files, make_model
from sottovoce.client.models.pretrained_base import set_dropout
from sottovoce.client.tasks import Task, make_task
from sottovoce.client.vocabulary import EOS, FIRST, FileVocabulary, HashVocabulary
from sottovoce.privacy import clipped_gradients
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.server import callbacks, cli
from sottovoce.server.limits import validate
from sottovoce.server.runs import load_run
from sottovoce.server.settings import compose
from sottovoce.server.setup import settings_text
from sottovoce.server.simulate import simulate
from sottovoce.simulations.assistant import AssistantPopulation
from sottovoce.simulations.experiment import build_experiment
from sottovoce.simulations.fleet import SimulatedFleet
from sottovoce.simulations.group_size import GroupSize, Way, largest_group, possible_ways

SMALL = (
    "population=assistant", "population.devices=60", "population.held_out_devices=4",
    "cohort_size=6", "rounds=2", "strategy.max_rate=1", "strategy.learning_rate=0.1",
    "strategy.batch_size=8", "run.evaluation_devices=4", "run.evaluate_every=2",
    "run.report=false", "run.progress=false", "run.workers=2", "seed=3",
    "population.max_examples_per_round=8", "strategy.sampler=uniform",
)  # fmt: skip
TASK = {"encoder": "intent_slots", "causal": "next_word"}
TUNED = {"adapters": (), "heads": ("model.heads_only=true",), "all": ("model.lora_rank=0",)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("hub")
    return {
        "encoder": encoder_folder(place / "encoder"),
        "causal": causal_folder(place / "causal"),
        "roberta": encoder_folder(place / "roberta", "Roberta", pad_token_id=1),
        "llama": causal_folder(place / "llama", "Llama", tie_word_embeddings=False),
    }


def words_of(path: Path, kind: str, *more: str) -> list[str]:
    return [*SMALL, f"task={TASK[kind]}", "model=pretrained", f"model.path={path}", *more]


def run(folder: Path, words: list[str]) -> int:
    folder.mkdir(parents=True)
    return simulate(compose(words), folder)


def task_of(path: Path, kind: str, max_length: int = 12) -> Task:
    population = AssistantPopulation(devices=20, held_out_devices=2, seed=4)
    return make_task(
        TASK[kind], vocabulary=FileVocabulary(path / "tokenizer.json"), schema=population.schema,
        words=WORDS.split(), max_length=max_length,
    )  # fmt: skip


def build(path: Path, kind: str, **settings: Any) -> tuple[Any, Task]:
    task = task_of(path, kind)
    draw = torch.Generator().manual_seed(1)
    return make_model("pretrained", task, generator=draw, path=str(path), **settings), task


def batch_of(task: Task, lengths: list[int], width: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    count, longest = torch.tensor(lengths), max(lengths)
    inside = torch.arange(longest) < count[:, None]
    tokens = torch.randint(FIRST + 4, task.vocabulary.size, inside.shape, generator=draw)
    labels = torch.randint(0, 3, tokens.shape, generator=draw)
    more = (0, max(0, width - longest))
    pad = nn.functional.pad
    return {
        "tokens": pad(tokens * inside, more), "lengths": count, "intent": labels[:, 0],
        "slots": pad(labels.masked_fill(~inside, -100), more, value=-100),
        "targets": pad(tokens.masked_fill(~inside, -100), more, value=-100),
    }


# -- whole runs ------------------------------------------------------------------------------------


RUNS = [
    ("encoder", "adapters", "none"), ("encoder", "adapters", "both"), ("encoder", "heads", "both"),
    ("encoder", "all", "both"), ("causal", "adapters", "both"), ("causal", "all", "none"),
    ("llama", "all", "device"),
]  # fmt: skip
NOISE = {"none": (), "device": FIXED_NOISE[:2], "both": FIXED_NOISE}


@pytest.mark.parametrize(("which", "tuned", "privacy"), RUNS)
def test_a_run_sends_and_keeps_what_trains_and_nothing_else(
    tmp_path: Path, folders: dict[str, Path], which: str, tuned: str, privacy: str
) -> None:
    kind = "encoder" if which == "encoder" else "causal"
    path, folder = folders[which], tmp_path / "run"
    settings = words_of(path, kind, *TUNED[tuned], f"privacy={privacy}", *NOISE[privacy])
    assert run(folder, settings) == 0
    assert {record["dropped"] for record in metrics(folder)[1:]} == {0}
    assert all(np.isfinite(value) for value in summary(folder)["metrics"].values())
    released = load_file(folder / "model.safetensors")
    marks = {"adapters": ("lora_A", "lora_B", "heads."), "heads": ("heads.",), "all": ("",)}[tuned]
    assert all(any(mark in name for mark in marks) for name in released)
    assert any("heads." in name for name in released) == (kind == "encoder")
    finished = load_run(folder)
    trained = {n: p for n, p in finished.model.named_parameters() if p.requires_grad}
    assert trained.keys() == released.keys()
    first = dict(finished.initial_model.named_parameters()) if finished.initial_model else {}
    for name, tensor in released.items():
        assert torch.equal(trained[name], tensor)
        assert not torch.equal(first[name], tensor)
    weights = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    card = json.loads((folder / "model.json").read_text())
    assert (card["model"]["path"], card["model"]["sha256"]) == (str(path), weights)
    assert summary(folder)["parameters"] == sum(tensor.numel() for tensor in released.values())


def test_a_stopped_run_ends_as_if_it_had_never_stopped(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = words_of(folders["encoder"], "encoder", "privacy=both", *FIXED_NOISE)
    assert run(tmp_path / "whole", settings) == 0

    def killed(self: Any, state: Any, record: dict[str, Any]) -> None:
        if record["round"] == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(callbacks.MetricsFile, "on_round", killed)
        run(tmp_path / "stopped", settings)
    assert resume(tmp_path / "stopped") == 0
    assert model(tmp_path / "stopped") == model(tmp_path / "whole")


def test_other_weights_or_none_are_one_line_for_whoever_loads_the_run(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(folders["encoder"], tmp_path / "own")
    folder = tmp_path / "run"
    assert run(folder, words_of(own, "encoder", "privacy=none", "rounds=1")) == 0
    assert cli.main(["audit", f"run={folder}", "devices=4"]) in (0, 3, 4)
    encoder_folder(own, hidden_size=16)
    build_experiment.cache_clear()
    with pytest.raises(ConfigError, match="has other weights .* give the model that the run began"):
        load_run(folder)
    capsys.readouterr()
    shutil.rmtree(own)
    build_experiment.cache_clear()
    assert cli.main(["audit", f"run={folder}"]) == 1
    line = capsys.readouterr().err.strip()
    assert f"model.path={own} is no folder" in line and "\n" not in line


def test_a_layer_without_a_tracked_form_names_the_other_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"state_size": 4, "expand": 2, "conv_kernel": 2, "time_step_rank": 2}
    path = causal_folder(tmp_path / "mamba", "Mamba", **sizes)
    words = words_of(path, "causal", "model.lora_rank=0", f"run.dir={tmp_path / 'run'}")
    assert cli.main(["simulate", *words, "privacy=example"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Mamba" in error and "privacy.example.engine=opacus" in error
    words = words_of(path, "causal", "model.lora_rank=0", f"run.dir={tmp_path / 'plain'}")
    assert cli.main(["simulate", *words, "privacy=none"]) == 0  # autograd alone takes any layer


# -- laws of the models ----------------------------------------------------------------------------


EVERY = [("encoder", "encoder"), ("roberta", "encoder"), ("causal", "causal"), ("llama", "causal")]
every_model = pytest.mark.parametrize(("which", "kind"), EVERY)


@every_model
def test_losses_depend_neither_on_padding_nor_on_other_rows(
    folders: dict[str, Path], which: str, kind: str
) -> None:
    net, task = build(folders[which], kind)
    losses = task.losses(net, batch_of(task, [5, 1, 7]))
    torch.testing.assert_close(task.losses(net, batch_of(task, [5, 1, 7], width=12)), losses)
    batch = batch_of(task, [5, 1, 7])
    alone = [task.losses(net, {k: v[r : r + 1] for k, v in batch.items()}) for r in range(3)]
    torch.testing.assert_close(torch.cat(alone), losses)
    empty = {name: torch.zeros_like(values) for name, values in batch.items()}
    assert task.losses(net, empty).tolist() == [0.0, 0.0, 0.0]
    assert all(values.isfinite().all() for values in net(empty).values())


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 0}], ids=["adapters", "all"])
@every_model
def test_clipped_sums_equal_the_loop(
    folders: dict[str, Path], which: str, kind: str, settings: dict[str, int]
) -> None:
    net, task = build(folders[which], kind, **settings)
    net.train()
    batch = batch_of(task, [4, 2, 6, 0])
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(8))
    sums, norms = clipped_gradients(net, lambda m: task.losses(m, batch), 0.5, groups=2)
    for k in range(2):
        expected, expected_norms = clipped_loop(
            net,
            lambda m, r: task.losses(m, {n: v[r : r + 1] for n, v in batch.items()})[0],
            range(2 * k, 2 * k + 2), 0.5,
        )  # fmt: skip
        for total, slow in zip(sums, expected, strict=True):
            torch.testing.assert_close(total[k], slow, rtol=1e-3, atol=2e-6)
        torch.testing.assert_close(norms[2 * k : 2 * k + 2].double(), expected_norms, rtol=1e-4,
                                   atol=1e-6)


@pytest.mark.parametrize("which", ["encoder", "roberta"])
def test_an_encoder_reads_what_its_tokenizer_would_give_it(
    folders: dict[str, Path], which: str
) -> None:
    import transformers
    from tokenizers import Tokenizer

    net, task = build(folders[which], "encoder")
    text = "play some jazzy kitchen weather"
    pieces = task.vocabulary.ids(text.split()).ids.astype(np.int64)
    tokens = torch.from_numpy(pieces).unsqueeze(0)
    logits = net.eval()({"tokens": tokens, "lengths": torch.tensor([len(pieces)])})
    ids = Tokenizer.from_file(str(folders[which] / "tokenizer.json")).encode(text).ids
    plain = transformers.AutoModel.from_pretrained(folders[which]).eval()
    hidden = plain(input_ids=torch.tensor([ids])).last_hidden_state
    torch.testing.assert_close(logits["slots"], net.heads["slots"](hidden[:, 1:-1]))
    torch.testing.assert_close(logits["intent"], net.heads["intent"](hidden.mean(1)))


@pytest.mark.parametrize("which", ["causal", "llama"])
def test_a_causal_model_predicts_with_its_own_head_every_piece_once(
    folders: dict[str, Path], which: str
) -> None:
    import transformers

    net, task = build(folders[which], "causal")
    batch = batch_of(task, [6])
    words = net.eval()(batch)["words"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(folders[which]).eval()
    log_odds = plain(input_ids=batch["tokens"] - FIRST).logits.log_softmax(2)
    assert words.shape[2] == task.vocabulary.size
    ours = words.log_softmax(2)
    torch.testing.assert_close(ours[..., EOS], log_odds[..., 0])
    torch.testing.assert_close(ours[..., FIRST + 1 :], log_odds[..., 1:])


def trained(words: list[str], size: int, engine: str = "grouped") -> dict[str, Tensor]:
    """What five devices send, `size` of them training at once."""
    parts = build_experiment(settings_text(compose(words)))
    initial, source = parts.initial_model(), NoiseSource.from_seed(1)
    start = {n: p.detach().clone() for n, p in initial.named_parameters() if p.requires_grad}
    fleet = SimulatedFleet(
        parts.population, parts.task, initial, parts.training, source, size, engine=engine
    )
    return fleet.train(start, np.array([1, 5, 9, 20, 33]), 1).sums


def agree(sums: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    for name, expected in others.items():
        torch.testing.assert_close(sums[name], expected, rtol=1e-3, atol=1e-5)


def test_devices_train_the_same_however_many_at_once(folders: dict[str, Path]) -> None:
    words = words_of(folders["encoder"], "encoder", "privacy=both", *FIXED_NOISE)
    agree(trained(words, 4), trained(words, 1))


@pytest.mark.parametrize("which", ["encoder", "causal"])
def test_the_opacus_engine_trains_all_weights_alike(
    folders: dict[str, Path], which: str
) -> None:
    pytest.importorskip("opacus", reason="opacus is not installed")
    words = words_of(folders[which], which, "privacy=both", *FIXED_NOISE, "model.lora_rank=0")
    agree(trained(words, 1, "opacus"), trained(words, 4))


def test_what_is_frozen_is_shared_and_what_is_new_comes_from_the_generator(
    folders: dict[str, Path],
) -> None:
    before = torch.get_rng_state()
    one, other = (build(folders["encoder"], "encoder")[0] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert (a is b) == (not a.requires_grad), name
        assert torch.equal(a, b)
    full, again = (build(folders["encoder"], "encoder", lora_rank=0)[0] for _ in range(2))
    assert all(a is not b for a, b in zip(full.parameters(), again.parameters(), strict=True))
    assert all(p.requires_grad for p in full.parameters())


def test_dropout_is_one_setting_and_never_inside_attention(folders: dict[str, Path]) -> None:
    still, task = build(folders["encoder"], "encoder")
    batch = batch_of(task, [5, 3])
    assert torch.equal(still.train()(batch)["intent"], still(batch)["intent"])
    noisy, _ = build(folders["encoder"], "encoder", dropout=0.5)
    assert not torch.equal(noisy.train()(batch)["intent"], noisy(batch)["intent"])
    torch.testing.assert_close(noisy.eval()(batch)["intent"], still(batch)["intent"])
    config = noisy.base.config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.5, 0.0)
    import transformers

    for kind in ("GPT2Config", "DistilBertConfig", "LlamaConfig"):
        config = getattr(transformers, kind)()
        set_dropout(config, 0.25)
        rates = {n: v for n, v in config.to_dict().items() if "drop" in n and "summary" not in n}
        assert {v for n, v in rates.items() if n.startswith("att")} <= {0.0}
        assert {v for n, v in rates.items() if not n.startswith("att")} <= {0.25}


# -- tokenizers ------------------------------------------------------------------------------------


def test_words_are_split_as_in_running_text(folders: dict[str, Path]) -> None:
    from tokenizers import Tokenizer

    for which in ("encoder", "causal"):
        path = folders[which] / "tokenizer.json"
        vocabulary, tokenizer = FileVocabulary(path), Tokenizer.from_file(str(path))
        text = "hey turn on the lights"
        expected = tokenizer.encode(f" {text}", add_special_tokens=False).ids
        assert (vocabulary.ids(text.split()).ids - FIRST).tolist() == expected


def test_special_tokens_within_a_text_are_words_like_others(folders: dict[str, Path]) -> None:
    for which, special in (("encoder", "[SEP]"), ("causal", "<|endoftext|>")):
        path = folders[which] / "tokenizer.json"
        number = json.loads(path.read_text())["model"]["vocab"][special]
        assert FIRST + number not in FileVocabulary(path).pieces(special)


# -- memory ----------------------------------------------------------------------------------------


def test_large_models_train_few_at_once() -> None:
    with torch.device("meta"):
        assert largest_group(nn.Linear(16, 16), 256) > 128
        assert largest_group(nn.Linear(1800, 1800), 256) == 2
        assert largest_group(nn.Linear(5000, 5000), 256) == 1
        frozen = nn.Linear(50_000, 5000).requires_grad_(False)
        assert largest_group(nn.Sequential(frozen, nn.Linear(8, 8)), 256) == 10
        wide = nn.Sequential(*[nn.Linear(8, 1000) for _ in range(20)]).requires_grad_(False)
        assert largest_group(wide, 256) == 2
        training = LocalTraining(1.0, BatchPlan(8, 1, 8, poisson=False), None, None)
        for model, most in ((nn.Linear(50_000, 5000), 1), (wide, 2), (nn.Linear(16, 16), 128)):
            ways = possible_ways(model, training, "grouped", 256)
            for fixed in (True, False):
                size = GroupSize(ways, fixed=fixed)
                for _ in range(4 * len(ways)):
                    way = size.next()
                    assert way.devices <= most
                    size.measured(way, 1, 1.0)
                assert size.chosen is not None
    assert possible_ways(wide, training, "opacus", 256) == [Way("opacus", 1)]


# -- files -----------------------------------------------------------------------------------------


def test_sharded_weights_have_one_sum_over_all_shards(tmp_path: Path) -> None:
    import transformers

    whole = encoder_folder(tmp_path / "whole")
    shards = tmp_path / "shards"
    plain = transformers.AutoModel.from_pretrained(whole)
    plain.save_pretrained(shards, max_shard_size="20KB")
    shutil.copy(whole / "tokenizer.json", shards)
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 1
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files]
    assert hub_files.weights_sha256(shards) == hashlib.sha256("".join(lines).encode()).hexdigest()
    batch = batch_of(task_of(whole, "encoder"), [4])
    one, other = (build(path, "encoder")[0](batch)["intent"] for path in (whole, shards))
    torch.testing.assert_close(one, other)
    files[0].unlink()
    with pytest.raises(ConfigError, match=f"lacks {files[0].name}"):
        hub_files.weights_sha256(shards)


def test_a_name_is_looked_up_on_the_hub(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "org/absent":
            raise OSError("no\nnetwork")
        return str(folders["encoder"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub_files.tokenizer_file("org/tiny") == folders["encoder"] / "tokenizer.json"
    assert not any("bin" in pattern or pattern == "*" for pattern in asked[0][1])
    with pytest.raises(ConfigError, match="cannot be had from the hub") as error:
        hub_files.model_folder("org/absent")
    assert "\n" not in str(error.value)


# -- refusals --------------------------------------------------------------------------------------


def refused(path: Path, kind: str, message: str, task: Task | None = None, **settings: Any) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make_model(
            "pretrained", task or task_of(path, kind), generator=torch.Generator(),
            path=str(path), **settings,
        )  # fmt: skip
    assert "\n" not in str(error.value)


def test_impossible_models_are_refused_in_one_line(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    encoder, causal = folders["encoder"], folders["causal"]
    refused(encoder, "encoder", r"targets=\['wrong'\] cannot be adapted", lora_targets=["wrong"])
    refused(encoder, "encoder", r"write model.lora_targets=\[query\]", lora_targets="query")
    refused(encoder, "encoder", "has other weights", sha256="0" * 64)
    refused(causal, "causal", "leaves nothing to train", heads_only=True)
    refused(encoder, "encoder", "set task.max_length=38", task_of(encoder, "encoder", 39))
    refused(causal, "causal", "set task.max_length=40", task_of(causal, "causal", 41))
    refused(encoder, "encoder", "take the tokenizer.json of that", task_of(causal, "encoder"))
    refused(encoder, "causal", "lacks weights of BertLMHeadModel")
    with pytest.raises(ConfigError, match="no folder"):
        make_model("pretrained", task_of(encoder, "encoder"), generator=torch.Generator(),
                   path=str(tmp_path / "absent"))
    words = make_task("intent_slots", vocabulary=HashVocabulary(64), schema=task_of(
        encoder, "encoder").schema, words=[], max_length=8)
    refused(encoder, "encoder", "set task.vocabulary.source=auto", words)


def test_an_encoder_with_a_language_model_head_sees_what_it_should_predict(tmp_path: Path) -> None:
    path = causal_folder(tmp_path / "bert", "Bert", is_decoder=True)
    build(path, "causal")
    path = causal_folder(tmp_path / "open", "Bert")
    refused(path, "causal", "is an encoder, which sees the words it should predict")


@pytest.mark.parametrize(
    ("kind", "sizes", "layers"),
    [
        ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 40}, "q_lin|v_lin"),
        ("MPNet", {"pad_token_id": 1}, "q|v"),
        ("Electra", {"embedding_size": 16}, "query|value"),
    ],
)
def test_queries_and_values_are_found_by_themselves(
    tmp_path: Path, kind: str, sizes: dict[str, int], layers: str
) -> None:
    net, task = build(encoder_folder(tmp_path / kind, kind, **sizes), "encoder")
    names = [name for name, p in net.base.named_parameters() if p.requires_grad]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {*layers.split("|")}
    batch = batch_of(task, [3, 5])
    assert clipped_gradients(net, lambda m: task.losses(m, batch), 1.0)[1].min() > 0


def test_pickles_and_other_kinds_are_not_read(folders: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    pickled = shutil.copytree(folders["encoder"], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(pickled, "encoder", "pickled weights are not read")
    both = tmp_path / "t5"
    config = transformers.T5Config(
        vocab_size=120, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    transformers.T5Model(config).save_pretrained(both)
    shutil.copy(folders["encoder"] / "tokenizer.json", both)
    refused(both, "encoder", "it is an encoder-decoder")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.path=???"], "model.path is missing"),
        (["task.vocabulary.source=hash"], "task.vocabulary.source=hash is not what model=pretra"),
        (["model.lora_rank=-1"], "model.lora_rank=-1 must be at least 0"),
        (["model.lora_alpha=0"], "model.lora_alpha=0.0 must be above 0"),
        (["model.hidden_size=4"], "hidden_size is no setting"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    folders: dict[str, Path], tmp_path: Path, words: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = words_of(folders["encoder"], "encoder", *words, f"run.dir={tmp_path / 'run'}")
    assert cli.main(["simulate", *given]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_server_step_that_undoes_the_pretraining_is_warned_of(folders: dict[str, Path]) -> None:
    for words, warned in (
        (["model.lora_rank=0"], True),
        (["model.lora_rank=0", "strategy.server_learning_rate=0.001"], False),
        (["model.lora_rank=0", "strategy=fedavg"], False),
        (["model.heads_only=true", "model.lora_rank=0"], False),
        ([], False),
    ):
        lines = validate(compose(words_of(folders["encoder"], "encoder", "privacy=none", *words)))
        assert any("undoes the pretraining" in line for line in lines) == warned


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_an_absent_library_names_the_extra(
    tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    path = encoder_folder(tmp_path / "model", hidden_size=16)
    monkeypatch.setitem(sys.modules, library, None)
    refused(path, "encoder", rf'needs {library}, .* pip install "sottovoce\[text\]"')
