"""What we need of torchmetrics that has no public name, each with a test that notices when it goes."""

from typing import Any

from torch import Tensor
from torchmetrics import Metric


def last_value(metric: Metric) -> Any:
    """What the metric's last call returned, the value of that batch alone; ``None`` after ``update``."""
    return metric._forward_cache


def set_last_value(metric: Metric, value: Tensor) -> None:
    """Let Lightning log another value for the step."""
    metric._forward_cache = value
