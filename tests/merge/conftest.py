"""Three models of one shape."""

import pytest

from tests.merge.folders import save


@pytest.fixture
def three(tmp_path):
    return [save(tmp_path / f"model{seed}", seed=seed) for seed in range(3)]
