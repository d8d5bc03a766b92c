"""A chat's prompt keeps its instructions, tools and code."""

import json
import re

import pytest
import torch
from transformers import AutoTokenizer

from sdtp_kernels import PruningSchedule, apply_sdtp, chat_inputs

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nA default.<|im_end|>\n{% endif %}"
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3.1 does: tools in the user's first message, whose content is trimmed.
IN_FIRST_MESSAGE = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if tools and m.role == 'user' and loop.index0 < 2 %}Functions: {{ tools | tojson }}\n{% endif %}"
    "{{ m.content | trim }}[end]{% endfor %}"
)
SYSTEM = {"role": "system", "content": "Be brief. Never say why."}
QUESTION = {"role": "user", "content": " Why? \n```python\nwhy = 1\n```\nand\n~~~\nb\n~~~\nAnd then?"}
TOOLS = [{"type": "function", "function": {"name": "why", "description": "Why?", "parameters": {}}}]


@pytest.fixture(scope="module")
def tokenizer(byte_checkpoint):
    return AutoTokenizer.from_pretrained(byte_checkpoint)


def protected(tokenizer, inputs):
    return [tokenizer.decode(inputs["input_ids"][0, first:last]) for first, last in inputs["protect"]]


@pytest.mark.parametrize("template", [CHATML, IN_FIRST_MESSAGE])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_instructions_tools_and_code_are_protected(tokenizer, template, tools):
    tokenizer.chat_template = template
    messages = [SYSTEM, QUESTION, {"role": "assistant", "content": "So."}, QUESTION]
    inputs = chat_inputs(tokenizer, messages, tools=tools)
    text = tokenizer.decode(inputs["input_ids"][0])
    assert text == tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    head, *code = protected(tokenizer, inputs)
    assert text.startswith(head)
    assert text[len(head) :].lstrip().startswith("Why? \n```python")
    assert SYSTEM["content"] in head
    assert (json.dumps("why") in head) == (tools is not None)
    assert code == ["```python\nwhy = 1\n```", "~~~\nb\n~~~"] * 2
    without = chat_inputs(tokenizer, messages, tools=tools, code=False, add_generation_prompt=False)
    assert protected(tokenizer, without) == [head]


def test_a_default_system_prompt_and_code_without_an_end(tokenizer):
    tokenizer.chat_template = CHATML
    inputs = chat_inputs(tokenizer, [{"role": "user", "content": "Go on:\n```\na = 1"}])
    head, code = protected(tokenizer, inputs)
    assert "A default." in head
    assert code.startswith("```\na = 1")
    assert protected(tokenizer, inputs)[-1] == code


def test_what_is_protected_stays(tokenizer, tiny_model):
    tokenizer.chat_template = CHATML
    inputs = chat_inputs(tokenizer, [SYSTEM, {"role": "user", "content": f"{'word ' * 40}\n```\na = 1\n```\nWhy?"}])
    schedule = PruningSchedule(layers=(2,), keep_ratio=0.5, recent=0.1)
    with apply_sdtp(tiny_model, "norm", schedule) as handle, torch.no_grad():
        tiny_model.generate(**inputs, max_new_tokens=2, do_sample=False)
        kept = set(handle.report().kept[0].tolist())
    assert len(kept) < inputs["input_ids"].shape[1]
    for first, last in inputs["protect"]:
        assert kept.issuperset(range(first, last))


def test_what_cannot_be_known_is_refused(tokenizer):
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=r"role 'user', got \['system'\]"):
        chat_inputs(tokenizer, [SYSTEM])
    with pytest.raises(ValueError, match=r"messages\[0\]: expected a text as content, got list"):
        chat_inputs(tokenizer, [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}])
    with pytest.raises(ValueError, match="object does not tell where"):
        chat_inputs(object(), [QUESTION])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="does more with a message than to write it"):
        chat_inputs(tokenizer, [SYSTEM, QUESTION])
    tokenizer.chat_template = "{{ messages[0].content | length }}{{ messages[0].content }}"
    with pytest.raises(ValueError, match="does more with a message than to write it"):
        chat_inputs(tokenizer, [QUESTION])


def test_another_fence_is_code(tokenizer):
    tokenizer.chat_template = CHATML
    code = "```\na = '''\n~~~\n'''\n```"
    _, found = protected(tokenizer, chat_inputs(tokenizer, [{"role": "user", "content": f"{code}\nGo on."}]))
    assert found == code


class Words:
    """A fast tokenizer of words, with the space before them, which adds a token of its own."""

    is_fast = True

    def apply_chat_template(self, messages, **_):
        return "Be brief." + "".join(message["content"] for message in messages)

    def __call__(self, text, add_special_tokens=True, **_):
        spans = [match.span() for match in re.finditer(r" ?\S+", text)]
        spans = [(0, 0)] * add_special_tokens + spans
        return {"input_ids": torch.arange(len(spans))[None], "offset_mapping": torch.tensor([spans])}


def test_tokens_that_a_span_cuts():
    inputs = chat_inputs(Words(), [{"role": "user", "content": "Why do you say so?"}])
    assert inputs["protect"] == [(0, 2)]  # of "Be", " brief.Why"


def test_special_tokens_are_the_template_s():
    assert chat_inputs(Words(), [{"role": "user", "content": " Why?"}])["input_ids"].shape == (1, 3)


def test_a_template_that_rewrites_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | replace('Why', 'Say why') }}{% endfor %}"
    with pytest.raises(ValueError, match="does more with a message than to write it"):
        chat_inputs(tokenizer, [SYSTEM, {"role": "user", "content": "Why?"}])
