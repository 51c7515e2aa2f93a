"""``lightning-peft merge``: what HF PEFT's ``merge_and_unload`` makes, file by file, in little memory."""

import copy
import json
from pathlib import Path
from typing import Any

import merge_memory_script
import peft
import pytest
import torch
import transformers
from families import build, randomise
from launch import run_script
from safetensors import safe_open

import lightning_peft.cli.tools.merge as command
from lightning_peft import LoRA, PEFTError, inject, save_adapter

IDS = torch.arange(2, 10)[None]
CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "lokr": peft.LoKrConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "miss": peft.MissConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "head": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "pissa": peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"),
    "bias": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], bias="lora_only", task_type="CAUSAL_LM"),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
}


def tuned(base: Path, out: Path, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Write an adapter of HF PEFT's on a base that it is given as a directory, and return the merged model."""
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype), copy.deepcopy(config)
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                seed = torch.Generator().manual_seed(len(name))
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=seed).to(parameter))
    model.save_pretrained(out)
    return model.merge_and_unload().eval()


def shards(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_as_hf_peft_merges(family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "gpt2" and kind != "lora":
        pytest.skip("the names are Llama's")
    whole: list[str] = []
    load = command.load_model
    monkeypatch.setattr(command, "load_model", lambda *a, **k: whole.append("whole") or load(*a, **k))
    monkeypatch.setattr("lightning_peft.operations.fold._ELEMENTS", 100)  # a few rows of each weight, the last fewer
    build(family)[0].save_pretrained(tmp_path / "base", max_shard_size="60KB")
    judge = tuned(tmp_path / "base", tmp_path / "adapter", CONFIGS[kind])
    command.merge(str(tmp_path / "adapter"), str(tmp_path / "base"), str(tmp_path / "out"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (merged(input_ids=IDS).logits - judge(input_ids=IDS).logits).abs().max() <= 2e-5
    state = merged.state_dict()
    assert all((state[name] - value).abs().max() <= 1e-6 for name, value in judge.state_dict().items())
    assert whole == []
    assert shards(tmp_path / "out") == shards(tmp_path / "base")


def test_in_the_bases_dtype_or_another(tmp_path: Path) -> None:
    build("llama")[0].to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    judge = tuned(tmp_path / "base", tmp_path / "adapter", CONFIGS["lora"], torch.bfloat16)
    for dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        command.merge(str(tmp_path / "adapter"), str(tmp_path / "base"), str(tmp_path / "out"), dtype)  # type: ignore[arg-type]
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert {p.dtype for p in merged.parameters()} == {expected}
        for name, value in judge.state_dict().items():
            assert (merged.state_dict()[name] - value).abs().max() <= 0.01, name


def test_a_file_is_read_by_others(tmp_path: Path) -> None:
    build("llama")[0].save_pretrained(tmp_path / "base", max_shard_size="60KB")
    tuned(tmp_path / "base", tmp_path / "adapter", CONFIGS["lora"])
    command.merge(str(tmp_path / "adapter"), str(tmp_path / "base"), str(tmp_path / "out"))
    for name, file in shards(tmp_path / "out").items():
        with safe_open(tmp_path / "out" / file, "pt") as ours, safe_open(tmp_path / "base" / file, "pt") as theirs:
            assert (ours.metadata(), sorted(ours.keys())) == (theirs.metadata(), sorted(theirs.keys()))
            assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()


def test_an_adapter_that_does_not_say_the_class_of_its_base(tmp_path: Path) -> None:
    """As HF PEFT writes it without ``task_type``: the base says it, unless it does not either."""
    build("llama")[0].save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    judge = peft.get_peft_model(build("llama")[0], config)
    randomise(judge)
    judge.save_pretrained(tmp_path / "adapter")
    expected = judge.merge_and_unload()(input_ids=IDS).logits
    command.merge(str(tmp_path / "adapter"), str(tmp_path / "base"), str(tmp_path / "out"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (merged(input_ids=IDS).logits - expected).abs().max() <= 2e-5
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": None}))
    with pytest.raises(PEFTError, match=r"task_type is None\), nor does the base"):
        command.merge(str(tmp_path / "adapter"), str(tmp_path / "base"), str(tmp_path / "out2"))
    with pytest.raises(PEFTError, match="model='someone/not-here' has no configuration that can be read"):
        command.merge(str(tmp_path / "adapter"), "someone/not-here", str(tmp_path / "out2"))


def test_another_base_is_refused(tmp_path: Path) -> None:
    model = build("llama")[0]
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    inject(model, LoRA(r=4))
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        other = build("llama")[0]
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    other.save_pretrained(tmp_path / "other", max_shard_size="60KB")
    with pytest.raises(PEFTError, match="was written for another base model"):
        command.merge(str(tmp_path / "adapter"), str(tmp_path / "other"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_in_the_bases_dtype_where_it_is_loaded_whole(tmp_path: Path) -> None:
    build("llama")[0].to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tuned(tmp_path / "base", tmp_path / "adapter", CONFIGS["head"], torch.bfloat16)
    command.merge(str(tmp_path / "adapter"), str(tmp_path / "base"), str(tmp_path / "out"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_a_base_by_a_hubs_name_without_network(tmp_path: Path) -> None:
    build("llama")[0].save_pretrained(tmp_path / "base")
    tuned(tmp_path / "base", tmp_path / "adapter", CONFIGS["lora"])
    with pytest.raises(PEFTError, match="model='someone/not-here' does not load as"):
        command.merge(str(tmp_path / "adapter"), "someone/not-here", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_it_takes_less_memory_than_a_file(tmp_path: Path) -> None:
    def write(folder: Path, width: int, layers: int, shard: str) -> int:
        config = transformers.LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            vocab_size=512,
        )
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.01)
        model.save_pretrained(folder / "base", max_shard_size=shard)
        peft.get_peft_model(model, copy.deepcopy(CONFIGS["lora"])).save_pretrained(folder / "adapter")
        return 2 * sum(parameter.numel() for parameter in model.parameters())

    tiny, large = tmp_path / "tiny", tmp_path / "large"
    write(tiny, 64, 2, "60KB")
    size = write(large, 1024, 10, "40MB")
    files = [file.stat().st_size for file in (large / "base").glob("*.safetensors")]
    assert len(files) >= 4
    out = run_script(merge_memory_script.__file__, tiny, large / "adapter", large / "base", large / "out")
    anonymous, mapped = map(int, out.split("rose by")[1].split()[:2])
    # A weight, the adapter and its file, rows that are computed with, and what the allocator keeps of them.
    weight, adapter = 2 * 2 * 1024 * 1024, (large / "adapter" / "adapter_model.safetensors").stat().st_size
    assert anonymous <= weight + 2 * adapter + 24 * 2**20 < max(files) < 0.2 * size, (anonymous, max(files), size)
    # Never a whole file beside what loading has touched of all.
    assert mapped <= 0.5 * size, (mapped, size)


def test_a_disk_that_fills_while_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second file nothing can be written: the first is not left behind."""
    build("llama")[0].save_pretrained(tmp_path / "base", max_shard_size="60KB")
    tuned(tmp_path / "base", tmp_path / "adapter", CONFIGS["lora"])
    written, stream = [], command.stream_tensors

    def fills(path: Path, *args: Any) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        stream(path, *args)

    monkeypatch.setattr(command, "stream_tensors", fills)
    with pytest.raises(PEFTError, match=r"Cannot write .*out: No space left"):
        command.merge(str(tmp_path / "adapter"), str(tmp_path / "base"), str(tmp_path / "out"))
    assert written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
