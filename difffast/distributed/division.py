"""How the processes of a DeviceMesh share the work of a patched pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..plan import Plan
from ..sampling.division import Division, RunDivision
from ..sampling.extension import RunInfo
from ..unet.features import Features
from .branches import Branches
from .decoders import Decoders
from .encoders import Encoders, EncoderTimes
from .exchange import gather
from .meshes import check_mesh, place_in, size_of
from .weights import check_equal

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: UNet calls at the beginning of a run that are compared between processes: the second one's latents hold the noise
#: that the scheduler has drawn at the first step.
_COMPARED = 2


class MeshDivision(Division):
    """The work of a patched pipeline, divided among the processes of a mesh.

    Args:
        mesh: with dimensions of ``difffast.distributed.meshes.DIMENSIONS``; this process is in it.
        encoder: at meshes with "dec", who runs the encoder: one of ``difffast.sampling.division.ENCODERS``, or None:
            what is measured to be faster.

    Raises:
        TypeError, ValueError: the mesh does not fit.
    """

    def __init__(self, mesh: DeviceMesh, encoder: str | None = None) -> None:
        self.mesh = check_mesh(mesh)
        if encoder is not None and not self.divides("dec"):
            raise ValueError(f'encoder={encoder!r} needs a mesh with several processes along "dec", got {self!r}')
        self._times = EncoderTimes(encoder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MeshDivision) and (other.mesh, other._times.asked) == (self.mesh, self._times.asked)

    def __hash__(self) -> int:
        return hash(self.mesh)

    def __repr__(self) -> str:
        names = self.mesh.mesh_dim_names or ()
        return " x ".join(f"{name} {self.mesh.size(at)}" for at, name in enumerate(names))

    def divides(self, dimension: str) -> bool:
        """Return whether a dimension has more than one process."""
        return size_of(self.mesh, dimension) > 1

    def check_equal(self, pipe: Any, options: str) -> None:
        """Compare the pipeline with those of the other processes, all of which have to call this.

        Raises:
            ValueError: they hold other weights, or were asked for other things.
        """
        check_equal(self.mesh, pipe, options)

    def begin(self, info: RunInfo, counts: Counter[str], record: Callable[[str], object]) -> RunDivision | None:
        if not (self.divides("cfg") or self.divides("dec")):
            return None
        return MeshRunDivision(self.mesh, info, counts, self._times, record)

    def describe(self) -> Iterator[tuple[str, str]]:
        does = []
        if self.divides("dp"):
            does.append(f"replica {place_in(self.mesh, 'dp') + 1} of {size_of(self.mesh, 'dp')}")
        if self.divides("cfg"):
            does.append(f"guidance's {('unconditional', 'conditional')[place_in(self.mesh, 'cfg')]} half")
        if self.divides("dec"):
            does.append(f"decoder {place_in(self.mesh, 'dec') + 1} of {size_of(self.mesh, 'dec')}")
        yield "mesh", f"{self!r}: this process is {', '.join(does) or 'alone'}"


class MeshRunDivision(RunDivision):
    """How the processes of a mesh share one run.

    Args:
        mesh: the mesh.
        info: what there is to know of the run.
        counts: where "calls" and "bytes" are counted.
        times: how long encoders have taken.
        record: puts a sentence into the report.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        info: RunInfo,
        counts: Counter[str],
        times: EncoderTimes,
        record: Callable[[str], object],
    ) -> None:
        self._mesh, self._info, self._counts = mesh, info, counts
        self._compared = 0
        self._seen: tuple[int, torch.Size] | None = None  # the last step, and the shape of its latents
        self._shared = [name for name in ("cfg", "dec") if size_of(mesh, name) > 1]
        self._branches = None
        if "cfg" in self._shared:
            self._branches = Branches(mesh.get_group("cfg"), place_in(mesh, "cfg"), counts)
        group = mesh.get_group("dec") if "dec" in self._shared else None
        self._decoders = Decoders(group, place_in(mesh, "dec"), size_of(mesh, "dec"), counts)
        self._encoders = None if group is None else Encoders(group, times, counts, record)

    def take_half(self, call: Mapping[str, Any], reason: str | None) -> tuple[Mapping[str, Any], bool]:
        if self._branches is None:
            return call, False
        if reason is not None:
            self._info.note(f"every process runs both of guidance's halves: {reason}")
        return self._branches.take(call, reason)

    def join_halves(self, output: Tensor) -> Tensor:
        return output if self._branches is None else self._branches.join(output)

    def encode(self, encode: Callable[[], Features], rows: int) -> Features:
        return encode() if self._encoders is None else self._encoders.encode(encode, rows)

    def forget(self) -> None:
        if self._encoders is not None:
            self._encoders.forget()

    def widen(self, plan: Plan) -> Plan:
        return self._decoders.widen(plan)

    def take_steps(self, together: range) -> range:
        return self._decoders.take(together)

    def join_steps(self, outputs: Sequence[Tensor], together: range) -> Sequence[Tensor]:
        return self._decoders.join(outputs, together)

    def compare(self, sample: Tensor, step: int) -> None:
        if self._seen is not None and step != self._seen[0] and sample.shape != self._seen[1]:
            # Processes that do not all change at once would send each other tensors of different sizes.
            raise ValueError(
                "latents must keep their shape in a run that processes share, batch included, got "
                f"{tuple(self._seen[1])} at step {self._seen[0]} and {tuple(sample.shape)} at step {step}: leave "
                "guidance on to the end, or patch without a mesh"
            )
        self._seen = (step, sample.shape)
        if self._compared == _COMPARED:
            return
        self._compared += 1
        if sample.device.type != self._mesh.device_type:
            raise ValueError(f"the mesh is for {self._mesh.device_type}, and the pipeline runs on {sample.device}")
        values = sample.detach().double()
        ends = values.flatten()[[0, -1]]
        numbers = torch.stack(
            [*values.new_tensor([step, self._info.total, *_shape(sample)]), values.mean(), values.std(), *ends]
        )
        for name in self._shared:
            found = gather(numbers, self._mesh.get_group(name), "the latents of a run", self._counts)
            if not torch.allclose(found, numbers.expand_as(found), rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"the processes of a picture must have the same latents at step {step}, and those along {name!r} "
                    "differ: give all of them the same call, with a generator of the same seed"
                )


def _shape(sample: Tensor) -> list[int]:
    """Return the sizes of latents as five numbers, those of videos among them."""
    return [*sample.shape, *(0 for _ in range(5 - sample.ndim))]
