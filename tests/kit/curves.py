"""Which losses does a test of the lr finder read?"""

import math


def bowl(steps: int = 100) -> list[float]:
    """Losses that fall, stay, and rise again, as a sweep of learning rates shows them."""
    return [2.3 - 1.5 * math.exp(-(((i - 0.7 * steps) / (0.2 * steps)) ** 2)) for i in range(steps)]
