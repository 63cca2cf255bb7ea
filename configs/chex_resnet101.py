# CHEX on ResNet-101, ImageNet. The paper's row: 3.4 G MACs of 7.8 G, top-1 78.8.
# Its 1.9 G row (77.6) is target=dict(macs=0.24).
_base_ = "./_base_/resnet101_in1k_250e.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="CHEX", target=dict(macs=0.44), initial_regrow=0.3, interval=2, end=180),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
