"""Public models, small and with random weights, in LightningModules as their users write them.

The script trains the models that have two stages in two processes, and writes their weights:

python tests/public_models.py RESULTS
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import lightning as L
import torch
import torch.nn.functional as F
import transformers
from lightning_modules import make_trainer
from timm.models import convnext, create_model, resnet, swin_transformer, vision_transformer
from torch import nn
from torch.utils.data import DataLoader
from torch_geometric import nn as gnn
from torch_geometric.data import Batch, Data

from aimc_pl.strategies import AnalogPipelineStrategy

transformers.logging.set_verbosity_error()

# ------------------------------------------------------------ LightningModules


class Public(L.LightningModule):
    sgd = MappingProxyType({"lr": 0.02, "momentum": 0.9})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.sgd)


class Wrapper(Public):
    def __init__(self, model):
        super().__init__()
        self.model = model


class OwnLoss(Wrapper):
    """A model of Hugging Face that computes its own loss."""

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss


class MaskedTokens(Wrapper):
    """A language model whose loss is the mean over the masked tokens. Their number differs from sample to sample."""

    def training_step(self, batch, batch_idx):
        logits = self.model(batch["input_ids"]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def masked_tokens(batch):
    return int((batch["labels"] != -100).sum())


class Labels(Wrapper):
    """A classifier of samples or of their pixels."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.model(x), y)


class Up(nn.Module):
    def __init__(self, channels, skip):
        super().__init__()
        self.conv = block(channels + skip, skip)

    def forward(self, x, skip):
        if x.shape[2:] != skip.shape[2:]:
            x = F.interpolate(x, size=skip.shape[2:])
        return self.conv(torch.cat([skip, x], dim=1))


def block(channels, width):
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU())


class UNet(nn.Module):
    """A U-Net. Its connections skip from the first stages to the last ones."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.down3 = block(3, 4), block(4, 8), block(8, 8)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = Up(8, 8), Up(8, 4)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        skip1 = self.down1(x)
        skip2 = self.down2(self.pool(skip1))
        x = self.down3(self.pool(skip2))
        return self.head(self.up1(self.up2(x, skip2), skip1))


class Translator(Public):
    """torch's encoder and decoder. The encoder's output goes to every layer of the decoder."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(20, 16), nn.Embedding(20, 16)
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 20)

    def training_step(self, batch, batch_idx):
        source, target = batch
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1] - 1, dtype=self.dtype)
        hidden = self.transformer(self.source(source), self.target(target[:, :-1]), tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), target[:, 1:].flatten())


class Recurrent(Public):
    """A network of two recurrent layers of a given kind."""

    def __init__(self, kind, batch_first=True):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.first = kind(16, 16, batch_first=batch_first)
        self.second = kind(16, 16, batch_first=batch_first, bidirectional=True)
        self.head = nn.Linear(32, 3)
        self.time = 1 if batch_first else 0

    def training_step(self, batch, batch_idx):
        tokens, y = batch
        hidden, _ = self.first(self.embed(tokens))
        hidden, _ = self.second(torch.tanh(hidden))
        return F.cross_entropy(self.head(hidden.mean(self.time)), y)


class TimeFirst(Recurrent):
    """A recurrent network on batches of shape (time, samples)."""

    def __init__(self):
        super().__init__(nn.GRU, batch_first=False)

    def split_batch(self, batch, num_microbatches):
        tokens, y = batch
        parts = tokens.tensor_split(num_microbatches, dim=1), y.tensor_split(num_microbatches)
        return list(zip(*parts, strict=True))


class VAE(Public):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(16, 4), nn.Linear(16, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        return F.mse_loss(self.decoder(code), x) + 0.1 * divergence


class SimCLR(Public):
    """A network that takes two views of each sample in one pass. The loss compares every view with all other views."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(block(3, 8), nn.MaxPool2d(2), block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projector = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

    def training_step(self, batch, batch_idx):
        z = F.normalize(self.projector(self.backbone(torch.cat(batch))), dim=1)
        similarity = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
        return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


class GraphClassifier(Public):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 16)
        self.conv1 = gnn.GCNConv(16, 16)
        self.conv2 = gnn.GINConv(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
        self.conv3 = gnn.GINConv(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
        self.head = nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        x = self.embed(batch.x)
        for conv in (self.conv1, self.conv2, self.conv3):
            x = torch.tanh(conv(x, batch.edge_index))
        return F.cross_entropy(self.head(gnn.global_mean_pool(x, batch.batch)), batch.y)


# ------------------------------------------------ data: mini-batches of 8 samples


def three(make_batch):
    """Return three mini-batches, the same ones at every call."""
    generator = torch.Generator().manual_seed(3)
    return [make_batch(generator) for _ in range(3)]


def tokens(generator, *shape):
    return torch.randint(1, 20, shape, generator=generator)


def classes(generator, *shape):
    return torch.randint(0, 3, (8, *shape), generator=generator)


def images(size):
    return lambda: three(lambda g: (torch.randn(8, 3, size, size, generator=g), classes(g)))


def next_token():
    def batch(generator):
        text = tokens(generator, 8, 10)
        return {"input_ids": text, "labels": text}

    return three(batch)


def padded_text():
    def batch(generator):
        lengths = torch.randint(4, 11, (8, 1), generator=generator)
        mask = (torch.arange(10) < lengths).long()
        return {"input_ids": tokens(generator, 8, 10) * mask, "attention_mask": mask, "labels": classes(generator)}

    return three(batch)


def masked_text(counts):
    """Return a function that makes batches of masked text.

    Args:
        counts: the number of masked tokens of each sample. Tokens that are not masked have the label -100.
    """

    def batch(generator):
        text = tokens(generator, 8, 10)
        asked = torch.rand(8, 10, generator=generator).argsort(1) < torch.tensor(counts)[:, None]
        return {"input_ids": text.masked_fill(asked, 0), "labels": text.masked_fill(~asked, -100)}

    return lambda: three(batch)


def translations():
    return three(lambda g: {"input_ids": tokens(g, 8, 9), "labels": tokens(g, 8, 7)})


def graphs():
    def batch(generator):
        def graph():
            size = int(torch.randint(3, 7, (), generator=generator))
            edges = torch.randint(0, size, (2, 2 * size), generator=generator)
            x = torch.randint(0, 5, (size,), generator=generator)
            return Data(x=x, edge_index=edges, y=torch.randint(0, 3, (1,), generator=generator), num_nodes=size)

        return Batch.from_data_list([graph() for _ in range(8)])

    return three(batch)


# ------------------------------------------------------------------- the models


@dataclass(frozen=True)
class Case:
    """A model, its data, and what tests need to know of it."""

    make: Callable[[], L.LightningModule]
    data: Callable[[], list]
    split_at: Mapping[int, Sequence[str]]
    """The modules with which stages begin, by the number of stages."""
    exact: Sequence[int] = (1, 2)
    """Numbers of micro-batches that change only the order in which numbers are summed."""
    shared: str | None = None
    """The parameter that several stages use."""
    digital: Sequence[str] = ()
    """Patterns of the linear layers and convolutions that cannot be analog."""
    options: Mapping = field(default_factory=dict)
    """Further arguments of the strategy."""


# With the usual value of 0.02, attention would be nearly uniform at this width.
INIT = {"initializer_range": 0.2}
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, **INIT}


def names(template, *values):
    return [template.format(value) for value in values]


def gpt2(tied):
    return OwnLoss(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=20,
                n_positions=12,
                n_embd=16,
                n_layer=4,
                n_head=2,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
                tie_word_embeddings=tied,
                **INIT,
            )
        )
    )


def llama():
    config = transformers.LlamaConfig(vocab_size=20, num_hidden_layers=4, num_key_value_heads=1, **SMALL)
    return OwnLoss(transformers.LlamaForCausalLM(config))


def bert(make_module, model, **config):
    config = transformers.BertConfig(
        vocab_size=20,
        num_hidden_layers=3,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SMALL,
        **config,
    )
    return make_module(model(config))


def t5():
    config = transformers.T5Config(
        vocab_size=20,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return OwnLoss(transformers.T5ForConditionalGeneration(config))


def hugging_face_vit():
    config = transformers.ViTConfig(num_hidden_layers=4, image_size=8, patch_size=4, num_labels=3, **SMALL)
    return OwnLoss(transformers.ViTForImageClassification(config))


def timm_vit():
    return Labels(vision_transformer.VisionTransformer(8, 4, num_classes=3, embed_dim=16, depth=4, num_heads=2))


def swin():
    return Labels(
        swin_transformer.SwinTransformer(
            16, 2, num_classes=3, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, drop_path_rate=0.0
        )
    )


def timm_convnext():
    return Labels(convnext.ConvNeXt(num_classes=3, depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), ls_init_value=0.1))


def efficientnet():
    return Labels(create_model("test_efficientnet", num_classes=3))


def timm_resnet(training):
    model = resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=3, stem_width=8, channels=(8, 8, 16, 16))
    return Labels(model.train(training))


BERT_SPLITS = {
    2: ["model.bert.encoder.layer.1.output"],
    4: ["model.bert.encoder.layer.1", "model.bert.encoder.layer.1.output", "model.bert.encoder.layer.2"],
}
GPT2_SPLITS = {2: ["model.transformer.h.2"], 4: names("model.transformer.h.{}", 1, "2.mlp", 3)}
RESNET_SPLITS = {2: ["model.layer2.0.conv2"], 4: names("model.{}", "layer1", "layer2", "layer4")}

CASES = {
    "GPT-2": Case(lambda: gpt2(tied=False), next_token, GPT2_SPLITS),
    "GPT-2, tied": Case(lambda: gpt2(tied=True), next_token, GPT2_SPLITS, shared="wte.weight", digital=["*lm_head"]),
    "Llama": Case(llama, next_token, {2: ["model.model.layers.2"], 4: names("model.model.layers.{}", 1, "2.mlp", 3)}),
    "BERT, classifier": Case(
        lambda: bert(OwnLoss, transformers.BertForSequenceClassification, num_labels=3), padded_text, BERT_SPLITS
    ),
    "BERT, masked": Case(
        lambda: bert(OwnLoss, transformers.BertForMaskedLM),
        masked_text([2] * 8),
        BERT_SPLITS,
        shared="word_embeddings.weight",
        digital=["*decoder"],
    ),
    "BERT, masked unevenly": Case(
        lambda: bert(MaskedTokens, transformers.BertForMaskedLM, tie_word_embeddings=False),
        masked_text([1, 2, 3, 1, 2, 5, 4, 3]),
        BERT_SPLITS,
        options={"microbatch_weight": masked_tokens},
    ),
    "T5": Case(
        t5,
        translations,
        {2: ["model.decoder"], 4: names("model.{}", "encoder.block.1", "decoder.block.0", "decoder.block.1")},
        shared="shared.weight",
        digital=["*lm_head"],
    ),
    "ViT, Hugging Face": Case(
        hugging_face_vit,
        lambda: three(lambda g: {"pixel_values": torch.randn(8, 3, 8, 8, generator=g), "labels": classes(g)}),
        {2: ["model.vit.layers.2"], 4: names("model.vit.layers.{}", 1, 2, "3.layernorm_after")},
    ),
    "ViT, timm": Case(timm_vit, images(8), {2: ["model.blocks.2"], 4: names("model.blocks.{}", 1, "2.mlp.fc2", 3)}),
    "Swin": Case(
        swin,
        images(16),
        {2: ["model.layers.1"], 4: names("model.layers.{}", "0.blocks.1", "1", "1.blocks.1")},
    ),
    "ConvNeXt": Case(
        timm_convnext, images(32), {2: ["model.stages.2"], 4: names("model.stages.{}", 1, 2, 3)}, digital=["*conv_dw"]
    ),
    "EfficientNet": Case(
        efficientnet,
        images(32),
        {2: ["model.blocks.3"], 4: names("model.{}", "blocks.1", "blocks.3", "conv_head")},
        exact=[1],
        digital=["*conv_dw"],
    ),
    "ResNet": Case(lambda: timm_resnet(training=True), images(16), RESNET_SPLITS, exact=[1]),
    "ResNet, fine-tuned": Case(lambda: timm_resnet(training=False), images(16), RESNET_SPLITS),
    "U-Net": Case(
        lambda: Labels(UNet()),
        lambda: three(lambda g: (torch.randn(8, 3, 11, 11, generator=g), classes(g, 11, 11))),
        {2: ["model.down3"], 4: names("model.{}", "down2", "down3", "up2")},
    ),
    "nn.Transformer": Case(
        Translator,
        lambda: three(lambda g: (tokens(g, 8, 9), tokens(g, 8, 7))),
        {2: ["transformer.decoder"], 4: names("transformer.{}", "encoder.layers.1", "decoder", "decoder.layers.1")},
    ),
    "LSTM": Case(
        lambda: Recurrent(nn.LSTM),
        lambda: three(lambda g: (tokens(g, 8, 6), classes(g))),
        {2: ["second"], 4: ["first", "second", "head"]},
    ),
    "GRU, time first": Case(
        TimeFirst,
        lambda: three(lambda g: (tokens(g, 6, 8), classes(g))),
        {2: ["second"], 4: ["first", "second", "head"]},
    ),
    "VAE": Case(
        VAE,
        lambda: three(lambda g: (torch.randn(8, 12, generator=g),)),
        {2: ["decoder"], 4: ["mean", "decoder", "decoder.2"]},
        exact=[1],
    ),
    "SimCLR": Case(
        SimCLR,
        lambda: three(lambda g: tuple(torch.randn(8, 3, 8, 8, generator=g) for _ in range(2))),
        {2: ["projector"], 4: ["backbone.2", "projector", "projector.2"]},
        exact=[1],
    ),
    "GCN and GIN": Case(GraphClassifier, graphs, {2: ["conv2"], 4: ["conv1", "conv2", "conv3"]}),
}


def seeded(name):
    L.seed_everything(7)
    return CASES[name].make()


def loader(name):
    return DataLoader(CASES[name].data(), batch_size=None)


def fit(name, strategy="auto", precision="64-true", sgd=Public.sgd, **trainer):
    """Train the model of this name and return its module."""
    module = seeded(name)
    module.sgd = sgd
    if precision == "64-true":
        module.double()
    make_trainer(strategy, precision=precision, **trainer).fit(module, loader(name))
    return module


def fit_public(name, num_stages, schedule="sync", num_microbatches=1, strategy=(), **options):
    """Train the model in stages, in one process or, with ``devices=num_stages``, in this one of several.

    Boundaries that the case does not name are measured. ``strategy`` has further arguments of the strategy, and
    ``options`` are those of :func:`fit`.
    """
    arguments = {"split_at": CASES[name].split_at.get(num_stages)} | CASES[name].options | dict(strategy)
    return fit(name, AnalogPipelineStrategy(num_stages, schedule, num_microbatches, **arguments), **options)


def train_all(folder):
    """Train all models that have two stages, in this one of two processes."""
    os.chdir(folder)
    results = {
        (name, schedule): fit_public(name, 2, schedule, case.exact[-1], devices=2).state_dict()
        for name, case in CASES.items()
        for schedule in ("sync", "async")
        if 2 in case.split_at and case.shared is None
    }
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(results, folder / "results.pt")
