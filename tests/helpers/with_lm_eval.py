"""Runs in lm-eval's own environment: evaluates small local tasks with one of its models, and prints every response.

usage: with_lm_eval.py MODEL MODEL_ARGS_AS_JSON DIRECTORY        MODEL is hf or local-completions
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval
from lm_eval.tasks import TaskManager

QUESTIONS = [
    ("The capital of France is", [" Paris", " a small village in the north of Italy", " London", " bread"], 0),
    ("Water freezes at zero degrees", [" Celsius", " of freedom", " Kelvin", " or more"], 0),
    ("The opposite of hot is", [" warm", " cold", " summer", " spicy"], 1),
    ("Two plus two equals", [" five", " twenty-two", " four", " a"], 2),
    ("The sun rises in the", [" west", " east", " evening", " garden of my grandmother"], 1),
    ("A baby cat is called a", [" puppy", " calf", " kitten", " cat"], 2),
    ("Die Hauptstadt von Österreich ist", [" Wien", " Zürich", " Graz 🏔", " Bern"], 0),
    ("def add(a, b):\n    return", [" a + b", " a - b", " None\n", " add"], 0),
]
TEXTS = [
    "The river runs from the mountains to the sea. On its way it passes three towns and a mill.",
    "In the beginning there was nothing but a long list of things to do; in the end, too. Naïve: 12 × 12 = 144.",
    "Sleep is a state of reduced mental and physical activity in which consciousness is altered. " * 12,
]
CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: local_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {texts}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
CONTINUED = """
task: local_continued
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = {"local_choices": CHOICES, "local_texts": ROLLING, "local_continued": CONTINUED}


def write_tasks(directory):
    questions, texts = directory / "questions.jsonl", directory / "texts.jsonl"
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, task in TASKS.items():
        (directory / f"{name}.yaml").write_text(task.format(questions=questions, texts=texts))


def evaluated(model, model_args, directory):
    """Per task, the responses of its samples in order, and its metrics."""
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model, model_args=model_args, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    samples = {
        name: [one["resps"] for one in sorted(found, key=lambda one: one["doc_id"])]
        for name, found in results["samples"].items()
    }
    return {"samples": samples, "results": results["results"]}


if __name__ == "__main__":
    name, arguments, where = sys.argv[1:]
    write_tasks(Path(where))
    print("\n" + json.dumps(evaluated(name, json.loads(arguments), Path(where)), default=str))
