"""The figures of `examples/docs/choosing.md` are those of the command and of the README. A failure shows the lines."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from lightning_peft.cli import main
from lightning_peft.core.method import registered_methods
from lightning_peft.planning import report

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "examples" / "docs" / "choosing.md").read_text()
# With their defaults, but for what Llama asks for: it has no biases of its own.
OPTIONS = {"BitFit": {"create_missing": True}}
LEFT_OUT = {"NewTokens"}  # as large as the number of tokens


def table(first: str) -> list[str]:
    """Return the rows of the table whose head begins with a cell."""
    return PAGE.partition(f"| {first} |")[2].partition("\n\n")[0].splitlines()[2:]


def row(method: str, model: Path) -> str:
    init = {"class_path": f"lightning_peft.{method}", "init_args": OPTIONS.get(method, {})}
    strategy = {"class_path": "lightning_peft.PEFTStrategy", "init_args": {"method": init}}
    task = {"class_path": "lightning_peft.tasks.CausalLM", "init_args": {"model": str(model), "dtype": "bfloat16"}}
    file = model.with_name(f"{method}.yaml")
    file.write_text(yaml.safe_dump({"trainer": {"strategy": strategy, "precision": "bf16-true"}, "model": task}))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(["plan", f"--config={file}"])
    printed = out.getvalue()
    trained, share = re.findall(r"of which ([\d,]+) are trained \((.*)\)", printed)[0]
    adapter, total = (re.findall(rf"^  {name} +(\S+ \S+)$", printed, re.MULTILINE)[0] for name in ("adapter", "total"))
    return f"| `{method}` | {trained} | {share} | {adapter} | {total} |"


def test_what_each_method_trains_on_a_model_of_eight_billion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "step_bytes", lambda *args, **options: 0)
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8).save_pretrained(tmp_path / "8B")
    ours = [c.__name__ for c in registered_methods().values() if c.__module__.startswith("lightning_peft.methods.")]
    lines = [row(name, tmp_path / "8B") for name in ours if name not in LEFT_OUT]
    assert table("method") == lines, "\n" + "\n".join(lines)


def test_the_speed_is_that_of_the_readme() -> None:
    lines = table("step")
    assert lines
    assert set(lines) <= set((ROOT / "README.md").read_text().splitlines())
