"""The commands of ``lightning-peft`` about adapters: showing one, and what the others find of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from json import dumps
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers

from lightning_peft.core.schema import fits
from lightning_peft.errors import PEFTError
from lightning_peft.files.contents import as_path, read_shapes
from lightning_peft.files.others import refuse_other_tools
from lightning_peft.formats import own
from lightning_peft.formats.configuration import read_config, read_marker
from lightning_peft.formats.content import CONFIG_FILE, TENSOR_FILE
from lightning_peft.storage.checkpoint import KEY, checkpoint_metadata
from lightning_peft.storage.readable import TRAINER_STATE, check_sums, reading
from lightning_peft.storage.saving import BESIDE_FILE
from lightning_peft.tasks.pretrained.loading import own_class

# HF PEFT's task types, for adapters that do not say what class their base is.
_TASK_CLASSES = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
}

_Row = tuple[str, str]
_SEVERAL = ("method", "monitored", "to resume")


def inspect(path: str, json: bool = False) -> None:
    """Show what an adapter directory or a checkpoint holds.

    Args:
        path: An adapter directory, of this package or of Hugging Face PEFT, or a Lightning checkpoint (.ckpt).
        json: Print JSON, for programs.

    Raises:
        PEFTError: It is neither, or damaged.
    """
    show = _show_json if json else _show
    place = as_path(path)
    if not (place.is_dir() or place.is_file()):
        reason = "is neither a file nor a directory" if place.exists() else "does not exist"
        raise PEFTError(f"{path} {reason}: expected an adapter directory or a .ckpt file.")
    refuse_other_tools(place)
    if place.is_dir():
        directories = sorted(file.parent for file in place.rglob(CONFIG_FILE))
        if not directories:
            what = "is a whole model" if (place / "config.json").is_file() else f"holds no {CONFIG_FILE}"
            raise PEFTError(f"{path} {what}: expected an adapter directory or a .ckpt file.")
        for directory in directories:
            show(str(directory), _describe_directory(directory))
    else:
        show(path, _describe_checkpoint(place))


def refuse_place(source: Path, out: Path) -> None:
    """Raise :class:`PEFTError` if writing ``out`` would replace what is read."""
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise PEFTError(f"out={str(out)!r} would replace the adapter {source} itself. Choose another directory.")


def _show(title: str, rows: Iterable[_Row]) -> None:
    print(_printable(title))
    for key, value in rows:
        print(f"  {key:<12} {_printable(str(value))}")


def _printable(text: str) -> str:
    """Return ``text``, which a stranger may have written, without what a terminal would obey or not take."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _show_json(title: str, rows: Iterable[_Row]) -> None:
    """Print an object in a line; what a row may be there several times for is a list."""
    content: dict[str, Any] = {"path": title}
    for key, value in rows:
        content[key] = [*content.get(key, []), value] if key in _SEVERAL else value
    directory = Path(title)
    if directory.is_dir():
        config = read_config(directory)
        content |= {"config": config, "shapes": read_shapes(directory / TENSOR_FILE), "base": _recorded_base(directory)}
    print(dumps(content))


def _describe_directory(directory: Path) -> list[_Row]:
    config, tensors = read_config(directory), directory / TENSOR_FILE
    shapes = read_shapes(tensors)
    keys = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "alora_invocation_tokens")
    if config.get("peft_type") == own.PEFT_TYPE:
        kind = "adapter in lightning_peft's own format"
        methods = [("method", " ".join([name, *_settings(settings)])) for name, settings in _own_methods(config)]
        whole = config.get("train_also")
    else:
        kind = "adapter in the format of Hugging Face PEFT"
        settings = _settings({key: config.get(key) for key in keys})
        methods = [
            ("method", " ".join([str(config.get("peft_type")), *settings])),
            ("targets", _listed(config.get("target_modules"))),
        ]
        whole = config.get("modules_to_save")
    beside = directory / BESIDE_FILE
    return [
        ("kind", kind),
        *_base_row({**_recorded_base(directory), "name_or_path": _named(config)}),
        *methods,
        *([("trained whole", _listed(whole))] if whole else []),
        *([("beside it", _listed(sorted(read_shapes(beside))))] if beside.is_file() else []),
        ("tensors", _size(shapes.values(), tensors.stat().st_size)),
        *_progress_of_directory(directory),
        *(("to resume", f"{file.name} has {file.stat().st_size:,} bytes") for file in directory.glob("*.ckpt")),
    ]


def _own_methods(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for method in config.get("methods") or ():
        if isinstance(method, dict):
            yield str(method.get("method")), {key: value for key, value in method.items() if key != "method"}


def _describe_checkpoint(file: Path) -> list[_Row]:
    with reading(file):
        check_sums(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise PEFTError(f"{file} is no Lightning checkpoint: it has no state_dict.")
    saved = checkpoint_metadata(checkpoint) if KEY in checkpoint else None
    rows = [("kind", f"Lightning checkpoint, {_content(saved)}")]
    for prefix, injection in saved["injections"].items() if saved else ():
        rows += _base_row(injection["base"])
        for name, method in [(name, method) for name, all_ in injection["adapters"].items() for method in all_]:
            settings = {key: value for key, value in method.items() if key != "method"}
            label = name if not prefix else f"{name} in {prefix}"
            rows.append(("method", " ".join([f"{method.get('method')} ({label})", *_settings(settings)])))
        if injection["train_also"]:
            rows.append(("trained whole", _listed(injection["train_also"])))
    rows.append(("tensors", _size((tensor.shape for tensor in state.values()), file.stat().st_size)))
    return [*rows, *_progress(checkpoint)]


def _progress(checkpoint: Mapping[str, Any]) -> Iterator[_Row]:
    """Yield how far the run had come, and what its checkpoints are chosen by."""
    if "global_step" in checkpoint:
        yield "progress", f"epoch {checkpoint.get('epoch')}, step {checkpoint['global_step']}"
    callbacks = checkpoint.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if isinstance(state, dict) and state.get("monitor"):
            current, best = _number(state.get("current_score")), _number(state.get("best_model_score"))
            if current is not None:
                so_far = "" if best is None else f", the best {best:.6g}"
                yield "monitored", f"{state['monitor']} {current:.6g}{so_far}"


def _number(value: Any) -> float | None:
    """Return a score that is a number, or a tensor of one."""
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if fits(value, float) else None


def _progress_of_directory(directory: Path) -> list[_Row]:
    file = directory / TRAINER_STATE
    if not file.is_file():
        return []
    with reading(file):
        return list(_progress(torch.load(file, map_location="cpu", weights_only=True, mmap=True)))


def _content(saved: Mapping[str, Any] | None) -> str:
    if saved is None:
        return "not written by PEFTStrategy: it holds no adapters"
    return "adapters and the frozen weights" if saved.get("full") else "adapters only"


def _base_row(base: Mapping[str, Any]) -> list[_Row]:
    parts = [str(base[key]) for key in ("name_or_path", "class") if base.get(key)]
    return [("base model", " · ".join(parts) or "not recorded")]


def _settings(values: Mapping[str, Any]) -> list[str]:
    """Write ``key=value`` for what is set."""
    return [f"{key}={value}" for key, value in values.items() if value not in (None, False, {}, [], ())]


def _listed(names: Any) -> str:
    return names if isinstance(names, str) else ", ".join(map(str, names or ()))


def _size(shapes: Iterable[Iterable[int]], file_bytes: int) -> str:
    counts = [prod(shape) for shape in shapes]
    return f"{len(counts):,} with {sum(counts):,} values; the file has {file_bytes:,} bytes"


def _recorded_base(directory: Path) -> dict[str, Any]:
    """Return what this package wrote about the base of an adapter; nothing, if another program wrote the adapter."""
    base: dict[str, Any] = read_marker(directory).get("base", {})
    return base


def base_name(adapter: Path) -> str:
    """Return the base model that an adapter names, with its revision if that is on a hub."""
    if not (name := _named(read_config(adapter))):
        raise PEFTError(f"{adapter} does not name its base model: give it with --model.")
    return name


def _named(config: Mapping[str, Any]) -> str:
    name, revision = config.get("base_model_name_or_path") or "", config.get("revision")
    place = Path(name).expanduser()
    return f"{name}@{revision}" if name and revision and not place.is_absolute() and not place.exists() else name


def model_class(adapter: Path, model: str | None = None) -> Any:
    """Return the transformers class of an adapter's base, from what the adapter says or else the base ``model``."""
    recorded = getattr(transformers, str(_recorded_base(adapter).get("class")), None)
    if isinstance(recorded, type) and issubclass(recorded, transformers.PreTrainedModel):
        return recorded
    task = read_config(adapter).get("task_type")
    if task in _TASK_CLASSES:
        return _TASK_CLASSES[task]
    if model is not None and (named := own_class(model)) is not None:
        return named
    raise PEFTError(
        f"{adapter} does not say which class its base model has (task_type is {task!r}), nor does the base. Load the "
        "base in Python, then call load_adapter(model, path), merge(model, unload=True) and model.save_pretrained(...)."
    )
