"""Other people's ways to make a pipeline faster, each as a context manager around one pipeline.

Where a method has a package, that is used.  The others are written from their papers, as strong as we could make them.
"""

from .packages import deepcache, plain_openvino, pyramid_attention_broadcast, token_merging
from .spectrum import spectrum
from .stock import in_bfloat16, with_spacing
from .t_gate import t_gate

__all__ = [
    "deepcache",
    "in_bfloat16",
    "plain_openvino",
    "pyramid_attention_broadcast",
    "spectrum",
    "t_gate",
    "token_merging",
    "with_spacing",
]
