# StrucSpars on ResNet-50, ImageNet. Published (command of the authors' README): 35 % of the weights of the 52
# convolutions behind the stem go, their channels are sorted every 500 iterations and after every epoch, and the two
# stages in the base. Ours: the deepest level may be used (faithful=True: as published). For a budget in MACs write
# target=dict(macs=0.65).
_base_ = ["mmpretrain::_base_/models/resnet50.py", "./_base_/in1k_60e_strucspars.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    # Trained from random weights, as published with no norm at zero.
    model=dict(_base_.model, backbone=dict(_base_.model.backbone, zero_init_residual=False)),
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
