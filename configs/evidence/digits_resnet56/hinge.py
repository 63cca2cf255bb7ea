# As for ResNet-20, with 30 epochs before the search, which has at most 2, and 28 after it.
_base_ = "../_base_/digits_resnet56.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.5),
        strength=0.03,
        threshold=0.1,
        layer_balancing=True,
        relative_threshold=True,
        same_ratio=True,
    ),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(_base_.half, optim_wrapper=dict(optimizer=dict(lr=0.1)))
train_cfg = dict(max_epochs=2, val_interval=2)
optim_wrapper = dict(optimizer=dict(lr=2e-2), paramwise_cfg=dict(custom_keys={".pair.weight": dict(lr_mult=5)}))
param_scheduler = []
default_hooks = dict(checkpoint=dict(interval=1))
finetune = dict(
    train_cfg=dict(max_epochs=28, val_interval=28),
    optim_wrapper=dict(optimizer=dict(lr=0.03), paramwise_cfg=None),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
        dict(type="CosineAnnealingLR", eta_min=1e-4, by_epoch=True, convert_to_iter_based=True, end=28, T_max=28),
    ],
)
recalibrate = 20
# The default of 0.2 of the channels of each layer is too many here.
at_25 = dict(
    model=dict(pruner=dict(target=dict(macs=0.25), min_share=0.1)),
    finetune=dict(optim_wrapper=dict(optimizer=dict(lr=0.05))),
)
