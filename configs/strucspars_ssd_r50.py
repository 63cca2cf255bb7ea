# StrucSpars on SSD300 with ResNet-50, COCO 2017. The paper prunes classifiers only, so target and schedule are ours.
# Search: 60 epochs of 8 GPUs x 64 at a constant learning rate, no weight decay, as published for ImageNet; delta is
# larger than the published 2e-6 as these epochs are shorter. Then the compact model trains for 130 epochs.
_base_ = "./_base_/ssd_r50_650e.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="StrucSpars", target=dict(macs=0.6), warmup=5, delta=5e-5, interval=None),
    scope="backbone",
    input_size=300,
)
custom_hooks = [*_base_.custom_hooks, dict(type="prune_mm.PruningHook")]

train_cfg = dict(max_epochs=60)
optim_wrapper = dict(optimizer=dict(weight_decay=0.0))
param_scheduler = [dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=300)]
finetune = dict(
    train_cfg=dict(max_epochs=130),
    optim_wrapper=dict(optimizer=dict(weight_decay=5e-4)),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=300),
        dict(type="MultiStepLR", begin=0, end=130, by_epoch=True, milestones=[86, 108], gamma=0.1),
    ],
)
