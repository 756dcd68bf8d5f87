"""Fixed networks that others trained, used by losses and metrics; their weights come with varcli."""

from varcli.pretrained.lite0 import Lite0, load_lite0

__all__ = ["Lite0", "load_lite0"]
