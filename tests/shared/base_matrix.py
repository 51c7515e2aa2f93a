"""What runs on every base strategy: cells (a model, and what adapts it), bases, and what is refused and why."""

from collections.abc import Callable
from typing import Any

import deepspeed_script
import torch
from distributed_script import CPUFSDPStrategy, parallel
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from lightning_peft import (
    BEFT,
    IA3,
    OFT,
    AdaLoRA,
    BitFit,
    Compacter,
    DoRA,
    FullFinetuning,
    LayerNormTuning,
    LoHa,
    LoKr,
    LoRA,
    LoReFT,
    MiSS,
    NewTokens,
    ParallelAdapter,
    PEFTMethod,
    PrefixTuning,
    PromptTuning,
    SeriesAdapter,
    VeRA,
)

VOCABULARY = 31  # which two processes do not divide


class Text(nn.Module):
    """A language model of transformers'."""

    def __init__(self, mixture: bool = False) -> None:
        super().__init__()
        # Weights of the usual size would make models this small so flat that no method could do anything.
        sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        sizes |= {"initializer_range": 0.25, "use_cache": False}
        if mixture:
            self.model: nn.Module = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2))
        else:
            self.model = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True))
            for name, parameter in self.model.named_parameters():
                # transformers starts them at zero, where a bias that got lost would not be seen.
                if name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 8).long().abs() % VOCABULARY
        # The first two tokens are the prompt.
        labels = torch.where(torch.arange(ids.shape[1]) < 2, -100, ids)
        return self.model(input_ids=ids, labels=labels).loss


class Net(nn.Module):
    """A part of one's own before two linear layers, of which the last has three outputs."""

    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.body, self.up, self.down = body(), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.down(self.up(self.body(x)).relu()) - x[:, :3]).square().mean()


class Attention(nn.Module):
    """Two layers, whose projections are read without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] * torch.arange(1.0, 4.0)[:, None] / 3
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x.mean(1)


class Experts(nn.Module):
    """Three of them in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("be,eoi,bi->bo", x[:, :3].softmax(-1), self.weights, x)


class Words(nn.Module):
    """An embedding, whose weight is the last layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 3).long().abs() % 11
        return nn.functional.cross_entropy(self.out(self.up(self.words(ids))).flatten(0, 1), ids.roll(1, 1).flatten())


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x * 3).long().abs() % 11).mean(1)


class Window(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, None]).tanh().mean(1)


class Counting(nn.Module):
    """Counts the batches of training in what is neither parameter nor buffer, and has its outputs depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        return x * (1 + 0.1 * self.count)

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


Build = Callable[[], nn.Module]
HEAD = ["up", "down"]
CELLS: dict[str, tuple[Build, PEFTMethod | list[PEFTMethod], list[str] | None]] = {
    "AdaLoRA": (Text, AdaLoRA(init_r=3, target_r=2, tinit=1, tfinal=1), None),
    "BEFT": (Text, BEFT(), None),
    "BitFit": (Text, BitFit(), None),
    "BitFit(create_missing=True)": (Text, BitFit(create_missing=True), None),
    "Compacter": (Text, Compacter(bottleneck=4), None),
    "DoRA": (Text, DoRA(r=2), None),
    "FullFinetuning": (Text, FullFinetuning(), None),
    "IA3": (Text, IA3(), None),
    "LayerNormTuning": (Text, LayerNormTuning(), None),
    "LoHa": (Text, LoHa(r=2), None),
    "LoKr": (Text, LoKr(r=1, decompose_both=True), None),
    "LoRA": (Text, LoRA(r=2), None),
    'LoRA(init="pissa")': (Text, LoRA(r=2, init="pissa"), None),
    "LoReFT": (Text, LoReFT(r=2, prefix_positions=1, suffix_positions=1), None),
    "MiSS": (Text, MiSS(r=3), None),
    "NewTokens": (Text, NewTokens(token_indices=[1, 2, 9]), None),
    "OFT": (Text, OFT(block_size=4), None),
    "ParallelAdapter": (Text, ParallelAdapter(bottleneck=4), None),
    "PrefixTuning": (Text, PrefixTuning(num_virtual_tokens=3), None),
    "PrefixTuning(prefix_projection=True)": (
        Text,
        PrefixTuning(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6),
        None,
    ),
    "PrefixTuning with ParallelAdapter": (
        Text,
        [PrefixTuning(num_virtual_tokens=3), ParallelAdapter(bottleneck=4)],
        None,
    ),
    "PromptTuning": (Text, PromptTuning(num_virtual_tokens=3), None),
    "PromptTuning(every_layer=True)": (
        Text,
        PromptTuning(num_virtual_tokens=3, num_infix_tokens=2, every_layer=True),
        None,
    ),
    "SeriesAdapter": (Text, SeriesAdapter(bottleneck=4), None),
    'SeriesAdapter(preset="pfeiffer")': (Text, SeriesAdapter(bottleneck=4, preset="pfeiffer"), None),
    "VeRA": (Text, VeRA(r=6, d_initial=1.0), None),
    "LoRA on `nn.MultiheadAttention`": (
        lambda: Net(Attention),
        LoRA(r=2, target_modules=["body.layers.0", "body.layers.1", *HEAD]),
        None,
    ),
    "LoRA on experts in one parameter": (lambda: Net(Experts), LoRA(r=2, target_modules=["body.weights", *HEAD]), None),
    "LoRA on Mixtral's experts": (
        lambda: Text(mixture=True),
        LoRA(r=2, target_modules=["experts.down_proj", "experts.gate_up_proj"]),
        None,
    ),
    "LoRA on an embedding": (lambda: Net(Rows), LoRA(r=2, target_modules=["body.table", *HEAD]), None),
    "LoRA on a convolution": (lambda: Net(Window), LoRA(r=2, target_modules=["body.conv", *HEAD]), None),
    "LoRA beside a head trained whole": (lambda: Net(nn.Identity), LoRA(r=2, target_modules=["up"]), ["down"]),
    "NewTokens on tied weights": (Words, NewTokens(token_indices=[1, 2, 9], target_modules=["words"]), None),
    "LoRA beside extra state": (lambda: Net(Counting), LoRA(r=2), None),
    "LoRA that tokens activate": (Text, LoRA(r=2, alora_invocation_tokens=[3]), None),
}
BASES: dict[str, Callable[[], Strategy | str]] = {
    "ddp": lambda: "ddp",
    "fsdp": lambda: CPUFSDPStrategy(auto_wrap_policy={LlamaDecoderLayer, MixtralDecoderLayer}),
    "fsdp2": lambda: parallel(2, 1),
    "fsdp2_late": lambda: parallel(2, 1),
    "tensor": lambda: parallel(1, 2),
    "stage1": lambda: deepspeed_script.base(1),
    "stage2": lambda: deepspeed_script.base(2),
    "stage3": lambda: deepspeed_script.base(3),
}
STAGES = ("stage1", "stage2", "stage3")

TOO_LATE = "ZeRO-3 takes transformers' mixtures for one module each, and would not wait for adapters inside"
# Why a cell is refused: in the words of a page, and as a pattern of the error.
REASONS: dict[str, str] = {
    "DeepSpeed keeps gradients to itself": "reads and changes gradients",
    "ZeRO-3 puts parameters together for calls of modules alone": "ZeRO-3 has the virtual tokens in pieces",
    TOO_LATE: "adapters on them would be trained too late",
    "the MLP of the prefix is in shards, unless it is injected after": "in shards, and cannot be folded",
    "a prefix is for all heads": "Tensor parallelism has split .* for all of them",
    "it starts from weights in shards, unless it is injected before": "computed here: its weights are in shards",
    "it rotates inputs that are whole": "'oft_R' is split beside",
    "what is trained is whole on every process": "keeps what is trained whole on every process",
}
GRADIENTS, CALLS, _, SHARDS, HEADS, START, ROTATED, WHOLE = REASONS
PREFIXES = ("PrefixTuning", "PrefixTuning(prefix_projection=True)", "PrefixTuning with ParallelAdapter")
REFUSED: dict[tuple[str, str], str] = {
    **{(base, "AdaLoRA"): GRADIENTS for base in STAGES},
    **{("stage3", cell): CALLS for cell in PREFIXES},
    ("stage3", "LoRA on Mixtral's experts"): TOO_LATE,
    ("fsdp", "FullFinetuning"): WHOLE,
    ("fsdp2", "PrefixTuning(prefix_projection=True)"): SHARDS,
    **{("tensor", cell): HEADS for cell in PREFIXES},
    ("tensor", "OFT"): ROTATED,
    ("fsdp2_late", "PromptTuning(every_layer=True)"): START,
}
# New biases are merged where the layers are whole: a parameter that comes new into shards belongs to none.
ATTACHED = {(base, "BitFit(create_missing=True)") for base in ("fsdp", "fsdp2", "fsdp2_late", "tensor", "stage3")}
EVERY = [(base, cell) for base in BASES for cell in CELLS]
QUICK = [
    (base, cell)
    for column, base in enumerate(BASES)
    for row, cell in enumerate(CELLS)
    # Each cell on one base; DeepSpeed, whose runs take three times as long, has two for each stage beside these.
    if (row + column) % (17 if base in STAGES else 5) == 0
]
