"""AdaLoRA: its schedule and regulariser in a Lightning run, against HF PEFT stepped by hand."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from modules import Llama, Regression, assert_same, loader, trainer
from resuming import straight_and_resumed
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft import AdaLoRA, PEFTError, PEFTStrategy, inject, load_adapter, save_adapter

STEPS, ACCUMULATED, CLIP = 12, 2, 0.05
SCHEDULES: dict[str, dict[str, Any]] = {
    "at once": {},
    "in phases": {"tinit": 2, "tfinal": 3, "deltaT": 2},
    "of one step": {"tinit": 4, "tfinal": 7, "beta1": 0.5, "beta2": 0.7},
    "without regulariser": {"orth_reg_weight": 0.0, "tfinal": 1},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def method(**options: Any) -> AdaLoRA:
    return AdaLoRA(init_r=6, target_r=2, alpha=12, target_modules=TARGETS, **options)


def tokens(number: int) -> Tensor:
    return torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(number))


class Numbered(Llama):
    """Sees the texts of ``tokens``, one after the other, and writes down the adapters after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.steps: list[dict[str, Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids = tokens(batch_idx)
        return self.model(input_ids=ids, labels=ids).loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step > len(self.steps):
            self.steps.append(parts(self.model))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def parts(model: nn.Module) -> dict[str, Tensor]:
    """Copies of A, B and E by the names of their hosts, ours and HF PEFT's."""
    found = {}
    for name, parameter in model.named_parameters():
        mark = ".peft.default." if ".peft." in name else ".lora_"
        host, _, part = name.removeprefix("base_model.model.").partition(mark)
        if part and "ranknum" not in name:
            found[f"{host} {part.removesuffix('.default').removeprefix('lora_')}"] = parameter.detach().clone()
    return found


def by_judge(path: Path, **options: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
    """Train HF PEFT's AdaLoRA from the adapter in ``path``; return A, B, E and the rank pattern after each step."""
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=12, target_modules=TARGETS, total_step=STEPS, task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(Numbered().model, config, autocast_adapter_dtype=False).double()
    state = peft.utils.load_peft_weights(str(path), device="cpu")
    peft.set_peft_model_state_dict(model, state)
    # Moved to another dtype, it makes the divisor of its scale trainable.
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    steps, patterns = [], []
    for step in range(STEPS):
        for part in range(ACCUMULATED):
            ids = tokens(step * ACCUMULATED + part)
            (model(input_ids=ids, labels=ids).loss / ACCUMULATED).backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        steps.append(parts(model))
        patterns.append(dict(config.rank_pattern or {}))
    model.save_pretrained(path.with_name("theirs"))
    return steps, patterns


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_is_theirs_step_by_step(name: str, tmp_path: Path) -> None:
    """Values, ranks and masks over a whole schedule, with accumulated and clipped gradients."""
    options = SCHEDULES[name]
    start = Numbered()
    torch.manual_seed(0)
    inject(start.model, method(**options))
    save_adapter(start.model, tmp_path / "start")
    expected, patterns = by_judge(tmp_path / "start", **options)

    module = Numbered()
    load_adapter(module.model, tmp_path / "start")
    run = trainer(
        tmp_path,
        PEFTStrategy(method(**options)),
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=CLIP,
    )
    run.fit(module, DataLoader(range(STEPS * ACCUMULATED)))
    assert len(module.steps) == len(expected) == STEPS
    for step, (ours, theirs) in enumerate(zip(module.steps, expected, strict=True), start=1):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert (value - theirs[key]).abs().max() <= 1e-9, (step, key)
            assert torch.equal(value == 0, theirs[key] == 0), (step, key)
    for name, pattern in patterns[-1].items():
        assert (module.steps[-1][f"{name.partition('.lora_')[0]} E"] != 0).flatten().tolist() == pattern
    ranks = [int(sum((v != 0).sum() for k, v in s.items() if k.endswith(" E"))) for s in module.steps]
    assert ranks[-1] == 2 * 6
    assert ranks[0] <= 6 * 6
    assert len({tuple(p) for p in patterns[-1].values()}) > 1


def test_their_allocated_files_are_read_and_written_again(tmp_path: Path) -> None:
    """They hold the rows that are left."""
    start = Numbered()
    inject(start.model, method(tfinal=2))
    save_adapter(start.model, tmp_path / "start")
    by_judge(tmp_path / "start", tfinal=2)
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert len({sum(kept) for kept in config["rank_pattern"].values()}) > 1

    def judged(path: Path) -> Tensor:
        judge = peft.PeftModel.from_pretrained(Numbered().model, path, autocast_adapter_dtype=False)
        with torch.no_grad():
            return judge.double().eval()(input_ids=tokens(0)).logits

    model = Numbered().model
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        ours = model.eval()(input_ids=tokens(0)).logits
    assert (ours - judged(tmp_path / "theirs")).abs().max() <= 1e-9
    assert (ours - Numbered().model.eval()(input_ids=tokens(0)).logits).abs().max() > 1e-4
    save_adapter(model, tmp_path / "again")
    assert (ours - judged(tmp_path / "again")).abs().max() <= 1e-9
    # Another run goes on from what is left.
    module = Numbered()
    load_adapter(module.model, tmp_path / "again")
    trainer(tmp_path, PEFTStrategy(method()), max_steps=3).fit(module, DataLoader(range(3)))

    name, kept = next(iter(config["rank_pattern"].items()))
    config["rank_pattern"][name] = [not value for value in kept]
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PEFTError, match="init_r and rank_pattern of its configuration contradict"):
        load_adapter(Numbered().model, tmp_path / "theirs")


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return itertools.repeat(torch.zeros(8))


@pytest.mark.parametrize("stop", [2, 6, 10])
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_resumed_run_ends_bit_for_bit_as_a_straight_one(stop: int, kind: str, tmp_path: Path) -> None:
    """Interrupted before, during and after the allocation."""

    class Stepped(Numbered):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            ids = tokens(self.global_step)
            return self.model(input_ids=ids, labels=ids).loss

    straight, resumed = straight_and_resumed(
        tmp_path,
        Stepped,
        method(tinit=3, tfinal=4, deltaT=2),
        steps=STEPS,
        stop=stop,
        file=kind == "file",
        merge_on_train_end=False,
    )
    assert_same(dict(straight.state_dict()), dict(resumed.state_dict()))
    assert len(resumed.steps) == STEPS - stop


def test_under_a_gradient_scaler_the_regulariser_is_scaled_too(tmp_path: Path) -> None:
    """Runs with other scales end alike; without the scaling the term would be a 1,024th."""
    ends = []
    for scale in (1.0, 1024.0):
        module = Regression()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        run = trainer(
            tmp_path,
            PEFTStrategy(AdaLoRA(init_r=3, target_r=2, target_modules=["net.0", "net.2"])),
            max_steps=4,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        )
        run.fit(module, loader())
        ends.append({n: p.detach().clone() for n, p in module.named_parameters() if ".peft." in n})
    for name, value in ends[0].items():
        assert (value - ends[1][name]).abs().max() <= 2e-2 * value.abs().max().clamp(min=0.1), name


def test_gradients_that_overflowed_are_not_taken_in() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, AdaLoRA(init_r=2, target_r=1))
    adapter = model[0].peft["default"]
    with torch.no_grad():
        adapter.lora_E.fill_(1.0)
        for parameter in adapter.parameters():
            parameter.grad = torch.full_like(parameter, torch.inf)
        adapter.observe(0.9, 0.9)
        assert all(not buffer.any() for name, buffer in adapter.named_buffers() if name != "kept")


def test_a_run_without_an_end_or_without_room_is_refused(tmp_path: Path) -> None:
    endless = trainer(tmp_path, PEFTStrategy(AdaLoRA(init_r=3, target_r=2)), max_epochs=-1, max_steps=-1)
    with pytest.raises(PEFTError, match=r"AdaLoRA divides the run's optimizer steps .* Set max_steps"):
        endless.fit(Regression(), DataLoader(Endless()))
    short = trainer(tmp_path, PEFTStrategy(AdaLoRA(init_r=3, target_r=2, tinit=3, tfinal=1)), max_steps=4)
    with pytest.raises(PEFTError, match=r"tinit=3 and tfinal=1 were given for a run of 4 steps.*more max_steps"):
        short.fit(Regression(), loader())
    # A trial run is as short as it is.
    for options in ({"fast_dev_run": 2}, {"fast_dev_run": 3}):
        method = AdaLoRA(init_r=3, target_r=2, tinit=3, tfinal=0)
        trainer(tmp_path, PEFTStrategy(method), **options).fit(Regression(), loader())


@pytest.mark.parametrize(
    "options",
    [
        *({"init_r": 0}, {"init_r": 2.0}, {"target_r": 0}, {"target_r": 13}, {"tinit": -1}, {"tfinal": -1}),
        *({"deltaT": 0}, {"beta1": 1.0}, {"beta2": 0.0}, {"orth_reg_weight": -0.1}, {"alpha": 0}, {"dropout": 1.0}),
        *({"alpha": float("nan")}, {"orth_reg_weight": float("inf")}),
    ],
)
def test_bad_hyper_parameters(options: dict[str, Any]) -> None:
    with pytest.raises(PEFTError, match=f"AdaLoRA: {next(iter(options))}="):
        AdaLoRA(**options)
    with pytest.raises(PEFTError, match="AdaLoRA: q_proj=13 was given"):
        AdaLoRA(rank_pattern={"q_proj": 13})


def test_a_rank_above_what_a_layer_has() -> None:
    with pytest.raises(PEFTError, match=r"init_r=5 was given, but '0' is 4 → 4"):
        inject(nn.Sequential(nn.Linear(4, 4)), AdaLoRA(init_r=5, target_r=1, target_modules="0"))
