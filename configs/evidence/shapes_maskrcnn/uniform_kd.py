# UniformL1 that also learns from the network of the dense row.
_base_ = "./uniform.py"

custom_hooks = [
    dict(type="prune_mm.PruningHook"),
    dict(type="prune_mm.DistillationHook", teacher=dict(checkpoint="{{dense}}")),
]
