"""The papers' experiments: what their data say, that the base learns, and that every grid can be run."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, inject, merge, save_adapter
from lightning_peft.cli import command_line, main
from lightning_peft.cli.compare import check
from lightning_peft.comparison.cells import Cell, cells
from lightning_peft.comparison.grid import read_grid
from lightning_peft.tasks.answers.last_number import last_number
from lightning_peft.tasks.answers.logical_form import logical_form
from lightning_peft.tasks.batches.layouts import conversation
from lightning_peft.tasks.batches.records import Record

PAPERS = Path(__file__).resolve().parents[2] / "examples" / "papers"
sys.path.insert(0, str(PAPERS))

import base_model  # noqa: E402
import make_data  # noqa: E402
import subspaces  # noqa: E402
from entailment import ACTS  # noqa: E402

TASKS = ("sql", "entailment", "entailment_pairs", "dialogues", "arithmetic")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data.make_all(folder, train=300, held_out=60, seed=0)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_parts_are_disjoint_and_can_be_read(data: Path, task: str) -> None:
    parts = [rows(data / task / f"{name}.jsonl") for name in ("train", "val", "test")]
    assert list(map(len, parts)) == [300, 60, 60]
    everything = [json.dumps(row) for part in parts for row in part]
    assert len(set(everything)) == 420
    if task != "entailment_pairs":
        found = [conversation(Record("f:1", row)) for row in parts[0]]
        assert all(turns.expected for turns in found)
        if task in ("sql", "arithmetic"):
            judged = logical_form if task == "sql" else last_number
            assert all(judged(turns.expected) is not None for turns in found)


def test_labels_follow_from_the_premise_alone(data: Path) -> None:
    pairs = rows(data / "entailment_pairs" / "train.jsonl")
    plain = {act: third for third, act in ACTS}
    for pair in pairs:
        rule, fact = pair["premise"].rstrip(".").split(". ")
        quantifier, job, city, act = re.fullmatch(r"(\w+) (\w+) in (\w+) (.+)", rule).groups()  # type: ignore[union-attr]
        name, their_job, their_city = re.fullmatch(r"(\w+) is a (\w+) in (\w+)", fact).groups()  # type: ignore[union-attr]
        said = pair["hypothesis"].removesuffix(".").removeprefix(f"{name} ")
        negated = said.startswith("does not ")
        their_act = plain[said.removeprefix("does not ")] if negated else said
        applies = (job, city, act) == (their_job, their_city, their_act) and quantifier != "Some"
        label = ("neutral", "entailment", "contradiction")[applies * (1 + ((quantifier == "Every") == negated))]
        assert pair["label"] == label, pair
    # Neither text alone tells it.
    for label in ("entailment", "neutral", "contradiction"):
        of_label = [pair for pair in pairs if pair["label"] == label]
        assert len(of_label) > 70
        assert 0.3 < sum("not" in pair["hypothesis"] for pair in of_label) / len(of_label) < 0.7


def test_the_working_of_problems_is_right(data: Path) -> None:
    for problem in rows(data / "arithmetic" / "train.jsonl"):
        working, answer = problem["answer"].split("\n#### ")
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", working)
        assert len(steps) == 2
        for a, sign, b, result in steps:
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0
        assert all(before[3] == after[0] for before, after in pairwise(steps))
        assert steps[0][0] == re.search(r"has (\d+)", problem["question"])[1]  # type: ignore[index]
        assert steps[-1][3] == answer


def test_summaries_say_what_was_agreed_on_last(data: Path) -> None:
    for row in rows(data / "dialogues" / "train.jsonl"):
        place, day, hour = re.search(r"go to the (\w+) on (\w+) at (\d+)\.", row["summary"]).groups()  # type: ignore[union-attr]
        found = [
            re.findall(pattern, row["dialogue"]) for pattern in (r"the (\w+)", r"(?:on|about) (\w+day)", r"at (\d+)")
        ]
        assert [values[-1] for values in found] == [place, day, hour]


def test_facts_are_looked_up_and_no_question_of_the_test_is_trained_on(data: Path) -> None:
    files = {path.stem: rows(path) for path in (data / "facts").glob("*.jsonl")}
    assert {name: len(found) for name, found in files.items()} == {
        **{"heart": 48, "rephrased": 144, "reading": 288},
        **dict.fromkeys(("val", "val_looked_up", "test", "test_looked_up"), 48),
    }
    trained = {row["prompt"] for name in ("heart", "rephrased", "reading") for row in files[name]}
    for plain, looked_up in zip(files["test"], files["test_looked_up"], strict=True):
        sentence, question = looked_up["prompt"].split("\n", 1)
        assert (question, looked_up["answer"]) == (plain["prompt"], plain["answer"])
        assert sentence.endswith(f" is {plain['answer']}.")
        assert not {question, looked_up["prompt"]} & trained
        assert not any(prompt.endswith(question) for prompt in trained)


def test_the_base_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = base_model.make_tokenizer(0)
    assert tokenizer.decode(tokenizer("Eve has 12 books.")["input_ids"]) == "Eve has 12 books."
    assert len(tokenizer(" 1999")["input_ids"]) == 5  # digit by digit
    model = base_model.make_model(len(tokenizer))
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    ids = next(base_model.batches(tokenizer, 0, 4, 32))
    assert ids.shape == (4, 32)
    before = model(input_ids=ids, labels=ids).loss.item()
    base_model.train(model, base_model.batches(tokenizer, 0, 4, 32), steps=40, lr=3e-3)
    assert model(input_ids=ids, labels=ids).loss.item() < before - 0.5


def test_the_base_has_seen_every_token_of_the_answers(data: Path) -> None:
    """Its output layer stays frozen beside most adapters, and a token that it was never to produce stays unlikely."""
    tokenizer = base_model.make_tokenizer(0)
    source = base_model.texts(1)
    seen = Counter(token for _ in range(4000) for token in tokenizer(next(source))["input_ids"])
    for task in ("sql", "entailment", "dialogues", "arithmetic"):
        for row in rows(data / task / "val.jsonl"):
            answer = conversation(Record("f:1", row)).messages[-1]["content"]
            rare = [tokenizer.decode([i]) for i in tokenizer(f" {answer}")["input_ids"] if not seen[i]]
            assert not rare, (answer, rare)


GRIDS = sorted((PAPERS / "grids").glob("*.yaml"))


def covering(found: list[Cell]) -> list[Cell]:
    """As few cells as have every value of every axis, each with one candidate: others differ in a number."""
    chosen, seen = list[Cell](), set[tuple[str, str]]()
    for cell in found:
        if new := set(cell.labels.items()) - seen:
            chosen.append(replace(cell, candidates=dict(list(cell.candidates.items())[-1:])))
            seen |= new
    return chosen


@pytest.fixture(scope="module")
def parse() -> Any:
    """What `lightning-peft compare` parses the configs of runs with."""
    found: list[Any] = []

    def instead(parse: Any, grid: str) -> None:
        found.append(parse)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "compare", instead)
        with pytest.raises(SystemExit):
            main(["compare", "grid.yaml"])
    return found[0]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_grid_can_be_run(path: Path, parse: Any) -> None:
    """Up to the models and the data, which are not there: every value of every axis is parsed as a run parses it."""
    grid = read_grid(path)
    found = cells(grid)
    check(parse, grid, covering(found))
    assert str(grid.out) == f"runs/papers/{path.stem}"
    assert f"lightning-peft compare examples/papers/grids/{path.name}" in (PAPERS / "README.md").read_text()


def test_subspaces_are_those_of_the_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    base.save_pretrained(tmp_path / "base")
    query, found = "model.layers.0.self_attn.q_proj.weight", {}
    for rank, seed in ((4, 0), (8, 0), (8, 1), (64, 0), (64, 1)):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        inject(model, LoRA(r=rank, target_modules=["q_proj", "v_proj"]))
        torch.manual_seed(100 * rank + seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        save_adapter(model, tmp_path / "runs" / f"q_v_rank={rank}_lr=0.01_seed={seed}-x" / "trained")
        merge(model, unload=True)
        found[rank, seed] = (model.get_parameter(query) - base.get_parameter(query)).detach().double()
    monkeypatch.setattr(sys, "argv", ["subspaces.py", str(tmp_path), "--base", str(tmp_path / "base")])
    subspaces.main()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    of_random = next(line for line in lines if line[0] == "random")
    assert [float(cell) for cell in of_random[-4:]] == [pytest.approx(i / 64, abs=0.006) for i in (1, 8, 4, 8)]
    left, _, right = torch.linalg.svd(found[4, 0])
    inside = left[:, :4].T @ base.get_parameter(query).detach().double() @ right[:4].T
    table = next(line for line in lines if line[:2] == ["q_proj", "4"])
    assert float(table[-2]) == pytest.approx(float(found[4, 0].norm() / inside.norm()), abs=0.02)
    own = torch.linalg.svd(base.get_parameter(query).detach().double())[2]
    assert float(table[-1]) == pytest.approx(float((own[:6] @ right[:4].T).norm() ** 2 / 4), abs=0.006)
    (first, second) = (torch.linalg.svd(found[8, seed])[2] for seed in (0, 1))
    pair = next(line for line in lines if line[:4] == ["of ΔW", "q_proj", "8, 0", "8, 1"])
    assert float(pair[4]) == pytest.approx(float(first[0] @ second[0]) ** 2, abs=0.006)
    assert float(pair[-1]) == pytest.approx(float((first[:8] @ second[:8].T).norm() ** 2 / 8), abs=0.006)
