"""What `router.py` found at a shape and N: the times, the floors under them, how the marks stand.

The floors are the least that the work takes, whoever does it:

    memory     (2 (E + N) K + 8 N k) / bandwidth     W and x once in, weights and ids once out
    compute    2 N E K / peak                        the products, at the tensor cores' peak

The bandwidth is what a kernel that only reads was measured to reach on the same GPU (`floor.py`),
the peak that of the data sheet, which is for a clock of 1830 MHz. The W-stream of few tokens is no
such quotient but a time: of a launch that reads W and does no more.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from contest import OURS
from peers import best_recorded
from problem import TOP_K

EAGER, COMPILED = "eager", "torch.compile"
CUBLAS, OWN_GATE = "cuBLAS GEMM alone", "cuBLAS + own gate"
AND_GATE = "cuBLAS + "  # how the names of cuBLAS with a gate begin, ours or another's
FLOOR = "W-stream, no PDL"
RECORDED = "best recorded peer"
MEMORY, COMPUTE = "memory floor", "compute floor"

FEW_TOKENS = 64  # up to so many `dense_decode` is what is timed, and W's stream its floor
PEAK_TFLOP_S = 989.4  # bf16 without sparsity, by the data sheet of the H100 SXM and the H200
AIM = 1.0  # of cuBLAS's GEMM alone


def mark(N: int) -> float:
    """What part of the best recorded peer's time a router may take."""
    return 0.85 if N >= 1024 else 0.8


def verdict(name: str, limit: float, ratio: float) -> str:
    """How a ratio stands to its limit."""
    return f"{name} {limit:g}: {'met' if ratio <= limit else 'missed'}"


def floors(E: int, K: int, N: int, bandwidth: float) -> dict[str, float]:
    """The microseconds that the memory (at `bandwidth` TB/s) and the tensor cores need at least."""
    bytes_moved = 2 * (E + N) * K + 8 * N * TOP_K
    return {MEMORY: bytes_moved / bandwidth / 1e6, COMPUTE: 2 * N * E * K / PEAK_TFLOP_S / 1e6}


@dataclass
class Result:
    """What was measured at one shape and N, in microseconds."""

    E: int
    K: int
    N: int
    subject: str  # which function of this package was called, and whose kernels it ran
    us: dict[str, float]
    floors: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)  # name -> why
    chain_us: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """The result as one line."""
        ours = self.us[OURS]
        parts = [
            f"N={self.N} E={self.E} K={self.K} k={TOP_K} bf16",
            self.subject,
            f"{ours:.2f} us",
            f"{self.tflop_s:.3g} TFLOP/s",
            f"{self.over_floor[0]:.1f}x {self.over_floor[1]}",
        ]
        if self.recorded:
            us, name = self.recorded
            parts.append(f"{ours / us:.2f}x {RECORDED} ({name} {us:.2f} us)")
            parts.append(verdict("mark", mark(self.N), ours / us))
        parts.append(f"{self.of_cublas:.2f}x {CUBLAS}")
        parts.append(verdict("aim", AIM, self.of_cublas))
        if self.gated:
            parts.append(f"{ours / self.gated[0]:.2f}x {self.gated[1]}")
        if EAGER in self.us:
            parts.append(f"{ours / self.us[EAGER]:.2f}x eager")
        if self.chain_us:
            parts.append(f"{self.chain_us['added']:.2f} us added to a chain")
        return " | ".join(parts)

    @property
    def times(self) -> dict[str, float]:
        """What was measured, with the best recorded peer and the floors beside it."""
        recorded = {RECORDED: self.recorded[0]} if self.recorded else {}
        return self.us | recorded | self.floors

    @property
    def tflop_s(self) -> float:
        """The rate of the products, 2 N E K, over the whole of the router's time."""
        return 2 * self.N * self.E * self.K / self.us[OURS] / 1e6

    @property
    def over_floor(self) -> tuple[float, str]:
        """How many times the floor it took, and which: W's stream at small N, else the higher."""
        if self.N <= FEW_TOKENS:
            return self.us[OURS] / self.us[FLOOR], "W-stream"
        name = max(self.floors, key=self.floors.__getitem__)
        return self.us[OURS] / self.floors[name], name

    @property
    def of_cublas(self) -> float:
        """The part of cuBLAS's time, in the same run and without a gate, that the router took."""
        return self.us[OURS] / self.us[CUBLAS]

    @property
    def gated(self) -> tuple[float, str] | None:
        """The best of cuBLAS with a gate behind it, of the gates there were in this run."""
        gated = ((us, name) for name, us in self.us.items() if name.startswith(AND_GATE))
        return min(gated, default=None)

    @property
    def recorded(self) -> tuple[float, str] | None:
        """The best recorded peer, where there is one."""
        return best_recorded(self.E, self.K, self.N)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        recorded = self.recorded
        return {
            "E": self.E,
            "K": self.K,
            "N": self.N,
            "k": TOP_K,
            "subject": self.subject,
            "us": rounded(self.us),
            "floors_us": rounded(self.floors),
            "tflop_s": round(self.tflop_s, 2),
            "absent": self.absent,
            "chain_us": rounded(self.chain_us),
            "best_recorded_peer": recorded
            and {
                "us": recorded[0],
                "name": recorded[1],
                "ratio": round(self.us[OURS] / recorded[0], 3),
                "mark": mark(self.N),
            },
            "cublas_alone": {"ratio": round(self.of_cublas, 3), "aim": AIM},
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Result":
        """The result that `as_dict` wrote."""
        measured = {name: found[name] for name in ("E", "K", "N", "subject", "us", "absent")}
        return cls(**measured, floors=found["floors_us"], chain_us=found["chain_us"])


def rounded(us: dict[str, float]) -> dict[str, float]:
    """To the nanosecond, but for floors that are less: to three digits."""
    return {
        name: round(value, 3) if value >= 1 else float(f"{value:.3g}") for name, value in us.items()
    }


def shapes(results: Iterable[Result]) -> list[tuple[int, int]]:
    """The shapes (E, K) there are, in the order of their first results."""
    return list(dict.fromkeys((r.E, r.K) for r in results))


def summary(results: list[Result]) -> str:
    """How many marks and aims are met, and where they are not."""
    compared = [r for r in results if r.recorded]
    over = [r for r in compared if r.us[OURS] > mark(r.N) * r.recorded[0]]
    slower = [r for r in results if r.of_cublas > AIM]
    said = []
    for name, missed, of in (("marks", over, compared), ("aims", slower, results)):
        where = ", ".join(f"N={r.N} E={r.E}" for r in missed)
        said.append(f"{name} met: {len(of) - len(missed)} of {len(of)}")
        said[-1] += f" (missed: {where})" if where else ""
    return "\n".join(said)


def table(results: list[Result]) -> str:
    """All times, a row for each contender and a column for each N."""
    lines = []
    for E, K in shapes(results):
        rows = [r for r in results if (r.E, r.K) == (E, K)]
        lines.append(f"E={E} K={K} k={TOP_K}, us per call")
        lines.append(f"{'N':28}" + "".join(f"{r.N:>9}" for r in rows))
        for name in dict.fromkeys(name for r in rows for name in r.times):
            cells = (f"{r.times[name]:9.2f}" if name in r.times else f"{'-':>9}" for r in rows)
            lines.append(f"{name:28}" + "".join(cells))
        lines.append(f"{'TFLOP/s':28}" + "".join(f"{r.tflop_s:9.1f}" for r in rows))
        for name in dict.fromkeys(name for r in rows for name in r.absent):
            reasons: dict[str, list[str]] = {}
            for r in rows:
                if name in r.absent:
                    reasons.setdefault(r.absent[name], []).append(str(r.N))
            for reason, at in reasons.items():
                where = "" if len(at) == len(rows) else f" at N={','.join(at)}"
                lines.append(f"{name}: absent{where} ({reason})")
        lines.append("")
    return "\n".join(lines)
