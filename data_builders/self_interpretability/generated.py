"""Choice contexts made up on the spot: a named character chooses among things that differ in five numbers.

No two contexts share a name, a character or an attribute, so that nothing said of one is a clue to another.
"""

from __future__ import annotations

from itertools import product
from random import Random

from .contexts import Attribute, Context

THINGS = (
    "kettle", "lamp", "tent", "bicycle", "notebook", "backpack", "kayak", "blanket", "telescope", "ladder", "stove",
    "violin", "umbrella", "wheelbarrow", "hammock", "printer", "heater", "camera", "scooter", "freezer",
)  # fmt: skip
KINDS = (
    "travel", "garden", "kitchen", "school", "winter", "camping", "studio", "office", "harbour", "workshop",
    "festival", "museum", "orchard", "clinic", "stable",
)  # fmt: skip
PARTS = (
    "handle", "frame", "lid", "base", "strap", "hinge", "panel", "lining", "rim", "grip", "casing", "valve", "hook",
    "seam", "spring", "cover", "tray", "knob", "latch", "wheel", "filter", "bracket", "socket", "pocket", "nozzle",
    "dial", "cord", "shelf", "blade", "cushion", "gauge", "ribbon", "wedge", "axle", "basket", "magnet", "sleeve",
    "pedal", "hood", "rail", "sensor", "funnel", "collar", "button", "spout", "plate", "mesh", "pin", "belt", "cap",
    "lens", "arm", "foot", "spoke", "plug", "board", "tank", "hose", "flap", "peg",
)  # fmt: skip
MEASURES = {  # units and range of each
    "length": ("cm", 5, 120), "weight": ("g", 50, 900), "thickness": ("mm", 0.5, 4),
    "hardness": ("points", 1, 10), "lifetime": ("years", 1, 25), "price": ("euros", 10, 400),
    "tolerance": ("mm", 0.01, 0.09), "noise": ("dB", 20, 80), "warranty": ("months", 6, 72),
    "opacity": ("percent", 0, 100), "stiffness": ("N/mm", 0.2, 1.1), "angle": ("degrees", 5, 85),
    "shine": ("points", 0, 50), "porosity": ("percent", 0, 12), "conductivity": ("W/mK", 0.02, 0.6),
    "gap": ("mm", 0.1, 2.5), "torque": ("Nm", 1, 45), "batch_size": ("pieces", 2, 60), "refills": ("", 0, 15),
    "drying_time": ("minutes", 5, 240),
}  # fmt: skip
FIRST = ("Ada", "Boris", "Celia", "Dmitri", "Esther", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kamala", "Lars",
         "Mira", "Nils", "Olga", "Pavel", "Quentin", "Rosa", "Sven", "Tamar")  # fmt: skip
LAST = ("Abend", "Birk", "Castell", "Dorn", "Eklund", "Falk", "Grimm", "Holt", "Ivers", "Juhl", "Kestrel", "Lund",
        "Marsh", "Nordin", "Oakley")  # fmt: skip
EACH = 5


def generated_contexts(count: int, seed: int) -> list[Context]:
    """`count` contexts with five attributes each. Raises ValueError for more than there are attributes for (240)."""
    most = len(PARTS) * len(MEASURES) // EACH
    if count > most:
        raise ValueError(f"{count} contexts of {EACH} attributes each, and there are attributes for {most}")
    rng = Random(f"contexts {seed}")
    things, people = list(product(KINDS, THINGS)), list(product(FIRST, LAST))
    attributes = list(product(PARTS, MEASURES))
    for drawn in (things, people, attributes):
        rng.shuffle(drawn)
    found = []
    for number in range(count):
        kind, thing = things[number]
        parts = attributes[EACH * number : EACH * (number + 1)]
        made = []
        for part, measure in parts:
            units, low, high = MEASURES[measure]
            made.append(Attribute(f"{part}_{measure}", low, high, units))
        question = f"Imagine you are {' '.join(people[number])}. Which {kind} {thing} would you prefer?"
        found.append(Context(f"{kind}_{thing}", question, tuple(made)))
    return found
