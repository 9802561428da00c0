"""Training steps that run stage by stage in one process, without changes to their code.

A *boundary* is a module of the network that opens a stage when the step calls it. The step of each micro-batch runs in
a greenlet, a function that can be suspended. It is suspended when it calls the next boundary, until the schedule lets
the next stage begin.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import is_
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.module import register_module_forward_pre_hook

from aimc_pl.analog import is_analog, own_pending_errors
from aimc_pl.attributes import Attributes, Place, Snapshot
from aimc_pl.errors import UsageError
from aimc_pl.graph import CutGraph
from aimc_pl.private_torch import (
    hooks_of,
    is_checkpointing,
    is_in_functorch,
    registration_of,
    sequence_number,
    versions_of,
)
from aimc_pl.random_states import RandomStates
from aimc_pl.saved import SavedParameters, current_weights
from aimc_pl.stage import Stage
from aimc_pl.suspension import SuspendableCall
from aimc_pl.switches import Switch, switches_for

_NOTHING = nullcontext()


class StagedStep:
    """What all micro-batches of a training share: the network, its stages, and the boundaries of the stages.

    A parameter belongs to the first stage that is seen to use it. A module belongs to the first stage that is seen to
    call it.

    Args:
        network: the module that contains all modules that the step calls.
        boundaries: the names of the modules that open stages 1 … M−1.
        stages: the M stages.
        delayed: whether weights may change between the forward and the backward of a micro-batch. The backward then
            uses the current weights, as a crossbar does, for digital parameters and analog tiles alike. Values that the
            forward computes from parameters, by a parametrization for example, stay as they were.
        weight_stashing: whether to keep the weights of the forward for the backward instead (PipeDream's digital
            baseline).
        may_share: whether several stages may use the same parameter.
        overlaps: whether a micro-batch may begin before the previous one has ended. The attributes that a step sets on
            modules are then kept apart for each micro-batch.
        with_gradients: whether a boundary opens its stage only when it is called with gradients enabled.
        trained: leaf tensors that are trained but are not parameters of the network.
        set_outside: the names of attributes of the network that code outside of the step sets while steps wait.
    """

    def __init__(
        self,
        network: nn.Module,
        boundaries: Sequence[str],
        stages: Sequence[Stage],
        *,
        delayed: bool = False,
        weight_stashing: bool = False,
        may_share: bool = True,
        overlaps: bool = True,
        with_gradients: bool = True,
        trained: Iterable[Tensor] = (),
        set_outside: Collection[str] = (),
    ) -> None:
        self.network = network
        self.boundaries = boundaries
        self.stages = stages
        self.delayed = delayed
        self.may_share = may_share
        self.with_gradients = with_gradients
        self.attributes = Attributes(network, set_outside) if overlaps else None
        self.switches = switches_for(network) if overlaps else []
        """The process-wide settings to keep apart for each micro-batch.

        Until the step is settled, these are all known settings; after that, only those that the step switches.
        """
        self.random: RandomStates | None = None
        """The random states to keep apart for each micro-batch; ``None`` unless the step itself sets random states."""
        self._trained = [*trained]
        self.parameters: list[Any] = [*network.parameters(), *self._trained]
        self.is_analog = any(map(is_analog, self.parameters))
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self.anchor = torch.zeros((), requires_grad=True, device=device)
        self.saved = SavedParameters(self.parameters, stash=True) if weight_stashing else None
        """Decides what autograd saves of parameters; ``None`` if references to the parameters are enough."""
        self.waiting: list[Flight] = []
        """The micro-batches whose step has begun and has not ended."""
        self.under_way: list[Flight] = []
        """The micro-batches that have begun and have not gone back through all stages."""
        self.carried: set[Place] = set()
        """The attributes that have been set between mini-batches, and never by a step."""
        self._writers: dict[Place, set[int]] = {}
        self.is_settled = False
        self.hands_on_views = False
        """Whether a stage seems to use views of parameters that an earlier stage has made."""
        self._arrivals = [_arrival(index + 1) for index in range(len(boundaries))]
        self._owners: dict[int, Stage] = {}
        self._called_without_gradients: list[tuple[Stage, nn.Module]] = []
        self._left: Snapshot | None = None
        self._switched: set[Switch] = set()
        self.hooked: defaultdict[Any, set[int]] = defaultdict(set)
        """The stages of a hook's tensors, for each hook that is registered with several tensors."""
        for stage in stages:
            self._owners |= {id(parameter): stage for parameter in stage.parameters}

    def follow_casts(self) -> None:
        """Make a delayed backward use the current weights also where autocast has copied the weights."""
        if self.delayed and self.saved is None:
            self.saved = SavedParameters(self.parameters, stash=False)

    def keep_random_states(self, states: RandomStates) -> None:
        """Give every micro-batch its own random states if micro-batches overlap."""
        if self.attributes is not None:
            self.random = states

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context manager that makes boundaries open stages, for one mini-batch or a drain.

        If an exception leaves the context, all waiting micro-batches are aborted.
        """
        self._carry()
        if self.delayed:
            self._follow_parameters()
        handles = [
            self.network.get_submodule(name).register_forward_pre_hook(hook, prepend=True)
            for name, hook in zip(self.boundaries, self._arrivals, strict=True)
        ]
        try:
            yield
        except BaseException:
            for flight in [*self.waiting]:
                flight.abort()  # The step leaves the contexts that it has entered.
            raise
        finally:
            for handle in handles:
                handle.remove()
            if self.attributes is not None and self.is_settled:
                self._left = self.attributes.read()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager that records which stage calls each module, and the stages of hooks of several tensors."""
        members = set(map(id, self.network.modules()))
        known = {id(module) for stage in self.stages for module in stage.modules}

        def note(module: nn.Module, args: Any) -> None:
            flight = SuspendableCall.current()
            if not isinstance(flight, Flight) or id(module) in known or id(module) not in members:
                return
            stage = self.stages[flight.stage_of(module)]
            if self.with_gradients and not torch.is_grad_enabled():
                self._called_without_gradients.append((stage, module))
                return
            known.add(id(module))
            stage.modules.append(module)

        def register_hook(tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
            flight, registration = SuspendableCall.current(), registration_of(hook)
            if isinstance(flight, Flight) and registration is not None and tensor.grad_fn is not None:
                self.hooked[registration].add(flight.stage_that_made(tensor.grad_fn))
            return register(tensor, hook)

        register = Tensor.register_hook
        handle = register_module_forward_pre_hook(note)
        try:
            with patch.object(Tensor, "register_hook", register_hook):
                yield
        finally:
            handle.remove()

    def saving(self, stage: int) -> AbstractContextManager[Any]:
        """Return the context manager for the forward of a stage; it decides what autograd saves of parameters."""
        return _NOTHING if self.saved is None else self.saved.hooks(self.stages[stage].version)

    def own(self, leaves: Sequence[Sequence[Tensor]], opened: Container[int]) -> None:
        """Assign the leaf tensors that a micro-batch has used to the stages that used them.

        Args:
            leaves: the leaf tensors that each stage has used.
            opened: the stages whose boundary the step has called.

        Raises:
            UsageError: if several stages have used the same leaf tensor and may not share it.
        """
        shared: list[tuple[int, int, Tensor]] = []
        for stage, used in zip(self.stages, leaves, strict=True):
            for leaf in used:
                owner = self._owners.get(id(leaf))
                if owner is None and (isinstance(leaf, nn.Parameter) or any(leaf is p for p in self.parameters)):
                    self._owners[id(leaf)] = stage
                    stage.parameters.append(leaf)  # pyright: ignore[reportArgumentType], it is trained like one
                elif owner is not None and owner is not stage:
                    shared.append((owner.index, stage.index, leaf))
        if shared and not self.may_share:
            first, second, parameter = min(shared, key=lambda use: use[:2])
            if (latest := max(first, second)) not in opened:
                raise UsageError(
                    f"the step did not call {self.boundaries[latest - 1]!r}, with which stage {latest} begins, so that "
                    f"stage {second} used {_name(self.network, parameter)} of stage {first}: name a module that every "
                    "step calls"
                )
            raise _shared_parameter(self.network, parameter, first, second)

    def settle(self) -> None:
        """Complete the assignment of parameters to stages after a whole step.

        A parameter that the autograd graph does not show belongs to the stage that calls its module.

        Raises:
            UsageError: if one stage calls a module and another stage uses its parameters, and the two may not share
                them; if a hook waits for the gradients of several stages.
        """
        order = {id(parameter): place for place, parameter in enumerate(self.parameters)}
        called = [(stage, module) for stage in self.stages for module in stage.modules]
        for stage, module in called + self._called_without_gradients:
            for parameter in module.parameters(recurse=False):
                owner = self._owners.setdefault(id(parameter), stage)
                if id(parameter) in order and not any(parameter is known for known in owner.parameters):
                    owner.parameters.append(parameter)
        if not self.may_share:
            openers = {id(self.network.get_submodule(name)) for name in self.boundaries}
            # A module that contains a boundary may use its parameters on both sides of the boundary.
            for stage, module in [(s, m) for s, m in called if openers.isdisjoint(map(id, [*m.modules()][1:]))]:
                for parameter in module.parameters(recurse=False):
                    if parameter.requires_grad and (owner := self._owners[id(parameter)]) is not stage:
                        raise _shared_parameter(self.network, parameter, stage.index, owner.index)
        if self.with_gradients:
            self._check_hooks()
        for stage in self.stages:
            stage.parameters.sort(key=lambda parameter: order.get(id(parameter), len(order)))
        self.switches = [switch for switch in self.switches if switch in self._switched]
        self.is_settled = True

    def _check_hooks(self) -> None:
        for parameter in self.parameters:
            for registration in filter(None, map(registration_of, hooks_of(parameter)[0].values())):
                if id(parameter) in self._owners:
                    self.hooked[registration].add(self._owners[id(parameter)].index)
        spans = [stages for stages in self.hooked.values() if len(stages) > 1]
        if spans:
            raise UsageError(
                f"a hook of register_multi_grad_hook spans stages {min(spans[0])} and {max(spans[0])}, and would be "
                "called by the backward of each: register hooks of single tensors, or one for every stage"
            )

    def note_writes(self, stage: int, places: Iterable[Place]) -> None:
        """Record that a stage has set attributes.

        Raises:
            UsageError: if the step is settled and has so far set one of the attributes in other stages only. The
                micro-batches under way could not know that one more stage sets it.
        """
        for place in places:
            self.carried.discard(place)
            writers = self._writers.setdefault(place, set())
            if stage not in writers and self.is_settled and writers:
                assert self.attributes is not None
                raise UsageError(
                    f"the step sets {self.attributes.name(place)!r} in stage {stage}, and has so far set it "
                    f"in stage {min(writers)}: micro-batches that overlap cannot share it. Set it within one stage, "
                    "or use num_microbatches=1 with schedule='sync'"
                )
            writers.add(stage)

    def note_switches(self, stage: int, switches: Iterable[Switch]) -> None:
        """Record which process-wide settings the step has switched when it waits at the end of a stage.

        Raises:
            UsageError: if a setting cannot be set aside while the step waits.
        """
        for switch in switches:
            if switch.write is None:
                raise UsageError(
                    f"training_step still holds {switch.name} where {self.boundaries[stage]!r} begins stage "
                    f"{stage + 1}, and micro-batches overlap: leave it before, choose other stages with split_at, or "
                    "use num_microbatches=1 with schedule='sync'"
                )
            self._switched.add(switch)

    def set_in(self, stage: int) -> list[Place]:
        """Return the attributes that a stage sets, in some steps at least."""
        return [place for place, writers in self._writers.items() if stage in writers]

    @property
    def private(self) -> list[Place]:
        """The attributes that several stages set. The next micro-batch must not see them half-finished."""
        return [place for place, writers in self._writers.items() if len(writers) > 1]

    def _carry(self) -> None:
        """Let waiting micro-batches keep the old values of attributes that have changed since the last mini-batch.

        A hook may have changed them, for example.
        """
        if self.attributes is None or self._left is None:
            return
        changed = [place for place in self.attributes.changes(self._left) if place not in self._writers]
        self.carried.update(changed)
        for flight in self.waiting:
            flight.keep(self.attributes.select(self._left, changed))

    def _follow_parameters(self) -> None:
        """Update the list of parameters if some have been replaced or added since the last mini-batch."""
        before, self.parameters = self.parameters, [*self.network.parameters(), *self._trained]
        if len(before) == len(self.parameters) and all(map(is_, before, self.parameters)):
            return
        gone = set(map(id, before)) - set(map(id, self.parameters))
        for stage in self.stages:
            stage.parameters = [parameter for parameter in stage.parameters if id(parameter) not in gone]
        self._owners = {parameter: stage for parameter, stage in self._owners.items() if parameter not in gone}
        if self.saved is not None:
            self.saved.follow(self.parameters)


class Flight:
    """A micro-batch on its way through the stages (see :class:`aimc_pl.pipeline.MicroBatch`).

    Args:
        step: what all micro-batches share.
        function: runs the step and returns the loss, a tensor of one element, or ``None`` to learn nothing from this
            micro-batch.
        weight: the factor of the loss in the gradient.
    """

    def __init__(self, step: StagedStep, function: Callable[[], Tensor | None], weight: float = 1.0) -> None:
        self.loss: Tensor | None = None
        self.leaves: list[list[Tensor]] = [[] for _ in step.stages]
        """The leaf tensors that each stage has used; known when the forward of the last stage is over."""
        self.stage = -1
        self._step = step
        self._weight = weight
        self._call = SuspendableCall(function, owner=self)
        self._graph = CutGraph(step.anchor)
        self._opened = {0}
        self._versions: list[tuple[list[nn.Parameter], list[int]]] = []
        self._attributes: dict[Place, Any] = {}
        self._random_states: list[Any] | None = None
        self._switched: dict[Switch, Any] = {}

    def forward(self, stage: int) -> None:
        """Run the step up to the beginning of the next stage. In the last stage, run it to its end."""
        step, self.stage = self._step, stage
        self._graph.begin_stage()
        with self._own_versions():
            if stage == 0 or self._call.is_suspended:
                with (
                    step.saving(stage),
                    self._own_attributes() if step.attributes else _NOTHING,
                    self._own_random_states() if step.random else _NOTHING,
                    self._own_switches() if step.switches else _NOTHING,
                ):
                    result = self._go_on(stage)
                if not self._call.is_suspended:
                    self.loss = result
            if step.delayed:
                self._versions.append((step.parameters, versions_of(step.parameters)))
        self._graph.end_stage()
        if stage == len(step.stages) - 1:
            self._close()

    def backward(self, stage: int) -> None:
        """Backpropagate through a stage.

        This adds to the gradients of parameters, and to the pairs of inputs and errors that tiles keep for their next
        update.
        """
        step = self._step
        weights = current_weights(*self._versions[stage]) if step.delayed else _NOTHING
        errors = own_pending_errors(step.stages[stage].parameters) if step.is_analog else _NOTHING
        with weights, errors:
            try:
                self._graph.backward(stage, hooked=bool(step.hooked))
            except RuntimeError as error:
                _explain(error, stage)
                raise
        if stage == 0 and self in step.under_way:
            step.under_way.remove(self)

    def abort(self) -> None:
        """End the waiting step without running the rest of it."""
        with self._own_switches():
            self._call.abort()
        for flights in (self._step.waiting, self._step.under_way):
            if self in flights:
                flights.remove(self)

    def keep(self, values: dict[Place, Any]) -> None:
        """Set the attributes with which this micro-batch goes on, except those that it has set itself."""
        self._attributes = values | self._attributes

    def arrive(self, index: int) -> None:
        """Suspend the step, which calls the boundary of stage ``index``, until the schedule reaches this stage.

        Raises:
            UsageError: if no stage can begin here: in inference mode, in a checkpointed region or in a transform of
                ``torch.func``.
        """
        if self.stage >= index or (self._step.with_gradients and not torch.is_grad_enabled()):
            return
        self._opened.add(index)
        name = self._step.boundaries[index - 1]
        if torch.is_inference_mode_enabled():
            raise UsageError(
                f"{name!r} is called in inference_mode, where no stage can begin: use no_grad, or name another module "
                "in split_at"
            )
        if is_checkpointing():
            raise UsageError(f"{name!r} lies inside a checkpointed region: begin the stage where the region begins")
        if is_in_functorch():
            raise UsageError(
                f"{name!r} is called inside a transform of torch.func (vmap, grad), where no stage can begin: name a "
                "module around it in split_at"
            )
        while self.stage < index:
            self._call.suspend()

    def stage_of(self, module: nn.Module) -> int:
        """Return the stage to which a call of the module belongs; a boundary belongs to the stage that it opens."""
        if self._step.with_gradients and not torch.is_grad_enabled():
            return self.stage
        boundaries = self._step.boundaries[self.stage :]
        for index, name in enumerate(boundaries, self.stage + 1):
            if self._step.network.get_submodule(name) is module:
                return index
        return self.stage

    def stage_that_made(self, node: Node) -> int:
        """Return the stage during whose forward a node of the autograd graph was made."""
        return self._graph.stage_that_made(sequence_number(node))

    def _go_on(self, stage: int) -> Any:
        try:
            return self._call.resume() if stage else self._call.start()
        except RuntimeError as error:
            _explain(error, stage)
            raise

    def _close(self) -> None:
        loss = self.loss
        if loss is None:
            return
        check_loss(loss)
        self.leaves = self._graph.close(loss, torch.full_like(loss, self._weight))
        self._step.own(self.leaves, self._opened)
        self._step.hands_on_views |= not self._step.is_settled and self._graph.has_views_across
        self.loss = loss.detach()

    def _own_versions(self) -> AbstractContextManager[Any]:
        """Return a context manager that hides the weight updates since the previous stage from autograd.

        Otherwise autograd would rebuild the nodes of views of updated parameters, and these nodes would belong to this
        stage.
        """
        return current_weights(*self._versions[-1]) if self._step.hands_on_views and self._versions else _NOTHING

    @contextmanager
    def _own_attributes(self) -> Iterator[None]:
        """Context manager that gives modules this micro-batch's attributes for a part of the step, then saves them."""
        step, attributes = self._step, self._step.attributes
        assert attributes is not None
        if self.stage == 0:
            step.waiting.append(self)
            step.under_way.append(self)
            self._attributes = attributes.current(step.carried)
        outside = attributes.current(self._attributes)
        attributes.write(self._attributes)
        before = attributes.read()
        yield
        changed = attributes.changes(before)
        # Micro-batches that have passed this stage have their backward here still to come.
        if any(flight.stage >= self.stage for flight in step.under_way if flight is not self):
            attributes.check_images(changed)
        step.note_writes(self.stage, changed)
        # Attributes that this stage may set but has not set are kept too: other micro-batches may set them meanwhile.
        self._attributes |= attributes.current(step.set_in(self.stage)) | changed
        private = [place for place in step.private if place in self._attributes]
        # The next micro-batch finds what this one has set in this stage, except attributes that other stages set too.
        left = {place: value for place, value in outside.items() if place not in changed}
        if self._call.is_suspended:
            left |= attributes.select(before, [place for place in private if place not in outside])
            left |= {place: outside[place] for place in private if place in outside}
        else:
            left |= {place: self._attributes[place] for place in private}
            self._attributes = {}
            step.waiting.remove(self)
        attributes.write(left)

    @contextmanager
    def _own_random_states(self) -> Iterator[None]:
        """Context manager that restores this micro-batch's random states for a part of the step, then saves them.

        The random states of other micro-batches stay as they are.
        """
        random = self._step.random
        assert random is not None
        outside = random.read()
        if self._random_states is not None:
            random.write(self._random_states)
        yield
        self._random_states = random.read()
        if self.stage:
            random.write(outside)

    @contextmanager
    def _own_switches(self) -> Iterator[None]:
        """Context manager that restores the step's process-wide settings, and sets them aside when the step waits."""
        switches = self._step.switches
        outside = {switch: switch.read() for switch in switches}
        for switch, value in self._switched.items():
            switch.set(value)
        yield
        self._switched = {}
        if self._call.is_suspended:
            now = {switch: switch.read() for switch in switches}
            switched = {switch: value for switch, value in now.items() if value != outside[switch]}
            self._step.note_switches(self.stage, switched)
            self._switched = switched
            for switch in self._switched:
                switch.set(outside[switch])


def _explain(error: RuntimeError, stage: int) -> None:
    """Raise a :class:`UsageError` if ``error`` says that a tensor has changed that autograd needs."""
    if "modified by an inplace operation" in str(error):
        raise UsageError(
            f"stage {stage} cannot differentiate, as a tensor that it needs was changed in place: a buffer, by another "
            "micro-batch, or weights, if the step calls torch.autograd.grad over several stages under "
            "schedule='async'. Use an out-of-place operation, keep it in one stage, or use schedule='sync'. "
            f"({str(error).splitlines()[0]})"
        ) from error


def check_loss(loss: Tensor) -> None:
    """Check that a loss requires grad.

    Raises:
        UsageError: if the loss depends on no parameter that requires grad.
    """
    if not loss.requires_grad:
        raise UsageError(
            "the loss that training_step returned depends on no parameter that requires grad; to skip a batch, return "
            "None"
        )


def _shared_parameter(network: nn.Module, parameter: Tensor, first: int, second: int) -> UsageError:
    """Return the error to raise when two stages that update separately use the same parameter."""
    return UsageError(
        f"{_name(network, parameter)} is used by stages {first} and {second}, which update separately: "
        "keep both uses on one stage with split_at, or use schedule='sync' and devices=1"
    )


def _name(network: nn.Module, parameter: Tensor) -> str:
    names = [name for name, p in network.named_parameters() if p is parameter]
    return f"parameter {names[0]!r}" if names else "a leaf tensor"


def _arrival(index: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any) -> None:
        flight = SuspendableCall.current()
        if isinstance(flight, Flight):
            flight.arrive(index)

    # A compiled function breaks its graph here, and the hook runs outside of it.
    return torch.compiler.disable(hook)  # pyright: ignore[reportReturnType], it returns the type that it is given
