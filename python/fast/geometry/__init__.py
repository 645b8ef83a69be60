"""The geometry of an adaptation: its path through the landscapes of source and target loss."""

from fast.geometry.landscape import landscape
from fast.geometry.path import PathRecorder, WeightPath
from fast.geometry.plane import Plane
from fast.geometry.result import Landscape, PathGeometry

__all__ = ["Landscape", "PathGeometry", "PathRecorder", "Plane", "WeightPath", "landscape"]
