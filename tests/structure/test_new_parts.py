"""Which parts of a model are new: transformers' own report of what it loaded is the judge."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from lightning_peft.core.view import ModelView
from lightning_peft.structure.new_parts import heads, last_layer, new_parts, new_rows, parts_beside

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    t.BertForMaskedLM(t.BertConfig(**SMALL)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    t.LlamaForCausalLM(t.LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(path)
    return path


KINDS = {
    "BertModel": ["pooler"],
    "BertForMaskedLM": [],
    "BertForSequenceClassification": ["bert.pooler", "classifier"],
    "BertForTokenClassification": ["classifier"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_did_not_load_is_new(kind: str, bert: Path) -> None:
    model, info = getattr(t, kind).from_pretrained(bert, output_loading_info=True)
    parts = new_parts(ModelView(model))
    inside = {name for part in parts for name, _ in model.named_parameters() if name.startswith(f"{part}.")}
    assert inside == set(info["missing_keys"])
    assert parts == KINDS[kind]


def test_a_tied_head_was_loaded(llama: Path) -> None:
    assert new_parts(ModelView(t.LlamaForCausalLM.from_pretrained(llama))) == []


def test_a_head_that_was_put_in_place_of_another_is_new(bert: Path) -> None:
    model = t.BertForTokenClassification.from_pretrained(bert)
    model.classifier.load_state_dict(model.classifier.state_dict())
    model.save_pretrained(bert.parent / "tuned")
    tuned = t.BertForTokenClassification.from_pretrained(bert.parent / "tuned")
    assert new_parts(ModelView(tuned)) == []
    tuned.classifier = nn.Linear(16, 5)
    assert new_parts(ModelView(nn.ModuleDict({"model": tuned.to(torch.bfloat16)}))) == ["model.classifier"]


def test_a_model_from_a_configuration_has_no_new_parts(bert: Path) -> None:
    made = t.BertForSequenceClassification(t.BertConfig(**SMALL))
    assert new_parts(ModelView(made)) == []
    beside = nn.ModuleDict({"made": made, "loaded": t.BertForTokenClassification.from_pretrained(bert)})
    assert new_parts(ModelView(beside)) == ["loaded.classifier"]


def test_heads(bert: Path, llama: Path) -> None:
    for model, expected in (
        (t.BertForSequenceClassification.from_pretrained(bert), ["classifier"]),
        (t.LlamaForSequenceClassification.from_pretrained(llama), ["score"]),
        (t.RobertaForSequenceClassification(t.RobertaConfig(**SMALL)), ["classifier"]),
        (
            t.DistilBertForSequenceClassification(t.DistilBertConfig(dim=16, hidden_dim=16, n_layers=1, n_heads=2)),
            ["pre_classifier", "classifier"],
        ),
        (t.BertModel.from_pretrained(bert), []),
    ):
        assert heads(ModelView(model)) == expected


def test_parts_beside_what_was_loaded(bert: Path) -> None:
    def module(encoder: nn.Module) -> nn.Module:
        return nn.ModuleDict({"encoder": encoder, "head": nn.Sequential(nn.ReLU(), nn.Linear(16, 2)), "act": nn.ReLU()})

    assert parts_beside(ModelView(module(t.BertModel.from_pretrained(bert)))) == ["head"]
    assert parts_beside(ModelView(module(t.BertModel(t.BertConfig(**SMALL))))) == []
    assert parts_beside(ModelView(t.BertModel.from_pretrained(bert))) == []


@pytest.mark.parametrize("mean_resizing", [True, False])
def test_rows_of_an_enlarged_vocabulary(llama: Path, mean_resizing: bool) -> None:
    model = t.LlamaForCausalLM.from_pretrained(llama)
    assert new_rows(ModelView(model)) == {}
    model.resize_token_embeddings(23, mean_resizing=mean_resizing)
    view = ModelView(nn.ModuleDict({"model": model}))
    assert new_rows(view) == {"model.model.embed_tokens": (20, 23), "model.lm_head": (20, 23)}
    assert new_parts(view) == []


def test_a_vocabulary_whose_files_are_gone_is_not_known(tmp_path: Path) -> None:
    t.BertModel(t.BertConfig(**SMALL)).save_pretrained(tmp_path / "a")
    model = t.BertModel.from_pretrained(tmp_path / "a")
    model.resize_token_embeddings(30)
    (tmp_path / "a").rename(tmp_path / "b")
    assert new_rows(ModelView(model)) == {}


def test_last_layer(bert: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 2, 1), nn.BatchNorm1d(2))
    assert last_layer(ModelView(net)) == "1"
    assert last_layer(ModelView(nn.Sequential(nn.ReLU()))) is None
    assert last_layer(ModelView(t.BertModel.from_pretrained(bert))) is None
