"""The OpenAPI document is what is served: every route, fuzzed, answers as it says it does."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS
from schemathesis.config import SchemathesisConfig

from tests.support.admin import ADMIN

EXAMPLES = 6


@pytest.fixture(scope="module")
def document(admin):
    return admin.get("/openapi.json").json


def test_the_document_is_of_version_3_1_and_names_every_scope(document):
    assert document["openapi"] == "3.1.0"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert ("security" in operation) == ("x-scope" in operation), (path, method)
            assert "429" in operation["responses"]
            assert method == "get" or "security" in operation or path.endswith("/explain")


@pytest.mark.parametrize("token", [None, ADMIN])
def test_no_request_gets_what_the_document_does_not_know(admin, document, token):
    schema = schemathesis.openapi.from_dict(document, config=SchemathesisConfig())
    base = f"http://127.0.0.1:{admin.port}"
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    statuses: dict[int, int] = {}
    checks = [CHECKS.get_one(name) for name in WANTED]
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @schemathesis_given(operation)
        def probe(case) -> None:
            response = case.call(base_url=base, headers=headers)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            case.validate_response(response, checks=checks, headers=headers)

        probe()
    assert statuses[200] > 0
    assert not [status for status in statuses if status >= 500 and status != 503]


WANTED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


def schemathesis_given(operation):
    """Return the decorator that gives a test the cases of *operation*."""
    from hypothesis import given

    return given(case=operation.as_strategy())
