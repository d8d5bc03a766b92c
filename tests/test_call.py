"""What a call is: the truth table, written from what the facts mean."""

import itertools

from sdtp_kernels.models.call import Call, classify_call

FACTS = (
    "is_first", "is_enabled", "is_long", "is_last", "is_named_prompt",
    "may_continue", "has_deferred", "has_left_out", "is_pruned",
)  # fmt: skip

# One letter a fact, in their order: y yes, n no, . either.
IMPOSSIBLE = {
    "y.....y..": "an empty cache has deferred nothing",
    "y.......y": "an empty cache holds no pruned prompt",
    "......ny.": "what is left out of later layers was deferred",
    "......y.n": "only a prompt that is pruned defers tokens",
    "...nn....": "more is to come only where the caller said how long the prompt is",
}
RULES = {
    # The first call of a request.
    "yn.......": (Call.DENSE, "the request prunes nothing"),
    "yyyy.....": (Call.PROMPT, "a long prompt, whole"),
    "yyny.y...": (Call.PROMPT, "a short prompt that later turns may make long: its tokens are deferred"),
    "yyny.n...": (Call.DENSE, "a short prompt that nothing can make long"),
    "yy.n.....": (Call.CHUNK, "a part of a prompt, of any length: more is to come"),
    # Tokens are deferred, and the later layers do not have them: this call must bring them, whatever it asks for.
    "n..y...y.": (Call.LATER_TURN, "the last of the prompt"),
    "n..n...y.": (Call.CHUNK, "a part of it, more is to come"),
    # Tokens are deferred, and all layers have them.
    "ny.yy.yn.": (Call.LATER_TURN, "a later turn, or its last chunk"),
    "ny.ny.yn.": (Call.CHUNK, "a part of a later turn"),
    "ny..n.yn.": (Call.APPEND, "nobody calls it a prompt: a decode step, or tokens that are scored"),
    "nn....yn.": (Call.APPEND, "a turn that prunes nothing puts off what it would finish"),
    # Nothing is deferred.
    "n.....n.y": (Call.APPEND, "the pruned prompt is complete: what follows is added to it"),
    "n.....n.n": (Call.DENSE, "a request that began without pruning goes on without"),
}


def fits(pattern, values):
    return all(letter == "." or (letter == "y") == value for letter, value in zip(pattern, values, strict=True))


def test_every_combination_of_facts():
    counted = dict.fromkeys(RULES, 0)
    for values in itertools.product([False, True], repeat=len(FACTS)):
        if any(fits(pattern, values) for pattern in IMPOSSIBLE):
            continue
        facts = dict(zip(FACTS, values, strict=True))
        rules = [pattern for pattern in RULES if fits(pattern, values)]
        assert len(rules) == 1, f"not exactly one rule for {facts}: {rules}"
        counted[rules[0]] += 1
        expected, why = RULES[rules[0]]
        assert classify_call(**facts) is expected, f"{facts}: {why}"
    assert all(counted.values()), "a rule that holds for nothing"


def test_what_prunes():
    assert [call for call in Call if call.prunes] == [Call.PROMPT, Call.CHUNK, Call.LATER_TURN]
