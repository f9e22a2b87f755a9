"""Input tensors become requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from taper_trtllm.config import ServingConfig, parse_config
from taper_trtllm.request import RequestError, build_request
from taper_trtllm.tensors import decode_request

PROMPT = {"input_ids": np.array([1, 2, 3], np.int32), "max_tokens": np.array([4], np.int32)}


@pytest.fixture(scope="module")
def config() -> ServingConfig:
    return parse_config({"engine": {"random_model": {}}})


def test_the_salt_comes_with_the_request_or_not_at_all(config: ServingConfig) -> None:
    for salt in (0, 7, 2**63 - 1):
        tensors = {**PROMPT, "cache_salt_id": np.array([salt], np.int64)}
        assert decode_request(tensors, "r", None, config).request.cache_salt_id == salt
    assert decode_request(PROMPT, "r", None, config).request.cache_salt_id is None


@pytest.mark.parametrize("salt", [-1, 2**63, 1.0, "1", True])
def test_a_salt_that_cannot_be_one_is_named(salt: Any) -> None:
    with pytest.raises(RequestError, match=r"^cache_salt_id: "):
        build_request(request_id="r", input_ids=[1], max_tokens=1, cache_salt_id=salt)
