"""The layers of the networks by their definitions, in plain arithmetic, for tests that compare a block with them."""

import torch

NEAR_EPS = 1e-3  # a standard deviation: its square is near a norm's eps, so that a wrong eps shows


def attention(query, key, value, heads, causal=False):
    """softmax(q k^T / sqrt(d)) v, one head at a time."""
    outputs = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value))):
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, -1)


def self_attention(layer, x, heads, causal=False):
    """`SelfAttention`, whose one matrix holds those of queries, keys and values, in that order."""
    biases = (0, 0, 0) if layer.qkv.bias is None else layer.qkv.bias.chunk(3)
    query, key, value = (x @ weight.T + bias for weight, bias in zip(layer.qkv.weight.chunk(3), biases))
    return attention(query, key, value, heads, causal) @ layer.out.weight.T + layer.out.bias


def cross_attention(layer, x, context, heads):
    """`CrossAttention`: queries from x, keys and values from the context."""
    query, key, value = x @ layer.query.weight.T, context @ layer.key.weight.T, context @ layer.value.weight.T
    return attention(query, key, value, heads) @ layer.out.weight.T + layer.out.bias


def group_norm(norm, x, groups, eps):
    """x (B, C, H, W) minus its mean, over its standard deviation, of each group of channels."""
    grouped = x.reshape(len(x), groups, -1)
    deviation = (grouped.var(-1, correction=0, keepdim=True) + eps).sqrt()
    normed = ((grouped - grouped.mean(-1, keepdim=True)) / deviation).reshape(x.shape)
    return normed * norm.weight[:, None, None] + norm.bias[:, None, None]


def check_group_norms(network, groups, eps):
    """Compares every `GroupNorm` of the network with the definition, on an input near eps. Returns how many it has."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.GroupNorm)]
    for norm in norms:
        x = NEAR_EPS * torch.randn(2, norm.num_channels, 2, 3)
        torch.testing.assert_close(norm(x), group_norm(norm, x, groups, eps), rtol=1e-4, atol=1e-5)
    return len(norms)


def layer_norm(norm, x, eps=1e-5):
    """x (B, N, width) minus its mean, over its standard deviation, of each token."""
    deviation = (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return (x - x.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias


def silu(x):
    return x / (1 + (-x).exp())


def gelu(x):
    """x times the distribution function of the normal distribution."""
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def randomize(module):
    """Random weights, in norms too, so that each of them counts. Returns the module."""
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return module.requires_grad_(False)
