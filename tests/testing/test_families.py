"""Every family that comes with nsp passes the conformance suite."""

import pytest

from nsp.family.registry import BUILT_IN, family
from nsp.testing import CHECKS, Check, UnderTest


@pytest.fixture(scope="module", params=[*BUILT_IN])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UnderTest:
    return UnderTest(family(request.param), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_family_keeps_it(check: Check, made: UnderTest) -> None:
    check(made)
