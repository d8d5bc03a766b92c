"""The handle of a patched model: what it was given, what the present request asks for, what happened last.

It is the one object that a patch consists of. The classes of :mod:`.patch` find it on the module they are mixed into;
once it is closed they compute what the model's own class does.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from .report import PrefillReport
from .settings import Settings, make_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    import torch
    from torch.distributed import ProcessGroup

    from ..kv_predictor import KVPredictor
    from ..schedule import PruningSchedule
    from .report import PrefillRecorder
    from .scoring import Scorer

_REMOVED = "this handle was removed: the model is no longer patched. Call apply_sdtp again for a new one"


class Current(threading.local):
    """The request that this thread is working on."""

    def __init__(self, default: Settings) -> None:  # once in every thread
        self.settings = default
        self.is_own = False
        """Whether this thread entered a request of its own."""
        self.rows_per_setting = 1
        """Rows of the batch that stand for one row of the request: beams, returned sequences."""
        self.prompt_columns: int | None = None
        """Of a ``generate()`` without a cache, whose every step reads the prompt again."""


class SdtpHandle:
    """Undoes :func:`~sdtp_kernels.apply_sdtp` and reports; also a context manager that undoes it at the end.

    Examples
    --------
    >>> with apply_sdtp(model, "attention", 0.9) as handle:
    ...     output = model.generate(prompt, max_new_tokens=2, do_sample=False)
    ...     handle.report().kept.shape
    torch.Size([1, 98])
    """

    def __init__(
        self,
        schedule: PruningSchedule,
        scorers: dict[int, Scorer],
        backend: str,
        later_turns: bool,
        evict_earlier_kv: bool,
        kv_predictor: KVPredictor | None,
        group: ProcessGroup | None,
    ) -> None:
        self.schedule, self.scorers, self.backend = schedule, scorers, backend
        self.kv_predictor = kv_predictor
        """Where dropped tokens keep predicted keys and values: its maps, where the layers are."""
        self.attends_by_position = False
        """Whether their attention is :func:`~sdtp_kernels.position_attention` rather than one with a mask."""
        self.later_turns, self.evict_earlier_kv = later_turns, evict_earlier_kv
        self.group = group
        """The processes of tensor parallelism; ``None`` for one alone."""
        self.parent: SdtpHandle | None = None
        """That of the model which this one's model is a copy of: closing it closes this."""
        self.is_inherited = False
        """Whether it came with a copied or unpickled model, so that nobody was handed it."""
        self._begin()

    def _begin(self) -> None:
        self.current = Current(make_settings(self.schedule))
        self._modules: list[weakref.ref[torch.nn.Module]] = []
        self._undo: Callable[[torch.nn.Module], None] | None = None
        self._is_closed = False
        self._requests: dict[threading.Thread, set[threading.Thread]] = {}
        self._recorder: PrefillRecorder | None = None
        self._note, self._warned = "no prefill yet", set[str]()

    @property
    def is_open(self) -> bool:
        """Whether the model is patched by it."""
        return not self._is_closed and (self.parent is None or self.parent.is_open)

    def report(self) -> PrefillReport:
        """What happened in the last prefill, or in the last chunk of one.

        A prompt that ``generate()`` adds to a cache without pruning it counts as a prefill; the note says why it was
        not pruned. A call of the model itself that adds tokens does not count. The last prefill stays readable after
        the handle is removed.
        """
        if self._recorder:
            return self._recorder.report()
        return PrefillReport(note=self._note if self.is_open else _REMOVED)

    @contextlib.contextmanager
    def request(
        self,
        *,
        protect: Any = None,
        keep_ratio: float | tuple[float, ...] | list[Any] | None = None,
        enabled: bool | list[bool] = True,
        min_prompt: int | list[int] | None = None,
    ) -> Iterator[None]:
        """Settings for the prompts that this thread prefills inside the ``with`` block.

        ``generate()`` and calls of the patched model take the same keywords for one call. Threads do not inherit a
        request: a thread that is started inside the block, and prefills without a request of its own, is refused.

        Parameters
        ----------
        protect : (int, int), list of them, list of such lists, or bool Tensor [B, N], optional
            Tokens that are never pruned. Ranges (first, last + 1) count in each row from its first token without
            padding; they are for all rows, or one list for every row. A mask is over the columns of ``input_ids`` and
            is copied to the host, because its counts set shapes. Protected tokens come on top of the budget: the
            schedule counts the prompt without them.
        keep_ratio : float or tuple, or a list of them, optional
            Replaces that of the :class:`PruningSchedule`; a list holds one for every row.
        enabled : bool or list of bool, default True
            False prunes nothing. A cache that begins so is left alone in later turns as well. In a later turn, False
            defers what that turn would finish.
        min_prompt : int or list of int, optional
            Replaces that of the :class:`PruningSchedule`.

        Raises
        ------
        ValueError
            If a setting is out of range, or lists differ in length.
        RuntimeError
            If the handle was removed.

        Examples
        --------
        >>> handle = apply_sdtp(model, "recent", 0.9)
        >>> with handle.request(keep_ratio=0.5):
        ...     output = model.generate(prompt, max_new_tokens=1)
        >>> handle.report().kept_per_stage
        [60, 30]
        >>> handle.remove()
        """
        settings = make_settings(self.schedule, protect, keep_ratio, enabled, min_prompt)
        me = threading.current_thread()
        is_outer = me not in self._requests
        self._requests.setdefault(me, set(threading.enumerate()))
        try:
            with self.using(settings):
                yield
        finally:
            if is_outer:
                del self._requests[me]

    @contextlib.contextmanager
    def using(self, settings: Settings) -> Iterator[None]:
        """These settings for this thread."""
        if not self.is_open:
            raise RuntimeError(_REMOVED)
        current = self.current
        before = current.settings, current.is_own, current.rows_per_setting, current.prompt_columns
        current.settings, current.is_own = settings, True
        try:
            yield
        finally:
            current.settings, current.is_own, current.rows_per_setting, current.prompt_columns = before

    def settings(self) -> Settings:
        """Those of this thread's request."""
        if self._requests and not self.current.is_own:
            me = threading.current_thread()
            if any(me not in older for older in list(self._requests.values())):
                raise RuntimeError(
                    "a thread that was started inside handle.request() does not inherit its settings: pass them to "
                    "generate(), or enter handle.request() in this thread (without arguments for the schedule's own)"
                )
        return self.current.settings

    def remove(self) -> None:
        """Restore the model as it was. A second call does nothing."""
        self._is_closed = True
        for reference in self._modules:
            module = reference()
            if module is not None and self._undo is not None:
                self._undo(module)
        self._modules.clear()

    def attach(self, module: torch.nn.Module, undo: Callable[[torch.nn.Module], None]) -> None:
        """`undo` makes this module what it was."""
        self._modules.append(weakref.ref(module))
        self._undo = undo

    def note(self, text: str) -> None:
        """Record that the last prefill was not pruned, and why."""
        self._recorder, self._note = None, text

    def record(self, recorder: PrefillRecorder) -> None:
        """Record a pruned prefill, once it is complete."""
        self._recorder = recorder

    def warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=2)

    def __enter__(self) -> SdtpHandle:
        if not self.is_open:
            raise RuntimeError(_REMOVED)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        names = (
            "schedule",
            "scorers",
            "backend",
            "later_turns",
            "evict_earlier_kv",
            "kv_predictor",
            "attends_by_position",
        )
        return {**{name: getattr(self, name) for name in names}, "_is_closed": not self.is_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_closed = state.pop("_is_closed")
        self.__dict__.update(state)
        self.group = self.parent = None
        self.is_inherited = True
        self._begin()
        self._is_closed = is_closed

    def __deepcopy__(self, memo: dict[int, Any]) -> SdtpHandle:
        copied = object.__new__(type(self))
        copied.__setstate__(self.__getstate__())  # the scorers are never changed, so both share them
        copied.parent, copied.group = self, self.group
        memo[id(self)] = copied
        return copied
