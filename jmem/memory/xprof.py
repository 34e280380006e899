"""A program's plan as a profile folder that xprof's memory viewer opens.

    jmem.memory.export_xprof(step, params, batch, target="h200", folder="profile")
    xprof --logdir profile             # then: Tools > memory_viewer

The viewer draws XLA's boxes over time; it knows neither kinds nor labels, so the report
of `jmem.measure` says more. It is there for those who know their way around it.
"""

import pathlib
from collections.abc import Callable
from typing import Any

from jmem import targets
from jmem.memory.measure import as_program, compile_and_dump
from jmem.program import Program
from jmem.targets import Target

RUN = "jmem"
"""The profile's name in xprof's list of runs."""


def export_xprof(
    what: Program | Callable,
    *args: Any,
    folder: str | pathlib.Path,
    target: str | Target = "h200",
    **options: Any,
) -> pathlib.Path:
    """Compiles a program and lays its plan out for xprof; returns the file written.

    Args:
      what: a `Program`, or a function with its arguments, as `jmem.measure` takes it.
      *args: the function's arguments, arrays or descriptions of arrays.
      folder: what xprof is started with as --logdir; made if it is not there. A profile
        of the same program in it is replaced.
      target: the card.
      **options: `donate`, `static` and `labels` of `jmem.measure`.

    Raises:
      OSError: the folder cannot be written.
    """
    program = as_program(what, args, **options)
    lowered = program.lower(targets.resolve(target))
    content, _ = compile_and_dump(lowered, {})
    place = pathlib.Path(folder) / "plugins" / "profile" / RUN
    place.mkdir(parents=True, exist_ok=True)
    (place / "host.xplane.pb").touch()  # without one xprof lists no run
    plan = place / f"{program.name}.hlo_proto.pb"
    plan.write_bytes(content)
    return plan
