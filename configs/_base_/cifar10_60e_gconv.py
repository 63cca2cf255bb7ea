# CIFAR-10 with GConv Prune's published recipe for residual networks: the dense network trains for 164 epochs; pruned it
# trains on for 60, with masks.
_base_ = "./cifar10_bs128.py"

val_cfg = dict()
test_cfg = dict()

pretrain = dict(
    train_cfg=dict(max_epochs=164),
    optim_wrapper=dict(optimizer=dict(lr=0.1, weight_decay=1e-4)),
    param_scheduler=[dict(type="MultiStepLR", by_epoch=True, milestones=[81, 122], gamma=0.1)],
)
train_cfg = dict(by_epoch=True, max_epochs=60, val_interval=1)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=1e-2, momentum=0.9, weight_decay=5e-4))
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[30, 45], gamma=0.1)]
auto_scale_lr = dict(base_batch_size=128)
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=3))
randomness = dict(seed=0)
