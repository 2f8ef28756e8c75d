"""What Python test programs share: counting, of whole tests or of single checks.

run_tests() runs a list of tests in a temporary folder. A test is a function, whose name begins with test_, and its
arguments. It fails by an exception; what an AssertionError says is shown, of any other exception all. Programs that
count their checks call check() or check_raises() for each and summary() at the end; other tests call require(). The
last line is `N passed, N failed`, as dev/test/run.sh expects it.
"""

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence


counts = {True: 0, False: 0}


def check(good: bool, what: str) -> None:
    counts[bool(good)] += 1
    if not good:
        print(f"FAILED: {what}")


def check_raises(kind: type[Exception], action: Callable[[], object], *words: str) -> None:
    """An exception of this kind, which says one line with these words in it."""
    try:
        action()
    except kind as error:
        text = str(error)
        check("\n" not in text and all(word in text for word in words), f"expected {words} in '{text}'")
    else:
        check(False, f"expected a {kind.__name__} with {words}, found none")


def summary() -> int:
    """Prints how many checks passed and failed; returns the exit status."""
    print(f"{counts[True]} passed, {counts[False]} failed")
    return 1 if counts[False] > 0 else 0


def require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def title(test: Callable, arguments: Sequence) -> str:
    told = [getattr(a, "__name__", str(a)) for a in arguments if isinstance(a, str | int | float) or callable(a)]
    return " ".join([test.__name__.removeprefix("test_"), *told])


def run_tests(
    tests: Sequence[tuple], prepare: Callable[[], None] = lambda: None, tidy: Callable[[], None] = lambda: None
) -> int:
    """Runs each (function, argument, ...), after prepare() and each followed by tidy(), with a temporary folder as the
    working one. Returns the exit status."""
    failed = 0
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        for test, *arguments in tests:
            started = time.monotonic()
            try:
                test(*arguments)
            except Exception as error:  # a crash is a failure as well, the other tests go on
                failed += 1
                what = error if isinstance(error, AssertionError) else traceback.format_exc()
                print(f"FAILED: {title(test, arguments)}: {what}", flush=True)
            else:
                print(f"ok: {title(test, arguments)} ({time.monotonic() - started:.1f} s)", flush=True)
            tidy()
        os.chdir(before)
    print(f"{len(tests) - failed} passed, {failed} failed")
    return 1 if failed else 0
