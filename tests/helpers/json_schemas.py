"""More than a hundred JSON schemas of many kinds, each of which has only answers of bounded length.

Bounds make "allowed to finish" certain: what is cut at a generous limit has been cut wrongly. So there is no format
"time" here, whose fractions of a second may go on for ever (and which jsonschema by itself does not check by its RFC).
"""

import itertools

WORD = {"type": "string", "maxLength": 12}
SMALL = {"type": "integer", "minimum": -50, "maximum": 50}


def obj(required=None, **properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def array(items, least, most):
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


SCALARS = [
    {"type": "boolean"},
    {"type": "null"},
    {"const": 'fixed "text" \\ with /escapes/ and ünïcode'},
    {"const": {"a": [1, 2, {"b": None}]}},
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, 2.5, "three", None, True, [4]]},
    WORD,
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
    {"type": "string", "pattern": "^(foo|bar){1,3}$"},
    {"type": "string", "pattern": "^\\d{3}-\\d{2}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    SMALL,
    {"type": "integer", "minimum": 0, "maximum": 9},
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 13},
    {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 7},
    {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    {"type": ["boolean", "null"]},
    {"anyOf": [SMALL, {"type": "null"}, {"enum": ["a"]}]},
    {"oneOf": [{"const": "x"}, {"type": "boolean"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    {"type": "string", "enum": ["", " ", "\t", "é", "日本", "🙂", "\\u0041"]},
]

OBJECTS = [obj(value=scalar) for scalar in SCALARS] + [
    {"$defs": {"Id": {"type": "integer", "minimum": 1, "maximum": 5}}, "$ref": "#/$defs/Id"},
    obj(),
    obj(a=WORD, b=SMALL, c={"type": "boolean"}),
    obj(["a"], a=SMALL, b=SMALL, c=SMALL),
    obj([], a={"type": "null"}, b={"type": "boolean"}),
    obj(outer=obj(middle=obj(inner=obj(value=SMALL)))),
    obj(**{"key with spaces": SMALL, 'quo"te': SMALL, "ünï": SMALL, "": SMALL}),
    {**obj(kind={"const": "a"}, n=SMALL), "title": "Titled", "description": "Said, not meant", "$comment": "no"},
    {"anyOf": [obj(kind={"const": "cat"}, lives=SMALL), obj(kind={"const": "dog"}, tricks=array(WORD, 0, 2))]},
    {"$defs": {"P": obj(x=SMALL, y=SMALL)}, **obj(begin={"$ref": "#/$defs/P"}, end={"$ref": "#/$defs/P"})},
    {"definitions": {"P": obj(x=SMALL)}, **obj(at={"$ref": "#/definitions/P"})},
    obj(person=obj(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 120}, tags=array(WORD, 0, 3))),
    obj(order=array(obj(sku={"type": "string", "pattern": "^[A-Z]{3}$"}, qty={"enum": [1, 2, 3]}), 1, 3)),
    obj(when={"type": "string", "format": "date"}, who={"type": ["null", "boolean"]}),
    {
        "$defs": {"Leaf": obj(v=SMALL), "Tree": obj(left={"$ref": "#/$defs/Leaf"}, right={"$ref": "#/$defs/Leaf"})},
        "$ref": "#/$defs/Tree",
    },
]

ARRAYS = [array(scalar, 1, 2) for scalar in SCALARS[::2]] + [
    array(SMALL, 0, 0),
    array(SMALL, 3, 3),
    array(array(array({"type": "boolean"}, 1, 2), 1, 2), 1, 2),
    {"type": "array", "prefixItems": [WORD, SMALL, {"type": "null"}], "items": False, "minItems": 3},
    array({"anyOf": [SMALL, WORD, obj(a=SMALL)]}, 2, 3),
    array(obj(["id"], id=SMALL, note=WORD), 1, 2),
]

PAIRS = [
    obj(first=first, second=second)
    for first, second in itertools.islice(itertools.combinations(SCALARS, 2), 0, None, 8)
]

SCHEMAS = [*SCALARS, *OBJECTS, *ARRAYS, *PAIRS]
