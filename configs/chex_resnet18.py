# CHEX on ResNet-18, ImageNet. The paper's row: 1.03 G MACs of 1.81 G, top-1 69.6.
_base_ = "./_base_/resnet18_in1k_250e.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="CHEX", target=dict(macs=0.57), initial_regrow=0.3, interval=2, end=180),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
