# CIFAR-10 with StrucSpars' published recipe. Search: batches of 64, 100 epochs at a constant learning rate, no weight
# decay, from random weights. Then the compact model trains on: 160 epochs, linear warm-up of 10, steps, weight decay.
_base_ = "./cifar10_bs128.py"

train_dataloader = dict(batch_size=64)
val_cfg = dict()
test_cfg = dict()

train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=0.0))
param_scheduler = []
finetune = dict(
    train_cfg=dict(max_epochs=160),
    optim_wrapper=dict(optimizer=dict(weight_decay=1e-4)),
    param_scheduler=[
        dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
        dict(type="MultiStepLR", by_epoch=True, milestones=[80, 120], gamma=0.1),
    ],
)
auto_scale_lr = dict(base_batch_size=64)
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=3))
randomness = dict(seed=0)
