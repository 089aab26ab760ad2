"""What the dimensions of a DeviceMesh mean, and which meshes fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: Dimension -> what is divided among its processes.
DIMENSIONS = {
    "dp": "prompts: each process makes pictures of its own",
    "cfg": "guidance's two halves of the batch",
    "dec": "the steps that are decoded together",
}


def check_mesh(mesh: Any) -> DeviceMesh:
    """Return a mesh whose dimensions difffast knows, and of which this process is a part.

    Raises:
        TypeError: it is no DeviceMesh.
        ValueError: a dimension has no name, or an unknown one; "cfg" has more than two processes; or this process is
            not in it.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
    names = mesh.mesh_dim_names
    if not names or set(names) - set(DIMENSIONS):
        known = ", ".join(f'"{name}"' for name in DIMENSIONS)
        raise ValueError(f"the dimensions of a mesh must be named {known}, got {names}")
    if size_of(mesh, "cfg") > 2:
        raise ValueError(f'dimension "cfg" must have 2 processes, one for each half, got {size_of(mesh, "cfg")}')
    if mesh.get_coordinate() is None:
        raise ValueError(f"this process must be in the mesh, which is {mesh}")
    return mesh


def size_of(mesh: DeviceMesh, name: str) -> int:
    """Return how many processes a dimension has; 1 where the mesh does not have it."""
    names = mesh.mesh_dim_names or ()
    return mesh.size(names.index(name)) if name in names else 1


def place_in(mesh: DeviceMesh, name: str) -> int:
    """Return this process's place in a dimension, from 0."""
    return mesh.get_local_rank(name) if name in (mesh.mesh_dim_names or ()) else 0


def parse_mesh(text: str | None, processes: int) -> dict[str, int]:
    """Return the sizes of a mesh that is written as "dp=2,cfg=2"; None: all processes have prompts of their own.

    Raises:
        ValueError: it is not written so, a dimension is unknown or given twice, or the sizes do not multiply to
            ``processes``.
    """
    if text is None:
        return {"dp": processes}
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in DIMENSIONS or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"a mesh is written as dp=2,cfg=2,dec=2 or a part of it, each of them once, got {text!r}")
        sizes[name] = int(size)
    product = 1
    for size in sizes.values():
        product *= size
    if product != processes:
        raise ValueError(f"mesh {text} must have as many processes as there are, {processes}, and has {product}")
    return sizes
