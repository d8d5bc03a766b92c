"""A model, patched or not, as a model of lm-evaluation-harness: any of its tasks then runs pruned.

Needs the extra ``ruler`` (lm-eval). Nothing else of this package imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import LM

from sdtp_eval.command import progress_bar
from sdtp_eval.reader import greedy, prefilled_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

DEFAULT_NEW_TOKENS = 256  # where a task does not say; lm-eval's own default


class SdtpLM(LM):
    """Answers lm-eval's requests one by one (batch size 1).

    What is scored or asked for is never pruned: a continuation is teacher-forced after the pruned context.

    Parameters
    ----------
    model : transformers model
        Apply or remove :func:`sdtp_kernels.apply_sdtp` as you like between calls of lm-eval.
    tokenizer : transformers tokenizer
    split : function of str to (str, str), optional
        Divides a prompt of ``generate_until`` into a context to prune and a question that follows it, unpruned (patch
        the model with ``later_turns=False``); without it the whole prompt is pruned.
    shorten : function of list of int to list of int, optional
        What the model is given of a context, by token ids; without it all of it.
    max_new_tokens : int, optional
        Upper limit for every task, whatever it asks for.
    progress : bool, default True

    Attributes
    ----------
    computed : dict of str to float
        By prompt of ``generate_until``: how many tokens a layer has computed of what is pruned, in the mean. Counted in
        the layers as they run.

    Examples
    --------
    >>> with apply_sdtp(model, "attention", PruningSchedule.every(30)):  # doctest: +SKIP
    ...     lm_eval.simple_evaluate(model=SdtpLM(model, tokenizer), tasks=["lambada_openai"])
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        split: Callable[[str], tuple[str, str]] | None = None,
        shorten: Callable[[list[int]], list[int]] = list,
        max_new_tokens: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.split, self.shorten = split, shorten
        self.max_new_tokens, self.progress = max_new_tokens, progress
        self.computed: dict[str, float] = {}

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log probability of each continuation after its pruned context, and whether it is the greedy one."""
        results = []
        for request in self._bar(requests, "loglikelihood", disable_tqdm):
            context, continuation = request.args
            ids, count = self._encode_pair(context, continuation)
            ids = [*self.shorten(ids[:-count]), *ids[-count:]]
            output = self.model(self._tensor(ids[:-1]), logits_to_keep=count)
            logits = output.logits[0, -count:].float().log_softmax(-1)
            answer = torch.tensor(ids[-count:], device=logits.device)
            total = logits.gather(1, answer[:, None]).sum().item()
            results.append((total, bool((logits.argmax(-1) == answer).all().item())))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError(
            "loglikelihood_rolling: every token would be scored, and a scored token cannot be pruned. 'sdtp eval run "
            "--tasks nll' scores what follows a pruned context"
        )

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut before the first of the task's stop strings."""
        results = []
        for request in self._bar(requests, "generate_until", disable_tqdm):
            prompt, settings = request.args
            if settings.get("do_sample"):
                raise NotImplementedError(f"{request.task_name}: asks for sampling; answers here are greedy")
            limit = int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS))
            stops = settings.get("until") or []
            text = self.answer(prompt, min(limit, self.max_new_tokens or limit))
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            results.append(text)
        return results

    def answer(self, prompt: str, max_new_tokens: int) -> str:
        """Greedy continuation of a prompt."""
        context, question = self.split(prompt) if self.split else (prompt, "")
        follows = list(self.tokenizer(question, add_special_tokens=False).input_ids) if question else []
        ids = self._encode(context)
        with prefilled_tokens(self.model) as computed:
            new = greedy(self.model, self.shorten(ids), follows, max_new_tokens)
        self.computed[prompt] = sum(computed) / len(computed)
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Ids of both, and how many of the last belong to the continuation."""
        # A space between them goes to the continuation, where the tokenizers of these models have it.
        stripped = context.rstrip(" ")
        context, continuation = stripped, context[len(stripped) :] + continuation
        ids, start = self._encode(context + continuation), self._encode(context)
        if not start:  # nothing to condition on: the end-of-text token stands for it
            return [int(self.tokenizer.eos_token_id), *ids], len(ids)
        return ids, len(ids) - len(start)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, verbose=False).input_ids)

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self.model.device)

    def _bar(self, requests: Sequence[Any], what: str, disable: bool) -> Iterator[Any]:
        with progress_bar(len(requests), what, shown=self.progress and not disable) as bar:
            for request in requests:
                yield request
                bar.advance()
