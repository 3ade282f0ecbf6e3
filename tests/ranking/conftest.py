"""Both families, and a decoder with learned positions."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["llama", "t5", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
