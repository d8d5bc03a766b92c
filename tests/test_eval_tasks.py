"""What the evaluation asks: the texts, their split, and samples whose facts are where they should be."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from sdtp_eval import tasks, texts
from sdtp_eval.checkpoints import load_checkpoint


@pytest.fixture(scope="module")
def tokenizer(byte_checkpoint: Path):
    return load_checkpoint(byte_checkpoint)[1]


@pytest.fixture(scope="module")
def pool(tokenizer) -> tasks.TextPool:
    return tasks.TextPool(tokenizer, [], "held-out")


def test_split_goes_by_file_name_alone() -> None:
    names = [name for name, _ in texts.iter_documents()]
    held_out = [name for name in names if texts.is_held_out(name)]
    assert 0.1 < len(held_out) / len(names) < 0.3
    assert texts.is_held_out("a/b/types.txt") == texts.is_held_out("types.txt") == texts.is_held_out("c/types.txt")
    # Pinned: another rule would turn files that pruners were trained on into held-out ones.
    assert {name.split("/")[1] for name in held_out} >= {"await", "calls", "dict", "string-methods"}
    assert not {name.split("/")[1] for name in held_out} & {"types", "lambda", "compound", "specialnames"}


def test_documents_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("beta")
    (tmp_path / "sub" / "a.html").write_text("<head><title>x</title></head><p>al<b>pha</b></p><script>no</script>")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\x00")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    source = tmp_path.name
    assert list(texts.iter_documents([tmp_path])) == [(f"{source}/b.txt", "beta"), (f"{source}/sub/a.html", "alpha")]
    assert list(texts.iter_documents([tmp_path / "b.txt"])) == [("b.txt/b.txt", "beta")]
    with pytest.raises(ValueError, match="cannot be read"):
        list(texts.iter_documents([tmp_path / "missing"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text files"):
        list(texts.iter_documents([tmp_path / "empty"]))


def test_pool_without_held_out_documents_says_so(tokenizer, tmp_path: Path) -> None:
    names = (tmp_path / f"{i}.txt" for i in range(100))
    path = next(name for name in names if not texts.is_held_out(name.name))
    path.write_text("text")
    with pytest.raises(ValueError, match="--split all"):
        tasks.TextPool(tokenizer, [path], "held-out")


def test_windows_do_not_overlap_and_sources_take_turns(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a" * 1000)
    (tmp_path / "two.txt").write_text("b" * 250)
    pool = tasks.TextPool(tokenizer, [tmp_path / "one.txt", tmp_path / "two.txt"], "all")
    windows = pool.windows(100, 6, random.Random(0))
    assert [source for source, _, _ in windows] == ["one.txt", "two.txt", "one.txt", "two.txt", "one.txt", "one.txt"]
    assert len({(source, offset) for source, offset, _ in windows}) == 6
    assert all(len(ids) == 100 and offset % 100 == 0 for _, offset, ids in windows)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_samples_are_the_same_every_time_and_as_long_as_asked(pool: tasks.TextPool, task: str) -> None:
    samples = tasks.make_samples(task, pool, 1500, 12, continuation=100)
    again = tasks.make_samples(task, pool, 1500, 12, continuation=100)
    assert [sample.id for sample in samples] == [sample.id for sample in again]
    assert len({sample.id for sample in samples}) == len(samples) == 12
    assert samples[0].id != tasks.make_samples(task, pool, 1500, 12, continuation=100, seed=1)[0].id
    for sample in samples:
        assert sample.prompt_length(tasks.INSIDE) == 1500
        assert sample.prompt_length(tasks.AFTER) == len(sample.context)
        assert len(sample.ids) == 1500 + len(sample.answer) - 1


def test_the_answer_is_in_the_text_once_and_at_its_depth(pool: tasks.TextPool, tokenizer) -> None:
    samples = tasks.make_samples("passkey", pool, 2000, 60)
    assert len({sample.kind for sample in samples}) == len(tasks.WORDINGS) >= 5
    depths = {sample.facts["depth"] for sample in samples}
    assert len(depths) == tasks.DEPTHS
    for sample in samples:
        context, answer = tokenizer.decode(sample.context), tokenizer.decode(sample.answer).strip()
        assert context.count(answer) == 1
        assert abs(context.index(answer) / len(context) - sample.facts["depth"]) < 0.12
        assert answer not in tokenizer.decode(sample.question)


def test_lookups_are_twenty_facts_each_answered_by_the_text(pool: tasks.TextPool, tokenizer) -> None:
    kinds = [fact.kind for fact in tasks.LOOKUPS]
    assert len(tasks.LOOKUPS) == 20
    assert sum(kind in ("number", "year") for kind in kinds) == 10
    samples = tasks.make_samples("lookup", pool, 2000, 60)
    assert {sample.facts["wording"] for sample in samples} == set(range(20))
    assert {sample.kind for sample in samples} == set(tasks.VALUES)
    for sample in samples:
        context, question = tokenizer.decode(sample.context), tokenizer.decode(sample.question)
        answer = tokenizer.decode(sample.answer)
        assert answer.startswith(" ")
        before, _, after = tasks.LOOKUPS[sample.facts["wording"]].fact.partition("{value}")
        (name,) = {name for name in tasks.NAMES if re.search(rf"\b{name}\b|\b{name}_", question)}
        assert context.count(before.format(x=name) + answer.strip() + after.format(x=name)) == 1
        assert answer.strip() not in question
        assert "{" not in question


COMMON = set(
    re.findall(r"\w+", "a and did does for from in is of on or the to was what which who with it s that how x v value")
)


def test_training_has_no_wording_of_the_lookups() -> None:
    from sdtp_train import lookup

    def runs_of_three(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z]+", text.lower())
        return set(zip(words, words[1:], words[2:], strict=False))

    trained = runs_of_three(Path(lookup.__file__).read_text(encoding="utf-8"))
    for fact in tasks.LOOKUPS:
        for text in fact[:3]:
            shared = {words for words in runs_of_three(text) & trained if not set(words) <= COMMON}
            assert not shared, (text, shared)


def test_competing_keys_and_several_needles(pool: tasks.TextPool, tokenizer) -> None:
    for sample in tasks.make_samples("multikey", pool, 2000, 12):
        wording = tasks.WORDINGS[sample.facts["wording"]][0]
        pattern = re.escape(wording).replace(r"\{x\}", r"(\w+)").replace(r"\{value\}", r"(\d{5})")
        facts = re.findall(pattern, tokenizer.decode(sample.context))
        assert len(facts) == tasks.NUM_KEYS
        values = dict(pair if pair[1].isdigit() else pair[::-1] for pair in facts)
        question = tokenizer.decode(sample.question)
        (asked,) = [name for name in values if re.search(rf"\b{name}\b", question)]
        assert values[asked] == tokenizer.decode(sample.answer).strip()
    for sample in tasks.make_samples("multivalue", pool, 2000, 12):
        values = re.findall(r"\d{5}", tokenizer.decode(sample.answer))
        context = tokenizer.decode(sample.context)
        assert len(values) == tasks.NUM_VALUES
        assert sorted(values, key=context.index) == values


def test_recall_asks_for_what_stands_there(pool: tasks.TextPool, tokenizer) -> None:
    for sample in tasks.make_samples("recall", pool, 2000, 12):
        context, question = tokenizer.decode(sample.context), tokenizer.decode(sample.question)
        answer = tokenizer.decode(sample.answer)
        if sample.kind == "code line":
            head = question[question.index("def ") :]
            assert head + answer in context
        else:
            assert question[question.index("| ") :] + answer + " |" in context
            assert answer.strip().isdigit()


@pytest.mark.parametrize(
    ("task", "tokens", "message"),
    [("nul", 100, "no task 'nul'; known: nll"), ("multikey", 200, "ask for more"), ("nll", 10**6, "no text of")],
)
def test_refusals(pool: tasks.TextPool, task: str, tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.make_samples(task, pool, tokens, 2)
