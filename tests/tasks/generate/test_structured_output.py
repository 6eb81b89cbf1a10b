"""JSON schemas on the real model, sampled at temperature 1: every answer is finished, parses and validates."""

import json

import jsonschema
import pytest
from json_schemas import SCHEMAS

from shuteye import LLM
from shuteye.tasks.generate.requests import SamplingParams, StructuredOutputsParams

pytestmark = pytest.mark.model
ENOUGH = 700  # tokens; no schema here allows nearly as many


@pytest.fixture(scope="module")
def llm(smollm2_options):
    with LLM(**smollm2_options, enable_sleep_mode=True, max_num_seqs=16) as llm:
        yield llm


def check(llm, schemas, *, seed):
    prompts = [f"Give me an example of this JSON schema: {json.dumps(schema)}\nExample:" for schema in schemas]
    params = [
        SamplingParams(
            temperature=1.0, seed=seed, max_tokens=ENOUGH, structured_outputs=StructuredOutputsParams(json=schema)
        )
        for schema in schemas
    ]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
    assert not [problem for problem in map(problem_of, schemas, outputs) if problem]


def problem_of(schema, completion):
    """What is wrong with an answer, if anything is."""
    if completion.finish_reason != "stop":
        return schema, completion.finish_reason, completion.text
    try:
        jsonschema.validate(json.loads(completion.text), schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError) as error:
        return schema, completion.text, str(error)
    return None


def test_there_are_more_than_a_hundred_and_they_are_schemas():
    assert len({json.dumps(schema) for schema in SCHEMAS}) > 100
    for schema in SCHEMAS:
        jsonschema.Draft202012Validator.check_schema(schema)


def test_a_few_schemas_hold_across_a_sleep(llm):
    """The same as below, on a subset that is quick; and a compiled grammar that the sleep has dropped is made anew."""
    subset = SCHEMAS[3::13]
    check(llm, subset, seed=1)
    llm.sleep()
    llm.wake_up()
    check(llm, subset[:2], seed=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_every_schema_holds(llm, seed):
    """A keyword that is understood otherwise than jsonschema understands it; an answer that never ends."""
    check(llm, SCHEMAS, seed=seed)
