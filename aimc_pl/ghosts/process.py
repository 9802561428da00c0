"""The forward and the backward of one stage of a step, in a run where every stage has a process of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aimc_pl.ghosts.apart import ForeignParameter
from aimc_pl.ghosts.learning import Learned
from aimc_pl.ghosts.parts import Part, glue_of, parts_of
from aimc_pl.ghosts.run import Done, Message, Run
from aimc_pl.ghosts.state import Setting
from aimc_pl.ghosts.values import Key, OpaqueError, give_class, is_ghost, running, signature
from aimc_pl.patches import patched

_CPU = torch.device("cpu")


@dataclass
class Flight:
    """A micro-batch between its forward and its backward.

    Attributes:
        result: what the step has returned; ``None`` in all stages except the last.
        outgoing: the message to the next stage; ``None`` in the last stage.
        kept: the values of this stage that later stages need, by key.
        gradients: the gradients with respect to received values, by key, after the backward.
    """

    result: Any
    outgoing: Message | None
    kept: dict[Key, Tensor] = field(repr=False)
    gradients: dict[Key, Tensor] = field(repr=False)


class Ghosts:
    """One stage of a step, which runs in a process of its own.

    A stage computes a *stretch* of the step, which lies between two calls of modules. Every process runs the whole step
    on the same batch. It does not compute the stretches of other stages: their values are *ghosts*, of which only shape
    and type are known. Where this stage computes with a ghost, the received value takes the ghost's place.

    An *event* is a call of a module that is run as a whole, or of a torch function in the code around such modules.
    Every value has a *key*, which contains the number of the event that made it. Keys are equal in all processes, and
    the processes check that all of them see the same events.

    What derives from the batch alone is computed in every process and never sent. Random numbers of torch are drawn by
    the stage that asks for them, and are sent. ``random`` and ``numpy.random`` draw the same numbers in all processes,
    in the code that all of them run.

    Args:
        module: the module that runs the step and holds all parameters.
        boundaries: the names of the modules whose calls begin stages 1 … M−1.
        stage: the stage of this process.
        owners: the stage of each parameter, by the name of the parameter.
        device: the device on which this stage computes.
    """

    def __init__(
        self,
        module: nn.Module,
        boundaries: Sequence[str],
        stage: int,
        owners: Mapping[str, int],
        device: torch.device = _CPU,
    ) -> None:
        self._module = module
        self._stage = stage
        parameters = list(module.named_parameters(remove_duplicate=False))
        self._names = {id(parameter): name for name, parameter in reversed(parameters)}
        self._owners = {id(parameter): owners[name] for name, parameter in parameters if name in owners}
        self._parts = parts_of(module, boundaries, owners)
        calls = ((part.module, part.attribute, partial(_called, part)) for part in self._parts)
        self._patches = [(torch.autograd.Function, "apply", classmethod(_applied)), *calls]
        glue = glue_of(module, self._parts)
        own = (inner for part in self._parts if part.owner in (stage, None) for inner in part.module.modules())
        self._setting = Setting(
            boundaries=boundaries,
            own=stage,
            owners=self._owners,
            names=self._names,
            module=module,
            glue=glue,
            watched=[*glue, *own],
            example=torch.empty(0, device=device),
            generators=_generators(device),
            learned=Learned(stage),
        )

    def name_of(self, parameter: nn.Parameter) -> str:
        """Return a parameter's name in the module."""
        return self._names[id(parameter)]

    def free(self) -> None:
        """Free the memory of other stages' parameters, except those of analog tiles.

        The parameters stay the same objects.
        """
        for parameter in self._module.parameters():
            stage = self._owners.get(id(parameter))
            if stage is None or stage == self._stage or type(parameter) is not nn.Parameter:
                continue
            # One element in memory stands for all. Shape, type and device stay.
            parameter.data = parameter.new_zeros(()).expand(parameter.shape)
            parameter.grad = None
            foreign = give_class(parameter, ForeignParameter)
            foreign.stage, foreign.label = stage, self._names[id(parameter)]

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Give memory back to the parameters of other stages, and to buffers that other stages have written.

        Args:
            state: the values of parameters, by name. A parameter that is missing in it becomes zero.
        """
        for parameter in self._module.parameters():
            if isinstance(parameter, ForeignParameter):
                label = parameter.label
                give_class(parameter, nn.Parameter)
                parameter.data = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                if label in state:
                    parameter.data.copy_(state[label])
        for module in self._module.modules():
            for name, buffer in [*module.named_buffers(recurse=False)]:
                if is_ghost(buffer):
                    setattr(module, name, self._setting.example.new_zeros(buffer.spec.shape, dtype=buffer.spec.dtype))

    @contextmanager
    def intercepting(self) -> Iterator[None]:
        """Context manager in which forwards see the calls of modules.

        It takes time to enter. For this reason it may stay open over many forwards.
        """
        with patched(*self._patches):
            yield

    def forward(self, function: Callable[[], Any], message: Message | None, seed: int, inputs: Any = None) -> Flight:
        """Run the step as far as this stage needs it, inside :meth:`intercepting`.

        Args:
            function: the whole step.
            message: the message from the stage before; ``None`` in the first stage. The caller must not use its tensors
                any more.
            seed: the seed of this micro-batch's random numbers, the same in all processes. The global generators are
                seeded with it.
            inputs: what decides, apart from ``module``, which operations the step calls: which step it is, and the
                batch. Only shapes, types and constants count.

        Raises:
            UsageError: if the step does what stages in different processes cannot do.
        """
        return self._fly(function, message, seed, inputs, differentiates=True)

    def infer(self, function: Callable[[], Any], message: Message | None, seed: int, inputs: Any = None) -> Flight:
        """Run the step like :meth:`forward`, with the same arguments, but without gradients."""
        # Inference tensors do not record whether they have been changed in place.
        with torch.inference_mode(False), torch.no_grad():
            return self._fly(function, message, seed, inputs, differentiates=False)

    def _fly(
        self, function: Callable[[], Any], message: Message | None, seed: int, inputs: Any, differentiates: bool
    ) -> Flight:
        run = Run(self._setting, message, seed, _signature(inputs), differentiates)
        result: Any = None
        running.append(run)
        try:
            run.start()
            with run:
                result = function()
            run.finish(result)
        except Done:
            pass
        except Exception as error:
            run.fail(error)
            raise
        finally:
            run.close()
            running.pop()
        return Flight(result if run.outgoing is None else None, run.outgoing, run.kept, run.arrivals.gradients)

    def backward(self, flight: Flight, gradients: Message | None, loss_weight: Tensor | None) -> Message | None:
        """Backpropagate, adding to the gradients of this stage's parameters.

        Args:
            flight: what the forward has returned. It cannot be used again.
            gradients: the message from the stage after; ``None`` in the last stage.
            loss_weight: the gradient with respect to the loss, in the last stage; ``None`` in others. The loss is the
                result of the step, or the ``"loss"`` in it.

        Returns:
            The message to the stage before; ``None`` in the first stage.
        """
        roots: list[Tensor] = []
        weights: list[Tensor] = []
        sums: dict[Key, Tensor] = {}
        _, keys, tensors = gradients or ((), (), ())
        for key, gradient in zip(keys, tensors, strict=True):
            if key[0] == self._stage:
                roots.append(flight.kept[key])
                weights.append(gradient)
            else:
                sums[key] = gradient
        if loss_weight is not None:
            loss = flight.result["loss"] if isinstance(flight.result, Mapping) else flight.result
            if loss.requires_grad:
                roots.append(loss)
                weights.append(loss_weight)
        flight.kept = {}
        flight.result = None
        if roots:
            torch.autograd.backward(roots, weights)
        for key, gradient in flight.gradients.items():
            sums[key] = sums[key] + gradient if key in sums else gradient
        return None if self._stage == 0 else ((), tuple(sums), tuple(sums.values()))


def _called(part: Part, *args: Any, **kwargs: Any) -> Any:
    """Take the place of a part's call: ask the forward under way, if there is one."""
    run: Any = running[-1] if running else None
    return run.called(part, args, kwargs) if run else part.call(*args, **kwargs)


_plain_apply = torch.autograd.Function.__dict__["apply"]


def _applied(function: type, *args: Any, **kwargs: Any) -> Any:
    """Take the place of ``torch.autograd.Function.apply``: ask the forward under way, if there is one."""
    run: Any = running[-1] if running else None
    apply = _plain_apply.__get__(None, function)
    return run.applied(apply, args, kwargs) if run else apply(*args, **kwargs)


def _generators(device: torch.device) -> list[torch.Generator]:
    """Return torch's default generators on the CPU and on ``device``."""
    if device.type != "cuda":
        return [torch.default_generator]
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


def _signature(inputs: Any) -> Any:
    """Return the signature of ``inputs``, with the types of what has none."""
    try:
        return signature(inputs)
    except OpaqueError:
        return tuple(map(_signature, inputs)) if type(inputs) is tuple else type(inputs)
