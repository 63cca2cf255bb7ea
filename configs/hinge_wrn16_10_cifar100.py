# Hinge on WRN-16-10, CIFAR-100, as published: columns of a matrix behind the first convolution of each block, rows of
# one behind the second; no teacher. For the other published row: --cfg-options model.pruner.target.macs=0.7556.
# Penalties are means over the 6 blocks here, published are sums.
_base_ = ["./_base_/models/wrn16_10_cifar100.py", "./_base_/cifar100_300e_hinge.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.5731),
        init_method="p-identity",
        strength=4e-4,
        threshold=5e-3,
        same_ratio=True,
        annealing=dict(factor=2, high=400 / 6, low=350 / 6),
    ),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

steps = [dict(type="MultiStepLR", by_epoch=True, milestones=[60, 120, 160], gamma=0.1)]
pretrain = dict(train_cfg=dict(max_epochs=200), param_scheduler=steps)
param_scheduler = steps
finetune = dict(
    train_cfg=dict(max_epochs=200), optim_wrapper=dict(optimizer=dict(lr=0.01)), param_scheduler=steps, custom_hooks=[]
)
