"""What tuning shows: progress while it runs, and what was chosen."""

import json
import sys
import time
from pathlib import Path

from cute_router.tuning import store
from cute_router.tuning.store import Choice, Gpu, Key, Knobs

WIDTH = 24  # of the bar


def say(text: str) -> None:
    """A line on stderr, over the progress if that is shown."""
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{clear}{text}", file=sys.stderr, flush=True)


class Progress:
    """A line on stderr that says how far it has come; silent where that is no terminal."""

    def __init__(self, total: int):
        self.total = total
        self.begun = 0
        self.start = time.perf_counter()
        self.shown = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        return self

    def step(self, what: str) -> None:
        """Say that the next of the steps has begun."""
        done, self.begun = self.begun, self.begun + 1
        if self.shown:
            bar = "#" * (WIDTH * done // self.total)
            left = ""
            if done:
                seconds = (time.perf_counter() - self.start) / done * (self.total - done)
                left = f", {seconds:.0f} s left"
            line = f"[{bar:<{WIDTH}}] {self.begun}/{self.total}{left}  {what}"
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def in_words(knobs: Knobs) -> str:
    """The knobs of a configuration in a line."""
    return " ".join(f"{name}={value}" for name, value in knobs.items())


def line(key: Key, choice: Choice) -> str:
    """A choice in a line."""
    s = key.spec
    router = f"E={s.num_experts} K={s.hidden_size} k={s.top_k} {s.scoring}"
    router += "" if s.renormalize else " raw"
    router += "" if s.has_bias else " no bias"
    router += f" groups {s.topk_group}/{s.n_group}" if s.n_group > 1 else ""
    router += "" if key.pdl else " no pdl"
    own = choice.heuristic_us
    beside = "heuristic failed" if own is None else f"heuristic {own:.2f} us"
    return (
        f"{key.kernel} N={key.tokens} {router} | {choice.us:.2f} us | {beside}"
        f" | {in_words(choice.knobs)}"
    )


def stored(path: Path) -> list[str]:
    """What a file of any GPU and of these versions holds, line by line; or why it holds nothing."""
    try:
        text = path.read_text(encoding="utf-8")
        about = json.loads(text)["gpu"]
        gpu = Gpu(**about | {"capability": tuple(about["capability"])})
        return [line(key, choice) for key, choice in store.parsed(text, gpu).items()]
    except (OSError, *store.UNFIT) as error:
        return [f"not used: {type(error).__name__}: {error}"]
