"""Kinds of torch functions, by what they need of a tensor: its shape, its values or its place in the autograd graph."""

from collections.abc import Callable
from enum import Enum, auto
from functools import cache
from typing import Any


class Kind(Enum):
    """What a torch function means for ghosts, the placeholders for values of other stages."""

    OPERATION = auto()
    """It computes tensors from tensors."""
    RANDOM = auto()
    """It computes tensors and draws random numbers."""
    ITERATION = auto()
    METADATA = auto()
    """It asks for what is known of a ghost too, such as its shape."""
    DEVICE = auto()
    """It asks on which device a tensor is. For a ghost, the answer is the device on which this stage computes."""
    HOOK = auto()
    """It attaches to a tensor what matters only to the stage of that tensor, such as a hook."""
    NUMBER = auto()
    """It returns values to Python, which need not decide by them."""
    READ = auto()
    """It lets Python decide by values."""
    GRADIENT = auto()


_KINDS = {
    Kind.RANDOM: """rand randn randint randperm rand_like randn_like randint_like bernoulli bernoulli_ multinomial
        normal normal_ uniform_ exponential_ random_ geometric_ cauchy_ log_normal_ poisson dropout dropout_ dropout1d
        dropout2d dropout3d alpha_dropout alpha_dropout_ feature_dropout feature_dropout_ feature_alpha_dropout
        feature_alpha_dropout_ native_dropout rrelu rrelu_ gumbel_softmax""",
    Kind.ITERATION: "__iter__",
    Kind.METADATA: """size dim ndimension numel nelement stride is_floating_point is_complex is_signed is_contiguous
        __len__ storage_offset element_size is_same_size __hash__ has_names is_inference _is_view __repr__ __format__
        __dir__ untyped_storage data_ptr""",
    Kind.DEVICE: "get_device",
    Kind.HOOK: "register_hook retain_grad register_post_accumulate_grad_hook requires_grad_",
    Kind.NUMBER: "item tolist numpy",
    Kind.READ: """__bool__ __int__ __float__ __index__ __complex__ __contains__ is_nonzero equal allclose
        __array__ __dlpack__ __reduce_ex__ __deepcopy__""",
    Kind.GRADIENT: "backward grad",
}
_BY_NAME = {name: kind for kind, names in _KINDS.items() for name in names.split()}
KNOWN = (Kind.METADATA, Kind.DEVICE, Kind.HOOK)
"""The kinds of functions that can be answered without values."""
_OPERATIONS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
_DEVICES = frozenset({"device", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_mkldnn"})


@cache
def kind_of(func: Callable[..., Any]) -> Kind:
    """Return the kind of a function that was passed to ``__torch_function__``."""
    name, attribute = getattr(func, "__name__", ""), name_of(func)
    if name == "__set__":
        return Kind.HOOK
    if name == "__get__":
        return Kind.OPERATION if attribute in _OPERATIONS else Kind.DEVICE if attribute in _DEVICES else Kind.METADATA
    return _BY_NAME.get(name, Kind.OPERATION)


@cache
def name_of(func: Callable[..., Any]) -> str:
    """Return what to call a function that was passed to ``__torch_function__``.

    If the function gets or sets an attribute, this is the name of the attribute.
    """
    name = getattr(func, "__name__", type(func).__name__)
    owner = getattr(func, "__self__", None)
    if name in ("__get__", "__set__"):
        return getattr(owner, "__name__", name)
    return f"{owner.__qualname__}.{name}" if isinstance(owner, type) else name
