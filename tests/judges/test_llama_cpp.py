"""llama.cpp's own converter reads what `lightning-peft export --for llama.cpp` writes; `make llama-cpp` fetches it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import strongly
from gguf import GGUFReader
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, inject, save_adapter
from lightning_peft.cli import main
from lightning_peft.core.view import ModelView

CONVERTER = Path(__file__).parents[2] / ".venv" / ".llama.cpp" / "convert_lora_to_gguf.py"
HEADS, KEYS = 4, 2
NAMES = {
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate"},
    **{"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
}


def as_it_rotates(change: Tensor, heads: int) -> Tensor:
    """Rows of a head in pairs that stand beside each other, which transformers has half a head apart."""
    return change.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@pytest.mark.slow
@pytest.mark.skipif(not CONVERTER.is_file(), reason="llama.cpp's converter is not here: make llama-cpp fetches it")
def test_the_converter_of_llama_cpp_reads_it(tmp_path: Path) -> None:
    """Also scales and ranks that it would read wrongly: those by pattern, and rsLoRA's."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=KEYS))
    model.save_pretrained(tmp_path / "base")
    patterns: dict[str, Any] = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 5}}
    inject(model, LoRA(r=4, alpha=12, use_rslora=True, **patterns))
    strongly(model)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "served"), "--for", "llama.cpp"])

    options = ["--base", tmp_path / "base", "--outtype", "f32", "--outfile", tmp_path / "it.gguf"]
    command = map(str, [sys.executable, CONVERTER, *options, tmp_path / "served"])
    done = subprocess.run([*command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr

    found = GGUFReader(tmp_path / "it.gguf")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in found.tensors}
    alpha = found.fields["adapter.lora.alpha"].contents()
    for host, _, slot in ModelView(model).slots:
        _, _, layer, name = host.split(".", 3)
        adapter = slot["default"]
        a, b = (tensors.pop(f"blk.{layer}.{NAMES[name]}.weight.lora_{part}") for part in "ab")
        expected = adapter.scale * adapter.lora_B.detach() @ adapter.lora_A.detach()
        if heads := {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEYS}.get(name):
            expected = as_it_rotates(expected, heads)
        assert (alpha / len(a) * b @ a - expected).abs().max() <= 1e-5 * expected.abs().max(), host
    assert not tensors
