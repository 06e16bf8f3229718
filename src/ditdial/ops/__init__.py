"""Pure tensor maths: tensors in, tensors out.

Grouping base patches to coarse ones and back (`ditdial.ops.patching`, the idea of the library),
positions of groups, pooling of tokens, gates of routers, divided differences, the flow target.
Shapes are part of the names (``x_BND``). Nothing here imports diffusers or another room.
"""
