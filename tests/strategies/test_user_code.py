"""These tests check that users' code trains as in plain Lightning, or is refused before the first update."""

import functools
import itertools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import user_code as u
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_modules import make_trainer
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parameter import is_lazy

from aimc_pl.errors import UsageError
from aimc_pl.private_torch import is_in_torch_dispatch_mode
from aimc_pl.strategies import AnalogPipelineStrategy

EQUAL = "equal"  # as plain Lightning on mini-batches; under async to first order, with a vanishing learning rate
MICRO = "micro"  # as plain Lightning on micro-batches, where splitting itself changes the numbers
RUNS = "runs"  # finite weights that have moved
STILL = "still"  # weights that have not moved

INSIDE = "inside a checkpointed region"
OUTSIDE = "computed outside of this micro-batch"
SHARED = "shared between micro-batches"
WITHHELD = "optimizer_step calls the closure itself"


@dataclass(frozen=True)
class Case:
    """A module and its expected outcomes. An outcome that is no word from above is a part of the refusal's message."""

    make: Callable[[], L.LightningModule]
    one: str = EQUAL
    """The outcome under sync with whole mini-batches."""
    two: str = EQUAL
    """The outcome under sync with two micro-batches."""
    stale: str = EQUAL
    """The outcome under async with two micro-batches."""
    split_at: tuple[str, ...] | None = ("net.2", "net.4")
    options: dict = field(default_factory=dict)


RANDOM = {"two": RUNS, "stale": RUNS}
BY_MICROBATCH = {"two": MICRO, "stale": MICRO}

LATE = ("net.2", "net.6")

CASES = {
    "plain": Case(u.Plain),
    # autograd
    "gradient reversal": Case(u.GradientReversal),
    "straight-through": Case(u.StraightThrough),
    "a weight on ctx": Case(u.WeightOnContext),
    "modules in a function": Case(u.OwnCheckpoint, split_at=LATE),
    "a boundary in a function": Case(u.OwnCheckpointOverABoundary, *[INSIDE] * 3),
    "no_grad block": Case(u.NoGradBlock),
    "grad mode by hand": Case(u.GradModeByHand),
    "autocast": Case(u.Autocast, two=RUNS, stale=RUNS, options={"precision": "32-true"}),
    "default dtype": Case(u.DefaultDtype),
    "linear probe": Case(u.Probe, *["without gradients"] * 3, split_at=("net.2", "head.0")),
    "mean teacher": Case(u.Teacher, stale=RUNS),
    "target network": Case(u.TargetNetwork, stale=RUNS),
    "copies the network": Case(u.CopiesTheNetworkInTheStep, stale=RUNS),
    "pickles the network": Case(u.PicklesTheNetwork),
    "gradient penalty": Case(u.InputPenalty, EQUAL, EQUAL, "is used by stages"),
    "gradient penalty of one call": Case(u.PenaltyOfOneCall),
    "gradient penalty in one stage": Case(u.PenaltyInTheLastStage),
    "adversarial": Case(u.Adversarial, EQUAL, EQUAL, "is used by stages 0 and 2"),
    "balanced losses": Case(u.BalancesLosses, EQUAL, MICRO, "cannot differentiate"),
    "tensor hooks": Case(u.TensorHooks),
    "hook of several tensors": Case(u.HookOfSeveralTensors, *["spans stages 0 and 2"] * 3),
    "hook of any tensor": Case(u.HookOfAnyTensor, *["spans stages 0 and 2"] * 3),
    "hook in the first stage": Case(u.HookInTheFirstStage),
    "hook of all parameters": Case(u.HookOfAllParameters, *["spans stages 0 and 2"] * 3),
    "parameter hooks": Case(u.ParameterHooks),
    "hooks after accumulation": Case(u.GradientsAfterAccumulation, EQUAL, MICRO, RUNS),
    "retain_grad": Case(u.RetainsGradients, EQUAL, RUNS, RUNS),
    "checkpoint": Case(u.Checkpointed, split_at=LATE),
    "reentrant checkpoint": Case(u.CheckpointedReentrant, split_at=LATE),
    "checkpoint over a boundary": Case(u.CheckpointedOverABoundary, *[INSIDE] * 3),
    "reentrant checkpoint over a boundary": Case(u.CheckpointedReentrantOverABoundary, *[INSIDE] * 3),
    "checkpointed dropout": Case(u.CheckpointedDropout, **RANDOM, split_at=LATE),
    "saved-tensor hooks": Case(u.SavedTensorHooks),
    "save_on_cpu": Case(u.SavedOnCpu),
    "function mode": Case(u.FunctionMode),
    "dispatch mode": Case(u.DispatchMode),
    "vmap in a stage": Case(u.VectorisedHead),
    "inference mode over a boundary": Case(u.BoundaryInInferenceMode),
    "inference mode elsewhere": Case(u.InferenceModeElsewhere),
    "functional_call": Case(u.NoisyWeights, EQUAL, EQUAL, "is used by stages"),
    "functional_call, no_grad": Case(u.SlowWeights),
    "weights moved for the forward": Case(u.MovesWeights, EQUAL, SHARED, SHARED),
    "weights clamped in the step": Case(u.ClampsWeights),
    "frozen for a while": Case(u.FreezesForAWhile),
    "anomaly detection": Case(u.Plain, options={"detect_anomaly": True}),
    # random numbers
    "dropout": Case(u.Dropout, **RANDOM),
    "dropout, boundaries found": Case(u.Dropout, **RANDOM, split_at=None),
    "layer drop, random": Case(u.LayerDrop, **RANDOM, split_at=("net.4",)),
    "layer drop, numpy": Case(u.LayerDropNumpy, **RANDOM, split_at=("net.4",)),
    "layer drop, torch": Case(u.LayerDropTorch, **RANDOM, split_at=("net.4",)),
    "layer drop, own generators": Case(u.LayerDropOwnGenerator, EQUAL, RUNS, RUNS, split_at=("net.4",)),
    "noise": Case(u.Noise, **RANDOM),
    "noise of an own generator": Case(u.NoiseOfItsOwnGenerator, **RANDOM),
    "seeds in the step": Case(u.SeedsInTheStep),
    "fork_rng": Case(u.ForksRandomNumbers),
    # the trainer and hooks
    "uses the trainer": Case(u.UsesTheTrainer, stale=RUNS),
    "reads gradients": Case(u.ReadsGradients, *["reads gradients of parameters"] * 3),
    "module hooks": Case(u.ModuleHooks),
    "keyword arguments": Case(u.KeywordArguments, two=MICRO, stale=MICRO),
    "features by hooks": Case(u.CollectsFeatures),
    "features in a closure": Case(u.CollectsInAClosure, EQUAL, OUTSIDE, OUTSIDE),
    "hooks of the step": Case(u.HooksOfTheStep, EQUAL, OUTSIDE, OUTSIDE),
    # state and attributes
    "labels": Case(u.KeepsLabels),
    "labels in an object": Case(u.KeepsLabelsInAnObject, EQUAL, SHARED, SHARED),
    "labels in a global": Case(u.KeepsLabelsInAGlobal, EQUAL, SHARED, SHARED),
    "labels on the class": Case(u.KeepsLabelsOnTheClass, EQUAL, SHARED, SHARED),
    "labels in the loss": Case(u.KeepsLabelsInTheLoss, EQUAL, SHARED, SHARED),
    "skip through attributes": Case(u.SkipsThroughAttributes, split_at=("net.1.1", "net.4")),
    "number through attributes": Case(u.NumberThroughAttributes, **BY_MICROBATCH),
    "auxiliary list": Case(u.AuxiliaryList),
    "auxiliary new list": Case(u.AuxiliaryNewList),
    "auxiliary list taken out": Case(u.AuxiliaryTakenOut),
    "auxiliary dict": Case(u.AuxiliaryDict),
    "auxiliary deque": Case(u.AuxiliaryDeque),
    "auxiliary tuple": Case(u.AuxiliaryTuple),
    "auxiliary counter": Case(u.AuxiliaryCounter),
    "auxiliary slots": Case(u.AuxiliarySlots),
    "auxiliary buffer": Case(u.AuxiliaryBuffer, EQUAL, SHARED, SHARED),
    "auxiliary, deleted": Case(u.AuxiliaryDeleted),
    "auxiliary sum": Case(u.AuxiliarySum),
    "eval in the step": Case(u.EvaluatesInTheStep),
    "carries": Case(u.Carries, EQUAL, "hidden", "hidden"),
    "carries over a boundary": Case(u.CarriesOverABoundary, EQUAL, "hidden", "hidden"),
    "carries in a list": Case(u.CarriesInAList, EQUAL, "hidden", "hidden"),
    "carries in a buffer": Case(u.CarriesInABuffer, EQUAL, "hidden", "hidden"),
    "carries deep inside": Case(u.CarriesDeepInside, EQUAL, "state", "state"),
    "carries the loss": Case(u.CarriesTheLoss, EQUAL, "left in 'mean'", "left in 'mean'"),
    "anneals": Case(u.Anneals, EQUAL, "beta", "beta"),
    "anneals with the steps": Case(u.AnnealsWithTheSteps, EQUAL, EQUAL, RUNS),
    "hyperparameters": Case(u.Hyperparameters),
    "looks at the batch first": Case(u.LooksAtTheBatchFirst),
    "counts in a buffer": Case(u.CountsInABuffer, EQUAL, "left in 'count", "left in 'count"),
    "counts in an array": Case(u.CountsInAnArray, EQUAL, "left in 'counts'", "left in 'counts'"),
    "rebinds a buffer": Case(u.RebindsABuffer, EQUAL, "left in '", "left in '"),
    "running scale": Case(u.RunningScale, EQUAL, "left in 'scale", "left in 'scale"),
    "running mean": Case(u.RunningMean, EQUAL, "left in 'net.1.0.steps", "left in 'net.1.0.steps"),
    "batch norm": Case(u.BatchNorm, **BY_MICROBATCH),
    "queue": Case(u.Queue, EQUAL, "left in '", "left in '"),
    "queue over a boundary": Case(u.QueueInTheFirstStage, EQUAL, "left in 'queue", "left in 'queue"),
    "codebook": Case(u.Codebook, EQUAL, "left in 'quantise.codes", "left in 'quantise.codes"),
    "mask on demand": Case(u.MaskOnDemand),
    "cached property": Case(u.CachedProperty),
    "cached mask": Case(u.CachedMask),
    "keeps outputs": Case(u.KeepsOutputs),
    "keeps outputs of stages": Case(u.KeepsOutputsOfStages, EQUAL, "adds to 'outputs'", "adds to 'outputs'"),
    "metric of stages": Case(u.MetricOfStages, EQUAL, "adds to 'mean.", "adds to 'mean."),
    "keeps a graph": Case(u.KeepsAGraph),
    "not copyable": Case(u.NotCopyable),
    "takes from a generator": Case(u.TakesFromAGenerator, EQUAL, SHARED, SHARED),
    # tensors in place
    "writes into tensors": Case(u.WritesIntoTensors),
    "writes across the boundary": Case(u.WritesAcrossTheBoundary),
    "writes into the batch": Case(u.WritesIntoTheBatch),
    "takes the batch apart": Case(u.TakesTheBatchApart, EQUAL, SHARED, SHARED),
    "constants": Case(u.Constants),
    "embedding": Case(u.Embeds),
    # the batch
    "time first": Case(u.TimeFirst, EQUAL, "along the first dimension", "along the first dimension"),
    "time first, split": Case(u.TimeFirstSplit),
    "names": Case(u.WithNames),
    "two loaders": Case(u.TwoLoaders, EQUAL, "along the first dimension", "along the first dimension"),
    "named tuples": Case(u.NamedTuples),
    "dataclasses": Case(u.Dataclasses),
    # signatures and the loss
    "batch only": Case(u.BatchOnly),
    "keywords": Case(u.Keywords),
    "step in an attribute": Case(u.StepInAnAttribute),
    "masked mean": Case(u.MaskedMean, **BY_MICROBATCH),
    "several losses": Case(u.SeveralLosses),
    "loss of an early stage": Case(u.LossOfAnEarlyStage),
    "no gradient": Case(u.NoGradient, *["requires grad"] * 3),
    "always None": Case(u.AlwaysNone, STILL, STILL, STILL),
    "sometimes None": Case(u.SometimesNone),
    "None for some data": Case(u.NoneForSomeData, **BY_MICROBATCH),
    "None before the network": Case(u.NoneBeforeTheNetwork),
    "gradient norms": Case(u.GradientNorms, stale=RUNS),
    "logs": Case(u.Logs),
    "own log": Case(u.OwnLog),
    # gradients and updates
    "halves gradients": Case(u.HalvesGradients),
    "drops gradients": Case(u.DropsGradients, STILL, STILL, STILL),
    "removes gradients": Case(u.RemovesGradients),
    "clips after backward": Case(u.ClipsAfterBackward, stale=RUNS),
    "halves before the step": Case(u.HalvesBeforeTheStep),
    "own clipping": Case(u.OwnClipping),
    "own optimizer step": Case(u.OwnOptimizerStep, stale=RUNS),
    "every other step": Case(u.EveryOtherStep, stale=WITHHELD),
    "never a step": Case(u.NeverAStep, STILL, STILL, WITHHELD),
    "rates per layer": Case(u.RatesPerLayer),
    "own zero grad": Case(u.OwnZeroGrad),
    "halves before zero grad": Case(u.HalvesBeforeZeroGrad),
    "changes the rate": Case(u.ChangesTheRate, stale=RUNS),
    "scales before backward": Case(u.ScalesBeforeBackward, stale="on_before_backward comes too late"),
    "freezes before backward": Case(u.FreezesBeforeBackward, stale="on_before_backward comes too late"),
    "clamps before zero grad": Case(u.ClampsBeforeZeroGrad, stale=RUNS),
    "trains a tensor": Case(u.TrainsATensor),
    "trains a hidden module": Case(u.TrainsAHiddenModule),
    "counts steps": Case(u.CountsSteps, stale=RUNS),
    "counts steps in an attribute": Case(u.CountsStepsInAnAttribute, stale="keeps 'count' for all parameters"),
    "logs twice": Case(u.LogsTwice),
    "lists of samples": Case(u.ListsOfSamples),
    "line search": Case(u.LineSearch, EQUAL, EQUAL, "LBFGS"),
    "clipping": Case(u.Plain, stale=RUNS, options={"gradient_clip_val": 0.05}),
    "accumulation": Case(u.Plain, stale="accumulate_grad_batches", options={"accumulate_grad_batches": 2}),
    "overfit_batches": Case(u.Plain, options={"overfit_batches": 1}),
    "limit_train_batches": Case(u.Plain, options={"limit_train_batches": 2}),
    "simple profiler": Case(u.Plain, options={"profiler": "simple"}),
    "torch profiler": Case(u.Plain, options={"profiler": "pytorch", "limit_train_batches": 1, "max_epochs": 1}),
    "barebones": Case(u.Plain, options={"barebones": True}),
    "max_steps": Case(u.Plain, options={"max_steps": 4, "max_epochs": -1}),
    # parameters and their sharing
    "weight norm": Case(u.WeightNorm),
    "old weight norm": Case(u.OldWeightNorm),
    "orthogonal": Case(u.Orthogonal),
    "spectral norm": Case(u.SpectralNorm, EQUAL, "left in 'net.0.", "left in 'net.0."),
    "cached parametrizations": Case(u.CachedParametrizations, EQUAL, OUTSIDE, OUTSIDE),
    "pruned": Case(u.Pruned),
    "tied": Case(u.Tied, EQUAL, EQUAL, "net.2.weight"),
    "tied in one stage": Case(u.TiedInOneStage),
    "calls twice": Case(u.CallsTwice, EQUAL, EQUAL, "is used by stages"),
    "shared in time": Case(u.SharedInTime, split_at=("net.cell", "net.out")),
    "weight penalty": Case(u.WeightPenalty, EQUAL, EQUAL, "is used by stages"),
    "penalty on the last layer": Case(u.PenaltyOnTheLastLayer),
    "shared scale": Case(u.SharedScale, EQUAL, EQUAL, "scale"),
    "frozen": Case(u.Frozen),
    "frozen stages": Case(u.FrozenStages),
    "unfreezes later": Case(u.UnfreezesLater),
    "unused sometimes": Case(u.UnusedSometimes),
    "scaled at the end, boundaries found": Case(u.ScaledAtTheEnd, split_at=None),
    "scaled at the end": Case(u.ScaledAtTheEnd, split_at=("net.net.2", "net.net.4")),
    "view of a parameter": Case(u.ViewOfAParameter),
    "replaces a parameter": Case(u.ReplacesAParameter),
    "replaces a layer": Case(u.ReplacesALayer),
    "adds a layer": Case(u.AddsALayer),
    # the code
    "depends on values": Case(u.DependsOnValues, EQUAL, MICRO, MICRO),
    "tries": Case(u.Tries, stale="is used by stages"),
    "tries in one stage": Case(u.TriesInOneStage, EQUAL, EQUAL, EQUAL),
    "generates": Case(u.Generates),
    "compiled layer": Case(u.CompiledLayer),
    "compiled around a boundary": Case(u.CompiledAroundABoundary),
    "compiled in place": Case(u.CompiledInPlace),
    "scripted": Case(u.Scripted),
    "weight averaging": Case(u.AveragesWeights, stale=RUNS),
    "stochastic weight averaging": Case(u.StochasticallyAveragesWeights, stale=RUNS),
    "configure_model": Case(u.ConfiguresItsModel),
    "calls forward": Case(u.CallsForward, *["net.2"] * 3),
    "in a thread": Case(u.InAThread, *[OUTSIDE] * 3),
    "skips a boundary": Case(u.SkipsABoundary),
    "detects anomalies": Case(u.DetectsAnomalies),
    "silences warnings": Case(u.SilencesWarnings),
    "redirects output": Case(u.RedirectsOutput),
    "switches backends": Case(u.SwitchesBackends),
    "sets threads": Case(u.SetsThreads),
    "forbids saved-tensor hooks": Case(u.ForbidsSavedTensorHooks),
    "patches a function": Case(u.PatchesAFunction),
    "holds a lock": Case(u.HoldsALock, EQUAL, *["still holds the lock 'lock' where 'net.2'"] * 2),
    "holds a reentrant lock": Case(u.HoldsAReentrantLock),
    "runs a coroutine": Case(u.RunsACoroutine, EQUAL, *["still holds the event loop of asyncio.run"] * 2),
    "differentiates forward": Case(u.DifferentiatesForward, EQUAL, *["dual_level"] * 2),
    "vmap over a boundary": Case(u.Vectorised, *["inside a transform of torch.func"] * 3),
    # what runs before the first update could leave
    "averages in objects": Case(u.AveragesInObjects),
    "anneals in an object": Case(u.AnnealsInAnObject, EQUAL, "left in 'steps.number'", "left in 'steps.number'"),
    "anneals in a global": Case(u.AnnealsInAGlobal, EQUAL, "left in 'STEPS'", "left in 'STEPS'"),
    "anneals on the class": Case(u.AnnealsOnTheClass, EQUAL, *["left in 'AnnealsOnTheClass.number'"] * 2),
    "anneals in a closure": Case(u.AnnealsInAClosure, EQUAL, "left in 'number'", "left in 'number'"),
    "anneals out of reach": Case(u.AnnealsOutOfReach, *["when it runs again from the same state"] * 3),
    "generators in containers": Case(u.GeneratorsInContainers, **RANDOM),
    "hidden teacher": Case(u.HiddenTeacher, EQUAL, "left in 'hidden.0.0.weight", "left in 'hidden.0.0.weight"),
    "hidden batch norm": Case(u.HiddenBatchNorm, **BY_MICROBATCH),
    "schedules in the step": Case(u.SchedulesInTheStep, EQUAL, MICRO, RUNS),
    "schedules its own in the step": Case(u.SchedulesItsOwnInTheStep, EQUAL, MICRO, RUNS),
    "hooks of the first step": Case(u.HooksOfTheFirstStep),
    "parameter hooks of the first step": Case(u.ParameterHooksOfTheFirstStep, EQUAL, RUNS, RUNS),
    "weight norm of the first step": Case(u.WeightNormOfTheFirstStep, *["creates the parameter 'net.4."] * 3),
    "layer of the first step": Case(u.LayerOfTheFirstStep, *["creates the parameter 'extra.weight'"] * 3),
    "hidden states": Case(u.HiddenStates, split_at=("bert.encoder.layer.1", "net.6")),
    "lazy layers": Case(u.Lazy, split_at=LATE),
    "lazy layer at a boundary": Case(u.Lazy, EQUAL, "is lazy", "is lazy"),
    "resizes a buffer": Case(u.ResizesABuffer, EQUAL, MICRO, RUNS),
    "containers of its own": Case(u.ContainersOfItsOwn),
    "backward in the step": Case(u.BackwardInTheStep, *["calls backward itself"] * 3),
    "writes into the data set": Case(u.WritesIntoTheDataSet, *["writes into the data set"] * 3),
    "updates in the backward": Case(u.UpdatesInTheBackward, *["updates no parameter"] * 3),
}

WORDS = (EQUAL, MICRO, RUNS, STILL)


def fit(case, strategy, *, micro=False, motion=False):
    """Train and return the states before and after, the metrics, and the error of a refusal.

    Args:
        case: the module and the options of the Trainer.
        strategy: of the Trainer.
        micro: whether to train on micro-batches and accumulate their gradients.
        motion: whether to train with a vanishing learning rate. Then stale weights equal those of plain Lightning, and
            every gradient shows in the motion of the weights.
    """
    L.seed_everything(7, verbose=False)
    options = dict(case.options)
    module = case.make().to(torch.float32 if "precision" in options else torch.float64)
    module.length = 18 if MICRO in (case.two, case.stale) else 17
    if micro:
        module.batch_size //= 2
        options["accumulate_grad_batches"] = 2
    if motion:
        module.lr, module.momentum = 1e-7, 0.0
    start, error = state(module), None
    trainer = make_trainer(strategy, **options)
    try:
        trainer.fit(module)
    except UsageError as refusal:
        error = refusal
    return start, state(module), {name: float(value) for name, value in trainer.callback_metrics.items()}, error


def state(module):
    values = itertools.chain(module.named_parameters(), module.named_buffers())
    return {name: value.detach().clone() for name, value in values if not is_lazy(value)}


def process_state():
    """Return the settings of the process that a step may change for a while."""
    switches = torch.is_grad_enabled(), torch.is_anomaly_enabled(), torch.is_autocast_enabled("cpu")
    backends = torch.backends.mkldnn.enabled, torch.backends.cuda.flash_sdp_enabled(), torch.get_num_threads()
    with saved_tensors_hooks(lambda x: x, lambda x: x):  # this raises if hooks are forbidden
        replaceable = torch.get_default_dtype(), [*warnings.filters], sys.stdout, F.cross_entropy
        return switches, backends, replaceable, is_in_torch_dispatch_mode()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


@functools.cache
def plain(name, micro, motion):
    return fit(CASES[name], "auto", micro=micro, motion=motion)[:3]


def agrees(start, end, reference, motion):
    if motion:
        return (end - reference).double().norm() <= 1e-4 * (reference - start).double().norm() + 1e-13
    return torch.allclose(end, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [u.Dropout, u.LayerDrop, u.Noise])
def test_one_micro_batch_draws_the_random_numbers_of_plain_lightning(make):
    """Check equality bit for bit, also where the boundaries were found by running the step."""
    splits = [("net.4",)] if make is u.LayerDrop else [("net.2", "net.4"), None]
    reference = fit(Case(make), "auto")[1]
    for split_at in splits:
        strategy = AnalogPipelineStrategy(3 if split_at is None else 1 + len(split_at), "sync", 1, split_at=split_at)
        assert same(fit(Case(make), strategy)[1], reference)


@pytest.mark.parametrize("make", [u.ReadsOutputs, u.WritesForAHook])
def test_a_single_micro_batch_is_the_batch_and_its_output_the_output(make):
    reference = fit(Case(make), "auto")[1]
    strategy = AnalogPipelineStrategy(3, "sync", 1, split_at=("net.2", "net.4"))
    assert same(fit(Case(make), strategy)[1], reference)


class CountsLines(DummyLogger):
    lines = 0

    def log_metrics(self, *args, **kwargs):
        self.lines += 1


@pytest.mark.filterwarnings("ignore:BatchNorm computes its statistics per micro-batch")  # the network has BatchNorm
@pytest.mark.filterwarnings("ignore:splitting the mini-batch changes its loss")  # because of BatchNorm
@pytest.mark.parametrize(
    ("num_microbatches", "split_at"), [(1, ("net.2", "net.4")), (1, None), (2, ("net.2", "net.4"))]
)
def test_verifying_and_measuring_leave_no_trace(num_microbatches, split_at):
    """Check that buffers, attributes, metrics, logs and random states are the same without verifying and measuring."""

    def traces(strategy):
        L.seed_everything(7, verbose=False)
        module, logger = u.LeavesTraces().double(), CountsLines()
        trainer = make_trainer(strategy, max_epochs=1, limit_train_batches=1, logger=logger)
        trainer.fit(module)
        return module.traces() | {"loss": trainer.callback_metrics["loss"].item(), "lines": logger.lines}

    def strategy(verify):
        return AnalogPipelineStrategy(3, "sync", num_microbatches, split_at=split_at, verify=verify)

    found = traces(strategy(verify=True))
    assert found == traces(strategy(verify=False))
    if num_microbatches == 1:
        assert found == traces("auto")


@pytest.mark.slow
@pytest.mark.parametrize("make", [u.AnnealsInAnObject, u.GeneratorsInContainers, u.HiddenTeacher, u.AveragesInObjects])
@pytest.mark.parametrize(("split_at", "verify"), [(("net.2", "net.4"), False), ((), True)])
def test_runs_before_the_first_update_are_as_none(make, split_at, verify):
    """Check that they leave no trace, also without verifying and in a single stage."""
    strategy = AnalogPipelineStrategy(1 + len(split_at), "sync", 1, split_at=split_at, verify=verify)
    reference, ours = (fit(Case(make), strategy)[1:] for strategy in ("auto", strategy))
    assert same(ours[0], reference[0])
    assert ours[1:] == reference[1:]


@pytest.mark.parametrize("make", [u.Plain, u.GradModeByHand, u.SlowWeights, u.CopiesTheNetworkInTheStep])
def test_calls_without_gradients_open_no_stage(make):
    """Check that every stage trains its own layers, also if the network is first called under no_grad."""
    module = make().double()
    strategy = AnalogPipelineStrategy(3, "sync", 1, split_at=("net.2", "net.4"))
    make_trainer(strategy, max_epochs=1, limit_train_batches=1).fit(module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    stages = strategy.pipeline.stages
    held = [{names[id(parameter)].rpartition(".")[0] for parameter in stage.parameters} for stage in stages]
    assert held == [{"net.0"}, {"net.2"}, {"net.4", "net.6"}]


def test_a_compiled_lightning_module_is_refused():
    """Check that Lightning refuses the module, because Lightning knows which strategies take compiled modules."""
    module = torch.compile(u.Plain().double(), backend="eager")
    with pytest.raises(RuntimeError, match="incompatible with the current strategy"):
        make_trainer(AnalogPipelineStrategy(3, split_at=("net.2", "net.4"))).fit(module)


@pytest.mark.filterwarnings("ignore")  # warnings about the cases' code do not matter here
@pytest.mark.parametrize(
    ("make", "schedule", "message"),
    [
        (u.AuxiliaryLater, "sync", "the step sets 'aux' in stage"),
        (u.AuxiliaryLater, "async", "the step sets 'aux' in stage"),
        (u.ChangesTheOrder, "async", "is used by stages 1 and 2"),
        (u.PenaltyLater, "async", "parameter 'net.0.weight' is used by stages 0 and 2"),
        (u.SkipsLayersAtRandom, "async", "did not call 'net.4', with which stage 2 begins"),
    ],
)
def test_what_shows_later_is_refused_when_it_shows(make, schedule, message):
    error = fit(Case(make), AnalogPipelineStrategy(3, schedule, 2, split_at=("net.2", "net.4")))[-1]
    assert message in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_a_split_that_changes_the_loss_is_told_beside_dropout(schedule):
    for make, changes in ((u.DividesByAFixedNumber, True), (u.Dropout, False)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit(Case(make), AnalogPipelineStrategy(3, schedule, 2, split_at=("net.2", "net.4")))
        assert any("splitting the mini-batch changes its loss" in str(warning.message) for warning in told) == changes


def test_a_mean_over_other_things_than_samples_equals_plain_with_its_weights():
    case = Case(u.MaskedMean, **BY_MICROBATCH)
    strategy = AnalogPipelineStrategy(
        3, "sync", 2, split_at=("net.2", "net.4"), microbatch_weight=lambda batch: int((batch[0][:, 0] > 0).sum())
    )
    ours, reference = fit(case, strategy)[1], fit(case, "auto")[1]
    assert all(agrees(None, ours[name], reference[name], motion=False) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("make", [u.Plain, u.KeepsLabels, u.AuxiliaryList, u.TargetNetwork, u.Dropout])
def test_async_learns(make):
    """Check that the mean loss of an epoch falls although weights are stale."""
    losses = []

    class Learns(make):
        momentum = 0.0

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_epoch=True)
            return loss

        def on_train_epoch_end(self):
            losses.append(self.trainer.callback_metrics["loss_epoch"].item())

    fit(Case(Learns, options={"max_epochs": 8}), AnalogPipelineStrategy(3, "async", 2, split_at=("net.2", "net.4")))
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore")  # warnings about the cases' code do not matter here
@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sync, B=1", "sync, B=2", "async"])
@pytest.mark.parametrize("name", CASES)
def test_user_code(name, schedule):
    case = CASES[name]
    expected = {"sync, B=1": case.one, "sync, B=2": case.two, "async": case.stale}[schedule]
    motion = schedule == "async" and expected not in (RUNS, STILL)
    strategy = AnalogPipelineStrategy(
        3 if case.split_at is None else 1 + len(case.split_at),
        schedule.partition(",")[0],
        1 if schedule == "sync, B=1" else 2,
        split_at=case.split_at,
    )
    process = process_state()
    start, end, metrics, error = fit(case, strategy, motion=motion)
    assert process_state() == process
    if error is not None:
        assert expected not in WORDS, error
        assert expected in str(error)
        assert "\n" not in str(error)
        assert same(start, end)
        return
    assert expected in WORDS, "neither refused nor known to work"
    assert all(value.isfinite().all() for value in end.values())
    if expected in (RUNS, STILL):
        assert same(start, end) == (expected == STILL)
        return
    theirs, logged = plain(name, expected == MICRO, motion)[1:]
    different = [v for v in end if not agrees(start.get(v, 0), end[v], theirs[v], motion)]
    if not motion:
        different += [key for key in logged if metrics.get(key) != pytest.approx(logged[key], rel=1e-6)]
    assert not different, f"not as in plain Lightning: {different}"
