"""2:4 on an NVIDIA GPU: `snows.semi_structured.convert(model, dtype)`."""

from snows.deploy.semi_structured import Converted, convert

__all__ = ["Converted", "convert"]
