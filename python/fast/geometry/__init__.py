"""The geometry of an adaptation: its path through the landscapes of source and target loss."""

from fast.geometry.landscape import Landscape, PathGeometry, landscape
from fast.geometry.path import PathRecorder, WeightPath
from fast.geometry.plane import Plane

__all__ = ["Landscape", "PathGeometry", "PathRecorder", "Plane", "WeightPath", "landscape"]
