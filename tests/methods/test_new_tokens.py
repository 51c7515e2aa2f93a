"""New tokens: what a model with a grown vocabulary learns, where it is written, and what is refused."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build, outputs
from safetensors.torch import load_file
from strangers import unsealed
from torch import Tensor, nn

from lightning_peft import (
    LoRA,
    NewTokens,
    PEFTError,
    adapter_state_dict,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from lightning_peft.core.view import ModelView
from lightning_peft.storage.plain import unmerged_state_dict

TIED = "gpt2"


def grown(family: str) -> nn.Module:
    """A model with two tokens more than its vocabulary had."""
    model = build(family)[0]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model.resize_token_embeddings(52, mean_resizing=False)
    return model.double()


def shift(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[3, 51, 9, 50, 51, 8]])}


@pytest.mark.parametrize("family", ["llama", TIED, "gemma3"])
def test_the_rows_and_a_tied_head_see_them(family: str) -> None:
    """Against a copy of the model with the rows written into its weight by hand."""
    model = grown(family)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family != "llama")
    before = outputs(model, ids())
    assert inject(model, NewTokens(token_indices=[50, -1])) != []
    assert torch.equal(outputs(model, ids()), before)
    shift(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [tuple(p.shape) for p in parameters.values()] == [(2, 32)]
    rows = next(iter(parameters.values())).detach()
    by_hand = grown(family)
    with torch.no_grad():
        by_hand.get_input_embeddings().weight[50:] = rows
    expected = outputs(by_hand, ids())
    assert (outputs(model, ids()) - expected).abs().max() <= 1e-12
    # A text without the new tokens: a tied head gives them other logits, and nothing else changes.
    first = {"input_ids": torch.tensor([[3]])}
    changed = (outputs(model, first) != outputs(grown(family), first))[0, 0].nonzero().flatten().tolist()
    assert changed == ([50, 51] if tied else [])

    merge(model)
    assert (outputs(model, ids()) - expected).abs().max() <= 1e-12
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.tie_word_embeddings == grown(family).config.tie_word_embeddings
    assert torch.equal(model.get_input_embeddings().weight, by_hand.get_input_embeddings().weight)
    for name, tensor in unmerged_state_dict(dict(model.state_dict()), ModelView(model)).items():
        assert ".peft." in name or torch.equal(tensor, grown(family).state_dict()[name]), name
    unmerge(model)
    assert (outputs(model, ids()) - expected).abs().max() <= 1e-12
    eject(model)
    assert torch.equal(outputs(model, ids()), before)
    assert torch.equal(model.get_input_embeddings().weight, grown(family).get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", TIED])
def test_files_hold_the_rows_alone(family: str, tmp_path: Path) -> None:
    """HF PEFT reads and scores them alike, onto new rows of other values."""
    model = grown(family)
    inject(model, NewTokens(token_indices=[50, 51]))
    shift(model)
    expected = outputs(model, ids())
    save_adapter(model, tmp_path / "adapter")
    assert [tuple(t.shape) for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()] == [(2, 32)]
    other = grown(family)
    with torch.no_grad():
        other.get_input_embeddings().weight[50:] = 7.0
    judge = peft.PeftModel.from_pretrained(other, tmp_path / "adapter", autocast_adapter_dtype=False).eval()
    again = grown(family)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(outputs(again, ids()), expected)
    assert (outputs(judge, ids()) - expected).abs().max() <= 1e-9


def test_beside_lora(tmp_path: Path) -> None:
    methods = [LoRA(r=2, target_modules=["c_attn"]), NewTokens(token_indices=[50, 51])]
    model = grown(TIED)
    inject(model, methods)
    shift(model)
    expected = outputs(model, ids())
    assert len([n for n in adapter_state_dict(model) if "trainable_tokens" in n]) == 1
    save_adapter(model, tmp_path / "adapter")
    again = grown(TIED)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(outputs(again, ids()), expected)
    merge(again, unload=True)
    assert (outputs(again, ids()) - expected).abs().max() <= 1e-12
    assert again.lm_head.weight is again.transformer.wte.weight
    with pytest.raises(PEFTError, match=r"would both adapt 'model\.embed_tokens'"):
        inject(grown("llama"), [LoRA(r=2, target_modules=["embed_tokens"]), NewTokens()])


def test_in_bfloat16_the_base_is_left_as_it_is() -> None:
    model = grown(TIED).bfloat16()
    before = outputs(model, ids())
    inject(model, NewTokens(token_indices=[50, 51]))
    assert torch.equal(outputs(model, ids()), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_indices": []}, "at least one token"),
        ({"token_indices": [3, 3]}, "each of them once"),
        ({"token_indices": [1.5]}, "a list of whole numbers"),
        ({"token_indices": "new"}, "a list of whole numbers"),
        ({"token_indices": [True]}, "a list of whole numbers"),
        ({"token_indices": [50]}, r"has 50, but 'transformer\.wte' has 50 rows\. Resize"),
        ({"token_indices": [-51]}, "has -51, but"),
        ({"token_indices": [49, -1]}, r"names a row of 'transformer\.wte' twice"),
        ({"target_modules": ["c_attn"]}, "only modules that cannot be adapted"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PEFTError, match=message):
        inject(build(TIED)[0], NewTokens(**options))


def test_embeddings_that_cannot_be_served() -> None:
    with pytest.raises(PEFTError, match=r"max_norm=1\.0, which rewrites its weight"):
        inject(nn.Sequential(nn.Embedding(4, 3, max_norm=1.0)), NewTokens(target_modules=["0"]))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Embedding(4, 3))
    inject(empty, NewTokens(target_modules=["0"]))
    with pytest.raises(PEFTError, match="Load the model's weights before injecting"):
        empty[0].peft["default"].to_empty(device="cpu").reset_parameters()

    class Other(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

    model = nn.Sequential(nn.Embedding(4, 3))
    model.append(Other(model[0].weight))
    with pytest.raises(PEFTError, match="'1', a Other, shares the weight of '0'"):
        inject(model, NewTokens(target_modules=["0"]))


def test_damaged_files(tmp_path: Path) -> None:
    model = grown("llama")
    inject(model, NewTokens(token_indices=[50, 51]))
    save_adapter(model, tmp_path / "adapter")
    file = unsealed(tmp_path / "adapter") / "adapter_config.json"
    written = file.read_text()
    for wrong in ("[\n    50\n  ]", "null"):
        head, _, tail = written.partition("[\n    50,\n    51\n  ]")
        assert tail
        file.write_text(head + wrong + tail)
        with pytest.raises(PEFTError, match=r"the rows of 'model\.embed_tokens' have the shape \[2, 32\]"):
            load_adapter(grown("llama"), tmp_path / "adapter")
