"""Choosing a device and a dtype, and attention where a device has no fused kernel."""

import pytest
import torch
import torch.nn.functional as F

from sd.attention import attention
from sd.runtime import devices
from sd.runtime.devices import best_device, best_dtype
from tests.support import definitions


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 3.5, "meta"])
def test_bad_device(device):
    with pytest.raises(ValueError, match="device should be one that torch can use here"):
        best_device(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float16"])
def test_bad_dtype(dtype):
    with pytest.raises(ValueError, match="dtype should be one of"):
        best_dtype(torch.device("cpu"), dtype)


def test_best_dtype(monkeypatch):
    assert best_dtype(torch.device("cuda")) == torch.float16
    assert best_dtype(torch.device("mps")) == torch.float16
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(devices, "_cpu_multiplies_bfloat16", lambda native=native: native)
        assert best_dtype(torch.device("cpu")) == dtype


def test_where_scores_are_stored_some_queries_attend_at_a_time(monkeypatch):
    query, key, value = torch.randn(3, 9, 16), torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    monkeypatch.setattr("sd.runtime.devices.STORING_DEVICES", ("cpu",))
    sizes, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *rest: sizes.append(q.shape[2]) or attend(q, *rest)
    )
    for most, parts in ((1 << 30, [9]), (4 * 3 * 4 * 5 * 4, [4, 4, 1]), (1, [1] * 9)):
        monkeypatch.setattr("sd.runtime.devices.MAX_SCORE_BYTES", most)
        sizes.clear()
        torch.testing.assert_close(attention(query, key, value, 4), definitions.attention(query, key, value, 4))
        assert sizes == parts


def test_where_scores_are_stored_the_causal_mask_is_spelled_out(monkeypatch):
    query, key, value = torch.randn(3, 3, 9, 16).unbind()
    monkeypatch.setattr("sd.runtime.devices.STORING_DEVICES", ("cpu",))
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: attend(q, k, v, attn_mask))
    torch.testing.assert_close(attention(query, key, value, 4, True), definitions.attention(query, key, value, 4, True))
