"""These tests check the transformer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aimc_pl.models import GPT


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = GPT(vocab_size=11, num_layers=3, width=8, num_heads=2, context=7).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


def test_logits_of_every_token(network):
    for length in (1, 7):
        assert network(torch.randint(11, (4, length))).shape == (4, length, 11)


def test_a_later_token_changes_no_earlier_logits(network):
    tokens = torch.randint(10, (2, 7))
    logits = network(tokens)
    for place in range(7):
        changed = tokens.clone()
        changed[:, place] += 1
        difference = (network(changed) - logits).abs().amax((0, 2))
        assert torch.equal(difference[:place], torch.zeros(place, dtype=torch.float64))
        assert (difference[place:] > 1e-6).all()


def test_blocks_equal_multihead_attention_and_an_mlp(network):
    block = network.blocks[1]
    reference = nn.MultiheadAttention(8, 2, batch_first=True).double()
    reference.load_state_dict(
        {
            "in_proj_weight": block.attention.qkv.weight,
            "in_proj_bias": block.attention.qkv.bias,
            "out_proj.weight": block.attention.out.weight,
            "out_proj.bias": block.attention.out.bias,
        }
    )
    x = torch.randn(4, 7, 8, dtype=torch.float64)
    normed = F.layer_norm(x, (8,), block.attention_norm.weight, block.attention_norm.bias)
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected = x + reference(normed, normed, normed, attn_mask=later, need_weights=True)[0]
    normed = F.layer_norm(expected, (8,), block.mlp_norm.weight, block.mlp_norm.bias)
    hidden = normed @ block.mlp.hidden.weight.T + block.mlp.hidden.bias
    gelu = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    expected = expected + gelu @ block.mlp.out.weight.T + block.mlp.out.bias
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_embedding_blocks_norm_and_head_follow_one_another(network):
    tokens = torch.randint(11, (2, 5))
    x = network.tokens.weight[tokens] + network.positions.weight[:5]
    for block in network.blocks:
        x = block(x)
    mean, variance = x.mean(2, keepdim=True), x.var(2, correction=0, keepdim=True)
    normed = (x - mean) / (variance + 1e-5).sqrt() * network.norm.weight + network.norm.bias
    torch.testing.assert_close(network(tokens), normed @ network.head.weight.T, rtol=1e-12, atol=1e-12)


def test_a_new_network_knows_nothing():
    torch.manual_seed(0)
    logits = GPT(128, num_layers=4, width=64, num_heads=4, context=64)(torch.randint(128, (8, 64)))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(128, (512,)))
    assert loss.item() == pytest.approx(torch.tensor(128.0).log().item(), rel=0.01)


def test_dropout_in_training_only():
    torch.manual_seed(0)
    network, tokens = GPT(11, 2, 8, 2, 7, dropout=0.5), torch.randint(11, (2, 7))
    assert not torch.equal(network(tokens), network(tokens))
    network.eval()
    assert torch.equal(network(tokens), network(tokens))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 9}, "width=9 is no multiple of num_heads=2"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1"),
        ({"context": 0}, "context must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GPT(**{"vocab_size": 11, "num_layers": 1, "width": 8, "num_heads": 2, "context": 7} | arguments)


def test_a_sequence_longer_than_the_context(network):
    with pytest.raises(ValueError, match="8 tokens is longer than context=7"):
        network(torch.zeros(1, 8, dtype=torch.int64))
