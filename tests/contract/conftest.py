"""The engine of a case, and a session on the small linear model."""

from collections.abc import Iterator

import pytest
from engine_cases import ENGINES, Models

from edgekit_runtime import Session, load


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def session(engine: str, small_model: Models) -> Iterator[Session]:
    with load(small_model(engine, "linear")) as opened:
        yield opened
