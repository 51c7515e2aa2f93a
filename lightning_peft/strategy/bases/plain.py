"""State that Lightning's sharded strategies handle in ways of their own, handled as on one device."""

from __future__ import annotations

from lightning.pytorch.strategies import Strategy


class PlainState(Strategy):
    """Stands between ``PEFTStrategy`` and a base strategy that loads and saves model and optimizers together.

    Adapter state is small, and ``PEFTStrategy`` names its tensors: it is read whole, before ``setup`` as on one device
    (which also keeps the user's ``weights_only``, dropped by Lightning where it restores after ``setup``), and given to
    each process in its pieces.
    """

    restore_checkpoint_after_setup = Strategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    load_checkpoint = Strategy.load_checkpoint
    setup_optimizers = Strategy.setup_optimizers
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
