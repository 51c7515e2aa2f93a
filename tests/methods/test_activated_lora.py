"""LoRA that some tokens activate, against HF PEFT's in float64: outputs, gradients, generation, files both ways."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from families import build
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    DoRA,
    LoRA,
    LoReFT,
    PEFTError,
    PEFTStrategy,
    from_peft_config,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from lightning_peft.core.view import ModelView

TOKENS = [7, 8]
IDS = torch.tensor(
    [[5, 7, 8, 3, 7, 8, 9, 4], [1, 2, 3, 4, 5, 6, 9, 8], [1, 2, 3, 4, 5, 6, 7, 8], [7, 8, 1, 1, 7, 2, 8, 7]]
)
# From which column on each row is changed.
BEGINS = (4, 8, 6, 0)


def plain(family: str = "llama") -> Any:
    return build(family)[0].double()


def made(family: str = "llama", tokens: list[int] = TOKENS, **options: Any) -> Any:
    model = plain(family)
    inject(model, LoRA(r=3, alora_invocation_tokens=tokens, **options), seed=0)
    draw(ModelView(model).adapter_parameters)
    return model


def draw(parameters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def judged(family: str, path: Path, model: nn.Module | None = None, **options: Any) -> Any:
    """Return HF PEFT's model with the adapter in ``path``, which is that of ``model`` if one is given."""
    if model is not None:
        save_adapter(model, path)
    return peft.PeftModel.from_pretrained(plain(family), str(path), **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_outputs_are_those_of_hf_peft(family: str, tmp_path: Path) -> None:
    model = made(family)
    judge = judged(family, tmp_path / "a", model)
    found, base = model(input_ids=IDS).logits, plain(family)(input_ids=IDS).logits
    assert (found - judge(input_ids=IDS).logits).abs().max() <= 1e-9
    changed = (found - base).abs().amax(dim=-1) > 1e-6
    assert changed.tolist() == [[column >= begin for column in range(8)] for begin in BEGINS]
    assert merge(model).kept
    assert torch.equal(model(input_ids=IDS).logits, found)


def test_files_of_hf_peft(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", alora_invocation_tokens=TOKENS
    )
    judge = peft.get_peft_model(plain(), config)
    draw({name: p for name, p in judge.named_parameters() if "lora_" in name})
    judge.save_pretrained(tmp_path)
    model = plain()
    load_adapter(model, tmp_path)
    expected = judge(input_ids=IDS).logits
    assert (expected - plain()(input_ids=IDS).logits).abs().max() > 1e-3
    assert (model(input_ids=IDS).logits - expected).abs().max() <= 1e-9
    last = model(input_ids=IDS, logits_to_keep=3).logits  # the head is given these alone
    assert (last - expected[:, -3:]).abs().max() <= 1e-9
    config.inference_mode = False
    (method,), whole = from_peft_config(config)
    said = LoRA(r=3, alpha=8, target_modules=["lm_head", "q_proj"], alora_invocation_tokens=TOKENS)
    assert (method, whole) == (said, [])


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"do_sample": True}])
def test_generating_is_that_of_hf_peft(options: dict[str, Any], tmp_path: Path) -> None:
    model = made()
    judge = judged("llama", tmp_path / "a", model)
    ids, mask = torch.cat([torch.zeros(4, 2, dtype=torch.long), IDS], dim=1), torch.ones(4, 10, dtype=torch.long)
    mask[:, :2] = 0
    found = []
    for each in (model, judge):
        torch.manual_seed(0)
        given = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False, **options}
        given |= {"return_dict_in_generate": True, "output_logits": True}
        found.append(each.generate(input_ids=ids, attention_mask=mask, **given))
    ours, theirs = found
    assert torch.equal(ours.sequences, theirs.sequences)
    assert max((a - b).abs().max() for a, b in zip(ours.logits, theirs.logits, strict=True)) <= 1e-9


def test_what_is_generated_activates_nothing(tmp_path: Path) -> None:
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = IDS[1:2]
    text = plain().generate(ids, **given)
    token = next(token for token in text[0, 8:12].tolist() if token not in ids[0])
    model = made(tokens=[token])
    assert torch.equal(model.generate(ids, **given), text)
    judge = judged("llama", tmp_path / "a", model)
    assert torch.equal(judge.generate(input_ids=ids, **given), text)


def test_beams_are_those_without_a_cache() -> None:
    """HF PEFT has no beams: the whole text, looked at anew for each token, is the judge."""
    model = made(tokens=[7, 8])
    given = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(IDS, **given)
    assert (found[:, 8:] != 7).all()  # nothing was generated that would have begun anew
    assert torch.equal(found, model.generate(IDS, **given, use_cache=False))


def rest(model: Any, cache: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, past_key_values=cache).logits
    return found


def filled(model: Any, ids: Tensor) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True).past_key_values


def test_a_text_in_several_calls() -> None:
    model = made()
    whole = model(input_ids=IDS).logits
    two = rest(model, filled(model, IDS[2:, :3]), IDS[2:, 3:])
    assert (two - whole[2:, 3:]).abs().max() <= 1e-9
    # The sequence begins in one call and ends in the next: from there on it is active.
    base_begins = plain()
    cache = filled(model, IDS[2:3, :7])
    found = rest(model, cache, torch.tensor([[8, 1, 2]]))
    assert (found - rest(base_begins, filled(base_begins, IDS[2:3, :7]), torch.tensor([[8, 1, 2]]))).abs().max() > 1e-3


def test_what_the_base_has_cached_serves(tmp_path: Path) -> None:
    """The point of it: the cache of the text before is the base's, and is gone on with."""
    model, base = made(), plain()
    start = IDS[2:3]
    cache = filled(base, start[:, :6])
    assert (rest(model, copy.deepcopy(cache), start[:, 6:]) - model(input_ids=start).logits[:, 6:]).abs().max() <= 1e-9
    # A copy of a cache goes on as the cache does, and one that was cut goes on from what is left of it.
    cache = filled(model, start)
    again, step = copy.deepcopy(cache), torch.tensor([[3]])
    first = rest(model, cache, step)
    assert torch.equal(rest(model, again, step), first)
    assert (first - model(input_ids=torch.cat([start, step], dim=1)).logits[:, -1:]).abs().max() <= 1e-9
    again.crop(-3)
    assert (
        rest(model, again, step) - base(input_ids=torch.cat([start[:, :6], step], 1)).logits[:, -1:]
    ).abs().max() <= 1e-9


@pytest.mark.parametrize("checkpointed", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_gradients_are_those_of_hf_peft(checkpointed: dict[str, bool] | None, tmp_path: Path) -> None:
    """Of two calls before one backward pass too: HF PEFT refuses that where activations are checkpointed."""
    model = made().train()
    judge = judged("llama", tmp_path / "a", model, is_trainable=True).train()
    if checkpointed is not None:
        model.gradient_checkpointing_enable(checkpointed)
        model.enable_input_require_grads()
    for each in (model, judge):
        both = [each(input_ids=ids, labels=ids, use_cache=False).loss for ids in (IDS, IDS.flip(0))]
        with torch.no_grad():
            each(input_ids=IDS.flip(1))
        (both[0] - 2 * both[1]).backward()
    theirs = {name.replace(".default.weight", ""): p.grad for name, p in judge.named_parameters() if "lora_" in name}
    ours = {
        "base_model.model." + name.replace("peft.default.", ""): p.grad
        for name, p in ModelView(model).adapter_parameters.items()
    }
    assert ours.keys() == theirs.keys()
    assert max(gradient.abs().max() for gradient in ours.values()) > 1e-3
    assert max((gradient - theirs[name]).abs().max() for name, gradient in ours.items()) <= 1e-9


def test_threads_have_texts_of_their_own() -> None:
    model = made()
    texts = [IDS, IDS.flip(1), IDS[:2], IDS[2:]]
    expected, found = [model(input_ids=text).logits for text in texts], {}

    def run(number: int) -> None:
        for _ in range(5):
            found[number] = model(input_ids=texts[number]).logits

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(4))


def test_it_compiles_as_one_program() -> None:
    model = made()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(input_ids=IDS, use_cache=False).logits, model(input_ids=IDS).logits)


class Text(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = build("llama")[0]

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def test_a_run(tmp_path: Path) -> None:
    module, options = Text(), {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = PEFTStrategy(LoRA(r=2, alora_invocation_tokens=TOKENS))
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", strategy=strategy, default_root_dir=tmp_path, **options)
    trainer.fit(module, DataLoader(IDS, batch_size=2))
    path = tmp_path / "a"
    save_adapter(module, path)
    found, base = module.model.eval()(input_ids=IDS).logits, build("llama")[0](input_ids=IDS).logits
    judge = peft.PeftModel.from_pretrained(build("llama")[0], str(path))
    assert (found - base).abs().max() > 1e-2
    assert (judge(input_ids=IDS).logits - found).abs().max() <= 1e-5


@pytest.mark.parametrize(("tokens", "told"), [([4, 4, 4], True), (TOKENS, False)])
def test_a_run_whose_texts_activate_nothing_is_told(
    tokens: list[int], told: bool, recwarn: pytest.WarningsRecorder, tmp_path: Path
) -> None:
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = PEFTStrategy(LoRA(r=2, alora_invocation_tokens=tokens))
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", strategy=strategy, default_root_dir=tmp_path, **options)
    trainer.fit(Text(), DataLoader(IDS, batch_size=4))
    assert any("All gradients of adapters were zero" in str(warning.message) for warning in recwarn) == told


CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no ids": (lambda m: m(inputs_embeds=torch.zeros(1, 3, 32).double()), "called without input_ids"),
    "other rows": (lambda m: rest(m, filled(m, IDS), IDS[:2]), "2 rows go on from a cache of 4"),
    "a layer alone": (lambda m: m.model.layers[0].mlp.up_proj(torch.zeros(1, 32).double()), "outside of a call"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_does_not_show_the_text(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(PEFTError, match=message):
        call(made())


def test_a_token_that_no_text_has() -> None:
    with pytest.raises(PEFTError, match=r"alora_invocation_tokens has 50, and the model knows the tokens 0 to 49"):
        made(tokens=[3, 50])


def test_rows_of_several_texts() -> None:
    """Positions of padding in front do not count as another text."""
    model = made()
    ids, positions = torch.arange(10, 16)[None], torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(PEFTError, match="this row holds several texts: its position_ids begin anew"):
        model(input_ids=ids, position_ids=positions)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]])
    model(input_ids=ids, position_ids=torch.tensor([[1, 1, 1, 0, 1, 2]]), attention_mask=mask)


def test_a_layer_that_is_given_other_rows() -> None:
    model = made()
    model(input_ids=IDS)
    adapter = next(slot["default"] for name, _, slot in ModelView(model).slots if name.endswith("up_proj"))
    assert torch.equal(adapter.active(torch.zeros(32, 3)).reshape(4, 8), adapter.active(torch.zeros(4, 8, 3))[..., 0])
    with pytest.raises(PEFTError, match=r"was given \[5, 32\] in a call with 4 rows of 8 tokens.*exclude_modules"):
        adapter.active(torch.zeros(5, 32))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (LoRA, {"alora_invocation_tokens": []}, r"alora_invocation_tokens=\[\] was given; a list of ids"),
        (LoRA, {"alora_invocation_tokens": ["a"]}, r"\['a'\] was given; a list of ids"),
        (LoRA, {"alora_invocation_tokens": [-1]}, r"\[-1\] was given; a list of ids"),
        (LoRA, {"alora_invocation_tokens": "<inv>"}, r"'<inv>' was given; .*tokenizer.encode"),
        (LoRA, {"alora_invocation_tokens": [1], "init": "pissa"}, "not with init='pissa'"),
        (LoRA, {"alora_invocation_tokens": [1], "lora_bias": True}, "not with lora_bias=True"),
        (LoRA, {"alora_invocation_tokens": [1], "fused_parts": ["q"]}, r"not with fused_parts=\['q'\]"),
        (DoRA, {"alora_invocation_tokens": [1]}, "not with DoRA"),
    ],
)
def test_refused_options(method: type[LoRA], options: dict[str, Any], message: str) -> None:
    with pytest.raises(PEFTError, match=message):
        method(**options)


@pytest.mark.parametrize("family", ["t5", "bert", "sequential", "whisper"])
def test_refused_models(family: str) -> None:
    with pytest.raises(PEFTError, match=r"LoRA with alora_invocation_tokens works on decoder-only transformers models"):
        inject(build(family)[0], LoRA(alora_invocation_tokens=TOKENS))
    decoder = plain().model
    with pytest.raises(PEFTError, match="works on causal language models; a LlamaModel was given"):
        inject(decoder, LoRA(alora_invocation_tokens=TOKENS))


def test_refused_beside_others() -> None:
    with pytest.raises(PEFTError, match="LoRA and LoReFT would both"):
        inject(plain(), [LoRA(alora_invocation_tokens=TOKENS), LoReFT()])
    with pytest.raises(PEFTError, match="embed_tokens"):
        inject(plain(), LoRA(alora_invocation_tokens=TOKENS, target_modules=["embed_tokens"]))
