"""manyhats: many fine-tuned tasks on one resident 4-bit base model.

Attributes:
    __version__: of the installed distribution.

The package's other parts are in other folders of a checkout (``manyhats.engine`` in ``server``, and so on); a wheel has
them side by side. This is the only ``__init__.py`` at this level: it finds them wherever they are.
"""

from pkgutil import extend_path
from typing import TYPE_CHECKING

__path__ = extend_path(__path__, __name__)

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        # Looked up on access: it takes longer than everything else that importing a client does here.
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version

        return version(__name__)
