r"""Learning rates as functions of the step.

A schedule is made from its settings and is then a pure function: step in, value out. Steps count
from 0. A whole number gives a float; a tensor of steps, of any shape and on any device, gives the
same numbers as a float64 tensor of that shape. Nothing is remembered between calls.

By default a value is a *factor*: `as_scheduler` multiplies each parameter group's own rate by it,
so that groups keep their ratios. In a loop of one's own ``peak=3e-4`` makes it the rate itself.

==========================  ========================================================
where                       what a schedule says
==========================  ========================================================
step 0, with a warmup       ``start``; by default :math:`\eta / (w + 1)`, one equal stride
                            above zero, so that no step is wasted on a rate of zero.
                            ``start=0.0`` is the curve of Hugging Face and of most papers
last step of the warmup     one stride below the peak; step ``warmup_steps`` has the peak
step ``total_steps``        ``end``, exactly. The last of ``total_steps`` steps has the number
                            ``total_steps - 1`` and is still above it
later                       ``end``: nothing climbs again, nothing goes below
a phase of no steps         is skipped, and what follows it starts at once
phases longer than the run  ``ValueError``
a negative step             ``ValueError``; on devices whose values are not read, step 0
==========================  ========================================================
"""

from lmlosses.schedules._schedule import Phase, Schedule
from lmlosses.schedules.curves import (
    constant,
    cosine,
    exponential,
    linear,
    multi_step,
    one_minus_sqrt,
    step_decay,
)
from lmlosses.schedules.phases import (
    inverse_sqrt,
    join,
    one_cycle,
    warmup,
    warmup_cosine,
    wsd,
)
from lmlosses.schedules.scheduler import as_scheduler

__all__ = [
    "Phase",
    "Schedule",
    "as_scheduler",
    "constant",
    "cosine",
    "exponential",
    "inverse_sqrt",
    "join",
    "linear",
    "multi_step",
    "one_cycle",
    "one_minus_sqrt",
    "step_decay",
    "warmup",
    "warmup_cosine",
    "wsd",
]
