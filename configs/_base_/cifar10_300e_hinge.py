# CIFAR-10 with Hinge's published recipe, batches of 64. The dense network trains first (its published weights cannot be
# loaded here). Search: the matrices at a learning rate of 0.1, everything else at a hundredth of it, until the cost is
# within 10 % of the target, 200 epochs at most. Then the compact model trains for 300 epochs, and learns from the dense
# one. Targets are MACs of the backbone; the published ones also count norms, ReLUs and the classifier, which are a few
# per cent.
_base_ = "./cifar10_bs128.py"

data_preprocessor = dict(mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7])
train_dataloader = dict(batch_size=64)
val_cfg = dict()
test_cfg = dict()

steps = [dict(type="MultiStepLR", by_epoch=True, milestones=[150, 225], gamma=0.1)]
pretrain = dict(
    train_cfg=dict(max_epochs=300),
    optim_wrapper=dict(optimizer=dict(lr=0.1), paramwise_cfg=None),
    param_scheduler=steps,
)
train_cfg = dict(by_epoch=True, max_epochs=200, val_interval=1)
optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=1e-3, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={".pair.weight": dict(lr_mult=100)}),
)
param_scheduler = steps
finetune = dict(
    train_cfg=dict(max_epochs=300),
    optim_wrapper=dict(optimizer=dict(lr=0.1), paramwise_cfg=None),
    param_scheduler=steps,
    custom_hooks=[
        dict(type="prune_mm.DistillationHook", teacher=dict(checkpoint="{{pretrained}}"), temperature=4.0, weight=0.4)
    ],
)
auto_scale_lr = dict(base_batch_size=64)
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=3))
randomness = dict(seed=0)
