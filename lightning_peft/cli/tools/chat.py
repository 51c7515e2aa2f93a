"""The command ``lightning-peft chat``: a conversation with a model and its adapters in the terminal."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lightning_peft.cli.tools.inspect import base_name
from lightning_peft.core.contexts import disable
from lightning_peft.errors import PEFTError
from lightning_peft.operations.inject import set_adapter
from lightning_peft.storage.loading import load_adapter
from lightning_peft.tasks.batches.chat import ChatTemplate
from lightning_peft.tasks.batches.layouts import Conversation, Message
from lightning_peft.tasks.pretrained import Dtype, load_model, load_tokenizer

HELP = """/adapter NAME   switch to an adapter: one that is loaded, a directory, or 'none' for the base model
/new            begin a new conversation
/quit           end (as the end of input does)"""


def chat(
    adapter: str,
    model: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    dtype: Dtype = "float32",
) -> None:
    """Talk to a causal language model with an adapter, in the terminal.

    Answers appear as they are generated. Models whose tokenizer has no chat template get each line as it is, without
    those before it.

    Args:
        adapter: The adapter directory, of this package or of Hugging Face PEFT.
        model: The base model: a directory, a name on the Hugging Face hub, or package:NAME. The one that the adapter
            names, if not given.
        system: What the model is told before the conversation.
        max_new_tokens: Tokens after which an answer ends.
        temperature: 0 takes the likeliest token at each step; a higher one draws more widely.
        dtype: Of the weights in memory.

    Raises:
        PEFTError: The adapter does not belong to the model, or a value is out of bounds.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise PEFTError(
            f"temperature={temperature}, max_new_tokens={max_new_tokens}: expected a temperature from 0 on and at "
            "least one token"
        )
    name = model or base_name(Path(adapter))
    talk = Talk(load_model(name, AutoModelForCausalLM, dtype=dtype).eval(), load_tokenizer(name), system)
    talk.options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        talk.options["temperature"] = temperature
    talk.switch(adapter)
    print(HELP)
    while (line := _read(f"[{talk.adapter}] > ")) is not None:
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            talk.begin()
        elif command == "/adapter":
            try:
                talk.switch(argument.strip())
            except PEFTError as error:
                print(error)
        elif command.startswith("/"):
            print(HELP)
        elif line:
            talk.say(line)


@dataclass
class Talk:
    """A conversation, and the model that has it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    system: str | None
    adapter: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    loaded: dict[str, str] = field(default_factory=dict)
    """The names of loaded adapters, by the directories that they came from."""

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def switch(self, adapter: str) -> None:
        """Let another adapter run, or none.

        Raises:
            PEFTError: It is neither loaded nor a directory, or cannot be loaded.
        """
        names = [*self.loaded.values(), "none"]
        if adapter not in names:
            if not Path(adapter).is_dir():
                raise PEFTError(f"there is no adapter {adapter!r}; expected a directory or one of {', '.join(names)}")
            place = str(Path(adapter).resolve())
            if place not in self.loaded:
                name = Path(place).name.replace(".", "_")
                name = name if name not in names else f"{name}_{len(names)}"
                load_adapter(self.model, place, name=name)
                self.loaded[place] = name
            adapter = self.loaded[place]
        if adapter != "none":
            set_adapter(self.model, adapter)
        self.adapter = adapter

    def say(self, line: str) -> None:
        """Print the model's answer as it is generated."""
        self.messages.append({"role": "user", "content": line})
        inputs = self._inputs(line).to(self.model.device)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode(), disable(self.model) if self.adapter == "none" else nullcontext():
            generate: Any = self.model.generate
            tokens = generate(**inputs, streamer=streamer, pad_token_id=self.tokenizer.pad_token_id, **self.options)
        answer = self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        # A template may refuse an empty turn.
        self.messages.append({"role": "assistant", "content": answer or " "})

    def _inputs(self, line: str) -> Any:
        if not self.tokenizer.chat_template:
            return self.tokenizer(line, return_tensors="pt")
        text = ChatTemplate(self.tokenizer).prompt(Conversation("the conversation", self.messages))
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")


def _read(prompt: str) -> str | None:
    try:
        line = input(prompt if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return line.strip()
