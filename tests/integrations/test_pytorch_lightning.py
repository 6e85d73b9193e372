"""The callback in PyTorch Lightning's own trainer."""

import importlib
import sys

import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import bnsurgery
from bnsurgery import BNSurgeryError

UNTIL_IT_ENDS = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def test_without_lightning_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "bnsurgery.integrations.pytorch_lightning", raising=False)
    with pytest.raises(BNSurgeryError, match="needs lightning, which is not installed: pip install lightning"):
        importlib.import_module("bnsurgery.integrations.pytorch_lightning")


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


@pytest.fixture
def data(images):
    return TensorDataset(images(32, 8), torch.arange(32) % 4)


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(8 * 36, 4))


@pytest.fixture
def make(lightning, data):
    """A module and a datamodule; the module keeps, by validation, how far its first norm is from the data's means."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.off, self.moved = network(), [], []

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, index):
            if index == 0:
                conv, norm = self.model[0], self.model[1]
                self.off.append((norm.running_mean - conv(data.tensors[0]).mean((0, 2, 3))).abs().max().item())
                self.moved.append((norm.running_mean - norm.bias).abs().max().item())
            self.log("loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

        test_step = validation_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(data, 8, shuffle=True)

        def val_dataloader(self):
            return DataLoader(data, 16)

        test_dataloader = val_dataloader

    return lambda: (Module(), Data())


@pytest.fixture
def trainer(lightning, tmp_path):
    def build(*callbacks, epochs=2, **options):
        return lightning.Trainer(
            max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", default_root_dir=tmp_path, logger=False,
            enable_progress_bar=False, enable_model_summary=False, **options,
        )  # fmt: skip

    return build


@pytest.mark.slow
@UNTIL_IT_ENDS
def test_inserts_recalibrates_and_folds(make, trainer, data, recwarn):
    module, datamodule = make()
    module.model[2].eval()  # a part that stays in eval mode
    keys, x = list(module.model.state_dict()), data.tensors[0]
    callback = bnsurgery.integrations.LightningCallback(layers="conv", eps=1e-3)
    trainer(callback, enable_checkpointing=False).fit(module, datamodule=datamodule)
    norm = module.model[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.eps == 1e-3 and norm.training and not module.model[3].training
    assert not any("train mode" in str(warning.message) for warning in recwarn)
    assert len(module.off) == 3 and max(module.off) < 1e-5  # the sanity check's and two epochs'
    assert module.moved[0] == 0 and min(module.moved[1:]) > 1e-4  # its norms are trained
    folded = callback.folded
    assert list(folded.state_dict()) == keys and not folded.training
    module.eval()
    torch.testing.assert_close(folded(x), module.model(x), rtol=1e-4, atol=1e-5)
    before = module.model
    trainer(callback, enable_checkpointing=False, epochs=1).fit(module, datamodule=datamodule)
    assert module.model is before, "inserted once"


@pytest.mark.slow
@UNTIL_IT_ENDS
def test_statistics_are_of_the_last_step_without_a_validation_too(make, trainer, data):
    module, datamodule = make()
    callback = bnsurgery.integrations.LightningCallback("model", [data.tensors[0]])
    trainer(callback, enable_checkpointing=False, limit_val_batches=0).fit(module, datamodule=datamodule)
    with torch.no_grad():
        mean = module.model[0](data.tensors[0]).mean((0, 2, 3))
    torch.testing.assert_close(module.model[1].running_mean, mean)
    trainer(callback, enable_checkpointing=False, limit_val_batches=0).fit(module, datamodule=datamodule)  # once more
    with torch.no_grad():
        again = module.model[0](data.tensors[0]).mean((0, 2, 3))
    assert not torch.allclose(again, mean)
    torch.testing.assert_close(module.model[1].running_mean, again)
    module, datamodule = make()
    callback = bnsurgery.integrations.LightningCallback(recalibrate=False, fold=False)
    trainer(callback, enable_checkpointing=False).fit(module, datamodule=datamodule)
    assert module.off[0] < 1e-5 < module.off[-1] and callback.folded is None


@pytest.mark.slow
@UNTIL_IT_ENDS
def test_checkpoints_resume_and_are_tested(make, trainer, lightning, tmp_path):
    module, datamodule = make()
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor="loss")
    first = trainer(bnsurgery.integrations.LightningCallback(), checkpoint, epochs=1)
    first.fit(module, datamodule=datamodule)
    validated = first.callback_metrics["loss"]
    (tested,) = first.test(module, datamodule=datamodule, ckpt_path="best", verbose=False)
    assert tested["loss"] == pytest.approx(validated.item(), rel=1e-5)
    resumed, datamodule = make()
    again = trainer(bnsurgery.integrations.LightningCallback(), enable_checkpointing=False, num_sanity_val_steps=0)
    again.fit(resumed, datamodule=datamodule, ckpt_path=checkpoint.best_model_path)
    assert again.global_step == 8 and len(resumed.off) == 1  # the second of two epochs of four steps


@pytest.mark.slow
@UNTIL_IT_ENDS
def test_processes_share_the_batch_statistics(make, trainer):
    module, datamodule = make()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        callback = bnsurgery.integrations.LightningCallback()
        trainer(callback, enable_checkpointing=False, epochs=1).fit(module, datamodule=datamodule)
        assert module.model[1].process_group == distributed.group.WORLD.group_name
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@UNTIL_IT_ENDS
def test_refusals_leave_the_module_as_it_is(make, trainer):
    module, datamodule = make()
    before = module.model
    callback = bnsurgery.integrations.LightningCallback("net")
    with pytest.raises(BNSurgeryError, match="LightningCallback: Module has no network 'net'"):
        trainer(callback, enable_checkpointing=False).fit(module, datamodule=datamodule)
    callback = bnsurgery.integrations.LightningCallback()
    with pytest.raises(BNSurgeryError, match=r"Module has no train_dataloader\(\) to calibrate on: pass `batches`"):
        trainer(callback, enable_checkpointing=False).fit(module, datamodule.train_dataloader())
    assert module.model is before and str(before) == str(network())
    with pytest.raises(ValueError, match="`network` is empty"):
        bnsurgery.integrations.LightningCallback("")
