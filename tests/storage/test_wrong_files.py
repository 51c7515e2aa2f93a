"""What is wrong with the files of an adapter is said: where, what was expected, and that nothing was loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from families import build
from hostile import CONFIG, MARKER, TENSORS, changed, put, seed, written
from safetensors.torch import load, save

from lightning_peft import PEFTError, load_adapter


def without(*keys: str) -> Callable[[dict[str, Any]], Any]:
    """Leave out of an object what ends in one of ``keys``."""
    return lambda content: {key: value for key, value in content.items() if not key.endswith(keys)}


# Of a method, the file that is changed, how, and what is said.
WRONG: dict[str, tuple[str, str, Callable[[Any], Any], str]] = {
    "no rank": ("lora", CONFIG, without("r"), r"has r=None; a number was expected"),
    "no alpha": ("loha", CONFIG, without("alpha"), r"has alpha=None; a number was expected"),
    "a rank of another size": ("lora", CONFIG, put("r", value=3), r"has the shape \(2, \d+\); rank 3 .* make"),
    "biases of another kind": ("lora", CONFIG, put("bias", value="some"), r"bias='some'; 'none', 'all' or 'lora_only'"),
    "another type": ("lora", CONFIG, put("peft_type", value="XLORA"), r"of type 'XLORA'; .*LORA.* can be read"),
    "half a switch": ("lokr", CONFIG, put("decompose_both", value=None), r"decompose_both=None; true or false was"),
    "a rank of nothing": ("lokr", CONFIG, put("r", value=0), r"r=0 was given; a rank is a whole number"),
    "an alpha of nothing": ("loha", CONFIG, put("alpha", value=0), r"alpha=0 was given; alpha is a positive number"),
    "no rank of projections": ("vera", CONFIG, without("r"), r"has r=None; a whole number was expected"),
    "a dropout of two": ("vera", CONFIG, put("vera_dropout", value=2), r"dropout=2 was given; it is a probability"),
    "more tokens than rows": ("prompt", CONFIG, put("num_virtual_tokens", value=9), r"shape \[3, 32\]; one with a row"),
    "rows that are not there": ("lora", CONFIG, put("trainable_token_indices", value=[1]), r"trains rows of .*embed"),
    "a part that is not there": ("lora", MARKER, put("parts", value=["x"]), r"an adapter for 'x'; the model has no"),
    "one factor": ("lora", TENSORS, without("0.self_attn.q_proj.lora_A.weight"), r"q_proj' has lora_B\.weight alone"),
    "half a product": ("loha", TENSORS, without("1.mlp.down_proj.hada_w1_a"), r"down_proj' has hada_w1_b, .* alone"),
    "no projections": ("vera", TENSORS, without("vera_A"), r"lacks the projections that its configuration speaks of"),
    "no tensors": ("lora", TENSORS, lambda _: {}, r"holds no LORA tensors"),
    "no tensors of ours": ("series", TENSORS, lambda _: {}, r"does not fit this model's adapters\. Missing: "),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_it_is_said_and_nothing_is_loaded(kind: str, tmp_path: Path) -> None:
    name, file, change, words = WRONG[kind]
    if file == TENSORS:
        files = {**seed(name), file: save(change(load(seed(name)[file])))}
    else:
        files = changed(name, file, change)
    model, _ = build("llama")
    before = list(model.state_dict())
    with pytest.raises(PEFTError, match=words):
        load_adapter(model, written(tmp_path / "it", files))
    assert list(model.state_dict()) == before


def test_which_of_two_models_is_meant_is_not_guessed(tmp_path: Path) -> None:
    module = L.LightningModule()
    module.one, module.two = build("llama")[0], build("llama")[0]
    files = {name: content for name, content in seed("lora").items() if name != MARKER}
    with pytest.raises(
        PEFTError, match=r"LightningModule holds 2 transformers models.*load_adapter\(module\.model, path\)"
    ):
        load_adapter(module, written(tmp_path / "it", files))
    load_adapter(module.two, tmp_path / "it")
    assert not any(".peft." in name for name in module.one.state_dict())


def test_embeddings_of_another_base_are_not_loaded(tmp_path: Path) -> None:
    """HF PEFT writes them beside an adapter when it thinks that the vocabulary has changed."""
    tensors = load(seed("lora")[TENSORS])
    model, _ = build("llama")
    copied = "base_model.model.model.embed_tokens.weight"
    own = model.get_input_embeddings().weight.detach()

    def files(rows: Any) -> Path:
        return written(tmp_path / "it", {**seed("lora"), TENSORS: save({**tensors, copied: rows.contiguous()})})

    for rows in (own + 1, own[:-1]):
        with pytest.raises(
            PEFTError, match=r"brings its own model\.embed_tokens\.weight .* Resize the model's embeddings"
        ):
            load_adapter(model, files(rows))
    load_adapter(model, files(own))
