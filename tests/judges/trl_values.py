"""Prints the mean loss and margin that TRL's DPOTrainer has for the pairs of ``test_preference_tuning.py``.

Run in an environment that has TRL beside this package: ``PYTHONPATH=tests/tasks python tests/judges/trl_values.py``.
"""

from pathlib import Path
from tempfile import mkdtemp

import test_preference_tuning as test
import transformers as t
from datasets import Dataset
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from trl import DPOConfig, DPOTrainer

from lightning_peft import save_adapter


def main() -> None:
    folder = Path(mkdtemp())
    base = test.model.__wrapped__(folder)
    save_adapter(test.with_known_values(base), folder / "adapter")
    config = LoraConfig.from_pretrained(folder / "adapter")
    config.inference_mode = False
    # TRL puts nothing between a prompt and its answer, and the marker of the end behind it.
    pairs = [{**pair, **{key: f" {pair[key]}" for key in ("chosen", "rejected")}} for pair in test.PAIRS]
    tokenizer = t.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = DPOTrainer(
        t.AutoModelForCausalLM.from_pretrained(base),
        args=DPOConfig(str(folder), beta=0.5, use_cpu=True, report_to=[], bf16=False),
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=config,
    )
    # The reference is the base; the adapter that the trainer has made takes the values of ours.
    set_peft_model_state_dict(trainer.model, load_peft_weights(folder / "adapter"))
    found = trainer.evaluate()
    print(found["eval_loss"], found["eval_rewards/margins"])


if __name__ == "__main__":
    main()
