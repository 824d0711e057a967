"""A simulated GPU: queues that run late, memory that is given again, and clocks that show who waited for whom."""

from tests.simulated.clocks import Clock, Race
from tests.simulated.device import OutOfMemory, Simulated

__all__ = ["Clock", "OutOfMemory", "Race", "Simulated"]
