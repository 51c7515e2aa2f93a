"""``python -m lightning_peft`` is the command ``lightning-peft``."""

from lightning_peft.cli import main

if __name__ == "__main__":
    main()
