"""Several processes that share the work of pictures, on ``torch.distributed``; nothing here is imported without a mesh.

- ``meshes``: what a DeviceMesh must be, and what its dimensions mean.
- ``exchange``: collectives that are counted, and that end in a clear error when a process is lost.
- ``weights``: whether all processes hold the same weights.
- ``branches``, ``decoders``: guidance's halves, and the steps decoded together, divided among processes.
- ``peers``: what a patched pipeline knows of the other processes.
- ``launch``: what torchrun or accelerate has started.
"""
