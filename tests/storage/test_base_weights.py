"""Models built without weights: loading them, in pieces and whole, and what that takes of memory."""

import json
from pathlib import Path
from typing import Any

import meta_script
import pytest
import torch
from families import build, outputs
from launch import run_script
from modules import Llama, loader, trainer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, PEFTError, PEFTStrategy, inject, load_base_weights
from lightning_peft.operations.merge import is_merged
from lightning_peft.storage.base_weights import materialise


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model on disk, with the logits of the next test's input beside it."""
    path = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(LlamaConfig(**meta_script.CONFIG))
    model.save_pretrained(path / "model", max_shard_size="30MB")
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(12)[None]).logits, path / "logits.pt")
    return path


@pytest.fixture(scope="module", params=[pytest.param("fsdp", marks=pytest.mark.slow), "fsdp2"])
def started(
    request: pytest.FixtureRequest, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param)
    # Freed memory goes back to the system at once, so that what is measured is what is held.
    run_script(meta_script.__file__, request.param, weights / "model", out, MALLOC_MMAP_THRESHOLD_="65536")
    return request.param, out


def test_two_processes_start_from_the_weights_and_equal_adapters(started: tuple[str, Path], weights: Path) -> None:
    first, second = (torch.load(started[1] / f"start-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["logits"], torch.load(weights / "logits.pt"))
    assert torch.equal(second["logits"], first["logits"])
    with torch.device("meta"):
        model = nn.ModuleDict({"model": LlamaForCausalLM(LlamaConfig(**meta_script.CONFIG))})
    model.to_empty(device="cpu")
    inject(model, LoRA(r=2), seed=0)
    expected = {name: p for name, p in model.named_parameters() if ".peft." in name}
    assert expected.keys() == first["adapters"].keys()
    for name, value in expected.items():
        assert torch.equal(first["adapters"][name], value), name
        assert torch.equal(second["adapters"][name], value), name


def test_a_process_allocates_its_shard_and_little_more(started: tuple[str, Path], weights: Path) -> None:
    tensors = [t for file in (weights / "model").glob("*.safetensors") for t in load_file(file).items()]
    shard = sum(t.nbytes for _, t in tensors) / 2
    layer = sum(t.nbytes for name, t in tensors if ".layers.0." in name)
    # FSDP1 makes each unit whole and copies it into one flat tensor before it is sharded.
    beside = 2 * layer if started[0] == "fsdp" else max(t.nbytes for _, t in tensors)
    for rank in (0, 1):
        taken = torch.load(started[1] / f"sizes-{rank}.pt")
        assert shard < taken["setup"] < 1.2 * (shard + beside)


def test_saving_does_not_gather_the_base(started: tuple[str, Path]) -> None:
    file = started[1] / "checkpoints" / "last" / "adapter_model.safetensors"
    for rank in (0, 1):
        assert torch.load(started[1] / f"sizes-{rank}.pt")["save"] < 4 * file.stat().st_size + 2**20


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "gemma3", "vit"])
def test_a_model_without_weights_becomes_the_saved_one(family: str, tmp_path: Path) -> None:
    model, inputs = build(family)
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path, save_original_format=False)
    with torch.device("meta"):
        empty = type(model)(model.config)
    inject(empty, LoRA(r=2))
    materialise(empty, torch.device("cpu"))
    load_base_weights(empty, tmp_path)
    loaded = dict(empty.named_parameters(remove_duplicate=False))
    for name, value in model.named_parameters(remove_duplicate=False):
        assert torch.equal(loaded[name], value), name
    # Memory is laid out in another way, so products may be summed in another order.
    torch.testing.assert_close(outputs(empty.eval(), inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_merged_model_is_not_filled_again(tmp_path: Path) -> None:
    """It is set up anew for ``predict``, and its weights hold what was learnt."""
    module = Llama()
    module.model.save_pretrained(tmp_path / "model")
    fitted = trainer(tmp_path, PEFTStrategy(LoRA(r=2), base_weights=str(tmp_path / "model")), max_epochs=2)
    fitted.fit(module, loader())
    layer = module.model.model.layers[0].mlp.up_proj
    merged = layer.weight.clone()
    module.forward = lambda batch: module.training_step(batch, 0)  # type: ignore[method-assign]
    fitted.predict(module, loader())
    assert torch.equal(layer.weight, merged)
    assert is_merged(module)


def _drop(state: dict[str, Any]) -> None:
    del state["model.norm.weight"]


def _add(state: dict[str, Any]) -> None:
    state["model.other.weight"] = torch.zeros(2)


def _reshape(state: dict[str, Any]) -> None:
    state["model.norm.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_drop, r"1 are missing \(model\.norm\.weight\)"), (_add, r"superfluous \(model\.other"), (_reshape, "shape")],
)
def test_weights_of_another_model_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    model, _ = build("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    damage(state)
    save_file(state, file)
    with pytest.raises(PEFTError, match=message):
        load_base_weights(model, tmp_path)


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    model, _ = build("llama")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PEFTError, match="lies outside of it"):
        load_base_weights(model, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match=r"model\.safetensors does not exist"):
        load_base_weights(build("llama")[0], tmp_path)


@pytest.mark.parametrize("count", [2, 3])
def test_several_models_are_loaded_one_by_one(count: int, weights: Path) -> None:
    models = nn.ModuleList([build("llama")[0] for _ in range(count)])
    with pytest.raises(PEFTError, match=f"ModuleList holds {count} transformers models, so it is not clear whose"):
        load_base_weights(models, weights / "model")


WITHOUT = """
import lightning as L, torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from lightning_peft import FullFinetuning, LoRA, PEFTStrategy

class Net(L.LightningModule):
    def __init__(self, loads):
        super().__init__()
        self.loads = loads

    def configure_model(self):
        if not hasattr(self, "net"):
            with torch.device("meta"):
                self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.head = nn.Linear(4, 4)
            if self.loads:
                self.net.to_empty(device="cpu")
                self.net.load_state_dict(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict())
            self.trainer.strategy.inject()
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.head(self.net(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())

def fit(method, loads=False):
    base = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    trainer = L.Trainer(strategy=PEFTStrategy(method, base=base, merge_on_train_end=False), accelerator="cpu",
                        devices=1, max_steps=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False)
    trainer.fit(Net(loads), torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2))

fit(FullFinetuning())
fit(LoRA(r=1), loads=True)
print("LORA", flush=True)
fit(LoRA(r=1))
from distributed_script import finish
finish()
"""


def test_frozen_weights_that_nothing_was_loaded_into_are_told(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(WITHOUT)
    trained_whole_or_loaded, adapted = run_script(str(tmp_path / "script.py")).split("LORA")
    assert "had no values" not in trained_whole_or_loaded
    assert adapted.count("'net.0.weight', 'net.0.bias', 'net.1.weight', 'net.1.bias' had no values") == 1
    assert "base_weights=DIRECTORY" in adapted


class Empty(Llama):
    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error
        self.model.to("meta")

    def configure_model(self) -> None:
        if self.error is not None:
            raise self.error


def test_a_module_without_values_is_refused_where_nothing_fills_it(tmp_path: Path) -> None:
    with pytest.raises(PEFTError, match=r"have no values: .*base='auto' moves a module as it is.*base_weights"):
        trainer(tmp_path, PEFTStrategy(LoRA(r=2))).fit(Empty(None), loader())


def test_an_error_is_told_though_the_module_cannot_be_moved_afterwards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the first error"):
        trainer(tmp_path, PEFTStrategy(LoRA(r=2))).fit(Empty(ValueError("the first error")), loader())
