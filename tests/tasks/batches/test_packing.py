"""Examples that share a row: as good as alone, judged by the same examples in rows of their own."""

from itertools import chain
from typing import Any

import pytest
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as some

from lightning_peft.adapters.virtual_tokens.infix import IGNORED
from lightning_peft.tasks.answers.answer_loss import answer_logits, packing_error
from lightning_peft.tasks.batches.encoding import Example, collate
from lightning_peft.tasks.batches.packing import collate_packed, pack

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GQA = {**SMALL, "num_key_value_heads": 2}
KEEP_APART = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GQA)),
    "llama, eager": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GQA, attn_implementation="eager")),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)),
    "mistral, window": lambda: t.MistralForCausalLM(t.MistralConfig(**GQA, sliding_window=4)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GQA, head_dim=8, sliding_window=4)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GQA, head_dim=8)),
}
MIX = {
    "mamba": lambda: t.MambaForCausalLM(
        t.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)),
}


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length, prompt in ((9, 4), (7, 3), (5, 2), (3, 1), (6, 3)):
        ids = torch.randint(1, 99, (length,), generator=generator).tolist()
        found.append(Example(ids, [IGNORED] * prompt + ids[prompt:], ids[:prompt], ""))
    return found


@settings(deadline=None, database=None)
@given(some.lists(some.integers(1, 50), max_size=60))
def test_every_example_has_one_place_and_rows_are_full(lengths: list[int]) -> None:
    rows = pack(lengths, 50)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in row) for row in rows]
    assert all(size <= 50 for size in sizes)
    # At most 11/9 of the fewest rows and four (Johnson et al. 1974); fewer than all tokens take are impossible.
    assert len(rows) <= 11 / 9 * max(1, 2 * sum(lengths) / 50) + 4
    # No two rows fit into one: else the shorter one's examples had been put into the other.
    assert all(a + b > 50 for i, a in enumerate(sizes) for b in sizes[:i])


@pytest.mark.parametrize("family", KEEP_APART)
def test_losses_and_gradients_are_those_of_rows_of_their_own(family: str) -> None:
    torch.manual_seed(0)
    model = KEEP_APART[family]()
    model.eval()  # GPT-2's dropout
    alone, rows = examples(), [[examples()[i] for i in row] for row in pack([len(e.ids) for e in examples()], 16)]
    assert [len(row) for row in rows] == [2, 3]

    def step(batch: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logits, targets = answer_logits(
            model, batch["input_ids"], batch.get("attention_mask"), batch["labels"], batch.get("position_ids")
        )
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        loss.backward()
        return loss, [p.grad for p in model.parameters() if p.grad is not None]

    expected, gradients = step(collate(alone, 0))
    packed = collate_packed(rows, 0)
    loss, found = step(packed)
    assert packed["input_ids"].shape == (2, 16)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-5)
    error, rounding = packing_error(model, packed["input_ids"], packed["position_ids"], packed["labels"])
    assert error < rounding / 10


@pytest.mark.parametrize("family", MIX)
def test_a_model_that_mixes_them_is_found_out(family: str) -> None:
    torch.manual_seed(0)
    model = MIX[family]()
    batch = collate_packed([examples()], 0)
    error, rounding = packing_error(model, batch["input_ids"], batch["position_ids"], batch["labels"])
    assert error > 3 * rounding
