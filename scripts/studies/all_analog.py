"""This study trains the shipped configs whose layers are all analog, and the same networks with digital layers.

It runs ``aimc-pl fit`` with ``convnet_cifar10_async.yaml`` and ``gpt_text_mixed_precision_async.yaml``. The ConvNet
also learns by analog SGD on the same devices. All runs together take about two hours on two cores. Runs that the CSV
file already holds are not repeated. Usage:

    .venv/bin/python scripts/studies/all_analog.py --cifar10 data --folder docs/results

Without ``--cifar10``, only the GPT is trained. With ``--wide``, only a ConvNet of twice the width is trained, without a
pipeline and in larger batches, which suits a GPU. It takes a few minutes there, and its files are
``all_analog_wide.csv`` and ``all_analog_wide.png``.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.figure import Figure

from aimc_pl.cli import main as aimc_pl
from aimc_pl.figures import LAYERS as LAYER_COLORS
from aimc_pl.figures import RED, styled
from aimc_pl.runs import history
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import half_width
from aimc_pl.studies.sweeps import sweep

NETWORKS = {
    "ConvNet on CIFAR-10": ("convnet_cifar10_async.yaml", "accuracy"),
    "GPT on text": ("gpt_text_mixed_precision_async.yaml", "bits"),
    "wide ConvNet on CIFAR-10": ("convnet_cifar10_async.yaml", "accuracy"),
}
"""The config of each network, and its metric."""

WIDE = [
    "--trainer.accelerator=auto",
    "--trainer.strategy.init_args.schedule=none",
    "--trainer.strategy.init_args.num_stages=1",
    "--trainer.strategy.init_args.num_microbatches=1",
    "--trainer.strategy.init_args.split_at=null",
    "--model.init_args.network.init_args.widths=[64, 128, 256]",
    "--model.init_args.optimizer.init_args.lr=0.06",
    "--data.init_args.batch_size=512",
]
"""The overrides of the config for the wide ConvNet."""

DEVICE = "--trainer.strategy.init_args.device"
LAYERS = {
    "analog": [],
    "digital": [f"{DEVICE}=null"],
    "analog SGD": [
        f"{DEVICE}={{class_path: aimc_pl.devices.soft_bounds, init_args: {{tau: 1.0, perfect_io: true}}}}",
        # Pulses know no momentum. In the long run, a momentum of 0.9 multiplies the rate by 10.
        "--trainer.strategy.init_args.analog_lr_scale=10",
    ],
}
"""The overrides of the config for each kind of layers."""

STYLES = {
    "analog": (LAYER_COLORS["analog"], "-"),
    "digital": (LAYER_COLORS["digital"], "--"),
    "analog SGD": (RED, ":"),
}
"""The colour and the style of the line of each kind of layers."""


def cases(num_seeds: int, quick: bool, networks: Sequence[str], epochs: int) -> list[dict[str, Any]]:
    """Return the networks, each with analog and with digital layers, and the ConvNet also with analog SGD."""
    epochs = 1 if quick else epochs
    return [
        {"network": network, "layers": layers, "seed": seed, "epochs": epochs}
        for seed in range(num_seeds)
        for network in networks
        for layers in LAYERS
        if layers != "analog SGD" or network == "ConvNet on CIFAR-10"
    ]


def run(network: str, layers: str, seed: int, epochs: int, root: str | None, quick: bool) -> list[dict[str, Any]]:
    """Train once, and return the metric of every epoch on the validation set, and at the end on the test set."""
    config, metric = NETWORKS[network]
    options = [f"--config={config}", f"--seed_everything={seed}", f"--trainer.max_epochs={epochs}", *LAYERS[layers]]
    options += WIDE if network.startswith("wide") else []
    options += [] if root is None or metric == "bits" else [f"--data.init_args.root={root}"]
    options += ["--trainer.enable_progress_bar=false"]
    options += [f"--trainer.limit_{part}_batches=2" for part in ("train", "val", "test")] if quick else []
    with TemporaryDirectory() as folder:
        aimc_pl(["fit", *options, f"--trainer.logger.save_dir={folder}"])
        (logged,) = Path(folder).iterdir()
        return rows_of(logged, metric)


def rows_of(folder: Path, metric: str) -> list[dict[str, Any]]:
    """Return a row for each epoch of a run, and one for its test, by the run's folder."""
    logged = history(folder)
    epochs = [row for row in logged if f"val/{metric}" in row]
    (tested,) = (row for row in logged if f"test/{metric}" in row)
    validated = [
        {"epoch": number, "part": "val", "value": row[f"val/{metric}"]} for number, row in enumerate(epochs, 1)
    ]
    return [*validated, {"epoch": len(epochs), "part": "test", "value": tested[f"test/{metric}"]}]


def report(rows: Sequence[Row]) -> None:
    """Print the metric on the test set, with 95 % intervals where there are several seeds."""
    for network, (_, metric) in NETWORKS.items():
        for layers in LAYERS:
            if of_both := select(rows, network=network, layers=layers, part="test"):
                values = curves(of_both, "value")[:, -1]
                interval = f" ± {half_width(values):.4f}" if len(values) > 1 else ""
                print(f"{network}, {layers}: test {metric} {values.mean():.4f}{interval}")


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw the metric on the validation set by epoch, a line for each run."""
    networks = [network for network in NETWORKS if select(rows, network=network)]
    figure = Figure(figsize=(5 * len(networks), 3.2), layout="constrained")
    for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        for layers, (color, style) in STYLES.items():
            if not (of_both := select(rows, network=network, layers=layers, part="val")):
                continue
            lines = curves(of_both, "value")
            epochs = range(1, lines.shape[1] + 1)
            schedule = "no pipeline" if network.startswith("wide") else "async"
            labels = [f"{layers}, {schedule}", *["_"] * (len(lines) - 1)]
            axes.plot(epochs, lines.T, color=color, linestyle=style, marker=".", label=labels)
        metric = NETWORKS[network][1].replace("bits", "bits per character")
        axes.set(title=network, xlabel="epoch", ylabel=f"validation {metric}")
        axes.legend()
    return figure


def main() -> None:
    """Run the missing cases, print the report and draw the figure."""
    parser = sweep_parser(__doc__, seeds=1)
    parser.add_argument("--cifar10", metavar="ROOT", help="folder that holds CIFAR-10 in torchvision's layout")
    parser.add_argument("--wide", action="store_true", help="train the wide ConvNet only, on a GPU if there is one")
    args = parser.parse_args()
    if args.wide and not args.cifar10:
        parser.error("--wide needs --cifar10 ROOT")
    if args.wide:
        settings, name = cases(args.seeds, args.quick, ["wide ConvNet on CIFAR-10"], epochs=30), "all_analog_wide"
    else:
        networks = ["ConvNet on CIFAR-10", "GPT on text"] if args.cifar10 else ["GPT on text"]
        settings, name = cases(args.seeds, args.quick, networks, epochs=10), "all_analog"
    path = args.folder / f"{name}.csv"
    rows = sweep(partial(run, root=args.cifar10, quick=args.quick), settings, path, args.jobs)
    report(rows)
    draw(rows).savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
