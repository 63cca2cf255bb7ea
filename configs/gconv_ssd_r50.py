# GConv Prune on SSD300 with ResNet-50, COCO 2017. The paper prunes classifiers only, so the schedule is ours: the dense
# detector trains for 130 epochs, its backbone gets 2 groups everywhere behind the stem, as published for ResNet-50, and
# it trains on for 65 epochs, with masks. Run it with tools/compress.py, which does both, or give the dense weights as
# load_from.
_base_ = "./_base_/ssd_r50_650e.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="GConvPrune", groups=2),
    scope="backbone",
    input_size=300,
)
custom_hooks = [*_base_.custom_hooks, dict(type="prune_mm.PruningHook")]

pretrain = dict(
    train_cfg=dict(max_epochs=130),
    optim_wrapper=dict(optimizer=dict(lr=2.6e-3 * 8 * 64 / 32)),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=300),
        dict(type="MultiStepLR", begin=0, end=130, by_epoch=True, milestones=[86, 108], gamma=0.1),
    ],
)
train_cfg = dict(max_epochs=65)
optim_wrapper = dict(optimizer=dict(lr=2.6e-4 * 8 * 64 / 32))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=300),
    dict(type="MultiStepLR", begin=0, end=65, by_epoch=True, milestones=[43, 54], gamma=0.1),
]
