"""What a compressed model does differently, example by example, where the mean quality hides it."""

from gracile.evaluate.behaviour.calibration import Calibration, CalibrationMeter
from gracile.evaluate.behaviour.classes import ClassBehaviour, ClassChange
from gracile.evaluate.behaviour.compare import behaviour
from gracile.evaluate.behaviour.examples import ExampleChange
from gracile.evaluate.behaviour.outputs import OutputBehaviour

__all__ = [
    "Calibration",
    "CalibrationMeter",
    "ClassBehaviour",
    "ClassChange",
    "ExampleChange",
    "OutputBehaviour",
    "behaviour",
]
