# As for ResNet-20, with 30 epochs of search and 30 after it.
_base_ = "../_base_/digits_resnet56.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="StrucSpars", target=dict(macs=0.5), warmup=5, delta=1.5e-4, interval=None),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

train_cfg = dict(max_epochs=30, val_interval=3)
optim_wrapper = dict(optimizer=dict(weight_decay=0.0))
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20)]
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
finetune = dict(
    train_cfg=dict(max_epochs=30, val_interval=30),
    optim_wrapper=dict(optimizer=dict(lr=0.05, weight_decay=5e-4)),
    param_scheduler=_base_.half["param_scheduler"],
    default_hooks=dict(checkpoint=dict(interval=5, max_keep_ckpts=1)),
)
recalibrate = 20
