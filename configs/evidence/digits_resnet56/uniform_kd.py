# UniformL1 that also learns from the logits of the dense row's network.
_base_ = "./uniform.py"

custom_hooks = [
    dict(type="prune_mm.PruningHook"),
    dict(type="prune_mm.DistillationHook", teacher=dict(checkpoint="{{dense}}"), temperature=4.0, weight=0.4),
]
