"""The specification of attention by its formulas, and as a text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexasl import FlexASLAttention
from flexasl.attention_spec import AttentionSpec

numbers = st.floats(1e-3, 1e3) | st.integers(1, 50)
specs = st.builds(
    AttentionSpec,
    scale=st.none() | numbers | st.just(-0.5),
    sliding_window=st.none() | st.integers(1, 10**6),
    softcap=st.none() | numbers,
    kernel=st.sampled_from(["auto", "flex", "eager"]),
)


@given(spec=specs)
def test_a_specification_is_its_text(spec):
    assert AttentionSpec.from_text(spec.text) == spec and AttentionSpec.from_text(spec.text).text == spec.text
    assert AttentionSpec.from_text(spec.text) is AttentionSpec.from_text(spec.text)
    module = FlexASLAttention.of(spec)
    same = FlexASLAttention(
        scale=module.scale, sliding_window=module.sliding_window, softcap=module.softcap, kernel=module.kernel
    )
    assert module.spec == same.spec == spec


def test_defaults_need_no_text():
    assert AttentionSpec().text == "" and AttentionSpec.from_text("") == AttentionSpec()
    assert AttentionSpec(scale=0.5, kernel="sdpa").text == "scale=0.5 kernel='sdpa'"


def test_a_module_is_its_specification_which_does_not_change():
    module = FlexASLAttention(scale=0.3, sliding_window=9)
    assert repr(module) == "FlexASLAttention(scale=0.3, sliding_window=9, kernel='auto')"
    for name in ("scale", "sliding_window", "softcap", "kernel"):
        with pytest.raises(AttributeError):
            setattr(module, name, None)
    assert module.unwindowed.spec == AttentionSpec(scale=0.3)


@given(spec=specs, by_head=st.booleans(), last=st.integers(1, 6))
def test_logits_are_those_of_the_formula(spec, by_head, last):
    query = torch.randn(2, 1, 1, 4, 8, dtype=torch.float64)
    key = torch.randn(2, 3, 1, 6, 8, dtype=torch.float64)
    seen = torch.rand(2, 1, 4, last) < 0.6
    at = torch.randint(0, 60, (2, 3, 6) if by_head else (2, 6))
    query_at = torch.randint(50, 60, (2, 4))
    want = (query @ key.mT) * (8**-0.5 if spec.scale is None else spec.scale)
    if spec.softcap is not None:
        want = spec.softcap * (want / spec.softcap).tanh()
    key_at = at[..., 6 - last :] if by_head else at[:, None, 6 - last :]
    near = query_at[:, None, :, None] - key_at[:, :, None] < (spec.sliding_window or 100)
    want[..., 6 - last :] = want[..., 6 - last :].masked_fill(~(seen & near)[:, :, None], float("-inf"))
    mask = spec.mask(query_at, at[..., 6 - last :], seen)
    products = (query * spec.factor(8)) @ key.mT
    torch.testing.assert_close(spec.logits(products, mask[:, :, None]), want, rtol=1e-9, atol=1e-12)
    assert spec.needs_positions() == (spec.sliding_window is not None)
    assert spec.without_positions().mask(query_at, at, None) is None


@given(spec=specs)
def test_derivatives_are_those_of_logits(spec):
    products = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(spec.logits(products).sum(), products)
    made = spec.derivative(products.detach())
    torch.testing.assert_close(torch.ones(3, 5, dtype=torch.float64) if made is None else made, want)
