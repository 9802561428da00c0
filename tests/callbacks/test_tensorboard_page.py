"""These tests open TensorBoard's pages in a browser, and check that each shows something."""

import re

import lightning as L
import pytest
import torch
from tensorboard_page import CHART, CHROMIUM, LINE, browser_page, open_charts, tensorboard

from aimc_pl.callbacks import (
    ClockMonitor,
    Dashboard,
    DeviceMonitor,
    DeviceNoise,
    PipelineDiagram,
    RunBoard,
    StalenessMonitor,
    WriteNoise,
)
from aimc_pl.data import Digits
from aimc_pl.devices import soft_bounds
from aimc_pl.models import MLP
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.tasks import Classifier

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]

NUM_STAGES = 4
STAGES = [f"version_0/stage_{m:02}" for m in range(NUM_STAGES)]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Train for three epochs, and serve what was logged."""
    folder = tmp_path_factory.mktemp("logs")
    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=AnalogPipelineStrategy(
            NUM_STAGES, "async", 4, soft_bounds(), split_at=["network.3", "network.5", "network.7"]
        ),
        callbacks=[
            ClockMonitor(),
            StalenessMonitor(),
            DeviceMonitor(),
            DeviceNoise(WriteNoise(0.001)),
            PipelineDiagram(),
            Dashboard(),
        ],
        logger=RunBoard(folder, name="run"),
        max_epochs=3,
        limit_train_batches=12,
        limit_val_batches=2,
        log_every_n_steps=3,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    network = MLP([64, 16, 16, 16, 10], activation=torch.nn.Tanh)
    trainer.fit(Classifier(network, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.5)), Digits())
    with tensorboard(f"{folder}/run") as address:
        yield address


@pytest.fixture(scope="module")
def page(address):
    with browser_page(1300, 2000) as page:
        yield page


def colour(element):
    return element.evaluate("element => getComputedStyle(element).stroke")


def heights(line):
    """Return the vertical coordinates of a line's points, in pixels."""
    points = re.findall(r"[ML]([-\d.]+),([-\d.]+)", line.get_attribute("d"))
    return [float(y) for _, y in points]


def test_every_chart_has_a_title_and_lines_that_can_be_told_apart(page, address):
    open_charts(page, address)
    runs = page.locator("tf-runs-selector .item-label-container")
    assert [name.strip() for name in runs.all_inner_texts()] == ["version_0", *STAGES]
    titles = []
    for chart in page.locator(CHART).all():
        titles.append(chart.locator(".heading-label").first.inner_text())
        lines = chart.locator(LINE).all()
        assert len(lines) == (NUM_STAGES if "per stage" in titles[-1] else 1), titles[-1]
        assert len({colour(line) for line in lines}) == len(lines), titles[-1]
        assert all(len(heights(line)) >= 3 for line in lines), titles[-1]
        levels = [height for line in lines for height in heights(line)]
        assert max(levels) - min(levels) > 1, titles[-1]
    assert titles == [
        "validation metrics against clock cycles",
        "validation metrics against epochs",
        "validation loss against clock cycles",
        "training loss against clock cycles",
        "staleness of updates, per stage",
        "relative drift of weights, per stage",
        "use of the devices' range, per stage",
        "relative noise of weights, per stage",
    ]


def test_histograms_show(page, address):
    page.goto(f"{address}#histograms")
    cards = page.locator("tf-histogram-loader")
    cards.nth(NUM_STAGES).wait_for()
    found = []
    for card in cards.all():
        # There is one outline for each epoch.
        outlines = card.locator("g.histogram path.outline[d]")
        outlines.nth(2).wait_for(state="attached")
        assert outlines.count() == 3
        found.append((card.locator(".name").inner_text(), card.locator(".run").inner_text()))
        tops = {y for _, y in re.findall(r"[ML]([-\d.]+),([-\d.]+)", outlines.last.get_attribute("d"))}
        assert len(tops) > 1, found[-1]
    assert found == [*(("devices/positions", stage) for stage in STAGES), ("staleness/counts", "version_0")]


def test_the_schedules_picture_shows(page, address):
    page.goto(f"{address}#images")
    image = page.locator("tf-image-loader img")
    image.wait_for()
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())
    assert image.evaluate("image => image.naturalWidth") == 640
    assert page.locator("tf-image-loader .name").inner_text() == "pipeline"


def test_no_page_has_a_chart_for_each_stage(page, address):
    """Check the numbers of charts in the groups of the first page. Only a histogram has one for each stage."""
    page.goto(f"{address}#timeseries")
    groups = page.locator("metrics-card-group-toolbar .group-title-wrapper")
    groups.first.wait_for()
    groups.get_by_text("staleness", exact=True).wait_for()
    charts = {}
    for group in groups.all():
        # A group of one chart has no number.
        number = "".join(group.locator(".group-card-count").all_inner_texts()).removesuffix(" cards")
        charts[group.locator(".group-title").inner_text()] = int(number or 1)
    assert charts["staleness"] == 4
    assert charts["devices"] == 2 + NUM_STAGES
    assert (charts["by_clock"], charts["by_epoch"]) == (3, 2)
    assert not [name for name in charts if "stage" in name]
