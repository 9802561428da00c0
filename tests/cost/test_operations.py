"""These tests compare the FLOP of torch's operations with closed forms, and with a real backward that torch counts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from aimc_pl.cost import count_work, work
from aimc_pl.cost.operations import flops_of
from aimc_pl.errors import UsageError


def parameter(*shape):
    """Return a tensor that learns. To make it takes no FLOP."""
    return torch.zeros(shape, requires_grad=True)


def count(function, network=None):
    (found,) = count_work(network or nn.Identity(), function)
    return found.forward_flops, found.backward_flops


N, M, P, B = 3, 5, 4, 2


@pytest.mark.parametrize(
    ("function", "forward", "backward"),
    [
        # a product, and the gradients of both factors
        (lambda: parameter(N, M) @ parameter(M), 2 * N * M, 2 * 2 * N * M),
        (lambda: parameter(N, M) @ torch.ones(M), 2 * N * M, 2 * N * M),
        (lambda: parameter(M) @ parameter(M, N), 2 * N * M, 2 * 2 * N * M),
        (lambda: torch.addmv(torch.ones(N), parameter(N, M), parameter(M)), 2 * N * M, 2 * 2 * N * M),
        (lambda: parameter(N) @ parameter(N), 2 * N, 2 * 2 * N),
        (lambda: torch.vdot(parameter(N), torch.ones(N)), 2 * N, 2 * N),
        (lambda: torch.addr(torch.ones(N, M), parameter(N), parameter(M)), 2 * N * M, 2 * 2 * N * M),
        (lambda: parameter(N, M) @ parameter(M, P), 2 * N * M * P, 2 * 2 * N * M * P),
        # the added matrix is no factor
        (lambda: torch.addmm(parameter(N, P), torch.ones(N, M), parameter(M, P)), 2 * N * M * P, 2 * N * M * P),
        (lambda: torch.baddbmm(parameter(B, N, P), torch.ones(B, N, M), parameter(B, M, P)), 2 * B * N * M * P, None),
        (lambda: torch.addbmm(torch.ones(N, P), parameter(B, N, M), torch.ones(B, M, P)), 2 * B * N * M * P, None),
        (lambda: torch.ones(N, P).addmm_(torch.ones(N, M), parameter(M, P)), 2 * N * M * P, None),
        (lambda: torch.einsum("bij,jk->bik", torch.ones(B, N, M), parameter(M, P)), 2 * B * N * M * P, None),
        (lambda: torch.tensordot(torch.ones(N, M), parameter(P, M), dims=([1], [1])), 2 * N * M * P, None),
        (lambda: F.linear(torch.ones(M), parameter(N, M)), 2 * N * M, None),
        # in place, or not
        (lambda: F.silu(parameter(N) * 1, inplace=True), N + 4 * N, None),
        # sums over bags of M, differences to their power that are added up
        (lambda: F.embedding_bag(torch.zeros(B, M, dtype=torch.int64), parameter(9, P)), B * M * P, B * M * P),
        (lambda: torch.cdist(parameter(N, P), torch.ones(M, P)), 3 * N * M * P, 3 * N * M * P),
        # a complex number has a gradient, an index has none
        (lambda: torch.zeros(N, dtype=torch.complex64, requires_grad=True) * 2, N, N),
        (lambda: parameter(N).argmax(), N, 0),
        # copies
        (lambda: torch.cat([parameter(N), parameter(M)]).repeat(2).flip(0), 0, 0),
    ],
)
def test_operations(function, forward, backward):
    assert count(function) == (forward, forward if backward is None else backward)


def test_what_reads_weights_alone_reads_all_of_them():
    layer = nn.Linear(N, M)
    assert count(lambda: torch.linalg.vector_norm(layer.weight), layer) == (N * M, N * M)
    assert count(lambda: layer.weight[[0, 1]], layer) == (2 * N, 2 * N)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_and_depthwise_convolutions(groups, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(4, 8, 3, stride=2, groups=groups)
    x = torch.randn(B, 4, 7, 7, requires_grad=True)
    positions = 7 * 7 if transposed else 3 * 3  # a transposed convolution scatters every input
    product = 2 * B * positions * 4 * 8 // groups * 9
    assert count(lambda: layer(x), layer) == (product, 2 * product)


@pytest.mark.parametrize(("batch", "a", "b", "out"), [(1, 2, 3, 4), (5, 4, 3, 2)])
def test_a_bilinear_layer(batch, a, b, out):
    layer = nn.Bilinear(a, b, out, bias=False)
    x, y = torch.randn(batch, a, requires_grad=True), torch.randn(batch, b)
    product, outer = 2 * batch * out * a * b, batch * a * b
    forward = outer + product
    assert count(lambda: layer(x.detach(), y), layer) == (forward, product)  # the gradient of the weights
    # The errors of the outer product, and from them those of the first input.
    assert count(lambda: layer(x, y), layer) == (forward, 2 * product + 2 * outer)


@pytest.mark.parametrize("learning", ["v", "q", "qk", "qkv"])
def test_attention_whose_backward_needs_only_some_gradients(learning):
    heads, length, keys, size, values = 2, 6, 5, 4, 3
    q, k, v = (torch.ones(B, heads, *shape) for shape in ((length, size), (keys, size), (keys, values)))
    scores = B * heads * length * keys
    to_scores, to_values, softmax = 2 * scores * size, 2 * scores * values, 5 * scores
    flops = flops_of(
        "_scaled_dot_product_attention",
        (q, k, v),
        {},
        q,
        0,
        lambda x: any(x is {"q": q, "k": k, "v": v}[n] for n in learning),
    )
    assert flops.forward == to_scores + softmax + to_values
    # The scores again, and their errors unless only the values learn.
    assert flops.backward == to_scores + softmax + (to_values + softmax) * (learning != "v")
    assert [cost for _, cost in flops.factors] == [to_scores, to_scores, to_values]


def test_attention_has_the_products_of_a_real_backward():
    q, k, v = (torch.randn(B, 2, 6, 4, requires_grad=True) for _ in range(3))
    found = count(lambda: F.scaled_dot_product_attention(q, k, v))
    with FlopCounterMode(display=False) as forward:
        out = F.scaled_dot_product_attention(q, k, v)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    softmax = 5 * B * 2 * 6 * 6
    assert found == (forward.get_total_flops() + softmax, backward.get_total_flops() + 2 * softmax)


@pytest.mark.parametrize("batch", [1, 4])
def test_recurrent_layers(batch):
    size, hidden, length = 32, 48, 20
    x = torch.randn(length, batch, size)
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        layer = kind(size, hidden)
        products = 2 * length * batch * gates * hidden * (size + hidden)
        (work,) = count_work(layer, lambda: layer(x)[0])  # noqa: B023, it is called at once
        # Gates and activations take some FLOP for each hidden number, which are few beside the products.
        assert products < work.forward_flops < products * 1.2
        # The first product of the recurrence has a hidden state of zeros, which needs no gradient, nor do inputs.
        errors = 2 * (length - 1) * batch * gates * hidden * hidden
        assert work.gradient_flops == products
        assert products + errors < work.backward_flops < (products + errors) * 1.2
        assert work.parameters == work.trained == sum(p.numel() for p in layer.parameters())


def test_encoders_without_gradients_are_no_single_operation():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(B, 6, 8)
    with torch.no_grad():
        forward, _ = count(lambda: layer(x), layer)
    products = 2 * B * 6 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 2 * B * 6 * 6 * 8
    assert products < forward < 1.3 * products
    assert torch.backends.mha.get_fastpath_enabled()


def products_only(*args):
    flops = flops_of(*args)
    return flops if flops.factors else flops._replace(forward=0, backward=0)


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return layer, lambda: layer(torch.ones(B, 6, 8))


def mlp(function):
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    return network, lambda: function(network, torch.ones(4, 5))


def frozen(network, x):
    network[2].requires_grad_(False)
    return network(x)


def autocast(network, x):
    with torch.autocast("cpu", torch.bfloat16):
        return network(x)


class Product(torch.autograd.Function):
    """A product with a backward of its own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.double().float() @ weight.T

    @staticmethod
    def backward(ctx, error):
        x, weight = ctx.saved_tensors
        return error @ weight, error.T @ x


@pytest.mark.parametrize(
    ("network", "step"),
    [
        transformer(),
        mlp(lambda network, x: network(x)),
        mlp(frozen),
        mlp(autocast),
        mlp(lambda network, x: network[4](checkpoint(network[1:4], network[0](x), use_reentrant=False))),
        mlp(lambda network, x: network[4](checkpoint(network[1:4], network[0](x), use_reentrant=True))),
        # Nothing that goes into the region needs a gradient, so it learns nothing.
        mlp(lambda network, x: network[4](checkpoint(network[:4], x.sign(), use_reentrant=True))),
        mlp(lambda network, x: Product.apply(network[:4](x), network[4].weight)),
    ],
    ids=["transformer", "plain", "frozen", "autocast", "checkpoint", "reentrant", "nothing", "function"],
)
# A reentrant checkpoint warns where its input is the batch.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_products_are_those_of_a_real_backward(network, step, monkeypatch):
    """Compare with torch's own counter, which watches a real forward and backward."""
    monkeypatch.setattr(work, "flops_of", products_only)
    found = count(step, network)
    with FlopCounterMode(display=False) as forward:
        loss = step().sum()
    with FlopCounterMode(display=False) as backward, set_checkpoint_early_stop(False):
        loss.backward()
    assert found == (forward.get_total_flops(), backward.get_total_flops())


def test_operations_of_unknown_flop_are_named():
    own = torch.library.custom_op("aimc_pl_test::cubed", lambda x: x**3, mutates_args=(), schema="(Tensor x) -> Tensor")
    x = torch.randn(4, 4)

    def step():
        with torch.profiler.record_function("no work"):
            return torch.linalg.inv(x).sum() + torch.fft.rfft(x).real.sum() + own(x).sum()

    message = "FLOP for each element of these operations, which may be too little: _fft_r2c, cubed, linalg_inv_ex"
    with pytest.warns(UserWarning, match=message):
        count(step)


def test_lazy_layers_are_refused():
    network = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(UsageError, match=r"cannot count lazy layers \(0.weight, 0.bias\): give them their sizes"):
        count(lambda: network(torch.ones(2, 2)).sum(), network)


def test_sparse_tensors_are_refused():
    matrix = torch.eye(4).to_sparse()
    with pytest.raises(UsageError, match="the cost model does not know what operations on sparse tensors take"):
        count(lambda: torch.sparse.mm(matrix, torch.ones(4, 4)).sum())


@pytest.mark.slow
def test_compiled_functions_are_counted_as_if_they_were_not():
    """Check that torch runs no compiled code while operations are watched."""
    runs = []

    def backend(graph, inputs):
        return lambda *arguments: runs.append(1) or graph.forward(*arguments)

    weight, x = parameter(4, 5), torch.ones(3, 4)
    function = torch.compile(lambda x: (x @ weight).relu(), backend=backend)
    function(x)
    assert count(lambda: function(x)) == (2 * 3 * 4 * 5 + 15, 2 * 3 * 4 * 5 + 15)
    assert runs == [1]
