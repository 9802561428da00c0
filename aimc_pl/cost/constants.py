"""The constants of hardware, each with its unit and its source, and where sources disagree, the range of their values.

No source gives all constants. A preset takes those of its crossbars from the source that names it, and the others from
the sources that give them. "Derived" marks a value that follows from printed ones by the arithmetic that is shown.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, get_type_hints

from aimc_pl.arguments import check_number
from aimc_pl.errors import UsageError


@dataclass(frozen=True)
class Quantity:
    """A number with its unit and its source.

    Attributes:
        value: the number, at least 0.
        unit: the unit, such as ``"s"`` or ``"J/bit"``; empty for a count.
        source: where the number comes from.

    Raises:
        UsageError: if the value is no finite number of at least 0, or if the source is missing.
    """

    value: float
    unit: str
    source: str

    def __post_init__(self) -> None:
        check_number("value of a quantity", self.value, at_least=0)
        if not self.source:
            raise UsageError(f"a quantity needs a source: say where {self.value:g} {self.unit} comes from")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The hardware of a pipeline: the same accelerator for every stage, and links between neighbours.

    A *tile* is a crossbar with its converters. A *product* is one vector times the matrix of a tile. A *weight* is one
    cross-point of a matrix. Make hardware of your own with ``dataclasses.replace(RASCH_2024, name="mine",
    link_latency=Quantity(1e-6, "s", "my board"))``.

    Raises:
        UsageError: if a quantity has another unit than its field, if a number is 0 that others are divided by, or if
            the size of a tile is not whole.
    """

    name: str
    tile_size: Annotated[Quantity, "", "rows and columns of a tile"]
    forward_time: Annotated[Quantity, "s", "a product in the forward"]
    backward_time: Annotated[Quantity, "s", "a product in the backward"]
    update_time: Annotated[Quantity, "s", "the fixed part of an update from one input and one error"]
    pulse_time: Annotated[Quantity, "s", "one more pulse of an update"]
    managed_pulses: Annotated[Quantity, "", "mean length of a pulse train, where the device adapts it to every vector"]
    forward_energy: Annotated[Quantity, "J", "a product in the forward, per weight"]
    backward_energy: Annotated[Quantity, "J", "a product in the backward, per weight"]
    update_energy: Annotated[Quantity, "J", "the fixed part of an update, per weight"]
    pulse_energy: Annotated[Quantity, "J", "one more pulse of an update, per weight"]
    dac_energy: Annotated[Quantity, "J", "converting one input of a product"]
    adc_energy: Annotated[Quantity, "J", "converting one output of a product"]
    digital_rate: Annotated[Quantity, "FLOP/s", "a digital unit"]
    tiles_per_unit: Annotated[Quantity, "", "tiles that share a digital unit"]
    digital_energy: Annotated[Quantity, "J/FLOP", "a digital unit"]
    activation_bits: Annotated[Quantity, "bit", "an activation or an error"]
    weight_bits: Annotated[Quantity, "bit", "a digital parameter, and each number that the optimizer keeps for it"]
    buffer_capacity: Annotated[Quantity, "bit", "the on-chip buffer of a stage"]
    buffer_energy: Annotated[Quantity, "J/bit", "reading or writing the on-chip buffer"]
    memory_bandwidth: Annotated[Quantity, "bit/s", "off-chip memory of a stage"]
    memory_energy: Annotated[Quantity, "J/bit", "reading or writing off-chip memory"]
    link_latency: Annotated[Quantity, "s", "from stage to stage, for the first bit"]
    link_bandwidth: Annotated[Quantity, "bit/s", "from stage to stage, in each direction"]
    link_energy: Annotated[Quantity, "J/bit", "from stage to stage"]
    static_power: Annotated[Quantity, "W", "a stage, busy or idle"]

    def __post_init__(self) -> None:
        for name, unit, _, quantity in self.rows():
            if quantity.unit != unit:
                raise UsageError(f"{name} of hardware {self.name!r} must be in {unit!r}, got {quantity.unit!r}")
        for name in ("tile_size", "digital_rate", "tiles_per_unit", "memory_bandwidth", "link_bandwidth"):
            check_number(f"{name} of hardware {self.name!r}", getattr(self, name).value, above=0)
        if self.tile_size.value % 1:
            raise UsageError(f"tile_size of hardware {self.name!r} must be whole, got {self.tile_size.value:g}")

    def rows(self) -> Iterator[tuple[str, str, str, Quantity]]:
        """Yield the name, the unit, the meaning and the quantity of every constant."""
        for name, annotation in get_type_hints(Hardware, include_extras=True).items():
            if name != "name":
                unit, what = annotation.__metadata__
                yield name, unit, what, getattr(self, name)


_TABLE_5 = "arXiv 2510.02516, table 5 (after Rasch 2024 and Jain 2022)"
_APPENDIX_I = "arXiv 2510.02516, appendix I"
_ISAAC = "ISAAC 2016, table 1"
_SIMULATOR = "defaults of IBM's simulator of 3D in-memory computing (Büchel 2024)"
_HOROWITZ = "Horowitz 2014, 45 nm"
_CIMLOOP = "CiMLoop's library of components"
_SIMBA = "Simba 2019, links of 11 to 25 Gbit/s a pin between chips of a package: 0.82 to 1.75 pJ/bit"
_MLP_WEIGHTS = 785 * 250 + 250 * 10
_IN_PRODUCT = "counted in the energy of a product"

_AROUND_CROSSBARS: dict[str, Quantity] = {
    "digital_rate": Quantity(0.7e12, "FLOP/s", _TABLE_5),
    "tiles_per_unit": Quantity(4, "", _TABLE_5),
    "digital_energy": Quantity(
        (0.9e-12 + 3.7e-12) / 2, "J/FLOP", f"{_HOROWITZ}: mean of a 32-bit addition (0.9 pJ) and product (3.7 pJ)"
    ),
    "weight_bits": Quantity(32, "bit", "float32, as networks are trained here"),
    "buffer_capacity": Quantity(168 * 64 * 1024 * 8, "bit", f"{_ISAAC}: 168 eDRAM buffers of 64 KiB on a chip"),
    "buffer_energy": Quantity(20.45e-12 / 256, "J/bit", f"{_ISAAC}, derived in {_CIMLOOP}: 20.45 pJ per 256 bits"),
    "memory_bandwidth": Quantity(5.332e9 * 8, "bit/s", f"{_SIMULATOR}: 5.332 GB/s"),
    "memory_energy": Quantity(0.2467 / (5.332e9 * 8), "J/bit", f"{_SIMULATOR}, derived: 0.2467 W at 5.332 GB/s"),
    "link_latency": Quantity(10e-9, "s", _SIMULATOR),
    "link_bandwidth": Quantity(6.4e9 * 8, "bit/s", f"{_ISAAC}: 6.4 GB/s from chip to chip"),
    "link_energy": Quantity(1.75e-12, "J/bit", f"{_SIMBA}, the most"),
    "static_power": Quantity(0, "W", "not given by the sources of the crossbars: left out"),
}

RASCH_2024 = Hardware(
    name="rasch_2024",
    tile_size=Quantity(512, "", _TABLE_5),
    forward_time=Quantity(40e-9, "s", _TABLE_5),
    backward_time=Quantity(40e-9, "s", _TABLE_5),
    update_time=Quantity(0, "s", f"{_TABLE_5}: an update is its pulses and its digital preparation"),
    pulse_time=Quantity(5e-9, "s", _TABLE_5),
    managed_pulses=Quantity(5, "", f"{_TABLE_5}, derived: 30.9 ns for SGD are 5 pulses and 1,024 FLOP"),
    forward_energy=Quantity(7.29e-9 / _MLP_WEIGHTS, "J", f"{_APPENDIX_I}, derived: 7.29 nJ over 198,750 weights"),
    backward_energy=Quantity(2.15e-9 / _MLP_WEIGHTS, "J", f"{_APPENDIX_I}, derived: 2.15 nJ over 198,750 weights"),
    update_energy=Quantity(0, "J", f"{_APPENDIX_I}: all of it is in the pulses"),
    pulse_energy=Quantity(
        5.53e-9 / _MLP_WEIGHTS / 5, "J", f"{_APPENDIX_I}, derived: 5.53 nJ over 198,750 weights and 5 pulses"
    ),
    dac_energy=Quantity(0, "J", _IN_PRODUCT),
    adc_energy=Quantity(0, "J", _IN_PRODUCT),
    activation_bits=Quantity(8, "bit", "between the 7 bits of the DAC and the 9 bits of the ADC of arXiv 2502.06309"),
    **_AROUND_CROSSBARS,
)
"""Pulses of 5 ns and products of 40 ns, as published costs of training algorithms assume."""

_MARINELLA = "Marinella 2018, analog, 8 bits, 1024 × 1024"

MARINELLA_2018 = Hardware(
    name="marinella_2018",
    tile_size=Quantity(1024, "", _MARINELLA),
    forward_time=Quantity(0.384e-6, "s", _MARINELLA),
    backward_time=Quantity(0.384e-6, "s", _MARINELLA),
    update_time=Quantity(0.512e-6, "s", f"{_MARINELLA}: the outer product, whatever its pulses"),
    pulse_time=Quantity(0, "s", f"{_MARINELLA}: in the time of the outer product"),
    managed_pulses=Quantity(1, "", f"{_MARINELLA}: inputs are coded by time and voltage, not by trains"),
    forward_energy=Quantity(12.8e-9 / 1024**2, "J", f"{_MARINELLA}, derived: 12.8 nJ a product"),
    backward_energy=Quantity(12.8e-9 / 1024**2, "J", f"{_MARINELLA}, derived: 12.8 nJ a product"),
    update_energy=Quantity(11e-15, "J", "Marinella 2018, abstract: 11 fJ for a multiply and accumulate"),
    pulse_energy=Quantity(0, "J", f"{_MARINELLA}: in the energy of the outer product"),
    dac_energy=Quantity(0, "J", _IN_PRODUCT),
    adc_energy=Quantity(0, "J", _IN_PRODUCT),
    activation_bits=Quantity(8, "bit", _MARINELLA),
    **_AROUND_CROSSBARS,
)
"""A circuit-level analysis of the three kernels of training in a 14/16 nm process."""

_IMA = f"{_ISAAC}, derived for 128 × 128 weights of 16 bits on 8 crossbars, with 16 cycles of 100 ns a product"
_PIPELAYER = "PipeLayer 2017, a write; ISAAC itself does not train"

ISAAC_2016 = Hardware(
    name="isaac_2016",
    tile_size=Quantity(128, "", _ISAAC),
    forward_time=Quantity(16 * 100e-9, "s", _IMA),
    backward_time=Quantity(16 * 100e-9, "s", f"{_IMA}; ISAAC itself does not train"),
    update_time=Quantity(0, "s", f"{_PIPELAYER}: all of it is in the pulses"),
    pulse_time=Quantity(50.88e-9, "s", f"{_PIPELAYER}: 50.88 ns"),
    managed_pulses=Quantity(5, "", "as for rasch_2024; ISAAC itself does not train"),
    forward_energy=Quantity(2.4e-3 * 1.6e-6 / 128**2, "J", f"{_IMA}: crossbars of 2.4 mW"),
    backward_energy=Quantity(2.4e-3 * 1.6e-6 / 128**2, "J", f"{_IMA}: crossbars of 2.4 mW"),
    update_energy=Quantity(0, "J", f"{_PIPELAYER}: all of it is in the pulses"),
    pulse_energy=Quantity(
        3.91e-9 / 128**2, "J", f"{_PIPELAYER}, derived: 3.91 nJ a spike, taken as a write of 128 × 128 weights"
    ),
    dac_energy=Quantity(4e-3 * 1.6e-6 / 128, "J", f"{_IMA}: DACs of 4 mW for 128 inputs"),
    adc_energy=Quantity(16e-3 * 1.6e-6 / 128, "J", f"{_IMA}: ADCs of 16 mW for 128 outputs"),
    activation_bits=Quantity(16, "bit", _ISAAC),
    **_AROUND_CROSSBARS,
)
"""Crossbars whose converters dominate, with the bits of an input one after the other; updates as in PipeLayer."""

_NEUROSIM = "source code of DNN+NeuroSim V2.1"

PRESETS = {hardware.name: hardware for hardware in (RASCH_2024, MARINELLA_2018, ISAAC_2016)}
"""The hardware that the package knows, by name."""

OTHER_VALUES: dict[str, tuple[Quantity, ...]] = {
    "forward_time": (
        Quantity(80e-9, "s", "Gokmen and Vlasov 2016, a cycle of 4096 × 4096"),
        Quantity(64 * 256**2 * 2 / 63.1e12, "s", "Hermes, derived: 64 tiles of 256 × 256 at 63.1 TOPS"),
        Quantity(100e-9, "s", _SIMULATOR),
    ),
    "pulse_time": (Quantity(50e-9, "s", f"{_NEUROSIM}: a write pulse"),),
    "forward_energy": (
        Quantity(2 / 84e12, "J", "Gokmen and Vlasov 2016, derived: 84,000 GOPS/W"),
        Quantity(2 / 9.76e12, "J", "Hermes, derived: 9.76 TOPS/W"),
    ),
    "buffer_energy": (
        Quantity(10e-12 / 64, "J/bit", f"{_HOROWITZ}: 10 pJ for 64 bits of 8 KiB"),
        Quantity(20.7e-3 * 100e-9 / 8192, "J/bit", f"{_ISAAC}, derived: 20.7 mW, 1 KiB in a cycle of 100 ns"),
    ),
    "memory_energy": (
        Quantity(1.3e-9 / 64, "J/bit", f"{_HOROWITZ}: 1.3 nJ for 64 bits, the least"),
        Quantity(2.6e-9 / 64, "J/bit", f"{_HOROWITZ}: 2.6 nJ for 64 bits, the most"),
        Quantity(3.9e-12, "J/bit", f"{_NEUROSIM}: HBM2"),
        Quantity(14e-12, "J/bit", f"{_NEUROSIM}: GDDR5"),
    ),
    "link_latency": (
        Quantity(34e-9, "s", "PUMA's simulator: 29 ns on the chips under light load, and 5 ns between them"),
    ),
    "link_energy": (
        Quantity(1e-5 * 1e-9, "J/bit", f"{_SIMULATOR}, on a chip"),
        Quantity(20.74e-12 / 256, "J/bit", f"{_ISAAC}, derived in {_CIMLOOP}: its router, on a chip"),
        Quantity(0.82e-12, "J/bit", f"{_SIMBA}, the least"),
        Quantity(10.4 / (4 * 6.4e9 * 8), "J/bit", f"{_ISAAC}: 10.4 W for four links of 6.4 GB/s, always on"),
    ),
    "static_power": (Quantity(5, "W", f"{_SIMULATOR}: 1 W for each of 5 digital units"),),
}
"""What further sources say about some constants."""


def spread(name: str) -> tuple[Quantity, Quantity]:
    """Return the smallest and the largest value that the presets and other sources give for a constant.

    Values of 0, which stand for something counted elsewhere, do not count, unless there are no others.
    """
    found = [*(getattr(hardware, name) for hardware in PRESETS.values()), *OTHER_VALUES.get(name, ())]
    known = [quantity for quantity in found if quantity.value] or found
    return min(known, key=lambda quantity: quantity.value), max(known, key=lambda quantity: quantity.value)
