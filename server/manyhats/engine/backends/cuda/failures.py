"""What fails on a device, as the engine has to hear of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from manyhats.engine.backends.cuda.runtime import Runtime
from manyhats.engine.errors import EngineDeadError, is_out_of_memory


@contextmanager
def launching(runtime: Runtime) -> Iterator[None]:
    """Around launches: if one fails, those before it have ended when the error is raised, and name no memory any more.

    Raises:
        EngineDeadError: as ``reported``.
    """
    try:
        with reported():
            yield
    except BaseException:
        with suppress(RuntimeError):
            behind = runtime.new_event()
            behind.record()
            behind.synchronize()
        raise


@contextmanager
def reported() -> Iterator[None]:
    """Around what may meet a device's error.

    Raises:
        EngineDeadError: the device failed, other than for want of memory; it runs nothing any more in this process.
    """
    try:
        yield
    except torch.AcceleratorError as error:
        if is_out_of_memory(error):
            raise
        raise EngineDeadError(f"the GPU failed: {error}") from error
