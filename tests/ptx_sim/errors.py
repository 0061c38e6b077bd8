"""What a simulation can find wrong."""


class SimulationError(Exception):
    """A kernel did what no correct kernel does."""


class Deadlock(SimulationError):
    """No warp can run and no asynchronous operation is under way."""


class OutOfBounds(SimulationError):
    """An address outside the memory it names, or a misaligned one."""


class Misuse(SimulationError):
    """A barrier, TMEM, descriptor or CTA was used against the rules of the PTX ISA."""


class Hazard(SimulationError):
    """Values are right here, but nothing guarantees it on a GPU."""


class Unsupported(Exception):
    """PTX that the simulator does not know: its gap, not the kernel's fault."""
