"""LightningModules that were written without a pipeline in mind, and their data."""

import os
from itertools import pairwise

import lightning as L
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset

from aimc_pl.optim import AsyncNAdam, SpikeCompensatedSGD

OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "AsyncNAdam": lambda parameters: AsyncNAdam(parameters, 3, lr=0.01),
    "SpikeCompensatedSGD": lambda parameters: SpikeCompensatedSGD(parameters, lr=0.02),
}


class Configurable(L.LightningModule):
    optimizer = "momentum"

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](self.parameters())


class Attributes(Configurable):
    """A module with layers as attributes and functional code in its forward."""

    def __init__(self):
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 9)
        self.norm, self.l4 = nn.LayerNorm(9), nn.Linear(9, 3)

    def forward(self, x):
        hidden = torch.tanh(self.l1(x))
        hidden = hidden + F.gelu(self.l2(hidden))
        return self.l4(self.norm(torch.tanh(self.l3(hidden))))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


class MLP(Configurable):
    """A module whose layers are a Sequential in one submodule."""

    def __init__(self):
        super().__init__()
        widths = [6, 8, 8, 8, 8]
        layers = [x for a, b in pairwise(widths) for x in (nn.Linear(a, b), nn.Tanh())]
        self.net = nn.Sequential(*layers, nn.Linear(8, 3))

    def training_step(self, batch):
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1]), "labels": batch[1]}


class ConvNet(Configurable):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2), nn.Tanh(), nn.Conv2d(6, 6, 2)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.features(x.view(-1, 1, 6, 6)).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0].repeat(1, 6)), batch[1])


class TorchvisionResNet(Configurable):
    """torchvision's ResNet-18 with its BatchNorm in eval mode, as in fine-tuning."""

    def __init__(self):
        super().__init__()
        self.model = torchvision.models.resnet18(num_classes=3).eval()

    def training_step(self, batch, batch_idx):
        x = batch[0].repeat(1, 32)[:, : 3 * 8 * 8].view(-1, 3, 8, 8)
        return F.cross_entropy(self.model(x), batch[1])


class DictBatch(Configurable):
    """A module with a dict batch, layers before the backbone, an auxiliary input and a learned scale in the loss."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.backbone = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5)))
        self.head = nn.Linear(8, 3)
        self.temperature = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        hidden = self.backbone(torch.tanh(self.embed(batch["inputs"]["x"])))
        logits = self.head(hidden) * self.temperature
        loss = (F.cross_entropy(logits, batch["y"], reduction="none") * batch["weight"]).mean()
        return {"loss": loss, "scale": batch["scale"]}


class Samples(Dataset):
    """A data set of 19 samples, which gives uneven mini-batches of 8, 8 and 3."""

    def __init__(self, as_dict=False, length=19):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(length, 6, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, 3, (length,), generator=generator)
        self.as_dict = as_dict

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x, y = self.x[index], self.y[index]
        if self.as_dict:
            return {"inputs": {"x": x}, "y": y, "weight": x.abs().mean(), "scale": x.sum()}
        return x, y


def loader(module, batch_size=8, shuffle=True, length=19):
    return DataLoader(Samples(isinstance(module, DictBatch), length), batch_size=batch_size, shuffle=shuffle)


def make_trainer(strategy="auto", **kwargs):
    defaults = {
        "max_epochs": 2,
        "accelerator": os.environ.get("TEST_ACCELERATOR", "cpu"),
        "precision": "64-true",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(strategy=strategy, **{**defaults, **kwargs})
