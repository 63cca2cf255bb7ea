# CHEX on ResNet-34, ImageNet. The paper's row: 2 G MACs of 3.66 G, top-1 73.5.
_base_ = "./_base_/resnet34_in1k_250e.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="CHEX", target=dict(macs=0.54), initial_regrow=0.3, interval=2, end=180),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
