from __future__ import annotations

import pytest

from tests.engines.tensorrt.stand_in import StandIn, make_stand_in


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return make_stand_in(tmp_path_factory.mktemp("tensorrt"))
