"""The callback in this module injects imperfections of analog devices during training."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, override
from zlib import crc32

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Generator, Tensor, nn
from torch.utils.hooks import RemovableHandle

from aimc_pl.arguments import check_list, check_number, check_seed
from aimc_pl.callbacks.attach import attach, gathered, merged
from aimc_pl.callbacks.recent import Recent, means, note
from aimc_pl.errors import UsageError
from aimc_pl.imperfections import Noise, ReadNoise, WeightNoise
from aimc_pl.pipeline import Event, Observer
from aimc_pl.stage import StageInfo
from aimc_pl.strategies.private_lightning import should_log
from aimc_pl.weights import has_hidden_weights, layer_weight, move_weight, product, weight_layers


class DeviceNoise(Callback, Observer):
    """A callback that makes the weights of Linear and Conv layers, analog or digital, imperfect during training.

    The callback logs, as ``noise/<layer>``, how far the noise has moved the weights of a layer since the last log,
    relative to their norm. The value is the root mean square over the updates or, for read noise, over the products.
    ``devices/noise_stage_m`` is the root mean square over the layers of stage m.

    Args:
        noise: the kinds of noise to inject, in order, or one kind.
        stages: the stages whose layers get the noise; all by default.
        layers: patterns of layer names (as in ``LightningModule.named_modules()``); all by default.
        from_step: the first global step with noise.
        until_step: the first global step without noise again, at least ``from_step``. By default the noise never ends.
        seed: the seed of the random numbers of the noise.

    Raises:
        UsageError: if ``noise`` is empty, a number is out of range, or no layer matches.
    """

    def __init__(
        self,
        noise: Sequence[Noise] | Noise,
        stages: Sequence[int] | None = None,
        layers: Sequence[str] = ("*",),
        from_step: int = 0,
        until_step: int | None = None,
        seed: int = 0,
    ) -> None:
        noise = [noise] if isinstance(noise, Noise) else noise
        check_list("noise", noise, (WeightNoise, ReadNoise), "kinds of noise, such as WriteNoise(0.01)")
        if not noise:
            raise UsageError("noise is empty, and DeviceNoise needs at least one kind of noise")
        if stages is not None:
            check_list("stages", stages, int, "whole numbers")
            for stage in stages:
                check_number("each of stages", stage, at_least=0, whole=True)
        check_list("layers", layers, str, "patterns of layer names")
        check_number("from_step", from_step, at_least=0, whole=True)
        if until_step is not None:
            check_number("until_step", until_step, at_least=from_step, whole=True)
        check_seed("seed", seed)
        self.noise = noise
        self.stages = stages
        self.layers = layers
        self.from_step = from_step
        self.until_step = until_step
        self.seed = seed
        self._generator = Generator().manual_seed(seed)
        self._moved: Recent = {}
        """For each layer, the squares of the relative distances by which the noise has moved its weights."""
        self._updated_at: dict[int, int] = {}
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            self._strategy = attach(self, trainer)
            self._moved.clear()
            self._updated_at.clear()
            if self._strategy.is_multiprocess:
                self._generator.manual_seed(self.seed + self._strategy.global_rank)

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._trainer = trainer
        self._before: dict[str, Tensor] = {}
        self._named = {
            name: layer
            for name, layer in weight_layers(pl_module).items()
            if any(fnmatchcase(name, pattern) for pattern in self.layers)
        }
        if not self._named:
            known = ", ".join(weight_layers(pl_module))
            raise UsageError(f"DeviceNoise(layers={list(self.layers)}) matches no layer; the layers are {known}")
        hidden = [name for name, layer in self._named.items() if has_hidden_weights(layer)]
        if hidden and not all(isinstance(noise, ReadNoise) for noise in self.noise):
            raise UsageError(
                f"DeviceNoise writes weights, which erases other crossbars, or the state of write noise on aihwkit's "
                f"tiles, of layer {hidden[0]!r}: use ReadNoise only, or choose other layers with layers=[...]"
            )

    @override
    def on_start(self, stages: Sequence[StageInfo]) -> None:
        self._targets: dict[int, dict[str, nn.Module]] = {}
        for stage in stages:
            on_stage = set(stage.modules) if self.stages is None or stage.index in self.stages else set()
            self._targets[stage.index] = {name: layer for name, layer in self._named.items() if layer in on_stage}
        if not any(self._strategy.gather(any(self._targets.values()))):
            raise UsageError(f"DeviceNoise(stages={self.stages}, layers={list(self.layers)}) matches no layer")
        # A checkpoint holds the values of all stages. Each process keeps those of its own stages.
        own = {name for layers in self._targets.values() for name in layers}
        for name in self._moved.keys() - own:
            del self._moved[name]
        for stage in self._updated_at.keys() - self._targets.keys():
            del self._updated_at[stage]
        self._handles = [
            self._add_read_noise(name, layer, noise)
            for layers in self._targets.values()
            for name, layer in layers.items()
            for noise in self.noise
            if isinstance(noise, ReadNoise)
        ]

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._remove_hooks()

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._remove_hooks()

    @override
    def on_backward(self, event: Event) -> None:
        if self._is_active():
            self._before |= {name: layer_weight(layer) for name, layer in self._targets[event.stage.index].items()}

    @override
    def on_update(self, event: Event) -> None:
        clock = event.clock * self._strategy.schedule.cycles_per_clock
        cycles = clock - self._updated_at.get(event.stage.index, clock)
        self._updated_at[event.stage.index] = clock
        if not self._is_active():
            return
        for name, layer in self._targets[event.stage.index].items():
            updated = weight = layer_weight(layer)
            for kind, noise in enumerate(self.noise):
                if not isinstance(noise, ReadNoise):
                    devices = Generator().manual_seed(crc32(f"{self.seed}/{name}/{kind}".encode()))
                    weight = noise.apply(weight, self._before[name], cycles, self._generator, devices)
            if weight is not updated:
                move_weight(layer, weight)
                self._note(name, layer_weight(layer) - updated, updated)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if should_log(trainer):
            squares = means(merged(self._strategy.gather(self._moved)))
            own_layers = {stage: [*layers] for stage, layers in self._targets.items()}
            values = {f"noise/{name}": square**0.5 for name, square in squares.items()}
            for stage, layers in merged(self._strategy.gather(own_layers)).items():
                if of_stage := [squares[name] for name in layers if name in squares]:
                    values[f"devices/noise_stage_{stage}"] = (sum(of_stage) / len(of_stage)) ** 0.5
            pl_module.log_dict(values, on_step=True, on_epoch=False)
            self._moved.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "generators": gathered(self, self._generator.get_state()),
            "moved": merged(gathered(self, self._moved)),
            "updated_at": merged(gathered(self, self._updated_at)),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not hasattr(self, "_strategy"):
            # This is an evaluation, which has no noise.
            return
        states, rank = state_dict["generators"], self._strategy.global_rank
        if len(states) == (self._strategy.num_stages if self._strategy.is_multiprocess else 1):
            self._generator.set_state(states[rank])
        else:
            # The number of processes has changed. Every process gets a new seed, so that no numbers repeat.
            self._generator.manual_seed(crc32(states[0].numpy().tobytes()) + rank)
        self._moved.update(state_dict["moved"])
        self._updated_at.update(state_dict["updated_at"])

    def _is_active(self) -> bool:
        step = self._trainer.global_step
        return self.from_step <= step and (self.until_step is None or step < self.until_step)

    def _add_read_noise(self, name: str, layer: nn.Module, noise: ReadNoise) -> RemovableHandle:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not layer.training or not self._is_active():
                return None
            weight = layer_weight(layer)
            forward, backward = (noise.draw(weight, self._generator) for _ in range(2))
            self._note(name, forward, weight)
            in_backward = product(layer, inputs[0], backward)
            # The sum adds one noise to the value, and another noise to the gradient.
            return output + product(layer, inputs[0].detach(), forward) + (in_backward - in_backward.detach())

        return layer.register_forward_hook(add)

    def _note(self, name: str, change: Tensor, weight: Tensor) -> None:
        part = change.norm() / weight.norm().clamp(min=torch.finfo(weight.dtype).tiny)
        note(self._moved, name, part.item() ** 2)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
