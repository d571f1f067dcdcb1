"""The tests' own check of JSON schemas, compared with jsonschema's, which the quick tests do without."""

import pytest
from schemas import SCHEMAS, keeps_to

jsonschema = pytest.importorskip("jsonschema")


def test_the_tests_own_check_is_jsonschemas():
    values = [None, True, 0, 1, 3, 7, -4, 2.5, "", "yes", "ab-1!", "abcdef", [], [1, 2], [1, "x"], {}, {"a": [1, "x"]}]
    person = {"name": "x", "age": 3, "tags": ["a"], "home": None}
    values += [person, person | {"home": {"x": 1.5}}, person | {"home": {"x": 10}}, person | {"more": 1}, {"name": "x"}]
    for schema in SCHEMAS:
        valid = jsonschema.Draft202012Validator(schema).is_valid
        assert [keeps_to(value, schema) for value in values] == [valid(value) for value in values], schema
