"""Model cards: a README.md that a model hub reads beside an adapter, and people too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import read_json, read_shapes

CARD_FILE = "README.md"

_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}
_PACKAGES = ("lightning_peft", "torch", "lightning", "transformers")
_SHOWN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "modules_to_save")
_GIVEN = ("data", "metrics")


def write_card(directory: Path, config_file: str, tensor_file: str, given: Mapping[str, Any]) -> None:
    """Write a card for the adapter in ``directory``.

    Args:
        directory: The adapter's.
        config_file: Name of its configuration.
        tensor_file: Name of the file with its tensors.
        given: What the files do not tell: ``data``, the name of a data set or several; ``metrics``, values by name.

    Raises:
        PEFTError: Something else is given.
    """
    if unknown := sorted(given.keys() - set(_GIVEN)):
        raise PEFTError(f"A card was given {unknown[0]!r}; it takes {' and '.join(map(repr, _GIVEN))}.")
    config, shapes = read_json(directory / config_file), read_shapes(directory / tensor_file)
    data = [given["data"]] if isinstance(given.get("data"), str) else list(given.get("data") or ())
    header = _header(config, data)
    rows = {
        "base": config.get("base_model_name_or_path") or "not named",
        **({"revision of the base": config["revision"]} if config.get("revision") else {}),
        "method": config.get("peft_type"),
        **{key: config[key] for key in _SHOWN if config.get(key) not in (None, False, {}, [])},
        "parameters": f"{sum(map(prod, shapes.values())):,} in {len(shapes)} tensors",
        **({"data": ", ".join(map(str, data))} if data else {}),
        **dict(given.get("metrics") or {}),
        "versions": ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name))),
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    text = f"---\n{front}\n---\n\n# Adapter\n\n| | |\n|---|---|\n{table}\n\n{_usage(header['library_name'])}"
    (directory / CARD_FILE).write_text(text, encoding="utf-8")


def _header(config: Mapping[str, Any], data: list[Any]) -> dict[str, Any]:
    kind, base = str(config.get("peft_type")), config.get("base_model_name_or_path")
    header: dict[str, Any] = {
        "library_name": "lightning_peft" if kind == "LIGHTNING_PEFT" else "peft",
        "tags": ["lightning_peft", kind.lower()],
    }
    # A hub links the names of its models; a path on somebody's disk is none.
    if isinstance(base, str) and base.count("/") == 1 and not base.startswith((".", "/")):
        header["base_model"] = base
    if (task := config.get("task_type")) in _PIPELINES:
        header["pipeline_tag"] = _PIPELINES[task]
    if data:
        header["datasets"] = data
    return header


def _usage(library: str) -> str:
    lines = (
        ["from peft import PeftModel", 'model = PeftModel.from_pretrained(base, "this directory")']
        if library == "peft"
        else ["from lightning_peft import load_adapter", 'load_adapter(model, "this directory")']
    )
    return "\n".join(["```python", *lines, "```", ""])


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
