"""Every test that asks for a family runs for all, and one that asks for a case for all of theirs."""

import pytest

from tests.families.description import descriptions
from tests.families.parity import cases_of


def pytest_generate_tests(metafunc):
    families = descriptions()
    if "family_case" in metafunc.fixturenames:
        params = [
            pytest.param(
                (name, case),
                id=f"{name}-{case}",
                marks=pytest.mark.slow if case in families[name].slow else (),
            )
            for name, case in cases_of(families)
        ]
        metafunc.parametrize("family_case", params, indirect=True, scope="module")
    elif "family" in metafunc.fixturenames:
        file = metafunc.definition.path.stem
        params = [
            pytest.param(family, id=name, marks=pytest.mark.slow if file in family.slow else ())
            for name, family in families.items()
        ]
        metafunc.parametrize("family", params, indirect=True, scope="module")


@pytest.fixture(scope="module")
def family(request):
    """A family's description."""
    return request.param


@pytest.fixture(scope="module")
def family_case(request):
    """A family's description and the name of one of its cases."""
    family, case = request.param
    return descriptions()[family], case
