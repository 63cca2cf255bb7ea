# StrucSpars turns the convolutions in the backbone of a small SSD into grouped ones, on generated images. Search: a
# constant learning rate and no weight decay, as published. Then the compact model trains on.
_base_ = "../_base_/demo_ssd_r18.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="StrucSpars", target=dict(macs=0.6), warmup=1, delta=2e-5, interval=None),
    scope="backbone",
    input_size=128,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

train_cfg = dict(max_epochs=8, val_interval=4)
optim_wrapper = dict(optimizer=dict(weight_decay=0.0))
param_scheduler = [dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=100)]
finetune = dict(
    train_cfg=dict(max_epochs=6, val_interval=6),
    optim_wrapper=dict(optimizer=dict(weight_decay=0.01)),
    param_scheduler=[
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=6, T_max=6)
    ],
)
