# StrucSpars on Mask R-CNN R50-FPN, COCO 2017. The paper prunes classifiers only, so target and schedule are ours.
# Search: 45k iterations of 32 images at a constant learning rate, no weight decay, as published for ImageNet; 750
# iterations count as one of its 60 epochs, and delta is larger than the published 2e-6 as they are shorter. Then the
# compact model trains for 90k iterations.
_base_ = "./_base_/maskrcnn_r50_270k.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="StrucSpars", target=dict(macs=0.6), warmup=5, delta=2e-5, interval=None, epoch_iters=750),
    scope="backbone",
    input_size=(800, 1344),
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

train_cfg = dict(max_iters=45000, val_interval=15000)
optim_wrapper = dict(optimizer=dict(weight_decay=0.0))
param_scheduler = [dict(type="LinearLR", start_factor=1.0 / 3.0, by_epoch=False, begin=0, end=500)]
finetune = dict(
    train_cfg=dict(max_iters=90000),
    optim_wrapper=dict(optimizer=dict(weight_decay=1e-4)),
    param_scheduler=[
        dict(type="LinearLR", start_factor=1.0 / 3.0, by_epoch=False, begin=0, end=500),
        dict(type="MultiStepLR", begin=0, end=90000, by_epoch=False, milestones=[60000, 80000], gamma=0.1),
    ],
)
default_hooks = dict(checkpoint=dict(interval=5000))
