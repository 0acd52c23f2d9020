"""Shape checks of a test run, on some of the calls.

The import hook of jaxtyping (``--jaxtyping-packages``) checks every call of every annotated function of the package,
which on tiny models takes seven times as long as the calls themselves. A test that loops over hundreds of runs, such
as those of a literal loop that a result is compared with, checks the same annotations over and over. Here each test
checks the first ``FIRST`` calls of every function, and of the others every ``EVERY``-th.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import jaxtyping

FIRST, EVERY = 2, 64

_calls: dict[types.CodeType, int] = {}


def begin_test() -> None:
    """Count from 0 again."""
    _calls.clear()


def install() -> None:
    """Before anything imports the package: its modules take ``jaxtyping.jaxtyped`` from there."""
    if not hasattr(jaxtyping.jaxtyped, "of_some_calls"):
        jaxtyping.jaxtyped = _of_some_calls(jaxtyping.jaxtyped)


def _of_some_calls(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(fn: Any = None, **options: Any) -> Any:
        if fn is None:
            return functools.partial(decorate, **options)
        if not isinstance(fn, types.FunctionType):  # classes
            return jaxtyped(fn, **options)
        make = functools.cache(functools.partial(jaxtyped, fn, **options))
        if "<locals>" not in fn.__qualname__:  # what is made in every call is wrapped when it is first checked
            make()

        code = fn.__code__

        @functools.wraps(fn)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            n = _calls[code] = _calls.get(code, 0) + 1
            if n > FIRST and (n - FIRST) % EVERY:
                return fn(*args, **kwargs)
            return make()(*args, **kwargs)

        return wrapper

    decorate.of_some_calls = True  # type: ignore[attr-defined]
    return decorate
