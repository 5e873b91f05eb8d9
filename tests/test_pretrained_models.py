"""Models of `transformers`, whole and with peft's adapters: gradients equal the per-example loop's.

All are built from tiny configurations with random weights; nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import clipped_loop
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy import clipped_gradients
from sottovoce.privacy.gradients.engine import backward
from sottovoce.privacy.gradients.grouping import group, track, ungroup
from sottovoce.privacy.layers.linear import Leaf

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY, WIDTH, CLIP = 17, 16, 0.3
ROWS, LENGTH = 6, 5
Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 20, "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0,
    "pad_token_id": 0, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SIZES_OF_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 12,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIZES_OF_DISTILBERT = {
    "vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 20,
    "max_position_embeddings": 12, "dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 0,
}  # fmt: skip
SIZES_OF_T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 20, "num_layers": 2,
    "num_heads": 2, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu",
}  # fmt: skip

# Name: kind of model, its configuration's class, and its settings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", SIZES),
    "bert_classifier": ("BertForSequenceClassification", "BertConfig", SIZES | {"num_labels": 3}),
    "bert_masked": ("BertForMaskedLM", "BertConfig", SIZES),
    "roberta": ("RobertaModel", "RobertaConfig", SIZES | {"pad_token_id": 1}),
    "distilbert": ("DistilBertModel", "DistilBertConfig", SIZES_OF_DISTILBERT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", SIZES_OF_GPT2),
    "gpt2_untied": (
        "GPT2LMHeadModel", "GPT2Config", SIZES_OF_GPT2 | {"tie_word_embeddings": False}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"tie_word_embeddings": False}),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SIZES),
    "t5": ("T5EncoderModel", "T5Config", SIZES_OF_T5),
}


def build(name: str, attention: str = "eager") -> Any:
    """The model in float64 and training mode, with weights far enough from zero to matter."""
    kind, config, settings = MODELS[name]
    torch.manual_seed(len(name))
    try:
        config = getattr(transformers, config)(**settings, attn_implementation=attention)
        model = getattr(transformers, kind)(config)
    except ValueError as error:
        pytest.skip(f"{name} has no {attention} attention here: {error}")
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if name == "t5":
        for path, parameter in model.named_parameters():
            if "relative_attention_bias" in path:
                parameter.requires_grad_(False)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Token ids (rows, T) and an attention mask with padding at the end of some rows."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, -2:] = mask[4, -1:] = 0
    return tokens.masked_fill(mask == 0, 0), mask


def losses(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """A loss for each row from whatever a model gives: logits, pooled or hidden states."""
    out = model(input_ids=tokens, attention_mask=mask)
    if "logits" in out and out.logits.dim() == 3:
        each = F.cross_entropy(out.logits.transpose(1, 2), tokens, reduction="none")
        return (each * mask).sum(1)
    if "logits" in out:
        return F.cross_entropy(out.logits, tokens[:, 0] % 3, reduction="none")
    hidden = (out.last_hidden_state * mask.unsqueeze(2)).sum(1).sin()
    pooled = out.get("pooler_output")
    return hidden.sum(1) + (0 if pooled is None else pooled.pow(2).sum(1))


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    largest = max(float(e.abs().max()) for e in expected)
    for a, e in zip(actual, expected, strict=True):
        assert float((a - e).abs().max()) <= tolerance * largest


def matches_the_loop(model: nn.Module, tolerance: float = 3e-6) -> None:
    tokens, mask = batch()
    sums, norms = clipped_gradients(model, lambda m: losses(m, tokens, mask), CLIP, groups=2)
    for k in range(2):
        rows = range(3 * k, 3 * k + 3)
        expected, expected_norms = clipped_loop(
            model, lambda m, r: losses(m, tokens[r : r + 1], mask[r : r + 1])[0], rows, CLIP
        )
        agree([s[k] for s in sums], expected, tolerance)
        assert torch.allclose(norms[3 * k : 3 * k + 3], expected_norms, rtol=tolerance)


def groups_match_lone_models(model: nn.Module) -> None:
    """Three groups' weights of their own, two rows each, against three separate runs."""
    tokens, mask = batch()
    together = group(model, 3)
    for at, stack in enumerate(together.parameters.values()):
        generator = torch.Generator().manual_seed(at)
        stack.data += torch.randn(stack.shape, generator=generator, dtype=stack.dtype) * 0.05
    result = backward(together, losses(together.module, tokens, mask), CLIP, 3)
    for k in range(3):
        alone = copy.deepcopy(model)
        alone.load_state_dict(ungroup(together, k), strict=False)
        mine = slice(2 * k, 2 * k + 2)
        expected, norms = clipped_gradients(
            alone, lambda m, s=mine: losses(m, tokens[s], mask[s]), CLIP
        )
        agree([s[k] for s in result.sums.values()], [e[0] for e in expected], 3e-6)
        assert torch.allclose(result.norms[mine], norms, rtol=3e-6)


# These take the root mean square in float32 whatever the model's type.
ROUNDED = {"llama", "llama_tied", "qwen3", "gemma", "t5"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_a_models_gradients_equal_the_loop(name: str, attention: str) -> None:
    matches_the_loop(build(name, attention), 1e-5 if name in ROUNDED else 3e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_groups_of_a_model_train_as_if_alone(name: str) -> None:
    groups_match_lone_models(build(name))


def test_one_row_of_position_ids_stands_for_every_row() -> None:
    model = build("gpt2")
    tokens, _ = batch()
    place = torch.arange(LENGTH).unsqueeze(0)

    def placed(m: nn.Module, rows: slice) -> Tensor:
        out = m(position_ids=place, input_ids=tokens[rows])
        return out.logits.sin().flatten(1).sum(1)

    sums, _ = clipped_gradients(model, lambda m: placed(m, slice(None)), CLIP)
    expected, _ = clipped_loop(
        model, lambda m, r: placed(m, slice(r, r + 1))[0], range(ROWS), CLIP
    )
    agree([s[0] for s in sums], expected, 3e-6)


def test_embedded_inputs_and_checkpointed_layers_change_nothing() -> None:
    model = build("bert")
    tokens, mask = batch()
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)

    def embedded(m: nn.Module) -> Tensor:
        return m(inputs_embeds=x, attention_mask=mask).last_hidden_state.sin().sum((1, 2))

    plain, norms = clipped_gradients(model, embedded, CLIP)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # a hook that tracked leaves refuse
    again, same = clipped_gradients(model, embedded, CLIP)
    agree(again, plain, 1e-9)
    assert torch.allclose(norms, same)


def test_half_of_a_model_can_be_frozen() -> None:
    model = build("bert_classifier")
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight") or "query.weight" in name:
            parameter.requires_grad_(False)
    matches_the_loop(model)
    groups_match_lone_models(model)


def test_biases_alone_can_be_trained() -> None:
    model = build("gpt2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    matches_the_loop(model)
    groups_match_lone_models(model)


def test_a_table_that_all_rows_share_is_refused() -> None:
    model = build("t5")
    model.requires_grad_(True)
    with pytest.raises(UnsupportedLayer, match="relative_attention_bias.*freeze it"):
        track(model)


def test_a_model_that_lays_rows_end_to_end_is_refused() -> None:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, ffn_dim=20,
        num_attention_heads=2, max_position_embeddings=12, word_embed_proj_dim=WIDTH, dropout=0.0,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    model.model.decoder.embed_positions.requires_grad_(False)
    tokens, mask = batch()
    with pytest.raises(UnsupportedLayer, match="first dimension"):
        clipped_gradients(model, lambda m: losses(m, tokens, mask), CLIP)


NORMS = [
    ("llama", "LlamaRMSNorm"), ("mistral", "MistralRMSNorm"), ("qwen2", "Qwen2RMSNorm"),
    ("gemma", "GemmaRMSNorm"), ("gemma2", "Gemma2RMSNorm"), ("gemma3", "Gemma3RMSNorm"),
    ("olmo2", "Olmo2RMSNorm"), ("gpt_oss", "GptOssRMSNorm"), ("t5", "T5LayerNorm"),
    ("mt5", "MT5LayerNorm"), ("phi3", "Phi3RMSNorm"), ("mixtral", "MixtralRMSNorm"),
]  # fmt: skip


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("module", "name"), NORMS)
def test_a_known_norm_computes_what_its_class_does(
    module: str, name: str, kind: torch.dtype
) -> None:
    home = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    norm = getattr(home, name)(WIDTH, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    norm = norm.to(kind)
    x = (torch.randn(4, 3, WIDTH) * 2).to(kind)
    tracked = track(norm).module
    assert isinstance(tracked, Leaf)
    assert tracked(x).dtype == norm(x).dtype
    assert torch.equal(tracked(x), norm(x))


def adapted(name: str, targets: list[str], **options: Any) -> Any:
    """A tiny model with LoRA on its `targets`, adapters far enough from zero to matter."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = {"r": 2, "target_modules": targets, "init_lora_weights": False} | options
    return peft.get_peft_model(build(name), peft.LoraConfig(**settings)).double().train()


ADAPTED = [
    ("bert", ["query", "value"], {}),
    ("gpt2", ["c_attn"], {"fan_in_fan_out": True}),
    ("llama", ["q_proj", "v_proj"], {"use_rslora": True}),
    ("bert_classifier", ["query", "value"], {"task_type": "SEQ_CLS"}),
]


@pytest.mark.parametrize(("name", "targets", "options"), ADAPTED)
def test_only_adapters_are_tracked_and_equal_the_loop(
    name: str, targets: list[str], options: dict[str, Any]
) -> None:
    model = adapted(name, targets, **options)
    together = group(model, 3)
    head = {n for n in together.parameters if "classifier" in n}
    assert bool(head) == ("task_type" in options)
    assert all("lora_" in n for n in together.parameters.keys() - head)
    leaves = [n for n, m in together.module.named_modules() if isinstance(m, Leaf)]
    assert all("lora_" in n or "classifier" in n for n in leaves)
    for path, frozen in model.named_parameters():
        if not frozen.requires_grad:
            assert together.module.get_parameter(path) is frozen
    matches_the_loop(model, 1e-5 if name in ROUNDED else 3e-6)
    groups_match_lone_models(model)


def test_lora_dropout_is_a_rows_own() -> None:
    model = adapted("bert", ["query"], lora_dropout=0.5)
    tokens, mask = batch()
    tracked = track(model)
    seeds = torch.arange(ROWS)

    def run(rows: slice) -> Tensor:
        tracked.tape.row_seeds = seeds[rows]
        return losses(tracked.module, tokens[rows], mask[rows])

    together = run(slice(None))
    for row in range(ROWS):
        assert torch.allclose(run(slice(row, row + 1))[0], together[row])
    tracked.tape.row_seeds = seeds + ROWS
    assert not torch.allclose(losses(tracked.module, tokens, mask), together)


def test_adapters_of_an_embedding_are_refused_with_a_remedy() -> None:
    model = adapted("bert", ["word_embeddings"])
    with pytest.raises(UnsupportedLayer, match="lora_embedding_A.*target_modules"):
        track(model)
