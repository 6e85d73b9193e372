"""A callback for PyTorch Lightning's `Trainer`."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed, nn

from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning
from bnsurgery.nn import set_process_group_
from bnsurgery.records.record import carries_record
from bnsurgery.statistics.calibration import recalibrate_
from bnsurgery.surgery.folding import fold
from bnsurgery.surgery.insertion import insert

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise BNSurgeryError(
        "integrations: LightningCallback needs lightning, which is not installed: pip install lightning"
    ) from error


class LightningCallback(Callback):
    """Insert BatchNorm before training, measure its statistics before every validation, and fold it at the end.

    `Trainer.fit` replaces the module's network by one with BatchNorm, before `configure_optimizers`, and moves it to
    the device of training first. With several processes, the batch statistics are those of all processes. The
    statistics are measured again (`recalibrate_`) before each validation and after the last step, unless no step was
    taken since the last time. The module keeps the network with BatchNorm, so that it loads its checkpoints; the
    network to ship is `folded`.

    A module whose network has BatchNorm from `insert` already is not inserted into again.

    Args:
        network: fqn in the `LightningModule` of the network to insert into, such as "model" or "model.backbone".
        batches: calibration inputs, as for `insert`; None for the `train_dataloader()` of the datamodule, or else of
            the module, which is read once at the insertion and once per recalibration.
        recalibrate: whether to measure the statistics again. Pass False if the mode of all norms is "running".
        fold: whether to fold at the end of `Trainer.fit`. Pass False with a strategy that shards the parameters.
        options: the other arguments of `insert`.

    Attributes:
        folded: None, or after `Trainer.fit` a copy of the trained network without BatchNorm, in eval mode.

    Raises:
        BNSurgeryError: at import, lightning is not installed; in `Trainer.fit`, the module has no such network, or
            there is no `train_dataloader()`. Other errors are those of `insert`, `recalibrate_` and `fold`.
        ValueError: `network` is empty.

    Examples:
        >>> import lightning
        >>> callback = bnsurgery.integrations.LightningCallback("model", layers="conv")
        >>> trainer = lightning.Trainer(callbacks=[callback], logger=False, barebones=True, accelerator="cpu")
        >>> callback.folded is None  # until trainer.fit(module, datamodule=datamodule) ends
        True
    """

    def __init__(
        self,
        network: str = "model",
        batches: Iterable[Any] | None = None,
        *,
        recalibrate: bool = True,
        fold: bool = True,
        **options: Any,
    ) -> None:
        if not network:
            raise ValueError("LightningCallback: `network` is empty: pass the name of the module's network")
        self.network, self.batches, self.options = network, batches, options
        self.recalibrate, self.fold = recalibrate, fold
        self.folded: nn.Module | None = None
        self._measured_at = 0  # in optimizer steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Insert at the start of `Trainer.fit`, on every process."""
        if stage != "fit":
            return
        self._measured_at, self.folded = 0, None  # of an earlier fit
        network = self._network(pl_module)
        if self.batches is None:
            source = trainer.datamodule or pl_module
            if not is_overridden("train_dataloader", source):
                raise BNSurgeryError(
                    f"LightningCallback: {type(source).__name__} has no train_dataloader() to calibrate on: pass "
                    "`batches`, such as the loader"
                )
            self.batches = source.train_dataloader()
        if not carries_record(network):
            network.to(trainer.strategy.root_device)
            with warnings.catch_warnings():  # a network in train mode is what a trainer wants
                warnings.filterwarnings("ignore", ".*is in train mode", BNSurgeryWarning)
                network = insert(network, self.batches, **self.options)
            pl_module.set_submodule(self.network, network)
        if distributed.is_available() and distributed.is_initialized():
            set_process_group_(network, distributed.group.WORLD)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the statistics of the weights that are validated."""
        if trainer.state.fn == "fit":
            self._recalibrate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the statistics of the last weights, and fold."""
        self._recalibrate(trainer, pl_module)
        if self.fold:
            self.folded = fold(self._network(pl_module)).eval()

    def _recalibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.recalibrate and trainer.global_step != self._measured_at:
            assert self.batches is not None, "setup has run"
            with torch.inference_mode(False):
                recalibrate_(self._network(pl_module), self.batches)
            self._measured_at = trainer.global_step

    def _network(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.network)
        except AttributeError as error:
            raise BNSurgeryError(
                f"LightningCallback: {type(pl_module).__name__} has no network '{self.network}': pass its name as "
                f"`network` ({error})"
            ) from None
