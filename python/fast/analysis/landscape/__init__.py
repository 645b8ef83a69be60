"""The path of an adaptation through the landscapes of source and target loss."""

from fast.analysis.landscape.measure import landscape
from fast.analysis.landscape.path import PathRecorder, WeightPath
from fast.analysis.landscape.plane import Plane
from fast.analysis.landscape.result import Landscape, PathGeometry

__all__ = ["Landscape", "PathGeometry", "PathRecorder", "Plane", "WeightPath", "landscape"]
