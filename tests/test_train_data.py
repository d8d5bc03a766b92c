"""What pruners learn from: whose text it is, on which side of the split, and where question and answer stand."""

from __future__ import annotations

import json
import random

import pytest
from helpers.models import TEMPLATE, make_tokenizer
from helpers.training import make_texts

from sdtp_eval import texts
from sdtp_train import data, lookup


def build(items, num_samples=40, context=(200,), continuation=32, share=0.4, seed=0, template=TEMPLATE):
    return data.build_samples(
        make_tokenizer(template), [str(i) for i in items], num_samples, context, continuation, share, seed
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("data") / "texts")


def test_the_seed_decides(folder):
    assert build([folder]) == build([folder])
    assert build([folder]) != build([folder], seed=1)
    ids = [sample.id for sample in build([folder])]
    assert len(set(ids)) == len(ids) == 40


def test_no_document_is_on_two_sides(folder):
    samples = build([folder, data.PYTHON], 80)
    training = {s.source for s in samples if not s.is_validation}
    validation = {s.source for s in samples if s.is_validation}
    assert training
    assert validation
    assert not training & validation
    assert not [source for source in training | validation if texts.is_held_out(source)]
    # Every token says which file it comes from, so no text may stem from another file than `source` says.
    for sample in samples:
        if sample.kind == "text" and sample.source.startswith("texts/"):
            number = sample.source.removesuffix(".txt").rsplit("-", 1)[1]
            line = make_tokenizer().decode(sample.context + sample.continuation).split("\n")[1]
            assert line.startswith(f"{int(number):02d}."), (sample.source, line)


def test_the_library_does_not_hold_the_language_reference():
    names = [document.name for document in data.read_source(data.PYTHON)]
    assert any(name.startswith("python-library/") for name in names)
    assert any(name.startswith(texts.REFERENCE) for name in names)
    assert not [name for name in names if "pydoc_data" in name or "topics.py" in name]


def test_running_text_goes_on_in_the_continuation(folder):
    tokenizer = make_tokenizer()
    whole = dict(texts.iter_documents([folder]))
    samples = build([folder], share=0.0)
    assert {s.kind for s in samples} == {"text"}
    for sample in samples:
        assert (len(sample.context), len(sample.continuation)) == (200, 32)
        assert tokenizer.decode(sample.context + sample.continuation) in whole[sample.source]


def test_instruction_data_learns_from_the_response_alone(tmp_path):
    path = tmp_path / "dolly.jsonl"
    records = [
        {"instruction": f"How many {w}s?", "context": f"There are seven {w}s. " * 4, "response": f"Seven {w}s."}
        for w in lookup._WORDS
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    tokenizer = make_tokenizer()
    samples = build([path], 20, share=0.0)
    assert len(samples) > 10
    for sample in samples:
        assert sample.kind == "instruction"
        prompt, answer = tokenizer.decode(sample.context), tokenizer.decode(sample.continuation)
        word = answer.removeprefix("Seven ").removesuffix("s.")
        # As the template has it, the question after the passage, and nothing of the response.
        passage = " ".join([f"There are seven {word}s."] * 4)
        assert prompt == f"[user] {passage} \n\nHow many {word}s?\n[assistant]"


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_lookup_samples_can_be_answered_from_the_text(folder, template):
    tokenizer = make_tokenizer(template)
    samples = [s for s in build([folder], 300, (1400,), 200, share=1.0, template=template) if s.kind != "text"]
    kinds = {s.kind for s in samples}
    assert kinds == {
        f"lookup-{name}"
        for name in (
            "fact",
            "competing",
            "pairs",
            "people",
            "assignment",
            "table",
            "several",
            "recall",
            "gap",
            "stranger",
        )
    }
    for sample in samples:
        prompt, answer = tokenizer.decode(sample.context), tokenizer.decode(sample.continuation).strip()
        for part in answer.split(", ") if sample.kind == "lookup-several" else [answer]:
            # A full sentence ends with what was asked for, and so does the answer alone.
            value = part if part in prompt else part.split(" ")[-1]
            text, question = prompt.rsplit("\n\n", 1)
            assert value in text, (sample.kind, prompt, answer)
            assert value not in question or sample.kind == "lookup-recall", (sample.kind, question, value)
        # Nothing that evaluation asks with.
        assert not [words for words in ("pass key", "magic number", "courier") if words in prompt]
        assert abs(len(sample.context) - 1400) < 140, (sample.kind, len(sample.context))


def test_competing_facts_have_one_answer():
    for seed in range(200):
        task = lookup.make_task(random.Random(seed), "", 8)
        if task.name in ("fact", "competing", "people"):
            subject_lines = [fact for fact in task.facts if task.answer in fact]
            assert subject_lines, (task.facts, task.answer)
        assert task.question.strip()
        assert task.answer.strip()
        assert "{" not in task.question + task.lead, task


def test_errors_say_what_to_do(tmp_path, folder):
    only = tmp_path / "only.txt"
    only.write_text("word " * 2000)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"instruction": "no response"}\n')
    for items, settings, message in (
        ([only], {}, "cannot be split"),
        ([bad], {}, "bad.jsonl:2: expected a JSON object"),
        ([tmp_path / "missing"], {}, "cannot be read"),
        ([folder], {"context": (100_000,)}, "shorter --context"),
        ([folder], {"context": (8,)}, "--context 8: expected at least 64"),
        ([folder], {"num_samples": 1}, "--samples 1"),
        ([folder], {"share": 1.5}, "--lookup-share 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            build(items, **{"share": 0.0, **settings})
