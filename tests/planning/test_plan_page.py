"""The memory table of `examples/docs/large_models.md` is what the command prints. A failure shows its lines."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from lightning_peft.cli import main
from lightning_peft.planning import report
from lightning_peft.planning.activations import step_bytes

PAGE = (Path(__file__).resolve().parents[2] / "examples" / "docs" / "large_models.md").read_text()
PAGE_OF_QUANTISED = (Path(__file__).resolve().parents[2] / "examples" / "docs" / "quantised.md").read_text()
SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
# Of Llama 3.
COMMON = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
WORLDS = ([1, 1], [8, 1], [8, 2])
SIZES = (24, 80)
BITSANDBYTES = "lightning.pytorch.plugins.precision.BitsandbytesPrecision"
QUANTISED = [{"class_path": BITSANDBYTES, "init_args": {"mode": "nf4"}}]
DOUBLE = [{"class_path": BITSANDBYTES, "init_args": {"mode": "nf4-dq"}}]


def run_file(path: Path, model: str, shape: dict[str, Any] | None = None, **trainer: Any) -> Path:
    LlamaConfig(**(shape or {**COMMON, **SHAPES[model]})).save_pretrained(path / model)
    method = {"class_path": "lightning_peft.LoRA", "init_args": {"r": 16}}
    task = {"model": str(path / model), "dtype": "bfloat16", "gradient_checkpointing": True}
    strategy = {"class_path": "lightning_peft.PEFTStrategy", "init_args": {"method": method}}
    file = path / f"{model}-{len(list(path.iterdir()))}.yaml"
    task_of = {"class_path": "lightning_peft.tasks.CausalLM", "init_args": task}
    file.write_text(yaml.safe_dump({"trainer": {"strategy": strategy, **trainer}, "model": task_of}))
    return file


def printed(file: Path, devices: int, nodes: int) -> dict[str, str]:
    """Total by base strategy, as the command prints it."""
    command = ["plan", f"--config={file}", f"--devices={devices}", f"--num_nodes={nodes}", "--sequence_length=2048"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(command)
    table = out.getvalue().partition("every base on")[2].splitlines()[1:]
    rows = (line.strip().rpartition("  ") for line in table)
    return {name.strip(): text for name, _, text in rows}


def line(model: str, devices: int, nodes: int, path: Path) -> str:
    """A row of the table: for each base what a device holds, and the first one that fits each size of memory."""
    plain = printed(run_file(path, model, precision="bf16-true"), devices, nodes)
    packed = printed(run_file(path, model, plugins=QUANTISED), devices, nodes)
    whole = "one device" if devices * nodes == 1 else "DDP"
    columns = {
        whole: plain[whole],
        "FSDP": plain.get("FSDP FULL_SHARD", ""),
        f"{whole}, 4 bits": packed[whole],
        "ZeRO-3 with offload": plain["DeepSpeed ZeRO-3 with offload"],
    }
    choices = [
        next((name for name, text in columns.items() if text and gib(text) <= 0.9 * size), "none of these")
        for size in SIZES
    ]
    cells = [text.removesuffix(" GiB") if text else "-" for text in columns.values()]
    return f"| {' | '.join([model, str(devices * nodes), *cells, *choices])} |"


def gib(text: str) -> float:
    number, unit = text.split()
    assert unit == "GiB"
    return float(number)


@pytest.fixture(scope="module", autouse=True)
def each_step_once() -> Any:
    """What a step needs is the same for every base, and without checkpointing it is in no cell."""
    known: dict[Any, int] = {}

    def cached(model: Any, *args: Any, gradient_checkpointing: bool, **options: Any) -> int:
        key = (model.config.hidden_size, args, options["autocast"])
        if gradient_checkpointing and key not in known:
            known[key] = step_bytes(model, *args, gradient_checkpointing=True, **options)
        return known.get(key, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "step_bytes", cached)
        yield


@pytest.mark.parametrize("model", ["1B", "8B", pytest.param("70B", marks=pytest.mark.slow)])
def test_the_table_is_what_the_command_prints(model: str, tmp_path: Path) -> None:
    lines = [line(model, devices, nodes, tmp_path) for devices, nodes in WORLDS]
    shown = [row for row in PAGE.splitlines() if row.startswith(f"| {model} |")]
    assert shown == lines, "\n" + "\n".join(lines)


def test_what_a_quantised_base_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`examples/docs/quantised.md` gives what the command prints for Llama-2-7B, whose shape is the default one."""
    monkeypatch.setattr(report, "step_bytes", lambda *args, **options: 0)
    runs: dict[str, dict[str, Any]] = {
        "bfloat16": {"precision": "bf16-true"},
        "4 bits": {"plugins": QUANTISED},
        "4 bits, scales quantised too": {"plugins": DOUBLE},
    }
    found = {}
    for name, trainer in runs.items():
        file, out = run_file(tmp_path, "7B", {"vocab_size": 32000}, **trainer), io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            main(["plan", f"--config={file}"])
        (line,) = (line for line in out.getvalue().splitlines() if line.strip().startswith("frozen weights"))
        found[name] = line.partition("weights")[2].strip()
    shown = (PAGE_OF_QUANTISED.partition("| Llama-2-7B in |")[2].partition("\n\n")[0]).splitlines()[2:]
    assert shown == [f"| {name} | {text} |" for name, text in found.items()]
