"""set_members: what is written, how it is spaced, and that no other byte changes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int4_lora.integration.annotation.json_members import set_members

VALUES = {"yes": True, "names": ["k", "v"]}


def edited(text, values=VALUES, also_in="inner"):
    return set_members(text, values, also_in=also_in)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"a": 1}', '{"a": 1,"yes": true,"names": ["k", "v"]}'),
        ('{"a": 1, "b": {}}\n', '{"a": 1, "b": {}, "yes": true, "names": ["k", "v"]}\n'),
        ('{"a":1,"b":[]}', '{"a":1,"b":[],"yes":true,"names":["k","v"]}'),
        (
            '{\n  "a": 1,\n  "b": 2\n}',
            '{\n  "a": 1,\n  "b": 2,\n  "yes": true,\n  "names": [\n    "k",\n    "v"\n  ]\n}',
        ),
        (
            '{\n\t"a": 1\n}\n',
            '{\n\t"a": 1,\n\t"yes": true,\n\t"names": [\n\t\t"k",\n\t\t"v"\n\t]\n}\n',
        ),
        (
            '{\r\n "a" :1,\r\n "b" :2\r\n}\r\n',
            '{\r\n "a" :1,\r\n "b" :2,\r\n "yes" :true,\r\n "names" :['
            '\r\n  "k",\r\n  "v"\r\n ]\r\n}\r\n',
        ),
        ('{\n"a": 1\n}', '{\n"a": 1,\n"yes": true,\n"names": [\n"k",\n"v"\n]\n}'),
        (
            '{ "a": 1\n, "b": 2\n}',
            '{ "a": 1\n, "b": 2\n, "yes": true\n, "names": [\n"k",\n"v"\n]\n}',
        ),
        ("{}", '{"yes": true, "names": ["k", "v"]}'),
        (" \n{ }\n", ' \n{"yes": true, "names": ["k", "v"] }\n'),
    ],
)
def test_missing_members_come_last_and_are_spaced_as_the_last_is(text, right):
    assert edited(text) == right
    assert edited(right) == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (
            '{"names": [], "yes" : null , "a": "\\u00e9é\\n"}',
            '{"names": ["k", "v"], "yes" : true , "a": "\\u00e9é\\n"}',
        ),
        ('{"names":["k"],"yes":false}', '{"names":["k","v"],"yes":true}'),
        (
            '{\n    "yes": 1,\n    "names": "all",\n    "b": [1,2]\n}',
            '{\n    "yes": true,\n    "names": [\n        "k",\n        "v"\n    ],'
            '\n    "b": [1,2]\n}',
        ),
        (  # what has the value keeps its spelling
            '{"yes":  true, "names": [ "k",\n"\\u0076"]}',
            '{"yes":  true, "names": [ "k",\n"\\u0076"]}',
        ),
        (  # the last of two counts: both are set
            '{"yes": false, "names": ["v"], "yes": 3, "names": ["k", "v"]}',
            '{"yes": true, "names": ["k", "v"], "yes": true, "names": ["k", "v"]}',
        ),
        ('{"\\u0079es": 0, "names": ["k", "v"]}', '{"\\u0079es": true, "names": ["k", "v"]}'),
    ],
)
def test_members_that_are_there_are_replaced_where_they_stand(text, right):
    assert edited(text) == right
    assert edited(right) == right


def test_within_another_member_they_are_replaced_and_never_added():
    text = '{\n  "inner": {\n    "names": [],\n    "a": {"yes": 1}\n  },\n  "other": {"yes": 1}\n}'
    assert edited(text) == (
        '{\n  "inner": {\n    "names": [\n      "k",\n      "v"\n    ],\n    "a": {"yes": 1}\n  },'
        '\n  "other": {"yes": 1},\n  "yes": true,\n  "names": [\n    "k",\n    "v"\n  ]\n}'
    )
    assert edited('{"inner": [1], "yes": true, "names": ["k", "v"]}').startswith('{"inner": [1],')


def test_a_name_within_a_string_or_deeper_is_not_the_member():
    text = r'{"a": "\"yes\": 0, {[", "b": [{"yes": 0}], "c": {"names": 1}}'
    assert edited(text).startswith(text[:-1] + ", ")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
DOCUMENTS = st.dictionaries(
    st.text() | st.sampled_from(["yes", "names", "inner"]),
    st.recursive(
        SCALARS,
        lambda each: st.lists(each) | st.dictionaries(st.text() | st.just("yes"), each),
        max_leaves=8,
    ),
    max_size=6,
)


@given(
    document=DOCUMENTS,
    indent=st.sampled_from([None, 0, 1, 2, 4, "\t"]),
    compact=st.booleans(),
    ascii_only=st.booleans(),
    names=st.lists(st.text()),
)
def test_any_object_keeps_what_it_held(document, indent, compact, ascii_only, names):
    separators = (",", ":") if compact else None
    text = json.dumps(document, indent=indent, separators=separators, ensure_ascii=ascii_only)
    values = {"yes": True, "names": names}
    once = edited(text, values, also_in="nowhere")
    assert json.dumps(json.loads(once)) == json.dumps({**document, **values})
    assert edited(once, values, also_in="nowhere") == once
    if not {*values} & {*document}:
        assert once.startswith(text.rstrip("}\n"))
        assert once.endswith("\n}" if text.endswith("\n}") else "}")


@pytest.mark.parametrize("text", ["[]", "3", '"yes"', "", "{", '{"a": 1,}', "\ufeff{}"])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(ValueError, match=r"must be an object|Expecting|BOM|trailing"):
        edited(text)
