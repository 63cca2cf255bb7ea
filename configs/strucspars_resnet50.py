# StrucSpars on ResNet-50, ImageNet, as published: 35 % of the weights of the 52 convolutions behind the stem go, and
# their channels are sorted every 500 iterations and after every epoch. For a budget in MACs write
# target=dict(macs=0.65).
_base_ = ["mmpretrain::_base_/models/resnet50.py", "./_base_/in1k_60e_strucspars.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="StrucSpars",
        target=dict(weights=0.65),
        warmup=5,
        delta=2e-6,
        initial_rounds=50,
        rounds=20,
        interval=500,
        interval_rounds=5,
    ),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
