"""Several processes that share the work of pictures, on ``torch.distributed``; nothing here is imported without a mesh.

- ``meshes``: what a DeviceMesh must be, and what its dimensions mean.
- ``exchange``: collectives that are counted, and that end in a clear error when a process is lost.
- ``weights``: whether all processes hold the same weights.
- ``branches``, ``encoders``, ``decoders``: guidance's halves, the encoder at key steps, and the steps decoded together:
  what is whose.
- ``division``: which parts of a patched pipeline's runs are whose.
- ``launch``: what torchrun or accelerate has started.
"""
