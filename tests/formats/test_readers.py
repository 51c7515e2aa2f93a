"""Copies for one reader: transformers' own loader and HF PEFT judge them; what a reader cannot read is refused."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build, outputs, randomise

from lightning_peft import PEFTError
from lightning_peft.cli import main
from lightning_peft.cli.tools.export import export
from lightning_peft.formats.serving import RANKS
from lightning_peft.formats.serving.readers import READERS

LORA = {"r": 6, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]}
CONFIGS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(**LORA),
    "rslora": peft.LoraConfig(**LORA, use_rslora=True, alpha_pattern={"down_proj": 3}, rank_pattern={"q_proj": 2}),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_proj"]),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "keys": peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"]),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
    "tall": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"]),
    "alora": peft.LoraConfig(**LORA, task_type="CAUSAL_LM", alora_invocation_tokens=[3, 3]),
    "head": peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "large": peft.LoraConfig(r=600, target_modules=["q_proj", "v_proj"]),
}
SERVERS = [name for name, reader in READERS.items() if reader.lora_alone]
REFUSED = {
    **dict.fromkeys([(name, "dora") for name in SERVERS], r"DoRA.*plain LoRA alone.*lightning-peft convert"),
    **dict.fromkeys([(name, "loha") for name in SERVERS], r"LOHA.*plain LoRA alone.*lightning-peft convert"),
    **dict.fromkeys([(name, "vera") for name in SERVERS], r"VERA.*plain LoRA alone.*lightning-peft convert"),
    **dict.fromkeys([(name, "prompt") for name in SERVERS], r"PROMPT_TUNING.*plain LoRA alone"),
    **dict.fromkeys([(name, "head") for name in SERVERS], r"modules_to_save=\['lm_head'\].*lightning-peft merge"),
    **dict.fromkeys([(name, "alora") for name in SERVERS], r"aLoRA \(alora_invocation_tokens=\[3, 3\]\): .*--for peft"),
    ("transformers", "alora"): "is of type aLoRA, which transformers does not read",
    ("transformers", "dora"): "does not read. HF PEFT does: export it --for peft",
    ("transformers", "vera"): "does not read. HF PEFT does: export it --for peft",
    ("transformers", "prompt"): "does not read. HF PEFT does: export it --for peft",
    ("sglang", "keys"): r"q_proj' without 'v_proj' beside it; sglang reads them together",
    ("sglang", "embedding"): "adapts the embedding.*sglang reads nothing",
    ("tensorrt-llm", "embedding"): "adapts the embedding.*tensorrt-llm reads nothing",
    ("tensorrt-llm", "tall"): r"adapts the head 'lm_head', which tensorrt-llm passes over in silence",
    ("vllm", "large"): r"has rank 600; vllm has room for 512.*--rank 512",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    found = {}
    for kind, config in CONFIGS.items():
        model, inputs = build("llama")
        judge = peft.get_peft_model(model, copy.deepcopy(config)).eval()
        randomise(judge)
        path = tmp_path_factory.mktemp(kind)
        judge.save_pretrained(path)
        found[kind] = path, outputs(judge, inputs)
    return found


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("reader", READERS)
def test_a_copy_computes_the_same_or_there_is_none(reader: str, kind: str, written: Any, tmp_path: Path) -> None:
    source, expected = written[kind]
    refused = "of HF PEFT's type" if READERS[reader].of_layers else REFUSED.get((reader, kind))
    if refused is not None:
        with pytest.raises(PEFTError, match=refused):
            export(str(source), str(tmp_path / "out"), reader)
        assert not (tmp_path / "out").exists()
        return
    export(str(source), str(tmp_path / "out"), reader)
    model, inputs = build("llama")
    if reader == "transformers":
        model.load_adapter(str(tmp_path / "out"))
        got = outputs(model.eval(), inputs)
    else:
        got = outputs(peft.PeftModel.from_pretrained(model, tmp_path / "out").eval(), inputs)
    assert (got - expected).abs().max() <= 1e-5
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    if READERS[reader].lora_alone:
        # By every rule that servers have: lora_alpha / r, lora_alpha / sqrt(r) only if it is said, alpha alone.
        assert (config.lora_alpha, config.use_rslora, config.rank_pattern, config.alpha_pattern) == (
            config.r,
            False,
            {},
            {},
        )
    if reader == "vllm":
        assert config.r in RANKS


def test_a_reader_that_does_not_exist(written: Any, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", str(written["lora"][0]), "--for=vlm", f"--out={tmp_path / 'out'}"])
    message = str(stop.value.code)
    assert "There is no reader 'vlm'. Did you mean 'vllm'?" in message
    assert all(reader in message for reader in READERS)


def test_the_command_says_how_to_go_on(written: Any, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", str(written["rslora"][0]), "--for", "vllm", f"--out={tmp_path / 'out'}"])
    assert stop.value.code == 0
    assert "Start vLLM with --enable-lora --max-lora-rank 8." in capsys.readouterr().out


def test_transformers_still_reads_no_dora(written: Any) -> None:
    """If it does one day, the table is wrong."""
    source, expected = written["dora"]
    model, inputs = build("llama")
    model.load_adapter(str(source))
    assert (outputs(model.eval(), inputs) - expected).abs().max() > 1e-3
