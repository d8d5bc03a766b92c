"""Who can run the ops, why not, and the choice.

A backend is a module with the seven ops of :mod:`sdtp_kernels.reference` and ``unavailable_reason(device, dtype)``. It
is imported when it is first asked for. The choice is made inside the ops, where Dynamo does not look.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("sdtp_kernels")

# Best first: "auto" takes the first that can run. On a GPU that is Triton: one source for every GPU there is, and on
# compute capability 9 and 10 the only one of the two that reaches all of the tensor cores. The CUDA library serves
# where Triton is missing. Which is faster elsewhere, `make gpu-check` will tell.
_MODULES = {
    "cpu": "sdtp_kernels.backends.cpu",
    "triton": "sdtp_kernels.backends.triton",
    "cuda": "sdtp_kernels.backends.cuda",
    "reference": "sdtp_kernels.reference",
}

# Triton's interpreter runs kernels on cpu tensors for tests; "auto" must not take it.
_ONLY_BY_NAME = {("triton", "cpu")}

BACKEND_NAMES = ("auto", *_MODULES)


class Backend(Protocol):
    score_tokens: Callable[..., torch.Tensor]
    select_tokens: Callable[..., torch.Tensor]
    gather_tokens: Callable[..., list[torch.Tensor]]
    prune_tokens: Callable[..., tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]]
    window_attention: Callable[..., torch.Tensor]
    prompt_bias: Callable[..., torch.Tensor]
    position_attention: Callable[..., torch.Tensor]
    unavailable_reason: Callable[..., str | None]


class BackendUnavailableError(RuntimeError):
    """A backend was named that cannot run; the message lists every backend with its reason."""


class BackendStatus(NamedTuple):
    """One backend as :func:`explain_backends` sees it."""

    name: str
    available: bool
    reason: str
    """Empty where it can run."""
    chosen: bool
    """Whether ``backend="auto"`` takes it."""


def explain_backends(device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> list[BackendStatus]:
    """Every backend, whether it can run on `device` (with `dtype`, where given), and why not.

    Parameters
    ----------
    device : torch.device or str, default "cpu"
    dtype : torch.dtype, optional
        Dtype of the hidden states.

    Returns
    -------
    list of BackendStatus
        Best first; exactly one is `chosen`.

    Examples
    --------
    >>> [status.name for status in explain_backends("cpu") if status.available][-1]
    'reference'
    """
    device = torch.device(device)
    reasons = {name: _load(name).unavailable_reason(device, dtype) for name in _MODULES}
    chosen = next(n for n, reason in reasons.items() if reason is None and (n, device.type) not in _ONLY_BY_NAME)
    return [BackendStatus(name, reason is None, reason or "", name == chosen) for name, reason in reasons.items()]


def check_name(name: str) -> None:
    """Refuse a backend name that does not exist."""
    if name not in BACKEND_NAMES:
        raise ValueError(f"backend={name!r} does not exist; known: {', '.join(BACKEND_NAMES)}")


def choose(name: str, device: torch.device, dtype: torch.dtype | None = None) -> Backend:
    """The backend called `name`, or the best that can run where it is ``"auto"``.

    Raises
    ------
    ValueError
        If no backend has that name.
    BackendUnavailableError
        If the named one cannot run there: a name never falls back.
    """
    if name == "auto":
        return _load(_best(device, dtype))
    check_name(name)
    backend = _load(name)
    if backend.unavailable_reason(device, dtype) is not None:
        lines = [f"  {s.name}: {s.reason or 'can run'}" for s in explain_backends(device, dtype)]
        raise BackendUnavailableError(
            f"backend={name!r} cannot run on {device} with {dtype}. Name another one or use backend='auto':\n"
            + "\n".join(lines)
        )
    return backend


@functools.cache
def _best(device: torch.device, dtype: torch.dtype | None) -> str:
    statuses = explain_backends(device, dtype)
    best = next(status.name for status in statuses if status.chosen)
    if best == "reference" and device.type == "cuda":
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in statuses if not s.available and s.name != "cpu")
        warnings.warn(
            f"backend 'auto' is 'reference' on {device}, which is slow: no kernels for GPUs can run ({reasons}). "
            "'sdtp doctor' tells more",
            stacklevel=3,
        )
    logger.info("backend 'auto' is %r on %s", best, device)
    return best


@functools.cache
def _load(name: str) -> Backend:
    backend: Any = importlib.import_module(_MODULES[name])
    return backend  # type: ignore[no-any-return]
